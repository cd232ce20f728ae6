"""Linear leakage: how much better than the majority a linear probe names the concept on rows it has not seen.

Alain & Bengio 2016 put linear probes on representations; Ravfogel et al. 2020 judge erasure by how far their accuracy
falls to that of the majority. Rows of a group (one text, one person, one word) are never split between fitting and
judging, since a probe that recognises the group would otherwise seem to read the concept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Sequence, Value

# `evaluate.load` runs a copy of this file from another folder: absolute imports, and no metric class by name.
from hf_erasure.metrics import base, checks, probe, resampling


def score(
    x: Any,
    labels: Any,
    groups: Any = None,
    *,
    folds: int = 5,
    l2: float = 1.0,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Cross-validated accuracy of a logistic regression against the share of the most frequent label.

    Each fold's features are standardised on the rows that its probe is fitted on.

    Args:
        x: `(rows, width)` Representations.
        labels: `(rows,)` The concept.
        groups: `(rows,)` What belongs together; by default every row is by itself.
        folds: How many probes are fitted.
        l2: Penalty of the probe, `1 / C` of scikit-learn.
        confidence: Of the intervals.
        resamples: Of the bootstrap over groups; the probes are not fitted again.
        seed: Of folds and resamples.

    Returns:
        `leakage` = `accuracy` − `majority`, each between 0 and 1, `folds`, `groups`, `rows`, `classes`, `intervals`.

    Raises:
        ValueError: If there is one class only, a class has all its rows in one fold, or the input is malformed.
    """
    x = checks.numbers("predictions", x)
    y, names = checks.class_ids("references", checks.labels("references", labels, len(x)))
    keys = list(range(len(x))) if groups is None else checks.labels("groups", groups, len(x))
    belongs, _ = checks.class_ids("groups", keys)
    fold_of = probe.grouped_folds(belongs, y, checks.whole("folds", folds, 2), seed)
    correct = np.zeros(len(x))
    for fold in range(folds):
        held, fitted = np.flatnonzero(fold_of == fold), np.flatnonzero(fold_of != fold)
        _check_fold(y, fitted, held, names)
        inputs, goals = probe.standardised(x, fitted), torch.from_numpy(y)
        found = probe.LogisticProbe.fit(inputs[fitted], goals[fitted], len(names), l2=l2)
        correct[held] = (found.log_probabilities(inputs[held]).argmax(1) == goals[held]).numpy()
    majority = float(np.bincount(y).max() / len(y))
    intervals = resampling.bootstrap(
        lambda index: {"accuracy": correct[index].mean(), "leakage": correct[index].mean() - majority},
        len(x), clusters=keys, resamples=resamples, confidence=confidence, seed=seed,
    )  # fmt: skip
    accuracy = float(correct.mean())
    counts = {"folds": folds, "groups": len(set(belongs.tolist())), "rows": len(x), "classes": len(names)}
    return {"leakage": accuracy - majority, "accuracy": accuracy, "majority": majority, **counts, **intervals.as_dict()}


def _check_fold(y: checks.Ints, fitted: checks.Ints, held: checks.Ints, names: list[str]) -> None:
    absent = set(range(len(names))) - set(y[fitted].tolist())
    if absent:
        raise ValueError(
            f"All rows of the class {names[min(absent)]!r} are in one fold, so no probe could learn it: give rows of "
            "at least two groups for every class."
        )
    if not len(held):
        raise ValueError("A fold is empty: write fewer folds.")


class LinearLeakage(base.Measure):
    """`score` as an `evaluate` metric."""

    facts = base.Facts(
        title="Linear leakage",
        figure="leakage",
        paper="Alain & Bengio 2016; Ravfogel et al. 2020",
        url="https://arxiv.org/abs/2004.07667",
        formula="accuracy of a cross-validated logistic regression − share of the most frequent label",
        better="lower",
        bounds=(-1.0, 1.0),
        ideal=0.0,
        interval="bootstrap over groups of the held-out answers, the probes as they are",
    )
    inputs = base.either_kind(["references"], predictions=Sequence(Value("float64")))
    usage = "predictions: representations; references: labels; groups=, folds=, l2=, confidence=, resamples=, seed="

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
        return score(predictions, references, **options)
