"""How far an erasure moves activations, and where to: to another strength, or to the mean of a class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Dial:
    """The map `x ↦ x − strength · left · (right · (x − bias) − t)`, where `t` is what the target reads.

    With the mean of a class as the target it is affine concept editing (arXiv 2411.09003).

    Attributes:
        strength: 0 leaves activations as they are, 1 takes them all the way, 2 as far beyond.
        weights: How much each row of `readings` counts in the target; none for the mean.
    """

    strength: float = 1.0
    weights: tuple[float, ...] = ()

    def of(self, parts: Parts, readings: Tensor) -> Parts:
        """`left`, `right` and `bias` of the map.

        Args:
            parts: Those of the eraser.
            readings: `(rows, rank)`, none before fitting.
        """
        left, right, bias = parts
        if len(readings) and self.weights:
            target = readings.double().T @ torch.tensor(self.weights, dtype=torch.float64, device=readings.device)
            bias = (bias.double() + left.double() @ target).to(bias.dtype)
        return (left if self.strength == 1 else left * self.strength), right, bias
