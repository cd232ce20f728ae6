"""Starts processes that push and pull: the client reads the Hub's address and the token when it is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import prepared
from tests.hub.loopback import LoopbackHub

OWNER, TOKEN = "alice", "hf_alice"
# The type of the fixture `once`.
Once = Callable[[str, Callable[[Path], Any]], Any]


def environment(hub: LoopbackHub, home: Path, *, token: str | None = TOKEN, offline: bool = False) -> dict[str, str]:
    """The variables with which a process uses the loopback server as the Hub, with a cache of its own in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    asked = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(prepared.ROOT)}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    return kept | asked | quiet | ({"HF_TOKEN": token} if token else {}) | ({"HF_HUB_OFFLINE": "1"} if offline else {})


def run(script: str, folder: Path, environment: dict[str, str]) -> Any:
    """Run `main` of one of the scripts of this folder; returns the JSON that it has written to `folder`."""
    code = f"import pathlib, tests.hub.{Path(script).stem} as script; script.main(pathlib.Path({str(folder)!r}))"
    done = prepared.run(prepared.run_code, code, folder=folder, kind=prepared.LIBRARIES, environment=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / f"{script}.json").read_text())


def report(script: str, folder: Path, found: Any) -> None:
    """Write what `run` returns; called by the script."""
    (folder / f"{Path(script).name}.json").write_text(json.dumps(found))
