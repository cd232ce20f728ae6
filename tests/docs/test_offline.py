"""The build of the site fails if a page would fetch a file from another host."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HOOK = Path(__file__).resolve().parents[2] / "docs" / "hooks" / "offline.py"


@pytest.fixture(scope="module")
def hook() -> Any:
    spec = importlib.util.spec_from_file_location("offline_hook", HOOK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.html", '<script async src="https://cdn.example.org/mathjax.js"></script>'),
        ("page.html", "<link rel=stylesheet href=//fonts.example.org/css>"),
        ("page.html", '<link href="https://example.org/a.css" rel="stylesheet">'),
        ("page.html", '<img alt="x" src="https://example.org/a.png">'),
        ("style.css", "@import 'https://example.org/a.css';"),
        ("style.css", "src: url(https://example.org/a.woff2)"),
    ],
)
def test_what_would_be_fetched_is_found(hook: Any, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"example\.org"):
        hook.on_post_build(SimpleNamespace(site_dir=str(tmp_path)))


def test_links_and_files_of_the_site_are_left_alone(hook: Any, tmp_path: Path) -> None:
    text = '<a href="https://example.org">x</a><script src="../a.js"></script><link rel="stylesheet" href="style.css">'
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    hook.on_post_build(SimpleNamespace(site_dir=str(tmp_path)))
