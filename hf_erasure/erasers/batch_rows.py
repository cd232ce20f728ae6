"""A batch as it was given, checked and flattened: which rows count, what they say of the concept, what they weigh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""The class id of a row that does not count, as in `torch.nn.CrossEntropyLoss`."""


@dataclass(frozen=True)
class Rows:
    """The counted rows of one batch.

    Attributes:
        x: `(all rows, x_dim)`, counted or not, in the dtype they came in.
        index: `(count,)` positions of the counted rows in `x`; None when all count.
        count: How many rows count.
        ids: `(count,)` int64 class ids, or None.
        values: `(count, z_dim)` float64 concept values, or None.
        weight: `(count,)` float64, all positive; None when every row weighs 1.
    """

    x: Tensor
    index: Tensor | None
    count: int
    ids: Tensor | None
    values: Tensor | None
    weight: Tensor | None

    def chunk(self, start: int, stop: int) -> Tensor:
        """The counted rows `start:stop` of `x`."""
        if self.index is None:
            return self.x[start:stop]
        return self.x.index_select(0, self.index[start:stop])


def infer_z_dim(x: Tensor, z: Tensor, mask: Tensor | None) -> int:
    """How many classes or concept values `z` holds."""
    if not isinstance(z, Tensor):
        raise TypeError(f"z is {type(z).__name__}: give a tensor of class ids or of concept values.")
    if z.shape == x.shape[:-1] and not z.dtype.is_floating_point:
        counted = z if mask is None else z[_as_mask(mask, z.shape, z.device)]
        return max(int(counted.max()) + 1, 1) if counted.numel() else 1
    return 1 if z.shape == x.shape[:-1] else z.shape[-1]


def read_rows(x: Tensor, z: Tensor | None, weight: Tensor | None, mask: Tensor | None, x_dim: int, z_dim: int) -> Rows:
    """Check a batch and pick its counted rows.

    Raises:
        TypeError: If an argument is no tensor, or holds the wrong kind of numbers.
        ValueError: If a shape or a value cannot be used; the message names the argument.
    """
    _check_x(x, x_dim)
    lead, device = x.shape[:-1], x.device
    keep = None if mask is None else _as_mask(mask, lead, device).reshape(-1)
    ids, values = _read_z(z, lead, z_dim)
    ids = None if ids is None else ids.to(device).reshape(-1)
    values = None if values is None else values.to(device).reshape(-1, z_dim)
    if ids is not None:
        keep = _and(keep, ids != IGNORED)
    flat_weight = None if weight is None else _read_weight(weight, lead, device, keep)
    if flat_weight is not None:
        keep = _and(keep, flat_weight > 0)
    index = None if keep is None or bool(keep.all()) else keep.nonzero().squeeze(1)
    if index is not None:
        ids, values, flat_weight = (None if t is None else t[index] for t in (ids, values, flat_weight))
    flat = x.detach().reshape(-1, x_dim)
    rows = Rows(flat, index, flat.shape[0] if index is None else index.numel(), ids, values, flat_weight)
    _check_concept(rows, z_dim)
    return rows


def _and(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one & other


def _check_x(x: Tensor, x_dim: int) -> None:
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


def _read_z(z: Tensor | None, lead: torch.Size, z_dim: int) -> tuple[Tensor | None, Tensor | None]:
    """Class ids `lead`, or values `lead + (z_dim,)`; neither for a background."""
    if z_dim == 0:
        if z is not None:
            raise ValueError("z was given, but the moments have z_dim=0 (a background): leave z out, or set z_dim.")
        return None, None
    if z is None:
        raise ValueError(f"z is missing, but the moments have z_dim={z_dim}: give class ids or concept values.")
    if not isinstance(z, Tensor):
        raise TypeError(f"z is {type(z).__name__}: give a tensor of class ids or of concept values.")
    if z.dtype.is_complex:
        raise TypeError(f"z has dtype {z.dtype}: give integer class ids or real values.")
    if z.shape == lead and not z.dtype.is_floating_point:
        return z.to(torch.int64), None
    if z.shape == (*lead, z_dim):
        if not z.dtype.is_floating_point and bool((z == IGNORED).any()):
            raise ValueError(
                f"z has shape {tuple(z.shape)}, one value per concept dimension, and holds {IGNORED}: leave such rows "
                "out with mask=, or give one class id per row."
            )
        return None, z.to(torch.float64)
    if z.shape == lead and z_dim == 1:
        return None, z.to(torch.float64).unsqueeze(-1)
    raise ValueError(
        f"z has shape {tuple(z.shape)} and dtype {z.dtype}, but x has rows of shape {tuple(lead)} and z_dim={z_dim}: "
        f"give integer class ids of shape {tuple(lead)} or values of shape {(*lead, z_dim)}."
    )


def _read_weight(weight: Tensor, lead: torch.Size, device: torch.device, keep: Tensor | None) -> Tensor:
    """Flat float64 weights; rows that do not count get 0, whatever they held."""
    if not isinstance(weight, Tensor) or weight.dtype.is_complex:
        raise TypeError(f"weight is {type(weight).__name__}: give a tensor of real numbers, one per row.")
    if weight.shape != lead:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but x without its last dimension has {tuple(lead)}: give one "
            "weight per row."
        )
    flat = weight.detach().to(device=device, dtype=torch.float64).reshape(-1)
    flat = flat if keep is None else torch.where(keep, flat, 0.0)
    bad = ~(torch.isfinite(flat) & (flat >= 0))
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"weight has {int(bad.sum())} entries that are negative or not finite, the first {float(flat[first])} at "
            f"row {first}: weights must be 0 or more."
        )
    return flat


def _check_concept(rows: Rows, z_dim: int) -> None:
    if rows.ids is not None:
        low, high = (int(edge) for edge in rows.ids.aminmax()) if rows.count else (0, 0)
        if low < 0 or high >= z_dim:
            raise ValueError(
                f"z holds class id {low if low < 0 else high}, but z_dim={z_dim}: ids run from 0 to {z_dim - 1}, and "
                f"{IGNORED} leaves a row out. Set z_dim to the number of classes, or pass numbers as floats."
            )
    if rows.values is not None:
        finite = torch.isfinite(rows.values).all(dim=1)
        if not bool(finite.all()):
            raise ValueError(
                f"z is not finite in {int((~finite).sum())} of {rows.count} counted rows, the first of them row "
                f"{int((~finite).nonzero()[0])}: leave such rows out with mask=."
            )
