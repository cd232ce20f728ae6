"""The tables of the documentation agree with the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.tables import DOCS, PLACE, TABLES, filled, pages


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(DOCS)))
def test_tables_are_those_of_the_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text, "run `make docs-tables` to write the tables anew"


def test_every_table_has_a_place() -> None:
    places = [place["name"] for page in pages() for place in PLACE.finditer(page.read_text(encoding="utf-8"))]
    assert sorted(places) == sorted(TABLES)
