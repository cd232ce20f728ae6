"""The Jinja templates of cards: `model_cards/` of the repository, which the wheel carries inside the package."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .markdown import Markdown, code, compact, escaped, listed, literal, number, path, percent, span, symbol

FOLDER = "model_cards"
# What stands in a card for the name of a repository that is not known yet.
SOMEWHERE = "path/to/this/folder"
SUFFIX = ".md.j2"


def template_folder() -> Path:
    """Where the templates are.

    Raises:
        FileNotFoundError: If they were not installed.
    """
    package = Path(__file__).parents[1]
    for folder in (package / FOLDER, package.parent / FOLDER):
        if (folder / f"concept_erasure{SUFFIX}").is_file():
            return folder
    raise FileNotFoundError(
        f"The templates of model cards are missing from {package / FOLDER}: the installation is not complete, install "
        "hf-erasure again."
    )


@functools.cache
def environment() -> Environment:
    """Whatever a template puts in is escaped, unless it is `Markdown` already."""
    made = Environment(
        loader=FileSystemLoader(template_folder()),
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.globals["somewhere"] = SOMEWHERE
    made.filters |= {
        "code": code, "compact": compact, "listed": listed, "literal": literal, "number": number, "path": path,
        "percent": percent,
        "span": span, "symbol": symbol,
    }  # fmt: skip
    return made


def render(name: str, **values: Any) -> str:
    """A filled template, without empty lines in a row."""
    text = environment().get_template(f"{name}{SUFFIX}").render(**values)
    lines: list[str] = []
    for line in (line.rstrip() for line in text.strip().splitlines()):
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return value if isinstance(value, Markdown) else escaped(value, longest=2000)
