"""Rows and concepts that the tests of the erasers share, and measures on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from hf_erasure.erasers import ConceptMoments


def rows(n: int, d: int, k: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Correlated features whose mean depends on the class."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(k, (n,), generator=generator)
    z[:k] = torch.arange(k)
    mixing = torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing
    x += torch.randn(k, d, generator=generator, dtype=torch.float64)[z]
    return x.to(dtype), z


def as_values(z: Tensor, k: int | None = None) -> Tensor:
    """`(n, k)` float64 concept values of class ids; values are returned as they are."""
    return one_hot(z, k or int(z.max()) + 1).double() if z.ndim == 1 else z.double()


def leak(x: Tensor, z: Tensor, reference: Tensor | None = None) -> float:
    """Largest correlation of any feature with any concept column, computed directly and in float64.

    Features are standardised by `reference` (the rows before erasure) where given, since an erased direction may keep
    so little variance that its own would be rounding.
    """
    x, values = x.double(), as_values(z)
    x, values = x - x.mean(0), values - values.mean(0)
    scale = (x if reference is None else reference.double()).std(0, correction=0)
    cross = x.T @ values / x.shape[0] / values.std(0, correction=0)
    return float((cross.abs() / scale[:, None])[scale > 0].max())


def moments_of(x: Tensor, z: Tensor, k: int | None = None) -> ConceptMoments:
    """Moments of one batch with class ids."""
    return ConceptMoments(x.shape[-1], k or int(z.max()) + 1).update(x, z)


def canonical_correlations(x: Tensor, z: Tensor) -> Tensor:
    """Canonical correlations of rows and class ids, descending: cosines of the angles between the centred columns."""
    spans = []
    for columns in (x.double(), as_values(z)):
        vectors, lengths, _ = torch.linalg.svd(columns - columns.mean(0), full_matrices=False)
        spans.append(vectors[:, lengths > 1e-9 * lengths[0]])  # erased directions, and the sum of all classes, are 0
    return torch.linalg.svdvals(spans[0].T @ spans[1])


def ols_r2(x: Tensor, z: Tensor, cutoff: float) -> float:
    """Training R² of least squares from standardised rows, without singular values below `cutoff` of the largest."""
    x, values = x.double(), as_values(z)
    x, values = x - x.mean(0), values - values.mean(0)
    scale = x.std(0, correction=0)
    x = x / torch.where(scale > 0, scale, 1.0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    explained = (u[:, s > cutoff * s[0]].T @ values).square().sum(0)
    return float((explained / values.square().sum(0)).max())
