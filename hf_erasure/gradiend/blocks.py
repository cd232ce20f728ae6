"""Named blocks of gradients: checked one by one, walked in pieces that stay in cache, summed in float64, ranked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

# Entries of a piece. On a CPU few enough that the dozen vectors an update holds stay in cache (6 MB), and so many that
# starting an operation takes little of its time; on an accelerator a piece only bounds the temporaries.
CPU_PIECE = 1 << 17
DEVICE_PIECE = 1 << 24
# Of a histogram: one for each value of 16 bits; and the upper 16 bits of infinity.
BINS = 1 << 16
FIRST_NON_FINITE = 0x7F80
# Entries of a piece whose histogram is taken: far more than bins, or filling in the bins is what takes the time.
HISTOGRAM_PIECE = 1 << 20


def piece_size(device: torch.device) -> int:
    """Entries handled at a time on `device`."""
    return max(CPU_PIECE, (1 << 16) * torch.get_num_threads()) if device.type == "cpu" else DEVICE_PIECE


def pieces(*vectors: Tensor, size: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Views of `(count,)` vectors of one length, `size` entries at a time (default: as suits the device)."""
    size = size or piece_size(vectors[0].device)
    if vectors[0].numel() <= size:
        return iter((vectors,))
    return zip(*(vector.split(size) for vector in vectors), strict=True)


def flat(name: str, gradient: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """The block as a vector `(count,)` on `device`, in its own dtype; refused if not of floats or of `shape`."""
    if not isinstance(gradient, Tensor):
        raise TypeError(
            f"The gradient of {name!r} is {type(gradient).__name__}: give a tensor of shape {tuple(shape)}."
        )
    if not gradient.is_floating_point():
        raise TypeError(f"The gradient of {name!r} has dtype {gradient.dtype}: give floating-point numbers.")
    if gradient.shape != shape:
        raise ValueError(f"The gradient of {name!r} has shape {tuple(gradient.shape)}: it must be {tuple(shape)}.")
    return gradient.detach().to(device).reshape(-1)


def flat_blocks(
    gradients: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], device: torch.device, what: str
) -> dict[str, Tensor]:
    """All blocks of `shapes` as vectors, as `flat` gives them, in the order of `shapes`; others are left out."""
    missing = [name for name in shapes if name not in gradients]
    if missing:
        raise ValueError(
            f"{what} lacks {len(missing)} of {len(shapes)} blocks, the first of them {missing[0]!r}: "
            "give the gradients of exactly the parameters that the feature was declared with."
        )
    return {name: flat(name, gradients[name], shape, device) for name, shape in shapes.items()}


def as_shapes(shapes: Mapping[str, Iterable[int]]) -> dict[str, torch.Size]:
    """A copy of names and shapes; refused where there is no block, or one without entries."""
    copied = {name: torch.Size(shape) for name, shape in shapes.items()}
    if not copied:
        raise ValueError("There are no blocks: give at least one name with its shape.")
    for name, shape in copied.items():
        if shape.numel() == 0:
            raise ValueError(f"Block {name!r} has shape {tuple(shape)} and no entries: leave it out.")
    return copied


def total(shapes: Mapping[str, torch.Size]) -> int:
    """Entries of all blocks together."""
    return sum(shape.numel() for shape in shapes.values())


def dot(a: Tensor, b: Tensor) -> float:
    """`⟨a, b⟩` of two vectors in float64; pieces are multiplied in float32 unless `a` is float64."""
    sums = [torch.dot(x, y.to(x.dtype)) for x, y in pieces(a, b)]
    return float(torch.stack(sums).double().sum())


def sum_of_squares(a: Tensor) -> float:
    """`‖a‖²` in float64, also where float32 squares would vanish or overflow."""
    if a.numel() == 0:
        return 0.0
    dtype = torch.promote_types(a.dtype, torch.float32)
    sums = [torch.dot(x, x) for x in (piece.to(dtype) for (piece,) in pieces(a))]
    result = float(torch.stack(sums).double().sum())
    if a.dtype != torch.float64 and not 1e-30 < result < 1e30:
        result = sum(float(x.double().square().sum()) for (x,) in pieces(a))
    return result


def require_finite(values: Mapping[str, float], what: str = "gradient") -> None:
    """Refuse blocks by a sum over the entries of each, which is not finite if one of them is not."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"The {what} of {name!r} is not finite: nothing was changed; leave this batch out, or lower the "
                "scale of its loss."
            )


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a saved state that has other names or shapes than these, or is not finite."""
    for name in state.keys() - shapes.keys():
        raise ValueError(f"{name!r} in the state is unknown here: the state is of other blocks or another kind.")
    for name, shape in shapes.items():
        if name not in state:
            raise ValueError(f"The state lacks {name!r}: give what state_dict returned, whole, for the same blocks.")
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{name!r} in the state has shape {tuple(state[name].shape)}: it must be {shape}.")
        if not bool(torch.isfinite(state[name]).all()):
            raise ValueError(f"{name!r} in the state is not finite: the file is damaged; fit anew.")


# ---- the largest entries ---------------------------------------------------------------------------------------------
# The bits of a non-negative float32, read as an integer, are in the order of the numbers: two histograms of 16 bits
# each give the threshold, exactly, without sorting or joining the blocks.


def largest(score: Callable[[str], Tensor], names: list[str], wanted: int) -> dict[str, Tensor]:
    """Name to bool `(count,)`: True at the `wanted` entries of largest `|score|`, the first of equals.

    Scores, `(count,)` each, are asked for one block at a time, so that they need not be kept; they must be finite.
    """
    high, above = _cut(score, names, wanted)
    low, above_low = _cut(score, names, wanted - above, high)
    threshold, ties = (high << 16) | low, wanted - above - above_low
    keep = {}
    for name in names:
        bits = _bits(score(name))
        equal = bits == threshold
        found = int(equal.sum())
        if found > ties:
            equal &= torch.cumsum(equal, 0, dtype=torch.int32) <= ties
        ties -= min(found, ties)
        keep[name] = equal.logical_or_(bits > threshold)
    return keep


def _bits(scores: Tensor) -> Tensor:
    return scores.float().abs().view(torch.int32)


def _cut(score: Callable[[str], Tensor], names: list[str], wanted: int, high: int | None = None) -> tuple[int, int]:
    """The upper 16 bits of the `wanted`-th largest score, and how many scores lie above all that have these.

    With `high`, the same of the lower 16 bits of the scores that have these upper bits.
    """
    counts = torch.zeros(BINS, dtype=torch.int64)
    for name in names:
        for (piece,) in pieces(score(name), size=HISTOGRAM_PIECE):
            bits = _bits(piece)
            upper = bits >> 16
            part = upper if high is None else (bits & 0xFFFF)[upper == high]
            found = torch.bincount(part, minlength=1).cpu()
            if high is None and found.numel() > FIRST_NON_FINITE:
                raise ValueError(f"The weights of {name!r} are not finite and cannot be ranked: fit anew.")
            counts[: found.numel()] += found
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, wanted))
    return BINS - 1 - place, int(from_above[place - 1]) if place else 0
