"""Adapters whose names are parts of each other's are saved, loaded and deleted one by one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
from safetensors.torch import load_file

from tests.lifecycle.verbs import KINDS, OF, OURS, TABLE, as_base, base, children, files_in, outputs
from tests.small_models import same

# Each is a part of another one, a word that PEFT uses in keys, or a part of a module's name.
NAMES = ("a", "ab", "default", "default_2", "gender", "gender_2")


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "erasure"), ("gpt2", "GRADIEND")])
def test_names_that_are_parts_of_each_other(architecture: str, kind: str, tmp_path: Path):
    """Each adapter is saved with its own tensors, and acts the same alone, beside all others, and alone again."""
    model = OF[kind].added(architecture, *NAMES)
    expected = {}
    for name in NAMES:
        model.set_adapter(name)
        expected[name] = outputs(model, architecture)
        model.save_pretrained(tmp_path / name)
    pairs = [(one, other) for one in NAMES for other in NAMES if one < other]
    assert not any(same(expected[one], expected[other]) for one, other in pairs)

    together = base(architecture)
    for name in NAMES:
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert not [key for key in tensors if name in key.split(".")]
        alone = base(architecture)
        alone.load_adapter(str(tmp_path / name), name)
        assert same(outputs(alone, architecture), expected[name])
        together.load_adapter(str(tmp_path / name), name)
    left = [*NAMES]
    while left:
        for name in left:
            together.set_adapter(name)
            assert same(outputs(together, architecture), expected[name])
        together.delete_adapter(left.pop(0))
    assert as_base(together, architecture) and not children(together)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_model_saves_what_was_selected(kind: str, tmp_path: Path, matrix):
    model = OF[kind].wrapped("bert", "a", "ab", "default")
    expected = {}
    for name in model.peft_config:
        model.set_adapter(name)
        expected[name] = outputs(model, "bert")
    model.save_pretrained(tmp_path / "some", selected_adapters=["ab", "default"])
    # PEFT puts the adapter called "default" into the folder itself, and each other one into a folder of its name.
    assert {Path(file).parent.name for file in files_in(tmp_path / "some")} == {"", "ab"}
    for name, folder in (("ab", tmp_path / "some" / "ab"), ("default", tmp_path / "some")):
        again = peft.PeftModel.from_pretrained(base("bert"), str(folder), name)
        assert same(outputs(again, "bert"), expected[name])
    with pytest.raises(ValueError, match="nobody"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["nobody"])
    matrix(TABLE, "`save_pretrained(selected_adapters=[…])`", kind, "same")
    matrix(TABLE, "names that are parts of each other, saved, loaded and deleted one by one", kind, "same")


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_several_that_were_added_is_saved(kind: str, tmp_path: Path, matrix):
    """transformers saves the active adapter, and refuses when several are active."""
    model = OF[kind].added("bert", "one", "two")
    model.set_adapter("one")
    expected = outputs(model, "bert")
    model.save_pretrained(tmp_path / "one")
    again = base("bert")
    again.load_adapter(str(tmp_path / "one"))
    assert same(outputs(again, "bert"), expected)
    model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match=r"[Mm]ultiple active adapters"):
        model.save_pretrained(tmp_path / "both")
    assert not files_in(tmp_path / "both")
    matrix(TABLE, "`save_pretrained` of a transformers model with one of several active", kind, "same")


@pytest.mark.parametrize("kind", OURS)
def test_two_peft_models_of_two_adapters_exchange_one(kind: str, tmp_path: Path):
    """An adapter that is loaded over one of the same name replaces it, and does not change the other adapter."""
    one, other = OF[kind].wrapped("gpt2", "x", "xy"), OF[kind].wrapped("gpt2", "xy", "x")
    other.set_adapter("x")
    expected = outputs(other, "gpt2")
    one.set_adapter("xy")
    neighbour = outputs(one, "gpt2")
    other.save_pretrained(tmp_path)
    one.load_adapter(str(tmp_path / "x"), "x")
    one.set_adapter("x")
    assert same(outputs(one, "gpt2"), expected)
    one.set_adapter("xy")
    assert same(outputs(one, "gpt2"), neighbour)


@pytest.mark.parametrize("kind", OURS)
def test_a_saved_configuration_says_nothing_of_its_neighbours(kind: str, tmp_path: Path):
    model = OF[kind].wrapped("llama", "gender", "gender_2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never fitted.*")  # both are fitted
        model.save_pretrained(tmp_path)
    written = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("gender", "gender_2")]
    assert "gender_2" not in json.dumps(written) and written[0]["target_modules"] == written[1]["target_modules"]


@pytest.mark.parametrize("kind", OURS)
def test_what_is_left_when_a_lora_was_deleted_is_saved_once_it_is_named(kind: str, tmp_path: Path):
    """PEFT leaves an empty layer of the LoRA, which transformers asks for the active adapter."""
    model = base("bert")
    OF["LoRA"].add(model, "bert", "l", target_modules=["query"])
    OF[kind].add(model, "bert", "a", target_modules=["value"])
    model.set_adapter("l")
    model.delete_adapter("l")
    with pytest.raises(ValueError, match=r"None of the adapters \['a'\] is active: call model\.set_adapter"):
        model.save_pretrained(tmp_path)
    model.set_adapter("a")
    model.save_pretrained(tmp_path)
    again = base("bert")
    again.load_adapter(str(tmp_path), "a")
    assert same(outputs(again, "bert"), outputs(model, "bert"))
