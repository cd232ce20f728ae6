"""Texts and their counterfactuals: what the counterfactuals of a text are, and which tokens are counterparts."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding

from .counterparts import CounterpartWords

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass
class Counterfactuals:
    """Reads or makes the counterfactuals of a text."""

    text_column: str  # Column of the text.
    column: str | None = None  # Column of its counterfactual, where the data have one.
    words: CounterpartWords | None = None  # Makes it by exchanging words, where the data have none.
    classes: tuple[str, ...] | None = None  # Names of the classes; None where they are bare ids.

    def of(self, row: Mapping[str, Any], label: int | None) -> list[tuple[Any, int, int]]:
        """Each counterfactual of a row, with the class of the text and that of the counterfactual.

        A text without any of the words has none, nor has a text without a label whose words are equally of two classes.

        Args:
            row: The row with the text.
            label: Class id of the row; None without a label. Then most of its words tell the class of the text; with a
                column of counterfactuals the text is of the first of two classes, the counterfactual of the second.
        """
        if self.words is None:
            own, text, other = label or 0, row[self.text_column], row[str(self.column)]
            is_same = isinstance(text, str | list) and isinstance(other, str | list) and other == text  # not of images
            return [] if other is None or is_same else [(other, own, 1 - own)]
        original = row[self.text_column]
        text, classes = original if isinstance(original, str) else " ".join(original), self.classes or ()
        if label is None:
            most = Counter(word.label for word in self.words.found_in(text)).most_common(2)
            if not most or (len(most) > 1 and most[0][1] == most[1][1]):
                return []
            label = classes.index(most[0][0])
        made = []
        for toward, name in enumerate(classes):
            other = self.words.exchanged(text, classes[label], name) if toward != label else None
            if other is not None and other != text:
                made.append((other if isinstance(original, str) else other.split(" "), label, toward))
        return made


def words_of_tokens(encoding: BatchEncoding, texts: Sequence[Any], pairs: Sequence[int]) -> Tensor:
    """The number of the word of each token; words of a counterfactual have the numbers of their counterparts.

    Special tokens are words of their own. Two texts with equally many words are matched in their order, other texts by
    a diff of their words.

    Args:
        encoding: The rows as a fast tokenizer encodes them.
        texts: Strings, or lists of words.
        pairs: For each row, the row that it is the counterfactual of, −1 for a text.

    Returns:
        `(rows, seq)` int64, −1 for padding and for words of a counterfactual without a counterpart.
    """
    numbered = [_words_of(encoding, row, text) for row, text in enumerate(texts)]
    numbers = []
    for (places, words), pair in zip(numbered, pairs, strict=True):
        number = {place: place for place in range(len(words))}
        if pair >= 0 and words != (others := numbered[pair][1]):
            spans = [(0, len(words), 0, len(others))]
            if len(words) != len(others):
                blocks = SequenceMatcher(None, words, others, autojunk=False).get_opcodes()
                spans = [block[1:] for block in blocks]
            number = {
                first: second
                for start, stop, other, end in spans
                if stop - start == end - other
                for first, second in zip(range(start, stop), range(other, end), strict=True)
            }
        numbers.append([number.get(place, -1) for place in places])
    return torch.tensor(numbers)


def _words_of(encoding: BatchEncoding, row: int, text: Any) -> tuple[list[int], list[str]]:
    """The number of the word of each position, −1 for padding; and the words."""
    tokens = (encoding.encodings or [])[row]
    if isinstance(text, str):
        spans = [match.span() for match in _WORD.finditer(text)]
        starts = [start for start, _ in spans]
        owners = [
            None if special or end <= start else bisect_left(starts, end) - 1
            for (start, end), special in zip(tokens.offsets, tokens.special_tokens_mask, strict=True)
        ]
        names = [text[start:stop] for start, stop in spans]
    else:
        owners, names = list(tokens.word_ids), list(text)
    places: list[int] = []
    words: list[str] = []
    before: Any = object()
    for token, owner, is_real in zip(tokens.tokens, owners, tokens.attention_mask, strict=True):
        if is_real and (owner is None or owner < 0 or owner != before):
            words.append(token if owner is None or owner < 0 else names[owner])
        before = owner
        places.append(len(words) - 1 if is_real else -1)
    return places, words
