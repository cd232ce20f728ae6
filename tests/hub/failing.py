"""Pushes and pulls that fail in the ways that the server was told to, and are tried again.

The environment names a Hub. The folder has a `base` model, the folders of two fits, `adapter` and `another`,
and the names of the pushes and pulls in `asked.json`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import peft
import transformers as hf
from huggingface_hub import HfApi, constants, get_session
from typer.testing import CliRunner

from hf_erasure.cli import app
from tests.adapters.lifecycle import state_of
from tests.hub.clients import OWNER, report
from tests.hub.plan import logits

ADAPTER, BASE = "adapter", "base"


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_bytes().hex() for path in folder.rglob("*") if path.is_file()}


def visible(name: str) -> dict[str, Any] | None:
    """What everyone can see of a repository; None if it does not exist."""
    api = HfApi()
    if not api.repo_exists(name):
        return None
    refs = api.list_repo_refs(name, include_pull_requests=True)
    return {
        "files": sorted(set(api.list_repo_files(name)) - {".gitattributes"}),
        "commits": len(api.list_repo_commits(name)),
        "refs": [ref.ref for ref in [*refs.branches, *(refs.pull_requests or [])]],
    }


def push(folder: Path, what: str) -> dict[str, Any]:
    """Push with the command, twice."""
    name, before = f"{OWNER}/{what}", contents(folder / ADAPTER)
    tries = [command("push", str(folder / ADAPTER), name) | {"visible": visible(name)} for _ in range(2)]
    return {"tries": tries, "untouched": contents(folder / ADAPTER) == before}


def command(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, arguments)
    # A user would see a traceback of an exception that is not an exit.
    raised = None if isinstance(done.exception, SystemExit) else done.exception
    return {"code": done.exit_code, "said": done.output, "raised": repr(raised) if raised else None}


def merge(folder: Path, what: str) -> dict[str, Any]:
    """Run `hf-erasure merge` twice, with a base that is on the Hub."""
    name, out = f"{OWNER}/{what}", folder / "merged"
    HfApi().create_repo(name)
    HfApi().upload_folder(repo_id=name, folder_path=folder / BASE)
    tries = []
    for _ in range(2):
        tries.append(command("merge", name, str(folder / ADAPTER), str(out)) | {"out": out.exists()})
        repair(name)
    return {"tries": tries}


def push_from_model(folder: Path, what: str) -> dict[str, Any]:
    """Call `model.push_to_hub` twice."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder / BASE)
    model.load_adapter(str(folder / ADAPTER))
    tries = []
    for _ in range(2):
        try:
            model.push_to_hub(f"{OWNER}/{what}")
        except Exception as error:  # the test checks which error it is
            tries.append({"raised": f"{type(error).__name__}: {error}", "visible": visible(f"{OWNER}/{what}")})
        else:
            tries.append({"raised": None, "visible": visible(f"{OWNER}/{what}")})
        repair(f"{OWNER}/{what}")
    return {"tries": tries}


def upload(folder: Path, name: str) -> None:
    HfApi().create_repo(name, exist_ok=True)
    HfApi().upload_folder(repo_id=name, folder_path=folder / ADAPTER)


def repair(name: str) -> None:
    get_session().post(f"{constants.ENDPOINT}/loopback/repair/{name}").raise_for_status()


def pull(folder: Path, what: str, way: str) -> dict[str, Any]:
    """Load the adapter from the Hub into a model, in two tries; a try that fails must not change the model."""
    name = f"{OWNER}/{what}"
    model = hf.AutoModelForCausalLM.from_pretrained(folder / BASE).eval()
    before = state_of(model, "llama")
    tries: list[str | None] = []
    loaded: Any = model
    for _ in range(2):
        try:
            if way == "load_adapter":
                model.load_adapter(name)
            else:
                loaded = peft.PeftModel.from_pretrained(model, name)
        except Exception as error:  # the test checks which error it is
            tries.append(f"{type(error).__name__}: {error}")
            state_of(model, "llama").assert_same(before)
            repair(name)
            upload(folder, name)
        else:
            tries.append(None)
            break
    expected = hf.AutoModelForCausalLM.from_pretrained(folder / BASE).eval()
    expected.load_adapter(str(folder / ADAPTER))
    values, wanted = logits(loaded), logits(expected)
    moved = bool((values != before.outputs["logits"]).any())
    return {"tries": tries, "same": bool((values == wanted).all()), "moved": moved}


def main(folder: Path) -> None:
    time.sleep = lambda _: None  # the client waits half a minute in all between its tries
    asked = json.loads((folder / "asked.json").read_text())
    found: dict[str, Any] = {"pushes": {what: push(folder, what) for what in asked["pushes"]}, "pulls": {}}
    found["from a model"] = push_from_model(folder, "from-a-model")
    found["unread from a model"] = push_from_model(folder, "unread-from-a-model")
    found["merge"] = merge(folder, "cut-base")
    for what, way in asked["pulls"]:
        if not what.startswith("missing"):
            upload(folder, f"{OWNER}/{what}")
        found["pulls"][what] = pull(folder, what, way)
    report(__file__, folder, found)
