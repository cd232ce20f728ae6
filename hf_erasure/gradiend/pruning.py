"""The largest entries of named blocks, exactly as many as asked for, without sorting or joining the blocks.

The bits of a non-negative float32, read as an integer, are in the order of the numbers: two histograms of 16 bits each
give the threshold. Blocks are asked for one at a time, so that scores which are computed need not be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import pieces, total

Blocks = Callable[[str], Tensor]  # name -> (count,) float32, a value for each stored entry of the block
Index = Mapping[str, Tensor | None]

MAX_INT32 = 2**31 - 1
BINS = 1 << 16
FIRST_NON_FINITE = 0x7F80  # upper half of the bits of infinity
# Far more entries than bins, or filling in the bins is what takes the time.
HISTOGRAM_PIECE = 1 << 20


def check_density(density: float) -> float:
    """`density` as a float.

    Raises:
        ValueError: If it is not in (0, 1].
    """
    if not 0.0 < float(density) <= 1.0:
        raise ValueError(f"density is {density}: write a share of the entries above 0 and up to 1.")
    return float(density)


@dataclass(frozen=True)
class Support:
    """Which of the stored entries stay.

    Attributes:
        shapes: Name to shape of the block.
        old: Name to positions of the stored entries, None where all of the block is stored.
        index: Name to int32 positions of the entries that stay, None where the block is dense.
        keep: Name to bool `(count,)` over the stored entries; None where all of them stay.
    """

    shapes: Mapping[str, torch.Size]
    old: Index
    index: dict[str, Tensor | None]
    keep: dict[str, Tensor | None]

    def of(self, values: Blocks) -> dict[str, Tensor]:
        """The values that stay, in the layout of `index`: name to `(count,)`."""
        return {name: self._of(name, values(name)) for name in self.shapes}

    def _of(self, name: str, values: Tensor) -> Tensor:
        keep, old = self.keep[name], self.old[name]
        if keep is None:
            return values
        if self.index[name] is not None:
            return values[keep]
        masked = torch.where(keep, values, 0.0)
        return masked if old is None else _scatter(masked, old, self.shapes[name].numel())


def select(score: Blocks, old: Index, shapes: Mapping[str, torch.Size], density: float) -> Support:
    """Keep the `ceil(density · n)` entries of largest `|score|`, where n counts all of `shapes`.

    Of equal entries the first stay, in the order of blocks and positions. Where no more than that many entries are
    stored, all stay. A block of which less than half stays gets int32 positions; otherwise it is dense, and the values
    of entries that go are zero.

    Raises:
        ValueError: If `density` is not in (0, 1], or a score is not finite.
    """
    wanted = math.ceil(check_density(density) * total(shapes))
    if wanted >= sum(stored_entries(old[name], shape) for name, shape in shapes.items()):
        return Support(shapes, old, dict(old), dict.fromkeys(shapes))
    keep = largest(score, list(shapes), wanted)
    index = {name: _positions(mask, old[name], shapes[name].numel()) for name, mask in keep.items()}
    return Support(shapes, old, index, dict(keep))


def stored_entries(positions: Tensor | None, shape: torch.Size) -> int:
    """How many entries of a block are stored."""
    return shape.numel() if positions is None else positions.numel()


def largest(score: Blocks, names: list[str], wanted: int) -> dict[str, Tensor]:
    """Name to bool `(count,)`: True at the `wanted` entries of largest `|score|`, the first of equals.

    Raises:
        ValueError: If a score is not finite.
    """
    high, above = _cut(_histogram(score, names), wanted)
    low, above_low = _cut(_histogram(score, names, high), wanted - above)
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


def _positions(keep: Tensor, old: Tensor | None, size: int) -> Tensor | None:
    if 2 * int(keep.sum()) >= size or size > MAX_INT32:
        return None
    return keep.nonzero().view(-1).to(torch.int32) if old is None else old[keep]


def _scatter(values: Tensor, positions: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).index_copy_(0, positions.long(), values)


def _bits(scores: Tensor) -> Tensor:
    return scores.float().abs().view(torch.int32)


def _histogram(score: Blocks, names: list[str], high: int | None = None) -> Tensor:
    """Counts of the upper 16 bits of all scores; with `high`, of the lower 16 bits of those with these upper bits."""
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
    return counts


def _cut(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th largest entry, and how many entries lie in bins above it."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, wanted))
    above = int(from_above[place - 1]) if place else 0
    return BINS - 1 - place, above
