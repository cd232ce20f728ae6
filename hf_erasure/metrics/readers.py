"""Readers of the benchmarks' own files."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Source = str | Path

# Male and female pronouns that WinoBias exchanges; "her" stands for "him" as well as for "his".
PRONOUNS = {"male": {"he", "him", "his", "himself"}, "female": {"she", "her", "hers", "herself"}}
_WORDS = re.compile(r"\w+|[^\w\s]")
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
        if self.context.count("BLANK") != 1:
            return None
        before, after = self.context.lower().split("blank", 1) if "blank" in self.context.lower() else ("", "")
        lower, end = sentence.lower(), len(sentence) - len(after)
        fits = lower.startswith(before) and lower.endswith(after) and end > len(before) and len(lower) == len(sentence)
        return (len(before), end) if fits else None


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


def read_stereoset(path: Source) -> list[StereoSetItem]:
    """Items of StereoSet, from its own JSON or a plain list of items.

    Raises:
        ValueError: If an item lacks one of its three sentences, or the file holds something else.
    """
    found: Any = json.loads(_text(path))
    if isinstance(found, dict):
        found = found.get("data", {}).get("intrasentence")
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} has no intrasentence items: give dev.json or test.json of StereoSet.")
    items = []
    for entry in found:
        try:
            by_label = {sentence["gold_label"]: sentence["sentence"] for sentence in entry["sentences"]}
            sentences = tuple(by_label[label] for label in _ENDINGS)
            items.append(StereoSetItem(entry["target"], entry["bias_type"], entry["context"], sentences))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: item {entry.get('id', len(items))!r} lacks {error}.") from error
    return items


def read_crows_pairs(path: Source) -> list[CrowSPair]:
    """Pairs of crows_pairs_anonymized.csv.

    Raises:
        ValueError: If the file lacks a column or has no pair.
    """
    rows = list(csv.DictReader(_text(path).splitlines()))
    wanted = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
    lacking = [name for name in wanted if not rows or rows[0].get(name) is None]
    if lacking:
        raise ValueError(f"{path} has no pairs with {', '.join(lacking)}: give crows_pairs_anonymized.csv.")
    return [CrowSPair(*(row[name] for name in wanted)) for row in rows]


def read_seat(folder: Source, tests: Sequence[str] | None = None) -> dict[str, dict[str, list[str]]]:
    """Sets of WEAT and SEAT: test → `X`, `Y`, `A`, `B` → texts.

    Args:
        folder: With `sent-weat6.jsonl` and the like.
        tests: Names of files without their ending; by default every file.

    Raises:
        ValueError: If a test has no file, or a file lacks a set.
    """
    paths = {path.name.split(".")[0]: path for path in sorted(Path(folder).glob("*.json*"))}
    if not paths:
        raise ValueError(f"{folder} holds no tests: give the folder with sent-weat6.jsonl and the like.")
    unknown = [name for name in tests or () if name not in paths]
    if unknown:
        raise ValueError(f"{folder} has no test {unknown[0]!r}: write some of {', '.join(paths)}.")
    names = {"X": "targ1", "Y": "targ2", "A": "attr1", "B": "attr2"}
    found = {}
    for name in tests or paths:
        sets = json.loads(_text(paths[name]))
        sets = sets if isinstance(sets, dict) else {}
        if lacking := [key for key in names.values() if not sets.get(key, {}).get("examples")]:
            raise ValueError(f"{paths[name]} lacks {lacking[0]}: it should hold {', '.join(names.values())}.")
        found[name] = {short: list(sets[key]["examples"]) for short, key in names.items()}
    return found


def read_winobias(folder: Source, splits: Iterable[str] = ("dev",), types: Iterable[int] = (1, 2)) -> list[PronounPair]:
    """Sentence pairs of WinoBias, from `pro_stereotyped_type1.txt.dev` and its like.

    Raises:
        ValueError: If a file is not there, or the two files of a pair differ in length.
    """
    pairs = []
    for kind in types:
        for split in splits:
            pro, anti = (
                _text(Path(folder) / f"{name}_stereotyped_type{kind}.txt.{split}").splitlines()
                for name in ("pro", "anti")
            )
            if len(pro) != len(anti):
                raise ValueError(f"{folder}: type {kind} of {split} has {len(pro)} pro and {len(anti)} anti sentences.")
            pairs += [_pronoun_pair(_plain(a), _plain(b), kind) for a, b in zip(pro, anti, strict=True)]
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


def _text(path: Source) -> str:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"There is no file {file}: give the path of the benchmark's own file.")
    return file.read_text(encoding="utf-8")


def _plain(line: str) -> str:
    """A line of WinoBias without its number and brackets."""
    return re.sub(r"^\s*\d+\s+", "", line).replace("[", "").replace("]", "").strip()


def _pronoun_pair(pro: str, anti: str, kind: int) -> PronounPair:
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
