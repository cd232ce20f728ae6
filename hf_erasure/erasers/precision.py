"""How finely moments are known, and which cut-offs follow from it."""

from __future__ import annotations

import torch

EXACT = torch.finfo(torch.float64).eps
"""Resolution of moments that saw float64 rows only."""


def product_dtype(x_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the d × d products for rows of `x_dtype`: its own, but at least float32.

    Where a process has allowed matrix products below float32 (TF32, bfloat16), float64 is used instead: switching the
    process-wide setting back and forth would reach other threads.
    """
    if x_dtype == torch.float64 or _reduced(device):
        return torch.float64
    return torch.float32


def _reduced(device: torch.device) -> bool:
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn
    setting = getattr(getattr(backend, "matmul", backend), "fp32_precision", None)
    if setting is not None:
        return setting in ("tf32", "bf16")
    if device.type == "cuda":
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return torch.get_float32_matmul_precision() == "medium"


def significance(resolution: float) -> float:
    """Below which length a row of correlations with the concept is rounding: 1e-12 for float64 rows, else 1e-6.

    Sampling noise lies far above it: a correlation of 1e-6 would take 10¹² rows to tell from chance.
    """
    return 1e-12 if resolution <= EXACT else 1e-6


def first_jitter(resolution: float) -> float:
    """What is added to the diagonal of a correlation matrix before it is factored."""
    return 1e-13 if resolution <= EXACT else 1e-7


def variance_floor(resolution: float) -> float:
    """The share of a combination's variance that cannot be told from zero.

    It is the variance of `Σ uᵢ xᵢ` relative to `Σ uᵢ² var(xᵢ)`. A float32 product rounds a correlation matrix by about
    6e-8 an entry, so its spectrum by some 1e-6 at the widths of language models; float64 by 1e-15, kept a hundred
    times away.
    """
    return 1e-13 if resolution <= EXACT else 1e-6
