"""Sums and centred products of rows, exactly mergeable, with their state as tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .batch_rows import Rows
from .packed_covariance import PackedGram


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


def centred_products(rows: Rows, mean: Tensor, gram: PackedGram, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Multiply the counted rows with themselves, a chunk at a time.

    Args:
        rows: The batch.
        mean: `(d,)` float64 mean of its counted rows.
        gram: The layout of the result.
        dtype: Of the products; float64 is used instead where squares leave the range of float32.

    Returns:
        `Σ w (x − c)(x − c)ᵀ` in the layout of `gram`, and `c − mean` `(d,)` float64; c is the mean rounded to `dtype`.

    Raises:
        ValueError: If squares leave the range of float64.
    """
    device = gram.values.device
    # A centred chunk takes at most 2/3 d² numbers of 4 bytes, beside as much for the products and twice as much for the
    # sums they go to. Rows that must be gathered or converted exist twice, and float64 is twice as wide.
    copied = rows.index is not None or rows.x.dtype != dtype or rows.x.device != device
    size = max(512, min(2048, gram.dim * 2 // 3)) // (2 if copied else 1) // (2 if dtype == torch.float64 else 1)
    centre = mean.to(dtype)
    root = None if rows.weight is None else rows.weight.sqrt().to(device=device, dtype=dtype)[:, None]
    out = gram.empty(dtype, device)
    buffer = torch.empty(min(size, rows.count), gram.dim, dtype=dtype, device=device)
    for start in range(0, rows.count, size):
        stop = min(start + size, rows.count)
        centred = buffer[: stop - start]
        torch.sub(rows.chunk(start, stop).to(device=device, dtype=dtype), centre, out=centred)
        if root is not None:
            centred *= root[start:stop]
        gram.products(centred, out, add=start > 0)
    largest = float(gram.like(out).diagonal.max())
    weight = rows.count if rows.weight is None else float(rows.weight.sum())
    # Squares beyond the range of float32: too large, or so small that they vanish.
    if dtype != torch.float64 and not 1e-30 * weight <= largest < float("inf"):
        del buffer, out
        return centred_products(rows, mean, gram, torch.float64)
    if not largest < float("inf"):
        raise ValueError("x holds numbers whose squares overflow float64: scale the activations down.")
    return out, centre.double() - mean


TENSORS = ("mean_x", "mean_z", "cross", "concept")


def write_state(sums: Sums, gram: PackedGram, resolution: float) -> dict[str, Tensor]:
    """Copies of everything that rows contributed."""
    state = {
        "rows": torch.tensor(sums.rows),
        "weight": torch.tensor(sums.weight, dtype=torch.float64),
        "weight_squares": torch.tensor(sums.weight_squares, dtype=torch.float64),
        "resolution": torch.tensor(resolution, dtype=torch.float64),
        "gram": gram.values.clone(),
    }
    state |= {name: getattr(sums, name).clone() for name in TENSORS}
    return state if sums.counts is None else {**state, "counts": sums.counts.clone()}


def read_state(d: dict[str, Tensor], x_dim: int, z_dim: int, gram: PackedGram) -> Sums:
    """The sums of a state, copied, once all of the state is known to be sound.

    Raises:
        ValueError: If an entry is missing, has another shape or is not finite.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "rows": (),
        "weight": (),
        "weight_squares": (),
        "resolution": (),
        "mean_x": (x_dim,),
        "mean_z": (z_dim,),
        "cross": (x_dim, z_dim),
        "concept": (z_dim, z_dim),
        "gram": tuple(gram.values.shape),
    }
    for name, shape in shapes.items():
        if name not in d:
            raise ValueError(f"The state lacks {name!r}: give what state_dict returned, whole.")
        if tuple(d[name].shape) != shape:
            raise ValueError(f"{name!r} in the state has shape {tuple(d[name].shape)}: it must be {shape}.")
        if not bool(torch.isfinite(d[name]).all()):
            raise ValueError(f"{name!r} in the state is not finite: the file is damaged; gather the moments anew.")
    mean_x, mean_z, cross, concept = (d[name].detach().double().clone() for name in TENSORS)
    scalars = int(d["rows"]), float(d["weight"]), float(d["weight_squares"])
    return Sums(*scalars, mean_x, mean_z, cross, concept, _read_counts(d, z_dim))


def _read_counts(d: dict[str, Tensor], z_dim: int) -> Tensor | None:
    if "counts" not in d:
        return None
    if tuple(d["counts"].shape) != (z_dim,):
        raise ValueError(f"'counts' in the state has shape {tuple(d['counts'].shape)}: it must be {(z_dim,)}.")
    return d["counts"].detach().clone()
