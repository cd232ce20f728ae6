"""python -m tests.docs.notebooks

Run the notebooks of the documentation and keep what they print: the outputs in the repository come from such a run.
The tests run their cells as well, without Jupyter's kernel, and do not change the files.
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
# The seconds that one cell may take; a whole notebook takes less than a minute on one core.
PATIENCE = 240


def executed(path: Path) -> nbformat.NotebookNode:
    """Run all cells of a notebook in its folder, and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails; the message shows the cell.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    return notebook


class Shell(InteractiveShell):
    """The class that runs cells in a kernel, without a window for figures."""

    def enable_gui(self, gui: str | None = None) -> None:
        """Do nothing: figures are rendered and kept, but not shown."""


def run_cells(path: Path, written: Path) -> None:
    """Run the cells in this process, as a kernel does; write the errors and warnings to a file."""
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
    """The problems of a notebook: cells that were not run in order, and errors and warnings among the outputs.

    The first cell has the imports, and may warn.
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
    """The notebook without parts that differ from run to run and from machine to machine."""
    imports = next(cell for cell in notebook.cells if cell.cell_type == "code")
    # Other installed packages may print warnings when they are imported.
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
