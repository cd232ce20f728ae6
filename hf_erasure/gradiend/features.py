"""The frozen result of a fit: what reads a feature off a gradient, and what writes it into weights.

Both halves are dictionaries of named blocks (arXiv 2502.01406, section 3), dense or reduced to their largest entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .blocks import dot as dot_product
from .blocks import flat, flat_blocks, require_finite, sum_of_squares, total
from .pruning import check_density, select, stored_entries

ACTIVATIONS = ("tanh", "identity")


def activate(value: float, activation: str) -> float:
    """The value of the neuron for a pre-activation."""
    return math.tanh(value) if activation == "tanh" else value


def check_activation(activation: str) -> str:
    """`activation` itself.

    Raises:
        ValueError: If it is not known.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: write one of {', '.join(map(repr, ACTIVATIONS))}.")
    return activation


@dataclass(frozen=True, eq=False)
class FeatureEncoder:
    """Reads a feature off a gradient: `h = activation(scale · (⟨w, g⟩ + bias))`, with `g / ‖g‖` where `unit_norm`.

    Attributes:
        weight: Name to `(count,)` float32, the entries of the block that are read.
        index: Name to `(count,)` int32 ascending flat positions of these entries; None where they are all of the block.
        shapes: Name to the shape of the block.
        scale: Factor of the pre-activation.
        bias: Added to the inner product before `scale`.
        activation: "tanh" or "identity".
        unit_norm: Whether gradients are brought to unit norm; the norm is over all blocks that are given.
    """

    weight: dict[str, Tensor]
    index: dict[str, Tensor | None]
    shapes: dict[str, torch.Size]
    scale: float = 1.0
    bias: float = 0.0
    activation: str = "tanh"
    unit_norm: bool = False

    def __post_init__(self) -> None:
        check_activation(self.activation)
        _check_blocks("weight", self.weight, self.index, self.shapes)

    def encode(self, gradients: Mapping[str, Tensor]) -> float:
        """The value of the feature neuron for one gradient.

        Args:
            gradients: Name to gradient in the shape of the block, on any device, in any floating-point dtype. Blocks
                that the encoder does not know count for the norm only. A gradient of zeros reads as no direction.

        Raises:
            TypeError: If a gradient is not a tensor of floating-point numbers.
            ValueError: If a block is missing, has another shape or is not finite.
        """
        device = next(iter(self.weight.values())).device
        blocks = flat_blocks(gradients, self.shapes, device, "The gradient")
        projections = {name: self._project(name, block) for name, block in blocks.items()}
        value = sum(projections.values())
        require_finite(projections)
        if self.unit_norm:
            squares = {name: sum_of_squares(block) for name, block in blocks.items()}
            for name in gradients.keys() - blocks.keys():
                squares[name] = sum_of_squares(flat(name, gradients[name], gradients[name].shape, device))
            require_finite(squares)
            norm = math.sqrt(sum(squares.values()))
            value = value / norm if norm > 0 else 0.0
        return activate(self.scale * (value + self.bias), self.activation)

    def _project(self, name: str, block: Tensor) -> float:
        weight, index = self.weight[name], self.index[name]
        if weight.numel() == 0:
            return 0.0
        return dot_product(weight, block if index is None else block.index_select(0, index))

    def prune(self, density: float) -> FeatureEncoder:
        """The encoder reduced to the `ceil(density · n)` largest `|w|` over all blocks; scale and bias stay.

        Raises:
            ValueError: If `density` is not in (0, 1].
        """
        if check_density(density) == 1.0:
            return self
        support = select(self.weight.__getitem__, self.index, self.shapes, density)
        return replace(self, weight=support.of(self.weight.__getitem__), index=support.index)

    @property
    def count(self) -> int:
        """Entries that are stored."""
        return sum(w.numel() for w in self.weight.values())


@dataclass(frozen=True, eq=False)
class FeatureDecoder:
    """Says how weights change for a value of the feature neuron: `decode(h) = h · Wd + bd`.

    Attributes:
        weight: Name to `(count,)` float32, Wd.
        bias: Name to `(count,)` float32, bd, at the same entries.
        index: Name to `(count,)` int32 ascending flat positions of these entries; None where they are all of the block.
        shapes: Name to the shape of the block.
    """

    weight: dict[str, Tensor]
    bias: dict[str, Tensor]
    index: dict[str, Tensor | None]
    shapes: dict[str, torch.Size]

    def __post_init__(self) -> None:
        _check_blocks("weight", self.weight, self.index, self.shapes)
        _check_blocks("bias", self.bias, self.index, self.shapes)

    def decode(self, h: float) -> dict[str, Tensor]:
        """Name to dense float32 `h · Wd + bd` in the shape of the block, zero outside the entries kept."""
        return {name: self._decode(name, h) for name in self.shapes}

    def _decode(self, name: str, h: float) -> Tensor:
        shape, index = self.shapes[name], self.index[name]
        values = torch.add(self.bias[name], self.weight[name], alpha=h)
        if index is None:
            return values.view(shape)
        return values.new_zeros(shape.numel()).index_copy_(0, index.long(), values).view(shape)

    def prune(self, density: float) -> FeatureDecoder:
        """The decoder reduced to the `ceil(density · n)` largest `|Wd|` over all blocks, the first of equals.

        A block of which less than half is kept stores int32 positions; the others stay dense, with zeros at the
        entries that go.

        Raises:
            ValueError: If `density` is not in (0, 1], or Wd is not finite.
        """
        return prune_together([self], density)[0]

    def importance(self) -> dict[str, tuple[float, float, int]]:
        """Name to (sum of |Wd|, sum of Wd², entries kept): which weights the feature sits in."""
        return {
            name: (float(w.abs().sum(dtype=torch.float64)), sum_of_squares(w), self._kept(name))
            for name, w in self.weight.items()
        }

    def _kept(self, name: str) -> int:
        if self.index[name] is not None:
            return self.weight[name].numel()
        return int(torch.count_nonzero((self.weight[name] != 0) | (self.bias[name] != 0)))

    @property
    def count(self) -> int:
        """Entries that are kept; of dense blocks those that are not zero in both Wd and bd."""
        return sum(self._kept(name) for name in self.weight)


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
    if check_density(density) == 1.0:
        return list(decoders)
    first = decoders[0]
    for other in decoders[1:]:
        if first.shapes != other.shapes or not _same_index(first.index, other.index):
            raise ValueError("The decoders do not have the same blocks and entries: prune them before they part.")

    def score(name: str) -> Tensor:
        vectors = [decoder.weight[name].abs() for decoder in decoders]
        return torch.stack(vectors).amax(0) if len(vectors) > 1 else vectors[0]

    support = select(score, first.index, first.shapes, density)
    return [
        replace(d, weight=support.of(d.weight.__getitem__), bias=support.of(d.bias.__getitem__), index=support.index)
        for d in decoders
    ]


def _same_index(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> bool:
    for name, x in a.items():
        y = b[name]
        if (x is None) != (y is None) or (x is not None and y is not None and not torch.equal(x, y)):
            return False
    return True


def _check_blocks(
    what: str,
    values: Mapping[str, Tensor],
    index: Mapping[str, Tensor | None],
    shapes: Mapping[str, torch.Size],
) -> None:
    if not shapes or values.keys() != shapes.keys() or index.keys() != shapes.keys():
        raise ValueError(f"{what}, index and shapes must have the same names, at least one.")
    for name, shape in shapes.items():
        positions = index[name]
        count = stored_entries(positions, shape)
        if tuple(values[name].shape) != (count,):
            raise ValueError(
                f"{what} of {name!r} has shape {tuple(values[name].shape)}: it must be ({count},), "
                + (f"all of {tuple(shape)}." if positions is None else "one value per position in index.")
            )
    if total(shapes) == 0:
        raise ValueError("The blocks have no entries.")
