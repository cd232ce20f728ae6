"""What each method subtracts and reads, `left` and `right`, from moments alone.

INLP (Ravfogel et al. 2020, arXiv 2004.07667) goes by rounds, each of which trains a linear probe of the concept and
projects x orthogonally onto the null space of its weights; the next round trains on what is left. Two probes are known:

* least squares, whose rounds are functions of the moments alone (`inlp_factors`; `ConceptMoments.eraser("inlp")`),
* logistic regression, the paper's, which needs the rows (`fit_inlp`; `Eraser.fit(x, z, "inlp")`).

Neither gives the guarantee of LEACE after a few rounds. A round takes away the direction that its probe reads, and
leaves a covariance with the concept that another direction reads; only what the rounds removed stays removed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .statistics import PackedGram

EXACT = torch.finfo(torch.float64).eps
"""Resolution of moments that saw float64 rows only."""

METHODS = ("leace", "orth", "mean_projection", "inlp")
"""Methods that are solved from moments. SAL is "orth"; R-LACE needs rows: `Eraser.fit`."""

ROUNDS = 10
"""Rounds of INLP where neither their number nor a rank is given."""

PROBES = ("logistic", "least_squares")

# A direction that shares all but this with those removed before is rounding.
_NEW = 1e-9


# ---- how exact it is -------------------------------------------------------------------------------------------------


def significance(resolution: float) -> float:
    """Below which length a row of correlations with the concept is rounding: 1e-12 for float64 rows, else 1e-6.

    Sampling noise lies far above it: a correlation of 1e-6 would take 10¹² rows to tell from chance.
    """
    return 1e-12 if resolution <= EXACT else 1e-6


def variance_floor(resolution: float) -> float:
    """The share of a combination's variance that cannot be told from zero.

    It is the variance of `Σ uᵢ xᵢ` relative to `Σ uᵢ² var(xᵢ)`. A float32 product rounds a correlation matrix by about
    6e-8 an entry, so its spectrum by some 1e-6 at the widths of language models; float64 by 1e-15, kept a hundred
    times away.
    """
    return 1e-13 if resolution <= EXACT else 1e-6


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


@dataclass(frozen=True)
class Spread:
    """Mean and second moments as the methods need them, all float64.

    Attributes:
        mean: `(d,)` of x; it stays in place.
        sigma: Covariance `(d, d)`, with 0 on the diagonal for constant features; it decides what "as little as
            possible" means.
        variance: `(d,)` variances of the rows the concept was read from; 0 for constant features.
        cross: `(d, k)` covariance of x with the concept.
        concept: `(k, k)` covariance of the concept.
        rows: Effective number of rows behind `sigma`.
        resolution: Machine epsilon of the coarsest rows.
    """

    mean: Tensor
    sigma: PackedGram
    variance: Tensor
    cross: Tensor
    concept: Tensor
    rows: float
    resolution: float

    def share(self, shrinkage: str | float | None, scale: Tensor) -> float:
        """The share of the identity that is meant for `sigma`, standardised by `scale` `(d,)`."""
        if shrinkage == "oas":
            return oas_shrinkage(self.sigma.mean_square(scale), self.sigma.dim, self.rows)
        return float(shrinkage or 0.0)


@dataclass(frozen=True)
class Factor:
    """`upperᵀ · upper ≈ scale · Σ · scale`, shrunk.

    Attributes:
        upper: `(d, d)` float64 Cholesky factor of the shrunk correlation matrix.
        scale: `(d,)` float64, one over the standard deviations; 0 for features that never vary.
    """

    upper: Tensor
    scale: Tensor

    def whiten(self, columns: Tensor) -> Tensor:
        """`(d, r)` covariances with x, whitened: `upper⁻ᵀ · scale · columns`."""
        return torch.linalg.solve_triangular(self.upper.mT, self.scale[:, None] * columns, upper=False)

    def readings(self, whitened: Tensor) -> Tensor:
        """`(r, d)` linear forms on x that whitened directions `(d, r)` stand for."""
        return (torch.linalg.solve_triangular(self.upper, whitened, upper=True) * self.scale[:, None]).T


def factorise(spread: Spread, shrinkage: str | float | None) -> Factor:
    """Shrink and factor a covariance in standardised coordinates.

    The jitter climbs by tens until the factorisation succeeds. Any positive definite stand-in keeps the guarantee of
    the methods, so a jitter costs optimality only.

    Raises:
        ValueError: If `shrinkage` is unknown or the covariance is not finite.
    """
    check_shrinkage(shrinkage)
    # What is added to the diagonal of the correlation matrix, in units of a variance of one.
    jitter, sigma = 1e-13 if spread.resolution <= EXACT else 1e-7, spread.sigma
    # A feature that a background never moves still needs a scale, and the rows of the concept give one. A feature that
    # moves nowhere gets none: it is neither read nor changed.
    diagonal = _trusted(torch.maximum(sigma.values[sigma.diagonal], jitter * _trusted(spread.variance)))
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    share = spread.share(shrinkage, scale)
    while jitter <= 10:
        upper = sigma.cholesky(scale, share, jitter)
        if upper is not None:
            return Factor(upper, scale)
        jitter *= 10
    raise ValueError("The covariance of x is not finite, so it cannot be factored: scale the activations down.")


def _trusted(variance: Tensor) -> Tensor:
    """Variances with a floor below which a square is lost: a feature next to others 10¹⁵ times as large.

    Trained norms switch features off by weights such as 1e-33, whose squares underflow. Their scale is unknown then,
    and only its being positive matters: it costs optimality in a feature of no size, and no guarantee.
    """
    return variance.clamp_min(1e-30 * float(variance.max()))


def whiten_concept(covariance: Tensor) -> Tensor:
    """`(k, r)` float64 matrix that gives z the identity as covariance; r is the number of dimensions z varies in.

    Scaling every column to variance 1 first keeps a class of probability 1e-6 as far from the cut-off as a common
    one. One-hot columns add up to one, so k classes vary in k − 1 dimensions.
    """
    variance = covariance.diagonal().clamp_min(0.0)
    scale = torch.where(variance > 0, variance, 1.0).rsqrt() * (variance > 0)
    values, vectors = torch.linalg.eigh(covariance * scale * scale[:, None])
    # A combination of z whose variance is 1e-12 of its parts is their rounding.
    keep = values > 1e-12 * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    return scale[:, None] * vectors[:, keep] * values[keep].rsqrt()


def concept_columns(spread: Spread) -> Tensor:
    """`(d, r)` covariances of x with the independent concept directions it carries.

    z is whitened, x is standardised, so the cut-off (`significance`) is relative to both: it compares the
    length of a vector of correlations with 1. Canonical correlations are not compared, because they are all 1 when
    there are fewer rows than features, and need not be correlations when Σ comes from a background.
    """
    columns = spread.cross @ whiten_concept(spread.concept)
    variance = _trusted(spread.variance)
    varies = variance > 0
    columns = torch.where(varies[:, None], columns, 0.0)
    if columns.shape[1] == 0:
        return columns
    standardised = columns * torch.where(varies, variance, 1.0).rsqrt()[:, None]
    _, strength, directions = torch.linalg.svd(standardised, full_matrices=False)
    keep = strength > significance(spread.resolution) * strength[0].clamp_min(1.0)
    return columns @ directions[keep].T


# ---- methods that are one projection ---------------------------------------------------------------------------------


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
    """Σ of a least-squares probe with a ridge.

    The ridge is on the weights as they are, as in scikit-learn's `Ridge`: `(1 − s) Σ + s · mean(var) · I`. LEACE
    shrinks towards the variances instead, whatever the scale of a feature. Here scale matters: without a ridge in these
    units a feature that hardly varies has the largest weight of all, and rounds go by that remove nothing else.

    Args:
        spread: Of the rows that the probe is trained on.
        shrinkage: "oas", the share s, or None for no ridge.
    """
    sigma, variance = spread.sigma, spread.variance
    share = spread.share(shrinkage, torch.where(variance > 0, variance, 1.0).rsqrt())
    ridged = PackedGram(sigma.dim, variance.device, sigma.values * (1 - share))
    ridged.values[ridged.diagonal] += share * variance.mean()
    return factorise(replace(spread, sigma=ridged), None)


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


def check_options(
    method: str, rank: int | None, rounds: int | None, shrinkage: str | float | None, background_weight: float
) -> None:
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
    check_shrinkage(shrinkage)
