"""Make inputs of a model from the rows of a data set: from text, from tokens that it already has, or from images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from .counterparts import words_of_tokens

Row = Mapping[str, Any]
# Per row and padded position: the index into the row's list of labels, or None for no label. Empty where the inputs
# have no words or tokens to label.
Owners = list[list[int | None]]
# A tokenizer without a limit has a `model_max_length` above this.
_NO_LIMIT = 10**20


@dataclass
class TextEncoder:
    """Tokenises strings, or lists of words."""

    tokenizer: PreTrainedTokenizerBase
    columns: list[str]
    max_length: int | None
    split_into_words: bool

    def __post_init__(self) -> None:
        self.unit = "words" if self.split_into_words else None
        backend = getattr(self.tokenizer, "backend_tokenizer", None) if self.tokenizer.is_fast else None
        steps = []
        if self.split_into_words and backend is not None and backend.pre_tokenizer is not None:
            state = json.loads(backend.pre_tokenizer.__getstate__())
            steps = state.get("pretokenizers", [state])
        # Whether ["the", "boat"] is read as "theboat", as by byte-level tokenizers (GPT-2).
        prefixes = [step.get("add_prefix_space", False) for step in steps if step.get("type") == "ByteLevel"]
        self.glues_words = bool(prefixes) and not any(prefixes)

    def __call__(self, rows: Sequence[Row], pairs: Sequence[int] = ()) -> tuple[dict[str, Tensor], Owners]:
        """The inputs of rows and their owners; with `pairs`, which tells counterfactuals, also the words of tokens."""
        texts: list[Any] = []
        for row in rows:
            texts.append(text := plain(row[self.columns[0]]))
            is_list = isinstance(text, list) and all(isinstance(word, str) for word in text)
            if not (is_list if self.split_into_words else isinstance(text, str)):
                expected = "a list of words" if self.split_into_words else "a string"
                raise ValueError(
                    f"column {self.columns[0]!r} holds {text!r} where the first row holds {expected}: filter such rows "
                    f"out or bring them into the same form."
                )
        spaced = texts
        if self.glues_words:
            spaced = [[word if index == 0 else f" {word}" for index, word in enumerate(text)] for text in texts]
        encoding = self.tokenizer(
            spaced,
            is_split_into_words=self.split_into_words,
            truncation=self.max_length is not None or self.tokenizer.model_max_length < _NO_LIMIT,
            max_length=self.max_length,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        inputs = {name: value for name, value in encoding.items() if isinstance(value, Tensor)}
        _refuse_rows_without_tokens(inputs["attention_mask"], texts)
        if pairs and self.tokenizer.is_fast:
            inputs["concept_words"] = words_of_tokens(encoding, texts, pairs)
        if not (self.split_into_words and self.tokenizer.is_fast):
            return inputs, []
        return inputs, [list(encoding.word_ids(index)) for index in range(len(rows))]


@dataclass
class TokenisedEncoder:
    """Pads columns that a tokenizer has already written."""

    tokenizer: PreTrainedTokenizerBase
    columns: list[str]
    unit: str | None = "tokens"

    def __call__(self, rows: Sequence[Row], pairs: Sequence[int] = ()) -> tuple[dict[str, Tensor], Owners]:
        """The inputs of rows, padded, and their owners."""
        columns = {name: [plain(row[name]) for row in rows] for name in self.columns}
        inputs = dict(self.tokenizer.pad(columns, padding=True, return_attention_mask=True, return_tensors="pt"))
        _refuse_rows_without_tokens(inputs["attention_mask"], columns["input_ids"])
        owners: Owners = []
        for ids in columns["input_ids"]:
            padding = [None] * (inputs["input_ids"].shape[1] - len(ids))
            left = self.tokenizer.padding_side == "left"
            owners.append([*padding, *range(len(ids))] if left else [*range(len(ids)), *padding])
        return inputs, owners


@dataclass
class PixelEncoder:
    """Stacks images: as they are, or run through an image processor first."""

    columns: list[str]
    processor: BaseImageProcessor | None = None
    unit: str | None = None

    def __call__(self, rows: Sequence[Row], pairs: Sequence[int] = ()) -> tuple[dict[str, Tensor], Owners]:
        """The images of rows, stacked."""
        images = [row[self.columns[0]] for row in rows]
        if self.processor is not None:
            return {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}, []
        arrays = [torch.as_tensor(np.asarray(image)) for image in images]
        shapes = {tuple(array.shape) for array in arrays}
        if len(shapes) > 1:
            raise ValueError(
                f"column {self.columns[0]!r} holds images of different shapes {sorted(shapes)} in one batch: run them "
                f"through the model's image processor, which resizes them, or set batch_size=1."
            )
        return {"pixel_values": torch.stack(arrays)}, []


Encoder = TextEncoder | TokenisedEncoder | PixelEncoder


def choose_encoder(first: Row, tokenizer: Any, text_column: str, max_length: int | None) -> Encoder:
    """Choose the encoder of a data set by what its first row has; a `ValueError` if none fits."""
    if "input_ids" in first:
        _check_tokenizer(tokenizer, max_length)
        if max_length is not None:
            raise ValueError(
                f"max_length={max_length} has no effect on a data set that is already tokenised (it has a column "
                f"'input_ids'): give max_length to the tokenizer when you tokenise, or remove that column."
            )
        known = dict.fromkeys(["input_ids", "attention_mask", "token_type_ids", *tokenizer.model_input_names])
        return TokenisedEncoder(tokenizer, [name for name in known if name in first])
    if "pixel_values" in first:
        return PixelEncoder(["pixel_values"])
    require_column(first, text_column, "text_column")
    if isinstance(tokenizer, BaseImageProcessor):
        return PixelEncoder([text_column], tokenizer)
    _check_tokenizer(tokenizer, max_length)
    text = plain(first[text_column])
    if not isinstance(text, str | list):
        raise ValueError(
            f"text_column={text_column!r} holds {text!r} in the first row: it must hold strings or lists of words, or "
            f"images together with an image processor. Filter rows without a text out of dataset."
        )
    return TextEncoder(tokenizer, [text_column], max_length, isinstance(text, list))


def _check_tokenizer(tokenizer: Any, max_length: int | None) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        hint = "pass processor.tokenizer" if hasattr(tokenizer, "tokenizer") else "load it with AutoTokenizer"
        raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}: {hint}.")
    special = tokenizer.num_special_tokens_to_add()
    if max_length is not None and max_length <= special:
        raise ValueError(
            f"max_length={max_length} leaves no room for text beside the {special} special tokens that the tokenizer "
            f"adds: raise it to {special + 1} or more."
        )


def _refuse_rows_without_tokens(attention_mask: Tensor, sources: Sequence[Any]) -> None:
    empty = (attention_mask.sum(dim=1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"the row with input {sources[empty[0]]!r} has no tokens: filter empty rows out of dataset.")


def require_column(first: Row, name: str, argument: str) -> None:
    """Raise a `ValueError` where the data set lacks the column that an argument names."""
    if name not in first:
        raise ValueError(
            f"{argument}={name!r} is not a column of dataset, which has {sorted(first)}: name one of these."
        )


def plain(value: Any) -> Any:
    """The Python value of a tensor, an array or a NumPy scalar, whichever of these the data set returns."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
