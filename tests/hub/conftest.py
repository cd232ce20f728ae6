from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from tests.hub.clients import Once
from tests.hub.loopback import LoopbackHub


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A Hub with two users; `bob` is not a member of an organization."""
    with LoopbackHub() as hub:
        hub.add_user("alice", "hf_alice", "lab")
        hub.add_user("bob", "hf_bob")
        yield hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process use the network, which was forbidden before the client was imported and read the variable."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # The waits between retries are part of the client, and need no test here.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    close_session()
    yield
    close_session()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: the result of `make(folder)`, as JSON; one of xdist's workers makes it for all of them.

    If it fails, it is not tried again for the other tests that need it.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "hub"
    root.mkdir(exist_ok=True)

    def find(name: str, make: Callable[[Path], Any]) -> Any:
        found = root / f"{name}.json"
        with FileLock(root / f"{name}.lock"):
            if not found.exists():
                folder = root / name
                folder.mkdir()
                found.write_text("null")
                found.write_text(json.dumps(make(folder)))
        made = json.loads(found.read_text())
        assert made is not None, f"{name} has failed already; the first test that wanted it says why"
        return made

    return find
