"""What fresh probes still read: with splits by group and by random rows, compared with a control label.

After an erasure the question is what a new probe reads that is fitted on rows which the erasure was not fitted on. A
split by random rows puts rows of one group (a template, an author, a person) on both sides, and a probe that recognises
the group also knows its label. A control label (after Hewitt and Liang 2019) shows how much of a figure is due to this:
the label, exchanged for another in a random half of the groups. Only a probe that recognises groups can read it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from hf_erasure.metrics import base, linear_leakage
from hf_erasure.metrics.linear_leakage import majority


def score(
    x: Any,
    labels: Any,
    groups: Any = None,
    *,
    readers: Sequence[str] = ("linear",),
    folds: int = 2,
    seed: int = 0,
    **drawing: Any,
) -> dict[str, Any]:
    """Cross-validated accuracy of fresh probes.

    Args:
        x: `(rows, width)` Representations.
        labels: `(rows,)` The concept.
        groups: `(rows,)` The group of each row; by default each row is its own group, and no group can be recognised.
        readers: Some of `"linear"`, `"rbf"` and `"mlp"`.
        folds: How many probes are fitted; with 2, each on one half of the groups, or rows.
        seed: The seed of folds, control labels and resamples.
        **drawing: `confidence` and `resamples` of the bootstrap over groups; the probes are not fitted again.

    Returns:
        `by_group` and, with groups, `by_row`, reader → `accuracy` and its `interval`; with groups also `control`, the
        accuracy of the first reader for the control label in a split by rows, and `control_majority`, the share of its
        most frequent value; and `rows`, `groups`, `majority`.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: For the reasons of `linear_leakage.score`, whose probes the readers are.
    """
    x, labels = base.numbers("predictions", x), base.labels("references", labels, len(x))
    row_groups = list(range(len(x))) if groups is None else base.labels("groups", groups, len(x))

    def accuracy(reader: str, y: list[Any], split_by: list[Any] | None) -> dict[str, Any]:
        answers = linear_leakage.held_out_answers(x, y, split_by, folds=folds, seed=seed, probe=reader)
        found = linear_leakage.accuracy(answers, y, row_groups, seed=seed, **drawing)
        return {"accuracy": found["accuracy"], "interval": found["intervals"]["accuracy"]}

    found: dict[str, Any] = {"rows": len(labels), "groups": len(set(row_groups)), "majority": majority(labels)}
    found["by_group"] = {reader: accuracy(reader, labels, row_groups) for reader in readers}
    if groups is not None:
        found["by_row"] = {reader: accuracy(reader, labels, None) for reader in readers}
        control = control_labels(labels, row_groups, seed)
        found |= {"control": accuracy(readers[0], control, None)["accuracy"], "control_majority": majority(control)}
    return found


def control_labels(labels: list[Any], groups: list[Any], seed: int = 0) -> list[Any]:
    """Return the labels; in half of the groups, drawn at random, each label is replaced by the one that follows it."""
    names = sorted(set(labels), key=str)
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    every = sorted(set(groups), key=str)
    moved = set(random.Random(seed).sample(every, len(every) // 2))
    return [following[label] if group in moved else label for label, group in zip(labels, groups, strict=True)]
