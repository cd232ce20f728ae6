"""Erasers in the weights of linear layers and embeddings: the formulas, where they hold, and a run that checks them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_erasure.models.model import distance, dummy_batch, evaluating, tensors_of

from ..common.placement import FLOAT_FIRST, has_quantised, is_sharded, why_not_reachable

# These store the transpose of what they multiply by.
_TRANSPOSED = (Conv1D, nn.Embedding)
# How many times as far as another rounding of the weights may a merge take the outputs.
_TIMES_ROUNDING = 4


@dataclass(frozen=True)
class EraserInWeight:
    """One eraser on its way into one weight.

    Attributes:
        path: The site it was fitted at: the weight's own module, or one whose output that module takes.
        adapter: The adapter it belongs to.
        side: The side of the weight it acts on, `"output"` or `"input"`.
        left: `(width, rank)`.
        right: `(rank, width)`.
        bias: `(width,)`, the mean that is kept; zero for a purely linear eraser.
    """

    path: str
    adapter: str
    side: str
    left: Tensor
    right: Tensor
    bias: Tensor


@dataclass(frozen=True)
class WeightChange:
    """What erasers make of a layer `W x + c`, in float64 and as a map of column vectors: `W + B A` and `offset`.

    Attributes:
        linear: `(out, in)`, the changed weight.
        offset: `(out,)`, the changed bias; zero where there is none and none is needed.
        b: `(out, rank)`.
        a: `(rank, in)`.
    """

    linear: Tensor
    offset: Tensor
    b: Tensor
    a: Tensor


def weight_change(host: nn.Module, parameters: dict[str, Tensor], edits: Iterable[EraserInWeight]) -> WeightChange:
    """The layer that computes alone what `host` computes with erasers.

    With `P = L R`, an erased output of `W x + c` is `(I − P) W x + c − P (c − μ)`, and an erased input gives
    `W (I − P) x + c + W P μ`. An embedding's output is its rows, erased one by one.

    Args:
        host: A `Linear`, a `Conv1D`, or (output only) an `Embedding`.
        parameters: The host's parameters by name.
        edits: The erasers, the one next to the weight first.
    """
    weight = parameters["weight"]
    linear = weight.double().T if isinstance(host, _TRANSPOSED) else weight.double()
    bias = parameters.get("bias")
    offset = linear.new_zeros(linear.shape[0]) if bias is None else bias.double()
    b_parts, a_parts = [linear.new_zeros(linear.shape[0], 0)], [linear.new_zeros(0, linear.shape[1])]
    for edit in edits:
        left, right, mean = (part.to(weight.device, torch.float64) for part in (edit.left, edit.right, edit.bias))
        if edit.side == "input":
            b, a = -linear @ left, right
            offset = offset - b @ (right @ mean)
        elif isinstance(host, nn.Embedding):
            b, a = -left, right @ (linear - mean[:, None])
        else:
            b, a = -left, right @ linear
            offset = offset + b @ (right @ (offset - mean))
        linear = linear + b @ a
        b_parts.append(b)
        a_parts.append(a)
    return WeightChange(linear, offset, torch.cat(b_parts, dim=1), torch.cat(a_parts, dim=0))


def merged_parameters(
    host: nn.Module, parameters: dict[str, Tensor], edits: Iterable[EraserInWeight]
) -> dict[str, Tensor]:
    """The changed parameters of `host` by name, in its dtype; with a `"bias"` if one is there or needed."""
    change = weight_change(host, parameters, edits)
    weight, bias = parameters["weight"], parameters.get("bias")
    linear = change.linear.T if isinstance(host, _TRANSPOSED) else change.linear
    changed = {"weight": linear.to(weight.dtype).contiguous()}
    if bias is not None or bool(change.offset.any()):
        changed["bias"] = change.offset.to(weight.dtype if bias is None else bias.dtype)
    return changed


def is_weight_layer(host: nn.Module) -> bool:
    """Whether `host` computes what `weight_change` supposes; subclasses with a forward of their own do not."""
    return type(host).forward in (nn.Linear.forward, Conv1D.forward, nn.Embedding.forward)


def why_not_mergeable(host: nn.Module, site: str) -> str | None:
    """The reason why an eraser at `host` has no place in its weights, or None if it has."""
    kind = type(host).__name__
    if getattr(host, "parametrizations", None):
        return f"the weight of this {kind} is parametrized; remove the parametrization first."
    if has_quantised(host):
        return f"its weight is quantised, and would not be exact after it. Use the adapter unmerged, or {FLOAT_FIRST}."
    # Subclasses with a forward of their own (scaled, wrapped layers) compute something else.
    if type(host).forward is nn.Embedding.forward:
        if site == "input":
            return "an embedding takes token ids. Use site='output'."
        if getattr(host, "max_norm", None) is not None:
            return "this embedding renormalises its rows (max_norm) after the erasure. Use the adapter unmerged."
    elif type(host).forward not in (nn.Linear.forward, Conv1D.forward):
        return (
            f"a {kind} has no weight matrix that could take the projection; only Linear, Conv1D and Embedding do. Use "
            "the adapter unmerged, or target linear layers, e.g. target_modules='all-linear'."
        )
    weight = host.get_parameter("weight")
    unreachable = why_not_reachable(host)
    if unreachable is not None:
        return f"its weight {unreachable} to merge."
    if type(weight.data) is not Tensor or is_sharded(weight):
        return "its weight is sharded. Load the model whole to merge."
    return None


# ---- the check: a small forward pass before and after ----------------------------------------------------------------


class Probe:
    """A model's own dummy input, run the same way each time.

    Attributes:
        failure: Why the model cannot be run on it; None when it can.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.failure: str | None = None
        self.inputs: dict[str, Tensor] = {}
        try:
            self.inputs = dummy_batch(model)
            self.run()
        except Exception as error:  # whatever a model may raise at an input it was not made for
            self.failure = f"{type(error).__name__}: {error}"

    def run(self) -> list[Tensor]:
        """The tensors the model returns, without dropout, gradients or autocast; draws of its own are not used up."""
        device = next(self.model.parameters()).device.type
        cuda = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
        autocast = torch.amp.is_autocast_available(device)
        with (
            torch.inference_mode(False),
            evaluating(self.model),
            torch.autocast(device if autocast else "cpu", enabled=False),
            torch.random.fork_rng(devices=sorted(cuda)),
        ):
            output: Any = self.model(**self.inputs)
        return tensors_of(output)


def check_drift(probe: Probe, before: list[Tensor], modules: list[nn.Module], names: list[str]) -> None:
    """Compare the model's outputs after a merge with those before.

    Args:
        probe: What is run.
        before: Its outputs before the merge.
        modules: The layers whose weights were merged.
        names: The adapters, for the message.

    Raises:
        ValueError: If the outputs differ by more than rounding.
    """
    after = probe.run()
    drift = distance(after, before)
    if drift == 0:
        return
    rounding = _TIMES_ROUNDING * distance(_run_with_other_rounding(probe, modules), after)
    if not drift <= rounding:
        raise ValueError(
            f"Merging {names} changed the model's output by {drift:.1e} of its norm, where rounding explains "
            f"{rounding:.1e}: the merge was taken back. Use the adapter unmerged, and please report the architecture."
        )


def _run_with_other_rounding(probe: Probe, modules: list[nn.Module]) -> list[Tensor]:
    """The outputs with every weight of the modules one rounding step up or down."""
    generator = torch.Generator().manual_seed(0)
    kept = [(p, p.data) for module in modules for p in module.parameters(recurse=False)]
    try:
        for parameter, value in kept:
            signs = 2 * torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8, device="cpu") - 1
            steps = torch.finfo(value.dtype).eps * signs.to(value.device, torch.float64)
            parameter.data = (value.double() * (1 + steps)).to(value.dtype)
        return probe.run()
    finally:
        for parameter, value in kept:
            parameter.data = value
