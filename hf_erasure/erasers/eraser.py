"""An eraser, an affine map of activations: how it is applied, and which directions each method subtracts and reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .statistics import PackedGram

EXACT = torch.finfo(torch.float64).eps
"""The resolution of moments that were gathered from float64 rows only."""

METHODS = ("leace", "orth", "mean_projection", "inlp")
"""Methods that are solved from moments. SAL is "orth"; R-LACE needs rows: `Eraser.fit`."""

# A column is in the span of others if at most this share of its length lies outside: whitening multiplies the rounding
# of rows, 1e-16 in float64 and 6e-8 in float32, by up to 3e6 and 3e3 (see `factorise`).
_SPANNED, _SPANNED_BY_FLOATS = 1e-8, 1e-3
# How an eraser is fitted on one batch: "moments" → from its moments, a method → on the rows themselves. The files that
# define these functions need the class `Eraser`, and add them here.
FITS: dict[str, Callable[..., Eraser]] = {}


@dataclass(frozen=True, eq=False)
class Eraser:
    """The map `x ↦ x − left · right · (x − bias)` (arXiv 2306.03819, Theorem 4.3).

    The tensors are copies: later changes of the moments do not change an eraser.

    Attributes:
        left: `(x_dim, rank)` float64, the directions that are subtracted.
        right: `(rank, x_dim)` float64, the readings of the concept; `right @ left` is the identity.
        bias: `(x_dim,)` float64, the mean, which stays in place; None for a map without an affine part.
        x_dim: Width of the activations.
        rank: The number of directions that are removed.
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
        # A copy made outside inference mode may become a buffer that is later changed in place. It is contiguous, as
        # after loading: with other strides, as a solver leaves them, matrix products may sum in another order.
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
            **options: The options of `ConceptMoments.eraser`; those of `fit_inlp` for "inlp", of `fit_rlace` for
                "rlace". `probe="least_squares"` with "inlp" takes the rounds from the moments, as
                `ConceptMoments.eraser` does; the default is `probe="logistic"`.

        Raises:
            TypeError: If `x` or `z` is not a tensor of numbers.
            ValueError: For the reasons of `ConceptMoments.update` and `ConceptMoments.eraser`.
        """
        # Only INLP has a probe that can be solved from moments.
        probe = options.pop("probe", "logistic") if method == "inlp" else "logistic"
        if probe not in ("logistic", "least_squares"):
            raise ValueError(f"probe is {probe!r}: it must be one of 'logistic', 'least_squares'.")
        if method == "rlace" or (method == "inlp" and probe == "logistic"):
            return FITS[method](x, z, weight=weight, mask=mask, **options)
        return FITS["moments"](x, z, weight=weight, mask=mask, method=method, **options)

    def __call__(self, x: Tensor) -> Tensor:
        """Erase the concept from `x` `(…, x_dim)`, on its device, in float32, or in float64 for a float64 `x`."""
        bias = None if self.bias is None else self.bias.to(x.device)
        return apply_erasure(x, self.left.to(x.device), self.right.to(x.device), bias)

    def parts(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """`left`, `right` and `bias` as an adapter stores them: the bias of a linear eraser is zero."""
        bias = self.left.new_zeros(self.x_dim) if self.bias is None else self.bias
        return self.left.to(device, dtype), self.right.to(device, dtype), bias.to(device, dtype)

    @property
    def matrix(self) -> Tensor:
        """The linear part `I − left · right`, `(x_dim, x_dim)`."""
        identity = torch.eye(self.x_dim, dtype=self.left.dtype, device=self.left.device)
        return identity - self.left @ self.right

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Eraser:
        """A copy on another device or in another dtype."""
        bias = None if self.bias is None else self.bias.to(device=device, dtype=dtype)
        return Eraser(self.left.to(device=device, dtype=dtype), self.right.to(device=device, dtype=dtype), bias)


def apply_erasure(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, axis: int = -1) -> Tensor:
    """Return `x − left · right · (x − bias)` for every row of `x` (arXiv 2306.03819, Theorem 4.3).

    The arithmetic runs in float32, or in float64 for a float64 `x`, also under autocast; the result has the dtype of
    `x`. The code does not branch on values, so it compiles into one graph, differentiates and vectorises.

    Args:
        x: `(…, d)` activations of any floating dtype.
        left: `(d, rank)` directions that are subtracted.
        right: `(rank, d)` readings: how much of each direction is subtracted.
        bias: `(d,)` centre that the map leaves in place, or None for a linear map.
        axis: The axis of the features, by default the last.

    Returns:
        `(…, d)` in the dtype of `x`; `x` itself when the rank is 0.

    Raises:
        TypeError: If `x` does not hold floating-point numbers.
        ValueError: If the width of `x` is not that of the eraser.
    """
    if axis != -1:
        return apply_erasure(x.movedim(axis, -1), left, right, bias).movedim(-1, axis)
    width, rank = left.shape
    if not x.dtype.is_floating_point or x.shape[-1:] != (width,):  # a hot path: the call is made only to raise
        check_activations(x, width)
    if rank == 0:
        return x
    dtype, device = torch.promote_types(x.dtype, torch.float32), x.device.type
    # Devices without autocast (meta) refuse the context altogether.
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        rows = x.to(dtype).reshape(-1, width)
        left, right = left.to(dtype), right.to(dtype)
        # right · (x − bias) = right · x − right · bias saves a pass over x. If the mean is far from zero, the
        # difference is one of large numbers, so the constant is computed in float64.
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
    """Raise an error if an eraser of this width cannot act on `x`."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        kind = f"has dtype {x.dtype}" if isinstance(x, Tensor) else f"is {type(x).__name__}"
        raise TypeError(f"x {kind}: an eraser acts on floating-point activations; call x.float() first.")
    if x.shape[-1:] != (width,):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but the eraser acts on a last dimension of {width}: apply it to the "
            "activations it was fitted on."
        )


# ---- rounding and shrinkage ------------------------------------------------------------------------------------------


def significance(resolution: float) -> float:
    """The length below which a row of correlations with the concept is rounding: 1e-12 for float64 rows, else 1e-6.

    Sampling noise lies far above it: to tell a correlation of 1e-6 from chance would take 10¹² rows.
    """
    return 1e-12 if resolution <= EXACT else 1e-6


def variance_floor(resolution: float) -> float:
    """The share of a combination's variance that cannot be told from zero.

    It is the variance of `Σ uᵢ xᵢ` relative to `Σ uᵢ² var(xᵢ)`. A float32 product rounds each entry of a correlation
    matrix by about 6e-8, and so its spectrum by about 1e-6 at the widths of language models. Float64 rounds by 1e-15;
    the floor is a hundred times as large.
    """
    return 1e-13 if resolution <= EXACT else 1e-6


def check_shrinkage(shrinkage: str | float | None) -> None:
    """Raise a `ValueError` unless `shrinkage` is "oas", None, or a share from 0 to 1."""
    if shrinkage is None or shrinkage == "oas":
        return
    if isinstance(shrinkage, bool) or not isinstance(shrinkage, (int, float)) or not 0 <= shrinkage <= 1:
        raise ValueError(f'shrinkage is {shrinkage!r}: give "oas", None, or a share between 0 and 1.')


@dataclass(frozen=True)
class Spread:
    """Mean and second moments as the methods need them, all float64."""

    mean: Tensor  # `(d,)` mean of x, which stays in place.
    shares: Tensor  # `(k,)` mean of the concept; the shares of the classes for class ids.
    # Covariance `(d, d)`, with 0 on the diagonal for constant features; it decides what "as little as possible"
    # means.
    sigma: PackedGram
    variance: Tensor  # `(d,)` variances of the labelled rows; 0 for constant features.
    cross: Tensor  # `(d, k)` covariance of x with the concept; 0 for constant features.
    concept: Tensor  # `(k, k)` covariance of the concept.
    rows: int  # The number of labelled rows.
    effective_rows: float  # The number of rows of equal weight that would estimate `sigma` as well.
    resolution: float  # The largest machine epsilon of the dtypes of the rows.

    def share(self, shrinkage: str | float | None, scale: Tensor) -> float:
        """The share of the identity for shrinking `sigma`, standardised by `scale` `(d,)`.

        "oas" is the oracle approximating shrinkage of a correlation matrix: Chen, Wiesel, Eldar and Hero, "Shrinkage
        Algorithms for MMSE Covariance Estimation" (2010), equation 23 without its terms 2/d, as in scikit-learn.
        Standardised coordinates make it free of the scale of features. It is kept in [0, 1], so the shrunk matrix never
        loses positive definiteness. Rows of weights `w` count as `(Σ w)² / Σ w²`.
        """
        if shrinkage != "oas":
            return float(shrinkage or 0.0)
        squares = 0.0  # of all d² entries: those above the diagonal count twice
        for start, _, column in self.sigma.standardised(scale):
            squares += 2 * float(torch.linalg.vector_norm(column[:start])) ** 2
            squares += float(torch.linalg.vector_norm(column[start:])) ** 2
        mean_square = squares / self.sigma.dim**2
        excess = (self.effective_rows + 1) * (mean_square - 1 / self.sigma.dim)
        return min(1.0, (mean_square + 1) / excess) if excess > 0 else 1.0

    def floored(self, variance: Tensor) -> Tensor:
        """Variances of at least 1e-30 of the largest: the square of a feature that is 10¹⁵ times as small is lost.

        Trained norms switch features off by weights such as 1e-33, whose squares underflow. The scale of such a feature
        is then unknown; any positive one keeps the guarantee, and costs optimality only in a feature of negligible
        size. A feature without a variance and without a covariance with the concept is constant, and keeps 0.
        """
        return torch.where((variance > 0) | self.cross.any(1), variance.clamp_min(1e-30 * float(variance.max())), 0.0)

    def with_background(self, background: Spread, share: float) -> Spread:
        """A copy whose Σ and mean are mixed: `share` of the background's, which should not change, the rest its own."""
        device = self.variance.device
        sigma = torch.lerp(self.sigma.values, background.sigma.values.to(device), share)
        return replace(
            self,
            mean=torch.lerp(self.mean, background.mean.to(device), share),
            sigma=PackedGram(self.sigma.dim, device, sigma),
            # The two estimates are from different rows, so their variances add.
            effective_rows=1 / (share**2 / background.effective_rows + (1 - share) ** 2 / self.effective_rows),
            resolution=max(self.resolution, background.resolution),
        )

    def root(self) -> Tensor:
        """`(d, r)` columns C with `C Cᵀ = Σ`, without directions whose variance cannot be told from rounding.

        An error of ε in a covariance is one of √ε in its root, and whitening would make it look like a direction of its
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
    """A factor of the shrunk covariance: `upperᵀ · upper ≈ scale · Σ · scale`."""

    upper: Tensor  # `(d, d)` float64 Cholesky factor of the shrunk correlation matrix.
    scale: Tensor  # `(d,)` float64, one over the standard deviations; 0 for features that never vary.

    def whiten(self, columns: Tensor) -> Tensor:
        """`(d, r)` covariances with x, whitened: `upper⁻ᵀ · scale · columns`."""
        return torch.linalg.solve_triangular(self.upper.mT, self.scale[:, None] * columns, upper=False)

    def readings(self, whitened: Tensor) -> Tensor:
        """The linear forms on x, `(r, d)`, that read the whitened directions `(d, r)`."""
        return (torch.linalg.solve_triangular(self.upper, whitened, upper=True) * self.scale[:, None]).T


def factorise(spread: Spread, shrinkage: str | float | None) -> Factor:
    """Shrink and factor a covariance in standardised coordinates.

    `upperᵀ · upper = (1 − share) · standardised + (share + jitter) · I`. The jitter grows by factors of ten until the
    factorisation succeeds. The guarantee of the methods holds for any positive definite matrix in place of Σ, so a
    jitter costs optimality only.
    """
    check_shrinkage(shrinkage)
    # The jitter is added to the diagonal of the correlation matrix, whose variances are 1.
    jitter, sigma = 1e-13 if spread.resolution <= EXACT else 1e-7, spread.sigma
    # A feature that is constant in a background still needs a scale, and gets one from the rows of the concept. A
    # feature that is constant in both gets the scale 0: it is neither read nor changed.
    labelled = spread.floored(spread.variance)
    diagonal = spread.floored(torch.maximum(sigma.values[sigma.diagonal], jitter * labelled))
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    share = spread.share(shrinkage, scale)
    full = sigma.values.new_empty(sigma.dim, sigma.dim)
    # The transpose has the memory layout of LAPACK and is factored in place, without a copy or a second matrix.
    upper, info = full.mT, torch.zeros((), dtype=torch.int32, device=full.device)
    while jitter <= 10:
        full.zero_()
        for start, stop, column in sigma.standardised(scale):
            full[start:stop, :stop] = column.mul_(1 - share).T
        full.diagonal().add_(share + jitter)
        torch.linalg.cholesky_ex(upper, upper=True, out=(upper, info))
        if int(info) == 0:
            return Factor(upper, scale)
        jitter *= 10
    raise ValueError("The covariance of x is not finite, so it cannot be factored: scale the activations down.")


def whiten_concept(covariance: Tensor) -> Tensor:
    """The `(k, r)` float64 matrix that whitens z; r is the number of dimensions in which z varies.

    Every column is scaled to variance 1 first, so a class of probability 1e-6 lies as far from the cut-off as a common
    one. One-hot columns add up to one, so k classes vary in k − 1 dimensions.
    """
    variance = covariance.diagonal().clamp_min(0.0)
    scale = torch.where(variance > 0, variance, 1.0).rsqrt() * (variance > 0)
    values, vectors = torch.linalg.eigh(covariance * scale * scale[:, None])
    # A combination of z whose variance is 1e-12 of the largest is rounding.
    keep = values > 1e-12 * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    return scale[:, None] * vectors[:, keep] * values[keep].rsqrt()


def concept_columns(spread: Spread) -> Tensor:
    """The `(d, r)` covariances of x with the independent directions of the concept that x carries.

    z is whitened and x is standardised, so the cut-off (`significance`) is relative to both: it compares the length of
    a vector of correlations with 1. Canonical correlations are not compared: they are all 1 if there are fewer rows
    than features, and may not be correlations if Σ comes from a background.
    """
    return independent(spread.cross @ whiten_concept(spread.concept), spread)


def independent(columns: Tensor, spread: Spread) -> Tensor:
    """Independent columns `(d, r)` with the span of `columns`, without what is rounding next to x's deviations."""
    variance = spread.floored(spread.variance)
    varies = variance > 0
    columns = torch.where(varies[:, None], columns, 0.0)
    if columns.shape[1] == 0:
        return columns
    standardised = columns * torch.where(varies, variance, 1.0).rsqrt()[:, None]
    _, strength, directions = torch.linalg.svd(standardised, full_matrices=False)
    keep = strength > significance(spread.resolution) * strength[0].clamp_min(1.0)
    return columns @ directions[keep].T


# ---- methods that are one projection ---------------------------------------------------------------------------------
# Each function takes `columns`, `(d, r)` float64 covariances of x with r concept directions, linearly independent, and
# the largest number of directions, None for all. It returns `left` `(d, rank)` and `right` `(rank, d)`; `right @ left`
# is the identity.

# Pairs of further columns `(d, m)` and the largest number of their directions to erase; None for all.
Beside = Sequence[tuple[Tensor, int | None]]


def leace_factors(
    columns: Tensor, factor: Factor, rank: int | None, beside: Beside = (), resolution: float = EXACT
) -> tuple[Tensor, Tensor]:
    """LEACE: the smallest linear change of x, in the least-squares sense, that leaves no covariance with the concept.

    With `A` the covariances of x with the concept and `S Σ S = Cᵀ C`, the projection `W⁺ (W A)(W A)⁺ W`, `W = Σ^{-½}`,
    of arXiv 2306.03819 (Theorem 4.2) is `left · right` with `U τ Vᵀ = C⁻ᵀ S A`, `left = A V / τ` and
    `right = Uᵀ C⁻ᵀ S`. It needs one Cholesky factorisation and no d × d eigenvectors. `left` lies in the span of A for
    any Σ, so an inexact Σ costs optimality and never the guarantee. Directions of the largest canonical correlations
    are kept first.
    """
    basis, strength, mixing = torch.linalg.svd(factor.whiten(columns), full_matrices=False)
    basis, strength, mixing = basis[:, :rank], strength[:rank], mixing[:rank]
    left = columns @ mixing.T / strength
    if beside:
        left, basis = append_directions(left, basis, beside, resolution, factor.whiten)
    right = factor.readings(basis)
    # The triangular solves lose digits if features are nearly collinear. One correction makes right · left the
    # identity again, and so the projection exact.
    return left, torch.linalg.solve(right @ left, right)


def append_directions(
    left: Tensor,
    basis: Tensor,
    beside: Beside,
    resolution: float,
    whiten: Callable[[Tensor], Tensor] = lambda columns: columns,
) -> tuple[Tensor, Tensor]:
    """Append directions of further columns to the directions to erase, `left`, and to the same whitened, `basis`.

    Each group of columns adds its strongest directions, in the whitened metric, without their part along earlier ones.
    """
    for columns, most in beside:
        whitened = whiten(columns)
        rest, scale = whitened, float(torch.linalg.matrix_norm(whitened, 2)) if whitened.numel() else 0.0
        for _ in range(2):  # the second time removes what rounding left of the basis
            rest = rest - basis @ (basis.T @ rest)
        own, strength, mixing = torch.linalg.svd(rest, full_matrices=False)
        # A direction in the span of those before leaves rounding only, which whitening multiplies.
        least = scale * (_SPANNED if resolution <= EXACT else _SPANNED_BY_FLOATS)
        count = int((strength[:most] > least).sum())
        own, strength, mixing = own[:, :count], strength[:count], mixing[:count]
        own_left = (columns @ mixing.T - left @ (basis.T @ (whitened @ mixing.T))) / strength
        left, basis = torch.cat([left, own_left], 1), torch.cat([basis, own], 1)
    return left, basis


def orth_factors(columns: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The orthogonal projection away from the span of `columns`.

    It is LEACE with Σ = I, and is known as spectral attribute removal (SAL, arXiv 2203.07893) if all directions are
    kept. It has the same guarantee, changes the activations more, and is a symmetric projection. Directions of the
    largest covariance are kept first.
    """
    basis = torch.linalg.svd(columns, full_matrices=False)[0][:, :rank]
    return basis, basis.T


def mean_projection_factors(columns: Tensor, cross: Tensor, shares: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The orthogonal projection away from the span of `μ_c − μ`, the differences of the class means.

    Haghighatkhah, Fokkens, Sommerauer, Speckmann and Verbeek, "Better Hit the Nail on the Head than Beat around the
    Bush: Removing Protected Attributes with a Single Projection" (2022). For class ids the covariance `cross` of x with
    the indicator of class c is `p_c (μ_c − μ)`, so all directions together span the same space as those of `orth`
    (SAL): the two methods are the same map. They differ if the rank is capped, since here every class that occurs has
    the same weight. Directions in which the class means lie farthest apart are kept first.
    """
    present = shares > 0
    differences = cross[:, present] / shares[present]
    span = torch.linalg.svd(columns, full_matrices=False)[0]
    basis = span @ torch.linalg.svd(span.T @ differences, full_matrices=False)[0]
    basis = basis[:, :rank]
    return basis, basis.T


# ---- the mean --------------------------------------------------------------------------------------------------------


class MeanIsErased(ValueError):
    """Raised if the mean lies in the span of the erased directions, so that no linear map keeps it."""


def constrained_eraser(
    left: Tensor,
    right: Tensor,
    spread: Spread,
    *,
    affine: bool,
    keep_mean: bool,
    factor: Factor | None = None,
    kept: Tensor | None = None,
) -> Eraser:
    """The eraser that subtracts along `left`, and keeps the mean (`affine`, `keep_mean`) and the columns `kept`.

    A linear map `P = I − left · right` keeps the mean if `right · μ = 0`, and keeps covariances `(d, m)` of x with
    another label if it reads none of them (SPLINCE, arXiv 2506.10703). Of all P with `P · left = 0` and `P h = h` for
    each h that is held, this is the map that changes x least in the metric of Σ, or of the identity without a factor:
    its whitened readings are those of `left` among the directions orthogonal to the whitened h. For the mean, with the
    methods' Σ, it is LEACE with the limit of `(Σ + λ μ μᵀ)⁻¹` for large λ, `Σ⁻¹ − Σ⁻¹ μ μᵀ Σ⁻¹ / (μᵀ Σ⁻¹ μ)`, in
    place of `Σ⁻¹`. `left` is the same with and without held directions, so a linear probe finds the same. Features with
    a variance of 0 in Σ do not change.

    Raises:
        ValueError: If an affine map should not keep the mean, or no map can keep the columns `kept`.
        MeanIsErased: If no linear map can keep the mean.
    """
    if affine and not keep_mean:
        raise ValueError(
            "keep_mean is False and affine is True, but the affine part keeps the mean: give affine=False, or leave "
            "keep_mean out."
        )
    bias, constraints = spread.mean if affine else None, [] if kept is None else [independent(kept, spread)]
    if not affine and keep_mean:
        read, deviation = right @ spread.mean, spread.sigma.quadratic(right).diagonal().clamp_min(0).sqrt()
        # If the readings of the mean are rounding next to their deviations, the map keeps the mean anyway.
        if not bool((read.abs() <= significance(spread.resolution) * deviation).all()):
            constraints.append(spread.mean[:, None])
    directions = torch.cat([left[:, :0], *constraints], 1)
    if not directions.shape[1]:
        return Eraser(left, right, bias)
    basis, whitened = (left, directions) if factor is None else (factor.whiten(left), factor.whiten(directions))
    kept_basis, strength, mixing = torch.linalg.svd(whitened, full_matrices=False)
    count = int((strength > _SPANNED * strength[0]).sum())
    kept_basis, directions = kept_basis[:, :count], directions @ mixing[:count].T / strength[:count]
    for _ in range(2):  # the second time removes what rounding left of the basis
        kept_basis = kept_basis - basis @ (basis.T @ kept_basis)
    # The sines of the angles between the held directions and the erased span: the new singular values of right · left
    # in the whitened space, and the new readings are longer by one over them. Their squares are shares of variance, and
    # are rounded like one. Whitening multiplies errors of the rows by one over the root of the jitter of `factorise`:
    # to 7e-10 for float64 and 2e-4 for float32 rows, whose squares lie below `variance_floor`.
    own, sines, _ = torch.linalg.svd(kept_basis, full_matrices=False)
    share = float(sines.square().min())
    if share <= variance_floor(spread.resolution) and len(constraints) > (kept is not None):
        raise MeanIsErased(
            "affine is False, but the mean of x lies in the span of the erased directions (except for "
            f"{share:.0e} of its square), so no linear map erases them and keeps it: give affine=True."
        )
    if share <= variance_floor(spread.resolution):
        raise ValueError(
            "The label to keep lies in the span of the erased directions (except for "
            f"{share:.0e} of its square), so no map erases the one and keeps the other: the two labels say the "
            "same about these rows. Keep nothing, or give rows in which they differ."
        )
    readings = own.T if factor is None else factor.readings(own)
    reads, directions = torch.cat([right, readings]), torch.cat([left, directions], dim=1)
    # The readings that find each erased direction, and none of the other erased or held directions.
    return Eraser(left, torch.linalg.solve(reads @ directions, reads)[: left.shape[1]], bias)


# ---- options -------------------------------------------------------------------------------------------------------


def check_count(name: str, value: int | None, *, least: int = 1, most: int | None = None, none: str = "") -> None:
    """Raise an error for a value that is not an int within the bounds; `none` is the text for None if it is allowed."""
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}: give an int{none}.")
    if value < least or (most is not None and value > most):
        limit = "" if most is None else f", at most {most}"
        raise ValueError(f"{name} is {value}: it must be {least} or more{limit}{none}.")
