"""Processes for tests, forked from one that has made the imports already: a fresh Python takes eight seconds for them.
All workers of a test run fork from the same processes.

`run` and `start` run a function of a test module in a process of its own, `command` runs `hf-erasure` there, and
`together` runs a function in several processes that work together, as torchrun starts them. There are three kinds of
processes to fork from:

- `PACKAGE` has imported hf_erasure;
- `TRANSFORMERS` has imported transformers, but not PEFT or hf_erasure, like a program that uses neither of them;
- `LIBRARIES` has imported libraries that are not by Hugging Face. Each new process imports huggingface_hub,
  transformers and hf_erasure itself, and they read its environment variables then.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import os
import pickle
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES, TRANSFORMERS, PACKAGE = "libraries", "transformers", "package"
IMPORTED = {
    LIBRARIES: (
        "torch", "torch._inductor.compile_fx", "torch.distributed.tensor", "numpy", "pandas", "pyarrow", "scipy.stats",
        "pytest",
    ),
    # transformers imports its parts when they are used; these are the parts that small models need.
    TRANSFORMERS: tuple(f"transformers.models.{m}.modeling_{m}" for m in ("auto", "bert", "llama")),
    PACKAGE: ("hf_erasure.cli", "accelerate", "trl", "matplotlib.pyplot", "sklearn.linear_model"),
}  # fmt: skip
# One id for all workers of a test run. It is short, since the name of a socket has at most about 100 characters.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)[:12]
# Seconds until a process counts as hanging; the slowest takes half a minute on an idle core.
PATIENCE = 300
# Python searches for garbage when there are this many new objects. The default of 700 is less than one model makes, and
# takes a few hundredths of the time of all tests.
OBJECTS = 20_000
# Seconds between two looks at a process.
PAUSE = 0.005


@dataclass(frozen=True)
class Task:
    """A function call for a process, and its surroundings.

    Attributes:
        call: The pickled function and its arguments; the new process imports what they need.
        folder: The working directory.
        environment: All environment variables.
        printed: The files for standard output and standard error.
    """

    call: bytes
    folder: str
    environment: dict[str, str]
    printed: tuple[str, str]


@dataclass(frozen=True)
class Ended:
    """The result of a process; the names are those of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


# ---- the process that others are forked from -------------------------------------------------------------------------


def serve(address: str, modules: Sequence[str]) -> None:
    """Import modules, then start tasks and report their exit statuses, until the last connection is closed."""
    gc.disable()
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:  # A task does not import it either if it is not installed.
            continue
    # The same settings as in the tests' own process. Forked processes never collect what is imported here.
    gc.enable()
    gc.set_threshold(OBJECTS, 10, 10)
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        connections = [_accepted(listener)]
        while connections:
            for ready in wait([listener, *connections]):
                if isinstance(ready, socket.socket):
                    connections.append(_accepted(listener))
                elif isinstance(ready, Connection) and not _answered(ready, [listener, *connections]):
                    connections.remove(ready)
                    ready.close()
    shutil.rmtree(Path(address).parent, ignore_errors=True)


def _accepted(listener: socket.socket) -> Connection:
    connection = Connection(listener.accept()[0].detach())
    connection.send(os.getpid())
    return connection


def _answered(connection: Connection, every: Sequence[socket.socket | Connection]) -> bool:
    """Do one request; return False if the other end is closed. The process of a task closes its copies of `every`."""
    try:
        asked = connection.recv()
        if isinstance(asked, Task):
            pid = os.fork()
            if pid == 0:
                for one in every:
                    one.close()
                _work(asked)
            connection.send(pid)
        else:
            pid, status = os.waitpid(asked, os.WNOHANG)
            connection.send(os.waitstatus_to_exitcode(status) if pid else None)
    except (EOFError, ConnectionError):
        return False
    return True


def _work(task: Task) -> None:
    """Do a task in the process that was forked for it, and end."""
    code = 1
    try:
        for number, name in enumerate(task.printed, 1):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(task.environment)
        os.chdir(task.folder)
        # Fresh processes draw different numbers with NumPy, and the same numbers with torch.
        sys.modules["numpy"].random.seed()
        function, arguments = pickle.loads(task.call)
        function(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@functools.cache
def _server(kind: str) -> Connection:
    """A connection to `serve` with the modules of a kind imported; all workers of a test run share one `serve`."""
    # The worker that makes the folder starts `serve`, which removes the folder when all connections are closed.
    folder = Path(tempfile.gettempdir(), f"prepared-{RUN}-{kind}")
    address, said = str(folder / "socket"), folder / "said"
    process, end = None, time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            process = _started(kind, address, said)
        try:
            connection: Connection = Client(address, "AF_UNIX")
            connection.recv()
        # The socket does not exist yet, or `serve` does not listen yet, or it has just ended.
        except (FileNotFoundError, ConnectionError, EOFError):
            if (process is not None and process.poll() is not None) or time.monotonic() > end:
                printed = said.read_text() if said.is_file() else "nothing"
                shutil.rmtree(folder, ignore_errors=True)
                raise RuntimeError(f"no process with {IMPORTED[kind]} came about; it said\n{printed}") from None
            time.sleep(PAUSE)
        else:
            atexit.register(connection.close)
            return connection


def _started(kind: str, address: str, said: Path) -> Any:
    if kind != LIBRARIES:
        return start(serve, address, IMPORTED[kind], folder=ROOT, kind=LIBRARIES, printed=(said, said))
    code = f"from tests.prepared import serve; serve({address!r}, {IMPORTED[kind]!r})"
    with said.open("w") as file:
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=file, stderr=file)


# ---- what tests use --------------------------------------------------------------------------------------------------


class Process:
    """A process that does a task.

    Attributes:
        pid: The number of the process.
    """

    def __init__(self, task: Task, kind: str) -> None:
        self._server, self._files, self._code = _server(kind), task.printed, None
        self._server.send(task)
        self.pid: int = self._server.recv()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self._code is None:
            self._server.send(self.pid)
            self._code = self._server.recv()
        return self._code

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> Ended:
        """Wait until the process ends, and return its result.

        Raises:
            TimeoutError: If it takes longer than `timeout` seconds; it is killed.
        """
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"a process runs for more than {timeout} s; it printed\n{self._printed()}")
            time.sleep(PAUSE)
        return Ended(self._code or 0, *self._printed())

    def _printed(self) -> tuple[str, str]:
        out, err = (Path(name).read_text(encoding="utf-8", errors="replace") for name in self._files)
        return out, err


def start(
    function: Callable[..., Any],
    *arguments: Any,
    folder: Path,
    kind: str = PACKAGE,
    environment: dict[str, str] | None = None,
    printed: tuple[Path, Path] | None = None,
) -> Process:
    """Start a function of a module in a process of its own.

    Args:
        function: The function to run.
        arguments: Its arguments, which can be pickled.
        folder: The working directory.
        kind: The kind of process to fork from.
        environment: All environment variables; by default those of this process.
        printed: The files for standard output and standard error; by default new ones.
    """
    if printed is None:
        files = tempfile.mkdtemp(prefix="printed-", dir=folder)
        printed = Path(files, "out"), Path(files, "err")
    out, err = printed
    call = pickle.dumps((function, arguments))
    known = dict(os.environ) if environment is None else environment
    return Process(Task(call, str(folder), known, (str(out), str(err))), kind)


def run(function: Callable[..., Any], *arguments: Any, folder: Path, **options: Any) -> Ended:
    """Run a function in a process of its own until it ends; see `start`."""
    return start(function, *arguments, folder=folder, **options).wait()


def run_code(code: str, *arguments: str) -> None:
    """Run Python code as `python -c` does, for statements that come before any import of a test module."""
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})


def run_script(words: list[str]) -> None:
    """Run a file as `python FILE WORDS` does."""
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def command(*words: object, folder: Path) -> Ended:
    """Run `hf-erasure` with these words."""
    return run(run_command, list(map(str, words)), folder=folder)


def run_command(words: list[str]) -> None:
    """Do what `hf-erasure` does with these words; ends the process."""
    sys.argv = ["hf-erasure", *words]
    importlib.import_module("hf_erasure.cli").app()


def together(
    count: int, function: Callable[..., Any], *arguments: Any, folder: Path, timeout: float = PATIENCE, **variables: str
) -> tuple[int, str]:
    """Run a function in several processes that share their work, as `torchrun --nproc_per_node COUNT` does.

    When one of them fails, the others are ended.

    Returns:
        The exit status of the first that failed, or 0, and all that was printed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Variables that accelerate's launcher sets are left out, since torchrun does not set them.
    known = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    known |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"} | variables
    known |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
    printed = Path(tempfile.mkdtemp(prefix="printed-", dir=folder), "all")
    processes, status, end = [], 0, time.monotonic() + timeout
    with ExitStack() as stack:
        for rank in map(str, range(count)):
            own = known | {"RANK": rank, "LOCAL_RANK": rank}
            process = start(function, *arguments, folder=folder, environment=own, printed=(printed, printed))
            processes.append(process)
            stack.callback(process.kill)
        while any(process.poll() is None for process in processes) and not status:
            status = next((code for process in processes if (code := process.poll())), 0)
            if time.monotonic() > end:
                raise TimeoutError(f"{count} processes run for more than {timeout} s: {printed.read_text()}")
            time.sleep(PAUSE)
        for process in processes:
            process.kill(signal.SIGTERM)
            process.wait(timeout=30)
        status = status or next((code for process in processes if (code := process.poll())), 0)
    return status, printed.read_text(encoding="utf-8", errors="replace")
