"""`get_layer_status` and `get_model_status` report every state: active, disabled, merged, several, none."""

from __future__ import annotations

import peft
import peft.helpers
import pytest

from tests.lifecycle.verbs import KINDS, OF, OURS, TABLE, base, children, outputs
from tests.small_models import same


def seen(model: peft.PeftModel) -> dict[str, object]:
    """The status of the model and of its layers, without names and counts, which differ between the kinds."""
    whole, layers = peft.get_model_status(model), peft.get_layer_status(model)
    return {
        "enabled": whole.enabled,
        "active": whole.active_adapters,
        "merged": whole.merged_adapters,
        "available": whole.available_adapters,
        "devices": whole.devices,
        "layers": {
            (x.enabled, tuple(x.active_adapters), tuple(x.merged_adapters), tuple(x.available_adapters)) for x in layers
        },
    }


def trace(kind: str) -> dict[str, object]:
    """The status in each state of a model's life."""
    model = OF[kind].wrapped("bert", "a", "ab")
    states = {"two": seen(model)}
    model.set_adapter("ab")
    states["the other active"] = seen(model)
    model.base_model.set_adapter(["a", "ab"])
    states["both active"] = seen(model)
    model.set_adapter("a")
    model.base_model.disable_adapter_layers()
    states["disabled"] = seen(model)
    model.base_model.enable_adapter_layers()
    states["enabled again"] = seen(model)
    model.merge_adapter(["a"])
    states["one merged"] = seen(model)
    model.unmerge_adapter()
    states["unmerged"] = seen(model)
    model.delete_adapter("a")
    states["one deleted"] = seen(model)
    return states


@pytest.mark.parametrize("kind", OURS)
def test_status_is_that_of_a_lora_in_every_state(kind: str, matrix):
    expected, found = trace("LoRA"), trace(kind)
    for state, status in expected.items():
        assert found[state] == status, state
    for column in KINDS:
        matrix(TABLE, "`get_model_status`, `get_layer_status`", column, "same")


@pytest.mark.parametrize("kind", OURS)
def test_what_belongs_to_the_kind(kind: str):
    model = OF[kind].wrapped("bert", "a")
    whole, layers = model.get_model_status(), model.get_layer_status()
    type_name = model.peft_config["a"].peft_type.value
    assert whole.peft_types == {"a": type_name} and whole.base_model_type == "BertModel"
    assert whole.num_adapter_layers == len(layers) == len(children(model))
    assert whole.trainable_params == 0 and whole.total_params == sum(p.numel() for p in base("bert").parameters())
    assert [status.name.rpartition(".")[0] for status in layers] == [f"model.{path}" for path in children(model)]
    assert {status.name.rpartition(".")[2] for status in layers} == {type_name.lower()}
    assert whole.requires_grad == {}  # neither kind has parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inference_mode", [True, False])
def test_set_adapter_in_inference_mode(inference_mode: bool, kind: str, matrix):
    model = OF[kind].wrapped("bert", "a", "ab")
    model.set_adapter("ab", inference_mode=inference_mode)
    assert model.active_adapters == ["ab"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert bool(trainable) == (kind == "LoRA" and not inference_mode)
    matrix(TABLE, "`set_adapter(name, inference_mode=True)`", kind, "same")


@pytest.mark.parametrize("kind", OURS)
def test_status_without_a_peft_model(kind: str):
    model = OF[kind].added("bert", "a", "b")
    status = peft.get_model_status(model)
    assert (status.active_adapters, status.available_adapters) == (["b"], ["a", "b"])
    assert status.devices == {"a": ["cpu"], "b": ["cpu"]}
    with pytest.raises(ValueError, match="No adapter layers found"):
        peft.get_model_status(base("bert"))


@pytest.mark.parametrize("kind", KINDS)
def test_casting_of_inputs_is_switched_off_for_a_while(kind: str):
    """PEFT sets a switch on every layer; our layers cast in both states, so outputs stay the same."""
    model = OF[kind].wrapped("bert", "a")
    before = outputs(model, "bert")
    with peft.helpers.disable_input_dtype_casting(model):
        assert same(outputs(model, "bert"), before)
    assert same(outputs(model, "bert"), before)
