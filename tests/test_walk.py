"""Whoever follows a call opens no more files and functions than before, and fewer of other packages' are wrapped."""

from __future__ import annotations

import pytest

import hf_erasure
from tests.house import wrapped
from tests.walk import CALLS, GOALS, listing, measured

# Files and functions. Every step of the redesign lowers them, down to `GOALS`.
LIMITS = {
    "add_adapter": (15, 76),
    "fit_concept_erasure, sequential": (36, 218),
    "fit_concept_erasure, one pass": (34, 202),
    "forward with erasure": (5, 15),
    "save_pretrained": (19, 110),
    "load_adapter": (22, 149),
    "GradiendTrainer.train": (33, 195),
    "select, 1 × 1": (23, 128),
    "steer": (8, 21),
    "forward with GRADIEND": (6, 23),
}
MOST_WRAPPED = 37


@pytest.mark.parametrize("name", CALLS)
def test_a_call_goes_through_no_more_than_before(name: str):
    walk, (files, functions) = measured(name), LIMITS[name]
    assert walk.files <= files and walk.functions <= functions, f"{walk.files}, {walk.functions}:\n{listing(walk)}"


def test_goals_are_for_calls_that_are_measured():
    assert set(GOALS) <= set(CALLS) == set(LIMITS)


def test_no_more_functions_of_other_packages_are_wrapped():
    found = wrapped()
    assert len(found) <= MOST_WRAPPED, "\n".join(sorted(found))


def test_public_names_can_be_had():
    assert all(getattr(hf_erasure, name) is not None for name in hf_erasure.__all__)
