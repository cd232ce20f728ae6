"""Intervals by the bootstrap and p values by permutation, always with a seed.

An interval is the percentile interval of a statistic over resamples of the items (Efron 1979). Items that belong
together (sentences about one term, rows of one text) are drawn together. Items of a stratum are drawn within it. A p
value is the share of permutations whose statistic is at least the observed one; the observed order is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, combinations
from typing import Any

import numpy as np

from .base import Floats, Ints, whole

Statistic = Callable[[Ints], Mapping[str, float]]

# The relative difference up to which two sums count as equal: in another order they differ by rounding only.
_ROUNDING = 1e-9


def tail_quantiles(confidence: float) -> tuple[float, float]:
    """The two quantiles between which the share `confidence` of a distribution is."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: write a share between 0 and 1, such as 0.95.")
    return (1 - confidence) / 2, (1 + confidence) / 2


def bootstrap(
    statistic: Statistic,
    count: int,
    *,
    strata: Sequence[Any] | None = None,
    clusters: Sequence[Any] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures that a statistic returns, and their percentile intervals.

    Args:
        statistic: Indices of the items drawn → figures by name; NaN if a figure has no value.
        count: How many items there are.
        strata: The stratum of each item; each stratum keeps its size.
        clusters: The cluster of each item; the items of a cluster are drawn together. Not with `strata`.
        resamples: How often to draw.
        confidence: The share of the resamples within the interval.
        seed: The seed of the draws.

    Returns:
        Figure → its value over all items, and what `percentiles` returns.

    Raises:
        ValueError: If there are no items, an argument is out of range, or a figure is undefined in more than half of
            the resamples.
    """
    resamples = whole("resamples", resamples, 2)
    tail_quantiles(confidence)
    if strata is not None and clusters is not None:
        raise ValueError("Both strata and clusters are given: give one of them.")
    generator, all_items = np.random.default_rng(seed), np.arange(whole("count", count))
    keys, name = (strata, "strata") if clusters is None else (clusters, "clusters")
    if keys is not None and len(keys) != count:
        raise ValueError(f"{len(keys)} {name}, but {count} items: give one for each.")
    places: dict[Any, list[int]] = {}
    for place, key in enumerate([None] * count if keys is None else keys):
        places.setdefault(key, []).append(place)
    groups = [np.array(own, dtype=np.int64) for own in places.values()]
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        if clusters is not None:
            parts = [groups[i] for i in generator.integers(len(groups), size=len(groups))]
        else:
            parts = [group[generator.integers(len(group), size=len(group))] for group in groups]
        for name, value in statistic(np.concatenate(parts)).items():
            drawn.setdefault(name, []).append(float(value))
    intervals = percentiles({name: np.array(values) for name, values in drawn.items()}, confidence)
    return {**{name: float(value) for name, value in statistic(all_items).items()}, **intervals}


def percentiles(resampled: Mapping[str, Floats], confidence: float = 0.95) -> dict[str, Any]:
    """Percentile intervals of figures: each has its values in the resamples, `(resamples,)`, NaN where it has none.

    Returns `intervals`, figure → `[low, high]`, from the resamples in which it has a value. Raises `ValueError` if the
    confidence is not a share, or a figure is undefined in more than half of the resamples, as nothing varies there.
    """
    ends, bounds = tail_quantiles(confidence), {}
    for name, values in resampled.items():
        defined, drawn = values[np.isfinite(values)], len(values)
        if 2 * len(defined) < drawn:
            missing = drawn - len(defined)
            raise ValueError(f"{name} has no value in {missing} of {drawn} resamples: give more or other items.")
        bounds[name] = [float(bound) for bound in np.quantile(defined, ends)]
    return {"intervals": bounds}


def permutation_test(
    observed: float, null: Floats, *, exact: bool = False, scale: float | None = None
) -> dict[str, Any]:
    """Test whether a statistic is greater than its values after permutations: all of them (`exact`), or a sample.

    Rounding is relative to `scale`, by default to the statistic itself. Returns `p_value`, the share of the
    permutations whose statistic is at least the observed one, never 0; `exact`; and how many `permutations` there were.
    The observed order is one of them if `exact`, and is added to the sample if not.
    """
    reached = int((null >= observed - _ROUNDING * (abs(observed) if scale is None else scale)).sum())
    p_value = reached / len(null) if exact else (reached + 1) / (len(null) + 1)
    return {"p_value": p_value, "exact": exact, "permutations": len(null)}


def subset_test(values: Floats, size: int, *, permutations: int = 20_000, seed: int = 0) -> dict[str, Any]:
    """Test whether the first `size` values have a greater sum than a random choice of `size` values (one-sided).

    All choices are used if there are at most `permutations`; otherwise `permutations` choices are drawn. Returns what
    `permutation_test` does.
    """
    permutations = whole("permutations", permutations)
    if not 0 < size < len(values):
        raise ValueError(f"The first set has {size} of {len(values)} items: both sets need at least one.")
    exact = math.comb(len(values), size) <= permutations
    if exact:
        null = values[np.array(list(combinations(range(len(values)), size)), dtype=np.int64)].sum(1)
    else:
        tiled = np.tile(values, (permutations, 1))
        null = np.random.default_rng(seed).permuted(tiled, axis=1)[:, :size].sum(1)
    return permutation_test(float(values[:size].sum()), null, exact=exact, scale=float(np.abs(values).sum()))


def shuffle_test(
    statistic: Callable[[Ints], float], count: int, *, permutations: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Test whether a statistic is greater than after shuffling items; two-sided if the statistic is an absolute value.

    The statistic is called with `(count,)` places from which the items are taken. Returns what `permutation_test` does.
    """
    generator, all_items = np.random.default_rng(seed), np.arange(count)
    draws = (generator.permutation(all_items) for _ in range(whole("permutations", permutations)))
    return permutation_test(statistic(all_items), np.array([statistic(index) for index in draws]))


def sign_test(successes: int, trials: int) -> float:
    """The exact two-sided p value of `successes` if each trial succeeds with probability ½; 1.0 without a trial."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials: give counts between 0 and the number of trials.")
    rarer = min(successes, trials - successes)
    # The numbers of ways in which 0, 1, … and `rarer` of the trials succeed.
    ways = accumulate(range(rarer), lambda last, k: last * (trials - k) // (k + 1), initial=1)
    return min(1.0, 2 * sum(ways) / 2**trials)
