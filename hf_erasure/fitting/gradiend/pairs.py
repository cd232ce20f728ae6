"""Counterfactual pairs, checked and tokenised.

A row has ``text`` with one ``[FEATURE]`` slot, ``factual`` and ``counterfactual`` (words that fit the slot), ``label``
(a class name) and, for more than two classes, ``counterfactual_label``. Rows for a classifier have no slot, and
``factual`` and ``counterfactual`` are names of the model's own labels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_erasure.models.model import datasets
from hf_erasure.models.slots import EncodedRow, Layout, PairBatch, Slot, collate, longest_input
from hf_erasure.models.word_tokens import SLOT, PairError, Placed, encode, place_words, shortened, special_ends

from ..dataloader import origin_of

Pair = tuple[str, str]
# A batch of one class of a pair, with +1 for the first class and -1 for the other; 0 for neutral texts.
Signed = tuple[PairBatch, int]
# A text's number, and for each class the token sequences of its words.
Reading = tuple[int, list[set[tuple[int, ...]]]]


class PairSet:
    """A data set of pairs, checked and tokenised once; batches can then be drawn any number of times.

    Args:
        dataset: Rows with ``text``, ``factual``, ``counterfactual``, ``label``, optionally ``counterfactual_label``.
        tokenizer: The tokenizer of the model.
        task: One of ``masked``, ``causal``, ``seq2seq``, ``classification``.
        classes: Names of the classes in the order of their ids.
        config: The model's configuration. Seq2seq (start token) and classification (``label2id``) need it; for other
            tasks it gives the limit on the length.

    Raises:
        PairError: A row cannot be used; the message names the row, shows its text and says what to write instead.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        task: str,
        classes: Sequence[str],
        config: Any = None,
    ) -> None:
        self.dataset, self.layout, self.classes = dataset, Layout.of(tokenizer, task, config), list(classes)
        self.origin = origin_of(dataset, "the columns factual, counterfactual and label")
        pairs = read_rows(dataset, self.classes)
        present = {pair.label for pair in pairs}
        if len(present) < 2:
            only = self.classes[present.pop()]
            needed = ", ".join(repr(name) for name in self.classes if name != only)
            raise PairError(f"all {len(pairs)} rows have the label {only!r}; add rows of {needed}")
        # For each class its factual and counterfactual words, each once.
        self.words: list[dict[str, None]] = [{} for _ in self.classes]
        standing = [(pair.label, pair.factual) for pair in pairs]
        for label, word in standing + [(pair.other, pair.counterfactual) for pair in pairs]:
            self.words[label][word] = None
        self.rows: list[EncodedRow] = []
        for row in _encode_rows(pairs, tokenizer, self.layout, config):
            if isinstance(row, PairError):
                raise row
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def batches(
        self, batch_size: int, *, pair: Sequence[str] | None = None, seed: int | None = None, shuffle: bool = False
    ) -> list[PairBatch]:
        """Batches that each have one class (and one counterfactual class), with the classes evenly mixed.

        Args:
            batch_size: Rows in a batch; the last batch of a class may be smaller.
            pair: Names of two classes: only rows of these two are used, in both directions.
            seed: The seed of the random order.
            shuffle: Draw the rows of each class, and the batches, in random order.

        Raises:
            PairError: One of the pair's classes has no rows.
        """
        if batch_size < 1:
            raise PairError(f"batch_size is {batch_size}; it must be at least 1")
        generator = random.Random(seed or 0)
        placed: list[tuple[float, list[EncodedRow]]] = []
        for rows in self.groups(pair):
            if shuffle:
                generator.shuffle(rows)
            chunks = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
            placed += [((index + 0.5) / len(chunks), chunk) for index, chunk in enumerate(chunks)]
        placed.sort(key=lambda item: item[0])
        if shuffle:
            generator.shuffle(placed)
        return [collate(self.layout, chunk) for _, chunk in placed]

    def signed(self, batch_size: int, pair: Pair, seed: int | None = None) -> list[Signed]:
        """Batches of a pair, shuffled if a seed is given; each with +1 for the pair's first class, else −1."""
        found = self.batches(batch_size, pair=pair, seed=seed, shuffle=seed is not None)
        return [(batch, 1 if batch.label == self.classes.index(pair[0]) else -1) for batch in found]

    def slots(self, batch_size: int) -> list[PairBatch]:
        """Batches of the texts, each text with its slot once, regardless of the words and classes of its rows.

        They are for `word_log_probabilities`: a batch has rows of any class, and its own labels have no meaning.
        """
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], EncodedRow] = {}
        for row in self.rows:
            found.setdefault((tuple(row.slot.head), tuple(row.slot.tail)), replace(row, label=None, other=None))
        rows = list(found.values())
        return [collate(self.layout, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]

    def words_in_slots(
        self, tokenizer: PreTrainedTokenizerBase, words: dict[str, tuple[int, ...]]
    ) -> list[dict[str, tuple[int, ...]]]:
        """For each text of `slots` the tokens of each word in its slot; `words` has the tokens behind a space.

        Where a text begins, or behind a quotation mark, a word may have other tokens. A word that does not align in a
        slot keeps those that it has behind a space.
        """
        usual, found = set(words.values()), dict[Any, dict[str, tuple[int, ...]]]()
        for row, text in zip(self.rows, self.dataset["text"], strict=True):
            slot = tuple(row.slot.head), tuple(row.slot.tail)
            is_known = found.setdefault(slot, words) is not words
            if is_known or {tuple(row.factual), tuple(row.counterfactual)} <= usual:
                continue
            before, _, after = _with_slot(text, tokenizer).partition(SLOT)
            suffix = "" if self.layout.task == "causal" else after
            placed = place_words(tokenizer, [before] * len(words), list(words), [suffix] * len(words))
            there = {word: tuple(p.word) for word, p in zip(words, placed, strict=True) if p is not None}
            found[slot] = words | there
        return list(found.values())

    def readings(self) -> list[Reading]:
        """Each text with each of its factual words, once: the text's index in `slots`, and its rows' words by class."""
        places: dict[Any, int] = {}
        found: dict[Any, Reading] = {}
        for row in self.rows:
            slot = (tuple(row.slot.head), tuple(row.slot.tail))
            place = places.setdefault(slot, len(places))
            _, words = found.setdefault((slot, tuple(row.factual), row.label), (place, [set() for _ in self.classes]))
            words[row.label or 0].add(tuple(row.factual))
            words[row.other or 0].add(tuple(row.counterfactual))
        return list(found.values())

    def groups(self, pair: Sequence[str] | None) -> list[list[EncodedRow]]:
        """The rows of each class and counterfactual class, all or those of a pair; a `PairError` if it has none."""
        groups: dict[tuple[int, int], list[EncodedRow]] = {}
        for row in self.rows:
            groups.setdefault((row.label or 0, row.other or 0), []).append(row)
        if pair is None:
            return [groups[key] for key in sorted(groups)]
        unknown = [name for name in pair if name not in self.classes]
        if unknown or len(set(pair)) != 2:
            raise PairError(f"pair is {list(pair)}; name two different classes of {self.classes}")
        one, two = (self.classes.index(name) for name in pair)
        for label, other in ((one, two), (two, one)):
            if (label, other) not in groups:
                raise PairError(
                    f"no row has the label {self.classes[label]!r} and the counterfactual label {self.classes[other]!r}"
                    f", which the pair {list(pair)} needs; add such rows"
                )
        return [groups[one, two], groups[two, one]]


def usable_rows(
    dataset: datasets.Dataset, classes: Sequence[str], tokenizer: PreTrainedTokenizerBase, task: str, config: Any = None
) -> list[int]:
    """The rows that `PairSet` accepts: their words are known and aligned, and their texts are not too long.

    Raises:
        PairError: The columns, the classes or a cell are wrong, which leaving out rows does not change; or no row can
            be used.
    """
    layout, names = Layout.of(tokenizer, task, config), list(classes)
    pairs = read_rows(dataset, names)
    found = list(_encode_rows(pairs, tokenizer, layout, config))
    kept = [pair.row for pair, row in zip(pairs, found, strict=True) if not isinstance(row, PairError)]
    if not kept:
        raise PairError(f"none of the {len(pairs)} rows can be used with this model; the first: {found[0]}")
    return kept


def pair_batches(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    classes: Sequence[str],
    *,
    batch_size: int,
    pair: Sequence[str] | None = None,
    seed: int | None = None,
    shuffle: bool = False,
    config: Any = None,
) -> list[PairBatch]:
    """Check and tokenise a data set of pairs, and draw batches of it once; see `PairSet` and `PairSet.batches`."""
    pairs = PairSet(dataset, tokenizer, task, classes, config)
    return pairs.batches(batch_size, pair=pair, seed=seed, shuffle=shuffle)


@dataclass(frozen=True)
class _Pair:
    """One row as it is in the data set."""

    row: int
    text: str
    factual: str
    counterfactual: str
    label: int
    other: int


def _fault(row: int, text: Any, problem: str) -> PairError:
    return PairError(f"row {row} ({shortened(str(text))}): {problem}")


def read_rows(dataset: datasets.Dataset, classes: list[str]) -> list[_Pair]:
    """The rows of a data set of pairs, with the numbers of their classes; a `PairError` if one lacks something."""
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise PairError(f"classes must name two classes or more, each once; got {classes}")
    columns = ["text", "factual", "counterfactual", "label"]
    if len(classes) > 2:
        columns.append("counterfactual_label")
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        why = "; more than two classes need it" if missing == ["counterfactual_label"] else ""
        raise PairError(f"the pairs have no column {missing[0]!r}{why}; they have {dataset.column_names}")
    if len(dataset) == 0:
        raise PairError("the pairs are empty; they need rows of at least two classes")
    pairs = []
    for index, row in enumerate(dataset):
        for name in ("text", "factual", "counterfactual"):
            if not isinstance(row[name], str) or not row[name].strip():
                raise _fault(index, row["text"], f"{name} is {row[name]!r}; write text there")
        label = _class_of(index, row, "label", dataset.features, classes)
        if len(classes) == 2 and row.get("counterfactual_label") is None:
            other = 1 - label
        else:
            other = _class_of(index, row, "counterfactual_label", dataset.features, classes)
        factual, counterfactual = row["factual"].strip(), row["counterfactual"].strip()
        if other == label:
            twice = f"label and counterfactual_label are both {classes[label]!r}; name another class"
            raise _fault(index, row["text"], twice)
        if factual == counterfactual:
            twice = f"factual and counterfactual are both {factual!r}; write the other class's word"
            raise _fault(index, row["text"], twice)
        pairs.append(_Pair(index, row["text"], factual, counterfactual, label, other))
    return pairs


def _class_of(index: int, row: Mapping[str, Any], column: str, features: Mapping[str, Any], classes: list[str]) -> int:
    value = row[column]
    if isinstance(features[column], datasets.ClassLabel) and isinstance(value, int) and value >= 0:
        value = features[column].int2str(value)
    if value not in classes:
        raise _fault(index, row["text"], f"{column} is {value!r}; write one of {classes}")
    return classes.index(value)


def _encode_rows(
    pairs: Sequence[_Pair], tokenizer: PreTrainedTokenizerBase, layout: Layout, config: Any
) -> Iterator[EncodedRow | PairError]:
    """Every encoded row, or the error that says what is wrong with it; `usable_rows` leaves out rows with errors."""
    limit = longest_input(tokenizer, config)
    if layout.task == "classification":
        rows = _label_rows(pairs, tokenizer, config)
    else:
        rows = _word_rows(pairs, tokenizer, layout)
    for pair, row in zip(pairs, rows, strict=True):
        if isinstance(row, str):
            yield _fault(pair.row, pair.text, row)
            continue
        length = len(row.slot.head) + max(len(row.factual), len(row.counterfactual)) + len(row.slot.tail)
        if limit is not None and length > limit:
            problem = f"it has {length} tokens, and the model takes {limit}; shorten its text"
            yield _fault(pair.row, pair.text, problem)
        else:
            yield row


def _with_slot(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text in which the tokenizer's mask token may stand for the slot, with the slot."""
    mask = tokenizer.mask_token
    return text if SLOT in text or mask is None else text.replace(mask, SLOT)


def _word_rows(
    pairs: Sequence[_Pair], tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> Iterator[EncodedRow | str]:
    """Rows for a language model, tokenised all at once; or in place of a row, words that say what is wrong with it."""
    is_causal, not_aligned = layout.task == "causal", Placed([], [], [])
    texts = [_with_slot(pair.text, tokenizer) for pair in pairs]
    before = [text.partition(SLOT)[0] for text in texts]
    after = ["" if is_causal else text.partition(SLOT)[2] for text in texts]
    right_words, wrong_words = (
        [placed or not_aligned for placed in place_words(tokenizer, before, words, after)]
        for words in ([pair.factual for pair in pairs], [pair.counterfactual for pair in pairs])
    )
    lead, trail = special_ends(tokenizer)
    for pair, text, right, wrong in zip(pairs, texts, right_words, wrong_words, strict=True):
        slot = Slot([*lead, *right.head], [] if is_causal else [*right.tail, *trail])
        row = EncodedRow(slot, right.word, wrong.word, pair.label, pair.other)
        yield _fault_of_words(pair, text, right, wrong, tokenizer, layout.task) or row


def _fault_of_words(
    pair: _Pair, text: str, right: Placed, wrong: Placed, tokenizer: PreTrainedTokenizerBase, task: str
) -> str | None:
    """What is wrong with the slot of a text or with the two words; a word that does not align there has no tokens."""
    one, other, count, around = pair.factual, pair.counterfactual, text.count(SLOT), f"punctuation around {SLOT}"
    if count != 1:
        found = "the text has no slot" if count == 0 else f"the text has {count} slots"
        return f"{found}; write {SLOT} exactly once, where {one!r} goes"
    if task == "causal" and not text.partition(SLOT)[0].strip():
        return (
            f"nothing stands before {SLOT}, but a causal model predicts a word from what is before it; put the slot "
            "further to the right"
        )
    for word, placed in ((one, right), (other, wrong)):
        if not placed.word:
            return f"a token reaches over an end of {word!r}, so the tokens do not align; put spaces or {around}"
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in placed.word:
            return f"{word!r} is not in the tokenizer's vocabulary; use a word that it knows"
    if right.head != wrong.head or right.tail != wrong.tail:
        return f"the text around {SLOT} has other tokens with {other!r} than with {one!r}; put spaces or {around}"
    if right.word == wrong.word:
        return f"the tokenizer makes the same tokens of {one!r} and {other!r}; write words that it tells apart"
    if task == "masked" and len(right.word) != len(wrong.word):
        return (
            f"{one!r} has {len(right.word)} tokens and {other!r} {len(wrong.word)}; a masked model needs one mask for "
            "each token, so write words with equally many"
        )
    return None


def _label_rows(pairs: Sequence[_Pair], tokenizer: PreTrainedTokenizerBase, config: Any) -> Iterator[EncodedRow | str]:
    """Rows for a classifier; or in place of a row, words that say what is wrong with it."""
    ids = getattr(config, "label2id", None)
    if not ids:
        raise PairError("classification needs the model's config with its label2id; pass config=model.config")
    lead, trail = special_ends(tokenizer)
    for pair, text in zip(pairs, encode(tokenizer, [pair.text for pair in pairs]), strict=True):
        unknown = [name for name in (pair.factual, pair.counterfactual) if name not in ids]
        if SLOT in pair.text:
            yield f"a classifier has no slot; write the word itself instead of {SLOT}"
        elif unknown:
            yield f"{unknown[0]!r} is not a label of the model; write one of {list(ids)}"
        else:
            words = [ids[pair.factual]], [ids[pair.counterfactual]]
            yield EncodedRow(Slot([*lead, *text, *trail], []), *words, pair.label, pair.other)
