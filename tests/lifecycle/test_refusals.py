"""Verbs that PEFT has only for LoRA: each is refused with a sentence, and changes nothing."""

from __future__ import annotations

import peft
import pytest
from peft.utils.hotswap import hotswap_adapter

from tests.lifecycle.verbs import OF, OURS, TABLE, as_base, base, outputs
from tests.small_models import same


@pytest.mark.parametrize("kind", OURS)
def test_add_weighted_adapter(kind: str, matrix):
    model = OF[kind].wrapped("bert", "a", "ab")
    before = outputs(model, "bert")
    instead = {"erasure": r"combine_adapters\(model, names, into\)", "GRADIEND": r"set_adapter\(\['a', 'ab'\]\)"}
    with pytest.raises(ValueError, match=rf"\['a', 'ab'\].*{instead[kind]}"):
        model.add_weighted_adapter(["a", "ab"], [0.5, 0.5], "c")
    assert same(outputs(model, "bert"), before) and list(model.peft_config) == ["a", "ab"]
    matrix(TABLE, "`add_weighted_adapter`", kind, "refused")


@pytest.mark.parametrize("kind", OURS)
def test_convert_to_lora(kind: str, matrix):
    model = OF[kind].wrapped("bert", "a")
    before = outputs(model, "bert")
    with pytest.raises(TypeError, match="LoRA conversion"):
        peft.convert_to_lora(model, rank=1)
    assert same(outputs(model, "bert"), before)
    matrix(TABLE, "`convert_to_lora`", kind, "refused")


@pytest.mark.parametrize("kind", OURS)
def test_mixed_models(kind: str, tmp_path, matrix):
    OF[kind].added("bert", "a").save_pretrained(tmp_path)
    model = base("bert")
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(model, OF[kind].config(), mixed=True)
    with pytest.raises(ValueError, match="not supported for mixed models"):
        peft.PeftMixedModel.from_pretrained(model, str(tmp_path))
    assert as_base(model, "bert")
    mixed = peft.get_peft_model(base("bert"), OF["LoRA"].config(), "lora", mixed=True)
    with pytest.raises(ValueError, match="not compatible"):
        mixed.add_adapter("a", OF[kind].config())
    matrix(TABLE, "`PeftMixedModel`, `mixed=True`", kind, "refused")


@pytest.mark.parametrize("kind", OURS)
def test_hotswap(kind: str, tmp_path, matrix):
    model = OF[kind].wrapped("bert", "a", "b")
    before = outputs(model, "bert")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only supports LORA"):
        hotswap_adapter(model, str(tmp_path / "b"), "a")
    assert same(outputs(model, "bert"), before)
    matrix(TABLE, "`hotswap_adapter`", kind, "refused")


def test_what_a_lora_does(matrix):
    """The table's column for LoRA, to compare with."""
    model = OF["LoRA"].wrapped("bert", "a", "ab")
    model.add_weighted_adapter(["a", "ab"], [0.5, 0.5], "c")
    assert "c" in model.peft_config
    matrix(TABLE, "`add_weighted_adapter`", "LoRA", "same")
    default = OF["LoRA"].wrapped("bert", "default")
    config, state = peft.convert_to_lora(default, rank=1)
    assert config.r == 1 and state
    matrix(TABLE, "`convert_to_lora`", "LoRA", "same")
    mixed = peft.get_peft_model(base("bert"), OF["LoRA"].config(), "lora", mixed=True)
    assert isinstance(mixed, peft.PeftMixedModel)
    matrix(TABLE, "`PeftMixedModel`, `mixed=True`", "LoRA", "same")


def test_a_lora_is_swapped_in_place(tmp_path, matrix):
    model = OF["LoRA"].wrapped("bert", "one", "two")
    model.set_adapter("two")
    expected = outputs(model, "bert")
    model.save_pretrained(tmp_path)
    model.set_adapter("one")
    hotswap_adapter(model, str(tmp_path / "two"), "one")
    assert same(outputs(model, "bert"), expected)
    matrix(TABLE, "`hotswap_adapter`", "LoRA", "same")
