"""Words and their parts of speech from a treebank (CoNLL-U), matched with the tokens of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_erasure.metrics.readers import BadRow, Rows, good_rows, lines_of

_TEXT = re.compile(r"#\s*text\s*=\s*(.*\S)")
_NUMBER = re.compile(r"\d+(-\d+)?")


@dataclass(frozen=True)
class Sentence:
    """A sentence as it was written, and what part of speech stands where.

    Attributes:
        text: The sentence.
        spans: `(start, end, tag)` of every word in characters of `text`.
    """

    text: str
    spans: list[tuple[int, int, str]]

    def tags(self, offsets: list[tuple[int, int]]) -> list[str | None]:
        """The tag of the word each token's last visible character belongs to, None where there is none."""
        owner = {at: tag for start, end, tag in self.spans for at in range(start, end)}
        found: list[str | None] = []
        for start, end in offsets:
            visible = [at for at in range(start, end) if not self.text[at].isspace()]
            found.append(owner.get(visible[-1]) if visible else None)
        # Some tokenizers put a lone mark of a word's beginning before the first word; like every other it has no tag.
        if len(offsets) > 1 and offsets[0] == (0, 1) and offsets[1][0] == 0:
            found[0] = None
        return found


def read_treebank(path: str | Path) -> Rows[Sentence]:
    """The sentences of a CoNLL-U file; those that cannot be read are left out and named by their first line.

    Raises:
        ValueError: If no sentence can be read.
    """
    return good_rows(path, _blocks(path), read_sentence, "sentences in CoNLL-U, each with a line '# text = …'")


def _blocks(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    """The first line and the lines of every sentence; comments without a word after them are not a sentence."""
    block: list[str] = []
    first = ""
    for where, line in [*lines_of(path), ("", "")]:
        if line.strip():
            first = first if block else where
            block.append(line)
            continue
        if any(not each.startswith("#") for each in block):
            yield first, block
        block = []


def read_sentence(lines: list[str]) -> Sentence:
    """One sentence of a CoNLL-U file.

    A line `1-2` holds a surface token that is several words ("don't": "do" + "n't"). Where these spell it, each has its
    own characters; where they do not ("im": "I" + "am"), the characters have no tag.

    Raises:
        BadRow: If the lines do not say how the sentence was written, or a word is not in it.
    """
    text = next((match.group(1) for line in lines if (match := _TEXT.match(line))), "")
    if not text:
        raise BadRow("has no line '# text = …'")
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    rows = [row for row in rows if "." not in row[0]]  # empty nodes stand for words that were not written
    for row in rows:
        if not _NUMBER.fullmatch(row[0]) or ("-" not in row[0] and len(row) < 4):
            raise BadRow(
                f"has {' '.join(row)!r} where a word has number, form, lemma and part of speech, parted by tabs"
            )
    words = {int(row[0]): (row[1], row[3]) for row in rows if "-" not in row[0]}
    spans, position, inside = [], 0, 0
    for row in rows:
        first, _, last = row[0].partition("-")
        if not last and int(first) <= inside:
            continue
        inside = int(last or first)
        if lacking := [index for index in range(int(first), inside + 1) if index not in words]:
            raise BadRow(f"has no word {lacking[0]}, which {row[0]} is made of")
        members = [words[index] for index in range(int(first), inside + 1)]
        start = text.find(row[1], position)
        if start < 0:
            raise BadRow(f"has the word {row[1]!r}, which is not in its text after {text[:position]!r}")
        position = start + len(row[1])
        if "".join(form for form, _ in members) == row[1]:
            for form, tag in members:
                if tag != "_":  # no part of speech was given
                    spans.append((start, start + len(form), tag))
                start += len(form)
    return Sentence(text, spans)
