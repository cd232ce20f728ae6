"""An erasure on types of image and sound models with every known cause of faults; see `kinds`."""

from __future__ import annotations

import pytest

from tests.breadth import kinds
from tests.breadth.table import Enter, check_erasure


@pytest.mark.parametrize("model_type", kinds.chosen(kinds.MEDIA))
def test_life_of_an_erasure(model_type: str, matrix: Enter, request: pytest.FixtureRequest):
    check_erasure(model_type, matrix, request, everything=False)
