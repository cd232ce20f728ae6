"""Start a module in several processes, as torchrun does."""

from __future__ import annotations

import dataclasses
import os
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed import run as torchrun
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests import prepared


def launch(processes: int, module: str, *words: str, folder: Path) -> tuple[int, str]:
    """Run `torchrun --nproc_per_node N -m module words`, and return the exit status and all that it printed.

    It is torchrun's own launcher, with its rendezvous and its environment for each process. But the processes are forks
    of the launcher, so that torch and transformers are imported only once. Each process imports PEFT and the package.
    """
    # ACCELERATE_USE_CPU is not set, since users of torchrun on a machine without a GPU do not set it.
    known = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    command = ["--standalone", "--nproc_per_node", str(processes), "-m", module, *words]
    known |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = prepared.run(_launcher, command, folder=folder, kind=prepared.TRANSFORMERS, environment=known)
    return ended.returncode, ended.stdout + ended.stderr


def _launcher(command: list[str]) -> None:
    with mock.patch.object(torchrun, "elastic_launch", _forking):
        torchrun.main(command)


def _forking(config: LaunchConfig, entrypoint: Any) -> elastic_launch:
    # torchrun would start a new Python with these words; `_as_python` does the same in a fork.
    return elastic_launch(dataclasses.replace(config, start_method="fork"), _as_python)


def _as_python(*words: str) -> None:
    """Do what `python -u -m module words` does."""
    start = words.index("-m") + 1
    sys.argv = list(words[start:])
    runpy.run_module(words[start], run_name="__main__", alter_sys=True)
