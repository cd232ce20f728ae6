"""Forward passes whose head runs at chosen positions only, over any architecture."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from .heads import Task, task_of
from .model import bare_model, evaluating, input_device, is_encoder_decoder
from .slots import Filled, PairBatch

_ROWS = 1024  # logits that are turned to float32 at once: 0.5 GB for a vocabulary of 128,000


class SlotReader:
    """Reads logits and log-probabilities at slots off a model, without gradients.

    The head runs on the predicted positions only: the last hidden state is cut down to these rows on its way to it.

    Args:
        model: With a head; bare or wrapped in a `PeftModel`. Adapters that are active take part.
        task: By default `task_of(model)`.

    Raises:
        ValueError: The model has no usable head.
    """

    def __init__(self, model: nn.Module, task: Task | None = None) -> None:
        self.model: Any = bare_model(model)
        self.task: Task = task_of(self.model) if task is None else task
        self._backbone = _backbone(self.model)
        taken = inspect.signature(self.model.forward).parameters
        self._takes = None if any(p.kind is p.VAR_KEYWORD for p in taken.values()) else set(taken)
        self._known = set(taken)
        self._extra = {"use_cache": False} if "use_cache" in taken else {}

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return input_device(self.model)

    def word_log_probabilities(self, batch: PairBatch, words: Sequence[Sequence[int]]) -> Tensor:
        """How likely each of some words is in the slot of every row.

        Args:
            batch: Rows of any class.
            words: Token ids of each word (`word_tokens`); for classification one label id each.

        Returns:
            (batch, words) Log-probabilities, float32; a word of several tokens has the sum of theirs. Words of one
            token share one forward. For a masked model the tokens of a longer word are masked at once, and words of
            the same length share a forward.

        Raises:
            ValueError: A word has no token, or the batch has no template to put longer words in.
        """
        if not all(len(word) for word in words):
            raise ValueError("a word has no tokens; give token ids for every word")
        found = torch.empty(len(batch), len(words), device=self.device)
        with evaluating(self.model):
            for group in self._forwards(words):
                word = words[group[0]]
                if batch.template is not None:
                    filled = batch.template.fill(word)
                elif len(batch.rows) == len(batch) and len(word) == 1:
                    filled = batch.filled
                else:
                    raise ValueError(
                        "the batch has no template, so only words of one token fit it; make it with pair_batches"
                    )
                scores = self.logits(filled).float().log_softmax(-1).view(len(batch), len(word), -1)
                for index in group:
                    tokens = torch.tensor(words[index], device=scores.device)
                    chosen = scores.gather(2, tokens.expand(len(batch), -1)[..., None])
                    found[:, index] = chosen[..., 0].sum(1)
        return found

    def logits(self, filled: Filled) -> Tensor:
        """One forward pass: the logits of the predicted tokens, (labels, vocabulary or classes), in the model's dtype.

        It leaves gradient mode and training flags to the caller.
        """
        filled = filled.to(self.device)
        inputs = {k: v for k, v in filled.inputs.items() if self._takes is None or k in self._takes}
        if "token_type_ids" not in self._known:
            inputs.pop("token_type_ids", None)
        if self.task == "classification":
            return _logits_of(self.model(**inputs, **self._extra))[filled.rows]
        with _gathered(self._backbone, filled) as done:
            logits = _logits_of(self.model(**inputs, **self._extra))
        return logits[0] if done else logits[filled.rows, filled.positions]

    def _forwards(self, words: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices of the words, grouped by the forward that serves them."""
        groups: dict[Any, list[int]] = {}
        for index, word in enumerate(words):
            given = len(word) if self.task == "masked" else tuple(word[:-1])
            groups.setdefault(given, []).append(index)
        return list(groups.values())


def _backbone(model: Any) -> nn.Module | None:
    """The module whose last hidden state the head reads; `None` where it cannot be told from the model."""
    found = model.get_decoder() if is_encoder_decoder(model) else getattr(model, "base_model", None)
    return found if isinstance(found, nn.Module) and found is not model else None


@contextmanager
def _gathered(backbone: nn.Module | None, filled: Filled) -> Iterator[list[bool]]:
    """While open, the backbone returns its last hidden state at the predicted positions only, (1, labels, width).

    The list that it gives is empty unless that has happened: a backbone may not be called as a module, or its hidden
    state may not have the shape of the input, and then the caller picks the rows from the logits.
    """
    done: list[bool] = []
    source = filled.inputs.get("decoder_input_ids", filled.inputs["input_ids"])

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        keyed = isinstance(output, (dict, ModelOutput))
        hidden = output.get("last_hidden_state") if keyed else output[0]
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != source.shape or hidden.dim() != 3:
            return None
        rows = hidden[filled.rows.to(hidden.device), filled.positions.to(hidden.device)][None]
        done.append(True)
        if not keyed:
            return (rows, *output[1:])
        output["last_hidden_state"] = rows
        return output

    handle = None if backbone is None else backbone.register_forward_hook(hook)
    try:
        yield done
    finally:
        if handle is not None:
            handle.remove()


def _logits_of(output: Any) -> Tensor:
    found = output.get("logits") if isinstance(output, (dict, ModelOutput)) else output[0]
    if not isinstance(found, Tensor):
        raise ValueError("the model returns no logits")
    return found


def in_float32(logits: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of `(labels, vocabulary)` logits at a time, as float32, with the tokens that belong to them."""
    return ((part.float(), goal) for part, goal in zip(logits.split(_ROWS), tokens.split(_ROWS), strict=True))
