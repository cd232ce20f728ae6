"""From the states of a sequence's tokens to what stands for the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

POOLS = ("tokens", "mean", "cls", "last")
IN_WORDS = {
    "tokens": "every token",
    "mean": "the mean of the tokens",
    "cls": "the first token",
    "last": "the last real token",
}


def check_pool(pool: str | None) -> None:
    """Raise a `ValueError` for a way of pooling that is not known; None stands for what the head reads."""
    if pool is not None and pool not in POOLS:
        raise ValueError(
            f"pool={pool!r} is not known; choose one of {', '.join(map(repr, POOLS))}, or None for what the model's "
            "head reads."
        )


def counted(real: Tensor, pool: str) -> Tensor:
    """The positions that a pool reads.

    Args:
        real: `(batch, seq)` bool, positions that are not padding.
        pool: One of `POOLS`.

    Returns:
        `(batch, seq)` bool: all real ones, the first of them (`"cls"`) or the last.
    """
    if pool in ("tokens", "mean"):
        return real
    order = real.cumsum(1)
    return real & (order == (1 if pool == "cls" else order[:, -1:]))


def pooled(states: Tensor, real: Tensor, pool: str) -> Tensor:
    """One vector a sequence.

    Args:
        states: `(batch, seq, width)`; padding may hold anything.
        real: `(batch, seq)` bool, positions that are not padding.
        pool: `"mean"`, `"cls"` or `"last"`.

    Returns:
        `(batch, width)`.
    """
    positions = counted(real, pool)
    kept = torch.where(positions[..., None], states, 0.0)
    weight = positions / positions.sum(1, keepdim=True).clamp_min(1)
    return torch.einsum("bsw,bs->bw", kept, weight.to(states.dtype))
