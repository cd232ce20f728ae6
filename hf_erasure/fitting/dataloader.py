"""Make the batches that fitting reads from a data set: model inputs plus `concept_labels`.

A batch is a plain dict. `concept_labels` has one of three forms:

* `(batch,)` int64: one class id for each row, for labels of whole sequences or images;
* `(batch, seq)` int64: one class id for each token, `-100` where a position has no label (special tokens, padding);
* `(batch, concept_dim)` float32: continuous or multi-label concepts.

A batch may also have these, all int64:

* `concept_pairs` `(batch,)`: for a counterfactual the row of its text, and −1 for a text. `concept_pair_labels`
  `(batch,)` has the classes of texts and counterfactuals, −100 for a text without a counterfactual. `concept_words`
  `(batch, seq)` has the number of the word that a token belongs to, equal for counterparts, −1 for none;
* `concept_environments` `(batch,)` and `concept_kept` `(batch,)`: ids of the environment, and of what is kept.

Rows are tokenised when their batch is asked for, so a data set may be larger than memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from hf_erasure.adapters.common.config import short
from hf_erasure.erasers.eraser import check_count
from hf_erasure.erasers.statistics import IGNORED
from hf_erasure.models.model import datasets

from .counterparts import Counterfactuals, Counterparts, CounterpartWords
from .encoders import (
    Encoder,
    Owners,
    PixelEncoder,
    Row,
    TextEncoder,
    TokenisedEncoder,
    choose_encoder,
    plain,
    require_column,
)
from .processes import Processes

_ON_THE_HUB = re.compile(r"hf://datasets/([^@\s]+)@")


def concept_dataloader(
    dataset: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor | None,
    text_column: str = "text",
    label_column: str | None = "label",
    batch_size: int = 32,
    *,
    max_length: int | None = None,
    labels: Sequence[str] | None = None,
    split_between_processes: bool = False,
    counterfactual_column: str | None = None,
    counterfactual_words: str | Path | Counterparts | None = None,
    environment_column: str | None = None,
    keep: str | None = None,
) -> DataLoader[Any]:
    """Turn a data set into batches that `fit_concept_erasure` reads.

    The inputs come from the first of these that the data set has: a column `input_ids` (already tokenised), a column
    `pixel_values` (already processed images), or `text_column`, which holds strings, lists of words, or images when
    `tokenizer` is an image processor.

    The form of the labels follows from their values. Ints, strings and `ClassLabel` are class ids of whole rows. A list
    of these has one class for each word (for each token where the data set is already tokenised); `None` or `-100`
    means "no label". A float is a continuous concept of dimension 1, a list of n floats one of dimension n.

    Args:
        dataset: One split. An `IterableDataset` is read as a stream.
        tokenizer: The tokenizer of the model, or its image processor; `None` where `pixel_values` are ready.
        text_column: Name of the column with the raw input.
        label_column: Name of the column with the labels, or `None` for batches without `concept_labels`, such as
            the background of `fit_concept_erasure`.
        batch_size: Rows in a batch; the last batch may be smaller.
        max_length: Longest sequence in tokens, special tokens included. By default the tokenizer's own limit.
        labels: Class names in the order of their ids. A stream with string labels needs them; elsewhere the default is
            the names of a `ClassLabel`, or the sorted distinct strings. For lists of floats they name the dimensions.
        split_between_processes: Give each process of a launcher its own share of the rows. Every row is in exactly one
            share, so shares may differ in length or be empty.
        counterfactual_column: Column of the same text with the other of two classes; a row without one has `None`
            there. What both texts share cancels, so that few pairs erase what many labelled texts do not. With
            `label_column=None` the text is of the first class, and its counterfactual of the second.
        counterfactual_words: Make the counterfactuals by exchanging words of `labels`: `"english_gender"`, a table
            that comes with the package, `{class: [words]}` with counterparts at one index, or the path of such a table
            in YAML or JSON. A text is paired with a counterfactual for each other class. With `label_column=None` the
            class of a text is the one with most of its words. A row without any of the words has no counterfactual.
        environment_column: Column of what a text was made from or found in, such as its template, source or author.
            `fit_concept_erasure(…, environment_rank=…)` erases the concept within each of these.
        keep: Column of a second label whose covariance with the activations stays as it is.

    Returns:
        A loader of dicts. `loader.collate_fn.labels` holds the class names in the order of their ids, or `None`.

    Raises:
        TypeError: `dataset`, `tokenizer`, `labels` or a count is of the wrong type.
        ValueError: the data set is empty or lacks a column, the tokenizer cannot pad or cannot align words,
            counterfactuals cannot be made of the data, or (while iterating) a row's label is unknown, missing, or does
            not match its input.
    """
    from datasets.distributed import split_dataset_by_node

    first = _first_row(dataset)
    check_count("batch_size", batch_size)
    check_count("max_length", max_length, none=", or None for the tokenizer's own limit")
    if isinstance(labels, str) or not all(isinstance(name, str) for name in labels or ()):
        raise TypeError(f"labels must be a list of class names, such as ['female', 'male'], got {labels!r}.")
    if labels is not None and (not labels or len(set(labels)) != len(labels)):
        raise ValueError(f"labels must name every class once, got {list(labels)}.")
    encode = choose_encoder(first, tokenizer, text_column, max_length)
    collate, columns = ConceptCollator(encode), list(encode.columns)
    if label_column is not None:
        require_column(first, label_column, "label_column")
        collate.read_labels = _choose_label_reader(dataset, first[label_column], label_column, labels, encode)
        collate.origin = origin_of(dataset, f"the column {label_column!r}")
        columns.append(label_column)
    if counterfactual_column is not None or counterfactual_words is not None:
        if counterfactual_column is not None:
            require_column(first, counterfactual_column, "counterfactual_column")
            columns.append(counterfactual_column)
        collate.counterfactuals = _choose_counterfactuals(collate, labels, counterfactual_column, counterfactual_words)
    for argument, name in (("environment_column", environment_column), ("keep", keep)):
        if name is not None:
            require_column(first, name, argument)
            ids = NumberedColumn.of(dataset, name, argument)
            collate.id_columns["concept_environments" if argument == "environment_column" else "concept_kept"] = ids
            columns.append(name)
    # Unused columns are not read, unless a transform writes columns on the fly and may need any of them.
    transformed = isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"
    if not transformed and dataset.column_names is not None and set(columns) <= set(dataset.column_names):
        dataset = dataset.select_columns(list(dict.fromkeys(columns)))
        if isinstance(dataset, datasets.Dataset) and dataset.format["type"] is None and "pixel_values" in columns:
            # Otherwise Arrow returns images as nested lists, which takes four times as long.
            dataset = dataset.with_format("numpy", columns=["pixel_values"], output_all_columns=True)
    if split_between_processes:
        processes = Processes()
        dataset = split_dataset_by_node(dataset, processes.rank, processes.count)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate)


@dataclass
class ConceptCollator:
    """Makes one batch of rows: encodes them, pads them to the longest, and adds the labels."""

    encode: Encoder  # Makes the inputs.
    read_labels: _LabelReader | None = None  # Makes the labels; None for batches without labels.
    origin: dict[str, Any] = field(default_factory=dict)  # Where the rows come from, as `origin_of` returns it.
    counterfactuals: Counterfactuals | None = None  # Makes the counterfactuals of a row.
    # Key in the batch → the column of further ids: of environments, and of what is kept.
    id_columns: dict[str, NumberedColumn] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Class names in the order of their ids; `None` where the labels are bare ids or values."""
        if self.read_labels is None:
            return None if self.counterfactuals is None else self.counterfactuals.classes
        return self.read_labels.names

    def check_labels(self, wanted: Sequence[str] | None) -> None:
        """Raise a `ValueError` if an adapter, whose labels are `wanted`, numbers its classes differently."""
        if self.labels is not None and wanted is not None and list(self.labels) != list(wanted):
            raise ValueError(
                f"The batches number their classes {short(list(self.labels))}, the adapter {short(list(wanted))}. Name "
                "every class in ConceptErasureConfig(labels=[…]), or filter its rows out of the data, and give both "
                "the same order: concept_dataloader(…, labels=config.labels)."
            )

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Encode `rows` (dicts of the data set's columns) as one batch; counterfactuals follow after the texts.

        If the rows have labels, the counterfactuals have none; if not, the classes of the pairs are the labels of both.
        """
        if self.counterfactuals is None:
            batch, owners = self.encode(rows)
            if self.read_labels is not None:
                batch["concept_labels"] = self.read_labels(rows, owners)
        else:
            labels = None if self.read_labels is None else self.read_labels(rows, []).tolist()
            texts, rows, pairs, classes = rows, list(rows), [-1] * len(rows), [IGNORED] * len(rows)
            for place, row in enumerate(texts):
                for text, own, other in self.counterfactuals.of(row, None if labels is None else labels[place]):
                    rows.append({**row, self.encode.columns[0]: text})
                    pairs.append(place)
                    classes[place] = own
                    classes.append(other)
            batch, _ = self.encode(rows, pairs)
            known = classes if labels is None else labels + [IGNORED] * (len(rows) - len(texts))
            id_lists = {"concept_labels": known, "concept_pairs": pairs, "concept_pair_labels": classes}
            batch |= {name: torch.tensor(ids) for name, ids in id_lists.items()}
        return batch | {name: column(rows) for name, column in self.id_columns.items()}


# ---- labels ----------------------------------------------------------------------------------------------------------


@dataclass
class _LabelReader:
    """Reads the labels of a batch in the one form that was found in the first row."""

    column: str
    encode: Encoder
    form: Literal["rows", "tokens", "values"]
    names: tuple[str, ...] | None
    """Class names in the order of their ids, or the names of the dimensions."""
    stored_names: tuple[str, ...] | None = None
    """Names behind the ints of a `ClassLabel` column, whose order may differ from `names`."""

    def __post_init__(self) -> None:
        self.id_of = {name: index for index, name in enumerate(self.names or ())}

    def __call__(self, rows: Sequence[Row], owners: Owners) -> Tensor:
        values = [plain(row[self.column]) for row in rows]
        if self.form == "values":
            vectors = [value if isinstance(value, list) else [value] for value in values]
            for vector in vectors:
                if not all(isinstance(number, int | float) and math.isfinite(number) for number in vector):
                    raise ValueError(
                        f"column {self.column!r} holds {str(vector)[:80]}: values of a continuous concept must be "
                        f"finite numbers; filter such rows out of dataset."
                    )
            widths = {len(vector) for vector in vectors}
            wanted = len(self.names) if self.names is not None else max(widths)
            if widths != {wanted}:
                raise ValueError(
                    f"column {self.column!r} holds lists of {sorted(widths)} floats where {wanted} are expected: a "
                    f"list of floats describes its whole row, so all must have the length concept_dim. To label words, "
                    f"use ids."
                )
            return torch.tensor(vectors, dtype=torch.float32)
        if self.form == "tokens":
            classes = []
            for row, given, owners_in_row in zip(rows, values, owners, strict=True):
                count = len(plain(row[self.encode.columns[0]]))
                if not isinstance(given, list) or len(given) != count:
                    found = f"{len(given)} labels" if isinstance(given, list) else f"the label {given!r}"
                    raise ValueError(
                        f"column {self.column!r} has {found} for a row of {count} {self.encode.unit}: give each of its "
                        f"{self.encode.unit} one label (None for those that have none). Labels: {str(given)[:80]}"
                    )
                ids = [self._class_id(value) for value in given]
                classes.append([IGNORED if owner is None else ids[owner] for owner in owners_in_row])
            return torch.tensor(classes)
        ids = [self._class_id(value) for value in values]
        if IGNORED in ids:
            raise ValueError(
                f"label {values[ids.index(IGNORED)]!r} in column {self.column!r} says that a whole row has no label: "
                f"filter such rows out of dataset (None and {IGNORED} stand for single tokens only)."
            )
        return torch.tensor(ids)

    def _class_id(self, value: Any) -> int:
        if value is None or (value == IGNORED and not isinstance(value, str)):
            return IGNORED
        if self.stored_names is not None and isinstance(value, int) and 0 <= value < len(self.stored_names):
            value = self.stored_names[value]
        if isinstance(value, str):
            if value in self.id_of:
                return self.id_of[value]
            raise ValueError(
                f"unknown label {value!r} in column {self.column!r}; known labels: {short(list(self.id_of))}. Add it "
                f"to labels, or filter such rows out of dataset."
            )
        named = self.id_of.get(str(value).lower())
        if self.stored_names is None and named not in (None, value):
            raise ValueError(
                f"label {value!r} in column {self.column!r} is the id of one class and the name of class {named}: say "
                f"which by dataset.cast_column({self.column!r}, Value('string')), or by a ClassLabel."
            )
        if not isinstance(value, int) or value < 0 or (self.names is not None and value >= len(self.names)):
            known = "a class id of 0 or more" if self.names is None else f"a class id below {len(self.names)}"
            raise ValueError(
                f"label {value!r} in column {self.column!r} is not {known}: correct it, or filter such rows out."
            )
        return int(value)


def _choose_label_reader(
    dataset: datasets.Dataset | datasets.IterableDataset,
    first: Any,
    column: str,
    labels: Sequence[str] | None,
    encode: Encoder,
) -> _LabelReader:
    """Choose how to read the column, from the first row's label and the declared feature."""
    feature, value = (dataset.features or {}).get(column), plain(first)
    per_token = isinstance(value, list)
    element = next((item for item in value if item is not None), None) if per_token else value
    if isinstance(element, float):
        return _LabelReader(column, encode, "values", tuple(labels) if labels is not None else None)
    if element is not None and not isinstance(element, str | int):
        raise ValueError(
            f"label_column={column!r} holds {value!r}: labels are ints, strings or floats, or one list of these a row."
        )
    if per_token and encode.unit is None:
        raise ValueError(
            f"label_column={column!r} holds one list of classes a row ({str(value)[:60]}), but the inputs are not "
            f"split into words: let text_column hold lists of words, or give multi-label concepts as floats."
        )
    if per_token and isinstance(encode, TextEncoder) and not encode.tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {type(encode.tokenizer).__name__} cannot say which word a subword comes from (it has no "
            f"word_ids), which the labels in column {column!r} need: load a fast tokenizer, or tokenise yourself and "
            f"give one label a token beside a column 'input_ids'."
        )
    class_label = feature if isinstance(feature, datasets.ClassLabel) else getattr(feature, "feature", None)
    stored = tuple(class_label.names) if isinstance(class_label, datasets.ClassLabel) and class_label.names else None
    names = tuple(labels) if labels is not None else stored
    strings = isinstance(element, str) or getattr(class_label or feature, "dtype", None) == "string"
    if names is None and strings:
        remedy = "labels=[…] with the class names in the order of their ids"
        found = _values_of(dataset, column, "label_column", remedy)
        names = tuple(sorted(name for name in found if name is not None))
    return _LabelReader(column, encode, "tokens" if per_token else "rows", names, stored)


def _values_of(
    dataset: datasets.Dataset | datasets.IterableDataset, column: str, argument: str, remedy: str
) -> set[Any]:
    """The distinct values of a column, or those in its lists."""
    if isinstance(dataset, datasets.IterableDataset) or column not in dataset.column_names:
        raise ValueError(f"the values of {argument}={column!r} cannot be listed ahead of a stream: write {remedy}.")
    found: set[Any] = set()
    for batch in dataset.select_columns([column]).iter(batch_size=1000):
        for value in plain(batch[column]):
            found.update(value if isinstance(value, list) else [value])
    return found


@dataclass
class NumberedColumn:
    """Numbers the values of a column, such as the source of a text."""

    column: str
    names: tuple[str, ...]  # The values in words, in the order of their ids.
    ids: dict[Any, int]  # Value → its id.

    @classmethod
    def of(cls, dataset: datasets.Dataset | datasets.IterableDataset, column: str, argument: str) -> NumberedColumn:
        """Find the values of a column: the names of a `ClassLabel`, or all values that occur, sorted."""
        feature = (dataset.features or {}).get(column)
        if isinstance(feature, datasets.ClassLabel):
            return cls(column, tuple(feature.names), {index: index for index in range(len(feature.names))})
        if feature is not None and not isinstance(feature, datasets.Value):
            raise ValueError(f"{argument}={column!r} holds {feature}: give every row a string or an int there.")
        found = _values_of(dataset, column, argument, f"dataset.cast_column({column!r}, ClassLabel(names=[…]))")
        if unfit := [value for value in found if not isinstance(value, str | int)]:
            raise ValueError(f"{argument}={column!r} holds {unfit[0]!r}: give every row a string or an int there.")
        values = sorted(found, key=lambda value: (isinstance(value, str), value))
        return cls(column, tuple(map(str, values)), {value: index for index, value in enumerate(values)})

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """The ids of rows, `(rows,)` int64."""
        values = [plain(row[self.column]) for row in rows]
        if unknown := [value for value in values if value not in self.ids]:
            raise ValueError(
                f"column {self.column!r} holds {unknown[0]!r}, which stands for none of "
                f"{short(list(self.names))}: filter such rows out of dataset."
            )
        return torch.tensor([self.ids[value] for value in values])


def _choose_counterfactuals(
    collate: ConceptCollator, labels: Sequence[str] | None, column: str | None, words: Any
) -> Counterfactuals:
    """Check the options for counterfactuals, and choose how they are made."""
    reader = collate.read_labels
    names = tuple(labels or ()) if reader is None else reader.names
    if column is not None and words is not None:
        raise ValueError("counterfactual_column and counterfactual_words both say what a counterfactual is: give one.")
    encode = collate.encode
    if isinstance(encode, TokenisedEncoder) or (words is not None and isinstance(encode, PixelEncoder)):
        raise ValueError(
            "the data set is already tokenised, or has no text, so words cannot be exchanged and another text cannot "
            "be encoded: remove the column 'input_ids', and let text_column hold the text."
        )
    if reader is not None and reader.form != "rows":
        raise ValueError(
            f"column {reader.column!r} labels single words, or holds values, but counterfactuals need texts with one "
            "class each: give one class for each row, or label_column=None."
        )
    if words is not None and len(names or ()) < 2:
        raise ValueError("counterfactual_words exchanges words of classes: name these, labels=['female', 'male'].")
    if words is None and names and len(names) != 2:
        raise ValueError(
            f"counterfactual_column is for two classes, and there are {list(names)}: it does not tell the class of "
            "the counterfactual. Give counterfactual_words, or the rows of two classes."
        )
    table = None if words is None else CounterpartWords.load(words, list(names or ()))
    return Counterfactuals(encode.columns[0], column, table, names or None)


# ---- the data set itself ---------------------------------------------------------------------------------------------


def _first_row(dataset: Any) -> Row:
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise TypeError(f"dataset holds the splits {list(dataset)}: pass one of them, such as dataset['train'].")
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise TypeError(
            f"dataset must be a datasets.Dataset or datasets.IterableDataset, got {type(dataset).__name__}: a list of "
            f"dicts becomes one with datasets.Dataset.from_list(rows)."
        )
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("dataset is empty: check the filter or the split that made it.")
    if not isinstance(first, Mapping):
        raise TypeError(f"dataset gives rows of type {type(first).__name__}: pass dataset.with_format(None).")
    return first


def origin_of(dataset: Any, columns: str) -> dict[str, Any]:
    """`{"datasets", "labels_from"}`: names on the Hub, and where the labels are, with `columns` in words.

    Data that were made in memory or read from a file have no name.
    """
    info = getattr(dataset, "info", None)
    # A data set knows which files its builder has read, and their addresses contain the repository.
    files = getattr(info, "download_checksums", None) or {}
    names = sorted({found[1] for found in map(_ON_THE_HUB.match, map(str, files)) if found})
    split = f", split {str(dataset.split)!r}" if getattr(dataset, "split", None) is not None else ""
    return {"datasets": names, "labels_from": f"{columns} of {' and '.join(names) or 'a data set of its maker'}{split}"}
