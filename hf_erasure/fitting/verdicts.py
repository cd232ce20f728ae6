"""Whether a model is better with an adapter than without: the one rule of tables, reports, cards and commands."""

from __future__ import annotations

from collections.abc import Sequence


def badness(value: float, better: str, ideal: float | None) -> float:
    """How far a value falls short of the ideal.

    Args:
        value: The value.
        better: `"lower"`, `"higher"` or `"closer"`.
        ideal: The best value. None where there is none: then only the order of two values counts.

    Returns:
        0 at the ideal, and beyond it too unless the ideal is to be met exactly.
    """
    if ideal is None:
        return value if better == "lower" else -value
    if better == "closer":
        return abs(value - ideal)
    return max(0.0, value - ideal if better == "lower" else ideal - value)


def verdict(
    base: float, value: float, interval: Sequence[float] | None, better: str, ideal: float | None = None
) -> str:
    """What an adapter does to a measure; an interval that holds the base's value is no change.

    Args:
        base: Without the adapter.
        value: With it.
        interval: Of the value with the adapter; None where it has none.
        better: `"lower"`, `"higher"` or `"closer"`.
        ideal: The best value, if there is one.

    Returns:
        `"better"` or `"worse"`; nothing where the interval holds the base's value or there is no interval.
    """
    if interval is None or interval[0] <= base <= interval[1]:
        return ""
    change = badness(value, better, ideal) - badness(base, better, ideal)
    return "better" if change < 0 else "worse" if change > 0 else ""
