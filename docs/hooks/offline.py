"""A site that fetches nothing: the build fails where a page would load a script, style or picture from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*?\ssrc=["']?(?P<src>(?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*?\shref=["']?(?P<href>(?:https?:)?//[^"'\s>]+)"""
    r"""|(?:@import\s+|url\()\s*["']?(?P<style>(?:https?:)?//[^"')\s]+)"""
)


def on_post_build(config: Any, **_: Any) -> None:
    """Look through every page and style of the built site.

    Raises:
        RuntimeError: Names the page and the address.
    """
    site = Path(config.site_dir)
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        if (found := FETCHED.search(path.read_text(encoding="utf-8"))) is not None:
            address = next(filter(None, found.groups()))
            raise RuntimeError(f"{path.relative_to(site)} would fetch {address}: put what it needs into docs/")
