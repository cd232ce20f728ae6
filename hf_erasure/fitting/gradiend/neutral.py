"""Neutral texts, in which a token that is no feature word is masked or predicted."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .batches import EncodedRow, Layout, PairBatch, Slot, collate, longest_input
from .words import SLOT, PairError, encode, occurrences, shortened, special_ends, word_forms

_LONGEST = 512  # tokens of a neutral text where neither tokenizer nor model has a smaller limit


class NeutralTexts:
    """Neutral texts as tokens, with the positions that are no feature word.

    Args:
        dataset: With ``text``.
        tokenizer: Of the model.
        layout: The task's.
        feature_words: Words of all classes, as text. Their tokens are neither predicted nor drawn.
        max_length: Longest text in tokens, special tokens included.
        pieces: Cut longer texts into pieces, instead of cutting their ends off.

    Raises:
        PairError: There is no column ``text``, no row, or a row has no text.

    Attributes:
        texts: Token ids with special tokens.
        first: For every text the position of its first token that is no leading special token.
        usable: For every text the positions that may be predicted: no special token, no feature word, and for causal
            models not the first token.
        words: Of these, the positions whose token has a letter or a digit in it.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        feature_words: Iterable[str],
        max_length: int,
        *,
        pieces: bool = False,
    ) -> None:
        texts = _neutral_column(dataset)
        lead, trail = special_ends(tokenizer)
        room = max(1, max_length - len(lead) - len(trail))
        forms = word_forms(tokenizer, feature_words)
        special = set(tokenizer.all_special_ids)
        self._spoken: dict[int, bool] = {}
        self._tokenizer = tokenizer
        self.texts: list[list[int]] = []
        self.first: list[int] = []
        self.usable: list[list[int]] = []
        self.words: list[list[int]] = []
        first = 1 if layout.task == "causal" else 0
        ends = [] if layout.task == "causal" else trail
        for tokens in _pieces(encode(tokenizer, texts), room, pieces):
            barred = occurrences(tokens, forms)
            free = [i for i in range(first, len(tokens)) if i not in barred and tokens[i] not in special]
            self.texts.append([*lead, *tokens, *ends])
            self.first.append(len(lead))
            self.usable.append([len(lead) + i for i in free])
            self.words.append([len(lead) + i for i in free if self._is_word(tokens[i])])

    def _is_word(self, token: int) -> bool:
        if token not in self._spoken:
            self._spoken[token] = any(letter.isalnum() for letter in self._tokenizer.decode([token]))
        return self._spoken[token]


def _pieces(texts: Iterable[list[int]], room: int, pieces: bool) -> Iterator[list[int]]:
    for tokens in texts:
        ends = range(0, len(tokens), room) if pieces else (0,)
        yield from (tokens[start : start + room] for start in ends)


def _neutral_column(dataset: Dataset) -> list[str]:
    if "text" not in dataset.column_names:
        raise PairError(f"the neutral texts have no column 'text'; they have {dataset.column_names}")
    texts = list(dataset["text"])
    if not texts:
        raise PairError("there are no neutral texts; add rows with texts that say nothing about the feature")
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise PairError(f"neutral row {row} is {text!r}; write a text")
        if SLOT in text:
            raise PairError(f"neutral row {row} ({shortened(text)}) has a slot; a neutral text has none")
    return texts


def neutral_length(tokenizer: PreTrainedTokenizerBase, config: Any, max_length: int | None) -> int:
    """The longest neutral text in tokens: as asked for, or what the model takes, at most 512."""
    limit = longest_input(tokenizer, config) or _LONGEST
    return min(limit, _LONGEST) if max_length is None else min(limit, max_length)


def neutral_batches(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    feature_words: Iterable[str],
    *,
    batch_size: int,
    seed: int = 0,
    max_length: int | None = None,
    config: Any = None,
) -> list[PairBatch]:
    """Batches of neutral texts: in each text one token that is no feature word is masked, or predicted.

    It is never a special token, and punctuation only where a text has nothing else. Its counterfactual is another such
    token, drawn from all the texts. For classification both are labels of the model, drawn at random.

    Args:
        dataset: With ``text``.
        tokenizer: Of the model.
        task: As for `PairSet`.
        feature_words: Words of all classes.
        batch_size: Rows a batch.
        seed: Of the draws.
        max_length: Longest text in tokens; by default what the model takes, at most 512.
        config: The model's; see `PairSet`.

    Raises:
        PairError: A text has no token that can be used, or all texts together have only one.
    """
    if batch_size < 1:
        raise PairError(f"batch_size is {batch_size}; it must be at least 1")
    layout = Layout.of(tokenizer, task, config)
    longest = neutral_length(tokenizer, config, max_length)
    neutral = NeutralTexts(dataset, tokenizer, layout, feature_words, longest)
    generator = random.Random(seed)
    if layout.task == "classification":
        rows = _neutral_labels(neutral, config, generator)
    else:
        rows = _neutral_words(neutral, layout, generator)
    return [collate(layout, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _neutral_words(neutral: NeutralTexts, layout: Layout, generator: random.Random) -> list[EncodedRow]:
    pool = [text[i] for text, words in zip(neutral.texts, neutral.words, strict=True) for i in words]
    if len(set(pool)) < 2:
        raise PairError("all neutral texts together have fewer than two words that are no feature words; add texts")
    rows = []
    for number, text in enumerate(neutral.texts):
        choices = neutral.words[number] or neutral.usable[number]
        if not choices:
            raise PairError(f"neutral row {number} has no token that could be predicted; write a longer text")
        at = generator.choice(choices)
        other = text[at]
        while other == text[at]:
            other = generator.choice(pool)
        tail = [] if layout.task == "causal" else text[at + 1 :]
        rows.append(EncodedRow(Slot(text[:at], tail), [text[at]], [other]))
    return rows


def _neutral_labels(neutral: NeutralTexts, config: Any, generator: random.Random) -> list[EncodedRow]:
    ids = sorted(set((getattr(config, "label2id", None) or {}).values()))
    if len(ids) < 2:
        raise PairError("classification needs the model's config with two labels or more; pass config=model.config")
    rows = []
    for text in neutral.texts:
        right, wrong = generator.sample(ids, 2)
        rows.append(EncodedRow(Slot(text, []), [right], [wrong]))
    return rows
