"""Text from outside, made safe for Markdown: names of concepts, classes and modules come from files of strangers."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from typing import Any, TypeGuard
from urllib.parse import quote

LONGEST = 200
# What begins something in the middle of a line of GitHub's Markdown; `<`, `>` and `&` become entities.
_MARKS = re.compile(r"([\\`*_\[\]|~$])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


class Markdown(str):
    """Text that is Markdown already, and goes into a card as it is."""

    __slots__ = ()


def plain(value: Any, longest: int = LONGEST) -> str:
    """One line of visible characters: no line breaks, control characters, changes of direction or lone surrogates."""
    spaced = " ".join(str(value).split())
    # Cn is left in: what this Python does not know yet is a character all the same.
    visible = "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
    return visible if len(visible) <= longest else f"{visible[: longest - 1]}…"


def escaped(value: Any, longest: int = LONGEST) -> Markdown:
    """Text that shows as it is anywhere within a line, in a table too."""
    if isinstance(value, Markdown):
        return value
    marked = _MARKS.sub(r"\\\1", plain(value, longest))
    return Markdown("".join(_ENTITIES.get(c, c) for c in marked))


def code(value: Any) -> Markdown:
    """A name as code; as plain text where it has characters that end code or a cell of a table."""
    text = plain(value)
    return Markdown(f"`{text}`") if text and not re.search(r"[`|\\<>]", text) else escaped(text)


def literal(value: Any) -> Markdown:
    """A string as Python writes it, for a block of code."""
    return Markdown(json.dumps(plain(value), ensure_ascii=False))


def number(value: Any) -> Markdown:
    """A number with as many digits as it deserves; a dash where there is none."""
    if not is_number(value):
        return Markdown("–")
    if isinstance(value, int):
        return Markdown(f"{value:,}")
    return Markdown(f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}")


def compact(value: Any) -> Markdown:
    """A setting, in as few digits as it was written with."""
    return Markdown(f"{value:g}") if is_number(value) else number(value)


def percent(value: Any) -> Markdown:
    """A share."""
    return Markdown(f"{value:.1%}") if is_number(value) else number(value)


def span(interval: Any) -> Markdown:
    """An interval behind its value; nothing where there is none."""
    return Markdown("") if interval is None else Markdown(f" [{number(interval[0])}, {number(interval[1])}]")


def listed(values: Any) -> Markdown:
    """Names separated by commas."""
    return Markdown(", ".join(code(value) for value in values))


def path(value: Any) -> Markdown:
    """A file or a name on the Hub, as the target of a link."""
    return Markdown(quote(plain(value), safe="/"))


def symbol(value: Any) -> Markdown:
    """The name of a class in a block of code."""
    return Markdown(value if re.fullmatch(r"[A-Za-z_]\w*", str(value)) else "AutoModel")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
