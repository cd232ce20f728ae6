"""Shrinkage of a covariance estimate, in standardised coordinates."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def oas_shrinkage(correlation: Tensor, rows: float) -> float:
    """The oracle approximating shrinkage intensity of a correlation matrix.

    Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance Estimation" (2010), equation 23, with the
    identity as target. Standardised coordinates make it free of the scale of every feature, and the result is kept
    in [0, 1], so the shrunk matrix never loses positive definiteness.

    Args:
        correlation: `(d, d)` float64, symmetric, ones on the diagonal.
        rows: The effective number of rows, `(Σ w)² / Σ w²` when rows have weights `w`.

    Returns:
        The share of the identity, between 0 (keep the estimate) and 1.
    """
    d = correlation.shape[0]
    mean_square = float(torch.linalg.vector_norm(correlation)) ** 2 / d**2
    excess = (rows + 1) * (mean_square - 1 / d)
    if excess <= 0:
        return 1.0
    return min(1.0, (mean_square + 1) / excess)


def shrinkage_intensity(shrinkage: str | float | None, correlation: Tensor, rows: float) -> float:
    """Read a `shrinkage` argument: "oas", a share in [0, 1], or None for no shrinkage.

    Raises:
        ValueError: If it is anything else.
    """
    if shrinkage is None:
        return 0.0
    if shrinkage == "oas":
        return oas_shrinkage(correlation, rows)
    if isinstance(shrinkage, bool) or not isinstance(shrinkage, (int, float)) or not _is_share(shrinkage):
        raise ValueError(f'shrinkage is {shrinkage!r}: give "oas", None, or a share between 0 and 1.')
    return float(shrinkage)


def _is_share(value: float) -> bool:
    return math.isfinite(value) and 0 <= value <= 1
