"""The feature neuron as the paper trains it: an encoder-decoder on gradients with one bottleneck neuron.

`h = activation(We · g + be)`, `decoded = h · Wd + bd`, mean squared error to the target, AdamW (arXiv 2502.01406,
section 3). Autograd is not used: with `r = h · Wd + bd − t` the gradients are `2/n · r` for bd, `2/n · h · r` for Wd
and `2/n · (⟨Wd, Wd⟩ h + ⟨Wd, bd⟩ − ⟨Wd, t⟩) · activation'` times g for We, where `⟨Wd, Wd⟩` and `⟨Wd, bd⟩` are kept
from the step before. So one step reads We, g, Wd and t once for the inner products, and then all vectors once, in
pieces that stay in cache: gradients exist for only one piece at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import check_state, flat_block, piece_size, pieces, require_finite, sum_of_squares, total
from .features import ACTIVATIONS, Feature, FeatureDecoder, FeatureEncoder

KINDS = ("values", "first", "second")
PARTS = ("encoder", "decoder", "decoder_bias")
# In float32 numbers: each vector begins at a multiple of it, 64 bytes, where vector instructions are fastest.
ALIGNED = 16


class Step(NamedTuple):
    """The results of one training step, from before the weights changed."""

    loss: float  # The mean squared error of the decoded gradient, over all n entries.
    encoded: float  # The value of the feature neuron.


Piece = list[tuple[str, int, int]]  # ranges of entries: name of the block, start, stop


def _cut_into_pieces(shapes: Mapping[str, torch.Size], size: int) -> list[Piece]:
    """Cut all entries, in order, into pieces of at most `size`: small blocks share one, large blocks take several."""
    result: list[Piece] = []
    room = 0
    for name, shape in shapes.items():
        for start in range(0, shape.numel(), size):
            stop = min(shape.numel(), start + size)
            if room < stop - start:
                result.append([])
                room = size
            result[-1].append((name, start, stop))
            room -= stop - start
    return result


class FeatureNeuron:
    """The trained estimator over named blocks of gradients.

    Memory: nine vectors of all n entries (We, Wd and bd, each with two moments), and temporaries of one piece.

    Attributes:
        shapes: Name to shape of every block.
        activation: "tanh" or "identity".
        lr: The learning rate; it may be changed between steps.
        steps: The number of steps so far.
    """

    def __init__(
        self,
        shapes: Mapping[str, Iterable[int]],
        *,
        activation: str = "tanh",
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        """Draw the weights as the reference code does: We and be uniform in ±1/√n, Wd and bd uniform in ±max(We).

        Args:
            shapes: Name to shape of every block.
            activation: "tanh" or "identity".
            lr: Learning rate of AdamW.
            betas: Decay rates of AdamW's moments.
            eps: AdamW's ε.
            weight_decay: AdamW's decoupled weight decay.
            seed: The seed of the initial weights, which are drawn on the CPU, so that they are the same on all devices.
            device: The device of the weights and moments; None is the CPU.

        Raises:
            ValueError: If an argument is out of its range.
        """
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}: write one of {', '.join(map(repr, ACTIVATIONS))}.")
        self.activation = activation
        self.device = torch.device(device or "cpu")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        for name, value, upper in (
            ("lr", lr, math.inf),
            ("betas[0]", betas[0], 1.0),
            ("betas[1]", betas[1], 1.0),
            ("eps", eps, math.inf),
            ("weight_decay", weight_decay, math.inf),
        ):
            if not 0.0 <= value < upper:
                raise ValueError(f"{name} is {value!r}: write a number of at least 0 and below {upper}.")
        self.steps = 0
        self._n = total(self.shapes)
        aligned = math.ceil(self._n / ALIGNED) * ALIGNED
        # (kinds, parts, n): the values and AdamW's moments of We, Wd and bd; and (kinds, 1) the same of be.
        vectors = torch.zeros(len(KINDS), len(PARTS), aligned, dtype=torch.float32, device=self.device)
        self._vectors = vectors[..., : self._n]
        self._encoder_bias = torch.zeros(len(KINDS), 1, dtype=torch.float32, device=self.device)
        self._pieces = _cut_into_pieces(self.shapes, piece_size(self.device))
        self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        def draw(vector: Tensor, bound: float) -> None:
            drawn = torch.empty(vector.shape, dtype=torch.float32, device="cpu")
            vector.copy_(drawn.uniform_(-bound, bound, generator=generator))

        encoder, decoder, decoder_bias = self._vectors[0]
        for vector in (encoder, self._encoder_bias[0]):
            draw(vector, 1.0 / math.sqrt(self._n))
        bound = abs(float(encoder.max()))
        for vector in (decoder, decoder_bias):
            draw(vector, bound)
        self._square, self._cross = _column_sums([_decoder_products(*views) for views in pieces(decoder, decoder_bias)])

    def _blocks(self, vector: Tensor) -> dict[str, Tensor]:
        """Name to `(count,)`: views of a vector that holds all blocks."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        return dict(zip(self.shapes, vector.split(sizes), strict=True))

    def encoder(self) -> FeatureEncoder:
        """The encoder as it is now: it reads gradients with the neuron's own weights, until the next step."""
        own, shapes, bias = self._blocks(self._vectors[0, 0]), dict(self.shapes), float(self._encoder_bias[0])
        return FeatureEncoder(own, dict.fromkeys(shapes), shapes, bias=bias, activation=self.activation)

    @torch.no_grad()
    def step(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Step:
        """One step of AdamW on the mean squared error between the decoded source and the target.

        Args:
            source: Name to source gradient in the block's shape, any floating-point dtype.
            target: Name to target in the block's shape, any floating-point dtype; may be the same as `source`.

        Raises:
            KeyError: If a block is missing.
            TypeError: If a gradient is not a tensor of floating-point numbers.
            ValueError: If a block has another shape, or is not finite or too large for float32; or if the neuron
                itself has diverged. Nothing is changed, whatever is raised.
        """
        sources, targets = (
            {name: flat_block(name, blocks[name], shape, self.device) for name, shape in self.shapes.items()}
            for blocks in (source, target)
        )
        projection, overlap = self._inner_products(sources, targets)
        h, derivative = projection + float(self._encoder_bias[0]), 1.0
        if self.activation == "tanh":
            # torch's tanh, so that results are bit for bit those of earlier releases, whose values were tensors.
            h = float(torch.tensor(h, dtype=torch.float64).tanh())
            derivative = 1.0 - h * h
        slope = (self._square * h + self._cross - overlap) * (2.0 / self._n) * derivative
        self.steps += 1
        count = torch.tensor(self.steps, dtype=torch.float32, device=self.device)
        sums = []
        for vectors, g, t in self._state_pieces(sources, targets):
            _, decoder, decoder_bias = vectors[0]
            residual = torch.sub(decoder_bias, t).add_(decoder, alpha=h)
            squared_error = torch.dot(residual, residual)
            residual.mul_(2.0 / self._n)
            self._adamw(vectors, [g * slope, residual * h, residual], count)
            sums.append([*_decoder_products(decoder, decoder_bias), squared_error])
        slopes = torch.tensor([slope], dtype=torch.float64).to(self.device, torch.float32)
        self._adamw(self._encoder_bias[:, None], [slopes], count)
        self._square, self._cross, squares = _column_sums(sums)
        return Step(self._check_finite(squares) / self._n, h)

    def _state_pieces(self, *given: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """For each piece the state `(kinds, parts, count)`, and the same entries of `given` in float32."""
        sizes = [sum(stop - start for _, start, stop in piece) for piece in self._pieces]
        for piece, vectors in zip(self._pieces, self._vectors.split(sizes, -1), strict=True):
            parts = ([blocks[name][start:stop].float() for name, start, stop in piece] for blocks in given)
            yield vectors, *(own[0] if len(own) == 1 else torch.cat(own) for own in parts)

    def _inner_products(self, sources: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[float, float]:
        """Return `⟨We, g⟩` and `⟨Wd, t⟩`; raise an error if a number is not finite."""
        products: list[list[Tensor]] = []
        for vectors, g, t in self._state_pieces(sources, targets):
            encoder, decoder, _ = vectors[0]
            products.append([torch.dot(encoder, g), torch.dot(decoder, t), torch.dot(t, t)])
        sums = _column_sums(products)
        if not all(map(math.isfinite, sums)):
            # A product with a number that is not finite is not finite, so the inner products find every such number.
            for what, blocks in (("source gradient", sources), ("target", targets)):
                require_finite({name: sum_of_squares(block) for name, block in blocks.items()}, what)
        for value in (*sums, self._square):
            self._check_finite(value)
        return sums[0], sums[1]

    def _adamw(self, vectors: Tensor, gradients: list[Tensor], count: Tensor) -> None:
        """Take one step of AdamW on `(kinds, parts, entries)`."""
        values, first, second = (list(kind) for kind in vectors)
        beta1, beta2 = self.betas
        torch._fused_adamw_(
            values, gradients, first, second, [], [count] * len(values), lr=self.lr, beta1=beta1, beta2=beta2,
            weight_decay=self.weight_decay, eps=self.eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    def _check_finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(
                f"After {self.steps} steps the loss is not finite, but the gradients are: they are too large for "
                f"float32, or the neuron has diverged. Start anew with a learning rate below {self.lr:g}."
            )
        return value

    def flip(self) -> None:
        """Swap the two ends of the neuron: We, be, Wd and their first moments change sign; bd stays.

        Training continues as if the weights had had the opposite signs from the start.
        """
        self._vectors[:2, :2].neg_()
        self._encoder_bias[:2].neg_()
        self._cross = -self._cross

    def feature(self) -> Feature:
        """Return the neuron as a frozen dense feature, in tensors of its own."""
        weight, decoder, bias = (
            {name: block.clone() for name, block in self._blocks(vector).items()} for vector in self._vectors[0]
        )
        encoder = replace(self.encoder(), weight=weight)
        return Feature(encoder, FeatureDecoder(decoder, bias, encoder.index, encoder.shapes))

    def _state_views(self) -> dict[str, Tensor]:
        """All vectors of the state by their names in `state_dict`, not copied."""
        found = {}
        for kind, vectors, bias in zip(KINDS, self._vectors, self._encoder_bias, strict=True):
            found[f"encoder_bias/{kind}"] = bias
            for part, vector in zip(PARTS, vectors, strict=True):
                found |= {f"{part}/{kind}/0/{name}": block for name, block in self._blocks(vector).items()}
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the weights, AdamW's moments and settings, the running scalars and the count of steps.

        Names are `encoder/values|first|second/0/block`, `decoder/…`, `decoder_bias/…` and a few small ones.
        """
        settings = [self.lr, *self.betas, self.eps, self.weight_decay, list(ACTIVATIONS).index(self.activation)]
        return {name: tensor.clone() for name, tensor in self._state_views().items()} | {
            "gram": torch.tensor([[self._square]], dtype=torch.float64),
            "cross": torch.tensor([self._cross], dtype=torch.float64),
            "settings": torch.tensor(settings, dtype=torch.float64),
            "steps": torch.tensor(self.steps),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state by a result of `state_dict`; training continues bit for bit as it would have there.

        Raises:
            ValueError: If an entry is missing, unknown, has another shape or is not finite, or the activations differ.
                Nothing is changed then.
        """
        tensors = self._state_views()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        check_state(state, shapes | {"gram": (1, 1), "cross": (1,), "settings": (6,), "steps": ()})
        *settings, activation = state["settings"].tolist()
        if list(ACTIVATIONS)[int(activation)] != self.activation:
            raise ValueError(
                f"The state is of a neuron with another activation than {self.activation!r}, which this neuron has: "
                "make one with the activation of the state."
            )
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
        self._square, self._cross = float(state["gram"]), float(state["cross"])
        self.lr, *betas, self.eps, self.weight_decay = settings
        self.betas = (betas[0], betas[1])
        self.steps = int(state["steps"])


def _decoder_products(decoder: Tensor, bias: Tensor) -> list[Tensor]:
    """`⟨Wd, Wd⟩` and `⟨Wd, bd⟩` of a piece."""
    return [torch.dot(decoder, decoder), torch.dot(decoder, bias)]


def _column_sums(sums: list[list[Tensor]]) -> list[float]:
    """Add rows of float32 sums, one row for each piece, in float64."""
    rows = torch.stack([value for row in sums for value in row]).double().view(len(sums), -1)
    found: list[float] = rows.sum(0).tolist()
    return found
