"""The notebooks of the documentation run from top to bottom, and the outputs that are shown are from such a run."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from tests.docs.notebooks import NOTEBOOKS, executed, problems


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path) -> None:
    assert problems(executed(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_shows_a_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert problems(notebook) == [], "run `make notebooks` to keep what the cells print"
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures
