"""WEAT against the definition written out, and its p value against all splits."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from scipy.spatial.distance import cosine

from hf_erasure.metrics import WEAT, weat


def sets(x: int = 5, y: int = 5, a: int = 4, b: int = 3, shift: float = 0.7, seed: int = 0):
    rng = np.random.default_rng(seed)
    direction = np.eye(8)[0]
    return [rng.normal(size=(size, 8)) + side * shift * direction for size, side in ((x, 1), (y, -1), (a, 1), (b, -1))]


def by_hand(x, y, a, b) -> tuple[float, float]:
    """The formulas of Caliskan et al. 2017, with scipy's cosine and all splits in a loop."""

    def s(w) -> float:
        return np.mean([1 - cosine(w, v) for v in a]) - np.mean([1 - cosine(w, v) for v in b])

    both = [*x, *y]
    associations = [s(w) for w in both]
    effect = (np.mean(associations[: len(x)]) - np.mean(associations[len(x) :])) / np.std(associations, ddof=1)
    observed = np.mean(associations[: len(x)]) - np.mean(associations[len(x) :])
    reached = 0
    for chosen in combinations(range(len(both)), len(x)):
        first = [associations[i] for i in chosen]
        rest = [associations[i] for i in range(len(both)) if i not in chosen]
        reached += np.mean(first) - np.mean(rest) >= observed - 1e-12
    return effect, reached / comb(len(both), len(x))


@pytest.mark.parametrize(("x", "y"), [(5, 5), (3, 6)])
@pytest.mark.parametrize("shift", [0.0, 0.3, 0.7])
def test_effect_and_p_are_those_of_the_definition(x: int, y: int, shift: float):
    data = sets(x, y, shift=shift)
    effect, p = by_hand(*data)
    found = weat.score(*data, resamples=20)
    assert found["effect_size"] == pytest.approx(effect, rel=1e-12)
    assert found["exact"] and found["permutations"] == comb(x + y, x)
    assert found["p_value"] == p


def test_sets_that_change_places_turn_the_sign():
    x, y, a, b = sets()
    plain = weat.score(x, y, a, b, resamples=20)
    assert plain["effect_size"] > 0
    for turned in ((y, x, a, b), (x, y, b, a)):
        assert weat.score(*turned, resamples=20)["effect_size"] == pytest.approx(-plain["effect_size"])
    assert weat.score(y, x, b, a, resamples=20)["effect_size"] == pytest.approx(plain["effect_size"])


def test_length_of_vectors_does_not_matter():
    x, y, a, b = sets()
    scaled = weat.score(3 * x, y / 7, 100 * a, b, resamples=20)
    assert scaled["effect_size"] == pytest.approx(weat.score(x, y, a, b, resamples=20)["effect_size"])


def test_effect_is_below_two_and_nearly_reaches_it():
    a = np.array([[1.0, 0.0]])
    b = np.array([[0.0, 1.0]])
    x, y = np.tile([1.0, 0.0], (40, 1)), np.tile([0.0, 1.0], (40, 1))
    found = weat.score(x, y, a, b, resamples=20, permutations=500)
    # The value is 2 · sqrt((n − 1)/n), for a deviation with n − 1 in its denominator.
    assert found["effect_size"] == pytest.approx(2 * np.sqrt(79 / 80))
    assert not found["exact"] and found["p_value"] == 1 / 501


def test_mean_over_tests_is_that_of_the_effects_and_its_interval_knows_of_shared_items():
    x, y, a, b = sets(shift=0.3)
    vectors = np.concatenate([x, y, a, b])
    one = dict(zip("XYAB", (range(5), range(5, 10), range(10, 14), range(14, 17)), strict=True))
    turned = {**one, "X": one["Y"], "Y": one["X"]}
    single = weat.mean_absolute_effect([one], vectors)
    assert single["mean_absolute_effect_size"] == pytest.approx(abs(by_hand(x, y, a, b)[0]), rel=1e-12)
    # A test and its mirror image have the same items, so that both have the information of one, in every resample.
    twice = weat.mean_absolute_effect([one, turned], vectors)
    assert twice["mean_absolute_effect_size"] == pytest.approx(single["mean_absolute_effect_size"])
    assert twice["intervals"] == single["intervals"]
    # Two tests without a common item have more information: their interval is narrower.
    low, high = single["intervals"]["mean_absolute_effect_size"]
    other = {name: [row + len(vectors) for row in rows] for name, rows in one.items()}
    apart = weat.mean_absolute_effect([one, other], np.concatenate([vectors, vectors]))
    ends = apart["intervals"]["mean_absolute_effect_size"]
    assert low < ends[0] < apart["mean_absolute_effect_size"] < ends[1] < high


def test_few_effects_of_noise_are_significant():
    significant = 0
    for seed in range(100):
        found = weat.score(*sets(8, 8, 8, 8, shift=0.0, seed=seed), resamples=2, permutations=500, seed=seed)
        significant += found["p_value"] <= 0.05
    assert 0 < significant <= 12  # 5 ± 2.2


def test_metric_sorts_the_sets_by_name():
    data = sets()
    rows = [(name, row) for name, part in zip("XYAB", data, strict=True) for row in part.tolist()]
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = [rows[i] for i in sorted(order, key=lambda i: i % 3)]
    found = WEAT().compute(
        predictions=[row for _, row in shuffled], references=[name for name, _ in shuffled], resamples=20
    )
    assert found["effect_size"] == pytest.approx(weat.score(*data, resamples=20)["effect_size"])
    assert found["sizes"] == {"X": 5, "Y": 5, "A": 4, "B": 3}


def test_refused():
    x, y, a, b = sets()
    with pytest.raises(ValueError, match="X has 1 and Y 5 targets"):
        weat.score(x[:1], y, a, b)
    with pytest.raises(ValueError, match="One of 7 vectors is 0"):
        weat.score(x, y, np.zeros_like(a), b)
    with pytest.raises(ValueError, match="widths"):
        weat.score(x[:, :3], y, a, b)
    with pytest.raises(ValueError, match="same association"):
        weat.score(np.ones((3, 8)), np.ones((3, 8)), a, b)
    with pytest.raises(ValueError, match="A are empty"):
        weat.score(x, y, [], b)
    with pytest.raises(ValueError, match=r"name the sets \['X', 'Z'\]"):
        WEAT().compute(predictions=x.tolist()[:2], references=["X", "Z"])
