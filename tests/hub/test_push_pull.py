"""Adapters that are pushed in every possible way, and pulled by other processes: the same to the bit.

One process pushes (`pushing.py`), others pull (`pulling.py`); each writes a report, and the tests check it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.hub.clients import OWNER, TOKEN, Once, environment, run
from tests.hub.loopback import LoopbackHub
from tests.hub.plan import BASE, BRANCH, FIRST, KINDS, NAME, NOTE, PROPOSED, SECOND

Seen = dict[str, Any]
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
# The repositories of the different ways to push one adapter.
WAYS = ("added", "private", "wrapped", "named", "trainer", "trained", "command")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_way = pytest.mark.parametrize("way", WAYS)


def _snapshot(hub: LoopbackHub) -> Seen:
    """The state of the server, for tests in another process."""
    return {
        name: {
            "private": repository.private,
            "titles": [commit.title for commit in repository.head.history()],
            "refs": {ref: commit.id for ref, commit in repository.refs.items()},
            "files": {ref: sorted(hub.contents(name, ref)) for ref in repository.refs},
            "card": hub.contents(name).get("README.md", b"").decode(),
            "config": json.loads(hub.contents(name).get("adapter_config.json", b"null")),
        }
        for name, repository in hub.repositories.items()
    }


def _everything(folder: Path) -> Seen:
    with LoopbackHub() as hub:
        hub.add_user(OWNER, TOKEN)
        pushed = run("pushing.py", folder, environment(hub, folder / "pushing"))
        found = {"pushed": pushed, "hub": _snapshot(hub)}
        seen = environment(hub, folder / "pulling")
        found["online"] = run("pulling.py", folder, seen)
        found["trouble"] = hub.trouble
        after = len(hub.requests)
        stopped = seen | {"HF_HUB_OFFLINE": "1"}
    found["offline"] = run("pulling.py", folder, stopped)
    assert len(hub.requests) == after
    return found


@pytest.fixture
def seen(once: Once) -> Seen:
    return once("push-pull", _everything)


# ---- what is on the Hub ----------------------------------------------------------------------------------------------


def test_the_server_speaks_all_that_is_asked(seen: Seen):
    assert seen["trouble"] == []


@every_kind
@every_way
def test_a_push_is_one_commit(kind: str, way: str, seen: Seen):
    repository = seen["hub"][f"{OWNER}/{kind}-{way}"]
    # A training pushes at every step, but skips a push while the last one is still running.
    pushes = {"added": [2], "wrapped": [4], "trained": [1, 2, 3]}.get(way, [1])
    assert len(repository["titles"]) - 1 in pushes  # one is the Hub's own
    inside = {f"{NAME}/{name}" for name in FILES} | {"README.md"} if way == "named" else FILES
    assert inside <= set(repository["files"]["refs/heads/main"])
    assert repository["private"] == (way in ("private", "command", "trainer", "trained"))


@every_kind
def test_a_branch_and_a_pull_request_leave_main_alone(kind: str, seen: Seen):
    repository, pushed = seen["hub"][f"{OWNER}/{kind}-added"], seen["pushed"][kind]
    assert repository["refs"] == {
        "refs/heads/main": pushed[f"added {SECOND}"]["oid"],
        "refs/heads/dev": pushed[f"added {BRANCH}"]["oid"],
        "refs/pr/1": pushed[f"added {PROPOSED}"]["oid"],
    }
    assert pushed[f"added {PROPOSED}"]["pull request"] == "refs/pr/1"
    assert repository["titles"] == [f"fit {SECOND}", f"fit {FIRST}", "initial commit"]
    assert all(set(files) >= FILES for files in repository["files"].values())


@every_kind
def test_the_command_pushes_where_it_is_told_to(kind: str, seen: Seen):
    repository = seen["hub"][f"{OWNER}/{kind}-command"]
    files = {ref: set(names) for ref, names in repository["files"].items()}
    assert files["refs/heads/main"] == FILES
    assert files["refs/heads/dev"] == FILES | {f"one/{name}" for name in FILES}
    assert files["refs/pr/1"] == FILES | {f"other/{name}" for name in FILES}
    assert repository["titles"][0] == "By command"
    said = seen["pushed"][kind]
    assert repository["refs"]["refs/heads/main"] in said["push"]["said"]
    assert "/discussions/1" in said["pull request"]["said"]


@every_kind
@every_way
def test_the_card_is_ours(kind: str, way: str, seen: Seen):
    text = seen["hub"][f"{OWNER}/{kind}-{way}"]["card"]
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert card.data.base_model == BASE
    assert "import hf_erasure" in text
    assert f"{OWNER}/{kind}-{way}" in text  # the line that loads it
    assert not re.search(r"More Information Needed|automatically generated", text)


@every_kind
def test_what_people_write_into_a_card_stays(kind: str, seen: Seen):
    card = seen["hub"][f"{OWNER}/{kind}-wrapped"]["card"]
    assert card.count(NOTE) == 1 and card.count("import hf_erasure  #") == 1


def test_the_card_of_another_model_is_left_alone(seen: Seen):
    assert "hf_erasure" not in seen["hub"][BASE]["card"]
    assert ModelCard(seen["hub"][BASE]["card"]).data.library_name == "transformers"


@every_kind
def test_a_merged_model_is_an_ordinary_repository(kind: str, seen: Seen):
    repository = seen["hub"][f"{OWNER}/{kind}-merged"]
    files = set(repository["files"]["refs/heads/main"])
    weights = {name for name in files if name.endswith(".safetensors")}
    # The model is in shards if this was asked for.
    assert len(weights) > 1 if kind == "erasure" else weights == {"model.safetensors"}
    assert ("model.safetensors.index.json" in files) == (kind == "erasure")
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= files
    assert not {"adapter_config.json", "adapter_model.safetensors"} & files
    card = ModelCard(repository["card"])
    assert card.data.library_name == "transformers" and card.data.base_model == BASE
    assert "merged" in repository["card"].lower() and "gender" in repository["card"]
    assert len(repository["titles"]) == 2


def test_an_exported_lora_is_an_ordinary_repository(seen: Seen):
    repository = seen["hub"][f"{OWNER}/erasure-lora"]
    assert set(repository["files"]["refs/heads/main"]) >= FILES
    assert repository["config"]["peft_type"] == "LORA"
    assert ModelCard(repository["card"]).data.base_model == BASE
    assert "import hf_erasure" not in repository["card"]


# ---- what comes back -------------------------------------------------------------------------------------------------

# Which of the fits each way of pulling has to return.
PULLS = {
    "load_adapter": SECOND,
    "load_adapter at a commit": FIRST,
    "load_adapter of a branch": BRANCH,
    "PeftModel": SECOND,
    "PeftModel at a commit": FIRST,
    "PeftModel of a branch": BRANCH,
    "PeftModel of a pull request": PROPOSED,
    "AutoModel": SECOND,
    "AutoModel at a commit": FIRST,
    "private": FIRST,
    "of a PeftModel, before": SECOND,
    "of a PeftModel": FIRST,
    "of a PeftModel, of a branch": FIRST,
    "load_adapter from a folder": FIRST,
    "PeftModel from a folder": FIRST,
    "of the Trainer": FIRST,
    "of a training": FIRST,
    "of the command": FIRST,
    "of the command, from a folder": FIRST,
}
OFFLINE = ("load_adapter", "load_adapter at a commit", "PeftModel", "PeftModel at a commit", "AutoModel")


def _check(found: list[str], kind: str, seed: int) -> None:
    """Check that a model computes the same as one fit, and not the same as the base or another fit."""
    assert f"{kind} added {seed}" in found
    others = {"base", *(f"{kind} added {other}" for other in (FIRST, SECOND, BRANCH, PROPOSED) if other != seed)}
    assert not others & set(found)


@every_kind
@pytest.mark.parametrize("way", PULLS)
def test_what_is_pulled_is_what_was_pushed(kind: str, way: str, seen: Seen):
    _check(seen["online"]["pulled"][kind][way], kind, PULLS[way])


@every_kind
@pytest.mark.parametrize("way", OFFLINE)
def test_the_cache_is_enough_when_no_one_answers(kind: str, way: str, seen: Seen):
    _check(seen["offline"]["pulled"][kind][way], kind, PULLS[way])


@pytest.mark.parametrize("way", ["load_adapter", "PeftModel"])
def test_a_stranger_does_not_get_what_is_private(way: str, seen: Seen):
    assert f"{OWNER}/erasure-private" in seen["online"]["stranger"][way]


@pytest.mark.parametrize("what", [*(f"{kind} merged" for kind in KINDS), "erasure lora"])
def test_what_left_the_library_loads_without_it(what: str, seen: Seen):
    for way in ("online", "offline"):
        assert what in seen[way]["plain"][what]
        assert "base" not in seen[way]["plain"][what]
