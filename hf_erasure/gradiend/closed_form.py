"""A feature from class means of gradients: one pass, without an optimizer, with four vectors of memory.

With unit source gradients `ĝ` and targets `d` of batches of sign ±1: `w = mean(ĝ | +) − mean(ĝ | −)`,
`h = tanh(c · (⟨w, ĝ⟩ + b))` with c and b such that the class means of `⟨w, ĝ⟩` are mapped to ±0.9, and
`Wd = (mean(d | +) − mean(d | −)) / 2`, `bd = (mean(d | +) + mean(d | −)) / 2`. These minimise the squared error of
`h · Wd + bd` to the targets (the loss of arXiv 2502.01406, section 3) for h = ±1, with equal weights of the classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .blocks import check_state, dot, flat_block, pieces, require_finite
from .features import Feature, FeatureDecoder, FeatureEncoder

SIGNS = (1, -1)
PARTS = {("source", 1): "source+", ("source", -1): "source-", ("target", 1): "target+", ("target", -1): "target-"}


class ClosedFormEstimator:
    """Class means of unit source gradients and of targets, in float32 as running means.

    A running mean (`mean += (x − mean) / k`) stays within float32's rounding of the mean over hundreds of thousands of
    batches; a running sum would drift. Sources and targets are added block by block, as a backward pass produces them,
    and are not kept; the norm of a source is taken over all its blocks, so it must be known before. The mean of a block
    is over the batches in which that block was added.

    Attributes:
        shapes: Name to shape of every block.
        device: The device of the means.
        counts: For each part and sign, name of a block to the number of batches in its mean.
    """

    def __init__(self, shapes: Mapping[str, Iterable[int]], device: torch.device | str | None = None) -> None:
        """Start with no batches.

        Args:
            shapes: Name to shape of every block.
            device: The device of the means; None is the CPU.
        """
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.device = torch.device(device or "cpu")
        self._means = {
            part: {
                name: torch.zeros(shape.numel(), dtype=torch.float32, device=self.device)
                for name, shape in self.shapes.items()
            }
            for part in PARTS
        }
        self.counts = {part: dict.fromkeys(self.shapes, 0) for part in PARTS}

    @torch.no_grad()
    def add(self, kind: str, name: str, gradient: Tensor, sign: int, norm: float = 1.0) -> None:
        """Add one block of a batch to its mean.

        Args:
            kind: "source" or "target".
            name: The name of the block.
            gradient: The gradient in the block's shape, any floating-point dtype.
            sign: 1 for a batch of the class that is read as +1, −1 for the other.
            norm: The norm of the whole source gradient, over all blocks: a source is scaled to unit norm.

        Raises:
            KeyError: If the kind, the block or the sign is not known.
            TypeError: If the gradient is not a tensor of floating-point numbers.
            ValueError: If the block has another shape or is not finite, or the norm is not a positive number. Nothing
                is changed, whatever is raised.
        """
        if not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"The source gradient has the norm {norm}, so it has no direction: leave this batch out.")
        block = flat_block(name, gradient, self.shapes[name], self.device)
        # The sum is not finite if an entry is not, or if it overflows: only then are the entries checked.
        quick = block.sum(dtype=torch.float64 if block.dtype == torch.float64 else torch.float32)
        if not (bool(torch.isfinite(quick)) or bool(torch.isfinite(block).all())):
            require_finite({name: math.nan}, "source gradient" if kind == "source" else kind)
        self.counts[kind, sign][name] += 1
        share = 1.0 / self.counts[kind, sign][name]
        for mean, piece in pieces(self._means[kind, sign][name], block):
            piece = piece.float()
            mean.lerp_(piece if norm == 1.0 else piece * (1.0 / norm), share)

    def pool(
        self, shares: Sequence[Mapping[tuple[str, int], Mapping[str, int]]], add: Callable[[Tensor], None]
    ) -> None:
        """Merge, in every process at once, the estimators of all processes; nothing is copied.

        `shares` are the `counts` of all processes; `add` adds a tensor over all processes, in place.
        """
        for part in PARTS:
            for name, mean in self._means[part].items():
                total = sum(counts[part][name] for counts in shares)
                if total:
                    mean.mul_(self.counts[part][name] / total)
                    add(mean)
                    self.counts[part][name] = total

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the means and counts: `source+/name`, `source-/name`, `target+/name`, `target-/name` and counts."""
        state = {}
        for part, prefix in PARTS.items():
            state[f"{prefix}count"] = torch.tensor(list(self.counts[part].values()))
            state |= {f"{prefix}/{name}": mean.clone() for name, mean in self._means[part].items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the means and counts by a result of `state_dict`.

        Raises:
            ValueError: If an entry is missing, has another shape or is not finite. Nothing is changed then.
        """
        expected = {f"{prefix}/{name}": (s.numel(),) for prefix in PARTS.values() for name, s in self.shapes.items()}
        expected |= {f"{prefix}count": (len(self.shapes),) for prefix in PARTS.values()}
        check_state(state, expected)
        for part, prefix in PARTS.items():
            self.counts[part] = dict(zip(self.shapes, state[f"{prefix}count"].tolist(), strict=True))
            for name, mean in self._means[part].items():
                mean.copy_(state[f"{prefix}/{name}"])

    @torch.no_grad()
    def feature(self) -> Feature:
        """Return the dense feature, and free the means block by block, so that the memory does not grow.

        The estimator cannot be used afterwards.

        Raises:
            ValueError: If there was no batch of a sign, or the mean gradients of the two classes are equal.
        """
        for part, prefix in PARTS.items():
            if min(self.counts[part].values(), default=0) == 0:
                raise ValueError(
                    f"No batch of sign {part[1]:+d} has added its {part[0]} ({prefix}): a feature needs batches of "
                    "both classes."
                )
        source, decoder, bias = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        readings: dict[int, dict[str, float]] = {1: {}, -1: {}}
        for name in self.shapes:
            means = {sign: self._means["source", sign].pop(name) for sign in SIGNS}
            source[name] = means[1] - means[-1]
            for sign, mean in means.items():
                readings[sign][name] = dot(source[name], mean)
            plus, minus = (self._means["target", sign].pop(name) for sign in SIGNS)
            decoder[name], bias[name] = (plus - minus).mul_(0.5), (plus + minus).mul_(0.5)
        self.counts = {part: {} for part in PARTS}
        for found in readings.values():
            require_finite(found)
        high, low = (sum(readings[sign].values()) for sign in SIGNS)
        if not high > low:
            raise ValueError(
                "The mean source gradients of the two classes are equal, so there is nothing to read: check that the "
                "batches of the two signs differ."
            )
        everywhere, shapes = dict.fromkeys(self.shapes), dict(self.shapes)
        reader = FeatureEncoder(source, everywhere, shapes, activation="identity")
        encoder = replace(reader.centred(high, low), activation="tanh", unit_norm=True)
        return Feature(encoder, FeatureDecoder(decoder, bias, everywhere, shapes))
