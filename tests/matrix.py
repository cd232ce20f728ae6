"""The compatibility tables of the documentation, made from the outcomes of a run of the tests.

A test enters an outcome with the fixture `matrix`. `make matrix` runs those tests, gathers their entries in a file, and
writes them into the page.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

PROPERTY = "matrix_cell"
Found = tuple[str, str, str, str]  # table, row, column, outcome


def record(path: Path, location: tuple[str, int | None, str], cells: list[Found]) -> None:
    """Append the entries of one test to the file."""
    if cells:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([location, cells]) + "\n")


def recorded(path: Path) -> list[Found]:
    """All recorded entries of the last run of each test, in the order of the tests, whichever process ran them."""
    found = {tuple(location): cells for location, cells in map(json.loads, path.read_text("utf-8").splitlines())}
    return [tuple(cell) for location in sorted(found) for cell in found[location]]


def render(cells: Iterable[Found]) -> str:
    """One table in Markdown, rows and columns in the order in which they were found."""
    outcomes: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for _, row, column, outcome in cells:
        columns.setdefault(column)
        known = outcomes.setdefault(row, {})
        if known.setdefault(column, outcome) != outcome:
            raise ValueError(f"{row} × {column} is said to be {known[column]!r} and {outcome!r}")
    lines = ["| | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    lines += [f"| {row} | " + " | ".join(known.get(c, "") for c in columns) + " |" for row, known in outcomes.items()]
    return "\n".join(lines)


def write(page: Path, cells: list[Found]) -> None:
    """Put the tables into the places that the page marks for them.

    Raises:
        ValueError: If the page has no place for a table, or has a place for which there is no table.
    """
    text = page.read_text(encoding="utf-8")
    places = re.findall(r"<!-- matrix: (.*?) -->", text)
    found = {cell[0] for cell in cells}
    if found != set(places):
        raise ValueError(f"{page} has places for {sorted(places)}, the tests have found {sorted(found)}")
    for table in places:
        rendered = render(cell for cell in cells if cell[0] == table)
        between = re.compile(rf"(<!-- matrix: {re.escape(table)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = between.sub(lambda match, new=rendered: f"{match[1]}{new}\n{match[2]}", text)  # type: ignore[misc]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[2]), recorded(Path(sys.argv[1])))
