"""Minimum description length probing with the online code (Voita & Titov 2020, arXiv 2003.12298, section 2.2).

The labels are sent in portions. The first portion costs `log2 K` bits for each label; each later portion is coded with
a probe fitted on all portions before it. Labels that are easy to read from few examples give a short code. Sender and
receiver know the rows themselves, so features are standardised on all rows.

With more features than rows, a probe without a penalty is certain and wrong, and its code is longer than a uniform
code. The paper stops training early. Here probes of several penalties are fitted each time, and the penalty that coded
one portion best codes the next portion. Both sides know this penalty by then, so it costs no bits.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Sequence, Value

from hf_erasure.metrics import base, resampling
from hf_erasure.metrics.linear_leakage import linear_model, preprocessing

# A probe is fitted until no entry of the gradient of the mean loss is larger, or for this many steps.
_GRADIENT, _STEPS_TO_MINIMUM = 1e-9, 2000
# Penalties of the probes that are tried: from a small one to one that leaves almost only the uniform code.
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)
# The ends of the paper's portions, in percent of the rows; ends on the same row count once.
PORTIONS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25.0, 50.0, 100.0)


def score(
    x: Any,
    labels: Any,
    *,
    l2: float | Many[float] = PENALTIES,
    seed: int = 0,
    **drawing: Any,
) -> dict[str, Any]:
    """The online code length of labels given representations.

    Args:
        x: `(rows, width)` Representations.
        labels: `(rows,)` The concept.
        l2: Penalty of the probe and its bias, so that a label not seen yet keeps a probability. With several penalties,
            the one that was best on the portion before is used, and for the first probe the greatest.
        seed: The seed of the order in which the rows are sent, and of the resamples.
        **drawing: `confidence` and `resamples` of the bootstrap over code lengths of rows; probes are not fitted again.

    Returns:
        `compression` = `uniform_bits` / `codelength_bits`, both lengths, the ends of the `portions` as numbers of rows,
        the `portion_bits` of each, `rows`, `classes`, `intervals`.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there is only one class, `l2` is not positive, or the input is malformed.
    """
    x = base.numbers("predictions", x)
    y, names = base.class_ids("references", base.labels("references", labels, len(x)))
    ends = sorted({int(np.ceil(share / 100 * len(x))) for share in PORTIONS})
    order = np.random.default_rng(seed).permutation(len(x))
    bits = _code_lengths(x[order], y[order], len(names), ends, sorted(np.atleast_1d(l2).tolist()))
    uniform = float(np.log2(len(names)))

    def figures(index: base.Ints) -> dict[str, float]:
        return {"compression": uniform / bits[index].mean(), "codelength_bits": bits[index].mean() * len(bits)}

    found = resampling.bootstrap(figures, len(x), seed=seed, **drawing)
    each = [float(part.sum()) for part in np.split(bits, ends[:-1])]
    sizes = {"portions": ends, "portion_bits": each, "rows": len(x), "classes": len(names)}
    return {**found, "uniform_bits": uniform * len(x), **sizes}


def _code_lengths(x: base.Floats, y: base.Ints, classes: int, ends: list[int], penalties: list[float]) -> base.Floats:
    """`(rows,)` The bits of each label."""
    if not penalties[0] > 0:
        raise ValueError(f"l2={penalties[0]}: write a number above 0, or the probe has no unique minimum.")
    bits = np.full(len(y), np.log2(classes))
    best = len(penalties) - 1
    # The bias is the weight of a feature that is 1 everywhere. With a row of weight 0 for each class a probe knows
    # classes that have not been sent yet.
    x = np.concatenate([preprocessing.StandardScaler().fit_transform(x), np.ones((len(x), 1))], 1)
    unseen = np.zeros((classes, x.shape[1]))
    for known, end in pairwise(ends):
        rows, goals = np.concatenate([x[:known], unseen]), np.concatenate([y[:known], np.arange(classes)])
        weights = np.repeat([1.0, 0.0], [known, classes])
        costs = []
        for l2 in penalties:
            probe = linear_model.LogisticRegression(
                C=1 / l2, fit_intercept=False, tol=_GRADIENT, max_iter=_STEPS_TO_MINIMUM
            )
            log_p = probe.fit(rows, goals, weights).predict_log_proba(x[known:end])
            costs.append(-log_p[np.arange(end - known), y[known:end]] / np.log(2))
        bits[known:end] = costs[best]
        best = int(np.sum(costs, axis=1).argmin())
    return bits


class MinimumDescriptionLength(base.Measure):
    """`score` as an `evaluate` metric."""

    facts = base.Facts(
        title="Minimum description length probe (online code)",
        figure="compression",
        paper="Voita & Titov 2020",
        url="https://arxiv.org/abs/2003.12298",
        formula="n log2 K / (t₁ log2 K − Σᵢ log2 p(y of portion i+1 | x, probe fitted on the first tᵢ))",
        better="lower",
        bounds=(0.0, float("inf")),
        ideal=1.0,
        interval="bootstrap over the rows' code lengths, with the same order and probes",
    )
    inputs = base.label_columns(["references"], predictions=Sequence(Value("float64")))
    score = staticmethod(score)
