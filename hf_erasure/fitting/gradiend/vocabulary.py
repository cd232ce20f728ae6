"""The words of every class, and how likely a class is at the slots of some texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from .batches import PairBatch
from .forwards import SlotReader
from .words import word_tokens


@dataclass(frozen=True)
class ClassWords:
    """The words by which each class shows.

    Attributes:
        words: Class → its words; for classification the names of the model's labels.
    """

    words: dict[str, list[str]]

    @property
    def all(self) -> list[str]:
        """The words of all classes, each once."""
        return list(dict.fromkeys(word for words in self.words.values() for word in words))

    def tokens(self, tokenizer: Any, task: str, config: Any) -> list[list[int]]:
        """The token ids of `all`, in running text; the label ids for classification."""
        if task == "classification":
            return [[config.label2id[word]] for word in self.all]
        return word_tokens(tokenizer, self.all)

    def probabilities(self, reader: SlotReader, batch: PairBatch, tokens: list[list[int]]) -> Tensor:
        """`(batch, classes)`: the probability that the slot holds a word of the class."""
        by_word = reader.word_log_probabilities(batch, tokens).double().exp().cpu()
        position = {word: index for index, word in enumerate(self.all)}
        return torch.stack([by_word[:, [position[w] for w in words]].sum(1) for words in self.words.values()], dim=1)


def class_words(datasets: Iterable[Dataset], classes: Sequence[str]) -> ClassWords:
    """Gather the words of every class from pairs.

    Args:
        datasets: That passed the checks of `PairSet`.
        classes: In the order of their ids.
    """
    found: dict[str, dict[str, None]] = {label: {} for label in classes}
    for dataset in datasets:
        labels = _names(dataset, "label")
        others = _others(dataset, labels, classes)
        for column, owners in (("factual", labels), ("counterfactual", others)):
            for word, owner in zip(dataset[column], owners, strict=True):
                found[owner].setdefault(word.strip())
    return ClassWords({label: list(words) for label, words in found.items()})


def _names(dataset: Dataset, column: str) -> list[str]:
    feature = dataset.features[column]
    return [feature.int2str(v) if isinstance(v, int) and hasattr(feature, "int2str") else v for v in dataset[column]]


def _others(dataset: Dataset, labels: list[str], classes: Sequence[str]) -> list[str]:
    if "counterfactual_label" in dataset.column_names:
        return _names(dataset, "counterfactual_label")
    return [classes[1 - list(classes).index(label)] for label in labels]
