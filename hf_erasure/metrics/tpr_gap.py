"""True-positive-rate gaps of a classifier between two groups (De-Arteaga et al. 2019, arXiv 1901.09451, section 4).

`Gap(y) = P(ŷ = y | y, group) − P(ŷ = y | y, other)`. The root mean square over classes says how unequal a classifier
is. The correlation of gaps with the group's share of each class says whether it amplifies an existing inequality. The
root mean square of noisy gaps is above 0 even without a true gap: judge it by its p value.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_erasure.metrics import base, resampling


def score(
    predictions: Any,
    references: Any,
    groups: Any,
    *,
    positive: Any = None,
    permutations: int = 1000,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Gaps in the true positive rate, for each class and together.

    Args:
        predictions: `(rows,)` Predicted classes.
        references: `(rows,)` True classes.
        groups: `(rows,)` One of two groups for each row.
        positive: The group whose rate is first in the difference; by default the first by name.
        permutations: How often the groups are shuffled within each class, for the p value of `rms`.
        confidence: The confidence of the intervals.
        resamples: How many resamples of rows the bootstrap draws, within class and group.
        seed: The seed of shuffles and resamples.

    Returns:
        `rms` between 0 and 1; `gaps` and `shares` of the positive group by class;
        `correlation` of gaps with shares (`None` below two classes or if one of the two does not vary); `left_out`, the
        classes without rows of both groups; `coverage`, the share of rows in the other classes; `p_value`; and
        `intervals`, where the gap of a class is `gaps.<class>`.

    Raises:
        ValueError: If there are not two groups, no class has rows of both, or the input is malformed.
    """
    resampling.tail_quantiles(confidence)
    draws, shuffles = base.whole("resamples", resamples, 2), base.whole("permutations", permutations)
    all_sizes, all_hits, classes = _hits(predictions, references, groups, positive)
    both = np.asarray((all_sizes > 0).all(0))
    if not both.any():
        raise ValueError("No class has rows of both groups, so no gap is defined: give both groups in some class.")
    sizes, hits = all_sizes[:, both], all_hits[:, both]
    names, lacking = ([name for name, has in zip(classes, both, strict=True) if has == kind] for kind in (True, False))
    gaps, shares = _gaps(hits, sizes), sizes[0] / sizes.sum(0)
    rms, correlation = float(_rms(gaps)), float(_correlation(gaps, shares))

    # Drawn again within class and group, the number of right rows has a binomial distribution.
    drawn = _gaps(np.random.default_rng(seed).binomial(sizes, hits / sizes, (draws, *sizes.shape)), sizes)
    resampled = {"rms": _rms(drawn), **{f"gaps.{name}": drawn[:, i] for i, name in enumerate(names)}}
    if not np.isnan(correlation):
        resampled["correlation"] = _correlation(drawn, shares)
    intervals = resampling.percentiles(resampled, confidence)
    # Shuffled within a class, the number of right rows in a group has a hypergeometric distribution.
    right = hits.sum(0)
    one = np.random.default_rng(seed).hypergeometric(right, sizes.sum(0) - right, sizes[0], (shuffles, len(right)))
    test = resampling.permutation_test(rms, _rms(_gaps(np.stack([one, right - one], 1), sizes)))
    rows = int(sizes.sum())
    return {
        "rms": rms, "correlation": None if np.isnan(correlation) else correlation,
        "gaps": dict(zip(names, gaps.tolist(), strict=True)), "shares": dict(zip(names, shares.tolist(), strict=True)),
        "accuracy": float(hits.sum() / rows), "left_out": dict.fromkeys(lacking, "has rows of one group only"),
        "coverage": float(rows / all_sizes.sum()), "rows": rows, **test, **intervals,
    }  # fmt: skip


def _hits(predictions: Any, references: Any, groups: Any, positive: Any) -> tuple[base.Ints, base.Ints, list[str]]:
    """`(2, classes)` each: the rows of the positive and the other group by class, and how many of them are right."""
    truth = base.labels("references", references, len(references))
    predicted = base.labels("predictions", predictions, len(truth), of="references")
    sides, two = base.class_ids("groups", base.labels("groups", groups, len(truth), of="references"))
    names = list(map(str, two))
    if len(names) != 2:
        raise ValueError(f"groups hold {len(names)} different values, {names[:5]}: a gap is between two.")
    if positive is not None and str(positive) not in names:
        raise ValueError(f"positive={positive!r} is not one of the groups: write one of {names}.")
    first = sides == (0 if positive is None else names.index(str(positive)))
    y, classes = base.class_ids("references", truth, least=1)
    if {isinstance(label, str) for label in predicted} != {isinstance(label, str) for label in truth}:
        raise ValueError("predictions and references mix strings and numbers, so none can agree: give one type.")
    right = np.array([guess == label for guess, label in zip(predicted, truth, strict=True)])
    sizes, hits = (
        np.stack([np.bincount(y[side & of], minlength=len(classes)) for side in (first, ~first)])
        for of in (np.ones_like(right), right)
    )
    return sizes, hits, list(map(str, classes))


def _gaps(hits: base.Ints, sizes: base.Ints) -> base.Floats:
    """`(…, classes)` The rate of the positive group minus the rate of the other, from `(…, 2, classes)` hits."""
    rates = hits / sizes
    return rates[..., 0, :] - rates[..., 1, :]


def _rms(gaps: base.Floats) -> base.Floats:
    """`(…,)` The root mean square of `(…, classes)` gaps over classes."""
    return np.sqrt((gaps**2).mean(-1))


def _correlation(gaps: base.Floats, shares: base.Floats) -> base.Floats:
    """`(…,)` Pearson's correlation of `(…, classes)` gaps with the shares; NaN if one of the two does not vary."""
    x, y = gaps - gaps.mean(-1, keepdims=True), shares - shares.mean()
    varies = (np.ptp(gaps, -1) >= 1e-12) & (np.ptp(shares) >= 1e-12)
    norms = np.where(varies, np.linalg.norm(x, axis=-1) * np.linalg.norm(y), np.nan)
    return x @ y / norms


class TPRGap(base.Measure):
    """`score` as an `evaluate` metric."""

    facts = base.Facts(
        title="True-positive-rate gap",
        figure="rms",
        paper="De-Arteaga et al. 2019",
        url="https://arxiv.org/abs/1901.09451",
        formula="sqrt(mean over classes of (P(ŷ = y | y, group) − P(ŷ = y | y, other group))²)",
        better="lower",
        bounds=(0.0, 1.0),
        ideal=0.0,
        interval="bootstrap over rows within class and group; p value by shuffling groups within classes",
    )
    inputs = base.label_columns(["predictions", "references", "groups"])
    score = staticmethod(score)
