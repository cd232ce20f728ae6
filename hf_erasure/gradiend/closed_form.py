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

from .blocks import as_shapes, check_state, dot, flat_block, pieces, require_finite
from .features import Feature, FeatureDecoder, FeatureEncoder

SIGNS = (1, -1)
PARTS = {("source", 1): "source+", ("source", -1): "source-", ("target", 1): "target+", ("target", -1): "target-"}


class ClosedFormEstimator:
    """Class means of unit source gradients and of targets, in float32 as running means.

    A running mean (`mean += (x − mean) / k`) stays within float32's rounding of the mean over hundreds of thousands of
    batches; a running sum would drift. Sources and targets are added block by block, as a backward pass produces them,
    and are not kept; the norm of a source is taken over all its blocks, so it must be known before.

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

        Raises:
            ValueError: If there are no blocks, or one has no entries.
        """
        self.shapes = as_shapes(shapes)
        self.device = torch.device(device or "cpu")
        self._means = {
            part: {
                name: torch.zeros(shape.numel(), dtype=torch.float32, device=self.device)
                for name, shape in self.shapes.items()
            }
            for part in PARTS
        }
        self.counts = {part: dict.fromkeys(self.shapes, 0) for part in PARTS}
        # The blocks of the current batch that were already added, with their signs.
        self._batch_signs: dict[str, dict[str, int]] = {"source": {}, "target": {}}

    def add_source(self, name: str, gradient: Tensor, norm: float, sign: int) -> None:
        """Add one block of the source gradient of the current batch, scaled to unit norm.

        Args:
            name: The name of the block.
            gradient: The source gradient in the block's shape, any floating-point dtype.
            norm: The norm of the whole source gradient, over all blocks.
            sign: +1 or −1, the class of the batch.

        Raises:
            TypeError: If the gradient is not a tensor of floating-point numbers.
            ValueError: If the block is unknown or was already added, has another shape or is not finite, the norm is
                not a positive number, or the sign is neither. Nothing is changed then.
        """
        if not (math.isfinite(norm) and norm > 0):
            raise ValueError(f"The source gradient has the norm {norm}, so it has no direction: leave this batch out.")
        self._add_block("source", name, gradient, sign, 1.0 / norm)

    def add_target(self, name: str, gradient: Tensor, sign: int) -> None:
        """Add one block of the target of the current batch; the arguments and the errors are those of
        `add_source`.
        """
        self._add_block("target", name, gradient, sign, 1.0)

    @torch.no_grad()
    def _add_block(self, kind: str, name: str, gradient: Tensor, sign: int, factor: float) -> None:
        """Check one block, and add it to the mean only if no check fails."""
        _check_sign(sign)
        if name in self._batch_signs[kind]:
            raise ValueError(
                f"Block {name!r} of the {kind} was already added in this batch: add a parameter's gradient when it is "
                "complete, and call end_batch, or drop_batch, between batches."
            )
        if name not in self.shapes:
            raise ValueError(f"There is no block {name!r}: the estimator was declared with {_listed(self.shapes)}.")
        block = flat_block(name, gradient, self.shapes[name], self.device)
        # The sum is not finite if an entry is not, or if it overflows: only then are the entries checked.
        quick = block.sum(dtype=torch.float64 if block.dtype == torch.float64 else torch.float32)
        if not (bool(torch.isfinite(quick)) or bool(torch.isfinite(block).all())):
            require_finite({name: math.nan}, "source gradient" if kind == "source" else kind)
        self._batch_signs[kind][name] = sign
        self.counts[kind, sign][name] += 1
        share = 1.0 / self.counts[kind, sign][name]
        for mean, piece in pieces(self._means[kind, sign][name], block):
            piece = piece.float()
            mean.lerp_(piece if factor == 1.0 else piece * factor, share)

    def end_batch(self, sign: int) -> None:
        """Close the batch.

        Args:
            sign: +1 or −1, the class of the batch.

        Raises:
            ValueError: If the source or the target of a block was not added, or was added with the other sign.
        """
        _check_sign(sign)
        lacking = {kind: [name for name in self.shapes if name not in held] for kind, held in self._batch_signs.items()}
        if lacking["source"] or lacking["target"]:
            what = "its source" if lacking["source"] else f"the target of {_listed(lacking['target'])}"
            raise ValueError(f"The batch cannot be closed: {what} was not added. Add it, or call drop_batch.")
        if {*self._batch_signs["source"].values(), *self._batch_signs["target"].values()} != {sign}:
            raise ValueError(f"Not all of the batch was added with sign {sign:+d}: call drop_batch and fit anew.")
        self.drop_batch()

    def drop_batch(self) -> None:
        """Close a batch after a failure inside it, without checks.

        The blocks that were added stay in their means. The mean of each block is over the batches in which that block
        was added, so the means remain means.
        """
        self._batch_signs = {"source": {}, "target": {}}

    def pool(
        self, shares: Sequence[Mapping[tuple[str, int], Mapping[str, int]]], add: Callable[[Tensor], None]
    ) -> None:
        """Merge, in every process at once, the estimators of all processes; nothing is copied.

        `shares` are the `counts` of all processes; `add` adds a tensor over all processes, in place. Raises a
        `ValueError` if a batch is open.
        """
        self._require_closed("added to others")
        for part in PARTS:
            for name, mean in self._means[part].items():
                total = sum(counts[part][name] for counts in shares)
                if total:
                    mean.mul_(self.counts[part][name] / total)
                    add(mean)
                    self.counts[part][name] = total

    def _require_closed(self, verb: str) -> None:
        if any(self._batch_signs.values()):
            raise ValueError(f"A batch is open: call end_batch, or drop_batch, before the estimator is {verb}.")

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the means and counts: `source+/name`, `source-/name`, `target+/name`, `target-/name` and counts.

        Raises:
            ValueError: If a batch is open.
        """
        self._require_closed("saved")
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
        self.drop_batch()

    @torch.no_grad()
    def feature(self, *, consume: bool = False) -> Feature:
        """Return the dense feature, in tensors of its own.

        Args:
            consume: Free the means block by block, so that the memory does not grow; the estimator cannot be used
                afterwards.

        Raises:
            ValueError: If there was no batch of a sign, or the mean gradients of the two classes are equal.
        """
        for part, prefix in PARTS.items():
            if min(self.counts[part].values(), default=0) == 0:
                raise ValueError(
                    f"No batch of sign {part[1]:+d} has added its {part[0]} ({prefix}): a feature needs batches of "
                    "both classes."
                )
        take = dict.pop if consume else dict.__getitem__
        source, decoder, bias = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        readings: dict[int, dict[str, float]] = {1: {}, -1: {}}
        for name in self.shapes:
            means = {sign: take(self._means["source", sign], name) for sign in SIGNS}
            source[name] = means[1] - means[-1]
            for sign, mean in means.items():
                readings[sign][name] = dot(source[name], mean)
            plus, minus = (take(self._means["target", sign], name) for sign in SIGNS)
            decoder[name], bias[name] = (plus - minus).mul_(0.5), (plus + minus).mul_(0.5)
        if consume:
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


def _check_sign(sign: int) -> None:
    if sign not in SIGNS:
        raise ValueError(f"sign is {sign!r}: write 1 for a batch of the class that is read as +1, -1 for the other.")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
