"""For a program that uses only LoRA, `import hf_erasure` makes no observable difference."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ecosystem.lora_alone import BEGINS, PARTS
from tests.prepared import LIBRARIES, Process, run_script, start

SCRIPT = Path(__file__).with_name("lora_alone.py")
# The times that Trainer prints.
TIMES = re.compile(r"'(\w+_runtime|\w+_per_second)': '[^']*'")

# The known differences: key → the wrapper of this package that causes it.
KNOWN: dict[str, dict[str, str]] = {
    "seen": {},
    "warned": {},
    "files": {},
}


@dataclass(frozen=True)
class Run:
    """The record of a run, and what it printed and logged after its imports."""

    found: dict[str, Any]
    printed: str
    logs: list[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run without `import hf_erasure`, and one with it, at the same time in two folders."""
    ways = {"without": [], "with": ["plugin"]}
    folders = {way: tmp_path_factory.mktemp(way) for way in ways}
    started = {way: _start(folders[way], words) for way, words in ways.items()}
    try:
        return tuple(_ended(started[way], folders[way]) for way in ways)
    finally:
        for process in started.values():
            process.kill()


def _start(folder: Path, words: list[str]) -> Process:
    """Start a fork of one process, so that both runs hash texts alike: PEFT writes names in the order of a set."""
    (folder / "work").mkdir()
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "info",
    }
    printed = folder / "printed", folder / "logs"
    arguments = [str(SCRIPT), str(folder / "result.json"), *words]
    options: dict[str, Any] = {"kind": LIBRARIES, "environment": environment, "printed": printed}
    return start(run_script, arguments, folder=folder / "work", **options)


def _ended(process: Process, folder: Path) -> Run:
    ended = process.wait()
    assert ended.returncode == 0, ended.stderr
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return Run(found, _after(ended.stdout), _after(ended.stderr).splitlines())


def _after(printed: str) -> str:
    return TIMES.sub(r"'\1'", printed.partition(f"{BEGINS}\n")[2])


def _differences(without: dict[str, Any], given: dict[str, Any], known: dict[str, str]) -> dict[str, Any]:
    """The differences that are not known, and the known ones that have disappeared."""
    keys = dict.fromkeys([*without, *given])
    found = {key: (without.get(key), given.get(key)) for key in keys if without.get(key) != given.get(key)}
    settled = {key: "is the same by now: take it out of KNOWN" for key in known if key not in found}
    return {key: values for key, values in found.items() if key not in known} | settled


@pytest.mark.parametrize("what", ["seen", "warned", "files"])
def test_a_program_with_lora_alone_sees_the_same(runs: tuple[Run, Run], what: str):
    without, given = runs
    assert not _differences(without.found[what], given.found[what], KNOWN[what])


def test_it_prints_and_logs_the_same(runs: tuple[Run, Run]):
    without, given = runs
    assert without.printed == given.printed
    assert without.logs == given.logs


def test_there_is_something_to_see(runs: tuple[Run, Run]):
    without, given = runs
    parts = {part.__name__ for part in PARTS}
    for run in (without, given):
        assert {key.partition(":")[0] for key in run.found["seen"]} == set(run.found["warned"]) == parts
        assert sum(map(len, run.found["warned"].values())) > 20
    assert {"mixin one/adapter_model.safetensors", "trainer peft whole/checkpoint-2/optimizer.pt"} <= set(
        given.found["files"]
    )
    assert len(given.logs) > 100
