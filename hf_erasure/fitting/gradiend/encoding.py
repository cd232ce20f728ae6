"""Values of the feature neuron: how they are read and evaluated, and how the neuron is calibrated to classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_erasure.gradiend import FeatureEncoder

from ..processes import Processes
from .gradients import Blocks, GradientReader
from .pairs import Pair, Signed

if TYPE_CHECKING:
    import pandas as pd


Encode = Callable[[Mapping[str, Tensor]], float]
# Encoded values above it count as class 0, below its negative as class 1, between them as neutral.
THRESHOLD = 0.5


@dataclass(frozen=True)
class EncodedValues:
    """Values of the feature neuron beside what was put in.

    Attributes:
        values: `(texts,)` in [−1, 1] for tanh.
        labels: `(texts,)` of +1, −1 and 0.
        pair: The names of the classes that +1 and −1 stand for.
    """

    values: Tensor
    labels: Tensor
    pair: Pair

    def metrics(self) -> dict[str, float]:
        """`cor` and `acc` without neutral texts, `cor_enc` and `acc_enc` with them, where there are any.

        `acc` is the balanced accuracy of the sign; `acc_enc` that of three classes told apart at ±0.5.
        """
        featured = self.labels != 0
        values, labels = self.values[featured], self.labels[featured]
        found = {"cor": pearson(values, labels), "acc": balanced_accuracy(values.sign(), labels)}
        if bool((~featured).any()):
            decided = (self.values > THRESHOLD).double() - (self.values < -THRESHOLD).double()
            found["cor_enc"] = pearson(self.values, self.labels)
            found["acc_enc"] = balanced_accuracy(decided, self.labels)
        return found

    def names(self) -> list[str]:
        """The class of every text, or `"neutral"`."""
        by_label = {1: self.pair[0], -1: self.pair[1], 0: "neutral"}
        return [by_label[int(label)] for label in self.labels]

    def to_pandas(self) -> pd.DataFrame:
        """One row a text: `value`, `class`."""
        import pandas as pd

        return pd.DataFrame({"value": self.values.tolist(), "class": self.names()})


def together(parts: Sequence[EncodedValues]) -> dict[str, float]:
    """The metrics of one pair, or of several: each by its name, and their means without one."""
    if len(parts) == 1:
        return parts[0].metrics()
    each = {part.pair: part.metrics() for part in parts}
    shared = set.intersection(*(set(found) for found in each.values()))
    means = {name: sum(found[name] for found in each.values()) / len(each) for name in sorted(shared)}
    return means | {f"{name}_{a}_{b}": value for (a, b), found in each.items() for name, value in found.items()}


def pearson(values: Tensor, labels: Tensor) -> float:
    """Pearson's correlation; NaN where one of the two does not vary, since there is none then."""
    x, y = values.double(), labels.double()
    if x.numel() == 0 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x.norm() * y.norm()))


def balanced_accuracy(decided: Tensor, labels: Tensor) -> float:
    """The mean over classes of the share that was recognised."""
    shares = [float((decided[labels == label] == label).double().mean()) for label in labels.unique()]
    return sum(shares) / len(shares)


def encoded(values: Iterable[float], labels: Iterable[int], pair: Pair) -> EncodedValues:
    """Gather values and labels; float64 on the CPU."""
    return EncodedValues(
        torch.tensor(list(values), dtype=torch.float64, device="cpu"),
        torch.tensor(list(labels), dtype=torch.long, device="cpu"),
        pair,
    )


def encode_all(
    reader: GradientReader, source: str, encode: Encode, batches: Sequence[Signed], pair: Pair, processes: Processes
) -> EncodedValues:
    """One gradient a batch, encoded; shared among processes.

    Args:
        reader: Of the base model.
        source: Which gradient the encoder reads.
        encode: The encoder.
        batches: One text each, with +1, −1 or 0.
        pair: The classes that +1 and −1 stand for.
        processes: Those that share the work.
    """
    mine = [(encode(reader.gradient(batch, source)), sign) for batch, sign in processes.mine(batches)]
    values, labels = zip(*processes.gathered(mine), strict=True)
    return encoded(values, labels, pair)


# So many pairs of each class are read again: enough for two means.
ENOUGH = 24


def calibrated(
    encoder: FeatureEncoder,
    density: float,
    positive: Iterable[Blocks],
    negative: Iterable[Blocks],
) -> FeatureEncoder:
    """Prune an encoder and match the class means of its pre-activation to those before.

    Args:
        encoder: Dense.
        density: The share of entries to keep.
        positive: Gradients of class 0.
        negative: Gradients of class 1.

    Returns:
        The sparse encoder; `encoder` itself where nothing is pruned.

    Raises:
        ValueError: If the kept entries do not tell the classes apart.
    """
    sparse = encoder.prune(density)
    if sparse is encoder:
        return encoder
    (dense_up, sparse_up), (dense_down, sparse_down) = _means((encoder, sparse), positive, negative)
    factor = (dense_up - dense_down) / (sparse_up - sparse_down) if sparse_up != sparse_down else math.inf
    if not math.isfinite(factor) or factor == 0:
        raise ValueError(
            f"The {sparse.count} entries that density={density} leaves of the encoder do not tell the classes apart: "
            "give GradiendConfig a larger density, or keep_encoder=False."
        )
    # scale · (factor · (x − mean of the sparse) + mean of the dense), written as scale' · (⟨w, g⟩ + bias').
    offset = dense_up / factor - sparse_up
    return replace(sparse, scale=encoder.scale * factor, bias=sparse.bias + offset)


def centred(encoder: FeatureEncoder, positive: Iterable[Blocks], negative: Iterable[Blocks]) -> FeatureEncoder:
    """Bring the class means of the pre-activation to where tanh is ±0.9.

    Args:
        encoder: Of the closed form.
        positive: Gradients of class 0, of what will be encoded.
        negative: Gradients of class 1.

    Returns:
        The encoder with another scale and bias; `encoder` itself where the classes come out the wrong way about, which
        no scale can mend.
    """
    (up,), (down,) = _means((encoder,), positive, negative)
    return encoder.centred(up, down) if up > down else encoder


def _means(
    encoders: tuple[FeatureEncoder, ...],
    positive: Iterable[Blocks],
    negative: Iterable[Blocks],
) -> list[list[float]]:
    """Each encoder's mean `⟨w, g⟩ + bias` over the gradients of either class."""
    linear = [replace(encoder, scale=1.0, activation="identity") for encoder in encoders]
    means = []
    for group in (positive, negative):
        rows = [[encoder.encode(gradient) for encoder in linear] for gradient in group]
        means.append([sum(column) / len(rows) for column in zip(*rows, strict=True)])
    return means
