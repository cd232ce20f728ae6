"""The code blocks of a Markdown page, with the comments before them that say how they are tested.

A comment such as `<!-- test: needs small_bert -->` stands on a line before a fence and is invisible to readers:

- `needs NAME, NAME`: functions of `tests/docs/setups.py` that prepare what the block presupposes, such as a small
  model under the name of a large one;
- `not run: REASON`: the block is checked (syntax, imports, names, signatures) but not run;
- `run`: those commands of a shell block that begin with `hf-erasure` are run, not only parsed;
- `output`: the block is the output of the block before it; `...` stands for any text;
- `output within 0.1`: the same, but each decimal number may differ by so much, since machines compute differently;
- `slow`: only the slow tests test the page.
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
# Blocks that are shown but not executed: output, text, references.
SHOWN = ("", "text", "bibtex")
LANGUAGES = (*PYTHON, *SHELL, *YAML, *JSON, *SHOWN)


class PageError(AssertionError):
    """A page has an error in its blocks or in their comments."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The file.
        line: The line of its first line of code, from 1.
        language: The language of the fence; empty if it names none.
        code: The code without the fence and its indentation.
        directives: Kind of the comment → the text after it.
    """

    page: Path
    line: int
    language: str
    code: str
    directives: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Page and line, in the form that an editor accepts."""
        return f"{self.page}:{self.line}"

    @property
    def needs(self) -> list[str]:
        """The set-ups that it names."""
        return [name.strip() for name in self.directives.get("needs", "").split(",") if name.strip()]


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order.

    Raises:
        PageError: If a fence is not closed or has an unknown language, or if no block follows a comment.
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
