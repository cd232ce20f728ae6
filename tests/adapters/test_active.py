"""Adding an adapter can switch others off: a warning names them, whatever their kinds and their order."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest

from hf_erasure.adapters.common.acting import adapters_now
from tests.lifecycle.verbs import KINDS, OF, base

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
NOUNS = {"erasure": "the erasure", "GRADIEND": "the GRADIEND adapter", "LoRA": "the LORA adapter"}
TARGETS = {"erasure": ["query"], "GRADIEND": ["key"], "LoRA": ["value"]}


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(w.filename == __file__ for w in caught if "switched" in str(w.message))
    return [str(w.message) for w in caught if "switched" in str(w.message)]


@pytest.mark.parametrize(("first", "last"), [pair for pair in itertools.product(KINDS, KINDS) if pair != ("LoRA",) * 2])
def test_what_an_added_adapter_switches_off_is_named(first: str, last: str):
    model = base("bert")
    OF[first].add(model, "bert", "first", target_modules=TARGETS[first])
    assert adapters_now(model).acting.keys() == {"first"}
    config = OF[last].config(target_modules=TARGETS[last])
    (said,) = warned(lambda: model.add_adapter(config, "last"))
    assert re.search(rf"Adding 'last' switched {NOUNS[first]} 'first' off.*set_adapter\(\['first', 'last'\]\)", said)
    assert ("sticky=True" in said) == (first != "LoRA")
    assert "first" not in adapters_now(model).acting and "first" in adapters_now(model).loaded
    model.set_adapter(["first", "last"])
    assert "first" in adapters_now(model).acting


@pytest.mark.parametrize("kind", ["erasure", "GRADIEND"])
def test_one_that_is_not_fitted_yet_is_named_too(kind: str):
    model = base("bert")
    model.add_adapter(OF[kind].config(target_modules=["query"]), "first")
    (said,) = warned(lambda: model.add_adapter(OF["LoRA"].config(target_modules=["value"]), "last"))
    assert f"Adding 'last' switched {NOUNS[kind]} 'first' off" in said


def test_two_adapters_that_go_off_are_named_together():
    model = base("bert")
    for kind in ("erasure", "LoRA"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            OF[kind].add(model, "bert", kind, target_modules=TARGETS[kind])
    model.set_adapter(["erasure", "LoRA"])
    (said,) = warned(lambda: model.add_adapter(OF["GRADIEND"].config(target_modules=["key"]), "last"))
    assert "the LORA adapter 'LoRA', the erasure 'erasure' off" in said


def test_other_methods_are_named_as_peft_names_them():
    model = base("bert")
    model.add_adapter(peft.IA3Config(target_modules=["value"], feedforward_modules=[]), "scaled")
    (said,) = warned(lambda: model.add_adapter(OF["erasure"].config(target_modules=["query"]), "last"))
    assert "the IA3 adapter 'scaled' off" in said


@pytest.mark.parametrize("kind", ["erasure", "GRADIEND"])
def test_loading_says_it_too_and_a_peft_model_says_how_there(kind: str, tmp_path):
    for name in ("one", "two"):
        OF[kind].added("bert", name, target_modules=["query"]).save_pretrained(tmp_path / name)
    model = base("bert")
    model.load_adapter(tmp_path / "one", adapter_name="one")
    (said,) = warned(lambda: model.load_adapter(tmp_path / "two", adapter_name="two"))
    assert f"Adding 'two' switched {NOUNS[kind]} 'one' off" in said
    model = base("bert")
    model.load_adapter(tmp_path / "one", adapter_name="one")
    for call in (
        lambda: peft.PeftModel.from_pretrained(model, tmp_path / "two", adapter_name="two"),
        lambda: peft.get_peft_model(model, OF[kind].config(target_modules=["key"]), "three"),
    ):
        model.set_adapter("one")
        (said,) = warned(call)
        assert f"switched {NOUNS[kind]} 'one' off" in said
    wrapped = peft.get_peft_model(base("bert"), OF[kind].config(target_modules=["query"]), "one")
    OF[kind].fit(wrapped, "bert", "one", 0)
    (said,) = warned(lambda: peft.PeftModel.from_pretrained(wrapped.base_model.model, tmp_path / "two", "two"))
    assert "base_model.set_adapter(['one', 'two']) of the PeftModel" in said


@pytest.mark.parametrize("kind", ["erasure", "GRADIEND"])
def test_nothing_is_said_where_nothing_goes_off(kind: str, tmp_path):
    OF[kind].added("bert", "ours", target_modules=["query"]).save_pretrained(tmp_path / "ours")
    OF["LoRA"].added("bert", "lora", target_modules=["value"]).save_pretrained(tmp_path / "lora")
    for order in (("ours", "lora"), ("lora", "ours")):
        model = base("bert")
        for name in order:  # each turns on its own layers, and does not touch the other's
            assert warned(lambda model=model, name=name: model.load_adapter(tmp_path / name, adapter_name=name)) == []
        assert adapters_now(model).acting.keys() == {"ours", "lora"}
    model = base("bert")
    OF[kind].add(model, "bert", "ours", target_modules=["query"], sticky=True)
    assert warned(lambda: model.add_adapter(OF["LoRA"].config(target_modules=["value"]), "lora")) == []
    with pytest.raises(ValueError):
        model.add_adapter(OF[kind].config(target_modules=["nowhere"]), "wrong")
    assert adapters_now(model).acting.keys() == {"ours", "lora"}


@pytest.mark.parametrize("kind", ["erasure", "GRADIEND"])
def test_switching_to_one_that_was_injected_is_no_addition(kind: str):
    """`add_adapter` ends in `set_adapter`; only that call warns, since the user did not ask to switch others off."""
    model = base("bert")
    model.add_adapter(OF[kind].config(target_modules=["query"]), "ours")
    assert (
        warned(lambda: peft.inject_adapter_in_model(OF["LoRA"].config(target_modules=["value"]), model, "lora")) == []
    )
    assert warned(lambda: model.set_adapter("lora")) == []
    model.set_adapter("ours")
    (said,) = warned(lambda: model.add_adapter(OF["LoRA"].config(target_modules=["key"]), "added"))
    assert "Adding 'added' switched" in said and "'ours'" in said and "'lora'" not in said
