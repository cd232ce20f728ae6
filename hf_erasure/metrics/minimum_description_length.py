"""Minimum description length probing with the online code (Voita & Titov 2020, arXiv 2003.12298, section 2.2).

The labels are sent in portions. The first costs `log2 K` bits a label; each later one is coded with a probe fitted on
everything before it. What is easy to read from few examples makes a short code. The rows themselves are known to both
sides, so features are standardised on all of them.

With more features than rows an unrestrained probe is sure and wrong, and its code longer than a uniform one. The paper
stops training early; here probes of several penalties are fitted each time, and the penalty that coded one portion best
codes the next one. Both sides know by then which that was, so it costs no bits.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Sequence, Value

from hf_erasure.metrics import base, resampling
from hf_erasure.metrics.linear_leakage import linear_model, preprocessing

# A probe is fitted until no entry of the gradient of the mean loss is larger, or for so many steps.
_GRADIENT, _STEPS_TO_MINIMUM = 1e-9, 2000
# Penalties of the probes that are tried: from hardly any to one that leaves little but the uniform code.
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)
# Where the paper cuts, in percent of the rows.
PORTIONS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25.0, 50.0, 100.0)


def score(
    x: Any,
    labels: Any,
    *,
    portions: Many[float] = PORTIONS,
    l2: float | Many[float] = PENALTIES,
    shuffle: bool = True,
    seed: int = 0,
    **drawing: Any,
) -> dict[str, Any]:
    """The online code length of labels given representations.

    Args:
        x: `(rows, width)` Representations.
        labels: `(rows,)` The concept.
        portions: Ends of the portions in percent, increasing, the last 100; ends on the same row are one.
        l2: Penalty of the probe, bias included, so that a label not seen yet keeps a probability; of several, the one
            that was best on the portion before, and the greatest for the first probe.
        shuffle: Send the rows in an order drawn by seed; else as they are.
        seed: Of the order and the resamples.
        **drawing: `confidence` and `resamples` of the bootstrap over the rows' code lengths, the probes as they are.

    Returns:
        `compression` = `uniform_bits` / `codelength_bits`, both lengths, the ends of the `portions` as numbers of rows,
        the `portion_bits` that each took, `rows`, `classes`, `intervals`.

    Raises:
        ImportError: Without scikit-learn.
        ValueError: If there is one class only, `l2` is not positive, `portions` do not increase to 100, or the input is
            malformed.
    """
    x = base.numbers("predictions", x)
    y, names = base.class_ids("references", base.labels("references", labels, len(x)))
    shares = list(portions)
    if not shares or shares[0] <= 0 or shares[-1] != 100 or any(a >= b for a, b in pairwise(shares)):
        raise ValueError(f"portions={shares}: write percentages that increase to 100.")
    ends = sorted({int(np.ceil(share / 100 * len(x))) for share in shares})
    order = np.random.default_rng(seed).permutation(len(x)) if shuffle else np.arange(len(x))
    penalties = sorted(np.atleast_1d(np.asarray(l2, dtype=float)).tolist())
    bits = _code(x[order], y[order], len(names), ends, penalties)
    uniform = float(np.log2(len(names)))

    def figures(index: base.Ints) -> dict[str, float]:
        return {"compression": uniform / bits[index].mean(), "codelength_bits": bits[index].mean() * len(bits)}

    found = resampling.bootstrap(figures, len(x), seed=seed, **drawing)
    each = [float(part.sum()) for part in np.split(bits, ends[:-1])]
    sizes = {"portions": ends, "portion_bits": each, "rows": len(x), "classes": len(names)}
    return {**found, "uniform_bits": uniform * len(x), **sizes}


def _code(x: base.Floats, y: base.Ints, classes: int, ends: list[int], penalties: list[float]) -> base.Floats:
    """`(rows,)` Bits that each label costs."""
    if not penalties[0] > 0:
        raise ValueError(f"l2={penalties[0]}: write a number above 0, or the probe has no unique minimum.")
    bits = np.full(len(y), np.log2(classes))
    best = len(penalties) - 1
    # The bias is the weight of a feature that is 1 everywhere. A row of weight 0 for each class lets a probe know of
    # those that have not come yet.
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
        interval="bootstrap over the rows' code lengths, order and probes as they are",
    )
    inputs = base.either_kind(["references"], predictions=Sequence(Value("float64")))
    score = staticmethod(score)
