"""Runs a page from top to bottom, like a reader who copies every block."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from tests.docs.blocks import JSON, PYTHON, SHELL, YAML, Block, PageError, blocks_of
from tests.docs.commands import OURS, check_command, check_yaml, commands_of, run_ours
from tests.docs.names import check_names
from tests.docs.setups import SETUPS

_SAME = doctest.OutputChecker()
_LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# A block without a language must not begin with these commands, since they would not be checked.
_COMMAND = re.compile(r"^\s*(\$ )?(hf-erasure|make|pip|python|torchrun|accelerate) ", re.MULTILINE)
_DECIMAL = re.compile(r"\d+\.\d+")


@dataclass
class Page:
    """The state of a page that is run, shared by its blocks.

    Attributes:
        path: The file.
        folder: The folder in which it is run; files that blocks write are there.
        namespace: The variables of all Python blocks.
        printed: The output of the latest block.
        done: The set-ups that have been called.
        substitutes: Name → the function that a set-up has put in its place.
        undone: Restores the original functions.
    """

    path: Path
    folder: Path
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    printed: str = ""
    done: set[str] = field(default_factory=set)
    substitutes: dict[str, mock.Mock] = field(default_factory=dict)
    undone: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def substitute(self, name: str, function: Callable[..., Any]) -> None:
        """Replace the function of a name such as `package.module.name` until the page has been run."""
        self.substitutes[name] = self.undone.enter_context(mock.patch(name, side_effect=function))


def run_page(path: Path, folder: Path) -> int:
    """Run or check every block of a page in the current folder; returns the number of blocks.

    Raises:
        PageError: If a check fails or an output differs. Python that fails raises its own error, with the page's line.
    """
    page, blocks = Page(path, folder), blocks_of(path)
    with page.undone:
        for block in blocks:
            for name in block.needs:
                if name not in SETUPS:
                    raise PageError(f"{block.where}: no set-up {name!r}; there are {', '.join(SETUPS)}")
                if name not in page.done:
                    page.done.add(name)
                    SETUPS[name](page)
            _take(page, block)
        for name, substitute in page.substitutes.items():
            if not substitute.called:
                raise PageError(f"{path}: a set-up puts something in the place of {name}, which no block calls")
    return len(blocks)


def _take(page: Page, block: Block) -> None:
    if "output" in block.directives:
        _compare(page, block)
    elif block.language in PYTHON:
        if "not run" in block.directives:
            check_names(block)
        else:
            page.printed = _run(page, block)
    elif block.language in SHELL:
        page.printed = _shell(block)
    elif block.language in YAML:
        check_yaml(block, page.folder)
    elif block.language in JSON:
        try:
            json.loads(block.code)
        except ValueError as error:
            raise PageError(f"{block.where}: {error}") from error
    elif (found := _COMMAND.search(block.code)) is not None:
        raise PageError(f"{block.where}: {found[0].strip()!r} looks like a command: write ```bash, to have it checked")


def _run(page: Page, block: Block) -> str:
    check_names(block)
    printed = io.StringIO()
    # Empty lines come first, so that a traceback shows the line of the page.
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, page.namespace)
    return printed.getvalue()


def _shell(block: Block) -> str:
    printed = []
    for words in commands_of(block):
        check_command(words, block.where)
        if "run" in block.directives:
            if words[0] != OURS:
                raise PageError(f"{block.where}: only {OURS} is run here, not {words[0]!r}")
            printed.append(run_ours(words[1:], block.where))
    return "".join(printed)


def _compare(page: Page, block: Block) -> None:
    """Refuse output that differs from what the block before it has printed."""
    said, printed = block.code.strip(), page.printed.strip()
    if within := block.directives["output"].removeprefix("within"):
        said, printed = _near(said, printed, float(within))
    if not _SAME.check_output(said, printed, _LENIENT):
        raise PageError(f"{block.where}: the page says\n{block.code}\nand what is printed is\n{page.printed}")


def _near(said: str, printed: str, within: float) -> tuple[str, str]:
    """Both texts without their decimal numbers, if each number is near that of the other text; else both unchanged."""
    numbers = [[float(number) for number in _DECIMAL.findall(text)] for text in (said, printed)]
    near = len(numbers[0]) == len(numbers[1]) and all(abs(a - b) <= within for a, b in zip(*numbers, strict=True))
    return (_DECIMAL.sub("#", said), _DECIMAL.sub("#", printed)) if near else (said, printed)
