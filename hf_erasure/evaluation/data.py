"""The folder of data that an evaluation reads: its layout, and the error where a part is missing."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hf_erasure.metrics import readers

T = TypeVar("T")

# Part → the pattern of its files, and what its folder should hold, in words.
_PARTS = {
    "bias-in-bios": ("*.csv", "*.csv with the columns hard_text (or text), profession and gender"),
    "crows-pairs": ("crows_pairs_anonymized.csv", "crows_pairs_anonymized.csv"),
    "seat": ("*.jsonl", "sent-weat6.jsonl, … as in bias-bench"),
    "stereoset": ("dev.json", "dev.json"),
    "ud-ewt": ("*.conllu", "*.conllu; the file of the test split is read if there is one"),
    "winobias": (
        "*_stereotyped_type*.txt.*",
        "pro_ and anti_stereotyped_type1 and 2 .txt.dev, female_occupations.txt, male_occupations.txt",
    ),
    "wikitext-2": ("test.txt", "test.txt"),
    "tinystories-sample": ("tinystories.txt", "tinystories.txt (optional: a second kind of text)"),
}
LAYOUT = {name: holds for name, (_, holds) in _PARTS.items()}
TEXTS = ("wikitext-2", "tinystories-sample")
# The fewest characters of a line that is read: shorter lines are headings and fragments.
_LEAST_CHARACTERS = 40
# The most characters that are read of a paragraph: many paragraphs measure more than a few long ones.
_MOST_CHARACTERS = 200
_TREEBANK_TEXT = re.compile(r"#\s*text\s*=\s*(.*\S)")


class MissingData(ValueError):
    """A part of the data folder is missing; the message says which file is expected."""


@dataclass(frozen=True)
class Biographies:
    """Texts, from which a file may have removed the profession, with each person's profession and gender."""

    texts: list[str]
    professions: list[str]
    genders: list[str]


@dataclass(frozen=True)
class Sentence:
    """A sentence as it was written, and for every word `(start, end, tag)`, in characters of the sentence."""

    text: str
    spans: list[tuple[int, int, str]]

    def tags(self, offsets: list[tuple[int, int]]) -> list[str | None]:
        """For each token the tag of the word to which its last visible character belongs; None without such a word."""
        owner = {at: tag for start, end, tag in self.spans for at in range(start, end)}
        found: list[str | None] = []
        for start, end in offsets:
            visible = [at for at in range(start, end) if not self.text[at].isspace()]
            found.append(owner.get(visible[-1]) if visible else None)
        # Some tokenizers put a separate mark of the beginning of a word before the first word; the mark has no tag.
        first = next((place for place, (_, end) in enumerate(offsets) if end > 0), 0)  # behind special tokens
        if offsets[first : first + 1] == [(0, 1)] and [start for start, _ in offsets[first + 1 : first + 2]] == [0]:
            found[first] = None
        return found


class DataFolder:
    """A folder with the layout `LAYOUT`; a part is looked for when it is read.

    Each part gives at most `limit` items, evenly spread; all when None. `left_out` has, for the parts that were read,
    file → its rows that could not be read. Raises `MissingData` if the folder does not exist.
    """

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        self.path, self.limit = Path(path), limit
        self.left_out: dict[str, readers.LeftOutRows] = {}
        if not self.path.is_dir():
            layout = "; ".join(f"{name}/: {what}" for name, what in LAYOUT.items())
            raise MissingData(f"--data {self.path}: there is no such folder. It should hold {layout}.")

    def part(self, name: str) -> Path:
        """The folder of a part. Raises `MissingData` if the part or its files are missing."""
        folder, (files, holds) = self.path / name, _PARTS[name]
        if not folder.is_dir() or not any(folder.glob(files)):
            raise MissingData(f"{self.path} has no {name}/{files}: add {holds}")
        return folder

    def file(self, name: str) -> Path:
        """The one file of a part."""
        return self.part(name) / _PARTS[name][0]

    def biographies(self) -> Biographies:
        """Biographies, sorted by profession and gender before `limit` is applied, so that all kinds stay.

        Raises `MissingData` if the part is missing, and `ValueError` if a column is missing.
        """
        rows: list[tuple[str, str, str]] = []
        for path in sorted(self.part("bias-in-bios").glob("*.csv")):
            named = readers.csv_rows(path, ("profession", "gender"))
            rows += self._record(readers.good_rows(path, named, _read_biography, LAYOUT["bias-in-bios"]))
        rows = readers.spread(sorted(rows, key=lambda row: row[:2]), self.limit)
        return Biographies([r[2] for r in rows], [r[0] for r in rows], [r[1] for r in rows])

    def sentences(self) -> list[Sentence]:
        """Sentences of the treebank, with the part of speech of each word."""
        folder = self.part("ud-ewt")
        files = sorted(folder.glob("*test*.conllu")) or sorted(folder.glob("*.conllu"))
        return readers.spread(
            [sentence for path in files for sentence in self._record(read_treebank(path))], self.limit
        )

    def texts(self) -> dict[str, list[str]]:
        """Kind of running text → its paragraphs, of long ones the beginning.

        Raises `MissingData` if there is no text of any kind.
        """
        places = {name: f"{name}/{_PARTS[name][0]}" for name in TEXTS}
        found = {name: self.paragraphs(name) for name, place in places.items() if (self.path / place).is_file()}
        if not found:
            raise MissingData(f"{self.path} has no text: add {' or '.join(places.values())}")
        return found

    def paragraphs(self, name: str) -> list[str]:
        """The paragraphs of one kind of running text, as in `texts`."""
        path, expected = self.file(name), f"paragraphs, one a line, of at least {_LEAST_CHARACTERS} characters"
        lines = [(where, line.strip()) for where, line in readers.lines_of(path)]
        long = [(where, line) for where, line in lines if len(line) >= _LEAST_CHARACTERS and not line.startswith("=")]
        return readers.spread(self._record(readers.good_rows(path, long, _shorten, expected)), self.limit)

    def occupations(self) -> list[tuple[str, str]]:
        """Occupations and the gender of most people who have them, as WinoBias lists them."""
        folder, found = self.part("winobias"), []
        for gender in ("female", "male"):
            path = folder / f"{gender}_occupations.txt"
            if not path.is_file():
                raise MissingData(f"{folder} has no {path.name}: add {LAYOUT['winobias']}")
            names = self._record(
                readers.good_rows(path, readers.content_lines(path), str.strip, "an occupation a line")
            )
            found += [(name, gender) for name in names]
        return found

    def _record(self, rows: readers.Rows[T]) -> readers.Rows[T]:
        self.left_out |= {entry.file: entry for entry in rows.left_out}
        return rows


def _read_biography(cells: dict[str, str]) -> tuple[str, str, str]:
    text = cells.get("hard_text") or cells.get("text")
    if not text or not text.strip():
        raise readers.BadRow("lacks hard_text (or text)")
    return readers.text_at(cells, "profession").strip(), readers.text_at(cells, "gender").strip().lower(), text


def _shorten(text: str) -> str:
    """The beginning of a text in whole words; in whole characters if its words are not separated by spaces."""
    beginning = text[:_MOST_CHARACTERS]
    space = beginning.rfind(" ")
    return text if text == beginning else beginning[:space] if space > _MOST_CHARACTERS // 2 else beginning


def read_treebank(path: str | Path) -> readers.Rows[Sentence]:
    """The sentences of a CoNLL-U file; sentences that cannot be read are left out and named by their first line.

    Raises `ValueError` if no sentence can be read.
    """
    return readers.good_rows(path, _blocks(path), read_sentence, "sentences in CoNLL-U, each with a line '# text = …'")


def _blocks(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    """The place of the first line, and the lines, of every sentence; comments without words are not a sentence."""
    for has_text, rows in itertools.groupby(readers.lines_of(path), key=lambda row: bool(row[1].strip())):
        places, block = zip(*rows, strict=True)
        if has_text and any(not line.startswith("#") for line in block):
            yield places[0], list(block)


def read_sentence(lines: list[str]) -> Sentence:
    """One sentence of a CoNLL-U file.

    A line `1-2` holds a surface token that is several words ("don't": "do" + "n't"). If the words spell the token, each
    has its own characters; if they do not ("im": "I" + "am"), the characters have no tag. Raises `BadRow` if the lines
    lack the text of the sentence, or a word is not in it, and what Python raises where a column or a word is missing.
    """
    text = next((match.group(1) for line in lines if (match := _TREEBANK_TEXT.match(line))), "")
    if not text:
        raise readers.BadRow("has no line '# text = …'")
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    rows = [row for row in rows if "." not in row[0]]  # empty nodes stand for words that were not written
    words = {int(row[0]): (row[1], row[3]) for row in rows if "-" not in row[0]}
    spans, position, inside = [], 0, 0
    for row in rows:
        first, _, last = row[0].partition("-")
        if not last and int(first) <= inside:
            continue
        inside = int(last or first)
        members = [words[index] for index in range(int(first), inside + 1)]
        start = text.find(row[1], position)
        if start < 0:
            raise readers.BadRow(f"has the word {row[1]!r}, which is not in its text after {text[:position]!r}")
        position = start + len(row[1])
        if "".join(form for form, _ in members) == row[1]:
            for form, tag in members:
                if tag != "_":  # "_": without a part of speech
                    spans.append((start, start + len(form), tag))
                start += len(form)
    return Sentence(text, spans)
