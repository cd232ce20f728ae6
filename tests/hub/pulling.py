"""Pulls what `pushing.py` has pushed, in a fresh process, and reports with which fit each model computes.

It first pulls what needs no hf-erasure, as if this package were not installed, then the rest.

The environment names a Hub, or has `HF_HUB_OFFLINE=1` and a cache.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from huggingface_hub import constants
from safetensors.torch import load_file

from tests.hub.clients import OWNER, report
from tests.hub.plan import KINDS, NAME, PROPOSED, base, logits

Pull = Callable[[], Any]


def added(name: str, **kwargs: Any) -> Any:
    model = base()
    model.load_adapter(f"{OWNER}/{name}", **kwargs)
    return model.eval()


def wrapped(name: str, **kwargs: Any) -> Any:
    return peft.PeftModel.from_pretrained(base(), f"{OWNER}/{name}", **kwargs).eval()


def automatic(name: str, **kwargs: Any) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(f"{OWNER}/{name}", **kwargs).eval()


def online(kind: str, commits: dict[str, dict[str, Any]]) -> dict[str, Pull]:
    """Every way of pulling."""
    first, before = commits["added 1"]["oid"], commits["wrapped"]["oid"]
    proposed = commits[f"added {PROPOSED}"]["pull request"]
    return {
        "load_adapter": lambda: added(f"{kind}-added"),
        "load_adapter at a commit": lambda: added(f"{kind}-added", adapter_kwargs={"revision": first}),
        "load_adapter of a branch": lambda: added(f"{kind}-added", adapter_kwargs={"revision": "dev"}),
        "PeftModel": lambda: wrapped(f"{kind}-added"),
        "PeftModel at a commit": lambda: wrapped(f"{kind}-added", revision=first),
        "PeftModel of a branch": lambda: wrapped(f"{kind}-added", revision="dev"),
        "PeftModel of a pull request": lambda: wrapped(f"{kind}-added", revision=proposed),
        "AutoModel": lambda: automatic(f"{kind}-added"),
        "AutoModel at a commit": lambda: automatic(f"{kind}-added", adapter_kwargs={"revision": first}),
        "private": lambda: added(f"{kind}-private"),
        "of a PeftModel, before": lambda: added(f"{kind}-wrapped", adapter_kwargs={"revision": before}),
        "of a PeftModel": lambda: added(f"{kind}-wrapped"),
        "of a PeftModel, of a branch": lambda: wrapped(f"{kind}-wrapped", revision="dev"),
        "load_adapter from a folder": lambda: added(f"{kind}-named", adapter_kwargs={"subfolder": NAME}),
        "PeftModel from a folder": lambda: wrapped(f"{kind}-named", subfolder=NAME),
        "of the Trainer": lambda: wrapped(f"{kind}-trainer"),
        "of a training": lambda: added(f"{kind}-trained"),
        "of the command": lambda: wrapped(f"{kind}-command"),
        "of the command, from a folder": lambda: wrapped(f"{kind}-command", revision="dev", subfolder="one"),
    }


def offline(kind: str, commits: dict[str, dict[str, Any]]) -> dict[str, Pull]:
    """The pulls that work from the cache, without a connection."""
    names = ("load_adapter", "load_adapter at a commit", "PeftModel", "PeftModel at a commit", "AutoModel")
    every = online(kind, commits)
    return {name: every[name] for name in names}


def plain() -> dict[str, Pull]:
    """The models and the LoRA that were exported, and load without this package."""
    merged: dict[str, Pull] = {f"{kind} merged": functools.partial(automatic, f"{kind}-merged") for kind in KINDS}
    hf.AutoTokenizer.from_pretrained(f"{OWNER}/erasure-merged")
    return merged | {"erasure lora": lambda: wrapped("erasure-lora")}


def refused(pull: Pull) -> str | None:
    try:
        pull()
    except Exception as error:  # the test checks which error it is
        return f"{type(error).__name__}: {error}"
    return None


def main(folder: Path) -> None:
    pushed = json.loads((folder / "pushing.py.json").read_text())
    computed = load_file(folder / "computed.safetensors")

    def fits(pulls: dict[str, Pull]) -> dict[str, list[str]]:
        found = {name: logits(pull()) for name, pull in pulls.items()}
        return {n: [what for what, value in computed.items() if torch.equal(v, value)] for n, v in found.items()}

    assert "hf_erasure" not in sys.modules
    sys.modules["hf_erasure"] = None  # type: ignore[assignment]  # importing it raises
    without = fits(plain())
    del sys.modules["hf_erasure"]
    importlib.import_module("hf_erasure")
    pulls = offline if constants.HF_HUB_OFFLINE else online
    found = {kind: fits(pulls(kind, pushed[kind])) for kind in KINDS}
    # Another user has another cache, too.
    other: dict[str, Any] = {"token": False, "cache_dir": str(folder / "stranger")}
    stranger = {
        "load_adapter": refused(lambda: added("erasure-private", adapter_kwargs=other)),
        "PeftModel": refused(lambda: wrapped("erasure-private", **other)),
    }
    report(__file__, folder, {"pulled": found, "plain": without, "stranger": stranger})
