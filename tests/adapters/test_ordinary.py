"""An adapter that is made under inference mode, autocast or another default dtype or device is like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from hf_erasure import fit_concept_erasure
from hf_erasure.adapters import steer
from hf_erasure.adapters.common.layer import adapter_children
from tests.lifecycle.verbs import OF, OURS, base, outputs
from tests.small_models import same, small_batch, small_batches

ARCHITECTURE = "llama"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "another device": lambda: torch.device("meta"),
}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    parts = {}
    for child in adapter_children(model):
        for name, store in child._modules.items():
            parts |= {f"{child.path}.{name}.{key}": value for key, value in getattr(store, "_buffers", {}).items()}
    return parts


def check_ordinary(model: Any) -> None:
    """Check that the adapter's state has the usual device and dtype, and that the whole model can be trained."""
    found = {**state_of(model), **dict(model.named_parameters())}
    for name, tensor in found.items():
        kind = torch.float32 if tensor.is_floating_point() else torch.int32
        assert (tensor.is_inference(), tensor.dtype, tensor.device.type) == (False, kind, "cpu"), name
    model.train().requires_grad_(True)
    logits = model(**small_batch(ARCHITECTURE, seed=7)).logits
    logits.float().square().sum().backward()
    assert all(parameter.grad is None or bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_adapter_is_the_same_and_trains(kind: str, mode: str, tmp_path: Path):
    source = OF[kind].added(ARCHITECTURE, "a")
    expected, acted = {k: v.clone() for k, v in state_of(source).items()}, outputs(source, ARCHITECTURE)
    source.save_pretrained(tmp_path)
    model, other = base(ARCHITECTURE), base(ARCHITECTURE)
    with MODES[mode]():
        model.load_adapter(str(tmp_path), "a")
        if kind == "GRADIEND":
            for rate in (0.01, source.peft_config["a"].learning_rate):
                steer(model, "a", learning_rate=rate)
        wrapped = peft.PeftModel.from_pretrained(other, str(tmp_path), "a")
    for found in (model, wrapped):
        assert state_of(found).keys() == expected.keys()
        assert all(torch.equal(state_of(found)[key], value) for key, value in expected.items())
        assert same(outputs(found, ARCHITECTURE), acted)
        check_ordinary(found)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("mode", MODES)
def test_weights_that_were_merged_there_train(kind: str, mode: str, tmp_path: Path):
    # The linear layers of this architecture have no biases, which the mean of an affine map needs.
    OF[kind].added(ARCHITECTURE, "a", **({"affine": False} if kind == "erasure" else {})).save_pretrained(tmp_path)
    kept, merged = (peft.PeftModel.from_pretrained(base(ARCHITECTURE), str(tmp_path)) for _ in range(2))
    wanted = {name: parameter.detach().clone() for name, parameter in kept.named_parameters()}
    with MODES[mode]():
        kept.merge_adapter()
        kept.unmerge_adapter()
        plain = merged.merge_and_unload()
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in kept.named_parameters())
    for model in (kept, plain):
        check_ordinary(model)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "autocast"])  # autocast changes the activations
def test_an_erasure_that_was_fitted_there_is_the_same(mode: str):
    expected, model = OF["erasure"].added(ARCHITECTURE, "a"), base(ARCHITECTURE)
    batches = small_batches(ARCHITECTURE, count=1, seed=100)
    with MODES[mode]():
        model.add_adapter(OF["erasure"].config(), "a")
        fit_concept_erasure(model, batches, "a", sequential=False, progress=False)
    assert all(torch.equal(value, state_of(expected)[key]) for key, value in state_of(model).items())
    check_ordinary(model)


@pytest.mark.parametrize("kind", OURS)
def test_a_head_that_was_loaded_under_inference_mode_trains(kind: str, tmp_path: Path):
    OF[kind].added(ARCHITECTURE, "a", modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model, other = base(ARCHITECTURE), base(ARCHITECTURE)
    with torch.inference_mode():
        model.load_adapter(str(tmp_path), "a")
        wrapped = peft.PeftModel.from_pretrained(other, str(tmp_path))
    for found in (model, wrapped):
        check_ordinary(found)
