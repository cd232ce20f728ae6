"""WEAT and SEAT: whether two sets of targets associate differently with two sets of attributes.

Caliskan et al. 2017 (arXiv 1608.07187) for words, May et al. 2019 (arXiv 1903.10561) for sentences. With
`s(w) = mean cos(w, A) − mean cos(w, B)`, the effect size is `(mean s over X − mean s over Y) / deviation of s over
X ∪ Y` (deviation with n − 1, as in the authors' code). The p value is the share of splits of X ∪ Y into sets of the
same sizes whose difference is at least the observed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Sequence as ListOf
from datasets import Value

from hf_erasure.metrics import base, resampling

SETS = ("X", "Y", "A", "B")


def score(
    x: Any,
    y: Any,
    a: Any,
    b: Any,
    *,
    permutations: int = 20_000,
    seed: int = 0,
    **drawing: Any,
) -> dict[str, Any]:
    """The effect size of a WEAT, with its p value.

    Args:
        x: `(n, width)` The first targets.
        y: `(m, width)` The second targets.
        a: `(…, width)` The first attributes.
        b: `(…, width)` The second attributes.
        permutations: The most splits of the targets that are used: all splits if they are so few, else a sample.
        seed: The seed of splits and resamples.
        **drawing: `confidence` and `resamples` of the bootstrap over targets and attributes, within each set.

    Returns:
        `effect_size`, within ±2 for sets of one size; `statistic`, the difference of means; the one-sided `p_value`
        (X is nearer to A than Y), `exact`, `permutations`; `sizes` of the sets; `intervals`.

    Raises:
        ValueError: If a target set has fewer than two rows, a vector is 0, nothing varies, or the input is malformed.
    """
    sets = [base.numbers(name, part) for name, part in zip(SETS, (x, y, a, b), strict=True)]
    if len(widths := {part.shape[1] for part in sets}) > 1:
        raise ValueError(f"The sets have vectors of widths {sorted(widths)}: use one encoder for all.")
    first, second = len(sets[0]), len(sets[1])
    if min(first, second) < 2:
        raise ValueError(f"X has {first} and Y {second} targets: a deviation needs at least two of each.")
    cosines = _unit_vectors(np.concatenate(sets[:2])) @ _unit_vectors(np.concatenate(sets[2:])).T
    s = _associations(cosines, len(sets[2]))
    if np.ptp(s) < 1e-12:
        raise ValueError("All targets have the same association, so there is no effect size: are the vectors constant?")
    test = resampling.subset_test(s, first, permutations=permutations, seed=seed)

    def figures(index: base.Ints) -> dict[str, float]:
        targets, attributes = index[: first + second], index[first + second :] - first - second
        drawn = _associations(cosines[targets][:, attributes], len(sets[2]))
        return {"effect_size": _effect_size(drawn, first)}

    strata = [name for name, part in zip(SETS, sets, strict=True) for _ in part]
    found = resampling.bootstrap(figures, len(strata), strata=strata, seed=seed, **drawing)
    return {
        **found, "effect_size": _effect_size(s, first), "statistic": float(s[:first].mean() - s[first:].mean()),
        **test, "sizes": dict(zip(SETS, map(len, sets), strict=True)),
    }  # fmt: skip


def _unit_vectors(vectors: base.Floats) -> base.Floats:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if (norms == 0).any():
        raise ValueError(
            f"One of {len(vectors)} vectors is 0 and has no direction: leave such items out, and report it."
        )
    return vectors / norms


def _associations(cosines: base.Floats, attributes_a: int) -> base.Floats:
    """`(targets,)` Mean cosine with A minus mean cosine with B."""
    return cosines[:, :attributes_a].mean(1) - cosines[:, attributes_a:].mean(1)


def _effect_size(s: base.Floats, first: int) -> float:
    deviation = s.std(ddof=1)
    return float((s[:first].mean() - s[first:].mean()) / deviation) if deviation > 0 else float("nan")


def mean_absolute_effect(
    tests: Sequence[Mapping[str, Sequence[int]]],
    vectors: Any,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The mean of |effect size| over tests that may share items, with an interval.

    A bootstrap of each test alone would count an item that is in several tests as several items. Here each item has the
    same random weight in all tests of a resample (exponential: Rubin's Bayesian bootstrap, 1981). Noise raises an
    absolute value, so the interval of an encoder without any association is above 0.

    Each test is a mapping: the name of a set → the rows of `vectors` `(items, width)` that are in it.
    """
    unit = _unit_vectors(base.numbers("vectors", vectors))
    weights = np.random.default_rng(seed).exponential(size=(base.whole("resamples", resamples), len(unit)))
    even = np.ones((1, len(unit)))
    mean, drawn = (np.mean([np.abs(_weighted_effect(unit, test, w)) for test in tests], 0) for w in (even, weights))
    bounds = [float(bound) for bound in np.quantile(drawn, resampling.tail_quantiles(confidence))]
    return {"mean_absolute_effect_size": float(mean[0]), "intervals": {"mean_absolute_effect_size": bounds}}


def _weighted_effect(unit: base.Floats, test: Mapping[str, Sequence[int]], weights: base.Floats) -> base.Floats:
    """`(resamples,)` Effect sizes with the weights `(resamples, items)` of items."""
    targets = [*test["X"], *test["Y"]]
    first = len(test["X"])
    s = np.zeros((len(weights), len(targets)))
    for sign, name in ((1, "A"), (-1, "B")):
        w = weights[:, test[name]]
        s += sign * (w / w.sum(1, keepdims=True)) @ (unit[test[name]] @ unit[targets].T)
    w = weights[:, targets] / weights[:, targets].sum(1, keepdims=True)
    centred = s - (w * s).sum(1, keepdims=True)
    deviation = np.sqrt((w * centred**2).sum(1) * len(targets) / (len(targets) - 1))
    means = [(w[:, part] * s[:, part]).sum(1) / w[:, part].sum(1) for part in (slice(first), slice(first, None))]
    return (means[0] - means[1]) / deviation


def _score_of_rows(predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
    """`score` of vectors with a set for each: `"X"`, `"Y"` (targets), `"A"` or `"B"` (attributes)."""
    vectors = base.numbers("predictions", predictions)
    of = np.array(base.labels("references", references, len(vectors)))
    if set(of.tolist()) != set(SETS):
        raise ValueError(f"references name the sets {sorted(set(of.tolist()))}: give vectors of 'X', 'Y', 'A' and 'B'.")
    return score(*(vectors[of == name] for name in SETS), **options)


class WEAT(base.Measure):
    """`score` as an `evaluate` metric; the same for the sentences of SEAT."""

    facts = base.Facts(
        title="Word / Sentence Encoder Association Test (WEAT, SEAT)",
        figure="effect_size",
        paper="Caliskan et al. 2017; May et al. 2019",
        url="https://arxiv.org/abs/1903.10561",
        formula="(mean s over X − mean s over Y) / deviation of s over X ∪ Y, s(w) = mean cos(w, A) − mean cos(w, B)",
        better="closer",
        bounds=(-2.0, 2.0),
        ideal=0.0,
        interval="bootstrap over targets and attributes; one-sided permutation p value, exact if there are few splits",
    )
    inputs = base.label_columns([], predictions=ListOf(Value("float64")), references=Value("string"))
    score = staticmethod(_score_of_rows)
