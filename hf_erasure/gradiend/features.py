"""The frozen result of a fit: an encoder that reads a feature from a gradient, and a decoder that writes it to weights.

Both hold dictionaries of named blocks (arXiv 2502.01406, section 3), dense or reduced to their largest entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .blocks import dot, flat_block, largest, require_finite, sum_of_squares, total

ACTIVATIONS: dict[str, Callable[[float], float]] = {"tanh": math.tanh, "identity": float}
# The closed form maps the class means to plus and minus this value, near which tanh still separates values well.
CLASS_MEAN = 0.9
# Positions in a tensor are stored as int32; a tensor with more entries keeps all of them.
MAX_INT32 = 2**31 - 1

Index = Mapping[str, Tensor | None]


@dataclass(frozen=True, eq=False)
class FeatureEncoder:
    """Reads a feature from a gradient: `h = activation(scale · (⟨w, g⟩ + bias))`, with `g / ‖g‖` if `unit_norm`."""

    weight: dict[str, Tensor]  # Name to `(count,)` float32, the weights of the entries that are read.
    # Name to `(count,)` int32 ascending flat positions of these entries; None if the whole block is read.
    index: dict[str, Tensor | None]
    shapes: dict[str, torch.Size]  # Name to the shape of the block.
    scale: float = 1.0  # The factor of the pre-activation.
    bias: float = 0.0  # It is added to the inner product before the scale.
    activation: str = "tanh"  # "tanh" or "identity".
    unit_norm: bool = False  # Whether gradients are scaled to unit norm; the norm is over all given blocks.

    def encode(self, gradients: Mapping[str, Tensor]) -> float:
        """The value of the feature neuron for one gradient.

        Args:
            gradients: Name to gradient in the shape of the block, on any device, in any floating-point dtype. Blocks
                that the encoder does not know count for the norm only. A gradient of zeros has the inner product 0.

        Raises:
            KeyError: If a block is missing.
            TypeError: If a gradient is not a tensor of floating-point numbers.
            ValueError: If a block has another shape or is not finite.
        """
        blocks, projections = {}, {}
        for name, shape in self.shapes.items():
            weight, index = self.weight[name], self.index[name]  # those of a model may be on several devices
            block = blocks[name] = flat_block(name, gradients[name], shape, weight.device)
            projections[name] = dot(weight, block if index is None else block.index_select(0, index))
        require_finite(projections)
        value = sum(projections.values())
        if self.unit_norm:
            squares = {name: sum_of_squares(block) for name, block in blocks.items()}
            for name in gradients.keys() - blocks.keys():
                squares[name] = sum_of_squares(gradients[name].detach().reshape(-1))
            require_finite(squares)
            norm = math.sqrt(sum(squares.values()))
            value = value / norm if norm > 0 else 0.0
        return ACTIVATIONS[self.activation](self.scale * (value + self.bias))

    def centred(self, high: float, low: float) -> FeatureEncoder:
        """The encoder with the scale and bias for which two values of `⟨w, g⟩ + bias` give a tanh of ±0.9."""
        return replace(self, scale=2 * math.atanh(CLASS_MEAN) / (high - low), bias=self.bias - (high + low) / 2)

    def prune(self, density: float) -> FeatureEncoder:
        """The encoder reduced to the `ceil(density · n)` largest `|w|` over all blocks; scale and bias stay.

        Raises:
            ValueError: If `density` is not in (0, 1].
        """
        found = _largest_entries(self.weight.__getitem__, self.index, self.shapes, density)
        if found is None:
            return self
        index, keep_values = found
        return replace(self, weight=keep_values(self.weight), index=index)


@dataclass(frozen=True, eq=False)
class FeatureDecoder:
    """The change of the weights for a value h of the feature neuron: `h · Wd + bd`."""

    weight: dict[str, Tensor]  # Name to `(count,)` float32, Wd.
    bias: dict[str, Tensor]  # Name to `(count,)` float32, bd, at the same entries.
    # Name to `(count,)` int32 ascending flat positions of these entries; None if the whole block is stored.
    index: dict[str, Tensor | None]
    shapes: dict[str, torch.Size]  # Name to the shape of the block.

    def prune(self, density: float) -> FeatureDecoder:
        """The decoder reduced to the `ceil(density · n)` largest `|Wd|` over all blocks; the first of equals are kept.

        A block of which less than half is kept stores int32 positions; the other blocks stay dense, with zeros at the
        removed entries.

        Raises:
            ValueError: If `density` is not in (0, 1], or Wd is not finite.
        """
        return prune_together([self], density)[0]

    def importance(self) -> dict[str, tuple[float, float, int]]:
        """Name to (sum of |Wd|, sum of Wd², number of kept entries): how much of the feature is in each weight.

        In a dense block the entries are kept at which Wd and bd are not both zero.
        """
        found = {}
        for name, w in self.weight.items():
            is_kept = (w != 0) | (self.bias[name] != 0)
            kept = w.numel() if self.index[name] is not None else int(is_kept.count_nonzero())
            found[name] = float(w.abs().sum(dtype=torch.float64)), sum_of_squares(w), kept
        return found


@dataclass(frozen=True, eq=False)
class Feature:
    """One feature: its encoder and its decoder."""

    encoder: FeatureEncoder
    decoder: FeatureDecoder


def prune_together(decoders: list[FeatureDecoder], density: float) -> list[FeatureDecoder]:
    """Several decoders over the same entries, pruned to one common support: the largest `max |Wd|` among them.

    Raises:
        ValueError: If `density` is not in (0, 1], Wd is not finite, or the decoders do not have the same entries.
    """
    first = decoders[0]
    for other in decoders[1:]:
        pairs = [(x, other.index.get(name)) for name, x in first.index.items()]
        same = all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)
        if first.shapes != other.shapes or not same:
            raise ValueError("The decoders do not have the same blocks and entries: prune them together, not alone.")

    def score(name: str) -> Tensor:
        vectors = [decoder.weight[name].abs() for decoder in decoders]
        return torch.stack(vectors).amax(0) if len(vectors) > 1 else vectors[0]

    found = _largest_entries(score, first.index, first.shapes, density)
    if found is None:
        return list(decoders)
    index, keep_values = found
    return [replace(d, weight=keep_values(d.weight), bias=keep_values(d.bias), index=index) for d in decoders]


def _largest_entries(
    score: Callable[[str], Tensor], old: Index, shapes: Mapping[str, torch.Size], density: float
) -> tuple[dict[str, Tensor | None], Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] | None:
    """The positions of the `ceil(density · n)` entries of largest `|score|`, and a function that keeps values there.

    n is the number of entries of all `shapes`; None if all entries stay. Of equal entries the first stay, in the order
    of blocks and positions. A block of which less than half stays gets int32 positions; other blocks are dense, and the
    values of removed entries are zero.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is {density}: write a share of the entries above 0 and up to 1.")
    wanted = math.ceil(density * total(shapes))
    stored = (shape.numel() if (at := old[name]) is None else at.numel() for name, shape in shapes.items())
    if wanted >= sum(stored):
        return None
    keep = largest(score, list(shapes), wanted)
    index: dict[str, Tensor | None] = {}
    for name, mask in keep.items():
        size, before = shapes[name].numel(), old[name]
        if 2 * int(mask.sum()) >= size or size > MAX_INT32:
            index[name] = None
        else:
            index[name] = mask.nonzero().view(-1).to(torch.int32) if before is None else before[mask]

    def keep_values(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, mask in keep.items():
            if index[name] is not None:
                found[name] = values[name][mask]
            else:
                found[name] = dense(torch.where(mask, values[name], 0.0), old[name], shapes[name].numel())
        return found

    return index, keep_values


def dense(values: Tensor, positions: Tensor | None, size: int) -> Tensor:
    """Put values at positions of a zero vector of that size; return the values themselves if `positions` is None."""
    return values if positions is None else values.new_zeros(size).index_copy_(0, positions.long(), values)
