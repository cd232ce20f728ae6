"""A GRADIEND adapter on model types with every known cause of faults; see `kinds`."""

from __future__ import annotations

import pytest

from tests.breadth import kinds
from tests.breadth.table import Enter, check_gradiend


@pytest.mark.parametrize("model_type", kinds.chosen(kinds.GRADIEND))
def test_life_of_a_gradiend(model_type: str, matrix: Enter, request: pytest.FixtureRequest):
    check_gradiend(model_type, matrix, request)
