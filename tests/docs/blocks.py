"""The code blocks of a Markdown page, with what the comments in front of them say about testing them.

A comment such as `<!-- test: needs small_bert -->` stands on a line before a fence and is invisible to readers:

- `needs NAME, NAME`: set-ups of `tests/docs/setups.py` that give what the block takes for granted, such as a small
  model under the name of a large one;
- `not run: REASON`: the block is checked (syntax, imports, names, signatures) and not run;
- `run`: the commands of a shell block that are `hf-erasure …` are run, not only parsed;
- `output`: the block is what the block before it prints; `...` stands for anything;
- `output within 0.1`: the same, for figures that differ from machine to machine: each decimal number by so much;
- `slow`: the page is left to the slow tests.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<info>.*)$")
DIRECTIVE = re.compile(r"^\s*<!-- test: (?P<words>.*?) -->\s*$")
KINDS = ("needs", "not run", "run", "output", "slow")

PYTHON, SHELL, YAML, JSON = ("python",), ("bash", "sh"), ("yaml",), ("json",)
# What is shown and not executed: output, text, references.
SHOWN = ("", "text", "bibtex")
LANGUAGES = (*PYTHON, *SHELL, *YAML, *JSON, *SHOWN)


class PageError(AssertionError):
    """A page that cannot be read as its author meant it."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The file.
        line: Of its first line of code, from 1.
        language: Of the fence; empty where it names none.
        code: Without the fence and its indentation.
        directives: Kind → what stands behind it.
    """

    page: Path
    line: int
    language: str
    code: str
    directives: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Page and line, as an editor takes them."""
        return f"{self.page}:{self.line}"

    @property
    def needs(self) -> list[str]:
        """The set-ups it names."""
        return [name.strip() for name in self.directives.get("needs", "").split(",") if name.strip()]


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order.

    Raises:
        PageError: A fence is not closed or in a language that is not known, or a comment is meant for no block.
    """
    found, waiting = [], {}
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if (comment := DIRECTIVE.match(line)) is not None:
            waiting |= _directive(comment["words"], f"{page}:{number}")
        elif (fence := FENCE.match(line)) is not None:
            language = (fence["info"].split() or [""])[0]
            if language not in LANGUAGES:
                raise PageError(f"{page}:{number}: {language!r} is none of {LANGUAGES}: it would not be tested")
            code = _until(fence["ticks"], lines, f"{page}:{number}")
            found.append(Block(page, number + 1, language, textwrap.dedent(code), waiting))
            waiting = {}
        elif line.strip() and waiting:
            raise PageError(f"{page}:{number}: a comment `test: {', '.join(waiting)}` stands before no block")
    if waiting:
        raise PageError(f"{page}: the last comment `test: {', '.join(waiting)}` stands before no block")
    return found


def _directive(words: str, where: str) -> dict[str, str]:
    for kind in KINDS:
        if words == kind or words.startswith((f"{kind} ", f"{kind}:")):
            rest = words[len(kind) :].lstrip(": ").strip()
            if kind == "output" and rest and not re.fullmatch(r"within \d*\.?\d+", rest):
                raise PageError(f"{where}: {rest!r} is not `within` and a number")
            if kind in ("needs", "not run") and not rest:
                raise PageError(f"{where}: `{kind}` says neither what nor why")
            return {kind: rest}
    raise PageError(f"{where}: {words!r} is none of {KINDS}")


def _until(ticks: str, lines: Iterator[tuple[int, str]], where: str) -> str:
    """The lines up to the closing fence."""
    taken = []
    for _, line in lines:
        if line.strip().startswith(ticks) and not line.strip().strip(ticks[0]):
            return "\n".join(taken) + "\n"
        taken.append(line)
    raise PageError(f"{where}: the block is never closed")
