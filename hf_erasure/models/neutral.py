"""Neutral texts, and how well a model still models them (arXiv 2502.01406, section 5)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from .logits import SlotReader
from .model import evaluating
from .slots import EncodedRow, Filled, Layout, PairBatch, Slot, collate, longest_input
from .word_tokens import SLOT, PairError, encode, occurrences, shortened, special_ends, word_forms

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


_ROWS = 1024  # logits that are turned to float32 at once


class LanguageModelling:
    """How well a model still models neutral texts; tokenised and laid out once, scored as often as wanted.

    * masked: a share of the tokens, drawn by seed and none of a feature word, is masked; ``lms`` is the share of these
      that the model gets right, ``loss`` their mean negative log-likelihood;
    * causal: the mean negative log-likelihood of every token given those before it (the first has none before it and
      is not scored); ``lms = 1 / (1 + loss)``;
    * seq2seq: the same share of tokens is cut out, and the decoder predicts them: behind their sentinels (T5), or with
      the whole text forced where there is a mask token (BART); ``loss`` is the mean negative log-likelihood of these
      tokens, ``lms = 1 / (1 + loss)``;
    * classification: there is no language to model; ``lms`` is the share of texts on which the model agrees with
      itself as it was when this object was made, ``loss`` the negative log-likelihood of those labels.

    Padding never counts.

    Args:
        reader: Of the model (a `SlotReader`, or a `GradientReader`), which is scored as it is at each call, with the
            adapters that are then active.
        dataset: With ``text``.
        tokenizer: Of the model.
        feature_words: Words of all classes, never masked.
        batch_size: Texts a forward; texts of like length go together.
        seed: Of the draw of masked tokens.
        mask_share: Share of a text's tokens that is masked, at least one.
        max_length: Longest text in tokens; by default what the model takes, at most 512. Longer ones are cut into
            pieces.
        mask_draws: Each text is laid out so often, each time with other tokens masked or cut out: the accuracy on few
            tokens is a noisy measure. Without a meaning for causal models and classification, where none are drawn.

    Raises:
        PairError: There is no text, or no token to score.
    """

    def __init__(
        self,
        reader: SlotReader,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        feature_words: Iterable[str] = (),
        batch_size: int = 32,
        seed: int = 0,
        mask_share: float = 0.15,
        max_length: int | None = None,
        mask_draws: int = 1,
    ) -> None:
        if not 0 < mask_share < 1 or batch_size < 1 or mask_draws < 1:
            sizes = f"batch_size {batch_size} and mask_draws {mask_draws} (at least 1)"
            raise PairError(f"mask_share is {mask_share} (between 0 and 1), {sizes}")
        self.reader = reader
        config = self.reader.model.config
        layout = Layout.of(tokenizer, self.reader.task, config)
        longest = neutral_length(tokenizer, config, max_length)
        neutral = NeutralTexts(dataset, tokenizer, layout, feature_words, longest, pieces=True)
        generator = random.Random(seed)
        draws = mask_draws if layout.task in ("masked", "seq2seq") else 1
        drawn = [
            (text, _chosen(neutral, index, layout.task, mask_share, generator))
            for _ in range(draws)
            for index, text in enumerate(neutral.texts)
        ]
        kept = [(text, places) for text, places in drawn if places or layout.task == "classification"]
        if not kept:
            raise PairError("no neutral text has a token that could be scored; write longer texts")
        kept.sort(key=lambda entry: len(entry[0]))
        chunks = [kept[start : start + batch_size] for start in range(0, len(kept), batch_size)]
        self.batches = [_lay_out(layout, [t for t, _ in part], [places for _, places in part]) for part in chunks]
        if layout.task == "classification":
            self.batches = self._own_labels()

    def score(self) -> dict[str, float]:
        """``{"loss": mean negative log-likelihood, "lms": language-modelling score}``; forward passes only."""
        loss, hits, count = 0.0, 0, 0
        with evaluating(self.reader.model):
            for filled in self.batches:
                logits = self.reader.logits(filled)
                tokens = filled.tokens.to(logits.device)
                for part, goal in zip(logits.split(_ROWS), tokens.split(_ROWS), strict=True):
                    loss += float(F.cross_entropy(part.float(), goal, reduction="sum"))
                hits += int((logits.argmax(-1) == tokens).sum())
                count += len(tokens)
        mean = loss / count
        by_hits = self.reader.task in ("masked", "classification")
        return {"loss": mean, "lms": hits / count if by_hits else 1 / (1 + mean)}

    def _own_labels(self) -> list[Filled]:
        with evaluating(self.reader.model):
            labels = [self.reader.logits(filled).argmax(-1).cpu() for filled in self.batches]
        return [
            Filled(filled.inputs, filled.rows, filled.positions, own)
            for filled, own in zip(self.batches, labels, strict=True)
        ]


def _chosen(neutral: NeutralTexts, index: int, task: str, share: float, generator: random.Random) -> list[int]:
    """The positions of one text that are scored."""
    if task == "causal":
        # Every token but the first, feature words too: the loss on text as it is.
        return list(range(neutral.first[index] + 1, len(neutral.texts[index])))
    usable = neutral.usable[index]
    count = min(len(usable), max(1, round(share * len(usable))))
    return sorted(generator.sample(usable, count))


def _lay_out(layout: Layout, texts: Sequence[list[int]], chosen: Sequence[list[int]]) -> Filled:
    """One forward that predicts the chosen positions of some texts."""
    if layout.task == "classification":
        return layout.fill([Slot(text, []) for text in texts], [[0]] * len(texts))
    inputs, decoder, rows, positions, tokens = [], [], [], [], []
    for row, (text, places) in enumerate(zip(texts, chosen, strict=True)):
        if layout.sentinels:
            places = places[: len(layout.sentinels)]
        source, target, predicting = _cut_out(layout, text, places)
        inputs.append(source)
        decoder.append(target)
        rows += [row] * len(places)
        positions += predicting
        tokens += [text[place] for place in places]
    return layout.padded(inputs, decoder, rows, positions, tokens)


def _cut_out(layout: Layout, text: list[int], places: list[int]) -> tuple[list[int], list[int], list[int]]:
    """The (encoder's) input without the tokens at `places`, the decoder's input, and what positions predict them."""
    if layout.task == "causal":
        return text, [], [place - 1 for place in places]
    holes = layout.sentinels or (layout.hole,) * len(places)
    source = list(text)
    for place, hole in zip(places, holes, strict=False):
        source[place] = hole
    if layout.task == "masked":
        return source, [], places
    if not layout.sentinels:
        return source, [layout.start, *text[:-1]], places
    target = [layout.start]
    for place, hole in zip(places, holes, strict=False):
        target += [hole, text[place]]
    # Start, then (sentinel, token) pairs: a token is predicted at its sentinel, the last token is input to nothing.
    return source, target[:-1], [1 + 2 * step for step in range(len(places))]
