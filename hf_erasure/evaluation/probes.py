"""Probes by cross-validation: which answers a linear and a nonlinear one give on rows that they have not seen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_erasure.metrics import checks, probe, resampling

_FEW_CLASSES, _ITERATIONS = 4, 100
_HIDDEN = 64
_STEPS = 200
_RATE = 1e-2
_DECAY = 1e-2


class _MLP:
    """One hidden layer of rectified units, full batches of Adam, as many steps whatever the data."""

    def __init__(self, x: Tensor, y: Tensor, classes: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = (x.shape[1], _HIDDEN, classes)
        drawn = [torch.randn(a, b, generator=generator) / a**0.5 for a, b in pairwise(sizes)]
        self.weights = [weight.requires_grad_() for weight in drawn]
        self.biases = [torch.zeros(b, requires_grad=True) for b in sizes[1:]]
        optimiser = torch.optim.AdamW([*self.weights, *self.biases], lr=_RATE, weight_decay=_DECAY)
        with torch.enable_grad():
            for _ in range(_STEPS):
                optimiser.zero_grad()
                F.cross_entropy(self(x.float()), y).backward()
                optimiser.step()

    def __call__(self, x: Tensor) -> Tensor:
        hidden = nn.functional.relu(x.float() @ self.weights[0] + self.biases[0])
        return hidden @ self.weights[1] + self.biases[1]


def _linear(x: Tensor, y: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Logistic regression: as in `metrics.linear_leakage`, or for many classes after so many steps of LBFGS.

    The last digits of the optimum of many classes cost minutes, and change no answer.
    """
    if classes <= _FEW_CLASSES:
        return probe.LogisticProbe.fit(x, y, classes).log_probabilities
    weight = torch.zeros(x.shape[1] + 1, classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=_ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def scores(rows: Tensor) -> Tensor:
        return rows.double() @ weight[:-1] + weight[-1]

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(scores(x), y) + weight[:-1].square().sum() / (2 * len(x))
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return scores


def answers(
    x: Any,
    labels: list[str],
    *,
    nonlinear: bool = False,
    groups: list[Any] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> list[str]:
    """The label that a probe fitted on the other folds gives to each row.

    Args:
        x: `(rows, width)`.
        labels: One a row.
        nonlinear: A multilayer perceptron instead of logistic regression.
        groups: Rows of one group are never split between fitting and judging.
        folds: How many probes are fitted.
        seed: Of folds and initial weights.

    Raises:
        ValueError: If a class has all its rows in one fold, or there is one class only.
    """
    rows = checks.numbers("predictions", x)
    y, names = checks.class_ids("references", labels)
    belongs, _ = checks.class_ids("groups", groups if groups is not None else list(range(len(rows))))
    fold_of = probe.grouped_folds(belongs, y, folds, seed)
    goals, given = torch.from_numpy(y), np.empty(len(rows), dtype=np.int64)
    for fold in range(folds):
        held, fitted = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
        absent = set(range(len(names))) - set(y[fitted].tolist())
        if absent:
            raise ValueError(f"All rows labelled {names[min(absent)]!r} are in one fold: raise --limit.")
        inputs = probe.standardised(rows, fitted)
        if nonlinear:
            scores = _MLP(inputs[fitted], goals[fitted], len(names), seed + fold)(inputs[held])
        else:
            scores = _linear(inputs[fitted], goals[fitted], len(names))(inputs[held])
        given[held] = scores.detach().argmax(1).numpy()
    return [names[answer] for answer in given]


def accuracy(given: list[str], labels: list[str], groups: list[Any] | None = None, **statistics: Any) -> dict[str, Any]:
    """Accuracy, and how far it is above that of always giving the most frequent label, with intervals."""
    hits = np.array([a == b for a, b in zip(given, labels, strict=True)], dtype=np.float64)
    majority = max(labels.count(label) for label in set(labels)) / len(labels)
    keys = groups if groups is not None else list(range(len(labels)))
    intervals = resampling.bootstrap(
        lambda index: {"accuracy": hits[index].mean(), "leakage": hits[index].mean() - majority},
        len(hits), clusters=keys, **statistics,
    )  # fmt: skip
    mean = float(hits.mean())
    counts = {"majority": majority, "rows": len(labels), "classes": len(set(labels))}
    return {"leakage": mean - majority, "accuracy": mean, **counts, **intervals.as_dict()}
