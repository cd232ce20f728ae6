"""Erasers merged into weights: the changed module alone computes what the module and the erasers computed."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters.merging.record import EraserInWeight, axis_of, merged_parameters, takes_mean
from hf_erasure.erasers import apply_erasure
from tests.small_models import LABELS, distance, outputs_of, small_batch, small_model

WIDTH, OTHER, EXPERTS = 5, 4, 3
# The rounding of sums of some 40 float64 products of numbers near one.
TOLERANCE = 1e-11


class Experts(nn.Module):
    """One matrix for each expert, with biases; each example goes to one expert."""

    def __init__(self, takes: int, gives: int) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(EXPERTS, gives, takes))
        self.stack_bias = nn.Parameter(torch.randn(EXPERTS, gives))

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.arange(len(x)) % EXPERTS
        return torch.einsum("eoi,e...i->e...o", self.stack[chosen], x) + self.stack_bias[chosen][:, None]


class Scaled(nn.Embedding):
    embed_scale = 1.5

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def module_of(kind: str, side: str) -> tuple[nn.Module, str, int, int]:
    """A module with `WIDTH` features at a side, its parameter, and their axis in the parameter and the activation."""
    takes, gives = (WIDTH, OTHER) if side == "input" else (OTHER, WIDTH)
    if kind == "linear":
        return nn.Linear(takes, gives), "weight", 1 if side == "input" else 0, -1
    if kind == "transposed":
        module = Conv1D(gives, takes)
        nn.init.normal_(module.bias)
        return module, "weight", 0 if side == "input" else 1, -1
    if kind == "convolution":
        return nn.Conv2d(takes, gives, 2), "weight", 1 if side == "input" else 0, 1
    return Experts(takes, gives), "stack", 2 if side == "input" else 1, -1


def edits(count: int, side: str, parameter: str, axis: int, affine: bool) -> list[EraserInWeight]:
    made = []
    for number in range(count):
        left, right = torch.randn(WIDTH, 2), torch.randn(2, WIDTH)
        right = torch.linalg.inv(right @ left) @ right
        mean = torch.randn(WIDTH) if affine else torch.zeros(WIDTH)
        made.append(EraserInWeight("site", str(number), side, left, right, mean, parameter, axis))
    return made


def apply(erasers: list[EraserInWeight], x: Tensor, axis: int) -> Tensor:
    for eraser in erasers:
        x = apply_erasure(x, eraser.left, eraser.right, eraser.bias, axis)
    return x


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["linear", "transposed", "convolution", "experts"]),
    side=st.sampled_from(["input", "output"]),
    affine=st.booleans(),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_the_changed_weight_does_what_the_erasers_do(kind: str, side: str, affine: bool, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        module, parameter, axis, along = module_of(kind, side)
        assert kind == "experts" or axis_of(module, side) == axis
        affine = affine and takes_mean(module, parameter, side)
        erasers = edits(count, side, parameter, axis, affine)
        takes = WIDTH if side == "input" else OTHER
        x = torch.randn(3, takes, 4, 4) if kind == "convolution" else torch.randn(3, 4, takes)
        # The erasers are listed from the weight outwards, so at an input the first one acts last.
        expected = module(apply(erasers[::-1], x, along)) if side == "input" else apply(erasers, module(x), along)
        values = merged_parameters(module, dict(module.named_parameters()), erasers)
        found = torch.func.functional_call(module, values, x)
        assert float((found - expected).abs().max() / expected.abs().max().clamp_min(1)) < TOLERANCE * 10**count
    finally:
        torch.set_default_dtype(torch.float32)


@settings(max_examples=10, deadline=None)
@given(kind=st.sampled_from([nn.Embedding, Scaled]), affine=st.booleans(), seed=st.integers(0, 2**16))
def test_the_rows_of_a_table_are_erased_one_by_one(kind: type[nn.Embedding], affine: bool, seed: int) -> None:
    torch.manual_seed(seed)
    table, ids = kind(7, WIDTH).double(), torch.arange(7)
    erasers = edits(2, "output", "weight", 1, affine)
    values = merged_parameters(table, dict(table.named_parameters()), erasers)
    torch.testing.assert_close(
        torch.func.functional_call(table, values, ids), apply(erasers, table(ids), -1), rtol=1e-5, atol=1e-5
    )  # float32 erasers


@pytest.mark.parametrize("padding", [0, 1])
def test_what_is_put_around_an_input_takes_no_mean(padding: int) -> None:
    module = nn.Conv2d(WIDTH, OTHER, 3, padding=padding)
    assert takes_mean(module, "weight", "input") == (padding == 0)
    assert takes_mean(module, "weight", "output")


@pytest.mark.parametrize("word", ["readers", "writers"])
def test_words_merge_on_offloaded_models_without_a_trace(word: str, tmp_path) -> None:
    """The weights stay offloaded; the model is not traced, since the adapter has the weights' names."""
    model, batch = copy.deepcopy(small_model("llama")), small_batch("llama", seed=5)
    model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=word), adapter_name="gender")
    fit_concept_erasure(model, [small_batch("llama", seed=100, rows=48)], "gender", sequential=False, progress=False)
    erased = outputs_of(model, batch)
    model.save_pretrained(tmp_path)
    wrapped = PeftModel.from_pretrained(copy.deepcopy(small_model("llama")), tmp_path)
    accelerate.cpu_offload(wrapped.get_base_model(), "cpu")
    before = outputs_of(wrapped, batch)
    with pytest.warns(UserWarning, match="without the usual comparison"):
        wrapped.merge_adapter()
    assert distance(outputs_of(wrapped, batch), erased) < 1e-5  # float32 outputs after two blocks
    wrapped.unmerge_adapter()
    assert distance(outputs_of(wrapped, batch), before) == 0
