"""The second moments of x, packed, shrunk and factored, and canonical coordinates: what the methods share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = torch.finfo(torch.float64).eps
"""Resolution of moments that saw float64 rows only."""


class PackedGram:
    """A symmetric `(dim, dim)` sum of products in float64, of which only the upper block triangle exists.

    Half the products and half the memory of a full matrix are saved: the float64 sum takes little more room than a
    full float32 matrix would. Block columns, `block` wide and as tall as the diagonal is deep, because products of
    that shape run nearly as fast as one of the whole matrix; tiles and block rows were measured to be slower.

    Attributes:
        dim: Side of the matrix.
        block: Width of a block column.
        values: float64, all block columns one after another, each row by row.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        # Measured on CPU: narrower blocks run slower, wider ones waste more below the diagonal.
        self.dim = dim
        self.block = 128 if dim <= 1024 else 256
        self._edges = [(start, min(start + self.block, dim)) for start in range(0, dim, self.block)]
        size = sum(stop * (stop - start) for start, stop in self._edges)
        self.values = torch.zeros(size, dtype=torch.float64, device=device)

    def columns(self, values: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Every block column `[:stop, start:stop]` of a matrix in this layout, as `(start, stop, view)`."""
        offset = 0
        for start, stop in self._edges:
            size = stop * (stop - start)
            yield start, stop, values[offset : offset + size].view(stop, stop - start)
            offset += size

    def products(self, rows: Tensor, out: Tensor, *, add: bool) -> None:
        """`out (+)= rowsᵀ rows` for rows `(n, dim)`, in their dtype."""
        for start, stop, column in self.columns(out):
            column.addmm_(rows[:, :stop].T, rows[:, start:stop], beta=int(add))

    def absorb(self, values: Tensor | None, vectors: Tensor, scales: Tensor) -> None:
        """Add values in this layout and `Σ scalesᵣ · vectorsᵣ vectorsᵣᵀ`.

        Args:
            values: What `products` made, in any dtype; None for no values.
            vectors: `(r, dim)` float64.
            scales: `(r,)` float64.
        """
        scaled = (vectors * scales[:, None]).T
        added = None if values is None else self.columns(values)
        for start, stop, column in self.columns(self.values):
            # One column after another: it is still in the cache for the second addition.
            if added is not None:
                column.add_(next(added)[2])
            if scaled.shape[1]:
                column.addmm_(scaled[:stop], vectors[:, start:stop])

    def like(self, values: Tensor) -> PackedGram:
        """A matrix of the same size that holds `values`."""
        other = copy.copy(self)
        other.values = values
        return other

    @property
    def diagonal(self) -> Tensor:
        """The diagonal, `(dim,)`, as a copy."""
        return torch.cat([column[start:].diagonal() for start, _, column in self.columns(self.values)])

    def set_diagonal(self, diagonal: Tensor) -> None:
        """Replace the diagonal."""
        for start, stop, column in self.columns(self.values):
            column[start:].diagonal().copy_(diagonal[start:stop])

    def standardise(self, scale: Tensor) -> None:
        """Multiply rows and columns by `scale` `(dim,)`, and write ones on the diagonal, in place."""
        for start, stop, column in self.columns(self.values):
            column.mul_(scale[start:stop]).mul_(scale[:stop, None])
            column[start:].diagonal().fill_(1.0)

    def mean_square(self) -> float:
        """Mean of the squares of all `dim²` entries."""
        total = 0.0
        for start, _, column in self.columns(self.values):
            total += 2 * float(torch.linalg.vector_norm(column[:start])) ** 2
            total += float(torch.linalg.vector_norm(column[start:])) ** 2
        return total / self.dim**2

    def quadratic(self, forms: Tensor) -> Tensor:
        """`forms · matrix · formsᵀ` for float64 `(r, dim)` forms."""
        total = forms.new_zeros(forms.shape[0], forms.shape[0])
        for start, stop, column in self.columns(self.values):
            above = forms[:, :start] @ column[:start] @ forms[:, start:stop].T
            total += above + above.T + forms[:, start:stop] @ column[start:] @ forms[:, start:stop].T
        return total

    def cholesky(self, shift: float) -> Tensor | None:
        """The upper factor `U`, `Uᵀ U = matrix + shift · I`; None if that is not positive definite."""
        full = self.values.new_zeros(self.dim, self.dim)
        for start, stop, column in self.columns(self.values):
            full[start:stop, :stop] = column.T
        full.diagonal().add_(shift)
        # The transpose lies in memory as LAPACK wants it, and is factored where it lies: no copy, no second matrix.
        upper, info = full.mT, torch.zeros((), dtype=torch.int32, device=full.device)
        torch.linalg.cholesky_ex(upper, upper=True, out=(upper, info))
        return upper if int(info) == 0 else None

    def dense(self) -> Tensor:
        """The full matrix, `(dim, dim)`, symmetric to the bit."""
        full = self.values.new_empty(self.dim, self.dim)
        for start, stop, column in self.columns(self.values):
            full[:start, start:stop] = column[:start]
            full[start:stop, :start] = column[:start].T
            # Two triangles of one product may round differently.
            full[start:stop, start:stop] = (column[start:] + column[start:].T) / 2
        return full


# ---- how exact it is -----------------------------------------------------------------------------------------------


def product_dtype(x_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the d × d products for rows of `x_dtype`: its own, but at least float32.

    Where a process has allowed matrix products below float32 (TF32, bfloat16), float64 is used instead: switching the
    process-wide setting back and forth would reach other threads.
    """
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn
    setting = getattr(getattr(backend, "matmul", backend), "fp32_precision", None)
    if setting is not None:
        is_reduced = setting in ("tf32", "bf16")
    elif device.type == "cuda":
        is_reduced = torch.backends.cuda.matmul.allow_tf32
    else:
        is_reduced = torch.get_float32_matmul_precision() == "medium"
    return torch.float64 if is_reduced or x_dtype == torch.float64 else torch.float32


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
    """Second moments of x as the methods need them.

    Attributes:
        sigma: Covariance `(d, d)`, with 0 on the diagonal for constant features; it decides what "as little as
            possible" means.
        variance: `(d,)` float64 variances of the rows the concept was read from; 0 for constant features.
        rows: Effective number of rows behind `sigma`.
        resolution: Machine epsilon of the coarsest rows.
    """

    sigma: PackedGram
    variance: Tensor
    rows: float
    resolution: float


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
    """Shrink and factor a covariance in standardised coordinates; `spread.sigma` is used up.

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
    diagonal = torch.maximum(sigma.diagonal, jitter * _trusted(spread.variance))
    diagonal = _trusted(diagonal)
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    sigma.standardise(scale)
    if shrinkage == "oas":
        shrinkage = oas_shrinkage(sigma.mean_square(), sigma.dim, spread.rows)
    share = float(shrinkage or 0.0)
    if share:
        sigma.values.mul_(1 - share)
    while jitter <= 10:
        upper = sigma.cholesky(share + jitter)
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


def concept_columns(cross: Tensor, covariance_z: Tensor, spread: Spread) -> Tensor:
    """`(d, r)` covariances of x with the independent concept directions it carries.

    z is whitened, x is standardised, so the cut-off (`significance`) is relative to both: it compares the
    length of a vector of correlations with 1. Canonical correlations are not compared, because they are all 1 when
    there are fewer rows than features, and need not be correlations when Σ comes from a background.
    """
    columns = cross @ whiten_concept(covariance_z)
    variance = _trusted(spread.variance)
    varies = variance > 0
    columns = torch.where(varies[:, None], columns, 0.0)
    if columns.shape[1] == 0:
        return columns
    standardised = columns * torch.where(varies, variance, 1.0).rsqrt()[:, None]
    _, strength, directions = torch.linalg.svd(standardised, full_matrices=False)
    keep = strength > significance(spread.resolution) * strength[0].clamp_min(1.0)
    return columns @ directions[keep].T
