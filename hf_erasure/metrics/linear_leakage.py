"""Linear leakage: how much better than the majority a linear probe names the concept on rows it has not seen.

Alain & Bengio 2016 put linear probes on representations; Ravfogel et al. 2020 judge erasure by how far their accuracy
falls to that of the majority. Rows of a group (one text, one person, one word) are never split between fitting and
judging, since a probe that recognises the group would otherwise seem to read the concept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
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
    folds = checks.whole("folds", folds, 2)
    given = probe.held_out_answers(x, y, names, belongs, folds=folds, seed=seed, l2=l2)
    found = accuracy(given, y, keys, resamples=resamples, confidence=confidence, seed=seed)
    return {**found, "folds": folds, "groups": len(set(belongs.tolist()))}


def accuracy(given: checks.Ints, y: checks.Ints, keys: list[Any], **statistics: Any) -> dict[str, Any]:
    """Accuracy of answers, and how far it is above that of always giving the most frequent class.

    Args:
        given: `(rows,)` The class ids that a probe answered.
        y: `(rows,)` The true ones.
        keys: `(rows,)` What belongs together and is drawn together for the intervals.
        **statistics: `resamples`, `confidence` and `seed` of the bootstrap.
    """
    correct = (given == y).astype(np.float64)
    majority = float(np.bincount(y).max() / len(y))
    intervals = resampling.bootstrap(
        lambda index: {"accuracy": correct[index].mean(), "leakage": correct[index].mean() - majority},
        len(y), clusters=keys, **statistics,
    )  # fmt: skip
    mean = float(correct.mean())
    counts = {"majority": majority, "rows": len(y), "classes": len(np.unique(y))}
    return {"leakage": mean - majority, "accuracy": mean, **counts, **intervals.as_dict()}


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
