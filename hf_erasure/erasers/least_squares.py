"""INLP from moments: rounds of a least-squares probe.

INLP (Ravfogel et al. 2020, arXiv 2004.07667) runs in rounds. Each round trains a linear probe of the concept and
projects x orthogonally onto the null space of its weights; the next round trains on the rest. There are two probes:
least squares, whose rounds are functions of the moments alone (`inlp_factors`), and the paper's logistic regression,
which needs the rows (`fit_inlp`). Neither gives the guarantee of LEACE after a few rounds. A round removes the
direction that its probe reads, and leaves a covariance with the concept that another direction reads; only the
removed directions stay removed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .eraser import Factor, Spread, check_count, factorise
from .statistics import PackedGram

ROUNDS = 10
"""The number of rounds of INLP if neither it nor a rank is given."""

# A direction is rounding if at most this share of it lies outside the directions that were removed before.
_NEW = 1e-9


def inlp_factors(
    columns: Tensor, factor: Factor, rounds: int, rank: int | None, cutoff: float
) -> tuple[Tensor, Tensor]:
    """INLP with a least-squares probe, from moments.

    With `A` the covariances with the concept and `U` the directions removed so far, the probe of a round minimises
    `tr Wᵀ Σ W − 2 tr Wᵀ A` over the W orthogonal to U. In `Y = F W`, `Σ = Fᵀ F`, the minimum is the part of `F⁻ᵀ A`
    that is orthogonal to `F⁻ᵀ U`; so one factorisation of Σ serves all rounds, and the singular values of Y are the
    correlations that the probe finds. In exact arithmetic the rounds together remove the block Krylov space
    `Σ⁻¹A, Σ⁻²A, …, Σ⁻ʳA`. Each round adds as many directions as the concept varies in, k − 1 for k classes.

    `factor` is from `ridge_factor`, for the rows that the probe is trained on; a correlation with the concept below
    `cutoff` is rounding.
    """
    basis, whitened = columns[:, :0], factor.whiten(columns)
    spent = basis
    for _ in range(rounds):
        found = whitened - spent @ (spent.T @ whitened)
        vectors, strength, _ = torch.linalg.svd(found, full_matrices=False)
        probe = factor.readings(vectors[:, strength > cutoff]).T
        new = outside_span(probe, basis)
        basis = torch.cat([basis, new], dim=1)
        if new.shape[1] == 0 or (rank is not None and basis.shape[1] >= rank):
            break
        spent = torch.cat([spent, outside_span(factor.whiten(new), spent)], dim=1)
    basis = basis[:, :rank]
    return basis, basis.T


def ridge_factor(spread: Spread, shrinkage: str | float | None) -> Factor:
    """The factor of Σ for a least-squares probe with a ridge.

    The ridge is on the unscaled weights, as in scikit-learn's `Ridge`: `(1 − s) Σ + s · mean(var) · I`. LEACE shrinks
    towards the variances instead, so that the scale of a feature does not matter. Here it matters: without such a ridge
    a feature that hardly varies gets the largest weight, and whole rounds remove nothing else.
    """
    sigma, variance = spread.sigma, spread.variance
    share = spread.share(shrinkage, torch.where(variance > 0, variance, 1.0).rsqrt())
    ridged = PackedGram(sigma.dim, variance.device, sigma.values * (1 - share))
    ridged.values[ridged.diagonal] += share * variance.mean()
    return factorise(replace(spread, sigma=ridged), None)


def outside_span(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal directions of `block` that are not in the span of `basis`, which is orthonormal."""
    lengths = block.norm(dim=0)
    block = block / torch.where(lengths > 0, lengths, 1.0)
    for _ in range(2):  # the second time removes what rounding left of the basis
        block = block - basis @ (basis.T @ block)
    vectors, strength, _ = torch.linalg.svd(block, full_matrices=False)
    new = vectors[:, strength > _NEW]
    return torch.linalg.qr(new - basis @ (basis.T @ new))[0]


def check_rounds(rounds: int | None, rank: int | None) -> int:
    """Check `rounds` and `rank`, and return the largest number of rounds."""
    check_count("rounds", rounds, none=", or None")
    check_count("rank", rank, none=", or None for all directions")
    if rounds is not None:
        return rounds
    # A round adds at least one direction, or is the last round.
    return ROUNDS if rank is None else rank
