"""Everything a set of rows contributes but the covariance of x: counts, means and the covariances with the concept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .rows import Rows


@dataclass(frozen=True)
class Sums:
    """Sums over rows, centred on their own mean, all float64. Two of them merge exactly, in any order.

    Attributes:
        rows: How many rows.
        weight: Sum of their weights.
        weight_squares: Sum of the squared weights.
        mean_x: `(d,)` weighted mean.
        mean_z: `(k,)` weighted mean; shares of the classes for class ids.
        cross: `(d, k)` sum of `w (x − mean_x)(z − mean_z)ᵀ`.
        concept: `(k, k)` sum of `w (z − mean_z)(z − mean_z)ᵀ`.
        counts: `(k,)` int64 rows of each class; None once any row came with concept values instead of an id.
    """

    rows: int
    weight: float
    weight_squares: float
    mean_x: Tensor
    mean_z: Tensor
    cross: Tensor
    concept: Tensor
    counts: Tensor | None

    def merged(self, other: Sums) -> Sums:
        """The sums over both sets of rows, by the pairwise update of Chan, Golub and LeVeque (1983)."""
        weight = self.weight + other.weight
        shift_x, shift_z = other.mean_x - self.mean_x, other.mean_z - self.mean_z
        share, coupling = other.weight / weight, self.weight / weight * other.weight
        return Sums(
            rows=self.rows + other.rows,
            weight=weight,
            weight_squares=self.weight_squares + other.weight_squares,
            mean_x=self.mean_x + share * shift_x,
            mean_z=self.mean_z + share * shift_z,
            cross=self.cross + other.cross + coupling * torch.outer(shift_x, shift_z),
            concept=self.concept + other.concept + coupling * torch.outer(shift_z, shift_z),
            counts=None if self.counts is None or other.counts is None else self.counts + other.counts,
        )

    def to(self, device: torch.device) -> Sums:
        """The same sums on another device."""
        return replace(
            self,
            mean_x=self.mean_x.to(device),
            mean_z=self.mean_z.to(device),
            cross=self.cross.to(device),
            concept=self.concept.to(device),
            counts=None if self.counts is None else self.counts.to(device),
        )


def sum_rows(rows: Rows, z_dim: int, device: torch.device) -> Sums:
    """Read the counted rows once, in float64, a chunk at a time.

    Raises:
        ValueError: If a counted row of x is not finite.
    """
    ids, values, weight = (None if t is None else t.to(device) for t in (rows.ids, rows.values, rows.weight))
    total = float(rows.count) if weight is None else float(weight.sum())
    squares = float(rows.count) if weight is None else float(weight.square().sum())
    mean_z, concept, counts = _sum_concept(ids, values, weight, total, z_dim, device)
    centred = None if values is None else values - mean_z
    if centred is not None and weight is not None:
        centred = centred * weight[:, None]
    pivot, sums, cross = _sum_x(rows, ids, centred, weight, z_dim, device)
    shift = sums.sum(0) / total
    if not bool(torch.isfinite(shift).all()):
        _reject(rows)
    if centred is None:
        # Class sums are not centred yet: every class holds its share of the mean.
        cross = (sums - total * mean_z[:, None] * shift).T if z_dim else sums.new_zeros(sums.shape[1], 0)
    return Sums(rows.count, total, squares, pivot + shift, mean_z, cross.contiguous(), concept, counts)


def _sum_concept(
    ids: Tensor | None, values: Tensor | None, weight: Tensor | None, total: float, z_dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean, centred second moments and class counts of z."""
    if ids is not None:
        counts = torch.bincount(ids, minlength=z_dim)
        sums = counts.double() if weight is None else torch.bincount(ids, weight, minlength=z_dim)
        return sums / total, torch.diag(sums) - torch.outer(sums, sums) / total, counts
    if values is None:
        empty = torch.zeros(z_dim, dtype=torch.float64, device=device)
        return empty, torch.diag(empty), None
    weighted = values if weight is None else values * weight[:, None]
    mean = weighted.sum(0) / total
    centred = values - mean
    scaled = centred if weight is None else centred * weight[:, None]
    return mean, centred.T @ scaled, None


def _sum_x(
    rows: Rows,
    ids: Tensor | None,
    centred: Tensor | None,
    weight: Tensor | None,
    z_dim: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pivot, the weighted sums of `x − pivot` (by class for class ids) and, for values, `(d, k)` with z."""
    width = rows.x.shape[1]
    chunk = 256 if device.type == "cpu" else 2048  # stays in the cache on CPU; is worth a launch elsewhere
    buffer = torch.empty(min(chunk, rows.count), width, dtype=torch.float64, device=device)
    sums = torch.zeros(1 if ids is None else z_dim, width, dtype=torch.float64, device=device)
    cross = torch.zeros(width, z_dim, dtype=torch.float64, device=device)
    # Sums of what is near zero keep their digits, and the first rows are near enough. Numbers of 24 bits need none of
    # that: float64 adds millions of them without rounding.
    far = rows.x.dtype == torch.float64
    pivot = torch.zeros(width, dtype=torch.float64, device=device)
    for start in range(0, rows.count, chunk):
        part = slice(start, min(start + chunk, rows.count))
        x = buffer[: part.stop - start].copy_(rows.chunk(start, part.stop))
        if far:
            pivot = x.mean(0) if start == 0 else pivot
            x -= pivot
        if centred is not None:
            cross.addmm_(x.T, centred[part])
        if weight is not None:
            x *= weight[part, None]
        if ids is None:
            sums[0] += x.sum(0)
        else:
            sums.index_add_(0, ids[part], x)
    return pivot, sums, cross


def _reject(rows: Rows) -> None:
    """Raise the error that says where x is not finite."""
    chunk = 1024
    wrong, first = 0, ""
    for start in range(0, rows.count, chunk):
        bad = ~torch.isfinite(rows.chunk(start, min(start + chunk, rows.count)))
        if not wrong and bool(bad.any()):
            row, feature = (int(i) for i in bad.nonzero()[0])
            row = start + row if rows.index is None else int(rows.index[start + row])
            first = f"row {row} (leading dimensions flattened), feature {feature}"
        wrong += int(bad.any(dim=1).sum())
    if not wrong:
        raise ValueError("x holds numbers whose sum overflows float64: scale the activations down.")
    raise ValueError(
        f"x is not finite in {wrong} of {rows.count} counted rows, the first at {first}: leave such rows out with "
        "mask=, or find out where the model overflows. The statistics are unchanged."
    )
