"""A save writes all tensors of an adapter, or it fails and the folder stays as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers as hf
from packaging.version import Version
from safetensors.torch import load_file

from hf_erasure.adapters.common.files import PREFIX
from hf_erasure.adapters.common.layer import adapter_children
from hf_erasure.adapters.saving import own_tensors
from hf_erasure.callbacks.trainer import save_adapters
from tests.lifecycle.verbs import OF, OURS, base, outputs
from tests.small_models import same

WEIGHTS = "adapter_model.safetensors"
LORA = {"r": 2, "target_modules": ["query"], "init_lora_weights": False}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(act: Callable[[], Any], folder: Path, words: str) -> None:
    """Check that `act` fails with these words, and leaves the folder as it was."""
    before = content(folder) if folder.exists() else None
    with pytest.raises(ValueError, match=words):
        act()
    assert (content(folder) if folder.exists() else None) == before


# ---- missing tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_an_adapter_that_was_taken_off_is_not_saved_empty(kind: str, way: str, tmp_path: Path):
    model = OF[kind].wrapped("bert", "default", "other")
    model.save_pretrained(tmp_path / "kept")
    getattr(model.base_model, way)()
    for folder in (tmp_path / "kept", tmp_path / "new"):
        words = r"no module of this BertModel has adapter 'default' any more\. .* as by merge_and_unload"
        refused(lambda f=folder: model.save_pretrained(f), folder, words)
        refused(
            lambda f=folder: model.save_pretrained(f, selected_adapters=["other"]), folder, "adapter 'other' any more"
        )
    again = peft.PeftModel.from_pretrained(base("bert"), str(tmp_path / "kept"))
    assert len(own_tensors(again, "default")) == len(load_file(tmp_path / "kept" / WEIGHTS))


@pytest.mark.parametrize("kind", OURS)
def test_nor_is_one_that_was_never_fitted(kind: str, tmp_path: Path):
    model = peft.get_peft_model(base("bert"), OF[kind].config())
    with pytest.warns(UserWarning, match="was never fitted"):
        model.save_pretrained(tmp_path)
    model.unload()
    refused(lambda: model.save_pretrained(tmp_path), tmp_path, "no module of this BertModel has adapter 'default'")


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub", "Trainer", "callback"])
def test_a_part_of_an_adapter_is_not_saved(kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A layer of the model was removed: some modules still have the adapter, and others are gone."""
    folder, model = tmp_path / "adapter", OF[kind].added("bert", "default")
    names = [*own_tensors(model, "default")]
    total, kept = len(names), sum(".layer.1." not in name for name in names)
    model.save_pretrained(folder)
    model.encoder.layer = model.encoder.layer[:1]
    monkeypatch.setattr(model, "push_to_hub", lambda *_, **__: pytest.fail("pushed"))
    act = {
        "save_pretrained": lambda: model.save_pretrained(folder),
        "push_to_hub": lambda: model.save_pretrained(folder, push_to_hub=True),
        "Trainer": lambda: hf.Trainer(
            model, hf.TrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
        ).save_model(str(folder)),
        "callback": lambda: save_adapters(model, folder, top="default"),
    }[way]
    refused(act, folder, rf"'encoder.* and {total - kept - 1} other tensors of the .* are missing in this BertModel")


def test_an_adapter_whose_copy_of_a_module_was_replaced_is_not_saved(tmp_path: Path):
    model = OF["erasure"].wrapped("bert", "default", modules_to_save=["pooler", "classifier"])
    model.save_pretrained(tmp_path)  # works although this model has no classifier
    model.get_base_model().pooler = model.get_base_model().pooler.original_module
    refused(lambda: model.save_pretrained(tmp_path), tmp_path, "'pooler' is one of its modules_to_save")


@pytest.mark.parametrize("kind", OURS)
def test_of_two_adapters_neither_is_written_when_one_is_not_whole(kind: str, tmp_path: Path):
    model = OF[kind].added("bert", "one", "two")
    for name in ("one", "two"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
    OF[kind].fit(model, "bert", "one", 7)
    next(iter(adapter_children(model, "two"))).delete_adapter("two")
    refused(lambda: save_adapters(model, tmp_path), tmp_path, "other tensors of the .* are missing in this BertModel")


def test_values_that_never_arrived_are_not_saved(tmp_path: Path):
    """The configuration says that the adapter is fitted, but its tensors were never loaded."""
    for kind in OURS:
        config = OF[kind].added("bert", "a").peft_config["a"]
        model = base("bert")
        model.add_adapter(config, "a")
        refused(lambda m=model: m.save_pretrained(tmp_path / "a"), tmp_path / "a", "is missing or not finite")


def test_a_model_without_values_has_none_to_save(tmp_path: Path):
    model = OF["erasure"].added("bert", "a").to("meta")
    refused(
        lambda: model.save_pretrained(tmp_path / "a"),
        tmp_path / "a",
        "is on the meta device or has values that are not",
    )


@pytest.mark.parametrize("kind", OURS)
def test_a_save_without_an_active_adapter_asks_for_one(kind: str, tmp_path: Path):
    model = base("bert")
    model.add_adapter(peft.LoraConfig(target_modules=["query"]), "lora")
    OF[kind].add(model, "bert", "a", target_modules=["key"])
    model.set_adapter("lora")
    model.delete_adapter("lora")
    refused(lambda: model.save_pretrained(tmp_path), tmp_path, r"None of the adapters \['a'\] is active")
    model.set_adapter("a")
    model.save_pretrained(tmp_path)


# ---- what PEFT leaves out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("lora", ["attention", "output", "encoder", "0", "concept_erasure", "gradiend"])
def test_an_adapter_beside_a_lora_named_like_a_module_is_saved_whole(kind: str, lora: str, tmp_path: Path):
    model = base("bert")
    model.add_adapter(peft.LoraConfig(**LORA), lora)
    OF[kind].add(model, "bert", "ours", modules_to_save=["pooler"])
    expected = own_tensors(model, "ours")
    wanted = outputs(model, "bert")
    model.save_pretrained(tmp_path / "save")
    save_adapters(model, tmp_path, only=["ours"])
    for place in ("save", "ours"):
        found = load_file(tmp_path / place / WEIGHTS)
        assert found.keys() == {f"{PREFIX}{name}" for name in expected}
        assert all(torch.equal(found[f"{PREFIX}{name}"], tensor) for name, tensor in expected.items())
        again = peft.PeftModel.from_pretrained(base("bert"), str(tmp_path / place))
        assert same(outputs(again, "bert"), wanted)


@pytest.mark.parametrize("kind", OURS)
def test_an_adapter_named_like_a_part_of_a_wrapper_or_a_parameter_is_saved_whole(kind: str, tmp_path: Path):
    """PEFT puts `base_model.model` in front of all keys, and takes the last parts of a key for an adapter's name."""
    names = ("base_model", "model", "weight", "bias")
    model = OF[kind].wrapped("bert", *names, modules_to_save=["pooler"])
    model.save_pretrained(tmp_path)
    for name in names:
        model.set_adapter(name)
        again = peft.PeftModel.from_pretrained(base("bert"), str(tmp_path / name))
        assert same(outputs(again, "bert"), outputs(model, "bert"))


# ---- a state dict that is passed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_values_that_are_given_go_before_the_models_own(kind: str, wrapped: bool, tmp_path: Path):
    """Trainer passes the values that it has gathered; values that it has not gathered come from the model."""
    model = OF[kind].wrapped("bert", "default") if wrapped else OF[kind].added("bert", "default")
    expected = own_tensors(model, "default")
    changed = next(name for name, tensor in expected.items() if tensor.is_floating_point() and tensor.numel())
    key = f"{PREFIX if wrapped else ''}{changed}.default"
    model.save_pretrained(tmp_path, state_dict={key: expected[changed] + 1})
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == {f"{PREFIX}{name}" for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(found[f"{PREFIX}{name}"], tensor + 1 if name == changed else tensor)


@pytest.mark.parametrize("kind", OURS)
def test_given_values_that_are_not_finite_are_not_saved(kind: str, tmp_path: Path):
    model = OF[kind].added("bert", "a")
    model.save_pretrained(tmp_path)
    infinite = {key: value * float("nan") for key, value in model.state_dict().items() if value.is_floating_point()}
    refused(lambda: model.save_pretrained(tmp_path, state_dict=infinite), tmp_path, "not finite.*Nothing was written")


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_adapter_of_another_method_says_what_it_replaces(kind: str, wrapped: bool, tmp_path: Path):
    OF[kind].added("bert", "a").save_pretrained(tmp_path)
    lora = peft.LoraConfig(**LORA)
    model = base("bert")
    if wrapped:
        model = peft.get_peft_model(model, lora)
    else:
        model.add_adapter(lora)
    with pytest.warns(UserWarning, match="held a .* adapter, and what is saved there now replaces it"):
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*replaces it")
        model.save_pretrained(tmp_path)


@pytest.mark.skipif(Version(accelerate.__version__) < Version("1.11"), reason="transformers saves no compiled layers")
@pytest.mark.parametrize("kind", OURS)
def test_an_adapter_of_compiled_layers_is_saved_under_their_own_names(kind: str, tmp_path: Path):
    model = OF[kind].added("bert", "a")
    expected = outputs(model, "bert")
    model.encoder.layer[0] = torch.compile(model.encoder.layer[0], backend="eager")
    model.save_pretrained(tmp_path)
    again = base("bert")
    again.load_adapter(str(tmp_path))
    assert same(outputs(again, "bert"), expected)
