"""TPR gaps against counts by hand and scikit-learn's recall."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import recall_score

from hf_erasure.metrics import resampling, tpr_gap


def sample(rows: int = 900, seed: int = 0, gap: float = 0.2):
    """Predictions with a higher rate for women in the class with most women, and a lower one in that with fewest."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=rows)
    women = rng.random(rows) < np.array([0.8, 0.5, 0.2])[truth]
    rate = 0.7 + gap / 2 * np.where(women, 1, -1) * np.array([1, 0, -1])[truth]
    predicted = np.where(rng.random(rows) < rate, truth, (truth + 1) % 3)
    names = np.array(["nurse", "teacher", "surgeon"])
    return names[predicted].tolist(), names[truth].tolist(), np.where(women, "f", "m").tolist()


def test_gaps_are_differences_of_recall():
    predicted, truth, groups = sample()
    found = tpr_gap.score(predicted, truth, groups, resamples=20, permutations=20)
    of = np.array(groups)
    recalls = [
        recall_score(np.array(truth)[of == g], np.array(predicted)[of == g], labels=list(found["gaps"]), average=None)
        for g in ("f", "m")
    ]
    gaps = recalls[0] - recalls[1]
    assert np.allclose(list(found["gaps"].values()), gaps)
    assert found["rms"] == pytest.approx(np.sqrt(np.mean(gaps**2)))
    shares = [np.mean(of[np.array(truth) == name] == "f") for name in found["gaps"]]
    assert np.allclose(list(found["shares"].values()), shares)
    assert found["correlation"] == pytest.approx(np.corrcoef(gaps, shares)[0, 1])
    assert found["accuracy"] == np.mean(np.array(predicted) == np.array(truth))
    assert found["coverage"] == 1.0 and found["left_out"] == {}


def test_the_other_group_first_turns_the_sign():
    data = sample()
    one, other = (tpr_gap.score(*data, positive=g, resamples=5, permutations=5) for g in ("f", "m"))
    assert one["gaps"] == pytest.approx({name: -gap for name, gap in other["gaps"].items()})
    assert one["rms"] == pytest.approx(other["rms"])
    assert one["correlation"] == pytest.approx(other["correlation"])  # gaps and shares both change sign


def test_direction_and_limits():
    truth, groups = ["a", "a", "b", "b"], ["f", "m", "f", "m"]
    fair = tpr_gap.score(truth, truth, groups, resamples=5, permutations=20)
    assert fair["rms"] == 0.0 and fair["p_value"] == 1.0 and fair["correlation"] is None
    unfair = tpr_gap.score(["a", "b", "b", "a"], truth, groups, resamples=5, permutations=20)
    assert unfair["rms"] == 1.0 and unfair["gaps"] == {"a": 1.0, "b": 1.0}


def test_p_tells_a_gap_from_none():
    assert tpr_gap.score(*sample(gap=0.4), resamples=5, permutations=199)["p_value"] == 1 / 200
    ps = [tpr_gap.score(*sample(300, seed, 0.0), resamples=2, permutations=39)["p_value"] for seed in range(40)]
    # About 2 of 40 are below 0.05; 8 or more have a probability of 1 in 1,000.
    assert sum(p <= 0.05 for p in ps) < 8


def test_interval_of_a_class_covers_its_gap():
    hits = 0
    for seed in range(100):
        found = tpr_gap.score(*sample(600, seed), resamples=200, permutations=1, seed=seed)
        low, high = found["intervals"]["gaps.nurse"]
        hits += low <= 0.2 <= high
    assert 88 <= hits <= 99  # 95 ± 2.2


def test_resamples_and_shuffles_are_distributed_like_those_of_rows():
    """They are compared with draws and shuffles of rows, one resample after the other."""
    predicted, truth, groups = map(np.array, sample(400, gap=0.1))
    names, women = sorted(set(truth)), groups == "f"
    hit = predicted == truth

    def gaps(index, women):
        of, right = truth[index], hit[index]
        return np.array([right[(of == n) & women].mean() - right[(of == n) & ~women].mean() for n in names])

    def figures(index):
        each = gaps(index, women[index])
        return {"rms": np.sqrt(np.mean(each**2)), **{f"gaps.{n}": g for n, g in zip(names, each, strict=True)}}

    every = np.arange(len(truth))
    slow = resampling.bootstrap(figures, len(truth), strata=list(zip(truth, women, strict=True)), resamples=4000)
    rng = np.random.default_rng(0)

    def shuffled() -> float:
        """The figure after a shuffle of the groups within each class."""
        index = every.copy()
        for name in names:
            index[truth == name] = rng.permutation(every[truth == name])
        return float(np.sqrt(np.mean(gaps(every, women[index]) ** 2)))

    p = np.mean(np.array([shuffled() for _ in range(4000)]) >= np.sqrt(np.mean(gaps(every, women) ** 2)))
    fast = tpr_gap.score(predicted, truth, groups, resamples=4000, permutations=4000)
    # A bound of 4,000 resamples of this spread has a standard error of about 0.003.
    for name, bounds in slow["intervals"].items():
        assert fast["intervals"][name] == pytest.approx(bounds, abs=0.015)
    assert fast["p_value"] == pytest.approx(p, abs=0.04) and 0.05 < p < 0.95


def test_many_rows_take_seconds():
    rng = np.random.default_rng(0)
    truth = rng.integers(28, size=200_000)
    women = rng.random(200_000) < rng.random(28)[truth]
    predicted = np.where(rng.random(200_000) < 0.6, truth, (truth + 1) % 28)
    start = time.process_time()
    tpr_gap.score(predicted, truth, np.where(women, "f", "m"))
    assert time.process_time() - start < 5


def test_classes_without_both_groups_are_named():
    found = tpr_gap.score(
        ["a", "a", "b", "b", "c"], ["a", "a", "b", "b", "c"], ["f", "m", "f", "m", "m"], resamples=5, permutations=5
    )
    assert found["left_out"] == {"c": "has rows of one group only"}
    assert found["coverage"] == 0.8 and found["rows"] == 4 and set(found["gaps"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("predictions", "references", "groups", "words"),
    [
        (["a"] * 3, ["a"] * 3, ["f", "m", "d"], "hold 3 different values"),
        (["a"] * 3, ["a"] * 3, ["f"] * 3, "one class 'f'"),
        (["a", "b"], ["a", "b"], ["f", "m"], "No class has rows of both"),
        ([1, 2], ["1", "2"], ["f", "m"], "mix strings and numbers"),
        (["a", "a"], ["a", "a"], ["f"], "1 groups, but 2 references"),
    ],
)
def test_refused(predictions, references, groups, words: str):
    with pytest.raises(ValueError, match=words):
        tpr_gap.score(predictions, references, groups)


def test_unknown_positive_group_is_refused():
    with pytest.raises(ValueError, match=r"positive='x' is not one of the groups"):
        tpr_gap.score(["a", "a"], ["a", "a"], ["f", "m"], positive="x")


def test_whole_numbers_serve_as_labels():
    metric = tpr_gap.TPRGap()
    found = metric.compute(predictions=[0, 0, 1, 1], references=[0, 0, 1, 1], groups=[0, 1, 0, 1], resamples=5)
    assert found["rms"] == 0.0 and set(found["gaps"]) == {"0", "1"}
