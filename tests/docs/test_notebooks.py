"""The notebooks of the documentation run from top to bottom, and the outputs that are shown are from such a run."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

from tests.docs.notebooks import FOLDER, NOTEBOOKS, problems, run_cells
from tests.prepared import run


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, tmp_path: Path) -> None:
    printed = tmp_path / "out", tmp_path / "err"
    done = run(run_cells, path, tmp_path / "problems", folder=FOLDER, printed=printed)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "problems").read_text()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_shows_a_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert problems(notebook) == [], "run `make notebooks` to keep what the cells print"
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures
