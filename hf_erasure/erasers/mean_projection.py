"""Mean projection: the orthogonal projection away from the differences of the class means.

Haghighatkhah, Fokkens, Sommerauer, Speckmann and Verbeek, "Better Hit the Nail on the Head than Beat around the Bush:
Removing Protected Attributes with a Single Projection" (2022). For class ids the covariance of x with the indicator of
class c is `p_c (μ_c − μ)`, so that all directions together are those of `orth` (SAL): the two methods are the same map.
They differ where the rank is capped, as here every class counts alike, whatever its share.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_projection_factors(columns: Tensor, cross: Tensor, shares: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The orthogonal projection away from the span of `μ_c − μ`.

    Args:
        columns: `(d, r)` float64, what of the covariances with the concept is more than rounding; it has the span of
            the differences.
        cross: `(d, k)` float64, covariances of x with the indicators of the classes.
        shares: `(k,)` float64, shares of the classes; one of 0 has no mean and does not count.
        rank: Keep that many directions, those in which the class means lie farthest apart; None for all.

    Returns:
        `left` `(d, rank)` with orthonormal columns, and `right`, its transpose.
    """
    present = shares > 0
    differences = cross[:, present] / shares[present]
    span = torch.linalg.svd(columns, full_matrices=False)[0]
    basis = span @ torch.linalg.svd(span.T @ differences, full_matrices=False)[0]
    basis = basis[:, :rank]
    return basis, basis.T
