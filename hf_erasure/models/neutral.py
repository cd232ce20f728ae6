"""Neutral texts, and how well a model still models them (arXiv 2502.01406, section 5)."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from .model import datasets, evaluating
from .slots import EncodedRow, Layout, PairBatch, Slot, SlotReader, collate, in_float32, longest_input
from .word_tokens import SLOT, PairError, encode, occurrences, shortened, special_ends, word_forms

_LONGEST = 512  # tokens of a neutral text, unless the tokenizer or the model sets a smaller limit
_MASK_SHARE = 0.15  # of the tokens of a text, as in the training of BERT; at least one is masked


@dataclass(frozen=True)
class NeutralText:
    """One neutral text as tokens."""

    tokens: list[int]  # The token ids, special tokens included.
    first: int  # The position of the first token that is not a leading special one.
    # The positions that may be predicted: not special tokens, not feature words, for causal models not the first token.
    usable: list[int]
    words: list[int]  # The usable positions whose token has a letter or a digit in it.


def _neutral_texts(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    feature_words: Iterable[str],
    config: Any,
    *,
    in_pieces: bool = False,
) -> list[NeutralText]:
    """Neutral texts as tokens; texts that are too long lose their ends, or are cut into pieces."""
    longest = longest_input(tokenizer, config, _LONGEST) or _LONGEST
    lead, trail = special_ends(tokenizer)
    room = max(1, longest - len(lead) - len(trail))
    forms, special = word_forms(tokenizer, feature_words), set(tokenizer.all_special_ids)
    begin, ends = (1, []) if layout.task == "causal" else (0, trail)
    is_word: dict[int, bool] = {}
    found = []
    for whole in encode(tokenizer, _column_of_texts(dataset)):
        for start in range(0, len(whole), room) if in_pieces else (0,):
            tokens = whole[start : start + room]
            feature_positions = occurrences(tokens, forms)
            free = [i for i in range(begin, len(tokens)) if i not in feature_positions and tokens[i] not in special]
            for token in {tokens[i] for i in free}.difference(is_word):
                is_word[token] = any(letter.isalnum() for letter in tokenizer.decode([token]))
            usable, words = ([len(lead) + i for i in free if all_of or is_word[tokens[i]]] for all_of in (True, False))
            found.append(NeutralText([*lead, *tokens, *ends], len(lead), usable, words))
    return found


def _column_of_texts(dataset: datasets.Dataset) -> list[str]:
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


def neutral_batches(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    feature_words: Iterable[str],
    *,
    batch_size: int,
    seed: int = 0,
    config: Any = None,
) -> list[PairBatch]:
    """Batches of neutral texts: in each text one token that is not a feature word is masked, or predicted.

    It is never a special token, and is punctuation only if a text has nothing else. Its counterfactual is another such
    token, drawn from all the texts. For classification both are labels of the model, drawn at random. Texts that are
    longer than the model's limit, or 512 tokens, are cut.

    Args:
        dataset: The data set, with a column ``text``.
        tokenizer: The tokenizer of the model.
        task: The task of the model; see `PairSet`.
        feature_words: The words of all classes.
        batch_size: Rows in each batch.
        seed: The seed of the draws.
        config: The model's configuration; see `PairSet`.

    Raises:
        PairError: If a text has no token that can be used, or all texts together have only one such token.
    """
    if batch_size < 1:
        raise PairError(f"batch_size is {batch_size}; it must be at least 1")
    layout = Layout.of(tokenizer, task, config)
    texts = _neutral_texts(dataset, tokenizer, layout, feature_words, config)
    neutral_rows = _neutral_labels if layout.task == "classification" else _neutral_words
    rows = neutral_rows(texts, layout, config, random.Random(seed))
    return [collate(layout, rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _neutral_words(texts: list[NeutralText], layout: Layout, config: Any, generator: random.Random) -> list[EncodedRow]:
    pool = [text.tokens[i] for text in texts for i in text.words]
    if len(set(pool)) < 2:
        raise PairError("all neutral texts together have fewer than two words that are not feature words; add texts")
    rows = []
    for number, text in enumerate(texts):
        if not (choices := text.words or text.usable):
            raise PairError(f"neutral row {number} has no token that could be predicted; write a longer text")
        at = generator.choice(choices)
        token = other = text.tokens[at]
        while other == token:
            other = generator.choice(pool)
        tail = [] if layout.task == "causal" else text.tokens[at + 1 :]
        rows.append(EncodedRow(Slot(text.tokens[:at], tail), [token], [other]))
    return rows


def _neutral_labels(
    texts: list[NeutralText], layout: Layout, config: Any, generator: random.Random
) -> list[EncodedRow]:
    ids = sorted(set((getattr(config, "label2id", None) or {}).values()))
    if len(ids) < 2:
        raise PairError("classification needs the model's config with two labels or more; pass config=model.config")
    drawn = [generator.sample(ids, 2) for _ in texts]
    return [EncodedRow(Slot(text.tokens, []), [a], [b]) for text, (a, b) in zip(texts, drawn, strict=True)]


class LanguageModelling:
    """Measures how well a model still models neutral texts; they are tokenised once, and can be scored many times.

    * masked: 15 % of the tokens, drawn by seed and never of a feature word, are masked; ``lms`` is the share of these
      that the model gets right, ``loss`` their mean negative log-likelihood;
    * causal: ``loss`` is the mean negative log-likelihood of every token given the tokens before it (the first token
      has none before it and is not scored); ``lms = 1 / (1 + loss)``;
    * seq2seq: the same share of tokens is cut out, and the decoder predicts them: behind their sentinels (T5), or with
      the whole text forced where there is a mask token (BART); ``loss`` is the mean negative log-likelihood of these
      tokens, ``lms = 1 / (1 + loss)``;
    * classification: there is no language to model; ``lms`` is the share of texts to which the model gives the same
      label as when this object was made, ``loss`` the mean negative log-likelihood of those first labels.

    Padding never counts. Texts that are longer than the model's limit, or 512 tokens, are cut into pieces.

    Args:
        reader: A reader of the model (`SlotReader` or `GradientReader`). A call scores the model as it is at that time,
            with the adapters that are active.
        dataset: The data set, with a column ``text``.
        tokenizer: The tokenizer of the model.
        feature_words: The words of all classes, which are never masked.
        batch_size: Texts in each forward pass; texts of similar length go together.
        seed: The seed of the draw of masked tokens.
        mask_draws: How often each text is scored, each time with other tokens masked or cut out: the accuracy on few
            tokens is a noisy measure. Causal models and classification draw no tokens, and ignore it.

    Raises:
        PairError: If there is no text, or no token to score.
    """

    def __init__(
        self,
        reader: SlotReader,
        dataset: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        feature_words: Iterable[str] = (),
        batch_size: int = 32,
        seed: int = 0,
        mask_draws: int = 1,
    ) -> None:
        if batch_size < 1 or mask_draws < 1:
            raise PairError(f"batch_size is {batch_size} and mask_draws {mask_draws}; both must be at least 1")
        self.reader = reader
        config, task = reader.model.config, reader.task
        self.by_hits = task in ("masked", "classification")  # `lms` is a share of tokens or texts, not of the loss
        layout = Layout.of(tokenizer, task, config)
        texts = _neutral_texts(dataset, tokenizer, layout, feature_words, config, in_pieces=True)
        generator = random.Random(seed)
        draws = mask_draws if task in ("masked", "seq2seq") else 1
        rows = [(number, text) for _ in range(draws) for number, text in enumerate(texts)]
        drawn = [(text.tokens, _scored_positions(text, task, generator), number) for number, text in rows]
        kept = [entry for entry in drawn if entry[1] or task == "classification"]
        if not kept:
            raise PairError("no neutral text has a token that could be scored; write longer texts")
        kept.sort(key=lambda entry: len(entry[0]))
        chunks = [kept[start : start + batch_size] for start in range(0, len(kept), batch_size)]
        self.batches = [layout.padded([layout.prediction_row(*entry[:2]) for entry in chunk]) for chunk in chunks]
        # The number of the text, or of the piece of a text, of each row.
        self._texts = [torch.tensor([number for *_, number in chunk], device="cpu") for chunk in chunks]
        if task == "classification":
            with evaluating(reader.model):
                self.batches = [replace(b, tokens=reader.logits(b).argmax(-1).cpu()) for b in self.batches]

    def score(self) -> dict[str, float]:
        """``{"loss": mean negative log-likelihood, "lms": language-modelling score}``, from forward passes only."""
        return self.figures_of(self.by_text())

    def figures_of(self, by_text: Tensor) -> dict[str, float]:
        """The figures of `score`, from the rows that `by_text` returns."""
        loss, hits, count = by_text.sum(0).tolist()
        return {"loss": loss / count, "lms": hits / count if self.by_hits else 1 / (1 + loss / count)}

    def by_text(self) -> Tensor:
        """`(texts, 3)` float64: for each text or piece the negative log-likelihood, right tokens, and scored tokens."""
        found = torch.zeros(1 + max(int(own.max()) for own in self._texts), 3, dtype=torch.float64, device="cpu")
        with evaluating(self.reader.model):
            for filled, texts in zip(self.batches, self._texts, strict=True):
                logits = self.reader.logits(filled)
                tokens = filled.tokens.to(logits.device)
                parts = in_float32(logits, tokens)
                loss = torch.cat([F.cross_entropy(part, goal, reduction="none") for part, goal in parts])
                hits = logits.argmax(-1) == tokens
                each = torch.stack([loss.double(), hits.double(), torch.ones_like(loss).double()], 1).cpu()
                found.index_add_(0, texts[filled.rows.cpu()], each)
        return found[found[:, 2] > 0]


def _scored_positions(text: NeutralText, task: str, generator: random.Random) -> list[int]:
    """The positions of one text that are scored."""
    if task == "causal":
        # Every token except the first, feature words too: the loss on the unchanged text.
        return list(range(text.first + 1, len(text.tokens)))
    count = min(len(text.usable), max(1, round(_MASK_SHARE * len(text.usable))))
    return sorted(generator.sample(text.usable, count))
