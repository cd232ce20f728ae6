"""`modules_to_save`: a module that is trained and saved with the adapter, through PEFT's own wrapper."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.lifecycle.verbs import KINDS, LOADS_COPIES, OF, OURS, TABLE, as_base, base, children, outputs
from tests.small_models import distance, same, small_model

FIELDS = {"modules_to_save": ["pooler.dense"], "exclude_modules": ["pooler.dense"]}
COPIES = ["pooler.dense.modules_to_save.a.bias", "pooler.dense.modules_to_save.a.weight"]


def trainable(model: nn.Module) -> list[str]:
    return sorted(n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n)


def train(model: nn.Module) -> None:
    """Change the copy, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_and_loaded_with_the_adapter(kind: str, tmp_path, matrix):
    model = OF[kind].added("bert", "a", **FIELDS)
    assert trainable(model) == COPIES
    untrained = outputs(model, "bert")
    train(model)
    expected = outputs(model, "bert")
    assert not same(expected, untrained)
    model.save_pretrained(tmp_path)
    saved = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "pooler" in key]
    assert saved == ["base_model.model.pooler.dense.bias", "base_model.model.pooler.dense.weight"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["pooler.dense"]
    again = base("bert")
    if LOADS_COPIES or kind in OURS:  # an older transformers loads a LoRA without its copy, and gives no warning
        again.load_adapter(str(tmp_path), "other")
        assert same(outputs(again, "bert"), expected)
    wrapped = peft.PeftModel.from_pretrained(base("bert"), str(tmp_path), "other")
    assert same(outputs(wrapped, "bert"), expected)
    matrix(TABLE, "`modules_to_save`", kind, "same")


@pytest.mark.parametrize("kind", OURS)
def test_off_is_the_base_model_and_deleted_is_too(kind: str):
    model = OF[kind].wrapped("bert", "a", **FIELDS)
    train(model)
    acting = outputs(model, "bert")
    with model.disable_adapter():
        assert as_base(model, "bert")
    assert same(outputs(model, "bert"), acting)
    with pytest.raises(ValueError, match=r"where modules_to_save=\['pooler.dense'\] is in the same configuration"):
        model.add_adapter("b", OF[kind].config())
    assert same(outputs(model, "bert"), acting)
    model.add_adapter("b", OF[kind].config(modules_to_save=["pooler.dense"]))
    model.set_adapter("b")
    assert as_base(model, "bert")  # "b" was never fitted, and its copy was never trained
    model.set_adapter("a")
    assert same(outputs(model, "bert"), acting)
    for name in ("a", "b"):
        model.delete_adapter(name)
    assert type(model.base_model.model.pooler.dense) is nn.Linear
    assert as_base(model.base_model.model, "bert")


@pytest.mark.parametrize("kind", OURS)
def test_merged_for_good_with_the_trained_copy(kind: str):
    model = OF[kind].wrapped("bert", "a", **FIELDS)
    train(model)
    expected = outputs(model, "bert")
    merged = model.merge_and_unload()
    assert type(merged.pooler.dense) is nn.Linear and not children(merged)
    assert distance(outputs(merged, "bert"), expected) < 1e-5  # as in tests/adapters/lifecycle.py
    assert merged.state_dict().keys() == small_model("bert").state_dict().keys()


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("start", ["bare", "PeftModel"])
def test_a_module_with_an_adapter_is_not_copied(start: str, kind: str):
    """PEFT would copy the adapter with the module, and save neither; it refuses this for a LoRA too."""
    copying = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["output.dense"])
    if start == "bare":
        model = OF[kind].added("bert", "a")
        before = outputs(model, "bert")
        with pytest.raises(ValueError, match=r"'lora' cannot be added: 'encoder.layer.0.*is one of modules_to_save"):
            model.add_adapter(copying, "lora")
        assert list(model.peft_config) == ["a"] and model.active_adapters() == ["a"]
        assert same(outputs(model, "bert"), before)
    else:
        model = peft.get_peft_model(base("bert"), copying, "lora").eval()
        before, modules = outputs(model, "bert"), [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=r"is one of modules_to_save|is trained with another adapter"):
            model.base_model.model.add_adapter(OF[kind].config(target_modules=["output.dense"]), "a")
        assert [name for name, _ in model.named_modules()] == modules and not children(model)
        assert same(outputs(model, "bert"), before)


@pytest.mark.parametrize("kind", OURS)
def test_a_failure_takes_the_copy_away(kind: str):
    model = base("bert")
    with pytest.raises((ValueError, TypeError)):
        model.add_adapter(OF[kind].config(**{**FIELDS, "modules_to_save": ["encoder.layer"]}), "a")
    assert [name for name, _ in model.named_modules()] == [name for name, _ in small_model("bert").named_modules()]
    assert as_base(model, "bert") and not hasattr(model, "peft_config")
