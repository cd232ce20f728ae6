"""What each method subtracts and reads, `left` and `right`, from moments alone.

INLP (Ravfogel et al. 2020, arXiv 2004.07667) goes by rounds, each of which trains a linear probe of the concept and
projects x orthogonally onto the null space of its weights; the next round trains on what is left. Two probes are known:

* least squares, whose rounds are functions of the moments alone (`inlp_factors`; `ConceptMoments.eraser("inlp")`),
* logistic regression, the paper's, which needs the rows (`fit_inlp`; `Eraser.fit(x, z, "inlp")`).

Neither gives the guarantee of LEACE after a few rounds. A round takes away the direction that its probe reads, and
leaves a covariance with the concept that another direction reads; only what the rounds removed stays removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .whitening import Factor, Spread, factorise, oas_shrinkage

METHODS = ("leace", "orth", "mean_projection", "inlp")
"""Methods that are solved from moments. SAL is "orth"; R-LACE needs rows: `Eraser.fit`."""

ROUNDS = 10
"""Rounds of INLP where neither their number nor a rank is given."""

PROBES = ("logistic", "least_squares")

# A direction that shares all but this with those removed before is rounding.
_NEW = 1e-9


def leace_factors(columns: Tensor, factor: Factor, rank: int | None) -> tuple[Tensor, Tensor]:
    """LEACE: the smallest linear change of x, in the least-squares sense, that leaves no covariance with the concept.

    With `A` the covariances of x with the concept and `S Σ S = Cᵀ C`, the projection `W⁺ (W A)(W A)⁺ W`, `W = Σ^{-½}`,
    of arXiv 2306.03819 (Theorem 4.2) is `left · right` with `U τ Vᵀ = C⁻ᵀ S A`, `left = A V / τ` and
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


def orth_factors(columns: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The orthogonal projection away from the span of `columns`.

    It is LEACE with Σ = I, known as spectral attribute removal (SAL, arXiv 2203.07893) when all directions are kept:
    the same guarantee, with a larger change of the activations, and a symmetric projection.

    Args:
        columns: `(d, r)` float64, covariances of x with r concept directions, linearly independent.
        rank: Keep that many directions, those of the largest covariance; None for all.

    Returns:
        `left` `(d, rank)` with orthonormal columns, and `right`, its transpose.
    """
    basis = torch.linalg.svd(columns, full_matrices=False)[0][:, :rank]
    return basis, basis.T


def mean_projection_factors(columns: Tensor, cross: Tensor, shares: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The orthogonal projection away from the span of `μ_c − μ`, the differences of the class means.

    Haghighatkhah, Fokkens, Sommerauer, Speckmann and Verbeek, "Better Hit the Nail on the Head than Beat around the
    Bush: Removing Protected Attributes with a Single Projection" (2022). For class ids the covariance of x with the
    indicator of class c is `p_c (μ_c − μ)`, so that all directions together are those of `orth` (SAL): the two methods
    are the same map. They differ where the rank is capped, as here every class counts alike, whatever its share.

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


# ---- INLP ------------------------------------------------------------------------------------------------------------


def inlp_factors(
    columns: Tensor, factor: Factor, rounds: int, rank: int | None, cutoff: float
) -> tuple[Tensor, Tensor]:
    """INLP with a least-squares probe, from moments.

    With `A` the covariances with the concept and `U` the directions removed so far, the probe of a round minimises
    `tr Wᵀ Σ W − 2 tr Wᵀ A` over the W orthogonal to U. In `Y = F W`, `Σ = Fᵀ F`, the minimum is what of `F⁻ᵀ A` is
    orthogonal to `F⁻ᵀ U`; so one factorisation of Σ serves all rounds, and the singular values of Y are the
    correlations that the probe finds. In exact arithmetic the rounds together remove the block Krylov space
    `Σ⁻¹A, Σ⁻²A, …, Σ⁻ʳA`. Each adds as many directions as the concept varies in, k − 1 for k classes.

    Args:
        columns: `(d, r)` float64, covariances of x with r concept directions that are whitened, linearly independent.
        factor: The factored Σ of the rows that the probe is trained on, as `ridge_factor` makes it.
        rounds: At most so many.
        rank: At most so many directions, those of the first rounds; None for all.
        cutoff: The correlation with the concept below which what is left is rounding.

    Returns:
        `left` `(d, rank)` with orthonormal columns, and `right`, its transpose.
    """
    basis, wanted = columns[:, :0], factor.whiten(columns)
    spent = basis
    for _ in range(rounds):
        found = wanted - spent @ (spent.T @ wanted)
        vectors, strength, _ = torch.linalg.svd(found, full_matrices=False)
        probe = factor.readings(vectors[:, strength > cutoff]).T
        new = beyond(probe, basis)
        basis = torch.cat([basis, new], dim=1)
        if new.shape[1] == 0 or (rank is not None and basis.shape[1] >= rank):
            break
        spent = torch.cat([spent, beyond(factor.whiten(new), spent)], dim=1)
    basis = basis[:, :rank]
    return basis, basis.T


def ridge_factor(spread: Spread, shrinkage: str | float | None) -> Factor:
    """Σ of a least-squares probe with a ridge; `spread.sigma` is used up.

    The ridge is on the weights as they are, as in scikit-learn's `Ridge`: `(1 − s) Σ + s · mean(var) · I`. LEACE
    shrinks towards the variances instead, whatever the scale of a feature. Here scale matters: without a ridge in these
    units a feature that hardly varies has the largest weight of all, and rounds go by that remove nothing else.

    Args:
        spread: Of the rows that the probe is trained on.
        shrinkage: "oas", the share s, or None for no ridge.
    """
    sigma, variance = spread.sigma, spread.variance
    if shrinkage == "oas":
        scale = torch.where(variance > 0, variance, 1.0).rsqrt()
        correlation = sigma.like(sigma.values.clone())
        correlation.standardise(scale)
        shrinkage = oas_shrinkage(correlation.mean_square(), sigma.dim, spread.rows)
    share = float(shrinkage or 0.0)
    if share:
        sigma.values.mul_(1 - share)
        sigma.set_diagonal(sigma.diagonal + share * variance.mean())
    return factorise(spread, None)


def beyond(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal directions of `block` that are not in the span of `basis`, which is orthonormal."""
    lengths = block.norm(dim=0)
    block = block / torch.where(lengths > 0, lengths, 1.0)
    for _ in range(2):  # once more, for what rounding left of the basis
        block = block - basis @ (basis.T @ block)
    vectors, strength, _ = torch.linalg.svd(block, full_matrices=False)
    new = vectors[:, strength > _NEW]
    return torch.linalg.qr(new - basis @ (basis.T @ new))[0]


# ---- options ---------------------------------------------------------------------------------------------------------


def check_count(name: str, value: int | None, *, least: int = 1, most: int | None = None, none: str = "") -> None:
    """Refuse what is not a whole number within the bounds; where None may be given, `none` is how a message says so.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is out of the bounds.
    """
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}: give an int{none}.")
    if value < least or (most is not None and value > most):
        limit = "" if most is None else f", at most {most}"
        raise ValueError(f"{name} is {value}: it must be {least} or more{limit}{none}.")


def check_rounds(rounds: int | None, rank: int | None) -> int:
    """At most how many rounds are meant."""
    check_count("rounds", rounds, none=", or None")
    check_count("rank", rank, none=", or None for all directions")
    if rounds is not None:
        return rounds
    # A round adds at least one direction or is the last.
    return ROUNDS if rank is None else rank


def check_probe(probe: str) -> str:
    """Refuse a probe that is not known.

    Raises:
        ValueError: The message says which there are.
    """
    if probe not in PROBES:
        raise ValueError(f"probe is {probe!r}: it must be one of {', '.join(map(repr, PROBES))}.")
    return probe


def check_options(method: str, rank: int | None, rounds: int | None, background_weight: float) -> None:
    """Refuse options that `ConceptMoments.eraser` cannot solve with."""
    if method == "rlace":
        raise ValueError(
            "method is 'rlace', which plays its game on rows, and moments keep none: call Eraser.fit(x, z, 'rlace'). "
            "Its optimum for k classes and k − 1 directions is what 'orth' computes."
        )
    if rounds is not None and method != "inlp":
        raise ValueError(f"rounds is {rounds!r}, but method is {method!r}: only 'inlp' has rounds.")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(map(repr, METHODS))}.")
    check_count("rank", rank, none=", or None for all directions")
    if isinstance(background_weight, bool) or not isinstance(background_weight, (int, float)):
        raise TypeError(f"background_weight is {background_weight!r}: give a number from 0 to 1.")
    if not 0 <= background_weight <= 1:
        raise ValueError(f"background_weight is {background_weight!r}: it must lie between 0 and 1.")
