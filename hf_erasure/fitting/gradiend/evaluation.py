"""How well a feature neuron reads the feature: correlation and accuracy of encoded values (arXiv 2502.01406, sec. 4).

Class 0 of a pair stands for +1, class 1 for −1, a neutral text for 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

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
    pair: tuple[str, str]

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


def encoded(values: Iterable[float], labels: Iterable[int], pair: tuple[str, str]) -> EncodedValues:
    """Gather values and labels; float64 on the CPU."""
    return EncodedValues(
        torch.tensor(list(values), dtype=torch.float64, device="cpu"),
        torch.tensor(list(labels), dtype=torch.long, device="cpu"),
        pair,
    )
