"""Modules that share an eraser act as if each had its own, run it once for each tensor, and keep no results."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_erasure import ConceptErasureConfig, fit_concept_erasure, verify_adapter
from hf_erasure.adapters import erasure_layers, site_layers
from hf_erasure.adapters.erasure import layer as erasure_layer
from hf_erasure.adapters.erasure.layer import SharedResults
from hf_erasure.erasers import Eraser
from tests.small_models import LABELS, distance, inputs_of, outputs_of, same, small_batch, small_batches, small_model

NAME = "erasure"
TYPES = ("llama", "gpt2", "t5", "bert")
# Fused kernels and gathered rows sum some 64 terms in another order: roundings of 2^-24 relative, through two blocks.
ROUNDING = 1e-5


@functools.cache
def _fitted(architecture: str) -> nn.Module:
    model = copy.deepcopy(small_model(architecture))
    model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules="readers"), adapter_name=NAME)
    fit_concept_erasure(model, small_batches(architecture), NAME, pool="tokens", progress=False)
    return model


def fitted(architecture: str = "llama") -> Any:
    return copy.deepcopy(_fitted(architecture))


def each_its_own(architecture: str = "llama") -> Any:
    """The model with the same erasers, but one for each module."""
    shared, model = _fitted(architecture), copy.deepcopy(small_model(architecture))
    names = [rf"{name}".replace(".", r"\.") for name in shared.peft_config[NAME].fitted_modules]
    model.add_adapter(
        ConceptErasureConfig(labels=LABELS, target_modules="|".join(names), site="input"), adapter_name=NAME
    )
    layers = erasure_layers(shared, NAME)
    for name, layer in erasure_layers(model, NAME).items():
        layer.set_eraser(NAME, Eraser(*layers[name].eraser_state(NAME)), torch.float32)
    return model


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of all parameters, and the output; the model is in training mode, with the same dropout."""
    model.requires_grad_(True).train()
    torch.manual_seed(0)
    output = model(**inputs_of(batch))
    first = next(value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point())
    first.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"out": first.detach()}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, as a share of the largest gradient, or of the output's largest value.

    It is not a share of each parameter's own gradient: that of some biases is zero except for rounding.
    """
    largest = {
        is_out: max(float(value.abs().max()) for name, value in expected.items() if (name == "out") is is_out)
        for is_out in (True, False)
    }
    return max(float((value - expected[name]).abs().max()) / largest[name == "out"] for name, value in found.items())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that erasers are run on."""
    seen: list[Tensor] = []
    apply = erasure_layer.apply_erasure

    def counted(x: Tensor, *args: Any) -> Tensor:
        seen.append(x.detach().clone())
        return apply(x, *args)

    monkeypatch.setattr(erasure_layer, "apply_erasure", counted)
    return seen


def kept(model: nn.Module) -> int:
    return sum(len(own.results) for layer in erasure_layers(model).values() for own in layer.erasures.values())


# ---- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TYPES)
def test_an_eraser_runs_once_for_a_tensor_and_nothing_is_kept(architecture: str, runs: list[Tensor]) -> None:
    model, batch = fitted(architecture), small_batch(architecture)
    found = outputs_of(model, batch)
    assert len(runs) == len(model.peft_config[NAME].weights)
    assert kept(model) == 0
    assert same(found, outputs_of(each_its_own(architecture), batch))
    with torch.inference_mode():
        assert same(found, outputs_of(model, batch))
    assert distance(found, outputs_of(small_model(architecture), batch)) > 0.01


@pytest.mark.parametrize("architecture", TYPES)
def test_gradients_are_those_of_modules_with_their_own(architecture: str, runs: list[Tensor]) -> None:
    batch = small_batch(architecture)
    found, expected = gradients(fitted(architecture), batch), gradients(each_its_own(architecture), batch)
    assert torch.equal(found["out"], expected["out"])
    assert apart(found, expected) < ROUNDING
    assert len(runs) == 2 * len(_fitted(architecture).peft_config[NAME].fitted_modules)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_gradient_checkpointing(architecture: str, reentrant: bool) -> None:
    """Parts of the pass run again for the gradients, and their erasers give the same results again."""
    model, batch = fitted(architecture), small_batch(architecture)
    expected = gradients(each_its_own(architecture), batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, batch)
    assert apart(found, expected) < ROUNDING
    assert kept(model) == 0


def test_a_compiled_model_is_one_graph() -> None:
    model, batch = fitted(), small_batch("llama")
    expected = outputs_of(model, batch)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert distance(outputs_of(compiled, batch), expected) < ROUNDING


def test_what_an_eraser_made_dies_with_what_reads_it() -> None:
    model, inputs = fitted(), []
    module = model.model.layers[0].self_attn.v_proj
    module.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    outputs_of(model, small_batch("llama"))
    gc.collect()
    assert len(inputs) == 1 and inputs[0]() is None


def test_a_module_that_is_not_called_keeps_nothing_alive() -> None:
    model = fitted()
    attention, hidden = model.model.layers[0].self_attn, torch.randn(2, 3, 32)
    with torch.no_grad():
        attention.q_proj(hidden)
        assert kept(model) == 1
        del hidden
    gc.collect()
    assert kept(model) == 0


def test_a_changed_tensor_is_erased_anew() -> None:
    model, own = fitted(), each_its_own()
    hidden = torch.randn(2, 3, 32)
    with torch.no_grad():
        for part, other in ((m.model.layers[0].self_attn for m in pair) for pair in [(model, own)]):
            part.q_proj(hidden)
            hidden.mul_(2)
            assert torch.equal(part.k_proj(hidden), other.k_proj(hidden))
            assert torch.equal(part.v_proj(hidden.view(6, 32)), other.v_proj(hidden.view(6, 32)))
    with torch.inference_mode():
        inside = hidden.clone()
        model.model.layers[0].self_attn.q_proj(inside)
        inside.mul_(2)
        assert torch.equal(model.model.layers[0].self_attn.k_proj(inside), own.model.layers[0].self_attn.k_proj(inside))


def test_another_eraser_is_not_taken_for_the_old_one() -> None:
    model = fitted()
    attention, site = model.model.layers[0].self_attn, site_layers(model, NAME)["model.layers.0.self_attn.q_proj"]
    hidden = torch.randn(2, 3, 32)
    with torch.no_grad():
        before = attention.k_proj(hidden)
        attention.q_proj(hidden)
        site.concept_erasure_left[NAME].zero_()
        assert not torch.equal(attention.k_proj(hidden), before)
        assert torch.equal(attention.k_proj(hidden), nn.functional.linear(hidden, attention.k_proj.weight))


# ---- adapters come and go --------------------------------------------------------------------------------------------


def test_off_on_and_gone() -> None:
    model, batch = fitted(), small_batch("llama")
    plain, erased = outputs_of(small_model("llama"), batch), outputs_of(model, batch)
    model.disable_adapters()
    assert same(outputs_of(model, batch), plain)
    model.enable_adapters()
    assert same(outputs_of(model, batch), erased)
    for layer in erasure_layers(model, NAME).values():
        layer.rows = None
    model.delete_adapter(NAME)
    assert same(outputs_of(model, batch), plain) and not erasure_layers(model)
    model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules="readers"), adapter_name=NAME)
    assert same(outputs_of(model, batch), plain)


def test_copies_have_sites_of_their_own() -> None:
    model, batch = fitted(), small_batch("llama")
    erased = outputs_of(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = erasure_layers(other, NAME)
        assert all(layer.erasures[NAME].holder in layers.values() for layer in layers.values())
        assert same(outputs_of(other, batch), erased)
        for layer in site_layers(other, NAME).values():
            layer.concept_erasure_left[NAME].zero_()
        assert not same(outputs_of(other, batch), erased)
    assert same(outputs_of(model, batch), erased)


def test_beside_a_lora_in_either_order() -> None:
    batch = small_batch("llama")
    found = []
    for first in (True, False):
        model = copy.deepcopy(small_model("llama"))
        erasure = ConceptErasureConfig(labels=LABELS, target_modules="readers", sticky=True)
        added = [(erasure, NAME), (lora(), "lora")]
        for config, name in added if first else added[::-1]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.add_adapter(config, adapter_name=name)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(value, 0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit_concept_erasure(model, small_batches("llama"), NAME, pool="tokens", progress=False)
        assert model.peft_config[NAME].fitted_modules.keys() == _fitted("llama").peft_config[NAME].fitted_modules.keys()
        found.append({key: value for key, value in model.state_dict().items() if "concept_erasure" in key})
        model.set_adapter([NAME, "lora"])
        assert verify_adapter(model, NAME, inputs_of(batch))
    assert found[0].keys() == found[1].keys()


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights="gaussian")


def test_a_mixed_batch() -> None:
    batch = inputs_of(small_batch("llama"))
    wrapped = peft.get_peft_model(
        copy.deepcopy(small_model("llama")),
        ConceptErasureConfig(labels=LABELS, target_modules="readers", task_type="CAUSAL_LM"),
        NAME,
    )
    fit_concept_erasure(wrapped, small_batches("llama"), NAME, pool="tokens", progress=False)
    wrapped.eval()
    names = [NAME if row % 3 else "__base__" for row in range(16)]
    with torch.no_grad():
        found, erased = wrapped(**batch, adapter_names=names).logits, wrapped(**batch).logits
        with wrapped.disable_adapter():
            plain = wrapped(**batch).logits
    for row, name in enumerate(names):
        assert torch.allclose(found[row], (erased if name == NAME else plain)[row], atol=ROUNDING)


def test_an_offloaded_model() -> None:
    model, batch = fitted("t5"), small_batch("t5")
    erased = outputs_of(model, batch)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with torch.no_grad():
        output = model(**inputs_of(batch))
    assert all(torch.equal(output[key], value) for key, value in erased.items())


def test_erasers_stay_in_float32() -> None:
    model = fitted().half().float()
    assert {part.dtype for layer in erasure_layers(model, NAME).values() for part in layer.eraser_state(NAME)} == {
        torch.float32
    }


# ---- saved and loaded ------------------------------------------------------------------------------------------------


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "load_adapter": lambda base, folder: base.load_adapter(folder, adapter_name=NAME),
    "from_pretrained": lambda base, folder: peft.PeftModel.from_pretrained(base, folder, adapter_name=NAME),
    "PeftModel.load_adapter": lambda base, folder: peft.PeftModel.from_pretrained(base, folder).load_adapter(
        folder, NAME
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_a_saved_adapter_acts_as_before(architecture: str, way: str, tmp_path: Any) -> None:
    model, batch = fitted(architecture), small_batch(architecture)
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(small_model(architecture)).eval()
    WAYS[way](base, tmp_path)
    layers = erasure_layers(base, NAME)
    assert all(layer.erasures[NAME].holder is layers[layer.erasures[NAME].site] for path, layer in layers.items())
    assert same(outputs_of(base, batch), outputs_of(model, batch))


def test_injection_by_a_state_dict() -> None:
    model = fitted()
    state = peft.get_peft_model_state_dict(model, adapter_name=NAME)
    base = copy.deepcopy(small_model("llama"))
    peft.inject_adapter_in_model(model.peft_config[NAME], base, NAME, state_dict=state)
    peft.set_peft_model_state_dict(base, state, adapter_name=NAME)
    assert same(outputs_of(base, small_batch("llama")), outputs_of(model, small_batch("llama")))


def test_from_the_bare_model_to_one_with_a_head(tmp_path: Any) -> None:
    """All modules of a group get other names, and the group stays together."""
    bare = copy.deepcopy(small_model("llama")).model
    bare.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules="readers"), adapter_name=NAME)
    fit_concept_erasure(bare, small_batches("llama"), NAME, pool="tokens", progress=False)
    bare.save_pretrained(tmp_path)
    model = copy.deepcopy(small_model("llama"))
    model.load_adapter(tmp_path, adapter_name=NAME)
    groups = model.peft_config[NAME].fitted_modules
    assert groups == {f"model.{name}": f"model.{site}" for name, site in bare.peft_config[NAME].fitted_modules.items()}
    hidden = [m.eval()(**inputs_of(small_batch("llama"))).last_hidden_state for m in (bare, model.model)]
    assert torch.equal(*hidden)


def test_modules_that_the_model_lacks_are_refused(tmp_path: Any) -> None:
    model = fitted()
    for weights in (
        {"model.layers.9.q": [["model.layers.9.q", "weight", 1]]},
        {"lm_head": [["lm_head", "weight", 1], ["model.nothing", "weight", 1]]},
    ):
        config = ConceptErasureConfig(labels=LABELS, site="input", target_modules=["lm_head"], weights=weights)
        base = copy.deepcopy(small_model("llama"))
        with pytest.raises(ValueError, match="which this LlamaForCausalLM does not have"):
            base.add_adapter(config, adapter_name=NAME)
        assert not erasure_layers(base)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("layers.1.self_attn.k_proj", "layers.1.self_attn.x_proj"))
    with pytest.raises(ValueError, match=r"acts at 'model\.layers\.1\.self_attn\.x_proj'"):
        copy.deepcopy(small_model("llama")).load_adapter(tmp_path, adapter_name=NAME)


# ---- the shared results ----------------------------------------------------------------------------------------------


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return hidden + 1


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda x: x.add_(1),
    "entry": lambda x: x.__setitem__(0, 5.0),
    "by a view": lambda x: x.view(-1).mul_(3),
    "nothing": lambda x: x,
    "a view": lambda x: x.view(-1),
    "read": lambda x: x.sum(),
}


@given(steps=st.lists(st.sampled_from(sorted(CHANGES)), max_size=8), modules=st.integers(1, 4), grad=st.booleans())
def test_what_comes_back_is_what_the_eraser_would_make(steps: list[str], modules: int, grad: bool) -> None:
    results, make, hidden = SharedResults(), Counted(), torch.zeros(2, 3)
    with torch.set_grad_enabled(grad):
        for step in steps:
            CHANGES[step](hidden)
            assert torch.equal(results.compute(hidden, make, modules, (make,)), hidden + 1)
            assert torch.equal(results.compute(hidden.view(3, 2), make, modules, (make,)), hidden.view(3, 2) + 1)
    del hidden
    assert len(results) == 0


def test_views_of_one_storage_and_shape_are_one_tensor() -> None:
    results, make, hidden = SharedResults(), Counted(), torch.zeros(2, 3, 4)
    for _ in range(3):
        results.compute(hidden.view(6, 4), make, 3, (make,))
    results.compute(hidden.view(4, 6), make, 3, (make,))
    assert make.calls == 2


def test_a_result_that_was_changed_is_made_anew() -> None:
    results, make, hidden = SharedResults(), Counted(), torch.zeros(3)
    results.compute(hidden, make, 3, (make,)).mul_(7)
    assert torch.equal(results.compute(hidden, make, 3, (make,)), torch.ones(3))


def test_where_gradients_are_recorded_nothing_is_kept() -> None:
    """A result with a graph refers to its tensor; kept results would refer back, and neither would be freed."""
    results, make, hidden = SharedResults(), Counted(), torch.zeros(3, requires_grad=True)
    with torch.no_grad():
        assert not results.compute(hidden, make, 3, (make,)).requires_grad
    assert results.compute(hidden, make, 3, (make,)).requires_grad
    for reentrant in (True, False):
        sines = checkpoint(lambda x: results.compute(x, make, 3, (make,)).sin(), hidden, use_reentrant=reentrant)
        sines.sum().backward()
    del hidden, sines
    assert len(results) == 0
