"""CrowS-Pairs' score against counting, its p value against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from hf_erasure.metrics import crows_pairs


def sample(items: int = 200, share: float = 0.6, seed: int = 0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(items, 2))
    wins = rng.random(items) < share
    scores = np.where(wins[:, None], np.sort(scores)[:, ::-1], np.sort(scores))
    return scores, np.where(rng.random(items) < 0.8, "stereo", "antistereo").tolist(), wins


def test_score_is_a_percentage_of_pairs():
    scores, directions, wins = sample()
    found = crows_pairs.score(scores, directions)
    of = np.array(directions)
    assert found["score"] == pytest.approx(100 * wins.mean())
    assert found["distance"] == pytest.approx(abs(100 * wins.mean() - 50))
    assert found["stereo"] == pytest.approx(100 * wins[of == "stereo"].mean())
    assert found["antistereo"] == pytest.approx(100 * wins[of == "antistereo"].mean())
    assert found["p_value"] == pytest.approx(binomtest(int(wins.sum()), len(wins)).pvalue)
    assert found["items"] == 200 and found["ties"] == 0


def test_limits_and_ties():
    always = crows_pairs.score([[1, 0]] * 10, ["stereo"] * 10, resamples=20)
    assert (always["score"], always["distance"], always["antistereo"]) == (100, 50, None)
    never = crows_pairs.score([[0, 1]] * 10, ["stereo"] * 10, resamples=20)
    assert (never["score"], never["distance"]) == (0, 50)
    tied = crows_pairs.score([[1, 1]] * 10, ["stereo"] * 10, resamples=20)
    assert (tied["score"], tied["ties"], tied["p_value"]) == (50, 10, 1.0)


def test_exchanged_sentences_mirror_the_score():
    scores, directions, _ = sample()
    plain, turned = (crows_pairs.score(s, directions, resamples=20) for s in (scores, scores[:, ::-1]))
    assert plain["score"] == pytest.approx(100 - turned["score"])
    assert plain["p_value"] == turned["p_value"]


def test_interval_covers_the_share():
    hits = 0
    for seed in range(200):
        scores, directions, _ = sample(seed=seed)
        low, high = crows_pairs.score(scores, directions, resamples=200, seed=seed)["intervals"]["score"]
        hits += low <= 60 <= high
    assert 180 <= hits <= 198  # 190 ± 3.1


def test_unknown_direction_is_refused():
    with pytest.raises(ValueError, match=r"references hold \['both'\]"):
        crows_pairs.score([[0, 1]], ["both"])
