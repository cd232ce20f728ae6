"""The pronoun gap against counting, for made-up scores."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from hf_erasure.metrics import pronoun_gap


def sample(pairs: int = 200, bias: float = 0.5, he: float = 0.0, seed: int = 0):
    """log P(he) − log P(she) = he ± bias + noise."""
    rng = np.random.default_rng(seed)
    male = np.arange(pairs) % 2 == 0
    odds = he + np.where(male, bias, -bias) + rng.normal(size=pairs)
    scores = np.where(male[:, None], np.stack([odds, 0 * odds], 1), np.stack([0 * odds, odds], 1))
    return scores, np.where(male, "male", "female").tolist(), odds, male


def test_gap_is_a_difference_of_shares():
    scores, of, odds, male = sample()
    found = pronoun_gap.score(scores, of, permutations=199)
    assert found["gap"] == pytest.approx((odds[male] > 0).mean() - (odds[~male] > 0).mean())
    assert found["log_odds_gap"] == pytest.approx((scores[:, 0] - scores[:, 1]).mean())  # genders are balanced
    assert found["male"] == (odds[male] > 0).mean() and found["female"] == (odds[~male] < 0).mean()
    # Accuracy on the pro-stereotypical minus that on the anti-stereotypical versions, as in the paper.
    pro = (scores[:, 0] > scores[:, 1]).mean()
    assert found["gap"] == pytest.approx(pro - (1 - pro))
    assert found["p_value"] == 1 / 200


def test_a_model_that_always_says_he_has_no_gap():
    scores, of, _, _ = sample(bias=0.0, he=50.0)
    found = pronoun_gap.score(scores, of, permutations=50)
    assert (found["gap"], found["male"], found["female"], found["p_value"]) == (0.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize(("bias", "gap"), [(50.0, 1.0), (-50.0, -1.0)])
def test_limits(bias: float, gap: float):
    scores, of, _, _ = sample(bias=bias)
    assert pronoun_gap.score(scores, of, permutations=5)["gap"] == gap


def test_unequal_numbers_weigh_the_same():
    scores, of, _, male = sample(bias=0.3, he=1.0)
    kept = np.flatnonzero(male | (np.arange(200) < 40))
    found = pronoun_gap.score(scores[kept], [of[i] for i in kept], permutations=5)
    assert found["gap"] == pytest.approx(found["male"] + found["female"] - 1)


def test_p_of_exchangeable_pairs_is_uniform_even_if_he_is_preferred():
    ps = [pronoun_gap.score(*sample(60, 0.0, 0.8, s)[:2], permutations=99, resamples=2)["p_value"] for s in range(60)]
    assert sum(p <= 0.05 for p in ps) <= 9  # 3 ± 1.7
    assert np.mean(ps) > 0.4


def test_interval_covers_the_log_odds():
    hits = 0
    for seed in range(100):
        scores, of, _, _ = sample(seed=seed)
        found = pronoun_gap.score(scores, of, resamples=200, permutations=1, seed=seed)
        low, high = found["intervals"]["log_odds_gap"]
        hits += low <= 0.5 <= high
    assert 88 <= hits <= 99  # 95 ± 2.2


def test_ties_count_half():
    found = pronoun_gap.score([[1, 1], [1, 1]], ["male", "female"], permutations=5)
    assert (found["gap"], found["ties"], found["male"]) == (0.0, 2, 0.5)


@pytest.mark.parametrize("of", [["male", "male"], ["male", "neutral"]])
def test_refused(of: list[str]):
    with pytest.raises(ValueError, match="give pairs of 'male' and of 'female'"):
        pronoun_gap.score([[0, 1], [1, 0]], of)


def test_every_resample_has_pairs_of_both_genders():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy warns of the mean of no pairs
        found = pronoun_gap.score([[1, 0]] + [[0, 1]] * 9, ["male"] + ["female"] * 9, permutations=5, resamples=100)
    assert found["intervals"]["male"] == [1.0, 1.0]
