"""Moments as a dictionary of tensors: what a checkpoint holds, and what another process sends."""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import PackedGram
from .sums import Sums

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
