"""Merging with PEFT's arguments: only once, some of the adapters, never with values that are not finite."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch

from hf_erasure.adapters import erasure_layers, gradiend_layers
from tests.lifecycle.verbs import KINDS, OF, OURS, TABLE, as_base, children, outputs, same_weights, weights
from tests.small_models import distance, same

# GPT-2 and ViT have biases everywhere, so that erasures merge exactly; GPT-2's layers are Conv1D.
MODELS = ("bert", "gpt2", "vit")
# The rounding of float32 outputs after two blocks; see tests/adapters/lifecycle.py.
TOLERANCE = 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", MODELS)
def test_merging_twice_is_merging_once(architecture: str, kind: str, matrix):
    model = OF[kind].wrapped(architecture, "a", "ab")
    before = outputs(model, architecture)
    model.merge_adapter(["a"])
    once = weights(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter(["a"])
    assert same_weights(weights(model), once)
    assert distance(outputs(model, architecture), before) < TOLERANCE
    assert model.get_model_status().merged_adapters == ["a"]
    model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []
    matrix(TABLE, "merged twice: merged once, with PEFT's warning", kind, "same")


@pytest.mark.parametrize("kind", OURS)
def test_merging_for_the_first_time_does_not_warn(kind: str):
    model = OF[kind].wrapped("bert", "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.merge_adapter()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", MODELS)
def test_one_of_two_is_merged_for_good(architecture: str, kind: str, matrix):
    """It is merged although the other one is active; nothing of either is left on the model."""
    model = OF[kind].wrapped(architecture, "a", "ab")
    model.set_adapter("ab")
    expected = outputs(model, architecture)
    model.set_adapter("a")
    merged = model.merge_and_unload(adapter_names=["ab"])
    assert distance(outputs(merged, architecture), expected) < TOLERANCE
    assert not children(merged) and not hasattr(merged, "peft_config")
    matrix(TABLE, "`merge_and_unload(adapter_names=[…])`", kind, "same")


@pytest.mark.parametrize("kind", KINDS)
def test_what_acts_is_merged_after_the_model_inside_was_given_another_adapter(kind: str, tmp_path: Path):
    """The `PeftModel` still names its own adapter as the active one."""
    OF[kind].added("bert", "a", "b").save_pretrained(tmp_path)
    model = OF[kind].wrapped("bert", "a")
    model.get_base_model().load_adapter(tmp_path, "b")
    expected = outputs(model, "bert")
    assert model.active_adapter == "a"
    assert distance(outputs(model.merge_and_unload(), "bert"), expected) < TOLERANCE


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("names", [["b"], ["a", "b"], "ab"])
def test_a_name_that_no_adapter_has_is_not_merged(names, kind: str):
    """PEFT would ignore the name, and return a model without the adapter."""
    model = OF[kind].wrapped("bert", "a")
    before = outputs(model, "bert")
    for merge in (model.merge_adapter, lambda chosen: model.merge_and_unload(adapter_names=chosen)):
        with pytest.raises(ValueError, match=r"there is no 'b' to merge; the adapters here are \['a'\]"):
            merge(names)
        assert same(outputs(model, "bert"), before)


def poison_adapter(kind: str, model: peft.PeftModel, name: str) -> None:
    """Put a NaN into the adapter at its last module, as from a training that failed."""
    if kind == "erasure":
        list(erasure_layers(model).values())[-1].concept_erasure_left[name][0, 0] = torch.nan
    elif kind == "GRADIEND":
        layer = list(gradiend_layers(model).values())[-1]
        for key, tensor in layer.state_dict(keep_vars=True).items():
            if key.endswith(f".{name}") and tensor.is_floating_point() and tensor.numel():
                tensor.data.view(-1)[0] = torch.nan
    else:
        last = [parameter for key, parameter in model.named_parameters() if f"lora_B.{name}." in key][-1]
        last.data[0, 0] = torch.nan


@pytest.mark.parametrize("broken", ["adapter", "weights"])
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("kind", KINDS)
def test_safe_merge_refuses_what_is_not_finite(kind: str, verb: str, broken: str, matrix):
    model = OF[kind].wrapped("gpt2", "a")
    if broken == "adapter":
        poison_adapter(kind, model, "a")
    else:
        module = model.base_model.model.transformer.h[1].mlp.c_proj
        getattr(module, "base_layer", module).weight.data[0, 0] = torch.nan
    before = weights(model)
    with pytest.raises(ValueError, match=r"finite|NaN|broken"):
        getattr(model, verb)(safe_merge=True)
    if kind in OURS:  # with a LoRA, PEFT leaves the layers before the broken one merged
        after = weights(model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key].nan_to_num(7.0), after[key].nan_to_num(7.0)) for key in before)
        assert model.get_model_status().merged_adapters == []
        assert model.get_model_status().enabled
        matrix(TABLE, "`safe_merge=True` with NaN", kind, "refused")
    elif verb == "merge_adapter":
        assert model.get_model_status().merged_adapters == "irregular"
        matrix(TABLE, "`safe_merge=True` with NaN", kind, "refused; the layers before the broken one stay merged")


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_while_merged(kind: str, matrix):
    """The output is the base model's; after it is enabled again, the adapter acts."""
    model = OF[kind].wrapped("bert", "a")
    active = outputs(model, "bert")
    model.merge_adapter()
    with model.disable_adapter():
        if kind == "LoRA":
            base = outputs(model.base_model.model, "bert")
            assert distance(base, outputs(model, "bert")) == 0
        else:
            assert as_base(model, "bert")
    assert distance(outputs(model, "bert"), active) < TOLERANCE
    matrix(TABLE, "`disable_adapter` while merged", kind, "same")


@pytest.mark.parametrize("kind", OURS)
def test_after_unloading_another_adapter_can_be_added(kind: str):
    model = OF[kind].wrapped("bert", "a")
    plain = model.unload()
    assert as_base(plain, "bert")
    OF[kind].add(plain, "bert", "a", 3)
    assert not as_base(plain, "bert") and plain.active_adapters() == ["a"]
    plain.delete_adapter("a")
    assert same(outputs(plain, "bert"), outputs(model.base_model.model, "bert"))


@pytest.mark.parametrize("active", [["ab"], ["a", "ab"], ["ab", "a"]], ids="-".join)
@pytest.mark.parametrize(
    ("targets", "site"),
    [(["c_fc"], "output"), (["c_fc"], "input"), (r".*\.ln_[12]", "output")],
    ids=["out", "in", "norm"],
)
def test_named_erasures_merge_in_the_order_in_which_they_are_named(targets, site: str, active: list[str]):
    """It does not matter which are active, or whether there are one or two calls; the two orders differ."""

    def wrapped(order: list[str]) -> peft.PeftModel:
        model = OF["erasure"].wrapped("gpt2", "a", "ab", target_modules=targets, site=site)
        model.base_model.set_adapter(order)
        return model

    orders = [["a", "ab"], ["ab", "a"]]
    acting = [outputs(wrapped(order), "gpt2") for order in orders]
    assert distance(*acting) > 1e-2
    for order, expected in zip(orders, acting, strict=True):
        model = wrapped(active)
        before, plain = outputs(model, "gpt2"), weights(model)
        model.merge_adapter(order)
        assert distance(outputs(model, "gpt2"), expected) < TOLERANCE
        assert next(iter(erasure_layers(model).values())).merged_adapters == order
        model.unmerge_adapter()
        assert same_weights(weights(model), plain) and same(outputs(model, "gpt2"), before)
        if len(active) == 1:  # where both are active, the one next to the weight must be merged first
            for name in order:
                model.merge_adapter([name])
            assert distance(outputs(model, "gpt2"), expected) < TOLERANCE
            model.unmerge_adapter()
            assert same_weights(weights(model), plain)
        merged = model.merge_and_unload(adapter_names=order)
        assert distance(outputs(merged, "gpt2"), expected) < TOLERANCE


@pytest.mark.parametrize("order", [["norm", "own"], ["own", "norm"]], ids="-".join)
def test_an_erasure_at_a_layers_input_merges_next_to_its_weight(order: list[str]):
    """An erasure at the norm in front of the layer, which acts before it, may be merged already."""
    of = OF["erasure"]
    model = of.wrapped("gpt2", "norm", target_modules=r".*\.ln_1")
    model.add_adapter("own", of.config(target_modules=["c_attn"], site="input"))
    model.set_adapter("own")
    of.fit(model, "gpt2", "own", 5)
    model.base_model.set_adapter(["norm", "own"])
    expected, plain = outputs(model.eval(), "gpt2"), weights(model)
    model.set_adapter(order[0])  # an active one between the first and the weight would prevent the merge
    for name in order:
        model.merge_adapter([name])
    assert distance(outputs(model, "gpt2"), expected) < TOLERANCE
    model.unmerge_adapter()
    assert same_weights(weights(model), plain)
