"""Gradients of a model's loss at feature words, as named float32 blocks, and the values that are read from them.

See arXiv 2502.01406, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_erasure.adapters import targeted_parameters
from hf_erasure.adapters.gradiend.state import layers_and_config
from hf_erasure.gradiend import ClosedFormEstimator
from hf_erasure.gradiend.blocks import require_finite, sum_of_squares
from hf_erasure.models.heads import Task
from hf_erasure.models.model import evaluating, pandas
from hf_erasure.models.slots import PairBatch, SlotInputs, SlotReader

from ..processes import Processes
from .pairs import Pair, Signed

Blocks = dict[str, Tensor]


class GradientReader(SlotReader):
    """Reads mean-loss gradients of batches from a model, as named float32 blocks.

    One forward pass is enough for the factual and the counterfactual word, and their difference takes one backward
    pass: with one forward pass the softmax terms of ``g(factual) - g(counterfactual)`` cancel and the loss is a
    difference of logits. Only if earlier tokens of a longer word are inputs (causal, seq2seq), each word needs its own.

    While it reads, the model is in eval mode (without dropout, and without gradient checkpointing, which transformers
    does in training mode only). Afterwards training flags, ``requires_grad`` and ``.grad`` are as before, also after an
    exception. Only the targeted parameters get gradients.

    Args:
        model: A model with a head, bare or wrapped in a `PeftModel`. Active adapters act.
        parameters: The targeted parameters by name, each once (a tied weight once: its gradient is that of all uses).
        task: The task of the model; by default `task_of(model)`.

    Raises:
        ValueError: The model has no usable head, or a parameter has no values (on the device ``meta``) or values that
            are not floating-point numbers.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], task: Task | None = None) -> None:
        super().__init__(model, task)
        self.parameters = dict(parameters)
        for name, parameter in parameters.items():
            if parameter.device.type == "meta":
                raise ValueError(f"{name} is offloaded (on the meta device); load the model onto one device to fit it")
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name} has the dtype {parameter.dtype}, which has no gradient; fit on an unquantised base"
                )
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        # Estimates are kept on the device of the first parameter.
        self.weights_device = next(iter(parameters.values())).device

    def gradients(self, batch: PairBatch, wanted: Sequence[str] = ("factual", "difference")) -> dict[str, Blocks]:
        """The gradients of one batch, any of ``factual``, ``counterfactual`` and ``difference`` (factual minus
        counterfactual).

        Returns, for each kind, name -> gradient in the parameter's shape, float32, on its device. A parameter that the
        loss does not reach (a pooler, an embedding that is not used) has zeros. Raises a `ValueError` if the loss is
        not finite, or does not reach any of the parameters.
        """
        with self._reading():
            losses = self._losses(batch, wanted)
            found: dict[str, Blocks] = {}
            for kind in dict.fromkeys(wanted):
                blocks: Blocks = {}
                self._stream(losses.pop(kind), blocks.__setitem__, last=not losses)
                found[kind] = {name: blocks.pop(name).float() for name in self.parameters}
            return found

    def gradient(self, batch: PairBatch, kind: str) -> Blocks:
        """One of the gradients that `gradients` gives."""
        return self.gradients(batch, (kind,))[kind]

    def accumulate(
        self, batch: PairBatch, source: str, estimator: ClosedFormEstimator, sign: int, *, low_memory: bool = False
    ) -> None:
        """Add one batch of one class to a closed-form estimator without ever holding two gradients.

        The norm of the source is over all its blocks, so they are kept until it is known, and then added. With
        `low_memory` they are not kept: one more backward pass finds the norm before the pass that gives the blocks. The
        target (the difference) comes from a second backward pass through the same graph, which adds and frees each
        block as soon as it is made. With the source ``difference`` one backward pass is enough for both. Blocks that
        the loss does not reach are added as zeros, after the others. The errors are those of `gradients`.
        """
        is_difference = source == "difference"
        blocks: Blocks = {}
        squares: dict[str, float] = {}

        def add_square(name: str, block: Tensor) -> None:
            squares[name] = sum_of_squares(block.reshape(-1))
            if not low_memory:
                blocks[name] = block

        def add_block(name: str, block: Tensor) -> None:
            estimator.add("source", name, block, sign, norm)
            if is_difference:
                estimator.add("target", name, block, sign)

        with self._reading():
            losses = self._losses(batch, (source,) if is_difference else (source, "difference"))
            loss = losses.pop(source)
            self._stream(loss, add_square, last=is_difference and not low_memory)
            require_finite(squares, "source gradient")
            norm = math.sqrt(sum(squares.values()))
            if low_memory:
                self._stream(loss, add_block, last=is_difference)
            for name in list(blocks):
                add_block(name, blocks.pop(name))
            if not is_difference:
                del loss
                self._stream(losses.pop("difference"), lambda name, block: estimator.add("target", name, block, sign))

    def _losses(self, batch: PairBatch, wanted: Sequence[str]) -> dict[str, Tensor]:
        """The loss of each kind: mean over rows of the mean over the word's tokens, float32."""
        right = batch.to(self.device)
        if batch.apart is None:
            wrong: SlotInputs = replace(right, tokens=batch.counterfactual.to(self.device))
            logits = dict.fromkeys(("factual", "counterfactual"), self.logits(right).float())
        else:
            wrong = batch.apart.to(self.device)
            logits = {
                kind: self.logits(filled).float()
                for kind, filled in (("factual", right), ("counterfactual", wrong))
                if kind in wanted or "difference" in wanted
            }
        sides = (("factual", right), ("counterfactual", wrong))
        losses = {kind: _mean_nll(logits[kind], filled) for kind, filled in sides if kind in wanted}
        if "difference" in wanted and batch.apart is None:
            at = logits["factual"]
            other, one = (at.gather(1, filled.tokens.to(at.device)[:, None])[:, 0] for filled in (wrong, right))
            losses["difference"] = (right.weights.to(at.device) * (other - one)).sum()
        elif "difference" in wanted:
            losses["difference"] = _mean_nll(logits["factual"], right) - _mean_nll(logits["counterfactual"], wrong)
        for kind, loss in losses.items():
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the {kind} loss is {loss.item()}; the model or its input has values out of range")
            if not loss.requires_grad:
                names = ", ".join(list(self.parameters)[:3])
                raise ValueError(
                    f"the loss does not depend on any of the {len(self.parameters)} targeted parameters ({names}, …); "
                    "target parameters that the model's prediction goes through"
                )
        return losses

    def _stream(self, loss: Tensor, on_block: Callable[[str, Tensor], Any], *, last: bool = True) -> None:
        """Run one backward pass that calls `on_block` with each block when it is complete, and frees it."""
        waiting = dict(self.parameters)

        def hook(name: str, parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                del waiting[name]
                on_block(name, gradient)

        handles = [p.register_post_accumulate_grad_hook(partial(hook, name)) for name, p in self.parameters.items()]
        try:
            loss.backward(retain_graph=not last)
        except AssertionError as error:  # such as that of Reformer, which needs its dropout to run blocks backwards
            raise ValueError(
                f"{type(self.model).__name__} gives no gradients in evaluation mode, in which they are read: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        for name, parameter in waiting.items():
            on_block(name, torch.zeros_like(parameter))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """While open: eval mode, with gradients for the targeted parameters only; then everything is restored."""
        before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in self.model.parameters()]
        targeted = {id(parameter) for parameter in self.parameters.values()}
        with evaluating(self.model), torch.inference_mode(False), torch.enable_grad():
            try:
                for parameter, _, _ in before:
                    parameter.requires_grad_(id(parameter) in targeted)
                    parameter.grad = None
                yield
            finally:
                for parameter, flag, gradient in before:
                    parameter.requires_grad_(flag)
                    parameter.grad = gradient


def _mean_nll(logits: Tensor, filled: SlotInputs) -> Tensor:
    losses = F.cross_entropy(logits, filled.tokens.to(logits.device), reduction="none")
    return (filled.weights.to(losses.device) * losses).sum()


@contextmanager
def reading_the_base(model: nn.Module, adapter_name: str, task: Task | None = None) -> Iterator[GradientReader]:
    """Read gradients of the base model at an adapter's weights; while the block is open, the adapter has no effect.

    Raises:
        ValueError: If the adapter is merged.
    """
    layers, _ = layers_and_config(model, adapter_name, fitted=False)
    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.suspend(adapter_name))
        yield GradientReader(model, targeted_parameters(model, adapter_name), task)


# ---- values of the feature neuron ------------------------------------------------------------------------------------

Encode = Callable[[Mapping[str, Tensor]], float]
# Encoded values above this count as class 0, below its negative as class 1, and between the two as neutral.
THRESHOLD = 0.5


@dataclass(frozen=True)
class EncodedValues:
    """Values of the feature neuron, with the labels of the texts that it read."""

    values: Tensor  # `(texts,)` in [−1, 1] for tanh.
    labels: Tensor  # `(texts,)` of +1 (class 0), −1 (class 1) and 0 (neutral).
    pair: Pair  # The names of the classes that +1 and −1 stand for.

    def metrics(self) -> dict[str, float]:
        """`cor` and `acc` without neutral texts, and `cor_enc` and `acc_enc` with them, if any were read.

        `acc` is the balanced accuracy of the sign; `acc_enc` is that of three classes separated at ±0.5.
        """
        has_feature = self.labels != 0
        values, labels = self.values[has_feature], self.labels[has_feature]
        found = {"cor": pearson(values, labels), "acc": balanced_accuracy(values.sign(), labels)}
        if bool((~has_feature).any()):
            predicted = (self.values > THRESHOLD).double() - (self.values < -THRESHOLD).double()
            found["cor_enc"] = pearson(self.values, self.labels)
            found["acc_enc"] = balanced_accuracy(predicted, self.labels)
        return found

    def to_pandas(self) -> pandas.DataFrame:
        """One row for each text: its `value`, and its `class` or `"neutral"`."""
        names = {1: self.pair[0], -1: self.pair[1], 0: "neutral"}
        return pandas.DataFrame({"value": self.values.tolist(), "class": [names[int(label)] for label in self.labels]})


def joint_metrics(parts: Sequence[EncodedValues]) -> dict[str, float]:
    """The metrics of one pair; for several pairs, the means of the metrics, and each with the pair in its name."""
    if len(parts) == 1:
        return parts[0].metrics()
    each = {part.pair: part.metrics() for part in parts}
    shared = set.intersection(*(set(found) for found in each.values()))
    means = {name: sum(found[name] for found in each.values()) / len(each) for name in sorted(shared)}
    return means | {f"{name}_{a}_{b}": value for (a, b), found in each.items() for name, value in found.items()}


def pearson(values: Tensor, labels: Tensor) -> float:
    """Pearson's correlation; NaN where values or labels do not vary, since it is not defined then."""
    x, y = values.double(), labels.double()
    if x.numel() == 0 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x.norm() * y.norm()))


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The mean over classes of the share of each class that was recognised."""
    shares = [float((predicted[labels == label] == label).double().mean()) for label in labels.unique()]
    return sum(shares) / len(shares)


def encoded(values: Iterable[float], labels: Iterable[int], pair: Pair) -> EncodedValues:
    """Make `EncodedValues` of values and labels; the values are float64 on the CPU."""
    return EncodedValues(
        torch.tensor(list(values), dtype=torch.float64, device="cpu"),
        torch.tensor(list(labels), dtype=torch.long, device="cpu"),
        pair,
    )


def encode_all(
    reader: GradientReader, source: str, encode: Encode, batches: Sequence[Signed], pair: Pair, processes: Processes
) -> EncodedValues:
    """The values of batches of one text each, labelled +1, −1 or 0; the work is shared among processes."""
    own = [(encode(reader.gradient(batch, source)), sign) for batch, sign in batches[processes.rank :: processes.count]]
    values, labels = zip(*processes.gathered(own), strict=True)
    return encoded(values, labels, pair)
