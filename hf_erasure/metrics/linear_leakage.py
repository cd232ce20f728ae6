"""Linear leakage: how much better than the majority a linear probe predicts the concept on rows it has not seen.

Alain & Bengio 2016 put linear probes on representations. Ravfogel et al. 2020 judge erasure by how far their accuracy
falls to the accuracy of the majority. The rows of a group (one text, one person, one word) are never split between
fitting and judging, because a probe that recognises the group would otherwise seem to read the concept.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from datasets import Sequence, Value

from hf_erasure.metrics import base, resampling
from hf_erasure.models.model import LazyModule

linear_model, model_selection, neural_network, pipeline, preprocessing, svm = (
    LazyModule(f"sklearn.{name}", "metrics")
    for name in ("linear_model", "model_selection", "neural_network", "pipeline", "preprocessing", "svm")
)

# The probes that `score` explains.
READERS = ("linear", "rbf", "mlp")
# Logistic regression stops when no entry of the gradient of the mean loss is larger, or after this many steps.
_GRADIENT, _STEPS_TO_MINIMUM = 1e-6, 1000
# The perceptron: its hidden units, full-batch steps of Adam, and learning rate.
_HIDDEN, _STEPS, _RATE = 64, 200, 1e-2


def score(
    x: Any,
    labels: Any,
    groups: Any = None,
    *,
    folds: int = 5,
    l2: float = 1.0,
    probe: str = "linear",
    seed: int = 0,
    **drawing: Any,
) -> dict[str, Any]:
    """Cross-validated accuracy of a logistic regression, minus the share of the most frequent label.

    The features of each fold are standardised on the rows that its probe is fitted on.

    Args:
        x: `(rows, width)` Representations.
        labels: `(rows,)` The concept.
        groups: `(rows,)` The group of each row; by default each row is its own group.
        folds: How many probes are fitted.
        l2: Penalty of the probe, `1 / C` of scikit-learn.
        probe: `"linear"`, `"rbf"` (a support vector machine with a radial basis function) or `"mlp"` (a perceptron with
            one hidden layer).
        seed: The seed of folds and resamples.
        **drawing: `confidence` and `resamples` of the bootstrap over groups; the probes are not fitted again.

    Returns:
        `leakage` = `accuracy` − `majority`, each between 0 and 1, `folds`, `groups`, `rows`, `classes`, `intervals`.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there is only one class, there are fewer groups than folds, a class has all its rows in one fold,
            a fold is empty, `l2` is not positive, `probe` is unknown, or the input is malformed.
    """
    x = base.numbers("predictions", x)
    labels = base.labels("references", labels, len(x))
    groups = list(range(len(x))) if groups is None else base.labels("groups", groups, len(x))
    answers = held_out_answers(x, labels, groups, folds=folds, seed=seed, l2=l2, probe=probe)
    found = accuracy(answers, labels, groups, seed=seed, **drawing)
    return {**found, "folds": int(folds), "groups": len(set(groups))}


def held_out_answers(
    x: Any,
    labels: list[Any],
    groups: list[Any] | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
    l2: float = 1.0,
    probe: str = "linear",
) -> list[Any]:
    """The label that a probe predicts for each row; it is fitted, and features are standardised, on the other folds.

    Arguments and errors are those of `score`; `labels` and `groups` are lists, and folds have similar shares of labels.
    """
    x = base.numbers("predictions", x)
    y, names = base.class_ids("references", labels)
    row_groups, all_groups = base.class_ids("groups", list(range(len(y))) if groups is None else groups)
    largest = int(np.bincount(y).max())
    if base.whole("folds", folds, 2) > min(len(all_groups), largest):
        raise ValueError(
            f"folds={folds}, but there are {len(all_groups)} groups, and the largest class has {largest} rows: write "
            "at least 2 and at most the smaller number, or give more rows."
        )
    if probe not in READERS:
        raise ValueError(f"probe={probe!r}: write one of {', '.join(map(repr, READERS))}.")
    if not l2 > 0:
        raise ValueError(f"l2={l2}: write a number above 0, or the probe has no unique minimum.")
    answers = np.empty(len(y), dtype=np.int64)
    splits = model_selection.StratifiedGroupKFold(int(folds), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class with fewer groups than folds is allowed if every probe sees it, which is checked below. The perceptron
        # takes the same number of steps for all data, so it always warns that it stops early.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        warnings.filterwarnings("ignore", "Stochastic Optimizer: Maximum iterations", UserWarning)
        for fitted, held in splits.split(x, y, row_groups):
            if absent := set(range(len(names))) - set(y[fitted].tolist()):
                raise ValueError(
                    f"All rows of the class {str(names[min(absent)])!r} are in one fold, so no probe could learn it: "
                    "give rows of at least two groups for every class."
                )
            if not len(held):
                raise ValueError("A fold is empty: write fewer folds.")
            if probe == "rbf":
                reader: Any = svm.SVC(C=1 / l2)
            elif probe == "mlp":
                reader = neural_network.MLPClassifier((_HIDDEN,), max_iter=_STEPS, n_iter_no_change=_STEPS, alpha=l2)
                reader.set_params(batch_size=len(fitted), learning_rate_init=_RATE, random_state=seed)
            else:
                reader = linear_model.LogisticRegression(C=1 / l2, tol=_GRADIENT, max_iter=_STEPS_TO_MINIMUM)
            standardised = pipeline.make_pipeline(preprocessing.StandardScaler(), reader)
            answers[held] = standardised.fit(x[fitted], y[fitted]).predict(x[held])
    return [names[answer] for answer in answers]


def accuracy(answers: list[Any], labels: list[Any], groups: list[Any] | None = None, **drawing: Any) -> dict[str, Any]:
    """Accuracy of a probe's answers, and how far it is above the accuracy of always the most frequent label.

    Rows of one group are drawn together for the intervals; `drawing` are keyword arguments of `resampling.bootstrap`.
    """
    correct = np.array([answer == label for answer, label in zip(answers, labels, strict=True)], dtype=np.float64)
    most = majority(labels)
    found = resampling.bootstrap(
        lambda index: {"leakage": correct[index].mean() - most, "accuracy": correct[index].mean()},
        len(labels), clusters=groups, **drawing,
    )  # fmt: skip
    return {**found, "majority": most, "rows": len(labels), "classes": len(set(labels))}


def majority(labels: list[Any]) -> float:
    """The accuracy of always answering with the most frequent label."""
    return max(labels.count(label) for label in set(labels)) / len(labels)


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
        interval="bootstrap over groups of the held-out answers; the probes are not fitted again",
    )
    inputs = base.label_columns(["references"], predictions=Sequence(Value("float64")))
    score = staticmethod(score)
