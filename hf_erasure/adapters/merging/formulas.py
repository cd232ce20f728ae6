"""Erasers written into the weights of linear layers and embeddings: the formulas, and where they hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter
from transformers.pytorch_utils import Conv1D

from ..common.placement import FLOAT_FIRST, has_quantised, is_offloaded, why_not_reachable


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
    # Conv1D and Embedding store the transpose.
    linear = weight.double() if _is_linear(host) else weight.double().T
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
    changed = {"weight": (change.linear if _is_linear(host) else change.linear.T).to(weight.dtype).contiguous()}
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


def is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP keeps only a part of a parameter in this process."""
    by_fsdp1 = isinstance(parameter, FlatParameter) or getattr(parameter, "_fsdp_flattened", False)
    return by_fsdp1 or type(parameter.data).__name__ == "DTensor"


def shared_weights(model: nn.Module) -> dict[str, list[str]]:
    """Parameter names that share their tensor with others (tied embeddings), each with all its names."""
    # Offloaded, each place of a tied weight has a placeholder of its own.
    ties: dict[str, str] = (getattr(model, "all_tied_weights_keys", None) or {}) if is_offloaded(model) else {}
    tied = {*ties, *ties.values()}
    names: dict[int | str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(ties.get(name, name) if name in tied else id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _is_linear(host: nn.Module) -> bool:
    return not isinstance(host, (Conv1D, nn.Embedding))
