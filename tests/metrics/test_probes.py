"""Linear leakage and description length against scikit-learn, scipy and known values of synthetic data."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from hf_erasure.erasers import Eraser
from hf_erasure.metrics import linear_leakage, minimum_description_length


def data(rows: int = 150, width: int = 5, classes: int = 3, distance: float = 1.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=rows)
    centres = distance * rng.normal(size=(classes, width))
    return centres[y] + rng.normal(size=(rows, width)) * (1 + np.arange(width)) + 3.0, y


def test_leakage_is_that_of_a_cross_validated_probe():
    x, y = data(distance=1.5)
    x = x * np.array([1e-4, 1e-3, 1e-2, 1.0, 100.0])  # a penalty hides small features, unless standardised
    groups = np.arange(len(y)) // 3
    right = 0
    for fitted, held in StratifiedGroupKFold(4, shuffle=True, random_state=7).split(x, y, groups):
        assert not set(groups[fitted]) & set(groups[held])
        mean, deviation = x[fitted].mean(0), x[fitted].std(0)
        inputs = (x - mean) / deviation
        found = LogisticRegression(tol=1e-9).fit(inputs[fitted], y[fitted])
        right += (found.predict(inputs[held]) == y[held]).sum()
    found = linear_leakage.score(x, y.tolist(), groups.tolist(), folds=4, seed=7)
    assert found["accuracy"] == right / len(y)
    assert found["majority"] == max(np.bincount(y)) / len(y)
    assert found["leakage"] == found["accuracy"] - found["majority"] > 0.1
    assert found["groups"] == 50 and found["rows"] == 150 and found["classes"] == 3


def test_a_probe_that_knows_the_group_does_not_count():
    # Every group has a place and a label of its own: a row shows its group, but a new group does not show its label.
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(60), 10)
    x, y = rng.normal(size=(60, 80))[groups] + 0.01 * rng.normal(size=(600, 80)), (np.arange(60) % 2)[groups]
    apart, together = linear_leakage.score(x, y), linear_leakage.score(x, y, groups)
    assert apart["leakage"] > 0.45
    assert abs(together["leakage"]) < 0.2  # two standard deviations of the accuracy on 60 groups
    # All rows of a group are right or wrong together: 60 draws, ± 0.13, where 600 would give ± 0.04.
    assert np.ptp(together["intervals"]["accuracy"]) > 0.16


def test_erasure_takes_the_leakage_away():
    x, y = data(rows=600, classes=2, distance=2.0)
    erased = Eraser.fit(torch.tensor(x), torch.tensor(y))(torch.tensor(x))
    before, after = linear_leakage.score(x, y), linear_leakage.score(erased, y)
    assert before["intervals"]["leakage"][0] > 0.05
    assert after["leakage"] <= 0.02
    long, short = (minimum_description_length.score(rows, y) for rows in (erased, x))
    assert long["codelength_bits"] > short["codelength_bits"] and long["compression"] <= 1.02 < short["compression"]


@pytest.mark.parametrize(
    ("x", "y", "options", "words"),
    [
        (np.eye(4), ["a"] * 4, {}, "one class 'a'"),
        (np.eye(4), ["a", "a", "b", "b"], {"folds": 5}, "folds=5, but there are 4 groups"),
        (np.eye(4), ["a", "a", "a", "b"], {"folds": 2}, "All rows of the class 'b' are in one fold"),
        (np.eye(4), ["a", "a", "b", "b"], {"folds": 3}, "the largest class has 2 rows"),
        (np.eye(4), ["a", "a", "b", "b"], {"folds": 1}, "folds=1"),
        (np.eye(4), ["a", "a", "b", "b"], {"folds": 2, "l2": 0.0}, "l2=0.0"),
        (np.eye(4), ["a", "a", "b", "b"], {"folds": 2, "probe": "tree"}, "probe='tree': write one of 'linear'"),
        (np.zeros(4), ["a", "a", "b", "b"], {}, r"shape \(4,\): give \(rows, width\)"),
        ([[1.0], [1.0, 2.0]], ["a", "b"], {}, "rows of one length"),
    ],
)
def test_leakage_refuses(x, y, options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        linear_leakage.score(x, y, **options)


def test_constant_features_do_no_harm():
    x, y = data(classes=2, distance=2.0)
    wide = np.concatenate([x, np.full((len(x), 2), 0.1)], 1)
    assert linear_leakage.score(wide, y)["accuracy"] == linear_leakage.score(x, y)["accuracy"]


def bits_by_hand(x: np.ndarray, y: np.ndarray, ends: list[int], classes: int) -> float:
    """The online code with scipy's minimiser: one softmax row for each class; for two classes one logit."""
    z = np.c_[(x - x.mean(0)) / x.std(0), np.ones(len(x))]
    rows = 1 if classes == 2 else classes

    def log_p(theta: np.ndarray, part: np.ndarray) -> np.ndarray:
        scores = part @ theta.reshape(rows, -1).T
        return log_softmax(np.c_[np.zeros(len(part)), scores] if rows == 1 else scores, axis=1)

    total = ends[0] * np.log2(classes)
    for known, end in pairwise(ends):

        def loss(theta: np.ndarray, known: int = known) -> float:
            return -log_p(theta, z[:known])[np.arange(known), y[:known]].sum() + (theta**2).sum() / 2

        theta = minimize(loss, np.zeros(rows * z.shape[1]), method="BFGS", options={"gtol": 1e-7, "maxiter": 5000}).x
        total -= log_p(theta, z[known:end])[np.arange(end - known), y[known:end]].sum() / np.log(2)
    return total


@pytest.mark.parametrize("classes", [2, 3])
def test_codelength_is_that_of_scipy(classes: int):
    x, y = data(rows=60, width=3, classes=classes, distance=2.0)
    found = minimum_description_length.score(x, y.tolist(), l2=1)
    ends = [1, 2, 4, 8, 15, 30, 60]
    assert found["portions"] == ends
    order = np.random.default_rng(0).permutation(60)
    x, y = x[order], y[order]  # the first probe has seen one class only
    # scipy computes gradients by finite differences, exact to about 1e-5 in theta.
    assert found["codelength_bits"] == pytest.approx(bits_by_hand(x, y, ends, classes), rel=1e-4)
    assert found["uniform_bits"] == pytest.approx(60 * np.log2(classes))
    assert found["compression"] == pytest.approx(found["uniform_bits"] / found["codelength_bits"])


def test_portions_are_the_papers():
    x, y = data(rows=1000, width=2)
    assert minimum_description_length.score(x, y, resamples=2)["portions"] == [
        1,
        2,
        4,
        8,
        16,
        32,
        63,
        125,
        250,
        500,
        1000,
    ]


def test_noise_does_not_compress_and_signal_does():
    rng = np.random.default_rng(4)
    y = rng.integers(2, size=400)
    noise = minimum_description_length.score(rng.normal(size=(400, 4)), y)
    signal = minimum_description_length.score(y[:, None] + 0.1 * rng.normal(size=(400, 4)), y)
    assert noise["intervals"]["compression"][0] < 1.0 and noise["compression"] < 1.02
    assert signal["compression"] > 5


def test_the_penalty_that_was_best_codes_the_next_portion():
    x, y = data(rows=300, width=20, classes=2, distance=0.7)
    penalties = (0.1, 10.0, 1000.0)
    alone = np.array([minimum_description_length.score(x, y, l2=l2, resamples=2)["portion_bits"] for l2 in penalties])
    found = minimum_description_length.score(x, y, l2=penalties, resamples=2)
    chosen = [0, 2, *alone.argmin(0)[1:-1]]  # the uniform code, the greatest penalty, then the best one so far
    assert len(set(chosen)) > 1
    assert found["portion_bits"] == pytest.approx([alone[k, i] for i, k in enumerate(chosen)])
    assert found["codelength_bits"] == pytest.approx(sum(found["portion_bits"]))


def test_many_features_of_noise_cost_hardly_more_than_the_uniform_code():
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(300, 200)), rng.integers(2, size=300)
    assert minimum_description_length.score(x, y)["compression"] > 0.93
    # With one weak penalty, the probe is confident and wrong.
    assert minimum_description_length.score(x, y, l2=1.0)["compression"] < 0.6


def test_one_class_has_no_code():
    with pytest.raises(ValueError, match="one class"):
        minimum_description_length.score(np.eye(4), [1, 1, 1, 1])
