"""Start a script in several processes, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.prepared import ROOT


def launch(processes: int, *command: object, folder: Path, timeout: int = 300, **environment: str) -> tuple[int, str]:
    """Run `torchrun --nproc_per_node N command`; the exit status and all it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    # ACCELERATE_USE_CPU is not set: whoever starts torchrun on a machine without GPU does not know of it.
    known = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    run = subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        env=known | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return run.returncode, run.stdout
