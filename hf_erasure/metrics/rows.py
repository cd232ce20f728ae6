"""Rows of files as people have them: good rows are read, bad rows are left out, counted and named.

A file may begin with a byte order mark, end its lines as Windows does, and close with a comment. A row that cannot be
read costs that row alone. A file without a single good row is refused.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Raw = TypeVar("Raw")
Source = str | Path

_NAMED = 20  # bad rows of a file that are named; the others are counted
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_COMMENT = re.compile(r"\s*(#|//)")


class UnusableFile(ValueError):
    """Nothing of a file can be used; the message says why."""


class BadRow(ValueError):
    """A row cannot be read; the message goes on after where the row is: "lacks gender"."""


@dataclass(frozen=True)
class LeftOutRows:
    """The bad rows of a file.

    Attributes:
        file: Its path.
        count: How many rows are left out.
        rows: The first of them, each with `row` (where it is) and `reason`.
    """

    file: str
    count: int
    rows: list[dict[str, str]]

    def __str__(self) -> str:
        named = "; ".join(f"{row['row']} {row['reason']}" for row in self.rows)
        more = f"; and {self.count - len(self.rows)} more" if self.count > len(self.rows) else ""
        rows = "1 row is" if self.count == 1 else f"{self.count} rows are"
        return f"{self.file}: {rows} left out: {named}{more}."

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


class Rows(list[Item], Generic[Item]):
    """The good rows of one or several files, in order.

    Attributes:
        left_out: The bad rows, an entry for each file that has some.
    """

    def __init__(self, items: Iterable[Item] = (), left_out: Iterable[LeftOutRows] = ()) -> None:
        super().__init__(items)
        self.left_out = list(left_out)


def good_rows(path: Source, rows: Iterable[tuple[str, Raw]], read: Callable[[Raw], Item], expected: str) -> Rows[Item]:
    """Read every row; warn of those that cannot be read.

    Args:
        path: Of the file.
        rows: For each row where it is, such as `"line 3"`, and its content.
        read: Makes an item of the content; raises `BadRow` for a reason that can be shown as it is.
        expected: What the file should hold, for the message when no row is good.

    Raises:
        UnusableFile: If no row is good.
    """
    found: Rows[Item] = Rows()
    bad: list[dict[str, str]] = []
    for where, content in rows:
        try:
            _check_text(content)
            found.append(read(content))
        except BadRow as error:
            bad.append({"row": where, "reason": str(error)})
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            bad.append({"row": where, "reason": f"cannot be read ({type(error).__name__}: {error})"})
    if not found:
        first = f" Its first bad row: {bad[0]['row']} {bad[0]['reason']}." if bad else ""
        raise UnusableFile(f"{path} has no good row.{first} It should hold {expected}.")
    if bad:
        found.left_out.append(LeftOutRows(str(path), len(bad), bad[:_NAMED]))
        warnings.warn(str(found.left_out[0]), stacklevel=2)
    return found


def text_of(path: Source) -> str:
    """The text of a file, without a byte order mark; a byte that is not UTF-8 makes the row it is in a bad row.

    Raises:
        UnusableFile: If there is no such file, or it is UTF-16.
    """
    file = Path(path)
    if not file.is_file():
        raise UnusableFile(f"There is no file {file}: give the path of the benchmark's own file.")
    content = file.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UnusableFile(f"{file} is UTF-16: save it as UTF-8.")
    return content.decode("utf-8-sig", errors="surrogateescape")


def lines_of(path: Source) -> list[tuple[str, str]]:
    """`("line 1", text)` of every line."""
    return [(f"line {number}", line) for number, line in enumerate(_LINE_ENDS.split(text_of(path)), 1)]


def content_lines(path: Source) -> list[tuple[str, str]]:
    """The lines that hold something: neither empty nor comments."""
    return [(where, line) for where, line in lines_of(path) if line.strip() and not line.lstrip().startswith("#")]


def json_of(path: Source) -> Any:
    """The one JSON value of a file; comments may follow it.

    Raises:
        UnusableFile: If the file holds something else.
    """
    text = text_of(path).lstrip()
    try:
        found, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        raise UnusableFile(f"{path} is not JSON: {error}.") from error
    rest = [line for line in _LINE_ENDS.split(text[end:]) if line.strip()]
    if any(not _COMMENT.match(line) for line in rest):
        raise UnusableFile(f"{path} goes on after its JSON value, with {rest[0][:40]!r}: leave that out.")
    return found


def csv_rows(path: Source, wanted: Sequence[str]) -> list[tuple[str, dict[str, str] | str]]:
    """For each row of a CSV file its line, and its cells by column, or what is wrong with it.

    Blank lines and comments are not rows.

    Args:
        path: Of the file.
        wanted: Columns that it must have.

    Raises:
        UnusableFile: If it lacks a column, or its first line is not CSV.
    """
    lines = list(io.StringIO(text_of(path), newline=""))
    reader, start = csv.reader(lines, strict=True), 0
    try:
        head = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UnusableFile(f"{path} has a first line that is not CSV ({error}).") from error
    if lacking := [name for name in wanted if name not in head]:
        raise UnusableFile(f"{path} has no column {', '.join(lacking)}; it has {', '.join(head) or 'nothing'}.")
    found: list[tuple[str, dict[str, str] | str]] = []
    while True:
        first = start + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return found
        except csv.Error as error:
            # A quotation mark that is not closed would take the rest of the file with it.
            found.append((f"line {first}", f"is not CSV ({error})"))
            reader, start = csv.reader(itertools.islice(lines, first, None), strict=True), first
            continue
        while len(cells) > len(head) and not cells[-1].strip():
            cells.pop()
        if not any(cell.strip() for cell in cells) or (len(cells) < len(head) and cells[0].lstrip().startswith("#")):
            continue
        if len(cells) != len(head):
            found.append((f"line {first}", f"has {len(cells)} cells, and the first line has {len(head)}"))
        else:
            found.append((f"line {first}", dict(zip(head, cells, strict=True))))


def cells_of(row: dict[str, str] | str) -> dict[str, str]:
    """The cells of a row of `csv_rows`.

    Raises:
        BadRow: If it is not a row.
    """
    if isinstance(row, str):
        raise BadRow(row)
    return row


def text_at(content: Any, key: str) -> str:
    """A text that is not empty, at a key.

    Raises:
        BadRow: If it is not there.
    """
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"lacks {key}")
    return value


def _check_text(content: Any) -> None:
    """Raise for half a character: a byte that is not UTF-8, or half of an escaped pair."""
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else [content]
    for part in parts:
        if isinstance(part, (dict, list)):
            _check_text(part)
        elif isinstance(part, str) and any("\ud800" <= character <= "\udfff" for character in part):
            raise BadRow("is not UTF-8")
