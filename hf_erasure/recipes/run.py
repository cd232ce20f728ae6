"""What recipes of both kinds do: load a model and data, write a finished run, load it again, and compare."""

from __future__ import annotations

import difflib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer

from hf_erasure.adapters.common.config import number_of
from hf_erasure.adapters.common.files import YamlDumper
from hf_erasure.adapters.saving import refuse_other_adapter

from .occupations import SOURCE
from .schema import json_schema

Recipe = TypeVar("Recipe")
RECIPE_FILE, RESULTS_FILE, SCHEMA_FILE = "recipe.yaml", "results.json", "recipe.schema.json"
# Editors with a YAML language server look for this line at the top of a file.
SCHEMA_LINE = "# yaml-language-server: $schema="
# The suffix of a file → the reader of `datasets` for it, and further arguments of the reader.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "csv": ("csv", {}), "tsv": ("csv", {"sep": "\t"}), "json": ("json", {}), "jsonl": ("json", {}),
    # The readers of tables and of JSON handle a byte order mark by themselves.
    "parquet": ("parquet", {}), "arrow": ("arrow", {}), "txt": ("text", {"encoding": "utf-8-sig"}),
}  # fmt: skip
# Optional module → the extra that brings it.
_EXTRAS = {"matplotlib": "plot", "sklearn": "metrics", "lm_eval": "harness"}


def require(*modules: str) -> None:
    """Raise an `ImportError` that names the optional packages that are missing, before the slow steps."""
    if missing := [name for name in modules if find_spec(name) is None]:
        extras = ",".join(_EXTRAS[name] for name in missing)
        raise ImportError(f"This needs {' and '.join(missing)}: pip install 'hf-erasure[{extras}]'")


@contextmanager
def naming_the_model(path: str) -> Iterator[None]:
    """Turn an error in the `with` block into an `OSError` that says which model could not be loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise OSError(f"model {path} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_base(auto_class: Any, path: str) -> tuple[Any, Any]:
    """A model and its tokenizer. Raises `OSError` if they cannot be loaded."""
    with naming_the_model(path):
        return auto_class.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def load_source(source: str, name: str | None = None, *, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """A Hub id, a folder or a file (CSV, TSV, JSON, Parquet, plain text) as a data set with splits.

    Raises `ValueError` or `OSError` if the source does not exist or cannot be read.
    """
    source = os.path.expandvars(source)
    path, suffix = Path(source), Path(source).suffix[1:].lower()
    if not path.exists() and suffix in _READERS:
        raise FileNotFoundError(f"There is no file {source}.")
    if path.is_file() and suffix not in _READERS:
        raise ValueError(f"{source} cannot be read: give a file that ends in {', '.join(_READERS)}.")
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{source} is empty.")
    try:
        if path.is_file():
            kind, options = _READERS[suffix]
            return load_dataset(kind, data_files=source, streaming=streaming, **options)
        return load_dataset(source, name, streaming=streaming)
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        reason = "it has no rows" if "corresponds to no data" in reason else reason
        raise ValueError(f"{source} cannot be read: {reason}.") from error


def require_columns(rows: Dataset, source: str, *names: str) -> None:
    """Raise a `ValueError` that names the first of these columns that the rows of a source lack."""
    for name in names:
        if name not in rows.column_names:
            near = difflib.get_close_matches(name, rows.column_names, 1)
            there = ", ".join(rows.column_names) + (f" (did you mean {near[0]!r}?)" if near else "")
            raise ValueError(f"{source} has no column {name!r}; it has {there}.")


def refuse_empty(rows: Dataset, source: str, *columns: str) -> None:
    """Raise a `ValueError` if a row has no value in one of the columns."""
    for column in columns:
        if empty := [number for number, value in enumerate(rows[column]) if value is None or value == ""]:
            where = f"{number_of(len(empty), 'row')}, such as row {empty[0]} (from 0)"
            raise ValueError(f"{source}: {column!r} is empty in {where}: fill or remove such rows.")


def set_aside(
    rows: Dataset, share: float, *, label_column: str, text_column: str, group_column: str | None, seed: int
) -> DatasetDict:
    """Set a share of the rows aside to measure on: whole groups, or all rows of a text together, by label.

    Each label gives the same share of its groups or texts, drawn at random. With several labels, the first one counts.

    Raises:
        ValueError: If a column is missing, or a label would be missing on one side.
    """
    key = group_column or text_column
    require_columns(rows, "The data set", label_column, key)
    units: dict[str, list[int]] = {}
    for number, value in enumerate(rows[key]):
        units.setdefault(str(value), []).append(number)
    labels, test_rows = [str(value) for value in rows[label_column]], []
    by_label: dict[str, list[str]] = {}
    for unit, numbers in units.items():
        by_label.setdefault(labels[numbers[0]], []).append(unit)
    for _, names in sorted(by_label.items()):
        random.Random(seed).shuffle(names)
        test_rows += [row for unit in names[: round(share * len(names)) or int(len(names) > 1)] for row in units[unit]]
    chosen = set(test_rows)
    parts = {"train": [row for row in range(len(rows)) if row not in chosen], "test": sorted(test_rows)}
    for label, count in sorted(Counter(labels).items()):
        for name, part in parts.items():
            if all(labels[row] != label for row in part):
                what = f"values of {group_column!r}" if group_column else "different texts"
                raise ValueError(
                    f"The label {label!r} ({number_of(count, 'row')}) has too few {what} to be both fitted on and "
                    f"measured: none would be in {name}. Give more rows of it, leave it out, or give a test split of "
                    "your own."
                )
    return DatasetDict({name: rows.select(part) for name, part in parts.items()})


def names_on_hub(sources: Iterable[Any]) -> list[str]:
    """The sources that are repositories, not files or folders. All sources must have been loaded."""
    names = [source for source in sources if isinstance(source, str) and source != SOURCE]
    return [name for name in names if not Path(os.path.expandvars(name)).exists()]


def load_rows(source: str, split: str | None = None, *, with_texts: bool = False) -> Dataset:
    """The rows of a file or Hub id: of the split that is named, or of its only split.

    Raises `ValueError` if it has several splits and none is named, or not the named one; or if it lacks the column
    `text` where `with_texts` needs it.
    """
    data = load_source(source)
    if (split is None and len(data) > 1) or (split is not None and split not in data):
        what = "several splits" if split is None else f"no split {split!r}"
        raise ValueError(f"The data set {source!r} has {what}; write split: one of {sorted(data)}.")
    rows = data[split] if split is not None else next(iter(data.values()))
    if with_texts:
        require_columns(rows, source, "text")
    return rows


def write_run(folder: str | Path, model: Any, recipe: dict[str, Any], kind: type, results: Any) -> None:
    """Write the adapter, the results, and the recipe with the schema of its kind, with which editors complete it."""
    folder = Path(folder)
    model.save_pretrained(folder)
    written = yaml.dump(recipe, Dumper=YamlDumper, sort_keys=False, allow_unicode=True)
    (folder / RECIPE_FILE).write_text(f"{SCHEMA_LINE}{SCHEMA_FILE}\n{written}", encoding="utf-8")
    (folder / SCHEMA_FILE).write_text(json.dumps(json_schema(kind), ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=1), encoding="utf-8")


def check_start(folder: str | Path, config: Any, *modules: str) -> None:
    """Raise an error before the slow steps of a run.

    It is raised if optional `modules` are missing, as by `require`, or the folder cannot be written, or holds an
    adapter of another kind than `config` is of.
    """
    require(*modules)
    refuse_unwritable(folder)
    refuse_other_adapter(Path(folder), config)


def refuse_unwritable(folder: str | Path) -> None:
    """Raise an `OSError` if a folder can neither be written nor be made."""
    there = next(place for place in (Path(folder), *Path(folder).absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{folder} cannot be written: {there} is a file: write the name of a folder.")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{folder} cannot be written: you may not write into {there}. Choose another folder.")


def finished_run(folder: str | Path, read: Callable[[Path], Recipe], command: str) -> tuple[Recipe, Any]:
    """The recipe and the results that a run of `command` has written.

    Raises `ValueError` if the folder holds no finished run of this kind.
    """
    recipe, results = Path(folder) / RECIPE_FILE, Path(folder) / RESULTS_FILE
    if not recipe.is_file() or not results.is_file():
        raise ValueError(f"{folder} holds no finished run: run `{command} RECIPE.yaml output={folder}` first.")
    found = json.loads(results.read_text(encoding="utf-8"))
    if ("chosen" in found) != command.endswith("gradiend fit"):
        raise ValueError(f"{folder} is not of `{command}`: `check` reads an erasure, `gradiend evaluate` a GRADIEND.")
    return read(recipe), found


def table_of(rows: dict[str, Any], index: str) -> pd.DataFrame:
    """Rows by name as a table."""
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index)


def difference(now: pd.DataFrame, written: dict[str, Any]) -> float:
    """The largest difference of a table from the written one; infinite if rows, columns or NaN entries differ."""
    before = table_of(written, "")
    if set(now.index) != set(before.index) or set(now.columns) != set(before.columns):
        return float("inf")
    numbers = now.select_dtypes("number")
    then = before.loc[numbers.index, numbers.columns].astype(float)
    if (numbers.isna() != then.isna()).any(axis=None):
        return float("inf")
    return float((numbers - then).abs().max().max()) if len(now) else 0.0
