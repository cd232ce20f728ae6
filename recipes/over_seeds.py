"""How the studies report several seeds: the mean with a t-interval, and a Markdown table of such cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

CONFIDENCE = 0.95


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean, and the ends of its t-interval over seeds.

    The seeds of a study draw from the same data and share the model. So the interval says how much another seed would
    change the mean, not how much other data would.

    Raises:
        ValueError: If there are fewer than two values.
    """
    from scipy.stats import t

    if len(values) < 2:
        raise ValueError("An interval over seeds needs at least two seeds: write seeds=[0,1,2].")
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return mean, mean - half, mean + half


def cell(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and interval, as in `0.80 [0.75, 0.84]`."""
    mean, low, high = (format(value, form) for value in t_interval(values))
    return f"{mean} [{low}, {high}]"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table, with numbers to the right except in the first `words` columns."""
    rule = ["---" if column < words else "---:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])
