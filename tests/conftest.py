"""Settings and fixtures of all tests: no network, few threads, the test material, a count of the lifecycle matrix."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

# Set before any import of transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.matrix import PROPERTY, record
from tests.prepared import OBJECTS

# Imported objects are never freed, and searching them for garbage again and again during the imports takes long.
gc.disable()
# transformers asks for the version of PEFT at each load of an adapter, which reads and parses a file each time: 5 ms.
importlib.metadata.version = functools.cache(importlib.metadata.version)

CELL = "lifecycle_cell"
# The files with few tests that take long. Workers begin with them, so that no worker is left with one at the end.
LONG = {
    "docs/test_notebooks.py", "docs/test_pages.py", "distributed/test_command.py", "distributed/test_failing.py",
    "distributed/test_fits.py", "ecosystem/test_compiled.py", "ecosystem/test_lora_alone.py",
    "ecosystem/test_trainer.py", "ecosystem/test_wrapped.py", "evaluation/test_not_measured.py",
    "evaluation/test_running.py",
}  # fmt: skip


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of test material: small trained models and data."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("HF_ERASURE_TEST_ASSETS") or beside)
    if not folder.is_dir():
        pytest.skip(f"the test material is not at {folder}; HF_ERASURE_TEST_ASSETS names its folder")
    return folder


@pytest.fixture(scope="session")
def short_assets(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test material with two layers of each model, for tests that do not ask how good a model is."""
    from tests.small_models import shortened

    folder = tmp_path_factory.mktemp("assets")
    (folder / "data").symlink_to(assets / "data")
    for model in (assets / "models").iterdir():
        shortened(model, folder / "models")
    return folder


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> Callable[[str, str, str, str], None]:
    """A function: `matrix(table, row, column, outcome)` enters a test's outcome into the documentation's tables."""

    def enter(table: str, row: str, column: str, outcome: str) -> None:
        request.node.user_properties.append((PROPERTY, (table, row, column, outcome)))

    return enter


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", type=Path, help="append what the tests enter into the compatibility tables to this file"
    )


class MatrixRecorder:
    """Writes the entries of each passing test to a file at once, so that several runs, even killed ones, add up."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            record(self.path, report.location, [v for k, v in report.user_properties if k == PROPERTY])


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--matrix")
    # `workerinput` is missing only in the process that gathers the reports of all workers.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(MatrixRecorder(path.resolve()))
    config.addinivalue_line(
        "markers", "lifecycle: a cell of the matrix architecture x target x site x verb, counted in the summary"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("lifecycle"):
            # With xdist, the report carries the properties from a worker to the process that prints the summary.
            item.user_properties.append((CELL, item.nodeid))
    if "PYTEST_XDIST_WORKER" in os.environ:
        counts = Counter(item.path for item in items)
        items.sort(key=lambda item: (not is_long(item.path), -counts[item.path]))


def pytest_collection_finish() -> None:
    """Leave imported objects out of later garbage collections: torch and transformers have millions of them.

    The process that only gathers the reports of workers does not call this, and does not import torch.
    """
    import accelerate.utils.memory
    import torch

    torch.set_num_threads(1)
    # Every training begins with a garbage collection, to give device memory back. It takes 0.2 s, and is left out here.
    clear_device_cache = accelerate.utils.memory.clear_device_cache
    accelerate.utils.memory.clear_device_cache = lambda garbage_collection=False: clear_device_cache()
    gc.enable()
    gc.set_threshold(OBJECTS, 10, 10)
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Leave the objects of the tests out of the five garbage collections that pytest makes at its end."""
    gc.freeze()


def is_long(path: Path) -> bool:
    return "/".join(path.parts[-2:]) in LONG


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = {
        outcome: sum(
            1
            for report in terminalreporter.getreports(outcome)
            if getattr(report, "when", None) == "call" and CELL in dict(report.user_properties)
        )
        for outcome in ("passed", "failed")
    }
    if any(counts.values()):
        terminalreporter.write_sep(
            "-", f"lifecycle matrix: {sum(counts.values())} cells ran, {counts['failed']} failed"
        )
