"""Checks and flattens a batch, and computes its sums and packed products, which merge exactly and save as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The class id of a row that does not count, as in `torch.nn.CrossEntropyLoss`."""


@dataclass(frozen=True)
class Rows:
    """The counted rows of one batch."""

    x: Tensor  # `(all rows, x_dim)`, counted or not, in their own dtype.
    index: Tensor | None  # `(count,)` positions of the counted rows in `x`; None if all rows count.
    count: int  # The number of counted rows.
    ids: Tensor | None  # `(count,)` int64 class ids; None if there are values.
    # `(count, z_dim)` float64 concept values, of width 0 for a background; None if there are ids.
    values: Tensor | None
    weight: Tensor  # `(count,)` float64, all positive. It is on the device for the sums, like ids and values.

    def chunk(self, start: int, stop: int) -> Tensor:
        """The counted rows `start:stop` of `x`."""
        if self.index is None:
            return self.x[start:stop]
        return self.x.index_select(0, self.index[start:stop])


def infer_dims(x: Tensor, z: Tensor, mask: Tensor | None) -> tuple[int, int]:
    """The width of `x`, and how many classes or concept values `z` holds."""
    if not isinstance(x, Tensor) or x.ndim == 0:
        raise TypeError(f"x is {type(x).__name__}: give a tensor of shape (…, x_dim).")
    if not isinstance(z, Tensor):
        raise TypeError(f"z is {type(z).__name__}: give a tensor of class ids or of concept values.")
    if z.shape == x.shape[:-1] and not z.dtype.is_floating_point:
        counted = z if mask is None else z[_as_mask(mask, z.shape, z.device)]
        return x.shape[-1], max(int(counted.max()) + 1, 1) if counted.numel() else 1
    return x.shape[-1], 1 if z.shape == x.shape[:-1] else z.shape[-1]


def read_rows(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    x_dim: int,
    z_dim: int,
    sums_device: torch.device | None = None,
) -> Rows:
    """Check a batch and select its counted rows; the errors are those of `ConceptMoments.update`.

    `sums_device` is the device for the sums of the rows, by default the device of x.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}: give a tensor of shape (…, {x_dim}).")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x has dtype {x.dtype}: give real floating-point activations, for example x.float().")
    if x.ndim == 0 or x.shape[-1] != x_dim:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but the moments have x_dim={x_dim}: the last dimension must be {x_dim}."
        )
    if x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, so the batch is empty: leave batches without rows out.")
    lead, device, flat = x.shape[:-1], x.device, x.detach().reshape(-1, x_dim)
    keep = torch.ones(lead, dtype=torch.bool, device=device) if mask is None else _as_mask(mask, lead, device)
    if isinstance(z, Tensor) and z.shape == lead and not z.dtype.is_floating_point:
        keep = keep & (z.to(device, torch.int64) != IGNORED)  # in uint8, 156 would be equal to it
    weights = torch.ones(lead, dtype=torch.float64, device=device)
    if weight is not None:
        if not isinstance(weight, Tensor) or weight.dtype.is_complex:
            raise TypeError(f"weight is {type(weight).__name__}: give a tensor of real numbers, one per row.")
        if weight.shape != lead:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, but x without its last dimension has {tuple(lead)}: give one "
                "weight per row."
            )
        # Rows that do not count get the weight 0, even if theirs is NaN.
        weights = torch.where(keep, weight.detach().to(device=device, dtype=torch.float64), 0.0)
        given = weights.reshape(-1)
        bad = (~(torch.isfinite(given) & (given >= 0))).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"weight has {len(bad)} entries that are negative or not finite, the first {float(given[bad[0]])} at "
                f"row {bad[0]}: weights must be 0 or more."
            )
        keep = keep & (weights > 0)
    ids, values = _read_concept(z, keep, z_dim)
    index = None if bool(keep.all()) else keep.reshape(-1).nonzero().squeeze(1)
    weights, sums_device = weights[keep], sums_device or device
    ids, values = (None if t is None else t.to(sums_device) for t in (ids, values))
    return Rows(flat, index, len(weights), ids, values, weights.to(sums_device))


def _as_mask(mask: Tensor, lead: torch.Size, device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype.is_floating_point or mask.dtype.is_complex:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask is {kind}: give a bool tensor, True where a row counts.")
    if mask.shape != lead:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, but x without its last dimension has {tuple(lead)}: give one entry "
            "per row."
        )
    return mask.to(device) != 0


def _read_concept(z: Tensor | None, keep: Tensor, z_dim: int) -> tuple[Tensor | None, Tensor | None]:
    """The class ids `(count,)`, or the values `(count, z_dim)`, of the rows in `keep`; a background has no values."""
    lead = keep.shape
    if z_dim == 0:
        if z is not None:
            raise ValueError("z was given, but the moments have z_dim=0 (a background): leave z out, or set z_dim.")
        return None, torch.zeros(int(keep.sum()), 0, dtype=torch.float64, device=keep.device)
    if z is None:
        raise ValueError(f"z is missing, but the moments have z_dim={z_dim}: give class ids or concept values.")
    if not isinstance(z, Tensor):
        raise TypeError(f"z is {type(z).__name__}: give a tensor of class ids or of concept values.")
    if z.dtype.is_complex:
        raise TypeError(f"z has dtype {z.dtype}: give integer class ids or real values.")
    if z.shape == lead and not z.dtype.is_floating_point:
        ids = z.to(keep.device, torch.int64)[keep]
        low, high = (int(edge) for edge in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= z_dim:
            raise ValueError(
                f"z holds class id {low if low < 0 else high}, but z_dim={z_dim}: ids run from 0 to {z_dim - 1}, and "
                f"{IGNORED} leaves a row out. Set z_dim to the number of classes, or pass numbers as floats."
            )
        return ids, None
    if z.shape != (*lead, z_dim) and (z.shape != lead or z_dim != 1):
        raise ValueError(
            f"z has shape {tuple(z.shape)} and dtype {z.dtype}, but x has rows of shape {tuple(lead)} and z_dim="
            f"{z_dim}: give integer class ids of shape {tuple(lead)} or values of shape {(*lead, z_dim)}."
        )
    if not z.dtype.is_floating_point and bool((z.to(torch.int64) == IGNORED).any()):
        raise ValueError(
            f"z has shape {tuple(z.shape)}, one value per concept dimension, and holds {IGNORED}: leave such rows "
            "out with mask=, or give one class id per row."
        )
    values = z.to(keep.device, torch.float64).reshape(*lead, z_dim)[keep]
    finite = torch.isfinite(values).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(
            f"z is not finite in {int((~finite).sum())} of {len(values)} counted rows, the first of them row "
            f"{int((~finite).nonzero()[0])}: leave such rows out with mask=."
        )
    return None, values


# ---- sums and products of the rows -----------------------------------------------------------------------------------


class PackedGram:
    """A symmetric `(dim, dim)` sum of products, of which only the upper block triangle is stored.

    This saves half the products and half the memory of a full matrix: the float64 sum takes little more memory than a
    full float32 matrix. It is stored in block columns, which reach from the top to the diagonal: products of this shape
    run nearly as fast as a product of the whole matrix; tiles and block rows were measured to be slower.

    Attributes:
        dim: The number of rows and columns.
        values: All block columns one after another, each row by row; float64 for sums.
        diagonal: `(dim,)` int64, the positions of the diagonal in the values.
    """

    def __init__(
        self, dim: int, device: torch.device, values: Tensor | None = None, *, dtype: torch.dtype = torch.float64
    ) -> None:
        """Start with zeros, or with `values` in this layout."""
        self.dim = dim
        # Measured on CPU: narrower blocks run slower, wider ones waste more below the diagonal.
        block = 128 if dim <= 1024 else 256
        self._edges = [(start, min(start + block, dim)) for start in range(0, dim, block)]
        offset, positions = 0, []
        for start, stop in self._edges:
            width = stop - start
            square, offset = offset + start * width, offset + stop * width
            positions.append(torch.arange(square, offset, width + 1, device=device))
        self.diagonal = torch.cat(positions)
        self.values = torch.zeros(offset, dtype=dtype, device=device) if values is None else values

    @classmethod
    def size_of(cls, dim: int) -> int:
        """The number of values for a matrix of `dim` rows."""
        return cls(dim, torch.device("meta")).values.numel()

    def columns(self) -> Iterator[tuple[int, int, Tensor]]:
        """Every block column `[:stop, start:stop]`, as `(start, stop, view)`."""
        offset = 0
        for start, stop in self._edges:
            size = stop * (stop - start)
            yield start, stop, self.values[offset : offset + size].view(stop, stop - start)
            offset += size

    def absorb(self, products: PackedGram | None, vectors: Tensor, scales: Tensor) -> None:
        """Add the products, if any, and `Σ scalesᵣ · vectorsᵣ vectorsᵣᵀ` for `(r, dim)` vectors."""
        scaled = (vectors * scales[:, None]).T
        added = None if products is None else products.columns()
        for start, stop, column in self.columns():
            # Column by column: a column is still in the cache for the second addition.
            if added is not None:
                column.add_(next(added)[2])
            if scaled.shape[1]:
                column.addmm_(scaled[:stop], vectors[:, start:stop])

    def standardised(self, scale: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Copies of the block columns, with rows and columns multiplied by `scale` `(dim,)`, and a diagonal of ones."""
        for start, stop, column in self.columns():
            standard = column * scale[start:stop] * scale[:stop, None]
            standard[start:].fill_diagonal_(1.0)
            yield start, stop, standard

    def quadratic(self, forms: Tensor) -> Tensor:
        """`forms · matrix · formsᵀ` for float64 `(r, dim)` forms."""
        total = forms.new_zeros(forms.shape[0], forms.shape[0])
        for start, stop, column in self.columns():
            above = forms[:, :start] @ column[:start] @ forms[:, start:stop].T
            total += above + above.T + forms[:, start:stop] @ column[start:] @ forms[:, start:stop].T
        return total

    def dense(self) -> Tensor:
        """The full matrix, `(dim, dim)`, exactly symmetric."""
        full = self.values.new_empty(self.dim, self.dim)
        for start, stop, column in self.columns():
            full[:start, start:stop] = column[:start]
            full[start:stop, :start] = column[:start].T
            # The two triangles of one product may be rounded differently.
            full[start:stop, start:stop] = (column[start:] + column[start:].T) / 2
        return full


@dataclass(frozen=True)
class Sums:
    """Sums over rows, centred on their own mean, all float64. Two of them merge exactly, in any order."""

    rows: int  # The number of rows.
    weight: float  # The sum of their weights.
    weight_squares: float  # The sum of their squared weights.
    resolution: float  # The largest machine epsilon of the dtypes of the rows.
    mean_x: Tensor  # `(d,)` weighted mean of x.
    mean_z: Tensor  # `(k,)` weighted mean of z; for class ids the shares of the classes.
    cross: Tensor  # `(d, k)` sum of `w (x − mean_x)(z − mean_z)ᵀ`.
    concept: Tensor  # `(k, k)` sum of `w (z − mean_z)(z − mean_z)ᵀ`.
    # `(k,)` int64 number of rows of each class; None if any row had concept values instead of a class id.
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
            resolution=max(self.resolution, other.resolution),
            mean_x=self.mean_x + share * shift_x,
            mean_z=self.mean_z + share * shift_z,
            cross=self.cross + other.cross + coupling * torch.outer(shift_x, shift_z),
            concept=self.concept + other.concept + coupling * torch.outer(shift_z, shift_z),
            counts=None if self.counts is None or other.counts is None else self.counts + other.counts,
        )

    def state(self) -> dict[str, Tensor]:
        """Copies of all sums, as tensors."""
        return {
            name: torch.as_tensor(part, dtype=torch.float64 if isinstance(part, float) else None).clone()
            for name, part in vars(self).items()
            if part is not None
        }

    @classmethod
    def of(cls, state: dict[str, Tensor]) -> Sums:
        """The sums of a state that has been checked, copied."""
        tensors = ("mean_x", "mean_z", "cross", "concept")
        copies: dict[str, Any] = {name: state[name].detach().double().clone() for name in tensors}
        copies |= {name: float(state[name]) for name in ("weight", "weight_squares", "resolution")}
        return cls(rows=int(state["rows"]), counts=state["counts"].clone() if "counts" in state else None, **copies)

    def to(self, device: torch.device) -> Sums:
        """The same sums on another device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **moved)


def sum_rows(rows: Rows, z_dim: int) -> Sums:
    """Sum the counted rows in float64; they are read once, a chunk at a time."""
    ids, weight, width, device = rows.ids, rows.weight, rows.x.shape[1], rows.weight.device
    total, is_unweighted = float(weight.sum()), bool((weight == 1).all())
    centred = counts = None
    if rows.values is not None:
        mean_z = (rows.values * weight[:, None]).sum(0) / total
        plain = rows.values - mean_z
        centred = plain * weight[:, None]
        concept = plain.T @ centred
    elif ids is not None:
        counts = torch.bincount(ids, minlength=z_dim)
        by_class = weight.new_zeros(z_dim).index_add_(0, ids, weight)
        mean_z, concept = by_class / total, torch.diag(by_class) - torch.outer(by_class, by_class) / total
    chunk = 256 if device.type == "cpu" else 2048  # rows that stay in the cache of a CPU, or are worth a kernel launch
    buffer = torch.empty(min(chunk, rows.count), width, dtype=torch.float64, device=device)
    # The weighted sums of x − pivot: for class ids by class, for values their products with z too. Sums of numbers near
    # zero keep their digits, and the mean of the first rows is near enough. Numbers of 24 bits do not need it: float64
    # adds millions of them without rounding.
    sums = torch.zeros(1 if ids is None else z_dim, width, dtype=torch.float64, device=device)
    cross = torch.zeros(width, z_dim, dtype=torch.float64, device=device)
    pivot = torch.zeros(width, dtype=torch.float64, device=device)
    for start in range(0, rows.count, chunk):
        part = slice(start, min(start + chunk, rows.count))
        x = buffer[: part.stop - start].copy_(rows.chunk(start, part.stop))
        if rows.x.dtype == torch.float64:
            pivot = x.mean(0) if start == 0 else pivot
            x -= pivot
        if centred is not None:
            cross.addmm_(x.T, centred[part])
        if not is_unweighted:
            x *= weight[part, None]
        if ids is None:
            sums[0] += x.sum(0)
        else:
            sums.index_add_(0, ids[part], x)
    shift = sums.sum(0) / total
    if not bool(torch.isfinite(shift).all()):
        _raise_not_finite(rows)
    if centred is None:
        # The class sums are not centred yet: each contains its share of the mean.
        cross = (sums - total * mean_z[:, None] * shift).T
    exact = float(weight.square().sum()), torch.finfo(rows.x.dtype).eps
    return Sums(rows.count, total, *exact, pivot + shift, mean_z, cross.contiguous(), concept, counts)


def _raise_not_finite(rows: Rows) -> None:
    """Raise the error that names the place where x is not finite."""
    bad = ~torch.isfinite(rows.chunk(0, rows.count))
    wrong = bad.any(dim=1).nonzero().flatten().tolist()
    if not wrong:
        raise ValueError("x holds numbers whose sum overflows float64: scale the activations down.")
    row = wrong[0] if rows.index is None else int(rows.index[wrong[0]])
    raise ValueError(
        f"x is not finite in {len(wrong)} of {rows.count} counted rows, the first at row {row} (leading dimensions "
        f"flattened), feature {int(bad[wrong[0]].nonzero()[0])}: leave such rows out with mask=, or find out where the "
        "model overflows. The statistics are unchanged."
    )


def centred_products(rows: Rows, mean: Tensor, dtype: torch.dtype | None = None) -> tuple[PackedGram, Tensor]:
    """Sum the products of the counted rows with themselves, a chunk at a time.

    They are computed in `dtype`, by default the dtype of the rows but at least float32, and in float64 if squares leave
    its range. If a process allows matrix products below float32 (TF32, bfloat16), float64 is used instead: switching
    the process-wide setting back and forth would change other threads.

    Returns:
        `Σ w (x − c)(x − c)ᵀ`, and `c − mean` `(d,)` float64; c is the mean rounded to the dtype.
    """
    device, width = rows.weight.device, mean.numel()
    if dtype is None:
        backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn
        setting = getattr(getattr(backend, "matmul", backend), "fp32_precision", None)
        if setting is not None:
            is_reduced = setting in ("tf32", "bf16")
        elif device.type == "cuda":
            is_reduced = torch.backends.cuda.matmul.allow_tf32
        else:
            is_reduced = torch.get_float32_matmul_precision() == "medium"
        dtype = torch.float64 if is_reduced or rows.x.dtype == torch.float64 else torch.float32
    # A centred chunk takes at most 2/3 d² numbers of 4 bytes; the products take as much, and the sums that they are
    # added to twice as much. Rows that must be gathered or converted exist twice, and float64 is twice as wide.
    copied = rows.index is not None or rows.x.dtype != dtype or rows.x.device != device
    size = max(512, min(2048, width * 2 // 3)) // (2 if copied else 1) // (2 if dtype == torch.float64 else 1)
    centre, root, is_unweighted = mean.to(dtype), rows.weight.sqrt().to(dtype)[:, None], bool((rows.weight == 1).all())
    products = PackedGram(width, device, dtype=dtype)
    buffer = torch.empty(min(size, rows.count), width, dtype=dtype, device=device)
    for start in range(0, rows.count, size):
        stop = min(start + size, rows.count)
        centred = buffer[: stop - start]
        torch.sub(rows.chunk(start, stop).to(device=device, dtype=dtype), centre, out=centred)
        if not is_unweighted:
            centred *= root[start:stop]
        for first, last, column in products.columns():
            column.addmm_(centred[:, :last].T, centred[:, first:last])
    largest = float(products.values[products.diagonal].max())
    # The squares lie outside the range of float32: they are too large, or so small that they vanish.
    if dtype != torch.float64 and not 1e-30 * float(rows.weight.sum()) <= largest < float("inf"):
        del buffer, products
        return centred_products(rows, mean, torch.float64)
    if not largest < float("inf"):
        raise ValueError("x holds numbers whose squares overflow float64: scale the activations down.")
    return products, centre.double() - mean
