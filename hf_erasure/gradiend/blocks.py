"""Named blocks of gradients: checks, pieces that stay in cache, sums in float64, and the largest entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

# Entries of a piece. On a CPU a piece is small enough that the dozen vectors of an update stay in cache (6 MB), and
# large enough that starting an operation takes little of its time; on an accelerator it only bounds the temporaries.
CPU_PIECE = 1 << 17
DEVICE_PIECE = 1 << 24
# The numbers of 16 bits; and the upper 16 bits of infinity.
BINS = 1 << 16
FIRST_NON_FINITE = 0x7F80


def piece_size(device: torch.device) -> int:
    """The number of entries that are handled at a time on `device`."""
    return max(CPU_PIECE, (1 << 16) * torch.get_num_threads()) if device.type == "cpu" else DEVICE_PIECE


def pieces(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of `(count,)` vectors of one length, `piece_size` entries at a time."""
    size = piece_size(vectors[0].device)
    return zip(*(vector.split(size) for vector in vectors), strict=True)


def flat_block(name: str, gradient: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Return a block as a vector `(count,)` on `device`, in its own dtype; raise an error unless it fits `shape`."""
    if not isinstance(gradient, Tensor) or not gradient.is_floating_point():
        kind = gradient.dtype if isinstance(gradient, Tensor) else type(gradient).__name__
        raise TypeError(f"The gradient of {name!r} is {kind}: give a tensor of floating-point numbers.")
    if gradient.shape != shape:
        raise ValueError(f"The gradient of {name!r} has shape {tuple(gradient.shape)}: it must be {tuple(shape)}.")
    return gradient.detach().to(device).reshape(-1)


def total(shapes: Mapping[str, torch.Size]) -> int:
    """The number of entries of all blocks together."""
    return sum(shape.numel() for shape in shapes.values())


def dot(a: Tensor, b: Tensor) -> float:
    """`⟨a, b⟩` of two vectors in float64; pieces are multiplied in float32 unless `a` is float64."""
    sums = [torch.dot(x, y.to(x.dtype)) for x, y in pieces(a, b)]
    return float(torch.stack(sums).double().sum())


def sum_of_squares(a: Tensor) -> float:
    """`‖a‖²` in float64, even if float32 squares would vanish or overflow."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    sums = [torch.dot(x, x) for x in (piece.to(dtype) for (piece,) in pieces(a))]
    result = float(torch.stack(sums).double().sum())
    if a.dtype != torch.float64 and not 1e-30 < result < 1e30:
        result = sum(float(x.double().square().sum()) for (x,) in pieces(a))
    return result


def require_finite(values: Mapping[str, float], what: str = "gradient") -> None:
    """Raise a `ValueError` for a block whose value, such as a sum over its entries, is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(
                f"The {what} of {name!r} is not finite, and nothing was changed: leave this batch out, or lower the "
                "scale of its loss."
            )


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a `ValueError` for a saved state that has other names or shapes than `shapes`, or is not finite."""
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
        raise ValueError(
            "The state is of other blocks or another kind, or it is not whole: give what state_dict returned."
        )
    for name in shapes:
        if not bool(torch.isfinite(state[name]).all()):
            raise ValueError(f"{name!r} in the state is not finite: the file is damaged; fit anew.")


@torch.no_grad()
def largest(score: Callable[[str], Tensor], names: Sequence[str], wanted: int) -> dict[str, Tensor]:
    """Name to bool `(count,)`: True at the `wanted` entries of largest `|score|`; of equal entries the first are taken.

    `score` returns the scores `(count,)` of one block at a time, by name, so that they need not be kept; they must be
    finite. Two counts of 16 bits each give the exact threshold, without sorting or joining the blocks.
    """
    high, above = _cutoff(score, names, wanted)
    low, above_low = _cutoff(score, names, wanted - above, high)
    threshold, ties = (high << 16) | low, wanted - above - above_low
    keep = {}
    for name in names:
        bits = _bits(score(name))
        equal = bits == threshold
        count = int(equal.sum())
        if count > ties:
            equal &= torch.cumsum(equal, 0, dtype=torch.int32) <= ties
        ties -= min(count, ties)
        keep[name] = equal.logical_or_(bits > threshold)
    return keep


def _cutoff(
    score: Callable[[str], Tensor], names: Sequence[str], wanted: int, high: int | None = None
) -> tuple[int, int]:
    """The upper 16 bits of the `wanted`-th largest score, and the number of scores with larger upper bits.

    With `high`, the same for the lower 16 bits, among the scores whose upper bits are `high`.
    """
    counts = torch.zeros(BINS, dtype=torch.int64, device="cpu")
    for name in names:
        for (piece,) in pieces(score(name)):
            bits = _bits(piece)
            part = bits >> 16 if high is None else (bits & (BINS - 1))[bits >> 16 == high]
            counts += torch.bincount(part, minlength=BINS).cpu()
        if high is None and bool(counts[FIRST_NON_FINITE:].any()):
            raise ValueError(f"The weights of {name!r} are not finite and cannot be ranked: fit anew.")
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, wanted))
    return BINS - 1 - place, int(from_above[place - 1]) if place else 0


def _bits(scores: Tensor) -> Tensor:
    """The bits of `|score|` in float32, as integers: they have the order of the numbers."""
    return scores.float().abs().view(torch.int32)
