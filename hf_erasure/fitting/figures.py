"""What a figure is about, and whether it became better."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


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


GENDER, POS, STEREOTYPES = "gender", "part of speech", "stereotypes"

FEMALE = {"female", "f", "fem", "feminine", "woman", "women", "girl", "girls", "she"}
MALE = {"male", "m", "masc", "masculine", "man", "men", "boy", "boys", "he"}
_BEYOND = {"neutral", "nonbinary", "non-binary", "diverse", "other", "unknown", "they"}
# The universal parts of speech.
_TAGS = {"adj", "adp", "adv", "aux", "cconj", "det", "intj", "noun", "num", "part", "pron", "propn", "punct", "sconj"}
_TAGS |= {"sym", "verb", "x"}
_NAMES = {
    GENDER: {"gender", "genders", "sex", "pronoun", "pronouns"},
    POS: {"pos", "upos", "part of speech", "parts of speech", "word class", "word classes"},
    STEREOTYPES: {"stereotype", "stereotypes"},
}


def concept_of(name: Any, classes: Iterable[Any] | None = None) -> str | None:
    """The concept that a name or classes stand for.

    Args:
        name: What an adapter calls its concept or feature.
        classes: Its classes, where it has any.

    Returns:
        `GENDER`, `POS` or `STEREOTYPES`; None for any other concept.
    """
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", str(name)).lower()
    words = " ".join(["", *re.findall(r"[^\W_]+", apart), ""])
    for concept, names in _NAMES.items():
        if any(f" {one} " in words for one in names):
            return concept
    labels = [str(label).strip().lower() for label in classes or []]
    if FEMALE.intersection(labels) and MALE.intersection(labels) and (FEMALE | MALE | _BEYOND).issuperset(labels):
        return GENDER
    return POS if len(labels) > 1 and _TAGS.issuperset(labels) else None


def concept_of_config(config: Any) -> str | None:
    """What an adapter is about: a concept of the field, or else what it calls its own; None of other libraries'."""
    name = getattr(config, "feature", None) or getattr(config, "concept", None)
    known = concept_of(name, getattr(config, "classes", None) or getattr(config, "labels", None))
    return known or (None if name is None else str(name))


def female_and_male(classes: Sequence[str]) -> tuple[int, int] | None:
    """Where the female and the male class stand, if the classes are these two."""
    labels = [label.strip().lower() for label in classes]
    female, male = ([i for i, label in enumerate(labels) if label in names] for names in (FEMALE, MALE))
    return (female[0], male[0]) if len(labels) == 2 and female and male else None
