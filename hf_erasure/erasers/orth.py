"""Orthogonal erasure: the projection onto what is orthogonal to every covariance with the concept.

It is LEACE with Σ = I, known as spectral attribute removal (SAL, arXiv 2203.07893) when all directions are kept: the
same guarantee, with a larger change of the activations, and a symmetric projection.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orth_factors(columns: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The orthogonal projection away from the span of `columns`.

    Args:
        columns: `(d, r)` float64, covariances of x with r concept directions, linearly independent.
        rank: Keep that many directions, those of the largest covariance; None for all.

    Returns:
        `left` `(d, rank)` with orthonormal columns, and `right`, its transpose.
    """
    basis = torch.linalg.svd(columns, full_matrices=False)[0][:, :rank]
    return basis, basis.T
