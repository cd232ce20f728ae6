"""Whether values that any file may hold are of the types that a dataclass declares."""

from __future__ import annotations

import functools
import re
import types
import typing
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def check_types(config: Any) -> None:
    """Compare the values of a configuration's fields with the types that it declares.

    A text where a list of texts is declared passes: what is wrong with it, the configuration can say better.

    Raises:
        TypeError: Names the field, its value and the type.
    """
    kind: Any = type(config)
    for entry in fields(config):
        value, hint = getattr(config, entry.name), hints(kind)[entry.name]
        if not fits(value, hint):
            raise TypeError(f"{entry.name}={short(value)} of a {type(config).__name__} must be {in_words(hint)}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that could come from JSON is of a declared type; a list, tuple or set of a list's,
    and a list or tuple of its length of a tuple's.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is list:
        if isinstance(value, str):
            return parts == (str,)
        return isinstance(value, (list, tuple, set, frozenset, range)) and all(fits(item, parts[0]) for item in value)
    if origin is tuple:
        is_list = isinstance(value, (list, tuple)) and len(value) == len(parts)
        return is_list and all(map(fits, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if hint is Any or not isinstance(hint, type):
        return True
    if hint in (int, float):  # True is not a number here
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, str) if issubclass(hint, str) else isinstance(value, hint)


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def in_words(hint: Any) -> str:
    """A declared type as a message shows it."""
    text = str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))
    return re.sub(r"\b(typing|peft\.utils\.peft_types)\.|<enum '|<class '|'>", "", text)


@functools.cache
def hints(kind: Any) -> dict[str, Any]:
    """The declared types of a dataclass's fields."""
    return typing.get_type_hints(kind)
