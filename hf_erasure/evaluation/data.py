"""The folder of data that an evaluation reads: how it is laid out, and what to say where a part is missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hf_erasure.metrics.readers import (
    BadRow,
    LeftOutRows,
    Rows,
    content_lines,
    csv_rows,
    good_rows,
    lines_of,
    spread,
    text_at,
)

from .treebank import Sentence, read_treebank

T = TypeVar("T")

# Part → the files that are looked for, and what is in them.
LAYOUT: dict[str, str] = {
    "bias-in-bios": "*.csv with the columns hard_text (or text), profession and gender",
    "crows-pairs": "crows_pairs_anonymized.csv",
    "seat": "sent-weat6.jsonl, … as in bias-bench",
    "stereoset": "dev.json",
    "ud-ewt": "*.conllu; the file of the test split is read where there is one",
    "winobias": "pro_ and anti_stereotyped_type1 and 2 .txt.dev, female_occupations.txt, male_occupations.txt",
    "wikitext-2": "test.txt",
    "tinystories-sample": "tinystories.txt (optional: a second kind of text)",
}
_FILES = {
    "crows-pairs": "crows_pairs_anonymized.csv",
    "seat": "*.jsonl",
    "stereoset": "dev.json",
    "winobias": "*_stereotyped_type*.txt.*",
    "wikitext-2": "test.txt",
    "tinystories-sample": "tinystories.txt",
    "bias-in-bios": "*.csv",
    "ud-ewt": "*.conllu",
}
TEXTS = ("wikitext-2", "tinystories-sample")
# Shorter lines are headings and fragments.
_LEAST_CHARACTERS = 40
LONG = f"paragraphs, one a line, of at least {_LEAST_CHARACTERS} characters"
# Of longer paragraphs the beginning is read: more paragraphs say more than long ones.
_MOST_CHARACTERS = 200


class MissingData(ValueError):
    """A part of the data folder is not there; the message says which file was looked for."""


@dataclass(frozen=True)
class Biographies:
    """Texts with the profession and the gender of the person.

    Attributes:
        texts: Without the name of the profession, where the file has taken it out.
        professions: One a text.
        genders: One a text, in lower case.
    """

    texts: list[str]
    professions: list[str]
    genders: list[str]


class DataFolder:
    """A folder laid out as `LAYOUT` says; parts are looked for when they are asked for.

    Args:
        path: The folder.
        limit: At most so many items of each part, spread evenly; all when None.

    Attributes:
        left_out: File → its rows that could not be read, of the parts that were asked for.

    Raises:
        MissingData: If there is no such folder.
    """

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        self.path, self.limit = Path(path), limit
        self.left_out: dict[str, LeftOutRows] = {}
        if not self.path.is_dir():
            raise MissingData(f"--data {self.path}: there is no such folder. It should hold {described()}")

    def part(self, name: str) -> Path:
        """The folder of a part.

        Raises:
            MissingData: If the part or its files are not there.
        """
        folder = self.path / name
        if not folder.is_dir() or not any(folder.glob(_FILES[name])):
            raise MissingData(f"{self.path} has no {name}/{_FILES[name]}: put there {LAYOUT[name]}")
        return folder

    def file(self, name: str) -> Path:
        """The one file of a part."""
        return self.part(name) / _FILES[name]

    def biographies(self) -> Biographies:
        """Biographies, sorted by profession and gender before they are thinned, so that all kinds stay.

        Raises:
            MissingData: If there are none, or a column is missing.
        """
        rows: list[tuple[str, str, str]] = []
        for path in sorted(self.part("bias-in-bios").glob("*.csv")):
            named = csv_rows(path, ("profession", "gender"))
            rows += self._noted(good_rows(path, named, _biography, LAYOUT["bias-in-bios"]))
        rows = spread(sorted(rows, key=lambda row: row[:2]), self.limit)
        return Biographies([r[2] for r in rows], [r[0] for r in rows], [r[1] for r in rows])

    def sentences(self) -> list[Sentence]:
        """Sentences of the treebank with a part of speech a word."""
        folder = self.part("ud-ewt")
        files = sorted(folder.glob("*test*.conllu")) or sorted(folder.glob("*.conllu"))
        return spread([sentence for path in files for sentence in self._noted(read_treebank(path))], self.limit)

    def texts(self) -> dict[str, list[str]]:
        """Running text by its kind, a paragraph (the beginning of a long one) an entry.

        Raises:
            MissingData: If there is none of any kind.
        """
        found = {name: self.paragraphs(name) for name in TEXTS if (self.path / name / _FILES[name]).is_file()}
        if not found:
            raise MissingData(f"{self.path} has no text: put there {' or '.join(f'{n}/{_FILES[n]}' for n in TEXTS)}")
        return found

    def paragraphs(self, name: str) -> list[str]:
        """Running text of one kind, as `texts` has it."""
        path = self.file(name)
        lines = [(where, line.strip()) for where, line in lines_of(path)]
        long = [(where, line) for where, line in lines if len(line) >= _LEAST_CHARACTERS and not line.startswith("=")]
        return spread(self._noted(good_rows(path, long, _cut, LONG)), self.limit)

    def occupations(self) -> list[tuple[str, str]]:
        """Occupations and the gender that most who have them are of, as WinoBias lists them."""
        folder, found = self.part("winobias"), []
        for gender in ("female", "male"):
            path = folder / f"{gender}_occupations.txt"
            if not path.is_file():
                raise MissingData(f"{folder} has no {path.name}: put there {LAYOUT['winobias']}")
            names = self._noted(good_rows(path, content_lines(path), str.strip, "an occupation a line"))
            found += [(name, gender) for name in names]
        return found

    def _noted(self, rows: Rows[T]) -> Rows[T]:
        self.left_out |= {entry.file: entry for entry in rows.left_out}
        return rows


def _biography(cells: dict[str, str]) -> tuple[str, str, str]:
    text = cells.get("hard_text") or cells.get("text")
    if not text or not text.strip():
        raise BadRow("lacks hard_text (or text)")
    return text_at(cells, "profession").strip(), text_at(cells, "gender").strip().lower(), text


def _cut(text: str) -> str:
    """The beginning of a text, whole words; where words are not parted by spaces, as many characters."""
    beginning = text[:_MOST_CHARACTERS]
    space = beginning.rfind(" ")
    return text if text == beginning else beginning[:space] if space > _MOST_CHARACTERS // 2 else beginning


def described() -> str:
    """The layout in a sentence."""
    return "; ".join(f"{name}/: {what}" for name, what in LAYOUT.items()) + "."
