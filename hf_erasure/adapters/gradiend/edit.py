"""The arithmetic of a GRADIEND adapter: `W + α (h Wd + bd)`, dense or at a few positions (arXiv 2502.01406, section 3).

The sum is formed in float32 (float64 for a float64 weight) and rounded once to the dtype of the weight. A forward pass
with the adapter, a merge and a trial edit all come through `edited_tensor`, so that they agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.quantised import is_quantised


@dataclass(frozen=True)
class Term:
    """One adapter's change of one weight.

    Attributes:
        index: `(count,)` int32 flat positions; None where every entry changes.
        values: `(count,)` what is added there.
    """

    index: Tensor | None
    values: Tensor

    def to(self, device: torch.device) -> Term:
        """The term on a device."""
        if self.values.device == device:
            return self
        return Term(None if self.index is None else self.index.to(device), self.values.to(device))


def working_dtype(weight: Tensor) -> torch.dtype:
    """The precision in which a weight and its change are added."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def edited_tensor(weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """A new tensor like `weight` with the changes added; `weight` is not touched.

    Raises:
        ValueError: If the weight has another size than where the changes come from.
    """
    dtype = working_dtype(weight)
    flat = weight.detach().reshape(-1)
    if len(terms) == 1 and terms[0].index is not None and flat.dtype != dtype:
        # Half precision: all but a few entries would only be converted to and fro.
        index, values = terms[0].index, terms[0].values
        changed = flat.index_select(0, index).to(dtype) + values
        return flat.clone().index_copy_(0, index.long(), changed.to(flat.dtype)).view(weight.shape)
    result = flat.to(dtype, copy=True)
    for term in terms:
        values = term.values.to(dtype)
        if term.index is not None:
            result.index_add_(0, term.index, values)
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
    """Adds the change, and hands the gradient on to the weight as it is: a constant was added."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *parts: Tensor | None) -> Tensor:
        terms = [Term(parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]  # type: ignore[arg-type]
        return edited_tensor(weight, terms)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0], *[None] * (len(ctx.needs_input_grad) - 1))


def with_gradient(weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """`edited_tensor`, as a function of the weight where autograd asks for one."""
    if not (weight.requires_grad and torch.is_grad_enabled()):
        with torch.no_grad():
            return edited_tensor(weight, terms)
    edited: Tensor = _PassGradient.apply(weight, *(part for term in terms for part in (term.index, term.values)))
    return edited


# ---- in place, with a way back ---------------------------------------------------------------------------------------


@dataclass
class Written:
    """What was overwritten in one weight.

    Attributes:
        parameter: The weight.
        index: `(count,)` int64 flat positions that were written; None for all.
        before: The values that were there.
        after: The values that were written, in the dtype of the weight then; None for all of them, which `terms` give.
        terms: The changes.
    """

    parameter: nn.Parameter
    index: Tensor | None
    before: Tensor
    after: Tensor | None
    terms: list[Term]

    def undo(self) -> None:
        """Put the values back: to the bit, unless something else has changed the weight in between."""
        parameter = self.parameter
        flat = _flat(parameter)
        before = self.before.to(flat.device)
        index = None if self.index is None else self.index.to(flat.device)
        if self.after is None:
            after = edited_tensor(before, [term.to(flat.device) for term in self.terms])
        else:
            after = self.after.to(flat.device)
        now = flat if index is None else flat.index_select(0, index)
        if torch.allclose(now, after.to(flat.dtype), rtol=0, atol=0, equal_nan=True):
            values = before.to(flat.dtype)
        else:  # as when a LoRA was merged into the same weight since
            dtype = working_dtype(flat)
            values = (now.to(dtype) - (after.to(dtype) - before.to(dtype))).to(flat.dtype)
        _put(parameter, flat, index, values)


def write(parameter: nn.Parameter, terms: list[Term]) -> Written:
    """Add changes to a weight in place."""
    flat = _flat(parameter)
    terms = [term.to(flat.device) for term in terms]
    if any(term.index is None for term in terms):
        written = Written(parameter, None, flat.clone(), None, terms)
        _put(parameter, flat, None, edited_tensor(flat, terms))
        return written
    indices = [term.index.long() for term in terms if term.index is not None]
    index = indices[0] if len(indices) == 1 else torch.cat(indices).unique()
    before = flat.index_select(0, index)
    local = [
        Term(torch.searchsorted(index, positions).int() if len(terms) > 1 else None, term.values)
        for positions, term in zip(indices, terms, strict=True)
    ]
    after = edited_tensor(before, local)
    _put(parameter, flat, index, after)
    return Written(parameter, index, before, after, [])


def _flat(parameter: nn.Parameter) -> Tensor:
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


@contextmanager
def written(changes: Sequence[tuple[nn.Parameter, list[Term]]]) -> Iterator[None]:
    """Hold changes in the weights for a while; afterwards these are as they were, to the bit."""
    done: list[Written] = []
    try:
        for parameter, terms in changes:
            done.append(write(parameter, terms))
        yield
    finally:
        for change in reversed(done):
            change.undo()


def why_not_editable(parameter: Tensor) -> str | None:
    """The reason why a weight cannot be written to; None when it can."""
    if is_quantised(parameter):
        return "is quantised, and an edit of it would not be exact. Load the float weights"
    if type(parameter.data) is not Tensor:
        return "is sharded. Load the model whole"
    if parameter.device.type == "meta":
        return "is offloaded. Load the model on one device"
    return None


def squares_of_change(parameter: Tensor, terms: list[Term]) -> tuple[float, float]:
    """Of one weight's change the sum of squares as wanted, and of its product with what rounding leaves of it."""
    flat = parameter.detach().reshape(-1)
    terms = [term.to(flat.device) for term in terms]
    if len(terms) == 1 and terms[0].index is not None:
        flat, terms = flat.index_select(0, terms[0].index), [Term(None, terms[0].values)]
    wanted = edited_tensor(torch.zeros_like(flat, dtype=torch.float32), terms).double()
    kept = edited_tensor(flat, terms).double() - flat.double()
    return float(wanted.square().sum()), float((wanted * kept).sum())
