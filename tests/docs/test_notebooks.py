"""The notebooks of the documentation run from top to bottom, and the outputs shown come from such a run."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from transformers import AutoModel, AutoTokenizer

from hf_erasure import recipes
from tests.docs.notebooks import FOLDER, NOTEBOOKS, problems, run_cells
from tests.prepared import run


def run_with_a_short_encoder(path: Path, folder: Path) -> None:
    """Run the cells with two layers of the encoder, since only errors are looked at, not the outputs."""
    model = AutoModel.from_pretrained(recipes.embedded_model(), num_hidden_layers=2)
    model.save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(recipes.embedded_model()).save_pretrained(folder / "encoder")
    with mock.patch.object(recipes, "embedded_model", lambda: str(folder / "encoder")):
        run_cells(path, folder / "problems")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, tmp_path: Path) -> None:
    printed = tmp_path / "out", tmp_path / "err"
    done = run(run_with_a_short_encoder, path, tmp_path, folder=FOLDER, printed=printed)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "problems").read_text()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_shows_a_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert problems(notebook) == [], "run `make notebooks` to keep what the cells print"
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures
