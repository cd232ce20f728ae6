"""Least-squares concept erasure, LEACE (arXiv 2306.03819, Theorem 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .whitening import Factor


def leace_factors(columns: Tensor, factor: Factor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The smallest linear change of x, in the least-squares sense, that leaves no covariance with the concept.

    With `A` the covariances of x with the concept and `S Σ S = Cᵀ C`, the paper's projection
    `W⁺ (W A)(W A)⁺ W`, `W = Σ^{-½}`, is `left · right` with `U τ Vᵀ = C⁻ᵀ S A`, `left = A V / τ` and
    `right = Uᵀ C⁻ᵀ S`. It needs one Cholesky factorisation and no d × d eigenvectors. `left` lies in the span of A
    whatever Σ is, so an inexact Σ costs optimality and never the guarantee.

    Args:
        columns: `(d, r)` float64, covariances of x with r concept directions, linearly independent.
        factor: The whitening of x.
        rank: Keep that many directions, those of the largest canonical correlations; None for all.

    Returns:
        `left` `(d, rank)` and `right` `(rank, d)`, with `right @ left` the identity.
    """
    basis, strength, mixing = torch.linalg.svd(factor.whiten(columns), full_matrices=False)
    basis, strength, mixing = basis[:, :rank], strength[:rank], mixing[:rank]
    left = columns @ mixing.T / strength
    right = factor.readings(basis)
    # The triangular solves lose digits where features are nearly collinear. One correction makes right · left the
    # identity again, and with it the projection exact.
    return left, torch.linalg.solve(right @ left, right)
