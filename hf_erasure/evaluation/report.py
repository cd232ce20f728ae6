"""The report: one HTML file that needs no other file, for light and dark, wide and narrow screens.

Its pictures are drawn by matplotlib as SVG within the page, which gives them their colours. Series differ by marker and
by the dashes of their line, so colour is never needed to tell them apart. Without matplotlib the page has only tables.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from hf_erasure.adapters.common.config import number_of
from hf_erasure.adapters.common.files import write_text
from hf_erasure.fitting.report import figures
from hf_erasure.metrics.readers import spread
from hf_erasure.models.scorer import FINAL

from .results import LIMITS, REPORT_FILE, Results, direction, interval_text, number_text, reason_of

NO_PICTURES = "This report has no pictures, which need matplotlib: pip install 'hf-erasure[plot]'."
# Variable of the page, which has a colour for light and one for dark → the colour that matplotlib draws in its place.
_INK = {name: f"#abcd{i:02x}" for i, name in enumerate(["fg", "muted", "rule", *(f"s{k}" for k in range(7))])}
MARKERS = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "x", "plus": "+"}
_DASHES = ("-", (0, (4, 2)), (0, (1, 2)), (0, (5, 2, 1, 2)), (0, (7, 1)), (0, (1, 1)))
# Width of a picture and height of a row, in points that the page scales to its column.
WIDTH, _ROW = 360, 18
# The most occupations of a picture, and the bars of a histogram.
_OCCUPATIONS, _BINS = 18, 20
_STYLE: Any = {
    # Text stays text, and is never read as a formula.
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 10.5,
    "axes.labelsize": 10, "legend.fontsize": 10, "legend.frameon": False, "legend.handletextpad": 0.5,
    "xtick.labelsize": 10, "ytick.labelsize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.linewidth": 0.6,
    "text.color": _INK["fg"], "axes.labelcolor": _INK["muted"], "axes.edgecolor": _INK["muted"],
    "xtick.color": _INK["muted"], "ytick.color": _INK["muted"], "ytick.labelcolor": _INK["fg"],
    "grid.color": _INK["rule"], "lines.linewidth": 1.8, "lines.markeredgewidth": 1.4, "savefig.transparent": True,
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture, and the words around it."""

    figure: Any  # a figure of matplotlib
    title: str  # the name of the picture
    alt: str  # what the picture shows, for a screen reader
    caption: str = ""  # the text above it; the title if empty
    note: str = ""  # the text below it

    def svg(self, key: str) -> Markup:
        """The picture as an element of the page; all ids in it begin with the key."""
        from matplotlib import rc_context

        file = io.StringIO()
        with rc_context({"svg.hashsalt": key}), warnings.catch_warnings():
            # The browser has fonts for the characters that matplotlib's fonts lack.
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        head, _, body = file.getvalue().partition("<svg")[2].partition(">")
        body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        body = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{key}-", body)
        for name, colour in _INK.items():
            body = body.replace(colour, f"var(--{name})")
        box = re.search(r'viewBox="[^"]*"', head)
        label = escape(f"{self.title}. {self.alt}")
        return Markup(f'<svg {box and box[0]} role="img" aria-label="{label}">{body}')  # matplotlib escapes all text


def shortened(name: str, most: int) -> str:
    """A name of at most `most` characters; the middle is cut, because names differ at their ends."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


def _figure(height: float) -> Any:
    return figures.Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def _axes(height: float, ideal: float | None, axis: str) -> Any:
    """Axes in a new figure, with a line across at the ticks of an axis and a dashed line at the ideal."""
    axes = _figure(height).subplots()
    axes.grid(axis=axis)
    if ideal is not None:
        draw = axes.axvline if axis == "x" else axes.axhline
        draw(ideal, color=_INK["fg"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    return axes


def _series_style(number: int) -> dict[str, Any]:
    """The colour, marker and dashes of a series."""
    marker = list(MARKERS.values())[number % len(MARKERS)]
    return {"color": _INK[f"s{number % 7}"], "marker": marker, "linestyle": _DASHES[number % len(_DASHES)]}


def _with_legend(axes: Any) -> Any:
    """The figure of the axes, made higher for a legend with the names of all series below."""
    handles, names = axes.get_legend_handles_labels()
    figure = axes.get_figure()
    figure.set_figheight(figure.get_figheight() + _ROW * ((len(names) + 1) // 2) / 72)
    figure.legend(handles, [shortened(name, 20) for name in names], loc="outside lower center", ncols=2)
    return figure


def interval_bars(results: Results) -> Iterator[Picture]:
    """Draw for every measure the value of each entry with its interval."""
    for measure in results.measures:
        cells = [(name, results.cell(name, measure["key"])) for name in results.names]
        values = [v for _, cell in cells if cell for v in (cell["value"], *(cell["interval"] or ()))]
        # If a far ideal were drawn, all values would be close together.
        is_far = measure["better"] == "lower" and min(map(abs, values)) >= 2 * (max(values) - min(values))
        axes = _axes(_ROW * len(cells) + 34, None if is_far else measure["ideal"], "x")
        for row, (_, cell) in enumerate(cells):
            style = _series_style(row)
            if cell is not None:
                axes.plot(cell["value"], row, color=style["color"], marker=style["marker"])
            if cell is not None and cell["interval"]:
                axes.plot(cell["interval"], [row, row], color=style["color"], marker="|", markersize=8)
            beside = "not measured" if cell is None else number_text(cell["value"])
            axes.annotate(beside, (1, row), (6, 0), ("axes fraction", "data"), "offset points", va="center")
        axes.set_yticks(range(len(cells)), [shortened(name, 14) for name, _ in cells])
        axes.set_ylim(len(cells) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=5)
        alt = "; ".join(f"{n}: {number_text(c['value'])}{interval_text(c['interval'])}" for n, c in cells if c)
        title = measure["title"]
        yield Picture(axes.get_figure(), title, alt, f"{title} {direction(measure)}", measure["says"])


def depth(results: Results) -> Iterator[Picture]:
    """Linear leakage at every layer, a line for each entry."""
    for concept, entries in results.depth.items():
        axes = _axes(220, 0, "y")
        for name, rows in entries.items():
            style, places = _series_style(results.names.index(name)), range(len(rows))
            lows, highs = zip(*(row["intervals"]["leakage"] for row in rows), strict=True)
            axes.vlines(places, lows, highs, color=style["color"], linewidth=0.8, alpha=0.75)
            axes.plot(places, [row["leakage"] for row in rows], label=name, markersize=5, **style)
        layers = [row["layer"] for row in next(iter(entries.values()))]
        short = ["last" if layer == FINAL else layer.removeprefix("layer ") for layer in layers]
        ticks = range(0, len(layers), 1 if len(layers) <= 14 else len(layers) // 7)
        axes.set_xticks(ticks, [short[i] for i in ticks])
        axes.set_xlabel("layer (0: the embeddings)")
        alt = "; ".join(f"{n}: {', '.join(number_text(row['leakage']) for row in rows)}" for n, rows in entries.items())
        title = f"Linear leakage of {'part of speech' if concept == 'pos' else concept} by depth"
        note = "Accuracy of a linear probe minus that of the most frequent label (0, dashed)."
        yield Picture(_with_legend(axes), title, alt, note=note)


def embeddings(results: Results) -> Iterator[Picture]:
    """Biographies in a plane, a panel for each entry, all with the same axes."""
    all_points = [point for points in results.embedding.values() for point in points]
    kinds = sorted({point["label"] for point in all_points})
    for name, points in results.embedding.items() if all_points else ():
        axes, means = _figure(250).subplots(), []
        axes.update_datalim([(point["x"], point["y"]) for point in all_points])
        # Series 0 has the colour of the base.
        for series, kind in enumerate(kinds, 1):
            x, y = ([point[of] for point in points if point["label"] == kind] for of in ("x", "y"))
            style = {"color": _INK[f"s{series % 7}"], "marker": "x" if series > 1 else "o", "linestyle": ""}
            axes.plot(x, y, label=kind, markersize=4.5, **style)
            means += [f"{kind}: mean {sum(x) / len(x):.3f} along the difference"] if x else []
        axes.set(xticks=[], yticks=[], xlabel="along the base's difference of means")
        yield Picture(_with_legend(axes), f"Biographies, {name}", "; ".join(means), name)


def shifts(results: Results) -> Iterator[Picture]:
    """The share of "she" by occupation, a row for each occupation, a mark for each entry."""
    names = [name for name in results.names if name in results.shifts]
    if not names:
        return
    first = results.shifts[names[0]]["occupations"]
    rows = spread(sorted(first, key=lambda row: -row["she"]), _OCCUPATIONS)
    shares = {n: {r["occupation"]: r["she"] for r in results.shifts[n]["occupations"]} for n in names}
    axes, places = _axes(15 * len(rows) + 40, 0.5, "x"), range(len(rows))
    for place, row in enumerate(rows):
        found = [by[row["occupation"]] for by in shares.values()]
        axes.plot([min(found), max(found)], [place, place], color=_INK["muted"], linewidth=0.7)
    for name, by in shares.items():
        style = _series_style(results.names.index(name)) | {"linestyle": ""}
        axes.plot([by[row["occupation"]] for row in rows], places, label=name, markersize=5, **style)
    axes.set_yticks(places, [f"{shortened(row['occupation'], 13)} ({row['stereotype'][0]})" for row in rows])
    axes.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5), xlabel="P(she) / (P(she) + P(he))")
    spreads = {n: sum(abs(v - 0.5) for v in by.values()) / len(by) for n, by in shares.items()}
    alt = "; ".join(f"{name}: mean distance from one half {value:.3f}" for name, value in spreads.items())
    note = f"{len(rows)} of {len(first)} occupations, ordered by the base; (f), (m): most who have it are women, men."
    if left_out := results.shifts[names[0]]["left_out"]:
        note += f" {left_out} unknown to the tokenizer."
    yield Picture(_with_legend(axes), "Share of “she” after “The … said that”", alt, note=note)


def neurons(results: Results) -> Iterator[Picture]:
    """Histograms of the feature neuron, a row for each class, each as high as its highest bar."""
    for name, found in results.neurons.items():
        groups = [(label, values) for label, values in found["values"].items() if values]
        limit = max(1.0, *(abs(v) for _, values in groups for v in values))
        figure = _figure(56 * len(groups) + 40)
        panels = figure.subplots(len(groups), sharex=True, squeeze=False)[:, 0]
        for index, (panel, (label, values)) in enumerate(zip(panels, groups, strict=True), 1):
            panel.hist(values, bins=_BINS, range=(-limit, limit), color=_INK[f"s{index % 7}"], rwidth=0.9)
            panel.set_yticks([max(panel.get_ylim()) / 2], [f"{shortened(label, 12)}\n{number_of(len(values), 'text')}"])
            panel.tick_params("y", length=0)
        panels[-1].set(xticks=[-1, -0.5, 0, 0.5, 1], xlabel="value of the feature neuron")
        alt = "; ".join(f"{label}: mean {sum(v) / len(v):.3f} of {number_of(len(v), 'text')}" for label, v in groups)
        figures = [f"{key} {number_text(found[key])}{interval_text(found['intervals'].get(key))}"
                   for key in ("cor", "cor_enc") if isinstance(found.get(key), float)]  # fmt: skip
        note = f"{found['pair'][0]} is +1, {found['pair'][1]} −1. Correlation: {', '.join(figures)}."
        yield Picture(figure, f"Feature neuron of {name}", alt, note=note)


def frontiers(results: Results) -> Iterator[Picture]:
    """Bias against capability, a point for each entry: lower points have less bias."""
    for panel in results.frontiers():
        points, cost, bias = panel["points"], panel["capability"], panel["bias"]
        axes = _axes(200, 0, "y")
        for point in points:
            style = _series_style(results.names.index(point["name"])) | {"linestyle": ""}
            axes.plot(point["capability"], point["bias"], label=point["name"], **style)
        axes.margins(x=0.12)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(f"{cost['title']} {direction(cost)}")
        alt = "; ".join(f"{p['name']}: {number_text(p['bias'])} at {number_text(p['capability'])}" for p in points)
        title = f"{bias['title']}: distance from the ideal, against {cost['title']}"
        yield Picture(_with_legend(axes), title, alt, f"{bias['title']}, distance from the ideal ↓")


def write(results: Results, folder: str | Path) -> tuple[Path, Path]:
    """Write the results as JSON and the report as HTML into a folder; returns both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data, page = results.save(folder), folder / REPORT_FILE
    write_text(page, html_page(results))
    return data, page


def html_page(results: Results) -> str:
    """The report as HTML; it loads no other file."""
    environment = Environment(
        loader=PackageLoader("hf_erasure.evaluation"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    names = list(MARKERS)
    has_pictures = find_spec("matplotlib") is not None
    return environment.get_template("report.html.j2").render(
        results=results, sections=_sections(results) if has_pictures else [], tables=results.tables(), limits=LIMITS,
        marks=[names[i % len(names)] for i in range(len(results.names))],
        no_pictures="" if has_pictures else NO_PICTURES,
    )  # fmt: skip


def _sections(results: Results) -> list[dict[str, Any]]:
    """The pictures under their headings; a heading without a picture is left out, and "Not measured" has the reason."""
    from matplotlib import rc_context

    sections: list[tuple[str, str, str, Callable[[Results], Iterator[Picture]]]] = [
        ("frontier", "Bias against capability", "Bias and its cost, a point for each entry. The best points are low, "
         "and in the direction of the arrow under the axis.", frontiers),
        ("depth", "Leakage by depth", "What a linear probe reads at each layer, from states that it was not fitted on.",
         depth),
        ("embeddings", "Biographies before and after", "Last hidden states in one fixed plane: along the difference of "
         "the genders' means in the base, and along the largest variance across it. The plane comes from other "
         "biographies than those drawn. A cloud that looks mixed here may still be separable in the other dimensions.",
         embeddings),
        ("shifts", "Probability shifts", "Which word the model prefers next.", shifts),
        ("neuron", "The feature neuron", "What a GRADIEND adapter reads from the gradients of single texts, relative "
         "to the highest bar of each row.", neurons),
        ("bars", "Every measure with its interval", "The dashed line is the ideal, if it is near.", interval_bars),
    ]  # fmt: skip
    found = []
    for key, title, about, draw in sections:
        drawn: list[dict[str, Any]] = []
        failed = ""
        try:
            with rc_context(_STYLE):
                for number, picture in enumerate(draw(results)):
                    words = {"caption": picture.caption or picture.title, "note": picture.note}
                    drawn.append(words | {"drawing": picture.svg(f"{key}{number}")})
        except Exception as error:  # the other pictures are still drawn
            drawn, failed = [], f"This could not be drawn: {reason_of(error)}."
        if drawn or failed:
            found.append({"key": key, "title": title, "text": failed or about, "figures": drawn})
    return found
