"""What every test shares: no network, few threads, the test material, and a count of the lifecycle matrix."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before anything imports transformers, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.matrix import PROPERTY, write

torch.set_num_threads(1)

CELL = "lifecycle_cell"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of test material: small trained models and data."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("HF_ERASURE_TEST_ASSETS") or beside)
    if not folder.is_dir():
        pytest.skip(f"the test material is not at {folder}; HF_ERASURE_TEST_ASSETS names its folder")
    return folder


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> Callable[[str, str, str, str], None]:
    """`matrix(table, row, column, outcome)` enters what a test has seen into the documentation's tables."""

    def enter(table: str, row: str, column: str, outcome: str) -> None:
        request.node.user_properties.append((PROPERTY, (table, row, column, outcome)))

    return enter


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", type=Path, help="write the compatibility tables into this page")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "lifecycle: a cell of the matrix architecture x target x site x verb, counted in the summary"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("lifecycle"):
            # Properties travel with the report from the processes of xdist to the one that prints.
            item.user_properties.append((CELL, item.nodeid))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    page = config.getoption("--matrix")
    if page is not None and not terminalreporter.getreports("failed") + terminalreporter.getreports("error"):
        # In the order of collection, whatever process of xdist ran them when.
        reports = sorted(terminalreporter.getreports("passed"), key=lambda report: report.location)
        write(page, [tuple(v) for r in reports if r.when == "call" for k, v in r.user_properties if k == PROPERTY])
        terminalreporter.write_sep("-", f"tables written to {page}")
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
