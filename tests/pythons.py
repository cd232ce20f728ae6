"""Fresh Python processes without the seconds that importing transformers takes.

Each is a fork of one process that has imported torch and transformers, and neither PEFT nor this package: what a
program that starts there sees is what it sees after `import transformers`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

_FORKS = multiprocessing.get_context("forkserver")
# transformers imports its parts when they are asked for; these are what small models take.
_FORKS.set_forkserver_preload(
    [
        "torch",
        "transformers",
        "transformers.models.auto.modeling_auto",
        "transformers.models.bert.modeling_bert",
        "transformers.models.llama.modeling_llama",
    ]
)


def run_python(program: str, *arguments: str, timeout: float = 300) -> CompletedProcess[str]:
    """Run a program as `python -c program arguments` would, with its output as text.

    Raises:
        TimeoutExpired: If it took longer than `timeout` seconds; it was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _FORKS.Process(target=_run, args=(program, arguments, str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(program, timeout)
        return CompletedProcess(program, process.exitcode, out.read_text(), err.read_text())


def _run(program: str, arguments: tuple[str, ...], out: str, err: str) -> None:
    for descriptor, file in ((1, out), (2, err)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
