"""Intervals by the bootstrap and p values by permutation, always with a seed.

An interval is the percentile interval of a statistic over resamples of the items (Efron 1979). Items that belong
together (sentences about one term, rows of one text) are drawn together; items of different strata are drawn within
their stratum. A p value counts the permutations whose statistic is at least the observed one, which is among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any

import numpy as np

from .checks import Floats, Ints, whole

Statistic = Callable[[Ints], Mapping[str, float]]

# Two sums of the same numbers in another order differ by rounding only, so they count as equal.
_SAME = 1e-9
# Numbers that are permuted at once.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Intervals:
    """Percentile intervals of some figures.

    Attributes:
        bounds: Figure → `[low, high]`.
        undefined: Figure → in how many resamples it had no value (nothing varied there); only where there were any.
    """

    bounds: dict[str, list[float]]
    undefined: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """`intervals`, and `undefined_resamples` where there were any."""
        found: dict[str, Any] = {"intervals": self.bounds}
        return found | {"undefined_resamples": self.undefined} if self.undefined else found


def tails(confidence: float) -> tuple[float, float]:
    """The two quantiles between which that share of a distribution lies.

    Raises:
        ValueError: If it is no share.
    """
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
) -> Intervals:
    """Percentile intervals of the figures that a statistic returns.

    Args:
        statistic: Indices of the items drawn → figures by name; NaN where a figure has no value.
        count: How many items there are.
        strata: One entry an item; each stratum keeps its size.
        clusters: One entry an item; the items of a cluster are drawn together. Not with `strata`.
        resamples: How often to draw.
        confidence: Share of the resamples within the interval.
        seed: Of the draws.

    Raises:
        ValueError: If there is nothing to draw from, an argument is out of range, or a figure is undefined in more
            than half of the resamples.
    """
    whole("resamples", resamples, 2)
    tails(confidence)
    if strata is not None and clusters is not None:
        raise ValueError("Both strata and clusters are given: draw by one of them.")
    generator = np.random.default_rng(seed)
    draws = _draws(generator, whole("count", count), strata, clusters)
    found: dict[str, list[float]] = {}
    for index in islice(draws, resamples):
        for name, value in statistic(index).items():
            found.setdefault(name, []).append(float(value))
    return percentiles({name: np.array(values) for name, values in found.items()}, confidence)


def percentiles(resampled: Mapping[str, Floats], confidence: float = 0.95) -> Intervals:
    """Percentile intervals of figures whose resamples are there already.

    Args:
        resampled: Figure → `(resamples,)` its values; NaN where it has none.
        confidence: Share of the resamples within the interval.

    Raises:
        ValueError: If the confidence is no share, or a figure is undefined in more than half of the resamples.
    """
    ends = tails(confidence)
    bounds, undefined = {}, {}
    for name, values in resampled.items():
        defined = values[np.isfinite(values)]
        if missing := len(values) - len(defined):
            undefined[name] = missing
        if 2 * len(defined) < len(values):
            raise ValueError(f"{name} has no value in {missing} of {len(values)} resamples: give more or other items.")
        bounds[name] = [float(bound) for bound in np.quantile(defined, ends)]
    return Intervals(bounds, undefined)


def _draws(
    generator: np.random.Generator, count: int, strata: Sequence[Any] | None, clusters: Sequence[Any] | None
) -> Iterator[Ints]:
    """Indices of the items drawn, again and again."""
    if clusters is not None:
        members = _positions(clusters, count, "clusters")
        while True:
            yield np.concatenate([members[i] for i in generator.integers(len(members), size=len(members))])
    members = _positions(strata, count, "strata") if strata is not None else [np.arange(count)]
    while True:
        yield np.concatenate([part[generator.integers(len(part), size=len(part))] for part in members])


def _positions(keys: Sequence[Any], count: int, name: str) -> list[Ints]:
    """The positions of each key, in the order in which keys first appear."""
    if len(keys) != count:
        raise ValueError(f"{len(keys)} {name}, but {count} items: give one for each.")
    found: dict[Any, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return [np.array(places, dtype=np.int64) for places in found.values()]


@dataclass(frozen=True)
class Permutation:
    """What a permutation test found.

    Attributes:
        p_value: Share of the permutations whose statistic is at least the observed one; never 0.
        exact: Whether every permutation was looked at.
        permutations: How many were; the observed one is among them if exact, and counted besides if not.
        null: `(permutations,)` Their statistics.
    """

    p_value: float
    exact: bool
    permutations: int
    null: Floats = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """`p_value`, `exact`, `permutations`."""
        return {"p_value": self.p_value, "exact": self.exact, "permutations": self.permutations}


def subset_sums(values: Floats, size: int, *, permutations: int = 20_000, seed: int = 0) -> Permutation:
    """Test whether the first `size` values sum to more than a random choice of so many (one-sided).

    Args:
        values: `(items,)`.
        size: How many of them are in the first set.
        permutations: Every choice is looked at if there are at most so many, else so many are drawn.
        seed: Of the draws.
    """
    whole("permutations", permutations)
    if not 0 < size < len(values):
        raise ValueError(f"The first set has {size} of {len(values)} items: both sets need at least one.")
    observed = float(values[:size].sum())
    exact = math.comb(len(values), size) <= permutations
    null = _every_sum(values, size) if exact else _sampled_sums(values, size, permutations, seed)
    return _judged(observed, null, exact, float(np.abs(values).sum()))


def shuffled(
    statistic: Callable[[Ints], float],
    count: int,
    *,
    strata: Sequence[Any] | None = None,
    permutations: int = 1000,
    seed: int = 0,
) -> Permutation:
    """Test whether a statistic is greater than after shuffling items, within strata where there are any.

    Args:
        statistic: `(count,)` where each item is taken from → the statistic; take its absolute value for a two-sided
            test.
        count: How many items.
        strata: One entry an item.
        permutations: How many shuffles to draw.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    members = _positions(strata, count, "strata") if strata is not None else [np.arange(count)]
    observed = statistic(np.arange(count))
    null = np.empty(whole("permutations", permutations))
    for draw in range(permutations):
        index = np.arange(count)
        for part in members:
            index[part] = generator.permutation(part)
        null[draw] = statistic(index)
    return among(observed, null)


def among(observed: float, null: Floats) -> Permutation:
    """Test whether a statistic is greater than those of random permutations.

    Args:
        observed: The statistic.
        null: `(permutations,)` Its values after each permutation.
    """
    return _judged(observed, null, False, abs(observed))


def _judged(observed: float, null: Floats, exact: bool, scale: float) -> Permutation:
    reached = int((null >= observed - _SAME * scale).sum())
    p = reached / len(null) if exact else (reached + 1) / (len(null) + 1)
    return Permutation(p, exact, len(null), null)


def _every_sum(values: Floats, size: int) -> Floats:
    chosen = np.array(list(combinations(range(len(values)), size)), dtype=np.int64)
    return values[chosen].sum(1)


def _sampled_sums(values: Floats, size: int, permutations: int, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(values))
    parts = []
    for start in range(0, permutations, rows):
        tiled = np.tile(values, (min(rows, permutations - start), 1))
        parts.append(generator.permuted(tiled, axis=1)[:, :size].sum(1))
    return np.concatenate(parts)


def sign_test(successes: int, trials: int) -> float:
    """The exact two-sided p value of so many successes where each has the chance ½; 1.0 without a trial.

    Raises:
        ValueError: If there are more successes than trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials: give counts between 0 and the number of trials.")
    most = max(successes, trials - successes)
    tail = sum(math.exp(_log_choices(trials, k) - trials * math.log(2)) for k in range(most, trials + 1))
    return min(1.0, 2 * tail)


def _log_choices(trials: int, chosen: int) -> float:
    return math.lgamma(trials + 1) - math.lgamma(chosen + 1) - math.lgamma(trials - chosen + 1)
