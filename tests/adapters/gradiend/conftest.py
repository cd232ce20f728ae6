from __future__ import annotations

import pytest

from tests.adapters.gradiend.lifecycle import Gradiends


@pytest.fixture(scope="session")
def gradiends(tmp_path_factory: pytest.TempPathFactory) -> Gradiends:
    return Gradiends(tmp_path_factory.mktemp("gradiends"))
