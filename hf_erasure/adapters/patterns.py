"""Regular expressions out of a configuration, which a stranger may have written so that they never end.

The engine of `re` has no time limit, and a pattern such as `(a+)+$` takes it longer than anybody waits. So patterns are
matched by `regex`, which transformers brings along and which has one, and PEFT is handed the names that they match.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from typing import Any

import regex  # type: ignore[import-untyped]

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
