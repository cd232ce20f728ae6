"""How well a model still models language that says nothing about the feature (arXiv 2502.01406, section 5)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from hf_erasure.fitting.running import evaluating

from .batches import Filled, Layout, Slot
from .forwards import SlotReader
from .neutral import NeutralTexts, neutral_length
from .words import PairError

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
