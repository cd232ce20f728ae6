"""The processes a command runs in, and whether they are those that were asked for."""

from __future__ import annotations

import re
from typing import Annotated

import psutil
import typer

from hf_erasure.fitting.processes import Processes

AskedFor = Annotated[
    int | None, typer.Option("--processes", help="Fail unless so many processes run, each of which takes a share.")
]


def launched(asked: int | None) -> Processes:
    """The processes that run this command.

    Args:
        asked: How many are wanted; None for as many as there are.

    Raises:
        ValueError: If there are fewer than were asked for, here or of `accelerate launch`: on a machine without GPU
            that starts one process whatever its `--num_processes` says.
    """
    processes = Processes()
    wanted = _asked_of_accelerate() if asked is None else asked
    if wanted is not None and processes.count < wanted:
        raise ValueError(
            f"{wanted} processes were asked for, and {processes.count} runs. Start them with torchrun, also where "
            f"there is no GPU: torchrun --nproc_per_node {wanted} -m hf_erasure.cli …"
        )
    return processes


def _asked_of_accelerate() -> int | None:
    """What `accelerate launch` was told, if it has started this process: it leaves no word of it in the environment."""
    for parent in psutil.Process().parents()[:2]:
        try:
            line = parent.cmdline()
        except psutil.Error:
            return None  # another user's
        if "launch" in line and any("accelerate" in word for word in line):
            found = re.search(r"--num[-_]processes[= ](\d+)", " ".join(line))
            return int(found[1]) if found else None
    return None
