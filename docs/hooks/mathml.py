"""Formulas as MathML, made when the site is built: browsers draw it themselves, so no script has to be fetched."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves with `generic: true`.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAYED = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace every formula of a page.

    Raises:
        ValueError: A formula has a command that the converter does not know; names the page.
    """

    def formula(match: re.Match[str], display: str) -> str:
        made = convert(html.unescape(match[1]).strip(), display=display)
        # What it does not know it leaves as text.
        if "\\" in re.sub(r"<[^>]*>", "", made):
            raise ValueError(f"{page.file.src_uri}: a command in {match[1]!r} is not known to latex2mathml")
        return f'<span class="formula">{made}</span>' if display == "inline" else f'<div class="formula">{made}</div>'

    content = DISPLAYED.sub(lambda match: formula(match, "block"), content)
    return INLINE.sub(lambda match: formula(match, "inline"), content)
