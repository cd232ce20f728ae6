"""Erasers written into the weights of the module they act on, where that is exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def merged_parameters(
    path: str, host: nn.Module, parameters: dict[str, Tensor], site: str, left: Tensor, right: Tensor, bias: Tensor
) -> dict[str, Tensor]:
    """The parameters that make `host` alone compute what it computes with the eraser.

    With `P = L R`, an erased output of `W x + c` is `(I − P) W x + c − P (c − μ)`, and an erased input gives
    `W (I − P) x + c + W P μ`. An embedding's output is its rows, erased one by one.

    Args:
        path: The host's name, for messages.
        host: A `Linear`, a `Conv1D`, or (output only) an `Embedding`.
        parameters: The host's parameters by name.
        site: `"output"` or `"input"`.
        left: `(width, rank)`.
        right: `(rank, width)`.
        bias: `(width,)`, the mean that is kept; zero for a purely linear eraser.

    Returns:
        The changed parameters by name, in their own dtypes; computed in float64.

    Raises:
        ValueError: If the merged module would not compute the same.
    """
    refusal = why_not_mergeable(host, site)
    if refusal is not None:
        raise ValueError(f"The erasure at the {site} of {path!r} cannot be merged: {refusal}")
    left, right, mean = (part.to(parameters["weight"].device, torch.float64) for part in (left, right, bias))
    weight = parameters["weight"].double()
    if isinstance(host, nn.Embedding):
        return {"weight": _cast(weight - ((weight - mean) @ right.T) @ left.T, parameters["weight"])}

    # As a map of column vectors, whichever way round the layer stores it.
    linear = weight.T if isinstance(host, Conv1D) else weight
    old_bias = parameters.get("bias")
    if old_bias is None:
        offset = torch.zeros(linear.shape[0], dtype=torch.float64, device=linear.device)
    else:
        offset = old_bias.double()
    if site == "output":
        linear, new_offset = linear - left @ (right @ linear), offset - left @ (right @ (offset - mean))
    else:
        new_offset = offset + linear @ (left @ (right @ mean))
        linear = linear - (linear @ left) @ right
    changed = {"weight": _cast(linear.T if isinstance(host, Conv1D) else linear, parameters["weight"])}
    if old_bias is not None:
        changed["bias"] = _cast(new_offset, old_bias)
    elif bool(new_offset.any()):
        raise ValueError(
            f"The erasure at the {site} of {path!r} cannot be merged: it keeps the mean of the activations, for which "
            "the layer would need a bias, and it has none. Fit a purely linear erasure with "
            "ConceptErasureConfig(affine=False), or use this adapter unmerged."
        )
    return changed


def why_not_mergeable(host: nn.Module, site: str) -> str | None:
    """The reason why an eraser at `host` has no place in its weights, or None if it has."""
    kind = type(host).__name__
    if getattr(host, "parametrizations", None):
        return f"the weight of this {kind} is parametrized; remove the parametrization first."
    # Subclasses with a forward of their own (scaled, quantised, wrapped layers) compute something else.
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
    if weight.device.type == "meta":
        return "its weight is offloaded. Load the model on one device to merge."
    if not weight.is_floating_point() or type(weight.data) is not Tensor:
        return "its weight is quantised or sharded, and the merged weight would not be exact. Load the plain weights."
    return None


def shared_weights(model: nn.Module) -> dict[str, list[str]]:
    """Parameter names that share their tensor with others (tied embeddings), each with all its names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _cast(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).contiguous()
