"""The report: one HTML file with everything in it, for light and dark, wide and narrow.

Its figures are made of marks in SVG, which the variables of the page colour. Text is 11 units and a figure 360 wide, so
that it can be read on a telephone; wider columns enlarge it. Series differ by marker and by the dashes of their line,
so colour is never needed to tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from hf_erasure.adapters.common.files import write_text
from hf_erasure.metrics.readers import spread

from .results import LIMITS, REPORT_FILE, Results, direction, interval_text, reason_of, shown

# Width of a picture, in units of SVG that the page scales to its column; sizes below are in the same units.
WIDTH = 360
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus")
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "10 2", "1 2")
# Half the width of a marker that stands alone, and of one among many.
_SIZE, _SMALLER = 4.2, 3.6
# Height of a row.
_ROW = 20
# Occupations that fit into a picture, and bars of a histogram.
_OCCUPATIONS, _BINS = 18, 20

# ---- marks -----------------------------------------------------------------------------------------------------------


class Scale:
    """Numbers to places, with a margin and round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, margin: float = 0.06) -> None:
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        room = (high - low) * margin or max(abs(high), 1.0) * 0.1
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def __call__(self, value: float) -> float:
        """The place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """Round numbers within."""
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
        first = math.ceil(self.low / step)
        return [round(k * step, 10) for k in range(first, math.floor(self.high / step) + 1)]


def text(x: float, y: float, words: object, *, anchor: str = "start", style: str = "") -> str:
    """Words at a place."""
    extra = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(str(words))}</text>'


def centred(x: float, y: float, words: object) -> str:
    """Small words around a place, as under an axis."""
    return text(x, y, words, anchor="middle", style="small")


def line(x1: float, y1: float, x2: float, y2: float, style: str = "axis") -> str:
    """A line from one place to another."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def path(points: Sequence[tuple[float, float]], series: int) -> str:
    """A line through places, with the dashes of a series."""
    dashes = _DASHES[series % len(_DASHES)]
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" class="line {colour(series)}"{pattern}/>'


def colour(series: int) -> str:
    """The style class of a series."""
    return f"s{series % 7}"


def marker(x: float, y: float, series: int, *, size: float = _SIZE, shape: str | None = None) -> str:
    """The mark of a series; those of later series are other shapes."""
    kind = shape or MARKERS[series % len(MARKERS)]
    style = f"mark {colour(series)}"
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" class="{style}"/>'
    if kind in ("cross", "plus"):
        d = size * (0.8 if kind == "cross" else 1.1)
        ends = [(-d, -d, d, d), (-d, d, d, -d)] if kind == "cross" else [(-d, 0, d, 0), (0, -d, 0, d)]
        strokes = " ".join(f"M{x + a:.1f} {y + b:.1f}L{x + c:.1f} {y + e:.1f}" for a, b, c, e in ends)
        return f'<path d="{strokes}" class="stroke {colour(series)}"/>'
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
    }[kind]
    places = " ".join(f"{x + a * size:.1f},{y + b * size:.1f}" for a, b in corners)
    return f'<polygon points="{places}" class="{style}"/>'


def grid(scale: Scale, left: float, right: float) -> list[str]:
    """A line across at every tick of a vertical scale with its number, and the dashed one of 0."""
    ticks = scale.ticks()
    body = [line(left, scale(t), right, scale(t), "rule") for t in ticks]
    body += [text(left - 5, scale(t) + 4, f"{t:g}", anchor="end", style="small") for t in ticks]
    return [*body, line(left, scale(0), right, scale(0), "ideal")]


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels near those wanted, none nearer to another than the gap, as far as there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = list(places)
    for before, after in zip([-1, *order], order, strict=False):
        floor = low if before < 0 else found[before] + gap
        found[after] = max(found[after], floor)
    ceiling = high
    for index in reversed(order):
        found[index] = min(found[index], ceiling)
        ceiling = found[index] - gap
    return found


def shortened(name: str, most: int = 18) -> str:
    """A name of at most so many characters; the middle goes, since names differ at their ends."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


# ---- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A drawing (an `svg` element) with a caption above it and perhaps a note below it."""

    caption: str
    drawing: Markup
    note: str = ""

    @classmethod
    def of(
        cls, height: float, body: Sequence[str], *, key: str, title: str, said: str, caption: str = "", note: str = ""
    ) -> Figure:
        """Marks in an `svg` element that a screen reader announces with the title and what is to be seen (`said`)."""
        head = f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(said)}</desc>'
        drawing = Markup(  # all text went through `escape`
            f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{key}-t {key}-d" '
            f'preserveAspectRatio="xMidYMid meet">{head}{"".join(body)}</svg>'
        )
        return cls(caption or title, drawing, note)


def interval_bars(results: Results) -> Iterator[Figure]:
    """For every measure the value of each entry with its interval."""
    for number, measure in enumerate(results.measures):
        cells = [(name, results.cell(name, measure["key"])) for name in results.names]
        values = [v for _, cell in cells if cell for v in (cell["value"], *(cell["interval"] or ()))]
        ideal = measure["ideal"]
        # An ideal far away would press all values together.
        near = ideal is not None and (
            measure["better"] != "lower" or min(map(abs, values)) < 2 * (max(values) - min(values))
        )
        scale = Scale([*values, ideal] if near else values, 112, WIDTH - 70)
        height = _ROW * len(cells) + 34
        body = [line(scale(t), 6, scale(t), height - 26, "rule") for t in scale.ticks()]
        body += [centred(scale(t), height - 12, f"{t:g}") for t in scale.ticks()]
        if near:
            body += [line(scale(ideal), 2, scale(ideal), height - 26, "ideal")]
        for row, (name, cell) in enumerate(cells):
            y = 16 + _ROW * row
            body.append(text(106, y + 4, shortened(name, 14), anchor="end"))
            if cell is None:
                body.append(text(scale.start, y + 4, "not measured", style="small"))
                continue
            if cell["interval"]:
                low, high = (scale(bound) for bound in cell["interval"])
                body += [line(low, y, high, y, f"bar {colour(row)}")]
                body += [line(x, y - 4, x, y + 4, f"bar {colour(row)}") for x in (low, high)]
            body += [marker(scale(cell["value"]), y, row), text(WIDTH - 64, y + 4, shown(cell["value"]))]
        said = "; ".join(f"{n}: {shown(c['value'])}{interval_text(c['interval'])}" for n, c in cells if c)
        title = measure["title"]
        caption = f"{title} {direction(measure)}"
        yield Figure.of(
            height, body, key=f"bars{number}", title=title, said=said, caption=caption, note=measure["says"]
        )


def depth(results: Results) -> Iterator[Figure]:
    """Linear leakage at every layer, a line an entry."""
    height, left, right = 240, 40, WIDTH - 104
    for concept, entries in results.depth.items():
        layers = [row["layer"] for row in next(iter(entries.values()))]
        ends = [v for rows in entries.values() for row in rows for v in (row["leakage"], *row["intervals"]["leakage"])]
        y_of = Scale([0.0, *ends], height - 52, 14)
        x_of = Scale([0, max(1, len(layers) - 1)], left, right, margin=0.04)
        body = grid(y_of, left, right)
        labels = apart([y_of(rows[-1]["leakage"]) for rows in entries.values()], 13, 14, height - 52)
        for (name, rows), label in zip(entries.items(), labels, strict=True):
            series = results.names.index(name)
            places = [(x_of(i), y_of(row["leakage"])) for i, row in enumerate(rows)]
            for (x, _), row in zip(places, rows, strict=True):
                low, high = (y_of(bound) for bound in row["intervals"]["leakage"])
                body.append(line(x, low, x, high, f"whisker {colour(series)}"))
            body += [path(places, series), *(marker(x, y, series, size=_SMALLER) for x, y in places)]
            body += [line(places[-1][0] + 5, places[-1][1], right + 8, label, "lead")]
            body += [marker(right + 13, label, series, size=_SMALLER)]
            body += [text(right + 20, label + 4, shortened(name, 11))]
        for index, layer in enumerate(layers):
            short = "last" if layer == "last_hidden_state" else layer.removeprefix("layer ")
            if len(layers) <= 14 or index % (len(layers) // 7) == 0 or index == len(layers) - 1:
                body.append(centred(x_of(index), height - 34, short))
        body.append(centred((left + right) / 2, height - 18, "layer (0: the embeddings)"))
        said = "; ".join(f"{n}: {', '.join(shown(row['leakage']) for row in rows)}" for n, rows in entries.items())
        title = f"Linear leakage of {'part of speech' if concept == 'pos' else concept} by depth"
        note = "Accuracy of a linear probe minus that of the most frequent label (0, dashed)."
        yield Figure.of(height - 8, body, key=f"depth-{concept}", title=title, said=said, note=note)


def embeddings(results: Results) -> Iterator[Figure]:
    """Biographies in a plane, a panel an entry, all with the same axes."""
    height, every = 268, [point for points in results.embedding.values() for point in points]
    x_of = Scale([point["x"] for point in every], 26, WIDTH - 12)
    y_of = Scale([point["y"] for point in every], height - 50, 12)
    kinds = sorted({point["label"] for point in every})
    # Series 0 has the colour of the base.
    marks = {kind: (series, "cross" if series > 1 else "circle") for series, kind in enumerate(kinds, 1)}
    for number, (name, points) in enumerate(results.embedding.items() if every else ()):
        body = [line(26, height - 44, WIDTH - 12, height - 44), line(20, 12, 20, height - 50)]
        for point in points:
            series, shape = marks[point["label"]]
            body.append(marker(x_of(point["x"]), y_of(point["y"]), series, size=3.2, shape=shape))
        for kind, (series, shape) in marks.items():
            x = 34 + 100 * (series - 1)
            body += [marker(x, height - 10, series, shape=shape), text(x + 9, height - 6, kind)]
        body.append(centred(WIDTH / 2, height - 30, "along the base's difference of means"))
        means = {k: [p["x"] for p in points if p["label"] == k] for k in kinds}
        said = "; ".join(f"{k}: mean {sum(v) / len(v):.3f} along the difference" for k, v in means.items() if v)
        yield Figure.of(height, body, key=f"plane{number}", title=f"Biographies, {name}", said=said, caption=name)


def shifts(results: Results) -> Iterator[Figure]:
    """The share of "she" by occupation, a row an occupation, a mark an entry."""
    names = [name for name in results.names if name in results.shifts]
    if not names:
        return
    first = results.shifts[names[0]]["occupations"]
    rows = spread(sorted(first, key=lambda row: -row["she"]), _OCCUPATIONS)
    shares = {n: {r["occupation"]: r["she"] for r in results.shifts[n]["occupations"]} for n in names}
    top = 16 + 15 * ((len(names) + 1) // 2)
    height = top + 15 * len(rows) + 40
    scale = Scale([0, 1], 124, WIDTH - 14, margin=0.02)
    body = [line(scale(t), top - 6, scale(t), height - 36, "rule") for t in (0, 0.25, 0.75, 1)]
    body.append(line(scale(0.5), top - 6, scale(0.5), height - 36, "ideal"))
    body += [centred(scale(t), height - 22, f"{t:.0%}") for t in (0, 0.5, 1)]
    for number, name in enumerate(names):
        x, y = 14 + 172 * (number % 2), 10 + 15 * (number // 2)
        body += [marker(x, y, results.names.index(name)), text(x + 9, y + 4, shortened(name, 21))]
    for row, entry in enumerate(rows):
        y, job = top + 6 + 15 * row, entry["occupation"]
        places = [scale(shares[name][job]) for name in names]
        stereotype = "f" if entry["stereotype"] == "female" else "m"
        body += [text(118, y + 4, f"{shortened(job, 13)} ({stereotype})", anchor="end")]
        body += [line(min(places), y, max(places), y, "lead")]
        body += [marker(x, y, results.names.index(n), size=_SMALLER) for x, n in zip(places, names, strict=True)]
    body.append(centred(scale(0.5), height - 8, "P(she) / (P(she) + P(he))"))
    spreads = {n: sum(abs(v - 0.5) for v in by.values()) / len(by) for n, by in shares.items()}
    said = "; ".join(f"{name}: mean distance from one half {value:.3f}" for name, value in spreads.items())
    title = "Share of “she” after “The … said that”"
    note = f"{len(rows)} of {len(first)} occupations, ordered by the base; (f), (m): most who have it are women, men."
    if left_out := results.shifts[names[0]]["left_out"]:
        note += f" {left_out} unknown to the tokenizer."
    yield Figure.of(height, body, key="shifts", title=title, said=said, note=note)


def neurons(results: Results) -> Iterator[Figure]:
    """Histograms of the feature neuron, a row a class."""
    for number, (name, found) in enumerate(results.neurons.items()):
        groups = [(label, values) for label, values in found["values"].items() if values]
        limit = max(1.0, *(abs(v) for _, values in groups for v in values))
        scale = Scale([-limit, limit], 66, WIDTH - 12, margin=0.0)
        width, height = (scale.end - scale.start) / _BINS, 56 * len(groups) + 40
        body = []
        for index, (label, values) in enumerate(groups):
            base = 56 * (index + 1) + 2
            counts = [0] * _BINS
            for value in values:
                counts[min(_BINS - 1, int((value + limit) / (2 * limit) * _BINS))] += 1
            for place, count in enumerate(counts):
                if count:
                    tall = 40 * count / max(counts)
                    body.append(
                        f'<rect x="{scale.start + place * width:.1f}" y="{base - tall:.1f}" width="{width - 1:.1f}" '
                        f'height="{tall:.1f}" class="mark {colour(index + 1)}"/>'
                    )
            body.append(line(scale.start, base, scale.end, base))
            body.append(text(60, base - 14, shortened(label, 9), anchor="end"))
            body.append(text(60, base - 1, f"{len(values)} texts", anchor="end", style="small"))
        body += [centred(scale(t), height - 20, f"{t:g}") for t in (-1, -0.5, 0, 0.5, 1)]
        body.append(centred(scale(0), height - 6, "value of the feature neuron"))
        said = "; ".join(f"{label}: mean {sum(v) / len(v):.3f} of {len(v)} texts" for label, v in groups)
        figures = [f"{key} {shown(found[key])}{interval_text(found['intervals'].get(key))}"
                   for key in ("cor", "cor_enc") if isinstance(found.get(key), float)]  # fmt: skip
        note = f"{found['pair'][0]} is +1, {found['pair'][1]} −1. Correlation: {', '.join(figures)}."
        yield Figure.of(height, body, key=f"neuron{number}", title=f"Feature neuron of {name}", said=said, note=note)


def frontiers(results: Results) -> Iterator[Figure]:
    """Bias against capability, a point an entry: down is less bias."""
    height, left, right = 230, 48, WIDTH - 92
    for number, panel in enumerate(results.frontiers()):
        points, paid, bias = panel["points"], panel["capability"], panel["bias"]
        x_of = Scale([p["capability"] for p in points], left, right, margin=0.12)
        y_of = Scale([0.0, *(p["bias"] for p in points)], height - 48, 12)
        body = grid(y_of, left, right)
        body += [centred(x_of(t), height - 32, f"{t:g}") for t in x_of.ticks(3)]
        labels = apart([y_of(p["bias"]) for p in points], 13, 14, height - 48)
        for point, label in zip(points, labels, strict=True):
            series, x, y = results.names.index(point["name"]), x_of(point["capability"]), y_of(point["bias"])
            body += [line(x, y, right + 8, label, "lead"), marker(x, y, series)]
            body += [text(right + 11, label + 4, shortened(point["name"], 11))]
        body.append(centred((left + right) / 2, height - 16, f"{paid['title']} {direction(paid)}"))
        said = "; ".join(f"{p['name']}: {shown(p['bias'])} at {shown(p['capability'])}" for p in points)
        title = f"{bias['title']}: distance from the ideal, against {paid['title']}"
        caption = f"{bias['title']}, distance from the ideal ↓"
        yield Figure.of(height - 8, body, key=f"frontier{number}", title=title, said=said, caption=caption)


# ---- the page --------------------------------------------------------------------------------------------------------


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
    marks = [MARKERS[i % len(MARKERS)] for i in range(len(results.names))]
    return environment.get_template("report.html.j2").render(
        results=results, sections=_sections(results), tables=results.tables(), limits=LIMITS, marks=marks,
        numbers=_numbers(results), pools=results.pooling(),
    )  # fmt: skip


def _sections(results: Results) -> list[dict[str, Any]]:
    """The figures under their headings; those without a figure are left out, and say why under "Not measured"."""
    sections: list[tuple[str, str, str, Callable[[Results], Iterator[Figure]]]] = [
        ("frontier", "Bias against capability", "What was gained and what was paid, a point for each entry. Best is "
         "low, and where the arrow under the axis points.", frontiers),
        ("depth", "Leakage by depth", "What a linear probe reads at each layer from states it was not fitted on.",
         depth),
        ("embeddings", "Biographies before and after", "Last hidden states in one fixed plane: along the difference of "
         "the genders' means in the base, and along what varies most across it. The plane comes from other biographies "
         "than those drawn. A cloud that looks mixed here may still be separable in the other dimensions.",
         embeddings),
        ("shifts", "Probability shifts", "What the model would rather say next.", shifts),
        ("neuron", "The feature neuron", "What a GRADIEND adapter reads off the gradients of single texts, relative to "
         "the highest bar of each row.", neurons),
        ("bars", "Every measure with its interval", "The dashed line is the ideal, where it is near.", interval_bars),
    ]  # fmt: skip
    found = []
    for key, title, about, draw in sections:
        drawn: list[Figure] = []
        failed = ""
        try:
            drawn = list(draw(results))
        except Exception as error:  # one picture's failure is not the report's
            failed = f"This could not be drawn: {reason_of(error)}."
        if drawn or failed:
            found.append({"key": key, "title": title, "text": failed or about, "figures": drawn})
    return found


def _numbers(results: Results) -> list[dict[str, Any]]:
    """What is drawn beside the measures, as tables for who cannot see the drawing."""
    found = []
    for concept, entries in results.depth.items():
        layers = zip(*entries.values(), strict=True)
        rows = [[layer[0]["layer"], *[shown(row["leakage"]) for row in layer]] for layer in layers]
        found.append({"title": f"Leakage of {concept} by depth", "head": ["layer", *entries], "rows": rows})
    if results.shifts:
        jobs = [row["occupation"] for row in next(iter(results.shifts.values()))["occupations"]]
        shares = [{r["occupation"]: r["she"] for r in part["occupations"]} for part in results.shifts.values()]
        rows = [[job, *[f"{share[job]:.1%}" for share in shares]] for job in jobs]
        found.append({"title": "Share of “she”", "head": ["occupation", *results.shifts], "rows": rows})
    return found
