"""An eraser: an affine map of activations, how it acts in the hot path, and what each method subtracts and reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .statistics import PackedGram

EXACT = torch.finfo(torch.float64).eps
"""Resolution of moments that saw float64 rows only."""

METHODS = ("leace", "orth", "mean_projection", "inlp")
"""Methods that are solved from moments. SAL is "orth"; R-LACE needs rows: `Eraser.fit`."""

# What is left of a column beside others, as a share of its length, that counts for nothing: whitening multiplies the
# rounding of rows, 1e-16 in float64 and 6e-8 in float32, by up to 3e6 and 3e3 (see `factorise`).
_SPANNED, _SPANNED_BY_FLOATS = 1e-8, 1e-3
# How an eraser is fitted on one batch: from its "moments", or on the rows themselves by method. The files that know
# how, and need the class below for it, enter theirs.
FITS: dict[str, Callable[..., Eraser]] = {}


@dataclass(frozen=True, eq=False)
class Eraser:
    """The map `x ↦ x − left · right · (x − bias)` (arXiv 2306.03819, Theorem 4.3).

    The tensors are copies: nothing that happens to the moments later reaches an eraser.

    Attributes:
        left: `(x_dim, rank)` float64, the directions that are subtracted.
        right: `(rank, x_dim)` float64, the readings of the concept; `right @ left` is the identity.
        bias: `(x_dim,)` float64, the mean that stays in place; None for a map without affine part.
        x_dim: Width of the activations.
        rank: How many directions are removed.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None
    x_dim: int = field(init=False, repr=False)
    rank: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.shape != self.left.shape[::-1]:
            raise ValueError(
                f"left has shape {tuple(self.left.shape)} and right {tuple(self.right.shape)}: they must be "
                "(x_dim, rank) and (rank, x_dim)."
            )
        if self.bias is not None and self.bias.shape != self.left.shape[:1]:
            raise ValueError(
                f"bias has shape {tuple(self.bias.shape)}: it must be ({self.left.shape[0]},), the width of left."
            )
        for name, size in zip(("x_dim", "rank"), self.left.shape, strict=True):
            object.__setattr__(self, name, size)
        # A copy made outside inference mode may become a buffer that is later changed in place. It has the strides that
        # loading gives it: with others, as a solver leaves them, matrix products may sum in another order.
        with torch.inference_mode(False):
            for name in ("left", "right", "bias"):
                value = getattr(self, name)
                if value is not None:
                    copied = value.detach().clone(memory_format=torch.contiguous_format)
                    object.__setattr__(self, name, copied)

    @classmethod
    def fit(
        cls,
        x: Tensor,
        z: Tensor,
        method: str = "leace",
        *,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Eraser:
        """Fit an eraser on one batch of rows.

        Args:
            x: `(…, x_dim)` activations.
            z: Integer class ids `(…)`, −100 to leave a row out; or values `(…, z_dim)`; or one value per row `(…)`.
            method: "leace", "orth" (which is SAL) or "mean_projection", from the moments of the rows; "inlp" or
                "rlace", which train probes on the rows.
            weight: `(…)` non-negative weights of rows.
            mask: `(…)` bool, False leaves a row out.
            **options: As for `ConceptMoments.eraser`; for "inlp" as for `fit_inlp`, for "rlace" as for `fit_rlace`.
                `probe="least_squares"` with "inlp" takes the rounds from the moments, as `ConceptMoments.eraser` does;
                the default is `probe="logistic"`.

        Raises:
            TypeError: If `x` or `z` is not a tensor of numbers.
            ValueError: As `ConceptMoments.update` and `ConceptMoments.eraser` do.
        """
        # Only INLP has a probe that the moments answer.
        probe = options.pop("probe", "logistic") if method == "inlp" else "logistic"
        if probe not in ("logistic", "least_squares"):
            raise ValueError(f"probe is {probe!r}: it must be one of 'logistic', 'least_squares'.")
        if method == "rlace" or (method == "inlp" and probe == "logistic"):
            return FITS[method](x, z, weight=weight, mask=mask, **options)
        return FITS["moments"](x, z, weight=weight, mask=mask, method=method, **options)

    def __call__(self, x: Tensor) -> Tensor:
        """Erase the concept from `x` `(…, x_dim)`; computed on the device of `x`, in float32 or, for float64, in it."""
        bias = None if self.bias is None else self.bias.to(x.device)
        return apply_erasure(x, self.left.to(x.device), self.right.to(x.device), bias)

    def parts(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """`left`, `right` and `bias` as an adapter keeps them: a purely linear eraser has a zero bias."""
        bias = self.left.new_zeros(self.x_dim) if self.bias is None else self.bias
        return self.left.to(device, dtype), self.right.to(device, dtype), bias.to(device, dtype)

    @property
    def matrix(self) -> Tensor:
        """`(x_dim, x_dim)`: the linear part `I − left · right`."""
        identity = torch.eye(self.x_dim, dtype=self.left.dtype, device=self.left.device)
        return identity - self.left @ self.right

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Eraser:
        """A copy on another device or in another dtype."""
        bias = None if self.bias is None else self.bias.to(device=device, dtype=dtype)
        return Eraser(self.left.to(device=device, dtype=dtype), self.right.to(device=device, dtype=dtype), bias)


def apply_erasure(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, axis: int = -1) -> Tensor:
    """Return `x − left · right · (x − bias)` for every row of `x` (arXiv 2306.03819, Theorem 4.3).

    The arithmetic runs in float32, or in float64 for a float64 `x`, whatever autocast says; the result has the dtype
    of `x`. Nothing branches on values, so the map compiles into one graph, differentiates and vectorises.

    Args:
        x: `(…, d)` activations of any floating dtype.
        left: `(d, rank)` directions that are subtracted.
        right: `(rank, d)` readings that say how much of each.
        bias: `(d,)` centre that the map leaves in place, or None for a linear map.
        axis: The axis of the features, where it is not the last.

    Returns:
        `(…, d)` in the dtype of `x`; `x` itself when the rank is 0.

    Raises:
        TypeError: If `x` does not hold floating-point numbers.
        ValueError: If the width of `x` is not that of the eraser.
    """
    if axis != -1:
        return apply_erasure(x.movedim(axis, -1), left, right, bias).movedim(-1, axis)
    width, rank = left.shape
    if not x.dtype.is_floating_point or x.shape[-1:] != (width,):  # on the hot path, a call only where it refuses
        check_activations(x, width)
    if rank == 0:
        return x
    dtype, device = torch.promote_types(x.dtype, torch.float32), x.device.type
    # Devices without autocast (meta) refuse the context altogether.
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        rows = x.to(dtype).reshape(-1, width)
        left, right = left.to(dtype), right.to(dtype)
        # right · (x − bias) = right · x − right · bias saves a pass over x. The constant is a difference of large
        # numbers where the mean is far from zero, so it is formed in float64.
        shift = None if bias is None else (right.double() @ bias.to(right.device).double()).to(dtype)
        if rank == 1:
            reading = torch.mv(rows, right[0]).unsqueeze(-1)
            reading = reading if shift is None else reading - shift
            erased = torch.addcmul(rows, reading, left[:, 0], value=-1)
        else:
            reading = rows @ right.T if shift is None else torch.addmm(shift, rows, right.T, beta=-1)
            erased = torch.addmm(rows, reading, left.T, alpha=-1)
        return erased.reshape(x.shape).to(x.dtype)


def check_activations(x: Tensor, width: int) -> None:
    """Refuse what an eraser of that width cannot act on."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        kind = f"has dtype {x.dtype}" if isinstance(x, Tensor) else f"is {type(x).__name__}"
        raise TypeError(f"x {kind}: an eraser acts on floating-point activations; call x.float() first.")
    if x.shape[-1:] != (width,):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but the eraser acts on a last dimension of {width}: apply it to the "
            "activations it was fitted on."
        )


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


def check_shrinkage(shrinkage: str | float | None) -> None:
    """Refuse what is neither "oas", nor None, nor a share."""
    if shrinkage is None or shrinkage == "oas":
        return
    if isinstance(shrinkage, bool) or not isinstance(shrinkage, (int, float)) or not 0 <= shrinkage <= 1:
        raise ValueError(f'shrinkage is {shrinkage!r}: give "oas", None, or a share between 0 and 1.')


@dataclass(frozen=True)
class Spread:
    """Mean and second moments as the methods need them, all float64."""

    mean: Tensor  # `(d,)` of x; it stays in place.
    shares: Tensor  # `(k,)` mean of the concept; the shares of the classes for class ids.
    # Covariance `(d, d)`, with 0 on the diagonal for constant features; it decides what "as little as possible"
    # means.
    sigma: PackedGram
    variance: Tensor  # `(d,)` variances of the rows the concept was read from; 0 for constant features.
    cross: Tensor  # `(d, k)` covariance of x with the concept.
    concept: Tensor  # `(k, k)` covariance of the concept.
    rows: int  # How many rows the concept was read from.
    effective_rows: float  # Rows behind `sigma`: how many of equal weight would say as much.
    resolution: float  # Machine epsilon of the coarsest rows.

    def share(self, shrinkage: str | float | None, scale: Tensor) -> float:
        """The share of the identity that is meant for `sigma`, standardised by `scale` `(d,)`.

        "oas" is the oracle approximating shrinkage of a correlation matrix: Chen, Wiesel, Eldar and Hero, "Shrinkage
        Algorithms for MMSE Covariance Estimation" (2010), equation 23, with the identity as target. Standardised
        coordinates make it free of the scale of every feature, and the result is kept in [0, 1], so the shrunk matrix
        never loses positive definiteness. Rows of weights `w` count as `(Σ w)² / Σ w²`.
        """
        if shrinkage != "oas":
            return float(shrinkage or 0.0)
        mean_square = self.sigma.mean_square(scale)
        excess = (self.effective_rows + 1) * (mean_square - 1 / self.sigma.dim)
        return min(1.0, (mean_square + 1) / excess) if excess > 0 else 1.0

    def beside(self, background: Spread, share: float) -> Spread:
        """With Σ and mean of what should stay as it is: a share of the background's, and the rest its own."""
        device = self.variance.device
        sigma = torch.lerp(self.sigma.values, background.sigma.values.to(device), share)
        return replace(
            self,
            mean=torch.lerp(self.mean, background.mean.to(device), share),
            sigma=PackedGram(self.sigma.dim, device, sigma),
            # Estimates from different rows: their variances add.
            effective_rows=1 / (share**2 / background.effective_rows + (1 - share) ** 2 / self.effective_rows),
            resolution=max(self.resolution, background.resolution),
        )

    def root(self) -> Tensor:
        """`(d, r)` columns C with `C Cᵀ = Σ`, without directions whose variance cannot be told from rounding.

        What rounds a covariance by ε rounds its root by √ε, and whitening would make that look like a direction of its
        own.
        """
        deviation = self.variance.sqrt()
        scale = torch.where(deviation > 0, 1 / deviation, 0.0)
        values, vectors = torch.linalg.eigh(self.sigma.dense() * scale * scale[:, None])
        kept = values > variance_floor(self.resolution) * len(values) * values[-1].clamp_min(0)
        return deviation[:, None] * vectors[:, kept] * values[kept].sqrt()

    def change(self, eraser: Eraser) -> float:
        """`sqrt(E|r(x) − x|² / E|x − E x|²)` for the eraser r."""
        total = float(self.variance.sum())
        if total <= 0.0:
            raise ValueError(f"x does not vary over the {self.rows} rows of moments: a relative change is undefined.")
        left, right = (part.to(self.mean) for part in (eraser.left, eraser.right))
        shift = right @ (self.mean if eraser.bias is None else self.mean - eraser.bias.to(self.mean))
        second = self.sigma.quadratic(right) + torch.outer(shift, shift)
        return max(0.0, float(((left.T @ left) * second).sum()) / total) ** 0.5


@dataclass(frozen=True)
class Factor:
    """`upperᵀ · upper ≈ scale · Σ · scale`, shrunk."""

    upper: Tensor  # `(d, d)` float64 Cholesky factor of the shrunk correlation matrix.
    scale: Tensor  # `(d,)` float64, one over the standard deviations; 0 for features that never vary.

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
    return independent(spread.cross @ whiten_concept(spread.concept), spread)


def independent(columns: Tensor, spread: Spread) -> Tensor:
    """`(d, r)` independent columns with the span of some, without what is rounding beside the standard deviations."""
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
# Each takes `columns`, `(d, r)` float64 covariances of x with r concept directions, linearly independent, and the most
# directions to keep, None for all. It returns `left` `(d, rank)` and `right` `(rank, d)`, with `right @ left` the
# identity.

# Further columns `(d, m)`, and how many of their directions are erased at most; None for all.
Beside = Sequence[tuple[Tensor, int | None]]


def leace_factors(
    columns: Tensor, factor: Factor, rank: int | None, beside: Beside = (), resolution: float = EXACT
) -> tuple[Tensor, Tensor]:
    """LEACE: the smallest linear change of x, in the least-squares sense, that leaves no covariance with the concept.

    With `A` the covariances of x with the concept and `S Σ S = Cᵀ C`, the projection `W⁺ (W A)(W A)⁺ W`, `W = Σ^{-½}`,
    of arXiv 2306.03819 (Theorem 4.2) is `left · right` with `U τ Vᵀ = C⁻ᵀ S A`, `left = A V / τ` and
    `right = Uᵀ C⁻ᵀ S`. It needs one Cholesky factorisation and no d × d eigenvectors. `left` lies in the span of A
    whatever Σ is, so an inexact Σ costs optimality and never the guarantee. Directions of the largest canonical
    correlations are kept first.
    """
    basis, strength, mixing = torch.linalg.svd(factor.whiten(columns), full_matrices=False)
    basis, strength, mixing = basis[:, :rank], strength[:rank], mixing[:rank]
    left = columns @ mixing.T / strength
    left, basis = with_others(left, basis, beside, resolution, factor.whiten)
    right = factor.readings(basis)
    # The triangular solves lose digits where features are nearly collinear. One correction makes right · left the
    # identity again, and with it the projection exact.
    return left, torch.linalg.solve(right @ left, right)


def with_others(
    left: Tensor,
    basis: Tensor,
    beside: Beside,
    resolution: float,
    whiten: Callable[[Tensor], Tensor] = lambda columns: columns,
) -> tuple[Tensor, Tensor]:
    """Directions to erase, and the same whitened, with those of further columns behind them.

    Of each group the strongest, in the whitened metric, of what all directions before it leave of the group.
    """
    for columns, most in beside:
        whitened = whiten(columns)
        rest, scale = whitened, float(torch.linalg.matrix_norm(whitened, 2)) if whitened.numel() else 0.0
        for _ in range(2):  # once more, for what rounding left of the basis
            rest = rest - basis @ (basis.T @ rest)
        own, strength, mixing = torch.linalg.svd(rest, full_matrices=False)
        # What lies in the span of those before is left as rounding, which whitening multiplies.
        least = scale * (_SPANNED if resolution <= EXACT else _SPANNED_BY_FLOATS)
        count = int((strength[:most] > least).sum())
        own, strength, mixing = own[:, :count], strength[:count], mixing[:count]
        own_left = (columns @ mixing.T - left @ (basis.T @ (whitened @ mixing.T))) / strength
        left, basis = torch.cat([left, own_left], 1), torch.cat([basis, own], 1)
    return left, basis


def orth_factors(columns: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The orthogonal projection away from the span of `columns`.

    It is LEACE with Σ = I, known as spectral attribute removal (SAL, arXiv 2203.07893) when all directions are kept:
    the same guarantee, with a larger change of the activations, and a symmetric projection. Directions of the largest
    covariance are kept first.
    """
    basis = torch.linalg.svd(columns, full_matrices=False)[0][:, :rank]
    return basis, basis.T


def mean_projection_factors(columns: Tensor, cross: Tensor, shares: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The orthogonal projection away from the span of `μ_c − μ`, the differences of the class means.

    Haghighatkhah, Fokkens, Sommerauer, Speckmann and Verbeek, "Better Hit the Nail on the Head than Beat around the
    Bush: Removing Protected Attributes with a Single Projection" (2022). For class ids the covariance `cross` of x with
    the indicator of class c is `p_c (μ_c − μ)`, so that all directions together are those of `orth` (SAL): the two
    methods are the same map. They differ where the rank is capped, as here every class with a share counts alike.
    Directions in which the class means lie farthest apart are kept first.
    """
    present = shares > 0
    differences = cross[:, present] / shares[present]
    span = torch.linalg.svd(columns, full_matrices=False)[0]
    basis = span @ torch.linalg.svd(span.T @ differences, full_matrices=False)[0]
    basis = basis[:, :rank]
    return basis, basis.T


# ---- the mean --------------------------------------------------------------------------------------------------------


class MeanIsErased(ValueError):
    """The mean lies in the span of what is erased, so that no linear map keeps it."""


def eraser_about(
    left: Tensor,
    right: Tensor,
    spread: Spread,
    *,
    affine: bool,
    keep_mean: bool,
    factor: Factor | None = None,
    kept: Tensor | None = None,
) -> Eraser:
    """The eraser that subtracts along `left`, and does with the mean, and with what is `kept`, what was asked for.

    A linear map `P = I − left · right` keeps the mean where `right · μ = 0`, and covariances `(d, m)` with something
    else where it reads none of these (SPLINCE, arXiv 2506.10703). Of all P with `P · left = 0` and `P h = h` for each h
    that is held it takes the one that changes x least in the metric of Σ, or of the identity without a factor: its
    readings are, whitened, those of `left` among the directions orthogonal to the whitened h. For the mean, with the
    methods' Σ, it is LEACE with the limit of `(Σ + λ μ μᵀ)⁻¹` for large λ, `Σ⁻¹ − Σ⁻¹ μ μᵀ Σ⁻¹ / (μᵀ Σ⁻¹ μ)`, in the
    place of `Σ⁻¹`. Since `left` is what it is without, so is what a linear probe can find. Features that Σ says never
    vary stay.

    Raises:
        ValueError: If an affine map is not to keep the mean, or no map can keep what is to be kept.
        MeanIsErased: If no linear map can keep the mean.
    """
    if affine and not keep_mean:
        raise ValueError(
            "keep_mean is False and affine True, but the affine part is what keeps the mean: give affine=False, or "
            "leave keep_mean out."
        )
    bias, held = spread.mean if affine else None, [] if kept is None else [independent(kept, spread)]
    if not affine and keep_mean:
        read, deviation = right @ spread.mean, spread.sigma.quadratic(right).diagonal().clamp_min(0).sqrt()
        # Of a mean that is rounding beside what varies nothing is read anyway.
        if not bool((read.abs() <= significance(spread.resolution) * deviation).all()):
            held.append(spread.mean[:, None])
    directions = torch.cat([left[:, :0], *held], 1)
    if not directions.shape[1]:
        return Eraser(left, right, bias)
    basis, whitened = (left, directions) if factor is None else (factor.whiten(left), factor.whiten(directions))
    beside, strength, mixing = torch.linalg.svd(whitened, full_matrices=False)
    count = int((strength > _SPANNED * strength[0]).sum())
    beside, directions = beside[:, :count], directions @ mixing[:count].T / strength[:count]
    for _ in range(2):  # once more, for what rounding left of the basis
        beside = beside - basis @ (basis.T @ beside)
    # The squares of the sines between what is held and the span, by which the new readings are longer: the singular
    # values of right · left in the whitened space beside the former. They are shares of variance, so their rounding is
    # that of one. Whitening multiplies errors of the rows by one over the root of the jitter of `factorise`: 7e-10 for
    # float64 and 2e-4 for float32 rows, whose squares lie below that floor.
    own, sines, _ = torch.linalg.svd(beside, full_matrices=False)
    share = float(sines.square().min())
    if share <= variance_floor(spread.resolution) and len(held) > (kept is not None):
        raise MeanIsErased(
            "affine is False, but the mean of x lies in the span of the directions that are erased (but for "
            f"{share:.0e} of its square), so that no linear map erases these and keeps it: give affine=True."
        )
    if share <= variance_floor(spread.resolution):
        raise ValueError(
            "What is to be kept lies in the span of what is erased (but for "
            f"{share:.0e} of its square), so that no map erases the one and keeps the other: the two labels say the "
            "same of these rows. Keep nothing, or give rows in which they differ."
        )
    readings = own.T if factor is None else factor.readings(own)
    reads, directions = torch.cat([right, readings]), torch.cat([left, directions], dim=1)
    # The readings that find each direction and not the others, of which those that are held are some.
    return Eraser(left, torch.linalg.solve(reads @ directions, reads)[: left.shape[1]], bias)


# ---- options -------------------------------------------------------------------------------------------------------


def check_count(name: str, value: int | None, *, least: int = 1, most: int | None = None, none: str = "") -> None:
    """Refuse what is not a whole number within the bounds; where None may be given, `none` is how a message says so."""
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}: give an int{none}.")
    if value < least or (most is not None and value > most):
        limit = "" if most is None else f", at most {most}"
        raise ValueError(f"{name} is {value}: it must be {least} or more{limit}{none}.")
