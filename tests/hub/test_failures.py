"""Failures between a user and the Hub: an error in one sentence, nothing half done, and a second try that succeeds.

One process runs them all (`failing.py`), against faults that were ordered before; the tests check its report.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from huggingface_hub.errors import HTTPError

from hf_erasure.cli.app import errors_as_sentences
from tests import prepared
from tests.adapters.lifecycle import Lifecycle
from tests.hub.clients import OWNER, TOKEN, Once, environment, run
from tests.hub.failing import ADAPTER, BASE
from tests.hub.loopback import Fault, LoopbackHub
from tests.hub.pushing import CELL

Seen = dict[str, Any]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
Order = Callable[[LoopbackHub, str], list[Fault]]
# The client tries most requests six times.
ALWAYS = 6
UNTIL_REPAIRED = 1000


@dataclass(frozen=True)
class Failure:
    """Faults at the first try.

    Attributes:
        order: Orders the faults for the repository of a given name.
        words: Words of the error message; None if the client succeeds by its own retries.
        is_done: Whether the server has done the request, though the client does not know it.
    """

    order: Order
    words: str | None
    is_done: bool = False


def _answer(method: str, words: str, status: int, message: str = "A fault", **kwargs: Any) -> Order:
    return lambda hub, name: [hub.answer(method, words.format(name=name), status, message, **kwargs)]


PUSHES = {
    "unauthorized": Failure(
        lambda hub, name: [
            hub.answer("POST", "/api/repos/create", 401, "Invalid credentials", within=f'"{name.split("/")[1]}"')
        ],
        "401",
    ),
    "forbidden": Failure(_answer("POST", "{name}/commit", 403, "You may only read"), "403"),
    "not-found": Failure(
        _answer("POST", "{name}/preupload", 404, "Not found", code="RepoNotFound"), "is there such a branch"
    ),
    "conflict": Failure(_answer("POST", "{name}/commit", 409, "Another operation is in progress"), "409"),
    "overtaken": Failure(_answer("POST", "{name}/commit", 412, "A commit has happened since"), "412"),
    "broken": Failure(_answer("POST", "{name}/commit", 500), "500"),
    "down": Failure(_answer("POST", "{name}/preupload", 503, times=ALWAYS), "503"),
    "unverified": Failure(_answer("POST", "{name}.git/info/lfs/verify", 500, times=ALWAYS), "500"),
    "torn": Failure(lambda hub, name: [hub.hang_up("PUT", f"/{name}/upload/", times=ALWAYS)], "adapter_model"),
    "half": Failure(lambda hub, name: [hub.hang_up("POST", f"{name}/commit")], ""),
    "lost": Failure(lambda hub, name: [hub.lose("POST", f"{name}/commit")], "", is_done=True),
    "unsteady": Failure(
        lambda hub, name: [
            hub.answer("POST", f"{name}/preupload", 503, times=2),
            hub.answer("POST", f"{name}.git/info/lfs/objects/batch", 429),
            hub.hang_up("PUT", f"/{name}/upload/"),
            hub.lose("POST", f"{name}.git/info/lfs/verify"),
        ],
        None,
    ),
}


# Someone else has written the card of this repository, and reading it fails.
UNREAD, WRITTEN = "unread", "Read this first.\n"


def _cut(times: int) -> Order:
    return lambda hub, name: [hub.cut("GET", f"/{name}/download/", times=times)]


PULLS = {
    "missing": Failure(lambda hub, name: [], ""),
    "hidden": Failure(_answer("HEAD", "/{name}/resolve/", 401, "Invalid credentials", times=UNTIL_REPAIRED), ""),
    "resumed": Failure(_cut(2), None),
    "cut": Failure(_cut(UNTIL_REPAIRED), ""),
    "unreachable": Failure(_answer("HEAD", "/{name}/resolve/.*safetensors", 503, times=UNTIL_REPAIRED), ""),
}
METHODS = ("load_adapter", "PeftModel")
every_push = pytest.mark.parametrize("what", PUSHES)
every_failing_push = pytest.mark.parametrize("what", [what for what in PUSHES if PUSHES[what].words is not None])
every_pull = pytest.mark.parametrize("what", [f"{what}-{way}" for what in PULLS for way in METHODS])


def _tried(folder: Path) -> Seen:
    lifecycle = Lifecycle(folder / "models")
    shutil.copytree(lifecycle.folder(CELL), folder / ADAPTER)
    shutil.copytree(lifecycle.base_folder(CELL.architecture), folder / BASE)
    pulls = [(f"{what}-{way}", way) for what in PULLS for way in METHODS]
    (folder / "asked.json").write_text(json.dumps({"pushes": [*PUSHES, UNREAD], "pulls": pulls}))
    with LoopbackHub() as hub:
        hub.add_user(OWNER, TOKEN)
        hub.answer("HEAD", f"/{OWNER}/{UNREAD}/resolve/.*README", 503, times=1 + ALWAYS)
        hub.hang_up("POST", f"/{OWNER}/from-a-model/commit")
        hub.answer("HEAD", f"/{OWNER}/{UNREAD}-from-a-model/resolve/.*README", 503, times=UNTIL_REPAIRED)
        hub.add_repository(f"{OWNER}/{UNREAD}-from-a-model", {"README.md": WRITTEN.encode()})
        hub.cut("GET", f"/{OWNER}/cut-base/download/", times=UNTIL_REPAIRED)
        hub.add_repository(f"{OWNER}/{UNREAD}", {"README.md": WRITTEN.encode()})
        faults = {what: failure.order(hub, f"{OWNER}/{what}") for what, failure in PUSHES.items()}
        for what, way in pulls:
            faults[what] = PULLS[what.removesuffix(f"-{way}")].order(hub, f"{OWNER}/{what}")
        found = run("failing.py", folder, environment(hub, folder / "home"))
        found["met"] = {what: [(fault.met, fault.times) for fault in ordered] for what, ordered in faults.items()}
        names = (UNREAD, f"{UNREAD}-from-a-model")
        found["cards"] = {name: hub.contents(f"{OWNER}/{name}")["README.md"].decode() for name in names}
        found["trouble"] = hub.trouble
    return found


@pytest.fixture
def seen(once: Once) -> Seen:
    return once("failures", _tried)


def test_the_faults_have_happened(seen: Seen):
    assert seen["trouble"] == []
    for what, faults in seen["met"].items():
        assert faults or what.startswith("missing")
        for met, times in faults:
            assert met == times or (met > 0 and times == UNTIL_REPAIRED), what


@every_failing_push
def test_a_push_that_fails_says_why_in_a_sentence(what: str, seen: Seen):
    first = seen["pushes"][what]["tries"][0]
    assert first["raised"] is None
    assert first["code"] == 2
    assert "Traceback" not in first["said"]
    told = [line for line in first["said"].splitlines() if line.startswith("Error: ")]
    assert len(told) == 1 and len(told[0]) > 40
    assert f"{OWNER}/{what}" in told[0]
    assert PUSHES[what].words in first["said"]


@every_failing_push
def test_nothing_of_it_is_visible(what: str, seen: Seen):
    visible = seen["pushes"][what]["tries"][0]["visible"]
    if PUSHES[what].is_done:
        assert visible["files"] == FILES and visible["commits"] == 2
    elif visible is not None:
        assert visible == {"files": [], "commits": 1, "refs": ["refs/heads/main"]}


@every_push
def test_the_second_try_succeeds(what: str, seen: Seen):
    found = seen["pushes"][what]
    first, second = found["tries"]
    if PUSHES[what].words is None:
        assert first["code"] == 0
    assert second["code"] == 0, second["said"]
    assert second["visible"] == {"files": FILES, "commits": 2, "refs": ["refs/heads/main"]}
    assert found["untouched"]


@every_pull
def test_a_pull_that_fails_leaves_the_model_alone(what: str, seen: Seen):
    # failing.py checks that the model is unchanged, by comparing its whole state.
    found = seen["pulls"][what]
    gets_over_it = PULLS[what.split("-")[0]].words is None
    assert found["tries"][-1] is None
    assert len(found["tries"]) == (1 if gets_over_it else 2)
    assert gets_over_it or len(found["tries"][0]) > 40
    assert found["same"] and found["moved"]


def test_a_card_that_cannot_be_read_is_not_replaced(seen: Seen):
    first, second = seen["pushes"][UNREAD]["tries"]
    assert first["code"] == 2 and "503" in first["said"]
    assert first["visible"] == {"files": ["README.md"], "commits": 2, "refs": ["refs/heads/main"]}
    assert second["code"] == 0 and second["visible"]["files"] == FILES
    assert WRITTEN in seen["cards"][UNREAD]


def test_a_card_that_cannot_be_read_is_not_replaced_from_a_model(seen: Seen):
    first, second = seen["unread from a model"]["tries"]
    assert "PushError" in first["raised"] and "503" in first["raised"]
    assert first["visible"] == {"files": ["README.md"], "commits": 2, "refs": ["refs/heads/main"]}
    assert second["raised"] is None and set(FILES) <= set(second["visible"]["files"])
    assert WRITTEN in seen["cards"][f"{UNREAD}-from-a-model"]


def test_nothing_is_visible_of_a_model_that_did_not_arrive(seen: Seen):
    first, second = seen["from a model"]["tries"]
    assert "disconnected" in first["raised"]
    assert first["visible"] == {"files": [], "commits": 1, "refs": ["refs/heads/main"]}
    assert second["raised"] is None and second["visible"]["commits"] == 2


def test_a_command_that_cannot_load_its_base_says_so(seen: Seen):
    first, second = seen["merge"]["tries"]
    assert first["raised"] is None and first["code"] == 2 and not first["out"]
    assert "Error: Can't load the model for 'alice/cut-base'" in first["said"]
    assert second["code"] == 0 and second["out"]


def test_what_the_client_lets_through_is_a_sentence_too(capsys: pytest.CaptureFixture[str]):
    # Such an error can come from a tokenizer's file; the client's exceptions for a connection are not an OSError.
    with pytest.raises(typer.Exit) as stopped, errors_as_sentences():
        raise HTTPError("peer closed connection")
    assert stopped.value.exit_code == 2
    assert "Error: the connection to the Hub broke (HTTPError: peer closed connection)" in capsys.readouterr().err


def test_the_command_ends_with_two_and_no_traceback(tmp_path: Path):
    with LoopbackHub() as hub:
        hub.add_user(OWNER, TOKEN)
        folder = Lifecycle(tmp_path / "models").folder(CELL)
        words = ["push", str(folder), f"{OWNER}/adapter"]
        asked = environment(hub, tmp_path / "home", token="hf_wrong")
        done = prepared.run(prepared.run_command, words, folder=tmp_path, kind=prepared.LIBRARIES, environment=asked)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Error: ") == 1 and "401" in done.stderr
    assert hub.repositories == {}
