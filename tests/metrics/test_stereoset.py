"""StereoSet's three scores against the authors' counting."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from hf_erasure.metrics import stereoset


def authors(scores: np.ndarray, terms: list[str]) -> dict[str, float]:
    """The counts of the authors' evaluation script, term by term."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for (pro, anti, unrelated), term in zip(scores, terms, strict=True):
        counts[term]["pro" if pro > anti else "anti"] += 1
        counts[term]["related"] += int(pro > unrelated)
        counts[term]["related"] += int(anti > unrelated)
        counts[term]["total"] += 1
    ss = np.mean([100 * count["pro"] / count["total"] for count in counts.values()])
    lms = np.mean([100 * count["related"] / (2 * count["total"]) for count in counts.values()])
    return {"lms": lms, "ss": ss, "icat": lms * min(ss, 100 - ss) / 50}


def sample(items: int = 200, terms: int = 30, pro: float = 0.0, sense: float = 0.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(items, 3)) + np.array([pro + sense, sense, 0.0])
    return scores, [f"term{i}" for i in rng.integers(terms, size=items)]


@pytest.mark.parametrize(("pro", "sense"), [(0.0, 0.0), (0.5, 1.0), (-0.7, 0.3)])
def test_scores_are_the_authors(pro: float, sense: float):
    data = sample(pro=pro, sense=sense)
    found = stereoset.score(*data, resamples=20)
    for name, value in authors(*data).items():
        assert found[name] == pytest.approx(value)
    assert found["items"] == 200 and found["terms"] == len(set(data[1])) and found["ties"] == 0


def test_ideal_and_worst_models():
    terms = ["a", "a", "b", "b"]
    ideal = stereoset.score([[2, 1, 0], [1, 2, 0]] * 2, terms, resamples=20)
    assert (ideal["lms"], ideal["ss"], ideal["icat"]) == (100, 50, 100)
    stereotyped = stereoset.score([[2, 1, 0]] * 4, terms, resamples=20)
    assert (stereotyped["lms"], stereotyped["ss"], stereotyped["icat"]) == (100, 100, 0)
    anti = stereoset.score([[1, 2, 0]] * 4, terms, resamples=20)
    assert (anti["ss"], anti["icat"], anti["ss_distance"]) == (0, 0, 50)
    senseless = stereoset.score([[1, 0, 2], [0, 1, 2]] * 2, terms, resamples=20)
    assert (senseless["lms"], senseless["icat"]) == (0, 0)


def test_ties_count_half():
    found = stereoset.score([[1, 1, 1], [1, 1, 1]], ["a", "b"], resamples=20)
    assert (found["lms"], found["ss"], found["icat"], found["ties"]) == (50, 50, 50, 6)


def test_a_scale_that_grows_changes_nothing():
    scores, terms = sample(pro=0.5, sense=1.0)
    assert stereoset.score(np.exp(scores), terms, resamples=20) == stereoset.score(scores, terms, resamples=20)


def test_interval_covers_ss():
    # Stereotypes win with probability Φ(0.5/√2) = 0.638, whatever the term.
    hits = 0
    for seed in range(100):
        low, high = stereoset.score(*sample(300, 40, 0.5, 1.0, seed), resamples=200, seed=seed)["intervals"]["ss"]
        hits += low <= 63.82 <= high
    assert 87 <= hits <= 99  # 95 ± 2.2, and percentile intervals of 40 terms are a little narrow


def test_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 2\): give \(rows, 3\)"):
        stereoset.score([[1, 2], [1, 2]], ["a", "b"])
    with pytest.raises(ValueError, match="one class 'a'"):
        stereoset.score([[1, 2, 3], [1, 2, 3]], ["a", "a"])
