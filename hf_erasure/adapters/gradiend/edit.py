"""The arithmetic of a GRADIEND adapter: `W + α (h Wd + bd)`, dense or at a few positions (arXiv 2502.01406, section 3).

The sum is formed in float32 (float64 for a float64 weight) and rounded once to the dtype of the weight. A forward pass
with the adapter, a merge and a trial edit all come through `edited_tensor`, so that they agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.placement import is_quantised


@dataclass(frozen=True)
class WeightEdit:
    """One adapter's change of one weight."""

    index: Tensor | None  # (count,) int32 flat positions; None where every entry changes
    values: Tensor  # (count,) what is added there

    def to(self, device: torch.device) -> WeightEdit:
        """The edit on a device."""
        return WeightEdit(None if self.index is None else self.index.to(device), self.values.to(device))


def edited_tensor(weight: Tensor, edits: Sequence[WeightEdit]) -> Tensor:
    """A new tensor like `weight` with the changes added; `weight` is not touched."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    flat = weight.detach().reshape(-1)
    if len(edits) == 1 and edits[0].index is not None and flat.dtype != dtype:
        # Half precision: all but a few entries would only be converted to and fro.
        index, values = edits[0].index, edits[0].values
        changed = flat.index_select(0, index).to(dtype) + values
        return flat.clone().index_copy_(0, index.long(), changed.to(flat.dtype)).view(weight.shape)
    result = flat.to(dtype, copy=True)
    for edit in edits:
        values = edit.values.to(dtype)
        if edit.index is not None:
            result.index_add_(0, edit.index, values)
        elif values.shape == result.shape:
            result += values
        else:
            raise ValueError(
                f"A GRADIEND adapter changes {values.numel():,} entries of a weight that has shape "
                f"{list(weight.shape)} by now: it was resized under the adapter, as by resize_token_embeddings. Resize "
                "the model first; add and fit, or load, the adapter then."
            )
    return result.to(weight.dtype).view(weight.shape)


class _PassGradient(torch.autograd.Function):
    """Adds the change, and hands the gradient on to the weight as it is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *parts: Tensor | None) -> Tensor:
        edits = [WeightEdit(parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]  # type: ignore[arg-type]
        return edited_tensor(weight, edits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0], *[None] * (len(ctx.needs_input_grad) - 1))


def with_gradient(weight: Tensor, edits: Sequence[WeightEdit]) -> Tensor:
    """`edited_tensor`, as a function of the weight where autograd asks for one."""
    if not (weight.requires_grad and torch.is_grad_enabled()):
        with torch.no_grad():
            return edited_tensor(weight, edits)
    edited: Tensor = _PassGradient.apply(weight, *(part for edit in edits for part in (edit.index, edit.values)))
    return edited


# ---- in place, with a way back ---------------------------------------------------------------------------------------


@dataclass
class UndoRecord:
    """What was overwritten in one weight, so that it can be put back."""

    parameter: nn.Parameter
    index: Tensor | None  # (count,) int64 flat positions that were written; None for all
    before: Tensor  # the values that were there
    edits: list[WeightEdit]  # the changes of these values

    def undo(self) -> None:
        """Put the values back: to the bit, unless something else has changed the weight in between."""
        flat = _flat(self.parameter)
        before, index = self.before.to(flat.device), None if self.index is None else self.index.to(flat.device)
        after = edited_tensor(before, [edit.to(flat.device) for edit in self.edits])
        now = flat if index is None else flat.index_select(0, index)
        if torch.allclose(now, after.to(flat.dtype), rtol=0, atol=0, equal_nan=True):
            values = before.to(flat.dtype)
        else:  # as when a LoRA was merged into the same weight since
            dtype = torch.promote_types(flat.dtype, torch.float32)
            values = (now.to(dtype) - (after.to(dtype) - before.to(dtype))).to(flat.dtype)
        _put(self.parameter, flat, index, values)


def write(parameter: nn.Parameter, edits: list[WeightEdit]) -> UndoRecord:
    """Add changes to a weight in place."""
    flat, index = _flat(parameter), None
    edits = [edit.to(flat.device) for edit in edits]
    places = [edit.index.long() for edit in edits if edit.index is not None]
    if len(places) < len(edits):
        before = flat.clone()
    else:  # only the entries that change are read and written
        index = places[0] if len(places) == 1 else torch.cat(places).unique()
        before = flat.index_select(0, index)
        within = [torch.searchsorted(index, place).int() if len(places) > 1 else None for place in places]
        edits = [WeightEdit(at, edit.values) for at, edit in zip(within, edits, strict=True)]
    _put(parameter, flat, index, edited_tensor(before, edits))
    return UndoRecord(parameter, index, before, edits)


def _flat(parameter: Tensor) -> Tensor:
    """The values as a vector: a view where the weight is contiguous, a copy otherwise."""
    return parameter.detach().reshape(-1)


@torch.no_grad()
def _put(parameter: nn.Parameter, flat: Tensor, index: Tensor | None, values: Tensor) -> None:
    # `detach` shares memory and version counter, so that a backward pass that needs the old values says so.
    target = parameter.detach()
    if index is None:
        target.copy_(values.view(parameter.shape))
    elif flat.data_ptr() == parameter.data_ptr():
        flat.index_copy_(0, index, values)
    else:
        target.copy_(flat.index_copy(0, index, values).view(parameter.shape))


def why_not_editable(parameter: Tensor) -> str | None:
    """The reason why a weight cannot be written to; None when it can."""
    if is_quantised(parameter):
        return "is quantised, and an edit of it would not be exact. Load the float weights"
    if type(parameter.data) is not Tensor:
        return "is sharded. Load the model whole"
    if parameter.device.type == "meta":
        return "is offloaded. Load the model on one device"
    return None


def share_kept(changes: Iterable[tuple[Tensor, WeightEdit]]) -> float:
    """The share of changes of weights that is left after rounding to the weights' dtype, 1 for all."""
    squares = product = 0.0
    for parameter, edit in changes:
        flat = _flat(parameter)
        edit = edit.to(flat.device)
        if edit.index is not None:
            flat, edit = flat.index_select(0, edit.index), WeightEdit(None, edit.values)
        wanted = edited_tensor(torch.zeros_like(flat, dtype=torch.float32), [edit]).double()
        kept = edited_tensor(flat, [edit]).double() - flat.double()
        squares += float(wanted.square().sum())
        product += float((wanted * kept).sum())
    return min(1.0, product / squares) if squares else 1.0
