"""Products of centred rows: where nearly all the time of an update goes."""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import PackedGram
from .rows import Rows


def centred_products(rows: Rows, mean: Tensor, gram: PackedGram, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Multiply the counted rows with themselves, a chunk at a time.

    Args:
        rows: The batch.
        mean: `(d,)` float64 mean of its counted rows.
        gram: The layout of the result.
        dtype: Of the products; float64 is used instead where squares leave the range of float32.

    Returns:
        `Σ w (x − c)(x − c)ᵀ` in the layout of `gram`, and `c − mean` `(d,)` float64; c is the mean rounded to `dtype`.

    Raises:
        ValueError: If squares leave the range of float64.
    """
    device = gram.values.device
    # A centred chunk takes at most 2/3 d² numbers of 4 bytes, beside as much for the products and twice as much for the
    # sums they go to. Rows that must be gathered or converted exist twice, and float64 is twice as wide.
    copied = rows.index is not None or rows.x.dtype != dtype or rows.x.device != device
    size = max(512, min(2048, gram.dim * 2 // 3)) // (2 if copied else 1) // (2 if dtype == torch.float64 else 1)
    centre = mean.to(dtype)
    root = None if rows.weight is None else rows.weight.sqrt().to(device=device, dtype=dtype)[:, None]
    out = gram.empty(dtype, device)
    buffer = torch.empty(min(size, rows.count), gram.dim, dtype=dtype, device=device)
    for start in range(0, rows.count, size):
        stop = min(start + size, rows.count)
        centred = buffer[: stop - start]
        torch.sub(rows.chunk(start, stop).to(device=device, dtype=dtype), centre, out=centred)
        if root is not None:
            centred *= root[start:stop]
        gram.products(centred, out, add=start > 0)
    largest = float(gram.like(out).diagonal.max())
    weight = rows.count if rows.weight is None else float(rows.weight.sum())
    # Squares beyond the range of float32: too large, or so small that they vanish.
    if dtype != torch.float64 and not 1e-30 * weight <= largest < float("inf"):
        del buffer, out
        return centred_products(rows, mean, gram, torch.float64)
    if not largest < float("inf"):
        raise ValueError("x holds numbers whose squares overflow float64: scale the activations down.")
    return out, centre.double() - mean
