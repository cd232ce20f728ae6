"""Recipe files: YAML, `key=value` overrides, and the data sets they name."""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from datasets import DatasetDict, IterableDatasetDict, load_dataset

from hf_erasure.adapters.common.config import fits, in_words, short
from hf_erasure.adapters.common.files import read_text

Section = TypeVar("Section")
_FEW = 20  # fields that a message lists


def read_content(path: str | Path, overrides: Iterable[str], expected: str) -> dict[str, Any]:
    """Read a recipe and apply `key=value` overrides; dots reach into sections, as in `fit.batch_size=16`.

    Args:
        path: The file.
        overrides: Their values are YAML.
        expected: Some keys of such a recipe, for the message when the file is none.

    Raises:
        ValueError: If the file is no recipe, or an override cannot be applied.
    """
    try:
        content = yaml.safe_load(read_text(Path(path)))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no recipe: expected keys such as {expected}.")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ValueError(f"{override!r} is no key=value, as in model=bert-base-uncased.")
        section = content
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ValueError(f"{key!r}: {parent!r} is a value, not a section of the recipe.")
        try:
            section[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{override!r} has a value that is not YAML: {' '.join(str(error).split())}") from error
    return content


def check_section(content: Any, kind: type, section: str = "", above: Sequence[str] = ()) -> dict[str, Any]:
    """A section of a recipe whose keys are fields of a dataclass; `check_values` looks at what they hold.

    Args:
        content: Of the section.
        kind: The dataclass.
        section: Its name in the recipe.
        above: Fields that have a key of their own at the top of the recipe.

    Raises:
        ValueError: If it is not a section, or a key is not known or belongs at the top; names those there are.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{section} of a recipe is a section with keys of its own, not {short(content)}.")
    known = [entry.name for entry in fields(kind) if entry.init]
    for key in content:
        if key in above:
            raise ValueError(f"{section}.{key} is not known in a recipe: write {key} at the top alone.")
        if key not in known:
            prefix = f"{section}." if section else ""
            if len(known) < _FEW:
                there = f"is not known in a recipe; {prefix or 'it'} has {', '.join(known)}."
            else:
                close = difflib.get_close_matches(str(key), known, 3)
                there = f"is not a field of {kind.__name__}{'; it has ' if close else ''}{', '.join(close)}."
            raise ValueError(f"{prefix}{key} {there}")
    return dict(content)


def check_values(content: dict[str, Any], kind: type, section: str = "") -> None:
    """Raise a `ValueError` for a value that is not of the type that its field in a dataclass declares."""
    hints = typing.get_type_hints(kind)
    for key, value in content.items():
        if not fits(value, hints[key]):
            name = f"{section}.{key}" if section else key
            raise ValueError(f"{name}={short(value)} in a recipe must be {in_words(hints[key])}.")


def section_of(content: Any, kind: type[Section], section: str) -> Section:
    """A section of a recipe as its dataclass.

    Raises:
        ValueError: If a key is not known, one is missing, or a value is of another type.
    """
    found = check_section(content, kind, section)
    check_values(found, kind, section)
    return kind(**found)


def numbers(value: Any) -> Any:
    """What YAML reads as text though it is a number, such as 1e-4."""
    if isinstance(value, dict):
        return {key: numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value) else value


def load_source(source: str, name: str | None = None, *, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """A Hub id, a folder or a file (CSV, JSON, Parquet, plain text) as a data set with splits."""
    source = os.path.expandvars(source)
    if Path(source).is_file():
        kind = {"jsonl": "json", "txt": "text"}.get(Path(source).suffix[1:], Path(source).suffix[1:])
        # The readers of tables and of JSON take a byte order mark by themselves.
        encoding = {"encoding": "utf-8-sig"} if kind == "text" else {}
        return load_dataset(kind, data_files=source, streaming=streaming, **encoding)
    return load_dataset(source, name, streaming=streaming)
