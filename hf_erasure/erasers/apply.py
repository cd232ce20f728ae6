"""The affine map of an eraser on an activation: the hot path of every hooked module."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor


def apply_erasure(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x − left · right · (x − bias)` for every row of `x` (arXiv 2306.03819, Theorem 4.3).

    The arithmetic runs in float32, or in float64 for a float64 `x`, whatever autocast says; the result has the dtype
    of `x`. Nothing branches on values, so the map compiles into one graph, differentiates and vectorises.

    Args:
        x: `(…, d)` activations of any floating dtype.
        left: `(d, rank)` directions that are subtracted.
        right: `(rank, d)` readings that say how much of each.
        bias: `(d,)` centre that the map leaves in place, or None for a linear map.

    Returns:
        `(…, d)` in the dtype of `x`; `x` itself when the rank is 0.

    Raises:
        TypeError: If `x` does not hold floating-point numbers.
        ValueError: If the width of `x` is not that of the eraser.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"x has dtype {x.dtype}: an eraser acts on floating-point activations; call x.float() first.")
    width, rank = left.shape
    if x.shape[-1:] != (width,):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but the eraser acts on a last dimension of {width}: apply it to the "
            "activations it was fitted on."
        )
    if rank == 0:
        return x
    dtype, device = torch.promote_types(x.dtype, torch.float32), x.device.type
    # Devices without autocast (meta) refuse the context altogether.
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        rows = x.to(dtype).reshape(-1, width)
        left, right = left.to(dtype), right.to(dtype)
        return _erase_rows(rows, left, right, bias).reshape(x.shape).to(x.dtype)


def _erase_rows(rows: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """`rows` is `(n, d)`; all tensors share one dtype but `bias`."""
    # right · (x − bias) = right · x − right · bias saves a pass over x. The constant is a difference of large numbers
    # where the mean is far from zero, so it is formed in float64.
    shift = None if bias is None else (right.double() @ bias.to(right.device).double()).to(rows.dtype)
    if left.shape[1] == 1:
        reading = torch.mv(rows, right[0]).unsqueeze(-1)
        reading = reading if shift is None else reading - shift
        return torch.addcmul(rows, reading, left[:, 0], value=-1)
    reading = rows @ right.T if shift is None else torch.addmm(shift, rows, right.T, beta=-1)
    return torch.addmm(rows, reading, left.T, alpha=-1)
