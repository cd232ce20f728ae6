"""The figures of the report, each from plain results to one SVG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from . import svg
from .data import spread
from .results import Results, direction, interval_text, shown

_ROW = 20
_OCCUPATIONS = 18
_BINS = 20


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption.

    Attributes:
        caption: Above it.
        drawing: The `svg` element.
        note: Below it, may be empty.
    """

    caption: str
    drawing: Markup
    note: str = ""


def interval_bars(results: Results) -> list[Figure]:
    """For every measure the value of each entry with its interval."""
    return [_bars(results, measure, number) for number, measure in enumerate(results.measures)]


def _bars(results: Results, measure: dict[str, Any], number: int) -> Figure:
    cells = [(name, results.cell(name, measure["key"])) for name in results.names]
    values = [v for _, cell in cells if cell for v in (cell["value"], *(cell["interval"] or ()))]
    ideal = measure["ideal"]
    # An ideal far away would press all values together.
    near = ideal is not None and (
        measure["better"] != "lower" or min(map(abs, values)) < 2 * (max(values) - min(values))
    )
    scale = svg.Scale([*values, ideal] if near else values, 112, svg.WIDTH - 70)
    height = _ROW * len(cells) + 34
    body = [svg.line(scale(t), 6, scale(t), height - 26, "rule") for t in scale.ticks()]
    body += [svg.text(scale(t), height - 12, f"{t:g}", anchor="middle", style="small") for t in scale.ticks()]
    if near:
        body += [svg.line(scale(ideal), 2, scale(ideal), height - 26, "ideal")]
    for row, (name, cell) in enumerate(cells):
        y = 16 + _ROW * row
        body.append(svg.text(106, y + 4, svg.shortened(name, 14), anchor="end"))
        if cell is None:
            body.append(svg.text(scale.start, y + 4, "not measured", style="small"))
            continue
        if cell["interval"]:
            low, high = (scale(bound) for bound in cell["interval"])
            body += [svg.line(low, y, high, y, f"bar {svg.colour(row)}")]
            body += [svg.line(x, y - 4, x, y + 4, f"bar {svg.colour(row)}") for x in (low, high)]
        body += [svg.marker(scale(cell["value"]), y, row), svg.text(svg.WIDTH - 64, y + 4, shown(cell["value"]))]
    said = "; ".join(f"{n}: {shown(c['value'])}{interval_text(c['interval'])}" for n, c in cells if c)
    drawing = svg.document(height, body, key=f"bars{number}", title=measure["title"], description=said)
    return Figure(f"{measure['title']} {direction(measure)}", drawing, measure["says"])


def depth(results: Results) -> list[Figure]:
    """Linear leakage at every layer, a line an entry."""
    return [_depth(results, concept, entries) for concept, entries in results.depth.items()]


def _depth(results: Results, concept: str, entries: dict[str, list[dict[str, Any]]]) -> Figure:
    layers = [row["layer"] for row in next(iter(entries.values()))]
    height, left, right = 240, 40, svg.WIDTH - 104
    ends = [v for rows in entries.values() for row in rows for v in (row["leakage"], *row["intervals"]["leakage"])]
    y_of = svg.Scale([0.0, *ends], height - 52, 14)
    x_of = svg.Scale([0, max(1, len(layers) - 1)], left, right, margin=0.04)
    body = [svg.line(left, y_of(t), right, y_of(t), "rule") for t in y_of.ticks()]
    body += [svg.text(left - 5, y_of(t) + 4, f"{t:g}", anchor="end", style="small") for t in y_of.ticks()]
    body.append(svg.line(left, y_of(0), right, y_of(0), "ideal"))
    names = list(entries)
    labels = svg.apart([y_of(entries[name][-1]["leakage"]) for name in names], 13, 14, height - 52)
    for name, label in zip(names, labels, strict=True):
        series = results.names.index(name)
        places = [(x_of(i), y_of(row["leakage"])) for i, row in enumerate(entries[name])]
        for (x, _), row in zip(places, entries[name], strict=True):
            low, high = (y_of(bound) for bound in row["intervals"]["leakage"])
            body.append(svg.line(x, low, x, high, f"whisker {svg.colour(series)}"))
        body += [svg.path(places, series), *(svg.marker(x, y, series, size=3.6) for x, y in places)]
        body += [svg.line(places[-1][0] + 5, places[-1][1], right + 8, label, "lead")]
        body += [svg.marker(right + 13, label, series, size=3.6)]
        body += [svg.text(right + 20, label + 4, svg.shortened(name, 11))]
    for index, layer in enumerate(layers):
        short = "last" if layer == "last_hidden_state" else layer.removeprefix("layer ")
        if len(layers) <= 14 or index % (len(layers) // 7) == 0 or index == len(layers) - 1:
            body.append(svg.text(x_of(index), height - 34, short, anchor="middle", style="small"))
    body.append(svg.text((left + right) / 2, height - 18, "layer (0: the embeddings)", anchor="middle", style="small"))
    said = "; ".join(f"{n}: {', '.join(shown(row['leakage']) for row in rows)}" for n, rows in entries.items())
    title = f"Linear leakage of {_NAMES.get(concept, concept)} by depth"
    drawing = svg.document(height - 8, body, key=f"depth-{concept}", title=title, description=said)
    return Figure(title, drawing, "Accuracy of a linear probe minus that of the most frequent label (0, dashed).")


_NAMES = {"pos": "part of speech"}


def embeddings(results: Results) -> list[Figure]:
    """Biographies in a plane, a panel an entry, all with the same axes."""
    every = [point for points in results.embedding.values() for point in points]
    if not every:
        return []
    height = 268
    x_of = svg.Scale([point["x"] for point in every], 26, svg.WIDTH - 12)
    y_of = svg.Scale([point["y"] for point in every], height - 50, 12)
    kinds = sorted({point["label"] for point in every})
    found = []
    for number, (name, points) in enumerate(results.embedding.items()):
        body = [svg.line(26, height - 44, svg.WIDTH - 12, height - 44), svg.line(20, 12, 20, height - 50)]
        for point in points:
            series = kinds.index(point["label"])
            shape = "circle" if series == 0 else "cross"
            body.append(svg.marker(x_of(point["x"]), y_of(point["y"]), series + 1, size=3.2, shape=shape))
        for series, kind in enumerate(kinds):
            x = 34 + 100 * series
            body += [svg.marker(x, height - 10, series + 1, shape="circle" if series == 0 else "cross")]
            body += [svg.text(x + 9, height - 6, kind)]
        axis = svg.text(
            svg.WIDTH / 2, height - 30, "along the base's difference of means", anchor="middle", style="small"
        )
        means = {k: [p["x"] for p in points if p["label"] == k] for k in kinds}
        said = "; ".join(f"{k}: mean {sum(v) / len(v):.3f} along the difference" for k, v in means.items() if v)
        drawing = svg.document(
            height, [*body, axis], key=f"plane{number}", title=f"Biographies, {name}", description=said
        )
        found.append(Figure(name, drawing))
    return found


def shifts(results: Results) -> list[Figure]:
    """The share of "she" by occupation, a row an occupation, a mark an entry."""
    if not results.shifts:
        return []
    names = [name for name in results.names if name in results.shifts]
    first = results.shifts[names[0]]["occupations"]
    rows = spread(sorted(first, key=lambda row: -row["she"]), _OCCUPATIONS)
    shares = {n: {r["occupation"]: r["she"] for r in results.shifts[n]["occupations"]} for n in names}
    top = 16 + 15 * ((len(names) + 1) // 2)
    height = top + 15 * len(rows) + 40
    scale = svg.Scale([0, 1], 124, svg.WIDTH - 14, margin=0.02)
    body = [svg.line(scale(t), top - 6, scale(t), height - 36, "rule") for t in (0, 0.25, 0.75, 1)]
    body.append(svg.line(scale(0.5), top - 6, scale(0.5), height - 36, "ideal"))
    body += [svg.text(scale(t), height - 22, f"{t:.0%}", anchor="middle", style="small") for t in (0, 0.5, 1)]
    for number, name in enumerate(names):
        x, y, series = 14 + 172 * (number % 2), 10 + 15 * (number // 2), results.names.index(name)
        body += [svg.marker(x, y, series), svg.text(x + 9, y + 4, svg.shortened(name, 21))]
    for row, entry in enumerate(rows):
        y, job = top + 6 + 15 * row, entry["occupation"]
        places = [scale(shares[name][job]) for name in names]
        stereotype = "f" if entry["stereotype"] == "female" else "m"
        body += [svg.text(118, y + 4, f"{svg.shortened(job, 13)} ({stereotype})", anchor="end")]
        body += [svg.line(min(places), y, max(places), y, "lead")]
        body += [svg.marker(x, y, results.names.index(n), size=3.6) for x, n in zip(places, names, strict=True)]
    body.append(svg.text(scale(0.5), height - 8, "P(she) / (P(she) + P(he))", anchor="middle", style="small"))
    spreads = {n: sum(abs(v - 0.5) for v in by.values()) / len(by) for n, by in shares.items()}
    said = "; ".join(f"{name}: mean distance from one half {value:.3f}" for name, value in spreads.items())
    title = "Share of “she” after “The … said that”"
    drawing = svg.document(height, body, key="shifts", title=title, description=said)
    left_out = results.shifts[names[0]]["left_out"]
    note = f"{len(rows)} of {len(first)} occupations, ordered by the base; (f), (m): most who have it are women, men."
    return [Figure(title, drawing, note + (f" {left_out} unknown to the tokenizer." if left_out else ""))]


def neurons(results: Results) -> list[Figure]:
    """Histograms of the feature neuron, a row a class."""
    return [_neuron(name, found, number) for number, (name, found) in enumerate(results.neurons.items())]


def _neuron(name: str, found: dict[str, Any], number: int) -> Figure:
    groups = [(label, values) for label, values in found["values"].items() if values]
    limit = max(1.0, *(abs(v) for _, values in groups for v in values))
    scale = svg.Scale([-limit, limit], 66, svg.WIDTH - 12, margin=0.0)
    row, height = 56, 56 * len(groups) + 40
    body = []
    for index, (label, values) in enumerate(groups):
        base = 8 + row * (index + 1) - 6
        counts = [0] * _BINS
        for value in values:
            counts[min(_BINS - 1, int((value + limit) / (2 * limit) * _BINS))] += 1
        width = (scale.end - scale.start) / _BINS
        for place, count in enumerate(counts):
            if count:
                tall = 40 * count / max(counts)
                body.append(
                    f'<rect x="{scale.start + place * width:.1f}" y="{base - tall:.1f}" width="{width - 1:.1f}" '
                    f'height="{tall:.1f}" class="mark {svg.colour(index + 1)}"/>'
                )
        body += [
            svg.line(scale.start, base, scale.end, base),
            svg.text(60, base - 14, svg.shortened(label, 9), anchor="end"),
        ]
        body += [svg.text(60, base - 1, f"{len(values)} texts", anchor="end", style="small")]
    body += [svg.text(scale(t), height - 20, f"{t:g}", anchor="middle", style="small") for t in (-1, -0.5, 0, 0.5, 1)]
    body.append(svg.text(scale(0), height - 6, "value of the feature neuron", anchor="middle", style="small"))
    means = "; ".join(f"{label}: mean {sum(v) / len(v):.3f} of {len(v)} texts" for label, v in groups)
    title = f"Feature neuron of {name}"
    drawing = svg.document(height, body, key=f"neuron{number}", title=title, description=means)
    figures = [f"{key} {shown(found[key])}{interval_text(found['intervals'].get(key))}" for key in ("cor", "cor_enc")
               if isinstance(found.get(key), float)]  # fmt: skip
    return Figure(
        title, drawing, f"{found['pair'][0]} is +1, {found['pair'][1]} −1. Correlation: {', '.join(figures)}."
    )


def frontiers(results: Results) -> list[Figure]:
    """Bias against capability, a point an entry: down is less bias."""
    return [_frontier(results, panel, number) for number, panel in enumerate(results.frontiers())]


def _frontier(results: Results, panel: dict[str, Any], number: int) -> Figure:
    height, left, right = 230, 48, svg.WIDTH - 92
    points, paid, bias = panel["points"], panel["capability"], panel["bias"]
    x_of = svg.Scale([p["capability"] for p in points], left, right, margin=0.12)
    y_of = svg.Scale([0.0, *(p["bias"] for p in points)], height - 48, 12)
    body = [svg.line(left, y_of(t), right, y_of(t), "rule") for t in y_of.ticks()]
    body += [svg.text(left - 5, y_of(t) + 4, f"{t:g}", anchor="end", style="small") for t in y_of.ticks()]
    body += [svg.text(x_of(t), height - 32, f"{t:g}", anchor="middle", style="small") for t in x_of.ticks(3)]
    body.append(svg.line(left, y_of(0), right, y_of(0), "ideal"))
    labels = svg.apart([y_of(p["bias"]) for p in points], 13, 14, height - 48)
    for point, label in zip(points, labels, strict=True):
        series, x, y = results.names.index(point["name"]), x_of(point["capability"]), y_of(point["bias"])
        body += [svg.line(x, y, right + 8, label, "lead"), svg.marker(x, y, series)]
        body += [svg.text(right + 11, label + 4, svg.shortened(point["name"], 11))]
    words = f"{paid['title']} {direction(paid)}"
    body.append(svg.text((left + right) / 2, height - 16, words, anchor="middle", style="small"))
    said = "; ".join(f"{p['name']}: {shown(p['bias'])} at {shown(p['capability'])}" for p in points)
    title = f"{bias['title']}: distance from the ideal, against {paid['title']}"
    drawing = svg.document(height - 8, body, key=f"frontier{number}", title=title, description=said)
    return Figure(f"{bias['title']}, distance from the ideal ↓", drawing)
