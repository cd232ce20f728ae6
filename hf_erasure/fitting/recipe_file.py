"""Recipe files: YAML, `key=value` overrides, and the data sets they name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetDict, IterableDatasetDict, load_dataset


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
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
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
        section[last] = yaml.safe_load(value)
    return content


def check_keys(content: dict[str, Any], kind: type, prefix: str) -> None:
    """Raise for the first key that is no field of the dataclass `kind`; names those there are."""
    known = [entry.name for entry in fields(kind)]
    for key in content:
        if key not in known:
            raise ValueError(f"{prefix}{key} is not known in a recipe; {prefix or 'it'} has {', '.join(known)}.")


def load_source(source: str, name: str | None = None, *, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """A Hub id, a folder or a file (CSV, JSON, Parquet, plain text) as a data set with splits."""
    source = os.path.expandvars(source)
    if Path(source).is_file():
        kind = {"jsonl": "json", "txt": "text"}.get(Path(source).suffix[1:], Path(source).suffix[1:])
        return load_dataset(kind, data_files=source, streaming=streaming)
    return load_dataset(source, name, streaming=streaming)
