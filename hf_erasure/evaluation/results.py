"""The results of an evaluation: values by entry and measure, what could not be measured, and what the report draws."""

from __future__ import annotations

import json
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_erasure.adapters.common.files import write_text
from hf_erasure.fitting.report import badness, verdict
from hf_erasure.metrics.readers import LeftOutRows

from .loading import BASE

# The layout of `results.json`; raise it when the file of an older version can no longer be read.
FORMAT = 1
RESULTS_FILE, REPORT_FILE = "results.json", "report.html"
# The heading of measures of concepts that are not those of the adapters.
OTHER = "Other measures, of concepts that no adapter here is about"
ARROWS = {"lower": "↓", "higher": "↑", "closer": "→"}

# Limits of the numbers, in sentences for the reader of the results.
LIMITS = (
    "Erasure guards linearly: after it no linear predictor with a convex loss does better than a constant, at these "
    "sites and on the distribution it was fitted on. Other layers, other text and nonlinear readers are not guarded.",
    "Nonlinear probes may still read the concept; the figures of an MLP and an RBF-SVM are beside the linear one.",
    "On pre-LN models the intermediate hidden states stay un-erased unless whole blocks are targeted: look at the "
    "leakage by depth.",
    "CrowS-Pairs and StereoSet hold noisy pairs, SEAT effect sizes have wide permutation intervals on small models, "
    "and a value near the ideal is not a proof that a model is unbiased.",
    "A linear probe far below the majority was most likely measured on the very texts that the erasure was fitted on: "
    "the figure says nothing about other texts.",
    "Intervals say how much a number would change with other items, for the same model and the same fitted adapter.",
)


@dataclass
class Results:
    """The results of one run; everything in it is plain data."""

    about: dict[str, Any]  # model, data, suite, seed, limit and versions
    # The columns: `name`, `adapters`, their `concepts`, `kind`, `strength`, and what `verify_adapter` said.
    entries: list[dict[str, Any]] = field(default_factory=list)
    measures: list[dict[str, Any]] = field(default_factory=list)  # the rows: facts of the measures of some entry
    # Entry → measure → `value`, `interval` or None, and `details`, the metric's whole result.
    values: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    not_measured: list[dict[str, Any]] = field(default_factory=list)  # `measure`, `entry` (None for all) and `reason`
    # Rows of the data that could not be read: `file`, `count`, and the first `rows`, each with `row` and `reason`.
    left_out: list[dict[str, Any]] = field(default_factory=list)
    # Concept → entry → leakage by layer.
    depth: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    embedding: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # entry → points in a plane
    shifts: dict[str, dict[str, Any]] = field(default_factory=dict)  # entry → share of "she" by occupation
    neurons: dict[str, dict[str, Any]] = field(default_factory=dict)  # adapter → values of the feature neuron
    # `base`, and `adapters`: name → `adapter`, and `base`, the weights at the sample of the adapter's own base.
    fingerprints: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the entries, in order."""
        return [entry["name"] for entry in self.entries]

    def cell(self, entry: str, key: str) -> dict[str, Any] | None:
        """The value and interval of a measure; None if it could not be measured."""
        return self.values.get(entry, {}).get(key)

    def verdict(self, entry: str, measure: dict[str, Any]) -> str:
        """`"better"` or `"worse"` than the base; empty if the entry's interval contains the base's value."""
        base, own = self.cell(BASE, measure["key"]), self.cell(entry, measure["key"])
        if entry == BASE or base is None or own is None:
            return ""
        return verdict(base["value"], own["value"], own["interval"], measure["better"], measure["ideal"])

    def groups(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """The measures under their headings: bias by concept, concepts of none of the adapters, and capability."""
        concept_lists = [entry.get("concepts") or [None] for entry in self.entries if entry["adapters"]]
        concepts = {concept for each in concept_lists for concept in each}
        # An adapter of another library does not name its concept.
        all_count = not concept_lists or any(None in each for each in concept_lists)
        found: dict[str, list[dict[str, Any]]] = {}
        for measure in (m for m in self.measures if m["purpose"] == "bias"):
            concept = measure.get("concept")
            is_own = all_count or concept is None or concept in concepts
            title = f"Bias: {concept}" if concept else "Bias"
            found.setdefault(title if is_own else OTHER, []).append(measure)
        if OTHER in found:
            found[OTHER] = found.pop(OTHER)
        capability = [measure for measure in self.measures if measure["purpose"] == "capability"]
        return [*found.items(), *([("Capability kept", capability)] if capability else [])]

    def frontiers(self) -> list[dict[str, Any]]:
        """For every bias a panel: distance from the ideal against capability, a point for each entry."""
        capabilities = [m for m in self.measures if m["purpose"] == "capability" and self._has_all_values(m)]
        if not capabilities:
            return []
        # Perplexity shows most of the cost; the next best is what can still be read from the states.
        rank = {"perplexity": 0, "profession": 1}
        cost = min(capabilities, key=lambda measure: rank.get(measure["figure"], rank.get(measure["key"], 2)))
        panels = []
        for bias in (m for title, group in self.groups() if title != OTHER for m in group):
            if bias["purpose"] == "bias" and self._has_all_values(bias):
                points = [
                    {
                        "name": name,
                        "bias": badness(self.values[name][bias["key"]]["value"], bias["better"], bias["ideal"]),
                        "capability": self.values[name][cost["key"]]["value"],
                    }
                    for name in self.names
                ]
                panels.append({"bias": bias, "capability": cost, "points": points})
        return panels

    def _has_all_values(self, measure: dict[str, Any]) -> bool:
        return all(self.cell(name, measure["key"]) is not None for name in self.names)

    def to_json(self) -> str:
        """The results as JSON, the same text for the same results; numbers that are not finite are null."""
        text = json.dumps({"format": FORMAT, **vars(self), "limits": LIMITS}, default=str)
        plain = json.loads(text, parse_constant=lambda _: None)
        # A lone surrogate, from a file that is not UTF-8, cannot be written.
        return json.dumps(plain, indent=1, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"

    def save(self, folder: Path) -> Path:
        """Write the results as JSON into a folder that exists, completely or not at all; return the file."""
        path = folder / RESULTS_FILE
        write_text(path, self.to_json())
        return path

    def tables(self) -> list[dict[str, Any]]:
        """The measures under their headings (`title`), in words: `measure`, `direction` and `cells` of every row."""
        return [{"title": title, "rows": [self._row(measure) for measure in group]} for title, group in self.groups()]

    def _row(self, measure: dict[str, Any]) -> dict[str, Any]:
        cells = []
        for name in self.names:
            cell = self.cell(name, measure["key"])
            value, interval = ("not measured", None) if cell is None else (number_text(cell["value"]), cell["interval"])
            cells.append({"value": value, "interval": interval_text(interval), "verdict": self.verdict(name, measure)})
        return {"measure": measure, "direction": direction(measure), "cells": cells}

    def table(self) -> str:
        """The measures by entry as text, with intervals and the direction that is better."""
        marks = {"better": " +", "worse": " -", "": ""}
        rows = [["", "", *self.names]]
        for table in self.tables():
            rows.append([table["title"], *[""] * (len(rows[0]) - 1)])
            for row in table["rows"]:
                cells = [f"{cell['value']}{cell['interval']}{marks[cell['verdict']]}" for cell in row["cells"]]
                rows.append([f"  {row['measure']['title']}", row["direction"], *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def notes(self) -> list[str]:
        """What could not be measured, a sentence for each."""
        return [
            f"{entry['measure']}{' of ' + entry['entry'] if entry['entry'] else ''}: {entry['reason']}"
            for entry in self.not_measured
        ]

    def bad_rows(self) -> list[str]:
        """The rows of the data that could not be read, a sentence for each file."""
        return [str(LeftOutRows(**entry)) for entry in self.left_out]


def reason_of(error: Exception) -> str:
    """The message of an error; its type and place too, if no measure raises it on purpose."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


def direction(measure: dict[str, Any]) -> str:
    """An arrow in the better direction, with the ideal if the best value is in between."""
    if measure["better"] == "closer":
        return f"{ARROWS['closer']}{measure['ideal']:g}"
    return ARROWS[measure["better"]]


def number_text(value: float) -> str:
    """A number with one decimal from 20 on, and with three below."""
    return f"{value:,.1f}" if abs(value) >= 20 else f"{value:.3f}"


def interval_text(interval: list[float] | None) -> str:
    """An interval as the text after its value."""
    return "" if interval is None else f" [{number_text(interval[0])}, {number_text(interval[1])}]"
