"""The feature neuron as the paper trains it: an encoder-decoder on gradients with one bottleneck neuron, or a few.

`h = activation(We · g + be)`, `decoded = h · Wd + bd`, mean squared error to the target, AdamW (arXiv 2502.01406,
section 3). No autograd: with `r = h · Wd + bd − t` the gradients are `2/n · r` for bd, `2/n · h · r` for Wd and
`2/n · (G h + ⟨Wd, bd⟩ − ⟨Wd, t⟩) · activation'` times g for We, where the Gram matrix `G = ⟨Wd, Wd⟩` and `⟨Wd, bd⟩` are
kept from the step before. So one step reads We, g, Wd and t once for the inner products, and then goes over all
vectors once, in pieces that stay in cache: gradients exist for a piece at a time only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import as_shapes, check_state, dot, flat_blocks, piece_size, pieces, require_finite, sum_of_squares, total
from .features import ACTIVATIONS, Feature, FeatureDecoder, FeatureEncoder, check_activation
from .selection import check_density, select

Vectors = list[Tensor]
KINDS = ("values", "first", "second")


@dataclass(frozen=True)
class Step:
    """What one training step found, before the weights changed.

    Attributes:
        loss: Mean squared error of the decoded gradient, over all n entries.
        encoded: `(latent_dim,)` float64 values of the feature neurons.
    """

    loss: float
    encoded: Tensor


class _Trained:
    """Vectors `(n,)` float32 with their AdamW moments: one per neuron, or a single bias, or none."""

    def __init__(self, values: Vectors) -> None:
        self.values = values
        self.first = [torch.zeros_like(value) for value in values]
        self.second = [torch.zeros_like(value) for value in values]

    def negate(self, row: int) -> None:
        self.values[row].neg_()
        self.first[row].neg_()


class _Segment(NamedTuple):
    """What a piece holds of one block: `block[start:stop]` lies at `piece[first:last]`."""

    name: str
    start: int
    stop: int
    first: int
    last: int


class _Piece(NamedTuple):
    """Entries `start:stop` of the vectors, updated together."""

    start: int
    stop: int
    segments: list[_Segment]


def _cut_into_pieces(shapes: Mapping[str, torch.Size], size: int) -> list[_Piece]:
    """All entries in pieces of `size`: small blocks share one, large blocks take several."""
    result, position, n = [_Piece(0, min(size, total(shapes)), [])], 0, total(shapes)
    for name, shape in shapes.items():
        start = 0
        while start < shape.numel():
            if position == result[-1].stop:
                result.append(_Piece(position, min(position + size, n), []))
            first = position - result[-1].start
            count = min(shape.numel() - start, result[-1].stop - position)
            result[-1].segments.append(_Segment(name, start, start + count, first, first + count))
            start, position = start + count, position + count
    return result


class FeatureNeuron:
    """The trained estimator over named blocks of gradients.

    Memory: nine vectors of all n entries (We, Wd and bd, each with two moments) for one neuron, 6 · latent_dim + 3 in
    general, and temporaries of one piece.

    Attributes:
        shapes: Name to shape of every block.
        latent_dim: How many neurons.
        activation: "tanh" or "identity".
        lr: Learning rate; may be changed between steps.
        steps: How many steps were taken.
    """

    def __init__(
        self,
        shapes: Mapping[str, Iterable[int]],
        *,
        latent_dim: int = 1,
        activation: str = "tanh",
        decoder_bias: bool = True,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        """Draw the weights as the reference does: We and be uniform in ±1/√n, Wd and bd uniform in ±max(We).

        Args:
            shapes: Name to shape of every block.
            latent_dim: How many neurons.
            activation: "tanh" or "identity".
            decoder_bias: Whether the decoder has a bias bd.
            lr: Learning rate of AdamW.
            betas: Decay rates of AdamW's moments.
            eps: AdamW's ε.
            weight_decay: AdamW's decoupled weight decay.
            seed: Of the initial weights; they are drawn on the CPU, so that all devices start alike.
            device: Where everything lives; None is the CPU.

        Raises:
            ValueError: If there is no block, or an argument is out of its range.
        """
        self.shapes = as_shapes(shapes)
        self.activation = check_activation(activation)
        if not isinstance(latent_dim, int) or latent_dim < 1:
            raise ValueError(f"latent_dim is {latent_dim!r}: write the number of feature neurons, at least 1.")
        self.latent_dim = latent_dim
        self.device = torch.device(device or "cpu")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self._check_settings()
        self.steps = 0
        self._n = total(self.shapes)
        sizes = [shape.numel() for shape in self.shapes.values()]
        self._starts = dict(zip(self.shapes, accumulate(sizes, initial=0), strict=False))
        self._pieces = _cut_into_pieces(self.shapes, piece_size(self.device))
        self._initialise(torch.Generator().manual_seed(seed), decoder_bias)
        self._measure()

    def _check_settings(self) -> None:
        for name, value, upper in (
            ("lr", self.lr, math.inf),
            ("betas[0]", self.betas[0], 1.0),
            ("betas[1]", self.betas[1], 1.0),
            ("eps", self.eps, math.inf),
            ("weight_decay", self.weight_decay, math.inf),
        ):
            if not 0.0 <= value < upper:
                raise ValueError(f"{name} is {value!r}: write a number from 0 up to and without {upper}.")

    def _initialise(self, generator: torch.Generator, decoder_bias: bool) -> None:
        def rows(count: int, length: int, bound: float) -> _Trained:
            drawn = (
                torch.empty(length, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
                for _ in range(count)
            )
            return _Trained([row.to(self.device) for row in drawn])

        bound = 1.0 / math.sqrt(self._n)
        self._encoder = rows(self.latent_dim, self._n, bound)
        self._encoder_bias = rows(1, self.latent_dim, bound)
        bound = abs(max(float(row.max()) for row in self._encoder.values))
        self._decoder = rows(self.latent_dim, self._n, bound)
        self._decoder_bias = rows(1 if decoder_bias else 0, self._n, bound)

    def _view(self, vector: Tensor, name: str) -> Tensor:
        """`(count,)`: the entries of one block."""
        return vector[self._starts[name] : self._starts[name] + self.shapes[name].numel()]

    @torch.no_grad()
    def _measure(self) -> None:
        """Recompute `⟨Wd, Wd⟩` and `⟨Wd, bd⟩`."""
        sums = _Sums(self.latent_dim)
        for views in pieces(*self._decoder.values, *self._decoder_bias.values):
            sums.add(list(views[: self.latent_dim]), list(views[self.latent_dim :]))
        self._gram, self._cross, _ = sums.result()

    def encode(self, source: Mapping[str, Tensor]) -> Tensor:
        """`(latent_dim,)` float64 on the CPU: the values of the feature neurons for one gradient.

        Args:
            source: Name to gradient in the block's shape, any floating-point dtype.

        Raises:
            TypeError: If a gradient is not a tensor of floating-point numbers.
            ValueError: If a block is missing, has another shape or is not finite.
        """
        blocks = flat_blocks(source, self.shapes, self.device, "The source")
        sums = torch.zeros(self.latent_dim, dtype=torch.float64)
        for name, block in blocks.items():
            found = [dot(self._view(row, name), block) for row in self._encoder.values]
            require_finite({name: sum(found)}, "source gradient")
            sums += torch.tensor(found, dtype=torch.float64)
        return self._activate(sums)

    def _activate(self, projections: Tensor) -> Tensor:
        values = projections + self._encoder_bias.values[0].double().cpu()
        return torch.tanh(values) if self.activation == "tanh" else values

    @torch.no_grad()
    def step(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Step:
        """One step of AdamW on the mean squared error between the decoded source and the target.

        Args:
            source: Name to source gradient in the block's shape, any floating-point dtype.
            target: Name to target, likewise; may be the same as `source`.

        Raises:
            TypeError: If a gradient is not a tensor of floating-point numbers.
            ValueError: If a block is missing, has another shape, or is not finite or too large for float32; or if the
                neuron itself has diverged. Nothing is changed then.
        """
        sources = flat_blocks(source, self.shapes, self.device, "The source")
        targets = flat_blocks(target, self.shapes, self.device, "The target")
        projections, overlap = self._read(sources, targets)
        encoded = self._activate(projections)
        slope = (self._gram @ encoded + self._cross - overlap) * (2.0 / self._n)
        if self.activation == "tanh":
            slope = slope * (1.0 - encoded.square())
        self.steps += 1
        update = _Update(self, encoded.tolist(), slope.tolist())
        for piece in self._pieces:
            update.piece(piece, sources, targets)
        update.adamw(self._encoder_bias, slope.to(self.device, torch.float32))
        self._gram, self._cross, squares = update.sums.result()
        return Step(self._finite(squares) / self._n, encoded)

    def _read(self, sources: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`(latent_dim,)` float64 each: `⟨We, g⟩` and `⟨Wd, t⟩`, once everything is known to be finite."""
        products: Vectors = []
        k = self.latent_dim
        for piece in self._pieces:
            for name, start, stop, first, last in piece.segments:
                own = slice(piece.start + first, piece.start + last)
                g, t = sources[name][start:stop].float(), targets[name][start:stop].float()
                products += [torch.dot(row[own], g) for row in self._encoder.values]
                products += [torch.dot(row[own], t) for row in self._decoder.values]
                products.append(torch.dot(t, t))
        sums = torch.stack(products).double().view(-1, 2 * k + 1).sum(0).cpu()
        if not bool(torch.isfinite(sums).all()):
            # Nothing times a number that is not finite is finite, so the inner products find it wherever it is.
            for what, blocks in (("source gradient", sources), ("target", targets)):
                require_finite({name: sum_of_squares(block) for name, block in blocks.items()}, what)
        for value in (*sums.tolist(), *self._gram.flatten().tolist()):
            self._finite(value)
        return sums[:k], sums[k : 2 * k]

    def _finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(
                f"After {self.steps} steps the loss is not finite although the gradients are: they are too large for "
                f"float32, or the neuron has diverged. Start anew with a learning rate below {self.lr:g}."
            )
        return value

    def flip(self, latent: int = 0) -> None:
        """Exchange the two ends of a neuron: We, be, Wd and their first moments change sign; bd stays.

        Training goes on as it would have with the signs chosen otherwise at the start.

        Raises:
            ValueError: If there is no such neuron.
        """
        self._check_latent(latent)
        for trained in (self._encoder, self._decoder):
            trained.negate(latent)
        for tensor in (self._encoder_bias.values[0], self._encoder_bias.first[0], self._cross):
            tensor[latent].neg_()
        self._gram[latent].neg_()
        self._gram[:, latent].neg_()

    def _check_latent(self, latent: int) -> None:
        if not 0 <= latent < self.latent_dim:
            raise ValueError(f"latent is {latent}: there are {self.latent_dim} neurons, counted from 0.")

    def feature(self, latent: int = 0, density: float = 1.0, *, encoder_density: float = 1.0) -> Feature:
        """A neuron as a frozen feature, in tensors of its own.

        Args:
            latent: Which neuron, counted from 0.
            density: Share of all entries that the decoder keeps, those of largest `|Wd|`. Below 1 no dense copy is
                made.
            encoder_density: Share that the encoder keeps, those of largest `|We|`.

        Raises:
            ValueError: If there is no such neuron, a density is not in (0, 1], or the weights are not finite.
        """
        self._check_latent(latent)
        check_density(density)
        check_density(encoder_density)
        old = dict.fromkeys(self.shapes)

        def encoder(name: str) -> Tensor:
            return self._view(self._encoder.values[latent], name)

        def decoder(name: str) -> Tensor:
            return self._view(self._decoder.values[latent], name)

        def bias(name: str) -> Tensor:
            values = self._decoder_bias.values
            return self._view(values[0], name) if values else torch.zeros_like(decoder(name))

        read = select(encoder, old, self.shapes, encoder_density)
        written = select(decoder, old, self.shapes, density)
        return Feature(
            FeatureEncoder(
                _copies(read.of(encoder)),
                read.index,
                dict(self.shapes),
                bias=float(self._encoder_bias.values[0][latent]),
                activation=self.activation,
            ),
            FeatureDecoder(_copies(written.of(decoder)), _copies(written.of(bias)), written.index, dict(self.shapes)),
        )

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by its name in `state_dict`, not copied."""
        found = {"gram": self._gram, "cross": self._cross}
        for kind in KINDS:
            found[f"encoder_bias/{kind}"] = getattr(self._encoder_bias, kind)[0]
            for part in ("encoder", "decoder", "decoder_bias"):
                for row, vector in enumerate(getattr(getattr(self, f"_{part}"), kind)):
                    found |= {f"{part}/{kind}/{row}/{name}": self._view(vector, name) for name in self.shapes}
        return found

    def _settings(self) -> Tensor:
        return torch.tensor(
            [self.lr, *self.betas, self.eps, self.weight_decay, ACTIVATIONS.index(self.activation)], dtype=torch.float64
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the weights, AdamW's moments and settings, the running scalars and the count of steps.

        Names are `encoder/values|first|second/neuron/block`, `decoder/…`, `decoder_bias/…` and a few small ones.
        """
        state = {name: tensor.clone() for name, tensor in self._tensors().items()}
        return state | {"settings": self._settings(), "steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned; training goes on to the bit as it would have there.

        Raises:
            ValueError: If an entry is missing, unknown, has another shape or is not finite, or the activations differ.
                Nothing is changed then.
        """
        own = self._tensors()
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        check_state(state, shapes | {"settings": (6,), "steps": ()})
        *settings, activation = state["settings"].tolist()
        if ACTIVATIONS[int(activation)] != self.activation:
            raise ValueError(
                f"The state is of a neuron with activation {ACTIVATIONS[int(activation)]!r}: give it to one that is "
                f"made with it, not with {self.activation!r}."
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.lr, *betas, self.eps, self.weight_decay = settings
        self.betas = (betas[0], betas[1])
        self.steps = int(state["steps"])


class _Sums:
    """Inner products of pieces in the order Gram matrix, `⟨Wd, bd⟩`, squared error; added in float64."""

    def __init__(self, latent_dim: int) -> None:
        self.latent_dim = latent_dim
        self._pieces: Vectors = []

    def add(self, decoder: Vectors, bias: Vectors, squared_error: Tensor | None = None) -> None:
        zero = decoder[0].new_zeros(())
        self._pieces += [torch.dot(a, b) for i, a in enumerate(decoder) for b in decoder[i:]]
        self._pieces += [torch.dot(a, bias[0]) if bias else zero for a in decoder]
        self._pieces.append(zero if squared_error is None else squared_error)

    def result(self) -> tuple[Tensor, Tensor, float]:
        """Gram matrix `(latent, latent)`, `⟨Wd, bd⟩` `(latent,)` and the squared error."""
        k = self.latent_dim
        width = k * (k + 1) // 2 + k + 1
        sums = torch.stack(self._pieces).double().view(-1, width).sum(0).cpu()
        upper = torch.zeros(k, k, dtype=torch.float64)
        rows, columns = torch.triu_indices(k, k)
        upper[rows, columns] = sums[: -k - 1]
        return upper + upper.triu(1).T, sums[-k - 1 : -1].clone(), float(sums[-1])


class _Update:
    """One step's second pass: gradients of a piece, AdamW on the piece, inner products of what came out."""

    def __init__(self, neuron: FeatureNeuron, encoded: list[float], slope: list[float]) -> None:
        self.neuron, self.encoded, self.slope = neuron, encoded, slope
        self.sums = _Sums(neuron.latent_dim)
        self._count = torch.tensor(neuron.steps, dtype=torch.float32, device=neuron.device)
        length, k = neuron._pieces[0].stop, neuron.latent_dim
        self._buffers = [torch.empty(length, dtype=torch.float32, device=neuron.device) for _ in range(2 * k + 1)]
        trained = (neuron._encoder, neuron._decoder, neuron._decoder_bias)
        self._vectors = [[v for part in trained for v in getattr(part, kind)] for kind in KINDS]

    def piece(self, piece: _Piece, sources: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        k, scale = self.neuron.latent_dim, 2.0 / self.neuron._n
        values, first, second = ([v[piece.start : piece.stop] for v in vectors] for vectors in self._vectors)
        decoder, bias = values[k : 2 * k], values[2 * k :]
        gradients = [buffer[: piece.stop - piece.start] for buffer in self._buffers]
        residual = gradients[-1]
        for segment in piece.segments:
            self._fill(segment, gradients, bias, sources[segment.name], targets[segment.name])
        for row, h in zip(decoder, self.encoded, strict=True):
            residual.add_(row, alpha=h)
        squared_error = torch.dot(residual, residual)
        residual.mul_(scale)
        for gradient, h in zip(gradients[k:-1], self.encoded, strict=True):
            torch.mul(residual, h, out=gradient)
        self._adamw(values, gradients[: len(values)], first, second)
        self.sums.add(decoder, bias, squared_error)

    def _fill(self, segment: _Segment, gradients: Vectors, bias: Vectors, source: Tensor, target: Tensor) -> None:
        """Put `bd − t` and the gradients of We in their places."""
        own = slice(segment.first, segment.last)
        g, t = (block[segment.start : segment.stop].float() for block in (source, target))
        if bias:
            torch.sub(bias[0][own], t, out=gradients[-1][own])
        else:
            torch.neg(t, out=gradients[-1][own])
        for gradient, slope in zip(gradients, self.slope, strict=False):
            torch.mul(g, slope, out=gradient[own])

    def adamw(self, trained: _Trained, gradient: Tensor) -> None:
        """One AdamW step on a vector."""
        self._adamw(trained.values, [gradient], trained.first, trained.second)

    def _adamw(self, values: Vectors, gradients: Vectors, first: Vectors, second: Vectors) -> None:
        neuron = self.neuron
        torch._fused_adamw_(
            values,
            gradients,
            first,
            second,
            [],
            [self._count] * len(values),
            lr=neuron.lr,
            beta1=neuron.betas[0],
            beta2=neuron.betas[1],
            weight_decay=neuron.weight_decay,
            eps=neuron.eps,
            amsgrad=False,
            maximize=False,
        )


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
