"""A call that fails says what to do, leaves the model as it was, and a retry with a good adapter works."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from hf_erasure import ConceptErasureConfig
from hf_erasure.adapters import ErasureLayer, erasure_layers
from tests.adapters.lifecycle import NAME, Cell, Lifecycle, State, config_of, fit, state_of
from tests.small_models import LABELS, WIDTH, outputs_of, roughen, same, small_batch, small_model

CELL = Cell("bert", "norms", "output")
ALL_LINEAR = Cell("bert", "all-linear", "output")
# What is on the model before the call: nothing, another erasure, or a LoRA.
STARTS = ("bare", "erasure", "lora")
every_start = pytest.mark.parametrize("start", STARTS)


def starting(start: str, lifecycle: Lifecycle) -> nn.Module:
    """A BERT in training mode with some trainable weights, so that a change to eval mode or frozen weights shows."""
    model = lifecycle.base("bert")
    if start == "erasure":
        model.load_adapter(lifecycle.folder(ALL_LINEAR), adapter_name="present")
    elif start == "lora":
        model.add_adapter(peft.LoraConfig(target_modules=["query"], r=2), adapter_name="present")
    model.encoder.layer[1].train()
    model.pooler.requires_grad_(True)
    return model


def loads(model: nn.Module, lifecycle: Lifecycle, name: str = NAME) -> None:
    """Check that a good adapter loads and acts after the failure."""
    model.load_adapter(lifecycle.folder(CELL), adapter_name=name)
    assert set(erasure_layers(model, name)) == set(CELL.parts.norms)
    assert not model.training


# PEFT's message about targets that do not exist, which depends on its release.
NOWHERE = "not found|No modules were targeted"
BAD_CONFIGS: dict[str, tuple[dict[str, Any], str, type[Exception], str]] = {
    "wrong target": ({"target_modules": ["no_such_module"]}, NAME, ValueError, NOWHERE),
    "wrong expression": ({"target_modules": r"encoder\.layer\.\d+\.nothing"}, NAME, ValueError, NOWHERE),
    "embedding input": ({"target_modules": ["LayerNorm", "word_embeddings"], "site": "input"}, NAME, ValueError, "ids"),
    "name with a dot": ({}, "no.gender", ValueError, "adapter_name='no.gender'.*dot"),
    "name of the prefix": ({}, "concept_erasure_1", ValueError, "adapter_name='concept_erasure_1'"),
    "name of the child": ({}, "concept_erasure", ValueError, "adapter_name='concept_erasure'"),
    "name of a module": ({}, "attention", ValueError, "adapter_name='attention'.*modules of that name"),
    "number of a layer": ({}, "0", ValueError, "adapter_name='0'.*modules of that name"),
    "no concept": ({"labels": None}, NAME, ValueError, "neither labels nor concept_dim"),
}


@every_start
@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_add_adapter(case: str, start: str, lifecycle: Lifecycle):
    fields, name, error, message = BAD_CONFIGS[case]
    model = starting(start, lifecycle)
    before = state_of(model, "bert")
    with pytest.raises(error, match=message):
        model.add_adapter(ConceptErasureConfig(**{"labels": LABELS, **fields}), adapter_name=name)
    before.assert_same(state_of(model, "bert"))
    loads(model, lifecycle)


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_get_peft_model(case: str, lifecycle: Lifecycle):
    fields, name, error, message = BAD_CONFIGS[case]
    model = starting("bare", lifecycle)
    before = state_of(model, "bert")
    with pytest.raises(error, match=message):
        peft.get_peft_model(model, ConceptErasureConfig(**{"labels": LABELS, **fields}), adapter_name=name)
    before.assert_same(state_of(model, "bert"))
    loads(model, lifecycle)


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_add_adapter_of_a_peft_model(case: str, lifecycle: Lifecycle):
    fields, name, error, message = BAD_CONFIGS[case]
    model = peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(ALL_LINEAR))
    before = state_of(model, "bert")
    with pytest.raises(error, match=message):
        model.add_adapter(name, ConceptErasureConfig(**{"labels": LABELS, **fields}))
    before.assert_same(state_of(model, "bert"))
    model.load_adapter(lifecycle.folder(CELL), NAME)


@every_start
def test_something_that_is_no_config(start: str, lifecycle: Lifecycle):
    model = starting(start, lifecycle)
    before = state_of(model, "bert")
    with pytest.raises(TypeError, match="PeftConfig"):
        model.add_adapter({"labels": LABELS}, adapter_name=NAME)
    if start == "bare":  # transformers itself sets it, also in a program that uses LoRA alone
        assert model._hf_peft_config_loaded
        model._hf_peft_config_loaded = False
    before.assert_same(state_of(model, "bert"))
    loads(model, lifecycle)


@pytest.mark.parametrize("verb", ["add_adapter", "load_adapter", "inject_adapter_in_model"])
def test_a_name_that_is_taken_keeps_its_adapter(verb: str, lifecycle: Lifecycle):
    model = lifecycle.fitted(CELL)
    before = state_of(model, "bert")
    calls: dict[str, Callable[[], Any]] = {
        "add_adapter": lambda: model.add_adapter(config_of(ALL_LINEAR), adapter_name=NAME),
        "load_adapter": lambda: model.load_adapter(lifecycle.folder(ALL_LINEAR), adapter_name=NAME),
        "inject_adapter_in_model": lambda: peft.inject_adapter_in_model(config_of(ALL_LINEAR), model, NAME),
    }
    with pytest.raises(ValueError, match=f"{NAME}.*(already|there)"):
        calls[verb]()
    before.assert_same(state_of(model, "bert"))
    loads(model, lifecycle, "another")


def damaged(folder: Path, damage: str, target: Path) -> str:
    """Copy an adapter folder to `target`, damage the copy, and return its path."""
    shutil.copytree(folder, target)
    weights, config = target / "adapter_model.safetensors", target / "adapter_config.json"
    tensors = load_file(weights)
    key = sorted(tensors)[len(tensors) // 2]
    if damage == "missing tensor":
        del tensors[key]
    elif damage == "NaN":
        tensors[key].view(-1)[0] = torch.nan
    elif damage == "infinity":
        tensors[key].view(-1)[-1] = torch.inf
    elif damage == "wrong shape":
        tensors[key] = torch.zeros(3, 3)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "no weights":
        weights.unlink()
    else:
        save_file(tensors, weights, metadata={"format": "pt"})
    if damage == "no sites":
        written = json.loads(config.read_text())
        written["fitted_sites"] = None
        config.write_text(json.dumps(written))
    return str(target)


DAMAGES = {
    "missing tensor": (ValueError, "tensors of the erasure of 'gender' are missing in.*Load the complete folder"),
    "NaN": (ValueError, "missing or not finite"),
    "infinity": (ValueError, "missing or not finite"),
    "wrong shape": (ValueError, r"has shape \[3, 3\].*not of the same adapter"),
    "truncated": (ValueError, "is damaged.*copy or download it again"),
    "no weights": (ValueError, "has no adapter_model.safetensors"),
    "no sites": (ValueError, "fitted_sites.*damaged"),
}
every_damage = pytest.mark.parametrize("damage", DAMAGES)


# A load stops while the configuration, the file or the tensors are checked: one damage of each of the three is enough
# to show whether other adapters on the model are left alone.
STAGES = ("no sites", "truncated", "missing tensor")
DAMAGED_STARTS = [(d, "bare") for d in DAMAGES] + [(d, start) for d in STAGES for start in STARTS[1:]]


@pytest.mark.parametrize(("damage", "start"), DAMAGED_STARTS)
def test_load_adapter_from_a_damaged_folder(damage: str, start: str, lifecycle: Lifecycle, tmp_path: Path):
    model, folder = starting(start, lifecycle), damaged(lifecycle.folder(CELL), damage, tmp_path / "bad")
    before = state_of(model, "bert")
    error, message = DAMAGES[damage]
    with pytest.raises(error, match=message):
        model.load_adapter(folder, adapter_name=NAME)
    before.assert_same(state_of(model, "bert"))
    loads(model, lifecycle)


@every_damage
def test_peft_model_from_a_damaged_folder(damage: str, lifecycle: Lifecycle, tmp_path: Path):
    model, folder = starting("bare", lifecycle), damaged(lifecycle.folder(CELL), damage, tmp_path / "bad")
    before = state_of(model, "bert")
    error, message = DAMAGES[damage]
    with pytest.raises(error, match=message):
        peft.PeftModel.from_pretrained(model, folder)
    before.assert_same(state_of(model, "bert"))
    wrapped = peft.PeftModel.from_pretrained(model, lifecycle.folder(CELL))
    assert set(erasure_layers(wrapped, "default")) == set(CELL.parts.norms)


@pytest.mark.parametrize("name", ["default", "newcomer"])
@every_damage
def test_load_adapter_of_a_peft_model(damage: str, name: str, lifecycle: Lifecycle, tmp_path: Path):
    """A load over an adapter of the same name overwrites it; a failed load leaves the old values."""
    folder = damaged(lifecycle.folder(CELL, seed=200), damage, tmp_path / "bad")
    if name == "default" and damage == "no sites":  # the configuration is not read again for a loaded name
        damage, folder = "NaN", damaged(lifecycle.folder(CELL, seed=200), "NaN", tmp_path / "worse")
    model = peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(CELL))
    before = state_of(model, "bert")
    error, message = DAMAGES[damage]
    with pytest.raises(error, match=message):
        model.load_adapter(folder, name)
    before.assert_same(state_of(model, "bert"))
    model.load_adapter(lifecycle.folder(CELL, seed=200), name)
    model.set_adapter(name)
    expected = peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(CELL, seed=200))
    assert same(outputs_of(model, small_batch("bert")), outputs_of(expected, small_batch("bert")))


def _wider() -> nn.Module:
    config = copy.deepcopy(small_model("bert").config)
    config.hidden_size = 2 * WIDTH
    return transformers.BertModel(config)


def _other_weights() -> nn.Module:
    return roughen(transformers.BertModel(small_model("bert").config), torch.Generator().manual_seed(99))


def _masked_lm() -> nn.Module:
    return transformers.BertForMaskedLM(small_model("bert").config)


WRONG_BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other width": (_wider, r"has shape \[.*here it has \[.*Load it into the model it was fitted on"),
    "other weights": (
        _other_weights,
        "this is another model \\(sampled weights.*Load the adapter into its own base, or fit it",
    ),
    "other weights, with a head": (_masked_lm, r"fitted on .*BertModel.*and this is another model \(sampled weights"),
}


@pytest.mark.parametrize("base", WRONG_BASES)
def test_a_wrong_base(base: str, lifecycle: Lifecycle):
    build, message = WRONG_BASES[base]
    model = build()
    before = State(model, small_batch("bert"))
    with pytest.raises(ValueError, match=message):
        model.load_adapter(lifecycle.folder(CELL))
    before.assert_same(State(model, small_batch("bert")))
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(model, lifecycle.folder(CELL))
    before.assert_same(State(model, small_batch("bert")))
    model.add_adapter(config_of(CELL), adapter_name=NAME)
    fit(model, "bert")


@pytest.mark.parametrize("part", ["", "bert"])
def test_the_base_with_a_head_is_the_same_base(part: str, lifecycle: Lifecycle):
    model = transformers.BertForMaskedLM.from_pretrained(lifecycle.base_folder("bert"))
    model.get_submodule(part).load_adapter(lifecycle.folder(CELL))
    batch = small_batch("bert")
    inputs = {k: v for k, v in batch.items() if k != "concept_labels"}
    with torch.no_grad():
        hidden = model.eval()(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden, outputs_of(lifecycle.fitted(CELL), batch)["last_hidden_state"])


def test_what_the_message_says_to_write_works(lifecycle: Lifecycle):
    config = copy.deepcopy(small_model("bert").config)
    config.is_decoder = config.add_cross_attention = True
    model = transformers.EncoderDecoderModel(
        encoder=lifecycle.base("bert"), decoder=transformers.BertLMHeadModel(config)
    )
    with pytest.raises(
        ValueError, match=r"BertModel.*this EncoderDecoderModel does not have.*has them, model\.encoder\.load_adapter"
    ):
        model.load_adapter(lifecycle.folder(CELL))
    model.encoder.load_adapter(lifecycle.folder(CELL))
    batch = small_batch("bert")
    assert same(outputs_of(model.encoder.eval(), batch), outputs_of(lifecycle.fitted(CELL), batch))


def test_a_base_in_bfloat16_is_the_same_base(lifecycle: Lifecycle):
    model = lifecycle.base("bert").to(torch.bfloat16)
    model.load_adapter(lifecycle.folder(CELL))
    assert set(erasure_layers(model, "default")) == set(CELL.parts.norms)


def test_a_base_that_was_trained_further_warns(lifecycle: Lifecycle):
    model = lifecycle.base("bert")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    with pytest.warns(UserWarning, match="trained further since.*fit the adapter again"):
        model.load_adapter(lifecycle.folder(CELL))


def test_a_fitted_config_without_its_tensors_raises_at_the_first_forward(lifecycle: Lifecycle):
    config = copy.deepcopy(lifecycle.fitted(CELL).peft_config[NAME])
    model = peft.inject_adapter_in_model(config, lifecycle.base("bert"), NAME)
    layers = [module for module in model.modules() if isinstance(module, ErasureLayer)]
    assert all(torch.isnan(part).all() for layer in layers for part in layer.eraser_state(NAME))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"missing or not finite.*Load the complete folder"):
            outputs_of(model, small_batch("bert"))
    state = peft.get_peft_model_state_dict(lifecycle.fitted(CELL), adapter_name=NAME)
    peft.set_peft_model_state_dict(model, state, NAME)
    assert same(outputs_of(model, small_batch("bert")), outputs_of(lifecycle.fitted(CELL), small_batch("bert")))


def test_a_lora_that_fails_to_load_is_left_to_peft(lifecycle: Lifecycle, tmp_path: Path):
    """The state that transformers leaves is the same with and without this package."""
    lora = lifecycle.base("bert")
    lora.add_adapter(peft.LoraConfig(target_modules=["query"], r=2))
    lora.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: torch.zeros(3, 3) for key in load_file(weights)}, weights, metadata={"format": "pt"})
    model = lifecycle.base("bert")
    with pytest.raises(RuntimeError, match=r"size|shape"):
        model.load_adapter(tmp_path)
    assert model._hf_peft_config_loaded and list(model.peft_config) == ["default"]


def test_arguments_by_position(lifecycle: Lifecycle):
    """The wrapped calls take the same positional arguments as the originals."""
    expected = outputs_of(lifecycle.fitted(CELL), small_batch("bert"))
    model = lifecycle.base("bert")
    tensors = load_file(lifecycle.folder(CELL) / "adapter_model.safetensors")
    config = peft.PeftConfig.from_pretrained(lifecycle.folder(CELL))
    model.load_adapter(None, NAME, config, tensors)
    assert same(outputs_of(model, small_batch("bert")), expected)
    wrapped = peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(ALL_LINEAR))
    wrapped.load_adapter(lifecycle.folder(CELL), NAME, False)
    wrapped.set_adapter(NAME)
    assert same(outputs_of(wrapped, small_batch("bert")), expected)


@pytest.mark.parametrize("way", ["load_adapter", "PeftModel"])
def test_low_memory_loading(way: str, lifecycle: Lifecycle):
    if way == "load_adapter":
        model = lifecycle.base("bert")
        model.load_adapter(lifecycle.folder(CELL), low_cpu_mem_usage=True)
    else:
        folder = lifecycle.folder(CELL)
        model = peft.PeftModel.from_pretrained(lifecycle.base("bert"), folder, low_cpu_mem_usage=True)
    assert same(outputs_of(model, small_batch("bert")), outputs_of(lifecycle.fitted(CELL), small_batch("bert")))


def test_saving_over_the_folder_that_was_loaded(lifecycle: Lifecycle, tmp_path: Path):
    """Loaded tensors are not views into the file that the save replaces."""
    folder = tmp_path / "adapter"
    shutil.copytree(lifecycle.folder(CELL), folder)
    model = lifecycle.base("bert")
    model.load_adapter(folder)
    before = outputs_of(model, small_batch("bert"))
    weights = folder / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    assert same(outputs_of(model, small_batch("bert")), before)


def test_one_config_for_two_models(lifecycle: Lifecycle):
    """Fitting writes into the configuration, and its values for one adapter must not get into the other's."""
    config, first, second = config_of(CELL), lifecycle.base("bert"), lifecycle.base("bert")
    first.add_adapter(config, adapter_name=NAME)
    second.add_adapter(config, adapter_name=NAME)
    fit(first, "bert")
    assert first.peft_config[NAME].fitted
    assert not second.peft_config[NAME].fitted and not config.fitted
    assert same(outputs_of(second, small_batch("bert")), outputs_of(lifecycle.base("bert"), small_batch("bert")))
