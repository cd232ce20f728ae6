"""Readers of the benchmarks' own files: good rows are read, bad rows are left out, counted and named.

A file may begin with a byte order mark, have the line ends of Windows, and end with a comment. Only the rows that
cannot be read are lost. A file without a single good row raises an error. Each reader returns `Rows`: the good rows,
and under `left_out` the rows that could not be read, with file, row and reason.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from .crows_pairs import DIRECTIONS

Item = TypeVar("Item")
Raw = TypeVar("Raw")
Source = str | Path

_MOST_NAMED = 20  # the most bad rows of a file that are named; the others are counted
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_COMMENT = re.compile(r"\s*(#|//)")
# Male and female pronouns that WinoBias exchanges; "her" stands for "him" as well as for "his".
PRONOUNS = {"male": {"he", "him", "his", "himself"}, "female": {"she", "her", "hers", "herself"}}
_WORDS = re.compile(r"\w+|[^\w\s]")
# Letters beside "BLANK" make another word of it ("BLANKET"); Chinese characters do not.
_BLANK = re.compile(r"(?<![A-Za-z])BLANK(?![A-Za-z])")
_CROWS_COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
_SEAT_KEYS = {"X": "targ1", "Y": "targ2", "A": "attr1", "B": "attr2"}
_GOLD_LABELS = ("stereotype", "anti-stereotype", "unrelated")


class UnusableFile(ValueError):
    """No row of a file can be used; the message says why."""


class BadRow(ValueError):
    """A row cannot be read; the message follows the place of the row in a sentence: "lacks gender"."""


@dataclass(frozen=True)
class LeftOutRows:
    """How many rows of a file are left out, and the first of them, each with `row` (its place) and `reason`."""

    file: str
    count: int
    rows: list[dict[str, str]]

    def __str__(self) -> str:
        named = "; ".join(f"{row['row']} {row['reason']}" for row in self.rows)
        more = f"; and {self.count - len(self.rows)} more" if self.count > len(self.rows) else ""
        rows = "1 row is" if self.count == 1 else f"{self.count} rows are"
        return f"{self.file}: {rows} left out: {named}{more}."


class Rows(list[Item], Generic[Item]):
    """The good rows of one or several files, in order, and under `left_out` the bad rows of each file."""

    def __init__(self) -> None:
        super().__init__()
        self.left_out: list[LeftOutRows] = []


def good_rows(
    path: Source, rows: Iterable[tuple[str, Raw | BadRow]], read: Callable[[Raw], Item], expected: str
) -> Rows[Item]:
    """Read every row, and warn of rows that cannot be read.

    `rows` has the place of each row, such as `"line 3"`, and its content, or the error in it. `read` makes an item from
    the content, or raises `BadRow` with a reason for the reader. Raises `UnusableFile` if no row is good; the message
    says what is `expected`.
    """
    found: Rows[Item] = Rows()
    bad: list[dict[str, str]] = []
    for where, content in rows:
        try:
            if isinstance(content, BadRow):
                raise content
            # This fails for a lone surrogate: a byte that is not UTF-8, or half of an escaped pair.
            json.dumps(content, ensure_ascii=False).encode()
            found.append(read(content))
        except BadRow as error:
            bad.append({"row": where, "reason": str(error)})
        except UnicodeEncodeError:
            bad.append({"row": where, "reason": "is not UTF-8"})
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            bad.append({"row": where, "reason": f"cannot be read ({type(error).__name__}: {error})"})
    if not found:
        first = f" Its first bad row: {bad[0]['row']} {bad[0]['reason']}." if bad else ""
        raise UnusableFile(f"{path} has no good row.{first} It should hold {expected}.")
    if bad:
        found.left_out.append(LeftOutRows(str(path), len(bad), bad[:_MOST_NAMED]))
        warnings.warn(str(found.left_out[0]), stacklevel=2)
    return found


def text_of(path: Source) -> str:
    """The text of a file, without a byte order mark; a row with a byte that is not UTF-8 becomes a bad row.

    Raises `UnusableFile` if the file does not exist, or is UTF-16.
    """
    file = Path(path)
    if not file.is_file():
        raise UnusableFile(f"There is no file {file}: give the path of the benchmark's own file.")
    content = file.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UnusableFile(f"{file} is UTF-16: save it as UTF-8.")
    return content.decode("utf-8-sig", errors="surrogateescape")


def lines_of(path: Source) -> list[tuple[str, str]]:
    """The place and the text of every line, such as `("line 1", text)`."""
    return [(f"line {number}", line) for number, line in enumerate(_LINE_ENDS.split(text_of(path)), 1)]


def content_lines(path: Source) -> list[tuple[str, str]]:
    """The lines that are not empty and not comments."""
    return [(where, line) for where, line in lines_of(path) if line.strip() and not line.lstrip().startswith("#")]


def json_of(path: Source) -> Any:
    """The one JSON value of a file, after which only comments may follow. Raises `UnusableFile` otherwise."""
    text = text_of(path).lstrip()
    try:
        found, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        raise UnusableFile(f"{path} is not JSON: {error}.") from error
    rest = [line for line in _LINE_ENDS.split(text[end:]) if line.strip()]
    if any(not _COMMENT.match(line) for line in rest):
        raise UnusableFile(f"{path} continues after its JSON value, with {rest[0][:40]!r}: remove that.")
    return found


def csv_rows(path: Source, wanted: Sequence[str]) -> list[tuple[str, dict[str, str] | BadRow]]:
    """For each row of a CSV file its line, and its cells by column, or the error in it.

    Blank lines and comments are not rows. Raises `UnusableFile` if the file lacks a wanted column, or its first line is
    not CSV.
    """
    lines = list(io.StringIO(text_of(path), newline=""))
    reader, start = csv.reader(lines, strict=True), 0
    try:
        head = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UnusableFile(f"{path} has a first line that is not CSV ({error}).") from error
    if lacking := [name for name in wanted if name not in head]:
        raise UnusableFile(f"{path} has no column {', '.join(lacking)}; it has {', '.join(head) or 'nothing'}.")
    found: list[tuple[str, dict[str, str] | BadRow]] = []
    while True:
        first = start + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return found
        except csv.Error as error:
            # A quotation mark that is not closed would take the rest of the file with it.
            found.append((f"line {first}", BadRow(f"is not CSV ({error})")))
            reader, start = csv.reader(itertools.islice(lines, first, None), strict=True), first
            continue
        while len(cells) > len(head) and not cells[-1].strip():
            cells.pop()
        if not any(cell.strip() for cell in cells) or (len(cells) < len(head) and cells[0].lstrip().startswith("#")):
            continue
        if len(cells) != len(head):
            found.append((f"line {first}", BadRow(f"has {len(cells)} cells, and the first line has {len(head)}")))
        else:
            found.append((f"line {first}", dict(zip(head, cells, strict=True))))


def text_at(content: Any, key: str) -> str:
    """The text at a key. Raises `BadRow` if it is missing or empty."""
    value = _value(content, key)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"lacks {key}")
    return value


def _value(value: Any, *keys: str) -> Any:
    """The value in nested dictionaries under some keys; None if one of the keys is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


@dataclass(frozen=True)
class StereoSetItem:
    """An intrasentence item: a context with `BLANK` where its sentences differ.

    The sentences are the stereotypical, the anti-stereotypical and the unrelated one.
    """

    term: str
    bias_type: str
    context: str
    sentences: tuple[str, str, str]

    def blank(self, sentence: str) -> tuple[int, int] | None:
        """Where in a sentence the blank is filled; None if it does not fit the context; case is ignored."""
        parts = _BLANK.split(self.context)
        if len(parts) != 2:
            return None
        start, end = len(parts[0]), len(sentence) - len(parts[1])
        around = [sentence[:start].casefold(), sentence[end:].casefold()]
        return (start, end) if end > start and around == [part.casefold() for part in parts] else None


@dataclass(frozen=True)
class CrowSPair:
    """A pair of CrowS-Pairs: the more and the less stereotypical sentence."""

    more: str
    less: str
    direction: str
    bias_type: str


@dataclass(frozen=True)
class PronounPair:
    """A sentence of WinoBias with each of two pronouns."""

    pro: str  # the version whose pronoun fits the stereotype
    anti: str  # the version with the other pronoun
    stereotype: str | None  # `"male"` or `"female"`; None if the two differ in more than pronouns of two genders
    type: int  # the type of the sentence, 1 or 2
    # The place `(start, end)` of each pronoun that differs, in `pro` and in `anti`.
    slots: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]] = ((), ())


def read_stereoset(path: Source) -> Rows[StereoSetItem]:
    """Items of StereoSet, from its own JSON or a plain list of items.

    Raises `ValueError` if the file does not hold such items, or no item has its three sentences.
    """
    found = json_of(path)
    if isinstance(found, dict):
        found = _value(found, "data", "intrasentence")
    if not isinstance(found, list) or not found:
        raise UnusableFile(f"{path} has no intrasentence items: give dev.json or test.json of StereoSet.")
    names = [repr(_value(entry, "id")) if _value(entry, "id") else number for number, entry in enumerate(found, 1)]
    named = [(f"item {name}", entry) for name, entry in zip(names, found, strict=True)]
    return good_rows(path, named, _stereoset_item, "intrasentence items, as dev.json of StereoSet does")


def _stereoset_item(entry: Any) -> StereoSetItem:
    context, term, kind = (text_at(entry, key) for key in ("context", "target", "bias_type"))
    sentences = {_value(part, "gold_label"): _value(part, "sentence") for part in entry.get("sentences") or ()}
    if lacking := [label for label in _GOLD_LABELS if not isinstance(sentences.get(label), str)]:
        raise BadRow(f"lacks {lacking[0]!r} among its sentences")
    first, second, third = (sentences[label] for label in _GOLD_LABELS)
    return StereoSetItem(term, kind, context, (first, second, third))


def read_crows_pairs(path: Source) -> Rows[CrowSPair]:
    """Pairs of crows_pairs_anonymized.csv. Raises `ValueError` if the file lacks a column or has no pair."""
    return good_rows(path, csv_rows(path, _CROWS_COLUMNS), _crows_pair, "pairs, as crows_pairs_anonymized.csv does")


def _crows_pair(cells: dict[str, str]) -> CrowSPair:
    more, less, direction, kind = (cells[name] for name in _CROWS_COLUMNS)
    if direction.strip() not in DIRECTIONS:
        raise BadRow(f"has the stereo_antistereo {direction!r}, not {' or '.join(map(repr, DIRECTIONS))}")
    if not kind.strip():
        raise BadRow("lacks bias_type")
    return CrowSPair(more, less, direction.strip(), kind.strip())


def read_seat(
    folder: Source, tests: Sequence[str] | None = None
) -> tuple[dict[str, dict[str, list[str]]], list[LeftOutRows]]:
    """Sets of WEAT and SEAT: test → `X`, `Y`, `A`, `B` → texts, from all files of a folder, or from those of `tests`.

    Returns them and the bad rows of their files. Raises `ValueError` if a test has no file, or its file cannot be used.
    """
    paths = {path.name.split(".")[0]: path for path in sorted(Path(folder).glob("*.json*"))}
    if not paths:
        raise UnusableFile(f"{folder} holds no tests: give the folder with sent-weat6.jsonl and the like.")
    wanted = list(paths) if tests is None else list(tests)
    if unknown := [name for name in wanted if name not in paths]:
        raise UnusableFile(f"{folder} has no test {unknown[0]!r}: write some of {', '.join(paths)}.")
    if not wanted:
        raise ValueError(f"{folder}: no test is asked for: name one or more.")
    left_out: list[LeftOutRows] = []
    return {name: _seat_test(paths[name], left_out) for name in wanted}, left_out


def _seat_test(path: Path, left_out: list[LeftOutRows]) -> dict[str, list[str]]:
    sets = json_of(path)
    found = {}
    for short, key in _SEAT_KEYS.items():
        texts = _value(sets, key, "examples")
        if not isinstance(texts, list) or not texts:
            raise UnusableFile(f"{path} lacks {key}: it should hold {', '.join(_SEAT_KEYS.values())}.")
        named = [(f"{key}, example {number}", text) for number, text in enumerate(texts, 1)]
        rows = good_rows(path, named, _checked_text, f"texts under {key}")
        found[short] = list(rows)
        left_out += rows.left_out
    return found


def _checked_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"is {value!r}, which is not a text")
    return value


def read_winobias(folder: Source, splits: Iterable[str] = ("dev",), types: Iterable[int] = (1, 2)) -> Rows[PronounPair]:
    """Sentence pairs of WinoBias, from `pro_stereotyped_type1.txt.dev` and similar files; blank lines do not count.

    Raises `ValueError` if a file is missing, or the two files of a pair differ in length.
    """
    pairs: Rows[PronounPair] = Rows()
    for kind in types:
        for split in splits:
            paths = [Path(folder) / f"{name}_stereotyped_type{kind}.txt.{split}" for name in ("pro", "anti")]
            pro, anti = (content_lines(path) for path in paths)
            if len(pro) != len(anti):
                counts = f"{len(pro)} pro and {len(anti)} anti sentences"
                raise UnusableFile(f"{folder}: type {kind} of {split} has {counts}: they must be pairs.")
            lines = [(where, [one, other]) for (where, one), (_, other) in zip(pro, anti, strict=True)]
            rows = good_rows(paths[0], lines, functools.partial(_pronoun_pair, type=kind), "sentences of WinoBias")
            pairs += rows
            pairs.left_out += rows.left_out
    return pairs


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, evenly spread over all; all items when None."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: write at least 1, or None for all.")
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def _pronoun_pair(lines: list[str], type: int) -> PronounPair:
    # Remove the number at the beginning and the brackets around the two mentions.
    pro, anti = (re.sub(r"^\s*\d+\s+|[][]", "", line).strip() for line in lines)
    words = [list(_WORDS.finditer(sentence)) for sentence in (pro, anti)]
    if len(words[0]) != len(words[1]):
        return PronounPair(pro, anti, None, type)
    differing = [(a, b) for a, b in zip(*words, strict=True) if a.group() != b.group()]
    genders = {(_gender(a.group()), _gender(b.group())) for a, b in differing}
    if genders not in ({("male", "female")}, {("female", "male")}):
        return PronounPair(pro, anti, None, type)
    slots = tuple(a.span() for a, _ in differing), tuple(b.span() for _, b in differing)
    return PronounPair(pro, anti, next(iter(genders))[0], type, slots)


def _gender(word: str) -> str | None:
    return next((gender for gender, words in PRONOUNS.items() if word.lower() in words), None)
