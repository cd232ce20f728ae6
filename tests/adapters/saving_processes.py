"""Processes that are killed while they save adapters, for `test_saving`.

`find_all` runs in a process of its own, in an empty folder, and prints what it found as JSON. The processes that are
killed are forks of it.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import PreTrainedModel

from hf_erasure import ConceptErasureConfig
from tests.adapters.lifecycle import fit
from tests.small_models import LABELS, outputs_of, same, small_batch, small_model

# The sites differ, so that the configuration of one adapter does not fit the tensors of the other.
SITES = {"old": ["encoder.layer.0.output.LayerNorm"], "new": ["encoder.layer.1.output.LayerNorm", "query"]}
# Python's audit events for files that are made, moved and removed.
EVENTS = {"open", "os.mkdir", "os.listdir", "os.scandir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree"}
KILLED = -signal.SIGKILL
# Enough for some thirty saves of each process, and as many loads at the same time.
SECONDS_AT_ONCE = 1.5


def adapted(which: str, name: str = "default") -> PreTrainedModel:
    model = copy.deepcopy(small_model("bert"))
    config = ConceptErasureConfig(concept=which, labels=LABELS, target_modules=SITES[which])
    model.add_adapter(config, adapter_name=name)
    fit(model, "bert", name, seed=len(which) + 100)
    return model


def wrapped(which: str) -> peft.PeftModel:
    """A `PeftModel` with two adapters; a save puts one into the folder itself and the other below it."""
    config = ConceptErasureConfig(concept=which, labels=LABELS, target_modules=SITES[which])
    model = peft.get_peft_model(copy.deepcopy(small_model("bert")), copy.copy(config))
    model.add_adapter("other", config)
    for name in ("default", "other"):
        model.set_adapter(name)
        fit(model, "bert", name, seed=len(which) + 100)
    return model


def outputs(model: Any) -> dict[str, torch.Tensor]:
    return outputs_of(model, small_batch("bert", seed=7))


def in_fork(work: Callable[[], None]) -> int:
    """Do some work in a forked process, and return its exit code: 0, or the negative number of a signal."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, folder: Path, save: Callable[[], None]) -> None:
    """Save, and kill the process right before the `step`-th time that it touches a file or folder in `folder`."""
    left = [step]

    def count(event: str, args: tuple) -> None:
        if event in EVENTS and any(isinstance(arg, (str, bytes)) and str(folder) in os.fsdecode(arg) for arg in args):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save()


def which_is_in(folder: Path, expected: dict[str, Any]) -> str:
    """Which of the expected adapters the folder loads as, or the error where it cannot be loaded."""
    model = copy.deepcopy(small_model("bert"))
    try:
        model.load_adapter(str(folder))
    except (ValueError, OSError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    found = outputs(model)
    return next((which for which, wanted in expected.items() if same(found, wanted)), "a mix")


def kills(
    folder: Path, old: Any, new: Any, save: Callable[[Any], None], places: tuple[str, ...], stride: int = 1
) -> dict[str, Any]:
    """Kill a save of `new` over `old` at every step; return what each place holds, and what the next save leaves."""
    expected = {"old": outputs(old), "new": outputs(new)}
    found: list[list[str]] = []
    left: set[str] = set()
    save(old)
    before = names(folder)
    for step in range(1, 400, stride):
        ended = in_fork(lambda step=step: killed_at(step, folder, lambda: save(new)))
        found.append([which_is_in(folder / place, expected) for place in places])
        save(old)
        left |= names(folder) ^ before
        if ended == 0:
            break
        if ended != KILLED:
            raise RuntimeError(f"the process that saves ended with {ended}")
    return {"found": found, "left": sorted(left)}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def model_saves(folder: Path) -> dict[str, Any]:
    return kills(folder, adapted("old"), adapted("new"), lambda model: model.save_pretrained(folder), ("",))


def model_saves_unstaged(folder: Path) -> dict[str, Any]:
    """The control: transformers' own way of saving, which leaves a mix of both at some of the steps."""
    plain = PreTrainedModel.save_pretrained.__wrapped__
    return kills(folder, adapted("old"), adapted("new"), lambda model: plain(model, folder), ("",), 3)


def peft_model_saves(folder: Path) -> dict[str, Any]:
    return kills(folder, wrapped("old"), wrapped("new"), lambda model: model.save_pretrained(folder), ("", "other"), 4)


def first_save(folder: Path) -> dict[str, Any]:
    """Kill a save into a folder that does not exist yet at every step: it leaves nothing, or the new adapter."""
    new = adapted("new")
    expected, found = {"new": outputs(new)}, []
    for step in range(1, 400, 2):
        place = folder / str(step)
        ended = in_fork(lambda step=step, place=place: killed_at(step, place, lambda: new.save_pretrained(place)))
        is_adapter = (place / "adapter_config.json").exists() or (place / ".hf-erasure-commit").exists()
        found.append(which_is_in(place, expected) if is_adapter else "nothing")
        if ended == 0:
            break
    return {"found": found}


def at_once(folder: Path) -> dict[str, Any]:
    """Two processes that save into one folder over and over, while a third one loads from it."""
    models = {which: adapted(which) for which in SITES}
    expected = {which: outputs(model) for which, model in models.items()}
    models["old"].save_pretrained(folder)
    until = time.monotonic() + SECONDS_AT_ONCE

    def keep_saving(model: PreTrainedModel) -> None:
        while time.monotonic() < until:
            model.save_pretrained(folder)

    savers = []
    for model in models.values():
        child = os.fork()
        if not child:
            try:
                keep_saving(model)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        savers.append(child)
    found = []
    while time.monotonic() < until:
        found.append(which_is_in(folder, expected))
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in savers]
    return {"found": found, "ended": ended, "last": which_is_in(folder, expected), "left": sorted(names(folder))}


def find_all() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    warnings.simplefilter("ignore")
    roles = (model_saves, model_saves_unstaged, peft_model_saves, first_save, at_once)
    print(json.dumps({role.__name__: role(Path.cwd() / role.__name__) for role in roles}))
