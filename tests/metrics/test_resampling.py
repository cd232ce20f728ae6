"""The coverage of intervals, and p values against brute force and scipy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from hf_erasure.metrics.resampling import bootstrap, percentiles, shuffle_test, sign_test, subset_test

TRIALS = 200


def covered(draw, truth: float, **options) -> float:
    """The share of trials whose interval holds the truth."""
    hits = 0
    for trial in range(TRIALS):
        sample, keys = draw(np.random.default_rng(trial))
        found = bootstrap(
            lambda index, sample=sample: {"mean": sample[index].mean()},
            len(sample), resamples=300, seed=trial, **dict.fromkeys(options, keys),
        )  # fmt: skip
        low, high = found["intervals"]["mean"]
        hits += low <= truth <= high
    return hits / TRIALS


# Of 200 intervals of 95 %, 10 ± 3 miss the truth; percentile intervals of 60 items are known to be a little narrow.
def test_interval_of_a_mean_covers_it():
    share = covered(lambda rng: (rng.normal(0.3, 1, 60), None), 0.3)
    assert 0.90 <= share <= 0.985


def test_items_that_belong_together_are_drawn_together():
    def draw(rng):
        return np.repeat(rng.normal(0, 1, 40), 5) + rng.normal(0, 0.1, 200), np.repeat(np.arange(40), 5).tolist()

    assert 0.88 <= covered(draw, 0.0, clusters=True) <= 0.985
    assert covered(draw, 0.0) < 0.75  # as if there were five times as many items


def test_strata_keep_their_size():
    strata = ["a"] * 3 + ["b"] * 7
    found = bootstrap(lambda index: {"a": float((index < 3).sum())}, 10, strata=strata, resamples=50)
    assert found["intervals"] == {"a": [3.0, 3.0]}


def test_interval_is_that_of_scipy():
    sample = np.random.default_rng(0).gamma(2, size=80)
    ours = bootstrap(lambda index: {"mean": sample[index].mean()}, 80, resamples=4000)["intervals"]["mean"]
    theirs = stats.bootstrap((sample,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    # The ends are quantiles of 4,000 draws: their standard error is about a twentieth of the sample mean's.
    assert np.allclose(ours, [theirs.low, theirs.high], atol=0.15 * sample.std() / np.sqrt(80))


def test_undefined_resamples_do_not_count_and_too_many_are_refused():
    assert percentiles({"x": np.array([1.0, np.nan, 1.0])}) == {"intervals": {"x": [1.0, 1.0]}}
    with pytest.raises(ValueError, match=r"x has no value in 40 of 40 resamples"):
        bootstrap(lambda index: {"x": float("nan")}, 5, resamples=40)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resamples": 1}, "resamples=1"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"strata": [1]}, "1 strata, but 4 items"),
        ({"strata": [1] * 4, "clusters": [1] * 4}, "Both strata and clusters"),
    ],
)
def test_wrong_arguments_are_refused(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        bootstrap(lambda index: {"x": 0.0}, 4, **options)


def test_a_count_may_be_a_whole_float():
    values = np.arange(30.0)

    def mean(index):
        return {"mean": values[index].mean()}

    assert bootstrap(mean, 30, resamples=50.0) == bootstrap(mean, 30, resamples=50)
    assert subset_test(values, 15, permutations=50.0) == subset_test(values, 15, permutations=50)


def test_exact_p_is_brute_force():
    values = np.array([0.3, 1.2, -0.5, 0.9, 0.1, -0.2, 0.9])
    observed = values[:3].sum()
    # Other subsets with an equal sum count too: 0.9 occurs twice.
    brute = [sum(values[list(chosen)]) >= observed - 1e-12 for chosen in combinations(range(7), 3)]
    found = subset_test(values, 3)
    assert found["exact"] and found["permutations"] == len(brute) == 35
    assert found["p_value"] == sum(brute) / len(brute)


def test_sampled_p_is_near_the_exact_one():
    values = np.random.default_rng(3).normal(size=14)
    exact, sampled = (subset_test(values, 7, permutations=most) for most in (20_000, 3000))
    assert exact["exact"] and not sampled["exact"] and sampled["permutations"] == 3000
    p = exact["p_value"]
    # Three standard errors of a share in 3,000 draws.
    assert abs(p - sampled["p_value"]) < 3 * np.sqrt(p * (1 - p) / 3000) + 1 / 3000


def test_sampled_p_is_never_zero():
    assert subset_test(np.arange(40.0)[::-1].copy(), 20, permutations=100)["p_value"] == 1 / 101


def test_p_values_of_pure_noise_are_uniform():
    ps = []
    for trial in range(TRIALS):
        rng = np.random.default_rng(trial)
        x, y = rng.normal(size=20), np.arange(20) < 10
        ps.append(
            shuffle_test(lambda i, x=x, y=y: abs(x[y[i]].mean() - x[~y[i]].mean()), 20, permutations=99)["p_value"]
        )
    assert stats.kstest(ps, "uniform").pvalue > 0.01


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (0, 1), (3, 10), (5, 10), (17, 20), (800, 1508)])
def test_sign_test_is_that_of_scipy(successes: int, trials: int):
    expected = stats.binomtest(successes, trials, 0.5).pvalue if trials else 1.0
    assert sign_test(successes, trials) == pytest.approx(expected, rel=1e-9)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        sign_test(3, 2)
