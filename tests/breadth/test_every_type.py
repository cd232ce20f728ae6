"""Both adapters on every type of model that the installed transformers has."""

from __future__ import annotations

import pytest

from tests.breadth.table import Enter, check_erasure, check_gradiend
from tests.breadth.zoo import TYPES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model_type", TYPES)
def test_life_of_an_erasure(model_type: str, matrix: Enter, request: pytest.FixtureRequest):
    check_erasure(model_type, matrix, request, everything=True)


@pytest.mark.parametrize("model_type", TYPES)
def test_life_of_a_gradiend(model_type: str, matrix: Enter, request: pytest.FixtureRequest):
    check_gradiend(model_type, matrix, request)
