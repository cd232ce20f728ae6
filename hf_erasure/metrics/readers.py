"""Readers of the benchmarks' own files.

Each gives `Rows`: the good rows, and under `left_out` those that could not be read, with file, row and reason.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .crows_pairs import DIRECTIONS
from .rows import (
    BadRow,
    LeftOutRows,
    Rows,
    Source,
    UnusableFile,
    cells_of,
    content_lines,
    csv_rows,
    good_rows,
    json_of,
    text_at,
)

Item = TypeVar("Item")

# Male and female pronouns that WinoBias exchanges; "her" stands for "him" as well as for "his".
PRONOUNS = {"male": {"he", "him", "his", "himself"}, "female": {"she", "her", "hers", "herself"}}
_WORDS = re.compile(r"\w+|[^\w\s]")
# Chinese characters beside it do not make another word of it, as letters do ("BLANKET").
_BLANK = re.compile(r"(?<![A-Za-z])BLANK(?![A-Za-z])")
_CROWS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
_SETS = {"X": "targ1", "Y": "targ2", "A": "attr1", "B": "attr2"}
_ENDINGS = ("stereotype", "anti-stereotype", "unrelated")


@dataclass(frozen=True)
class StereoSetItem:
    """An intrasentence item.

    Attributes:
        term: The target term.
        bias_type: `gender`, `profession`, `race` or `religion`.
        context: With `BLANK` where the sentences differ.
        sentences: The stereotypical, the anti-stereotypical and the unrelated sentence.
    """

    term: str
    bias_type: str
    context: str
    sentences: tuple[str, str, str]

    def blank(self, sentence: str) -> tuple[int, int] | None:
        """Where in a sentence the blank was filled; None if the sentence does not fit the context, but for case."""
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
    """A sentence of WinoBias with either pronoun.

    Attributes:
        pro: The version whose pronoun fits the stereotype.
        anti: The other one.
        stereotype: `"male"` or `"female"`; None where the two differ in more than pronouns of two genders.
        kind: 1 or 2, the type of sentence.
        slots: `(start, end)` of each pronoun that differs, in `pro` and in `anti`.
    """

    pro: str
    anti: str
    stereotype: str | None
    kind: int
    slots: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]] = ((), ())


def read_stereoset(path: Source) -> Rows[StereoSetItem]:
    """Items of StereoSet, from its own JSON or a plain list of items.

    Raises:
        ValueError: If the file holds something else, or no item has its three sentences.
    """
    found = json_of(path)
    if isinstance(found, dict):
        data = found.get("data")
        found = data.get("intrasentence") if isinstance(data, dict) else None
    if not isinstance(found, list) or not found:
        raise UnusableFile(f"{path} has no intrasentence items: give dev.json or test.json of StereoSet.")
    named = [(f"item {_name(entry, number)}", entry) for number, entry in enumerate(found, 1)]
    return good_rows(path, named, _stereoset_item, "intrasentence items, as dev.json of StereoSet does")


def _stereoset_item(entry: Any) -> StereoSetItem:
    context, term, kind = (text_at(entry, key) for key in ("context", "target", "bias_type"))
    given = entry.get("sentences")
    by_label = {part.get("gold_label"): part for part in given if isinstance(part, dict)} if given else {}
    if lacking := [label for label in _ENDINGS if not isinstance(by_label.get(label, {}).get("sentence"), str)]:
        raise BadRow(f"lacks {lacking[0]!r} among its sentences")
    first, second, third = (by_label[label]["sentence"] for label in _ENDINGS)
    return StereoSetItem(term, kind, context, (first, second, third))


def _name(entry: Any, number: int) -> str:
    return repr(entry["id"]) if isinstance(entry, dict) and entry.get("id") else str(number)


def read_crows_pairs(path: Source) -> Rows[CrowSPair]:
    """Pairs of crows_pairs_anonymized.csv.

    Raises:
        ValueError: If the file lacks a column or has no pair.
    """
    return good_rows(path, csv_rows(path, _CROWS), _crows_pair, "pairs, as crows_pairs_anonymized.csv does")


def _crows_pair(row: dict[str, str] | str) -> CrowSPair:
    more, less, direction, kind = (cells_of(row)[name] for name in _CROWS)
    if direction.strip() not in DIRECTIONS:
        raise BadRow(f"has the stereo_antistereo {direction!r}, not {' or '.join(map(repr, DIRECTIONS))}")
    if not kind.strip():
        raise BadRow("lacks bias_type")
    return CrowSPair(more, less, direction.strip(), kind.strip())


class SeatTests(dict[str, dict[str, list[str]]]):
    """Tests of WEAT and SEAT: name → `X`, `Y`, `A`, `B` → texts.

    Attributes:
        skipped: Tests whose file cannot be used → why.
        left_out: Bad rows of the others, an entry for each file that has some.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, str] = {}
        self.left_out: list[LeftOutRows] = []


def read_seat(folder: Source, tests: Sequence[str] | None = None) -> SeatTests:
    """Sets of WEAT and SEAT: test → `X`, `Y`, `A`, `B` → texts.

    Args:
        folder: With `sent-weat6.jsonl` and the like.
        tests: Names of files without their ending; by default every file.

    Raises:
        ValueError: If a test that is asked for has no file, or no file can be used.
    """
    paths = {path.name.split(".")[0]: path for path in sorted(Path(folder).glob("*.json*"))}
    if not paths:
        raise UnusableFile(f"{folder} holds no tests: give the folder with sent-weat6.jsonl and the like.")
    unknown = [name for name in tests or () if name not in paths]
    if unknown:
        raise ValueError(f"{folder} has no test {unknown[0]!r}: write some of {', '.join(paths)}.")
    found = SeatTests()
    for name in paths if tests is None else tests:
        try:
            found[name] = _seat_test(paths[name], found.left_out)
        except ValueError as error:
            found.skipped[name] = str(error)
    if not found:
        raise UnusableFile(next(iter(found.skipped.values()), f"{folder}: no test is asked for: name one or more."))
    for name, reason in found.skipped.items():
        warnings.warn(f"The test {name} is left out: {reason}", stacklevel=2)
    return found


def _seat_test(path: Path, left_out: list[LeftOutRows]) -> dict[str, list[str]]:
    sets = json_of(path)
    found = {}
    for short, key in _SETS.items():
        part = sets.get(key) if isinstance(sets, dict) else None
        texts = part.get("examples") if isinstance(part, dict) else None
        if not isinstance(texts, list) or not texts:
            raise UnusableFile(f"{path} lacks {key}: it should hold {', '.join(_SETS.values())}.")
        named = [(f"{key}, example {number}", text) for number, text in enumerate(texts, 1)]
        rows = good_rows(path, named, _text, f"texts under {key}")
        found[short] = list(rows)
        left_out += rows.left_out
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"is {value!r}, which is not a text")
    return value


def read_winobias(folder: Source, splits: Iterable[str] = ("dev",), types: Iterable[int] = (1, 2)) -> Rows[PronounPair]:
    """Sentence pairs of WinoBias, from `pro_stereotyped_type1.txt.dev` and its like; blank lines do not count.

    Raises:
        ValueError: If a file is not there, or the two files of a pair differ in length.
    """
    pairs: Rows[PronounPair] = Rows()
    for kind in types:
        for split in splits:
            paths = [Path(folder) / f"{name}_stereotyped_type{kind}.txt.{split}" for name in ("pro", "anti")]
            pro, anti = (content_lines(path) for path in paths)
            if len(pro) != len(anti):
                raise UnusableFile(
                    f"{folder}: type {kind} of {split} has {len(pro)} pro and {len(anti)} anti sentences."
                )
            lines = [(where, [one, other]) for (where, one), (_, other) in zip(pro, anti, strict=True)]
            rows = good_rows(paths[0], lines, functools.partial(_pronoun_pair, kind=kind), "sentences of WinoBias")
            pairs += rows
            pairs.left_out += rows.left_out
    return pairs


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most so many items, from everywhere in the file.

    Raises:
        ValueError: If `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: write at least 1, or None for all.")
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def _plain(line: str) -> str:
    """A line of WinoBias without its number and brackets."""
    return re.sub(r"^\s*\d+\s+", "", line).replace("[", "").replace("]", "").strip()


def _pronoun_pair(lines: list[str], kind: int) -> PronounPair:
    pro, anti = map(_plain, lines)
    words = [list(_WORDS.finditer(sentence)) for sentence in (pro, anti)]
    if len(words[0]) != len(words[1]):
        return PronounPair(pro, anti, None, kind)
    differing = [(a, b) for a, b in zip(*words, strict=True) if a.group() != b.group()]
    genders = {(_gender(a.group()), _gender(b.group())) for a, b in differing}
    if genders not in ({("male", "female")}, {("female", "male")}):
        return PronounPair(pro, anti, None, kind)
    slots = tuple(a.span() for a, _ in differing), tuple(b.span() for _, b in differing)
    return PronounPair(pro, anti, next(iter(genders))[0], kind, slots)


def _gender(word: str) -> str | None:
    return next((gender for gender, words in PRONOUNS.items() if word.lower() in words), None)
