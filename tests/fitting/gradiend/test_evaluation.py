"""The numbers that judge a feature neuron and an edit, against formulas written out and scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from hf_erasure.fitting.gradiend import LanguageModelling
from hf_erasure.fitting.gradiend.gradients import EncodedValues, encoded, joint_metrics
from hf_erasure.fitting.gradiend.selection import Point, Scorer, Selection, choose, goal_by_name, scan

GENDERS = ("female", "male")


class Language:
    """Replaces the `LanguageModelling` of a causal model with rows of texts that are written out."""

    by_hits = False
    figures_of = LanguageModelling.figures_of

    def __init__(self, by_text: Callable[[], torch.Tensor]) -> None:
        self.by_text = by_text


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-1, 1), st.sampled_from([1, -1, 0])), min_size=6, max_size=40))
def test_metrics_are_those_of_numpy_and_scikit_learn(rows):
    rows = [*rows, (0.3, 1), (-0.4, -1), (0.1, 0)]
    values, labels = (np.array(column) for column in zip(*rows, strict=True))
    found = encoded(values.tolist(), labels.tolist(), GENDERS).metrics()
    featured = labels != 0
    # The sums are float64, of at most 43 terms.
    assert found["cor"] == pytest.approx(np.corrcoef(values[featured], labels[featured])[0, 1], abs=1e-9, nan_ok=True)
    assert found["cor_enc"] == pytest.approx(np.corrcoef(values, labels)[0, 1], abs=1e-9, nan_ok=True)
    decided = np.where(values > 0.5, 1, np.where(values < -0.5, -1, 0))
    recalls = [(decided[labels == label] == label).mean() for label in (-1, 0, 1)]
    assert found["acc_enc"] == pytest.approx(np.mean(recalls))
    signs = np.sign(values[featured])
    if 0 not in signs:
        assert found["acc"] == pytest.approx(balanced_accuracy_score(labels[featured], signs))


def test_values_that_do_not_vary_have_no_correlation():
    found = encoded([0.7, 0.7, 0.7], [1, -1, 1], GENDERS).metrics()
    assert math.isnan(found["cor"])
    assert found["acc"] == 0.5
    assert "cor_enc" not in found


def test_several_pairs_are_named_and_averaged():
    one = encoded([1, -1, 0.2], [1, -1, 1], ("a", "b"))
    other = encoded([1, 1, -1, -1], [1, -1, 1, -1], ("a", "c"))
    found = joint_metrics([one, other])
    assert found["acc_a_b"] == 1.0
    assert found["acc_a_c"] == 0.5
    assert found["acc"] == 0.75
    assert found["cor"] == pytest.approx((found["cor_a_b"] + found["cor_a_c"]) / 2)


def test_encoded_values_as_a_table():
    table = EncodedValues(torch.tensor([0.9, -0.9, 0.0]), torch.tensor([1, -1, 0]), GENDERS).to_pandas()
    assert table["class"].tolist() == ["female", "male", "neutral"]


P = torch.tensor([[0.6, 0.1], [0.2, 0.5]], dtype=torch.float64)  # texts x (female, male)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bpi", [(1 - 0.5) * 0.7, (1 - 0.3) * 0.7]),
        ("fpi", [(1 - 0.1) * 0.6, (1 - 0.5) * 0.2]),
        ("female", [(1 - 0.1) * 0.6, (1 - 0.5) * 0.2]),
        ("mpi", [(1 - 0.6) * 0.1, (1 - 0.2) * 0.5]),
        ("balance", [(1 - 0.5) * 0.1, (1 - 0.3) * 0.2]),
    ],
)
def test_goals_are_the_formulas_of_the_paper(name: str, expected: list[float]):
    assert goal_by_name(name, GENDERS)(P).tolist() == pytest.approx(expected)


def test_the_goal_of_k_classes():
    p = torch.tensor([[0.2, 0.5, 0.1]], dtype=torch.float64)
    assert goal_by_name("balance", ["a", "b", "c"])(p).tolist() == pytest.approx([(1 - 0.4) * 0.1])
    assert goal_by_name("b", ["a", "b", "c"])(p).tolist() == pytest.approx([(1 - 0.2) * 0.5])


@pytest.mark.parametrize(("name", "classes"), [("bpi", ["a", "b", "c"]), ("fpi", ["cat", "dog"]), ("gpi", GENDERS)])
def test_a_goal_that_is_not_defined_is_refused_with_those_that_are(name: str, classes):
    with pytest.raises(ValueError, match=rf"goal='{name}' is not defined.*write one of the class names, 'balance'"):
        goal_by_name(name, classes)


def _point(score: float, cost: float) -> Point:
    return Point(GENDERS, 1.0, 0.1, {"bpi": score}, {"female": 0.5, "male": 0.5}, 1.0, 0.5, cost, cost)


def test_the_best_point_within_the_budget_is_chosen():
    base, points = _point(0.1, 0.0), [_point(0.9, 0.05), _point(0.5, 0.02), _point(0.4, 0.0), _point(math.nan, 0.0)]
    assert choose(base, points, "bpi", 0.02) is points[1]


def test_one_scan_serves_several_goals_and_budgets():
    base = replace(_point(0.1, 0.0), goals={"bpi": 0.1, "fpi": 0.2})
    points = (
        replace(_point(0, 0.01), goals={"bpi": 0.3, "fpi": 0.4}),
        replace(_point(0, 0.02), goals={"bpi": 0.2, "fpi": 0.5}),
    )
    selection = Selection("bpi", 0.02, points[0], base, points)
    other = selection.choose("fpi")
    assert other == Selection("fpi", 0.02, points[1], base, points)
    assert selection.choose("fpi", 0.015) == Selection("fpi", 0.015, points[0], base, points)
    assert other.choose("bpi") == selection
    # Two numbers without intervals do not show which is better.
    assert "cost in language modelling +2.00%" in str(other) and "better" not in str(other) + str(selection)
    with pytest.raises(ValueError, match="goal='mpi' was not scored: write one of bpi, fpi"):
        selection.choose("mpi")


@pytest.mark.parametrize(("far", "tried"), [(2.0, [1.0, 2.0]), (5.0, [1.0, 2.0, 4.0])])
def test_a_direction_is_left_where_it_costs_far_too_much(far: float, tried: list[float], monkeypatch):
    """The cost of a learning rate is a tenth of the rate; the budget is 0.07."""
    rate = [0.0]

    @contextmanager
    def edited(*_, learning_rate: float, **__):
        rate[0] = learning_rate
        yield

    monkeypatch.setattr("hf_erasure.fitting.gradiend.selection.edited", edited)
    monkeypatch.setattr("hf_erasure.fitting.gradiend.selection.COST_LIMIT", far)
    p = torch.tensor([[0.5, 0.5]])
    language = Language(lambda: torch.tensor([[1 + 0.1 * rate[0], 0.5, 1.0]], dtype=torch.float64))
    scorer = Scorer(GENDERS, lambda: p, language)
    rates = [8.0, 1.0, 4.0, 2.0, 1.0]  # a value that is given twice is tried once
    _, *points = scan(torch.nn.Identity(), "a", scorer, [GENDERS], 0.07, [1.0, 1.0], rates)
    assert [point.learning_rate for point in points] == tried


def test_the_cost_of_a_classifier_is_the_share_of_texts_whose_label_changes():
    """The loss of a classifier that is sure of every label is 0, and any share of it means nothing."""
    rows = torch.tensor([[0.0, 1.0, 1.0]] * 4, dtype=torch.float64)
    language = Language(lambda: rows)
    language.by_hits = True
    scorer = Scorer(GENDERS, lambda: torch.tensor([[0.5, 0.5]]), language)
    base = scorer.score(GENDERS, 0.0, 0.0, None)
    rows[0, 0] = 1.0
    assert scorer.score(GENDERS, 1.0, 0.1, base).cost_upper == 0.0
    rows[0, 1] = 0.0
    assert scorer.score(GENDERS, 1.0, 0.1, base).cost == 0.25


def test_where_no_edit_is_better_the_model_stays_and_says_so():
    base = _point(0.45, 0.0)
    with pytest.warns(UserWarning, match=r"None of 2 edits raises bpi above the 0\.450.*a larger budget"):
        assert choose(base, [_point(0.9, 0.05), _point(0.4, 0.0)], "bpi", 0.02) is base
