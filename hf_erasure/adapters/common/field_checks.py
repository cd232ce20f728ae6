"""Checks of the fields of a configuration: types, and regular expressions that end."""

from __future__ import annotations

import copy
import functools
import re
import time
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import regex  # type: ignore[import-untyped]

# What may be a name of modules; as part of a regular expression, which PEFT makes of it, it stands for itself.
_NAME = re.compile(r"[\w.\-]+")


def check_types(config: Any) -> None:
    """Compare the values of a configuration's fields with the types that it declares.

    A text where a list of texts is declared passes: what is wrong with it, the configuration can say better.

    Raises:
        TypeError: Names the field, its value and the type.
    """
    kind: Any = type(config)
    hints = _hints(kind)
    for entry in fields(config):
        value = getattr(config, entry.name)
        if not fits(value, hints[entry.name]):
            raise TypeError(
                f"{entry.name}={short(value)} of a {type(config).__name__} must be {in_words(hints[entry.name])}."
            )


def check_names(field: str, value: list[str] | str | None) -> None:
    """Raise a `ValueError` for what is no name of a module, such as a regular expression."""
    for name in [value] if isinstance(value, str) else value or []:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{field}={short(value)}: {short(name)} is no name of a module.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that could come from JSON is of a declared type; a list, tuple or set of a list's."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is list:
        if isinstance(value, str):
            return parts == (str,)
        return isinstance(value, (list, tuple, set, frozenset, range)) and all(fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if hint is Any or not isinstance(hint, type):
        return True
    if hint in (int, float):  # True is no number here
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, str) if issubclass(hint, str) else isinstance(value, hint)


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def in_words(hint: Any) -> str:
    """A declared type as a message shows it."""
    text = str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))
    return re.sub(r"\b(typing|peft\.utils\.peft_types)\.|<enum '|<class '|'>", "", text)


# Of one match; an honest one takes microseconds.
SECONDS = 0.5
# Of all matches in a model.
TOTAL_SECONDS = 5.0
FIELDS = ("target_modules", "exclude_modules")


def check_patterns(config: Any, names: Iterable[str]) -> None:
    """Try the patterns of a configuration on all modules of a model.

    Raises:
        ValueError: If a pattern is none, or takes longer than it may.
    """
    names = list(names)
    began = time.process_time()
    for field in _patterns(config):
        for name in names:
            matches(config, field, name)
            if time.process_time() - began > TOTAL_SECONDS:
                raise ValueError(_too_slow(config, field, TOTAL_SECONDS))


def matches(config: Any, field: str, name: str) -> bool:
    """Whether the pattern in a field of a configuration matches all of a name.

    Raises:
        ValueError: If it is no pattern, or takes longer than it may.
    """
    pattern: str = getattr(config, field)
    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(_too_slow(config, field, SECONDS)) from error
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"{field}={_short(pattern)} is no regular expression: {error}.") from error


def as_names(config: Any, *names: str) -> Any:
    """A copy of a configuration in which those of `names` that its patterns match stand in their place."""
    plain = copy.copy(config)
    for field in _patterns(config):
        setattr(plain, field, {name for name in names if matches(config, field, name)})
    return plain


def _patterns(config: Any) -> list[str]:
    """The fields that hold a pattern; "all-linear" is a word."""
    values = {field: getattr(config, field, None) for field in FIELDS}
    return [f for f, value in values.items() if isinstance(value, str) and value.lower() != "all-linear"]


def _too_slow(config: Any, field: str, seconds: float) -> str:
    return (
        f"The regular expression {field}={_short(getattr(config, field))} takes longer than {seconds:g} s on the names "
        "of this model: write one without nested repetitions, or a list of names."
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}…")
