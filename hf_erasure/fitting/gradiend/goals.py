"""What an edit is chosen for: goals, and how likely the words of each class are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_erasure.models.logits import SlotReader
from hf_erasure.models.word_tokens import PairError, word_tokens

from ..figures import female_and_male
from .pairs import PairSet, Reading

Goal = Callable[[Tensor], Tensor]  # (texts, classes) probabilities → (texts,)

_GENDERS = ("fpi", "mpi")


def goal_by_name(name: str, classes: Sequence[str]) -> Goal:
    """The goal of that name.

    Args:
        name: `"bpi"`, `"fpi"`, `"mpi"`, `"balance"` or one of the classes.
        classes: The feature's classes, in the order of the columns of `p`.

    Raises:
        ValueError: If the name means nothing for these classes.
    """
    if name in classes:
        return _prefers(list(classes).index(name))
    if name == "balance":
        return lambda p: (1 - (p.amax(1) - p.amin(1))) * p.amin(1)
    if name == "bpi" and len(classes) == 2:
        return lambda p: (1 - (p[:, 0] - p[:, 1]).abs()) * p.sum(1)
    genders = female_and_male(classes)
    if name in _GENDERS and genders is not None:
        return _prefers(genders[_GENDERS.index(name)])
    raise ValueError(
        f"goal={name!r} is not defined for the classes {list(classes)}: write one of the class names, 'balance'"
        + (", 'bpi', or 'fpi' and 'mpi' for a female and a male class." if len(classes) == 2 else ".")
    )


def goal_names(classes: Sequence[str]) -> list[str]:
    """Every name that `goal_by_name` knows for these classes."""
    names = ["balance", *classes]
    if len(classes) == 2:
        names.append("bpi")
    return [*names, *(name for name in _GENDERS if female_and_male(classes) is not None and name not in classes)]


def _prefers(index: int) -> Goal:
    def goal(p: Tensor) -> Tensor:
        others = p.clone()
        others[:, index] = 0
        return (1 - others.amax(1)) * p[:, index]

    return goal


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

    def scores(self, pairs: PairSet, tokenizer: Any, config: Any, batch_size: int) -> Callable[[SlotReader], Tensor]:
        """What gives `(texts, classes)`: the probability that the slot of a text holds a word of the class.

        A word counts once, however it is spelled. Where a word belongs to several classes, no sum over the words of a
        class tells them apart: each text is then scored by the words that its own rows give to each class.

        Args:
            pairs: The texts.
            tokenizer: Of the model.
            config: The model's.
            batch_size: Texts a forward pass.

        Raises:
            PairError: If a word belongs to several classes, and the rows of a text give no word for some class.
        """
        tokens = map(tuple, self.tokens(tokenizer, pairs.layout.task, config))
        of_word = dict(zip(self.all, tokens, strict=True))
        words = [{of_word[word] for word in own} for own in self.words.values()]
        owners = {word: [i for i, own in enumerate(words) if of_word[word] in own] for word in self.all}
        several = [word for word in self.all if len(owners[word]) > 1]
        batches = pairs.slots(batch_size)
        if several:
            names = [pairs.classes[i] for i in owners[several[0]]]
            said = f"{several[0]!r} is a word of {' and '.join(map(repr, names))}"
            warnings.warn(f"{said}: each text is scored by the words that its rows give to each class.", stacklevel=4)
            readings = _checked(pairs.readings(), pairs.classes, said)
            texts, by_text = torch.tensor([text for text, _ in readings]), [each for _, each in readings]
        else:
            texts, by_text = torch.arange(sum(map(len, batches))), [words]
        known = sorted({word for each in by_text for own in each for word in own})
        position = {word: index for index, word in enumerate(known)}
        chosen = torch.zeros(len(by_text), len(words), len(known), dtype=torch.double)
        for row, each in enumerate(by_text):
            for column, own in enumerate(each):
                chosen[row, column, [position[word] for word in own]] = 1

        def probabilities(reader: SlotReader) -> Tensor:
            found = [reader.word_log_probabilities(batch, known).double().exp().cpu() for batch in batches]
            return (torch.cat(found)[texts, None] * chosen).sum(2)

        return probabilities


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


def _checked(readings: list[Reading], classes: Sequence[str], said: str) -> list[Reading]:
    for text, words in readings:
        for name, own in zip(classes, words, strict=True):
            if not own or any(own & other for other in words if other is not own):
                lacks = f"give {'two classes the same word' if own else f'no word of {name!r}'}"
                raise PairError(
                    f"{said}, so each text is scored by the words that its own rows give to each class, and those of "
                    f"text {text} {lacks}; add rows with its other words, or use words of one class only"
                )
    return readings


def _names(dataset: Dataset, column: str) -> list[str]:
    feature = dataset.features[column]
    return [feature.int2str(v) if isinstance(v, int) and hasattr(feature, "int2str") else v for v in dataset[column]]


def _others(dataset: Dataset, labels: list[str], classes: Sequence[str]) -> list[str]:
    if "counterfactual_label" in dataset.column_names:
        return _names(dataset, "counterfactual_label")
    return [classes[1 - list(classes).index(label)] for label in labels]
