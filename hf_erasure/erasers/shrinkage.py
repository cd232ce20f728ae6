"""Shrinkage of a covariance estimate, in standardised coordinates."""

from __future__ import annotations


def oas_shrinkage(mean_square: float, width: int, rows: float) -> float:
    """The oracle approximating shrinkage intensity of a correlation matrix.

    Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance Estimation" (2010), equation 23, with the
    identity as target. Standardised coordinates make it free of the scale of every feature, and the result is kept
    in [0, 1], so the shrunk matrix never loses positive definiteness.

    Args:
        mean_square: Mean of the squared entries of the correlation matrix, ones on the diagonal included.
        width: Number of features.
        rows: The effective number of rows, `(Σ w)² / Σ w²` when rows have weights `w`.

    Returns:
        The share of the identity, between 0 (keep the estimate) and 1.
    """
    excess = (rows + 1) * (mean_square - 1 / width)
    return min(1.0, (mean_square + 1) / excess) if excess > 0 else 1.0


def check_shrinkage(shrinkage: str | float | None) -> None:
    """Refuse what is neither "oas", nor None, nor a share.

    Raises:
        ValueError: The message says what it may be.
    """
    if shrinkage is None or shrinkage == "oas":
        return
    if isinstance(shrinkage, bool) or not isinstance(shrinkage, (int, float)) or not 0 <= shrinkage <= 1:
        raise ValueError(f'shrinkage is {shrinkage!r}: give "oas", None, or a share between 0 and 1.')
