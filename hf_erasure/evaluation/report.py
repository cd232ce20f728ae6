"""The report: one HTML file with everything in it, for light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_erasure.adapters.common.files import write_text

from . import figures, svg
from .results import LIMITS, REPORT_FILE, Results, direction, interval_text, reason_of, shown

_TEMPLATE = "report.html.j2"


def write(results: Results, folder: str | Path) -> tuple[Path, Path]:
    """Write the results as JSON and the report as HTML into a folder; returns both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data, page = results.save(folder), folder / REPORT_FILE
    write_text(page, rendered(results))
    return data, page


def rendered(results: Results) -> str:
    """The report as HTML; it loads nothing from elsewhere."""
    environment = Environment(
        loader=PackageLoader("hf_erasure.evaluation"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    marks = [svg.MARKERS[i % len(svg.MARKERS)] for i in range(len(results.names))]
    return environment.get_template(_TEMPLATE).render(
        results=results, sections=_sections(results), tables=_tables(results), limits=LIMITS, marks=marks,
        shown=shown, numbers=_numbers(results), pools=results.pooling(),
    )  # fmt: skip


def _tables(results: Results) -> list[dict[str, Any]]:
    """Rows of text by heading."""
    found = []
    for title, measures in results.groups():
        rows = []
        for measure in measures:
            cells = []
            for name in results.names:
                cell = results.cell(name, measure["key"])
                value = "not measured" if cell is None else shown(cell["value"])
                interval = "" if cell is None else interval_text(cell["interval"]).strip()
                cells.append({"value": value, "interval": interval, "verdict": results.verdict(name, measure)})
            rows.append({"measure": measure, "direction": direction(measure), "cells": cells})
        found.append({"title": title, "rows": rows})
    return found


def _sections(results: Results) -> list[dict[str, Any]]:
    """The figures under their headings; those without a figure are left out, and say why under "Not measured"."""
    sections: list[tuple[str, str, str, Callable[[Results], list[figures.Figure]]]] = [
        ("frontier", "Bias against capability", "What was gained and what was paid, a point for each entry. Best is "
         "low, and where the arrow under the axis points.", figures.frontiers),
        ("depth", "Leakage by depth", "What a linear probe reads at each layer from states it was not fitted on.",
         figures.depth),
        ("embeddings", "Biographies before and after", "Last hidden states in one fixed plane: along the difference of "
         "the genders' means in the base, and along what varies most across it. The plane comes from other biographies "
         "than those drawn. A cloud that looks mixed here may still be separable in the other dimensions.",
         figures.embeddings),
        ("shifts", "Probability shifts", "What the model would rather say next.", figures.shifts),
        ("neuron", "The feature neuron", "What a GRADIEND adapter reads off the gradients of single texts, relative to "
         "the highest bar of each row.", figures.neurons),
        ("bars", "Every measure with its interval", "The dashed line is the ideal, where it is near.",
         figures.interval_bars),
    ]  # fmt: skip
    found = []
    for key, title, text, draw in sections:
        drawn: list[figures.Figure] = []
        try:
            drawn = draw(results)
        except Exception as error:  # one picture's failure is not the report's
            text = f"This could not be drawn: {reason_of(error)}."
        if drawn or text.startswith("This could not"):
            found.append({"key": key, "title": title, "text": text, "figures": drawn})
    return found


def _numbers(results: Results) -> list[dict[str, Any]]:
    """What is drawn beside the measures, as tables for who cannot see the drawing."""
    found = []
    for concept, entries in results.depth.items():
        rows = [
            [layer, *[shown(entries[name][i]["leakage"]) for name in entries]]
            for i, layer in enumerate(row["layer"] for row in next(iter(entries.values())))
        ]
        found.append({"title": f"Leakage of {concept} by depth", "head": ["layer", *entries], "rows": rows})
    if results.shifts:
        jobs = [row["occupation"] for row in next(iter(results.shifts.values()))["occupations"]]
        shares = [{r["occupation"]: r["she"] for r in part["occupations"]} for part in results.shifts.values()]
        rows = [[job, *[f"{share[job]:.1%}" for share in shares]] for job in jobs]
        found.append({"title": "Share of “she”", "head": ["occupation", *results.shifts], "rows": rows})
    return found
