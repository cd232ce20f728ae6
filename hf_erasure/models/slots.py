"""Fills slots with words: the inputs of one forward pass, and the logits at which the words' tokens are predicted.

`Layout` puts words into slots, `SlotInputs` has the inputs of one forward pass, `PairBatch` those for two words in each
slot, and `SlotReader` runs the pass. What stands in the slot depends on the task:

* masked: as many mask tokens as the word has tokens, so both words need the same number of tokens;
* causal: everything before the slot is the input, and the word is read at the positions *before* its tokens, the first
  of which is the last token of the prefix; a longer word's earlier tokens are forced;
* seq2seq, with sentinels (T5): ``<extra_id_0>`` in the encoder's input; the decoder, given its start token and
  ``<extra_id_0>``, predicts the word. With a mask token instead (BART): one mask in the encoder's input; the decoder,
  given the text before the slot, predicts the word;
* classification: there is no slot; the two words are two of the model's own labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from .heads import Task, task_of
from .model import Runner, decoder_ids_from, evaluating, input_device, is_encoder_decoder, positions_of
from .word_tokens import PairError

F = TypeVar("F", bound="SlotInputs")
# The id that stands for no label, which the losses of transformers leave out.
IGNORED = -100
# Tokens: a limit above this means that the tokenizer has no limit.
_NO_LIMIT = 10**9
_SENTINELS = 100  # the number of T5's tokens <extra_id_…>
_CHUNK = 1024  # logits that are turned to float32 at once: 0.5 GB for a vocabulary of 128,000


# ---- one forward pass ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlotInputs:
    """Inputs of one forward pass, and the tokens that are predicted in it."""

    inputs: dict[str, Tensor]  # Named inputs of the model, (batch, seq).
    rows: Tensor  # (labels,) The row of every predicted token.
    positions: Tensor  # (labels,) The position whose logits predict the token; in the decoder's input for seq2seq.
    tokens: Tensor  # (labels,) The token ids, or for classification the label ids.

    @property
    def weights(self) -> Tensor:
        """(labels,) float32: with these weights a sum over tokens is the mean over rows of each row's mean."""
        counts = torch.bincount(self.rows)
        return 1.0 / (counts[self.rows].float() * (counts > 0).sum())

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.inputs["input_ids"])

    def to(self: F, device: torch.device | str) -> F:
        """The same on another device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        parts = {name: getattr(self, name).to(device) for name in ("rows", "positions", "tokens")}
        return replace(self, inputs=inputs, **parts)

    def some_rows(self: F, chosen: Sequence[int]) -> F:
        """The chosen rows, at least one, in their order here."""
        kept = torch.zeros(len(self), dtype=torch.bool, device=self.rows.device)
        kept[list(chosen)] = True
        is_chosen, new_rows = kept[self.rows], kept.long().cumsum(0) - 1
        inputs = {name: value[kept] for name, value in self.inputs.items()}
        rows, tokens = new_rows[self.rows[is_chosen]], self.tokens[is_chosen]
        return replace(self, inputs=inputs, rows=rows, positions=self.positions[is_chosen], tokens=tokens)


@dataclass(frozen=True)
class Row:
    """One row of a forward pass."""

    ids: list[int]  # The (encoder's) input.
    positions: list[int]  # The positions whose logits predict the tokens; in the decoder's input for seq2seq.
    tokens: list[int]  # The predicted tokens: token ids, or one label id.
    decoder: list[int] = field(default_factory=list)  # The decoder's input (seq2seq).


@dataclass(frozen=True)
class Slot:
    """One row without its word: the tokens before and after the word, special tokens included."""

    head: list[int]
    tail: list[int]


@dataclass(frozen=True)
class Layout:
    """How a task puts a word into a slot, and pads the rows."""

    task: Task  # The task of the model.
    pad: int  # The id of the padding token.
    slot_token: int = -1  # The id of the token in the slot: the mask or the first sentinel; -1 if there is none.
    sentinels: tuple[int, ...] = ()  # The ids of ``<extra_id_i>``; empty except for T5's kind of seq2seq.
    start: int = -1  # The id of the decoder's start token (seq2seq), else -1.

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, task: str, config: Any = None) -> Layout:
        """The layout for a tokenizer and a model's config.

        Raises:
            PairError: The task is unknown, or the tokenizer or the config lacks something that the task needs.
        """
        if task not in get_args(Task):
            raise PairError(f"the task is {task!r}; write one of {', '.join(get_args(Task))}")
        layout = cls(task, padding_of(tokenizer, config))  # type: ignore[arg-type]
        if task == "masked":
            if tokenizer.mask_token_id is None:
                raise PairError("the tokenizer has no mask token, so it is not one of a masked language model")
            return replace(layout, slot_token=tokenizer.mask_token_id)
        if task != "seq2seq":
            return layout
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            raise PairError(
                "seq2seq needs the model's config with its decoder_start_token_id; pass config=model.config"
            )
        known, names = tokenizer.get_vocab(), [f"<extra_id_{number}>" for number in range(_SENTINELS)]
        sentinels = [known[name] for name in names if name in known]
        if not sentinels and tokenizer.mask_token_id is None:
            raise PairError("the tokenizer has neither <extra_id_0> nor a mask token, so a slot cannot be marked")
        slot_token = sentinels[0] if sentinels else tokenizer.mask_token_id
        return replace(layout, slot_token=slot_token, sentinels=tuple(sentinels), start=start)

    def fill(self, slots: Sequence[Slot], words: Sequence[Sequence[int]]) -> SlotInputs:
        """Put one word (its tokens, or one label id) into every slot; rows are padded to the longest."""
        return self.padded([self._row(slot, list(word)) for slot, word in zip(slots, words, strict=True)])

    def _row(self, slot: Slot, word: list[int]) -> Row:
        head, before = slot.head, len(slot.head)
        steps, forced = range(len(word)), word[:-1]
        if self.task == "masked":
            return Row([*head, *[self.slot_token] * len(word), *slot.tail], [before + step for step in steps], word)
        if self.task == "causal":
            return Row([*head, *forced], [before - 1 + step for step in steps], word)
        if self.task == "classification":
            return Row(head, [0], word)
        given = [self.slot_token] if self.sentinels else head
        target = [self.start, *given, *forced]
        return Row([*head, self.slot_token, *slot.tail], [len(given) + step for step in steps], word, target)

    def prediction_row(self, ids: Sequence[int], places: Sequence[int]) -> Row:
        """The row that predicts the tokens at some places of a text; they are hidden, except for causal models."""
        if self.task == "classification":
            return Row(list(ids), [0], [0])
        places = places[: len(self.sentinels)] if self.sentinels else places
        tokens = [ids[place] for place in places]
        if self.task == "causal":
            # The token at a place is predicted by the logits at the place before it.
            return Row(list(ids), [place - 1 for place in places], tokens)
        slot_tokens = self.sentinels or (self.slot_token,) * len(places)
        source, target = list(ids), [self.start]
        for place, slot_token in zip(places, slot_tokens, strict=False):
            source[place] = slot_token
            target += [slot_token, ids[place]]
        if self.task == "masked":
            return Row(source, list(places), tokens)
        if not self.sentinels:
            return Row(source, list(places), tokens, [self.start, *ids[:-1]])
        # The start, then (sentinel, token) pairs: a token is predicted at its sentinel, so the last token is left out.
        return Row(source, [1 + 2 * step for step in range(len(places))], tokens, target[:-1])

    def padded(self, rows: Sequence[Row]) -> SlotInputs:
        """Rows as tensors, with a mask and the other inputs that the model needs."""
        named = padded_inputs([row.ids for row in rows], self.pad)
        owners = torch.tensor([number for number, row in enumerate(rows) for _ in row.tokens])
        at = torch.tensor([position for row in rows for position in row.positions])
        if self.task == "seq2seq":
            named["decoder_input_ids"] = padded_inputs([row.decoder for row in rows], self.pad)["input_ids"]
        return SlotInputs(named, owners, at, torch.tensor([token for row in rows for token in row.tokens]))


def padding_of(tokenizer: PreTrainedTokenizerBase, config: Any) -> int:
    """The padding token of the tokenizer or the model; if they have none, any token, since padding is masked out."""
    pads = (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), tokenizer.eos_token_id)
    return next((pad for pad in pads if isinstance(pad, int)), 0)


def longest_input(tokenizer: PreTrainedTokenizerBase, config: Any, most: int | None = None) -> int | None:
    """The longest input in tokens: the least limit of the tokenizer, the config and `most`; None without a limit."""
    of_text = getattr(config, "text_config", None)
    limits = [tokenizer.model_max_length, positions_of(config) or positions_of(of_text)]
    usable = [limit for limit in limits if limit and 0 < limit < _NO_LIMIT]
    return min([*usable, *([] if most is None else [most])], default=None)


def padded_inputs(rows: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    """Rows of token ids as a model's inputs, `(rows, longest row)`.

    They are padded at the right, whichever side the tokenizer names: the positions before the padding keep their
    numbers, and under a causal mask they do not see it.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    return {"input_ids": ids, "attention_mask": mask.long()}


# ---- two words for each slot -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairBatch(SlotInputs):
    """Rows of one class, with the factual words in the slots; one gradient is taken of their mean loss.

    Attributes:
        tokens: (labels,) Token ids (classification: label ids) of the factual words, also called `factual`.
        counterfactual: (labels,) The ids of the counterfactual words; aligned with `tokens` unless `apart` is set.
        label: Class id of the rows; `None` for neutral texts.
        other: Class id of the counterfactual words; `None` for neutral texts.
        apart: A forward pass for the counterfactual words alone, if one pass cannot serve both words: a causal or
            seq2seq model is given the earlier tokens of a word of several tokens.
        layout: How words are put into the slots; `None` if the slots are not known.
        slots: One slot for each row, without words.
    """

    counterfactual: Tensor
    label: int | None = None
    other: int | None = None
    apart: SlotInputs | None = field(default=None, repr=False)
    layout: Layout | None = field(default=None, repr=False)
    slots: tuple[Slot, ...] = field(default=(), repr=False)

    @property
    def factual(self) -> Tensor:
        """(labels,) Token ids of the factual words."""
        return self.tokens

    def some_rows(self, chosen: Sequence[int]) -> PairBatch:
        """The chosen rows, at least one, in their order here."""
        apart = None if self.apart is None else self.apart.some_rows(chosen)
        is_chosen = torch.isin(self.rows, torch.tensor(list(chosen), device=self.rows.device))
        counterfactual = self.counterfactual[is_chosen] if apart is None else apart.tokens
        slots = tuple(slot for row, slot in enumerate(self.slots) if row in chosen)
        return replace(super().some_rows(chosen), counterfactual=counterfactual, apart=apart, slots=slots)


@dataclass(frozen=True)
class EncodedRow:
    """One encoded row: its slot, both words' tokens, and its classes."""

    slot: Slot
    factual: list[int]
    counterfactual: list[int]
    label: int | None = None
    other: int | None = None


def collate(layout: Layout, rows: Sequence[EncodedRow]) -> PairBatch:
    """Rows of one class (and of one counterfactual class) as one batch."""
    slots = tuple(row.slot for row in rows)
    factual = layout.fill(slots, [row.factual for row in rows])
    shared = layout.task in ("masked", "classification") or all(
        len(row.factual) == len(row.counterfactual) and row.factual[:-1] == row.counterfactual[:-1] for row in rows
    )
    apart = None if shared else layout.fill(slots, [row.counterfactual for row in rows])
    other = torch.tensor([token for row in rows for token in row.counterfactual])
    return PairBatch(**vars(factual), counterfactual=other, label=rows[0].label, other=rows[0].other, apart=apart,
                     layout=layout, slots=slots)  # fmt: skip


def as_pair_batch(batch: dict[str, Tensor], model: nn.Module, task: str, source: str) -> PairBatch:
    """Turn a batch of model inputs with `labels` into a `PairBatch` that has the factual side only.

    Labels are `(batch, seq)` token ids with −100 where nothing is predicted (at the place of the predicted token, as in
    transformers for causal models too), or `(batch,)` label ids of a classifier. An encoder-decoder makes the inputs of
    its decoder; `source` is the gradient that the adapter reads. Raises a `ValueError` if there are no labels, a row
    has none, or the adapter reads more than the factual gradient.
    """
    if source != "factual":
        raise ValueError(
            f"The adapter reads the {source!r} gradient, which needs more than labels: pass a batch of pair_batches()."
        )
    if "labels" not in batch:
        raise ValueError("The batch has no `labels`, which the loss and its gradient need; add them, or pass pairs.")
    inputs, labels = {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and "input_ids" in inputs and "position_ids" not in inputs:
        # Padding goes to the right: at the left it moves the positions of models that count from the first token.
        first = mask.bool().long().argmax(1, keepdim=True)
        at = (torch.arange(mask.shape[1], device=mask.device) + first) % mask.shape[1]
        moved = {name for name in inputs if name[:8] != "decoder_" and inputs[name].shape == mask.shape}
        inputs = {name: value.gather(1, at) if name in moved else value for name, value in inputs.items()}
        labels = labels.gather(1, at) if task in ("masked", "causal") else labels
    if task == "classification":
        labels = labels.reshape(-1, 1)
    elif task == "seq2seq" and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = decoder_ids_from(labels, model)
    rows, at = (labels != IGNORED).nonzero(as_tuple=True)
    if task == "causal":
        rows, at = rows[at > 0], at[at > 0]  # the first token has no token before it that predicts it
    if len(rows.unique()) != len(labels):
        raise ValueError("Some rows of `labels` are −100 everywhere: each row needs a token to predict.")
    tokens = labels[rows, at]
    return PairBatch(inputs, rows, at - 1 if task == "causal" else at, tokens, counterfactual=tokens)


# ---- the reader ------------------------------------------------------------------------------------------------------


class SlotReader:
    """Reads the logits and log-probabilities of a model at slots, without gradients.

    The head runs on the predicted positions only: the last hidden state is cut down to them before the head.

    Args:
        model: A model with a head, bare or wrapped in a `PeftModel`. Active adapters take part.
        task: The task of the model; by default `task_of(model)`.

    Raises:
        ValueError: The model has no usable head.
    """

    def __init__(self, model: nn.Module, task: Task | None = None) -> None:
        self._runner = Runner(model)
        self.model: Any = self._runner.model
        self.task: Task = task_of(self.model) if task is None else task
        # The module whose last hidden state the head reads; the model itself if it has no such part.
        self._backbone: Any = self.model.get_decoder() if is_encoder_decoder(self.model) else self._runner.backbone

    @property
    def device(self) -> torch.device:
        """The device for inputs."""
        return input_device(self.model)

    def word_log_probabilities(self, batch: PairBatch, words: Sequence[Sequence[int]]) -> Tensor:
        """The log-probability of each of some words in the slot of every row, (batch, words) float32.

        Words are lists of token ids (`word_tokens`), not empty; for classification each is one label id. A word of
        several tokens gets the sum over its tokens. Words of one token share one forward pass. For a masked model the
        tokens of a longer word are masked at once, and words of the same length share a forward pass.
        """
        if batch.layout is None:
            raise ValueError("the batch has no slots to put words in; make it with pair_batches")
        found = torch.empty(len(batch), len(words), device=self.device)
        groups: dict[Any, list[int]] = {}  # the words that one forward serves
        for index, word in enumerate(words):
            groups.setdefault(len(word) if self.task == "masked" else tuple(word[:-1]), []).append(index)
        with evaluating(self.model):
            for group in groups.values():
                filled = batch.layout.fill(batch.slots, [words[group[0]]] * len(batch))
                scores = self.logits(filled).float().log_softmax(-1).view(len(batch), len(words[group[0]]), -1)
                for index in group:
                    tokens = torch.tensor(words[index], device=scores.device)
                    chosen = scores.gather(2, tokens.expand(len(batch), -1)[..., None])
                    found[:, index] = chosen[..., 0].sum(1)
        return found

    def logits(self, filled: SlotInputs) -> Tensor:
        """Run one forward pass: the logits of the predicted tokens, (labels, vocabulary or classes), in its dtype.

        The caller sets the gradient mode and the training flags.
        """
        filled = filled.to(self.device)
        with self._states_at_slots(filled) as was_cut:
            output = self._runner(filled.inputs, self.model)
        logits = output.get("logits") if isinstance(output, (dict, ModelOutput)) else output[0]
        if not isinstance(logits, Tensor):
            raise ValueError(f"{type(self.model).__name__} returns no logits: load the model with its head.")
        if self.task == "classification":
            return logits[filled.rows]
        source = filled.inputs.get("decoder_input_ids", filled.inputs["input_ids"])
        # A head may read another output of the backbone than its last hidden state, such as ProphetNet's streams.
        if was_cut and logits.shape[:2] == (1, len(filled.rows)):
            return logits[0]
        if logits.shape[:2] != source.shape:
            raise ValueError(
                f"{type(self.model).__name__} returns logits of shape {tuple(logits.shape)} for tokens of shape "
                f"{tuple(source.shape)}, so it is not known which logits belong to which token."
            )
        return logits[filled.rows, filled.positions]

    @contextmanager
    def _states_at_slots(self, filled: SlotInputs) -> Iterator[list[bool]]:
        """While open, the backbone returns its last hidden state at the predicted positions only, (1, labels, width).

        The list that it yields stays empty if that has not happened: the backbone was not called as a module, or its
        hidden state does not have the shape of the input. The caller then picks the rows from the logits, and also does
        so if the shape of the logits shows that the head read another output.
        """
        was_cut: list[bool] = []
        source = filled.inputs.get("decoder_input_ids", filled.inputs["input_ids"])

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            keyed = isinstance(output, (dict, ModelOutput))
            hidden = output.get("last_hidden_state") if keyed else output[0]
            if not isinstance(hidden, Tensor) or hidden.shape[:2] != source.shape or hidden.dim() != 3:
                return None
            rows = hidden[filled.rows.to(hidden.device), filled.positions.to(hidden.device)][None]
            if rows.shape == hidden.shape:  # the shape of the logits could not show what the head has read
                return None
            was_cut.append(True)
            if not keyed:
                return (rows, *output[1:])
            output["last_hidden_state"] = rows
            return output

        apart = isinstance(self._backbone, nn.Module) and self._backbone is not self.model
        handle = self._backbone.register_forward_hook(hook) if apart and self.task != "classification" else None
        try:
            yield was_cut
        finally:
            if handle is not None:
                handle.remove()


def in_float32(logits: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split `(labels, vocabulary)` logits into parts of some rows, as float32, each with the tokens of its rows."""
    return ((part.float(), goal) for part, goal in zip(logits.split(_CHUNK), tokens.split(_CHUNK), strict=True))
