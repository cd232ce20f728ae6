"""Intervals by the bootstrap and p values by permutation, always with a seed.

An interval is the percentile interval of a statistic over resamples of the items (Efron 1979). Items that belong
together (sentences about one term, rows of one text) are drawn together; items of different strata are drawn within
their stratum. A p value counts the permutations whose statistic is at least the observed one, which is among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from .base import Floats, Ints, whole

Statistic = Callable[[Ints], Mapping[str, float]]

# Two sums of the same numbers in another order differ by rounding only, so they count as equal.
_SAME = 1e-9
# Numbers that are permuted at once: 32 MB of float64.
_CHUNK = 4_000_000


def tails(confidence: float) -> tuple[float, float]:
    """The two quantiles between which that share of a distribution lies."""
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
        statistic: Indices of the items drawn → figures by name; NaN where a figure has no value.
        count: How many items there are.
        strata: One entry an item; each stratum keeps its size.
        clusters: One entry an item; the items of a cluster are drawn together. Not with `strata`.
        resamples: How often to draw.
        confidence: Share of the resamples within the interval.
        seed: Of the draws.

    Returns:
        Figure → its value over all items, and what `percentiles` returns.

    Raises:
        ValueError: If there is nothing to draw from, an argument is out of range, or a figure is undefined in more
            than half of the resamples.
    """
    whole("resamples", resamples, 2)
    tails(confidence)
    if strata is not None and clusters is not None:
        raise ValueError("Both strata and clusters are given: draw by one of them.")
    generator, everything = np.random.default_rng(seed), np.arange(whole("count", count))
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
    return {**{name: float(value) for name, value in statistic(everything).items()}, **intervals}


def percentiles(resampled: Mapping[str, Floats], confidence: float = 0.95) -> dict[str, Any]:
    """Percentile intervals of figures, of each its resamples `(resamples,)`, NaN where it has no value.

    Returns `intervals`, figure → `[low, high]`; and `undefined_resamples`, figure → in how many resamples it had no
    value (nothing varied there), only where there were any. Raises a `ValueError` if the confidence is not a share, or
    a figure is undefined in more than half of the resamples.
    """
    ends, bounds, undefined = tails(confidence), {}, {}
    for name, values in resampled.items():
        defined = values[np.isfinite(values)]
        if missing := len(values) - len(defined):
            undefined[name] = missing
        if 2 * len(defined) < len(values):
            raise ValueError(f"{name} has no value in {missing} of {len(values)} resamples: give more or other items.")
        bounds[name] = [float(bound) for bound in np.quantile(defined, ends)]
    return {"intervals": bounds, **({"undefined_resamples": undefined} if undefined else {})}


def among(observed: float, null: Floats, *, exact: bool = False, scale: float | None = None) -> dict[str, Any]:
    """Test whether a statistic is greater than its values after permutations: all of them (`exact`), or a sample.

    Rounding is relative to `scale`; by default to the statistic itself. Returns `p_value`, the share of the
    permutations whose statistic is at least the observed one, never 0; `exact`; and how many `permutations` there were.
    The observed one is among them if exact, and counted besides if not.
    """
    reached = int((null >= observed - _SAME * (abs(observed) if scale is None else scale)).sum())
    p_value = reached / len(null) if exact else (reached + 1) / (len(null) + 1)
    return {"p_value": p_value, "exact": exact, "permutations": len(null)}


def subset_sums(
    values: Floats, size: int, *, permutations: int = 20_000, seed: int = 0
) -> tuple[dict[str, Any], Floats]:
    """Test whether the first `size` values sum to more than a random choice of so many (one-sided).

    Every choice is looked at if there are at most `permutations`, else so many are drawn. Returns what `among` does,
    and the sums of the choices.
    """
    whole("permutations", permutations)
    if not 0 < size < len(values):
        raise ValueError(f"The first set has {size} of {len(values)} items: both sets need at least one.")
    exact = math.comb(len(values), size) <= permutations
    if exact:
        null = values[np.array(list(combinations(range(len(values)), size)), dtype=np.int64)].sum(1)
    else:
        generator, rows, parts = np.random.default_rng(seed), max(1, _CHUNK // len(values)), []
        for start in range(0, permutations, rows):
            tiled = np.tile(values, (min(rows, permutations - start), 1))
            parts.append(generator.permuted(tiled, axis=1)[:, :size].sum(1))
        null = np.concatenate(parts)
    return among(float(values[:size].sum()), null, exact=exact, scale=float(np.abs(values).sum())), null


def shuffled(
    statistic: Callable[[Ints], float], count: int, *, permutations: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Test whether a statistic is greater than after shuffling items; of its absolute value the test is two-sided.

    The statistic is given `(count,)` places that the items are taken from. Returns what `among` does.
    """
    generator, everything = np.random.default_rng(seed), np.arange(count)
    draws = (generator.permutation(everything) for _ in range(whole("permutations", permutations)))
    return among(statistic(everything), np.array([statistic(index) for index in draws]))


def sign_test(successes: int, trials: int) -> float:
    """The exact two-sided p value of so many successes where each has the chance ½; 1.0 without a trial."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials: give counts between 0 and the number of trials.")

    def chance(k: int) -> float:
        choices = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        return math.exp(choices - trials * math.log(2))

    return min(1.0, 2 * sum(map(chance, range(max(successes, trials - successes), trials + 1))))
