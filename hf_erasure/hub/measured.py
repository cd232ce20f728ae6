"""What was measured of an adapter, as rows of before and after: at fitting, by a recipe, and by `hf-erasure evaluate`.

Everything read here lies in files that a stranger may have written, so what is no number is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .markdown import is_number, plain

EVALUATION_FORMAT = 1
BASE = "base"
FINAL = "last_hidden_state"
_TEST = "the recipe's test split"
# Of GRADIEND's tables: what a column is, and which way is better.
_GRADIEND = {"lms": ("language modelling, score", "higher"), "loss": ("language modelling, loss", "lower")}
_GOALS = ("balance", "bpi", "fpi", "mpi")


@dataclass(frozen=True)
class Measured:
    """A number of the model without the adapter and with it.

    Attributes:
        key: What it is, in one word, as in the metadata of cards.
        title: What it is.
        before: Without the adapter; None where only the adapter was measured.
        after: With it.
        better: `"lower"`, `"higher"`, `"closer to …"`, or nothing where neither is.
        data: What it was measured on.
        before_interval: 95 % of a bootstrap, where there is one.
        after_interval: The same with the adapter.
    """

    key: str
    title: str
    before: float | None
    after: float
    better: str
    data: str
    before_interval: list[float] | None = None
    after_interval: list[float] | None = None


# ---- at fitting ------------------------------------------------------------------------------------------------------


def leakage_of(provenance: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Site → correlation with the concept before and after; the last hidden states come after the sites."""
    kept = provenance.get("leakage")
    pairs = kept.items() if isinstance(kept, dict) else ()
    found = {
        plain(site): (float(pair[0]), float(pair[1]))
        for site, pair in pairs
        if isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(is_number, pair))
    }
    return {s: p for s, p in found.items() if FINAL not in s} | {s: p for s, p in found.items() if FINAL in s}


def at_fitting(concept: str, leakage: dict[str, tuple[float, float]]) -> list[Measured]:
    """The last hidden states, and of the sites the one that leaks most."""
    finals = [site for site in leakage if FINAL in site]
    sites = [site for site in leakage if FINAL not in site]
    worst = max(sites, key=lambda site: leakage[site][1], default=None)
    shown = [(site, site) for site in finals]
    if worst is not None:
        shown.append((worst, f"the site that leaks most, {worst}"))
    data = "held-out examples, when it was fitted"
    return [
        Measured("linear_leakage", f"correlation with {concept}: {name}", *leakage[site], "lower", data)
        for site, name in shown
    ]


def of_selection(provenance: dict[str, Any]) -> list[Measured]:
    """What the chosen edit of a GRADIEND adapter does to the data it was chosen on."""
    selection = provenance.get("selection")
    if not isinstance(selection, dict):
        return []
    base, best = selection.get("base"), selection.get("best")
    if not isinstance(base, dict) or not isinstance(best, dict):
        return []
    return _edit_rows(_flat(base), _flat(best), selection.get("goal"), "the data that the edit was chosen on")


def _flat(point: dict[str, Any]) -> dict[str, Any]:
    shares, goals = point.get("probabilities"), point.get("goals")
    named = {f"P({name})": value for name, value in shares.items()} if isinstance(shares, dict) else {}
    return named | (goals if isinstance(goals, dict) else {}) | {name: point.get(name) for name in _GRADIEND}


def _edit_rows(base: dict[str, Any], edited: dict[str, Any], goal: Any, data: str) -> list[Measured]:
    rows = []
    for name, before in base.items():
        after = edited.get(name)
        if not (is_number(before) and is_number(after)):
            continue
        if name in _GRADIEND:
            title, better = _GRADIEND[name]
            rows.append(Measured(name, title, before, after, better, data))
        elif str(name).startswith("P("):
            rows.append(Measured("class_probability", f"mean probability {plain(name)}", before, after, "", data))
        elif name in _GOALS or name == goal:
            chosen = ", which the edit was chosen for" if name == goal else ""
            title = str(name).upper() if name in _GOALS[1:] else f"score of {plain(name)!r}"
            rows.append(Measured(plain(name), f"{title}{chosen}", before, after, "higher", data))
    return rows


# ---- by a recipe -----------------------------------------------------------------------------------------------------


def of_recipe(folder: Path, recipe: dict[str, Any]) -> list[Measured]:
    """The last line of an erasure's probe table, or the saved edit of a GRADIEND; nothing where no recipe ran."""
    results = read_json(folder / "results.json")
    if not recipe or not results:
        return []
    if isinstance(results.get("edits"), dict):
        return _of_gradiend_recipe(results)
    data = recipe["data"] if isinstance(recipe.get("data"), dict) else {}
    last = list(results)[-1]
    row = results[last] if isinstance(results[last], dict) else {}
    rows = []
    for column, better in ((data.get("label_column"), "lower"), (data.get("keep_column"), "higher")):
        before, after = row.get(f"{column} before"), row.get(f"{column} after")
        if not (is_number(before) and is_number(after)):
            continue
        majority = row.get(f"{column} majority")
        constant = f" (always the majority: {majority:.3f})" if is_number(majority) else ""
        title = f"accuracy of a linear probe for {plain(column)}, {plain(last)}{constant}"
        rows.append(Measured("probe_accuracy", title, before, after, better, _TEST))
        refitted = row.get(f"{column} refitted")
        if is_number(refitted):
            title = (
                f"the same of a probe fitted on one half of the erased test split, judged on the other: {plain(column)}"
            )
            rows.append(Measured("refitted_probe_accuracy", title, None, refitted, "lower", _TEST))
    return rows


def _of_gradiend_recipe(results: dict[str, Any]) -> list[Measured]:
    edits = results["edits"]
    base, saved = edits.get("none"), edits.get(results.get("saved"))
    if not (isinstance(base, dict) and isinstance(saved, dict)):
        return []
    return _edit_rows(base, saved, results.get("saved"), _TEST)


# ---- by `hf-erasure evaluate` ----------------------------------------------------------------------------------------


def of_evaluation(path: str | Path, names: Iterable[str], described: str) -> list[Measured]:
    """The rows of an adapter in what `hf-erasure evaluate` wrote.

    Args:
        path: `results.json`, or the folder with it.
        names: What the adapter may be called there, the likeliest first.
        described: What kind of adapter it is, as in the results.

    Raises:
        ValueError: If the file is no such results, or it cannot be told which of its adapters is meant.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    content = read_json(path)
    if content.get("format") != EVALUATION_FORMAT or not isinstance(content.get("values"), dict):
        raise ValueError(f"{path} holds no results that this version reads: run `hf-erasure evaluate` again.")
    name = _entry(content, list(names), described, path)
    values, about = content["values"], content.get("about", {})
    data = f"hf-erasure evaluate, suite {plain(about.get('suite'))}"
    limit = about.get("limit")
    data += f", at most {limit} items a data set" if is_number(limit) else ""
    rows = []
    for measure in content.get("measures", []):
        before, after = (values.get(entry, {}).get(measure.get("key")) for entry in (BASE, name))
        if not before or not after or not is_number(before.get("value")) or not is_number(after.get("value")):
            continue
        better = measure.get("better")
        better = f"closer to {measure.get('ideal'):g}" if better == "closer" else plain(better)
        rows.append(Measured(
            plain(measure["key"]), plain(measure.get("title")), before["value"], after["value"], better, data,
            _interval(before), _interval(after),
        ))  # fmt: skip
    return rows


def _entry(content: dict[str, Any], names: list[str], described: str, path: Path) -> str:
    """The column of the adapter: of its kind the one of that name, or else the only one."""
    alone = [e for e in content.get("entries", []) if len(e["adapters"]) == 1 and e.get("strength", 1) == 1]
    same = [str(entry["name"]) for entry in alone if entry.get("kind") == described]
    named = [name for name in names if name in same]
    if named or len(same) == 1:
        return named[0] if named else same[0]
    raise ValueError(
        f"{path} has the adapters {[(entry['name'], entry.get('kind')) for entry in alone]}, and which of them this "
        f"{described} is cannot be told: give its folder the name that it has there, or evaluate it alone."
    )


def _interval(cell: dict[str, Any]) -> list[float] | None:
    bounds = cell.get("interval")
    if not isinstance(bounds, list) or len(bounds) != 2:
        return None
    low, high = bounds
    return [float(low), float(high)] if is_number(low) and is_number(high) else None


# ---- files -----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty where there is no file, or no object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def kept_rows(rows: Any) -> list[Measured]:
    """Rows that were kept in an adapter's configuration."""
    found = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and is_number(row.get("before")) and is_number(row.get("after")):
            key, title, better, data = (plain(row.get(name, "")) for name in ("key", "title", "better", "data"))
            before, after = (_interval({"interval": row.get(n)}) for n in ("before_interval", "after_interval"))
            found.append(Measured(key, title, row["before"], row["after"], better, data, before, after))
    return found
