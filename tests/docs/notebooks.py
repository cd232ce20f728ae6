"""python -m tests.docs.notebooks

Run the notebooks of the documentation and keep what they print: the outputs in the repository are those of a run. The
tests run their cells as well, without Jupyter's kernel, and leave the files as they are.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Of one cell; a notebook takes less than a minute on one core.
PATIENCE = 240


def executed(path: Path) -> nbformat.NotebookNode:
    """A notebook after all its cells have run, in its own folder.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell fails; shows it.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    return notebook


class Shell(InteractiveShell):
    """What a kernel runs cells with, without a window to draw in."""

    def enable_gui(self, gui: str | None = None) -> None:
        """Figures are rendered and kept; none is shown."""


def run_cells(path: Path, written: Path) -> None:
    """Run the cells in this process, by what a kernel runs them with; write down what a reader should not see."""
    shell = Shell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.run_line_magic("matplotlib", "inline")
    found = []
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            result = shell.run_cell(cell.source)
        if not result.success:
            found.append(f"cell {number}: {result.error_before_exec or result.error_in_exec!r}")
        elif number > 1 and said.getvalue():
            found.append(f"cell {number}: {said.getvalue()}")
    written.write_text(json.dumps(found), encoding="utf-8")


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What a reader should not see: cells that were not run, in order, and errors and warnings among the outputs.

    The first cell is the one with the imports, and may warn.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = []
    for number, cell in enumerate(cells, 1):
        if cell.execution_count != number:
            found.append(f"cell {number} was run as number {cell.execution_count}")
        for output in cell.outputs:
            if output.output_type == "error" or (_is_warning(output) and number > 1):
                found.append(f"cell {number}: {output.get('text') or output.get('evalue')}")
    return found


def _is_warning(output: nbformat.NotebookNode) -> bool:
    return output.get("name") == "stderr"


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from run to run and from machine to machine."""
    imports = next(cell for cell in notebook.cells if cell.cell_type == "code")
    # What is installed beside this package, and has something to say when it is imported.
    imports.outputs = [output for output in imports.outputs if not _is_warning(output)]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata.language_info = {"name": "python"}
    return notebook


if __name__ == "__main__":
    for path in NOTEBOOKS:
        notebook = tidied(executed(path))
        if found := problems(notebook):
            sys.exit(f"{path.name}: " + "; ".join(found))
        nbformat.write(notebook, path)
        sys.stdout.write(f"{path.name}\n")
