"""BPI, FPI, MPI and the balance of k classes: the goals of GRADIEND's edits (arXiv 2502.01406, section 5).

The formulas are in `hf_erasure.fitting.gradiend.selection`, where edits are chosen; this metric adds intervals. Each
is `LMS · mean over texts of …`, so a model that no longer models language scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import torch
from datasets import Features, Sequence, Value

from hf_erasure.fitting.gradiend.selection import goal_by_name, goals_of
from hf_erasure.metrics import base, resampling


def score(
    probabilities: Any,
    classes: Many[str] = ("female", "male"),
    *,
    lms: float = 1.0,
    goals: Many[str] | None = None,
    **drawing: Any,
) -> dict[str, Any]:
    """The goals of GRADIEND for given class probabilities.

    Args:
        probabilities: `(texts, classes)` Probabilities of each class's words at the slot; their sum may be below 1.
        classes: Names of the columns.
        lms: Language-modelling score between 0 and 1; intervals take it as known.
        goals: The goals to compute; by default all goals of these classes: `balance`, every class, `bpi` for two
            classes, `fpi` and `mpi` for the two classes female and male.
        **drawing: `confidence`, `resamples` and `seed` of the bootstrap over texts.

    Returns:
        Goal → value between 0 and 1; `means`, the mean probability of each class; `lms`, `texts`, `intervals`.

    Raises:
        ValueError: If a probability is not between 0 and 1, a goal is not defined for the classes, or the input is
            malformed.
    """
    p = base.numbers("predictions", probabilities, width=len(classes))
    if p.min() < 0 or p.sum(1).max() > 1 + 1e-6:
        raise ValueError("predictions hold a negative number, or a row with a sum above 1: give probabilities.")
    if not 0 <= lms <= 1:
        raise ValueError(f"lms={lms}: write a language-modelling score between 0 and 1.")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(f"classes={list(classes)}: write two or more different names.")
    tensor = torch.from_numpy(p)
    named = list(goals_of(classes)) if goals is None else list(goals)
    values = {name: lms * goal_by_name(name, classes)(tensor).numpy() for name in named}
    found = resampling.bootstrap(lambda i: {name: each[i].mean() for name, each in values.items()}, len(p), **drawing)
    means = dict(zip(classes, p.mean(0).tolist(), strict=True))
    return {**found, "means": means, "lms": float(lms), "texts": len(p)}


class PredictionBalance(base.Measure):
    """`score` as an `evaluate` metric."""

    facts = base.Facts(
        title="Balanced, female and male prediction (BPI, FPI, MPI) and the balance of k classes",
        figure="balance",
        paper="Drechsel & Herbold 2025",
        url="https://arxiv.org/abs/2502.01406",
        formula="LMS · mean[(1 − (max p − min p)) · min p]; BPI = LMS · mean[(1 − |P(M) − P(F)|)(P(M) + P(F))]; "
        "FPI = LMS · mean[(1 − P(M)) P(F)]; MPI mirrored",
        better="higher",
        bounds=(0.0, 1.0),
        ideal=1.0,
        interval="bootstrap over texts, LMS taken as known",
    )
    inputs = Features({"predictions": Sequence(Value("float64"))})
    score = staticmethod(score)
