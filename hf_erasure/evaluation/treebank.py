"""Words and their parts of speech from a treebank (CoNLL-U), matched with the tokens of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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


def read_treebank(path: str | Path) -> list[Sentence]:
    """The sentences of a CoNLL-U file."""
    blocks = Path(path).read_text(encoding="utf-8").strip().split("\n\n")
    return [read_sentence(block.splitlines()) for block in blocks]


def read_sentence(lines: list[str]) -> Sentence:
    """One sentence of a CoNLL-U file.

    A line `1-2` holds a surface token that is several words ("don't": "do" + "n't"). Where these spell it, each has its
    own characters; where they do not ("im": "I" + "am"), the characters have no tag.

    Raises:
        ValueError: If the lines do not say how the sentence was written.
    """
    text = next((line for line in lines if line.startswith("# text = ")), "").removeprefix("# text = ")
    if not text:
        raise ValueError(f"A sentence of the treebank has no line '# text = …': it begins {lines[:2]}.")
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    rows = [row for row in rows if "." not in row[0]]  # empty nodes stand for words that were not written
    words = {int(row[0]): (row[1], row[3]) for row in rows if "-" not in row[0]}
    spans, position, inside = [], 0, 0
    for row in rows:
        first, _, last = row[0].partition("-")
        if not last and int(first) <= inside:
            continue
        members = [words[index] for index in range(int(first), int(last or first) + 1)]
        inside = int(last or first)
        start = text.index(row[1], position)
        position = start + len(row[1])
        if "".join(form for form, _ in members) == row[1]:
            for form, tag in members:
                spans.append((start, start + len(form), tag))
                start += len(form)
    return Sentence(text, spans)
