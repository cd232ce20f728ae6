"""BPI, FPI, MPI, the balance of k classes and the encoder's correlation against the paper's formulas by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import balanced_accuracy_score

from hf_erasure.metrics import encoder_correlation, prediction_balance


def probabilities(texts: int = 50, classes: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes + 1), size=texts)[:, :classes]


def test_goals_are_the_papers_formulas():
    p = probabilities()
    f, m = p.T
    found = prediction_balance.score(p, ["female", "male"], lms=0.8)
    assert found["bpi"] == pytest.approx(0.8 * np.mean((1 - abs(f - m)) * (f + m)))
    assert found["fpi"] == pytest.approx(0.8 * np.mean((1 - m) * f)) == found["female"]
    assert found["mpi"] == pytest.approx(0.8 * np.mean((1 - f) * m)) == found["male"]
    assert found["balance"] == pytest.approx(0.8 * np.mean((1 - abs(f - m)) * np.minimum(f, m)))
    assert found["means"] == pytest.approx({"female": f.mean(), "male": m.mean()})


def test_columns_may_stand_either_way():
    p = probabilities()
    one, other = (
        prediction_balance.score(p[:, order], [["female", "male"][i] for i in order]) for order in ([0, 1], [1, 0])
    )
    for goal in ("bpi", "fpi", "mpi", "balance", "female", "male"):
        assert one[goal] == other[goal]


def test_k_classes():
    p = probabilities(classes=4)
    found = prediction_balance.score(p, ["asian", "black", "white", "other"])
    assert found["balance"] == pytest.approx(np.mean((1 - (p.max(1) - p.min(1))) * p.min(1)))
    assert found["white"] == pytest.approx(np.mean((1 - p[:, [0, 1, 3]].max(1)) * p[:, 2]))
    assert "bpi" not in found and "fpi" not in found and "mpi" not in found


@pytest.mark.parametrize(
    "classes", [["jewish", "christian", "muslim"], ["fox", "dog"], ["female", "male", "other"], ["male", "muslim"]]
)
def test_female_and_male_prediction_is_of_female_and_male_only(classes: list[str]):
    p = probabilities(classes=len(classes))
    assert not {"fpi", "mpi"} & set(prediction_balance.score(p, classes, resamples=5))
    with pytest.raises(ValueError, match="goal='mpi' is not defined"):
        prediction_balance.score(p, classes, goals=["mpi"])


@pytest.mark.parametrize("classes", [["M", "F"], ["woman", "man"], ["Feminine", "masculine"]])
def test_female_and_male_have_other_names_too(classes: list[str]):
    p = probabilities()
    found = prediction_balance.score(p, classes, resamples=5)
    female, male = ("F", "M") if "F" in classes else tuple(classes)
    assert found["fpi"] == found[female] and found["mpi"] == found[male]


def test_limits_and_direction():
    assert prediction_balance.score([[0.5, 0.5]] * 3)["bpi"] == 1.0
    assert prediction_balance.score([[1.0, 0.0]] * 3)["bpi"] == 0.0
    assert prediction_balance.score([[1.0, 0.0]] * 3)["fpi"] == 1.0
    assert prediction_balance.score([[0.5, 0.5]] * 3, lms=0.0)["bpi"] == 0.0
    assert prediction_balance.score([[0.5, 0.5]] * 3)["balance"] == 0.5


def test_interval_covers_bpi():
    truth = prediction_balance.score(probabilities(200_000, seed=99), goals=["bpi"], resamples=2)["bpi"]
    hits = 0
    for seed in range(100):
        low, high = prediction_balance.score(
            probabilities(seed=seed), goals=["bpi"], resamples=200, seed=seed
        )["intervals"]["bpi"]  # fmt: skip
        hits += low <= truth <= high
    assert 87 <= hits <= 99  # 95 ± 2.2, and percentile intervals of 50 texts are a little narrow


@pytest.mark.parametrize(
    ("p", "options", "words"),
    [
        ([[0.7, 0.7]], {}, "a sum above 1"),
        ([[-0.1, 0.5]], {}, "negative"),
        ([[0.1, 0.5]], {"lms": 1.2}, "lms=1.2"),
        ([[0.1, 0.5]], {"goals": ["mdi"]}, "goal='mdi' is not defined"),
        ([[0.1, 0.5, 0.1]], {}, r"give \(rows, 2\)"),
        ([[0.1, 0.5]], {"classes": ["a", "a"]}, "two or more different names"),
    ],
)
def test_balance_refuses(p, options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        prediction_balance.score(p, **options)


def encoded(texts: int = 90, seed: int = 0, neutral: bool = True):
    rng = np.random.default_rng(seed)
    labels = rng.choice([-1, 0, 1] if neutral else [-1, 1], size=texts)
    return np.tanh(labels + 0.7 * rng.normal(size=texts)), labels


def test_correlation_and_accuracy_are_those_of_scipy_and_scikit_learn():
    values, labels = encoded()
    found = encoder_correlation.score(values, labels, resamples=50)
    some = labels != 0
    assert found["cor"] == pytest.approx(pearsonr(values[some], labels[some]).statistic)
    assert found["cor_enc"] == pytest.approx(pearsonr(values, labels).statistic)
    assert found["acc"] == pytest.approx(balanced_accuracy_score(labels[some], np.sign(values[some])))
    decided = np.where(values > 0.5, 1, np.where(values < -0.5, -1, 0))
    assert found["acc_enc"] == pytest.approx(balanced_accuracy_score(labels, decided))


def test_without_neutral_texts_there_are_two_figures():
    found = encoder_correlation.score(*encoded(neutral=False), resamples=50)
    assert set(found["intervals"]) == {"cor", "acc"} and "cor_enc" not in found


def test_encoder_direction_and_limits():
    _, labels = encoded()
    assert encoder_correlation.score(labels, labels, resamples=5)["cor"] == pytest.approx(1.0)
    turned = encoder_correlation.score(-labels, labels, resamples=5)
    assert turned["cor"] == pytest.approx(-1.0) and turned["acc"] == 0.0


def test_interval_is_near_fishers():
    values, labels = encoded(400, neutral=False)
    found = encoder_correlation.score(values, labels, resamples=1000)
    # Fisher's interval is for normal values, and labels have two: it is only near, but twice its width is enough.
    z, half = np.arctanh(found["cor"]), 1.96 / np.sqrt(397)
    low, high = found["intervals"]["cor"]
    assert np.tanh(z - 2 * half) < low < found["cor"] < high < np.tanh(z + 2 * half)


def test_a_neuron_that_says_always_the_same_has_no_correlation():
    found = encoder_correlation.score([0.3] * 4, [1, -1, 1, -1], resamples=5)
    assert math.isnan(found["cor"]) and found["acc"] == 0.5 and set(found["intervals"]) == {"acc"}


@pytest.mark.parametrize("labels", [[1, 1], [1, 0], [2, -1], [1, -2]])
def test_encoder_refuses(labels: list[int]):
    with pytest.raises(ValueError, match=r"give texts of \+1 and of −1"):
        encoder_correlation.score([0.1, 0.2], labels)
