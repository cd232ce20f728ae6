from __future__ import annotations

import pytest

from tests.adapters.lifecycle import Lifecycle


@pytest.fixture(scope="session")
def lifecycle(tmp_path_factory: pytest.TempPathFactory) -> Lifecycle:
    return Lifecycle(tmp_path_factory.mktemp("lifecycle"))
