"""A small set of marks for figures in SVG, coloured by the variables of the page that holds them.

Text is 11 units and a figure 360 wide, so that it can be read on a telephone; wider columns enlarge it. Series differ
by marker and by the dashes of their line, so colour is never needed to tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH = 360
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "10 2", "1 2")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus")
_SIZE = 4.2


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


def document(height: float, body: Sequence[str], *, key: str, title: str, description: str) -> Markup:
    """An `svg` element that a screen reader announces with a title and what is to be seen."""
    head = f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(description)}</desc>'
    return Markup(  # all text went through `escape`
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{key}-t {key}-d" '
        f'preserveAspectRatio="xMidYMid meet">{head}{"".join(body)}</svg>'
    )


def text(x: float, y: float, words: object, *, anchor: str = "start", style: str = "") -> str:
    """Words at a place."""
    extra = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(str(words))}</text>'


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
