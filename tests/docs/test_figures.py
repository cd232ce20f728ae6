"""Figures that pages take from the results of recipes are those of the results files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"


def rows(study: str) -> list[list[str]]:
    """The cells of every row of every table in a study's results, without the intervals behind the figures."""
    text = (RECIPES / study / "results.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[re.sub(r" [\[(].*", "", cell.strip()) for cell in line.strip("|").split("|")] for line in lines]


def row(study: str, *begins: str, nth: int = 0) -> list[str]:
    """The nth row that begins with these cells, without them."""
    return [cells for cells in rows(study) if cells[: len(begins)] == list(begins)][nth][len(begins) :]


def table_row(page: str, *begins: str) -> list[str]:
    """The cells of a page's row that begins with these, without them."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return next(cells for cells in lines if cells[: len(begins)] == list(begins))[len(begins) :]


PAPERS = "ours-beside-the-papers.md"


def test_biographies_beside_the_paper() -> None:
    found = [row("biographies", *key) for key in (("none", "–"), ("last norm", "same"), ("last norm", "refitted"))]
    names = ("accuracy for the profession", "TPR gap between genders, RMS", "correlation of gap and share of women")
    for name, column in zip(names, (0, 3, 5), strict=True):
        assert table_row(PAPERS, name)[3:] == [cells[column] for cells in found]
    text = (ROOT / "docs" / PAPERS).read_text(encoding="utf-8")
    assert f"Of the {found[1][3]} that is left here {found[1][4]} is chance" in text


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("nothing", "none"),
        ("a random subspace", "random subspace"),
        ("the tags, LEACE in sequence", "sequential LEACE"),
        ("the tags, SAL; ours `orth` in sequence", "sequential orth"),
    ],
)
def test_parts_of_speech_beside_the_paper(ours: str, theirs: str) -> None:
    assert table_row(PAPERS, ours)[1:] == row("pos_scrubbing", theirs)[:2]


@pytest.mark.parametrize("model", ["stories260k", "story-mlm"])
@pytest.mark.parametrize("fit", ["closed form, factual", "trained, factual"])
def test_gradiend_beside_the_paper(model: str, fit: str) -> None:
    assert table_row(PAPERS, model, fit) == row("gradiend_gender", model, fit)[:2]
