"""The picture of a card, where matplotlib is installed and there is something to draw."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_erasure.adapters.common.files import write_whole

from .facts import CardFacts

LEAKAGE, EFFECT = "leakage.png", "effect.png"
_BEFORE, _AFTER = "#b3541e", "#1f5f8b"


def draw(facts: CardFacts, folder: Path) -> str | None:
    """Draw what was measured into the folder; returns the file's name, None where nothing was drawn."""
    lines = [site for site in [*facts.sites, *facts.finals] if site["before"] is not None]
    bars = [
        row
        for row in facts.measured
        if row["before"] is not None and not row["is_other"] and 0 <= row["before"] <= 1 and 0 <= row["after"] <= 1
    ]
    if find_spec("matplotlib") is None or not (lines if facts.kind == "concept_erasure" else bars):
        return None
    figure, name = (
        (_leakage(lines, facts.method), LEAKAGE) if facts.kind == "concept_erasure" else (_effect(bars), EFFECT)
    )
    write_whole(folder / name, lambda path: figure.savefig(path, format="png", dpi=110))
    return name


def _leakage(lines: list[dict[str, Any]], method: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    where = range(len(lines))
    axes.plot(where, [line["before"] for line in lines], marker="o", color=_BEFORE, label="before")
    axes.plot(where, [line["after"] for line in lines], marker="s", color=_AFTER, linestyle="--", label="after")
    for when, color in (("before", _BEFORE), ("after", _AFTER)):
        ends = [line.get(f"{when}_interval") for line in lines]
        if all(ends):
            axes.fill_between(where, *zip(*ends, strict=True), color=color, alpha=0.15)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_ylabel("correlation with the concept")
    axes.set_title(_literal(f"on {method['figures_on']}"), fontsize=9)
    axes.set_xticks(where, [_literal(line["name"]) for line in lines], rotation=90, fontsize=6)
    axes.legend()
    return figure


def _effect(bars: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(bars) + 1.2), layout="constrained")
    axes = figure.subplots()
    for offset, when, color in ((-0.2, "before", _BEFORE), (0.2, "after", _AFTER)):
        axes.barh([i + offset for i in range(len(bars))], [row[when] for row in bars], 0.38, color=color, label=when)
    axes.set_yticks(range(len(bars)), [_literal(row["title"]) for row in bars], fontsize=7)
    axes.invert_yaxis()
    axes.legend()
    return figure


def _literal(text: str) -> str:
    """Text in which matplotlib looks for no formula."""
    return text.replace("$", r"\$")
