"""Batches for reading a feature: cut into rows, or made of a batch with labels as transformers' losses take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .pairs import Filled, PairBatch

IGNORED = -100


def single_rows(batch: PairBatch) -> Iterator[PairBatch]:
    """Every row of a batch as a batch of its own."""
    for row in range(batch.size):
        yield some_rows(batch, [row])


def some_rows(batch: PairBatch, chosen: Sequence[int]) -> PairBatch:
    """The chosen rows of a batch, at least one, in their order there."""
    kept = torch.zeros(batch.size, dtype=torch.bool)
    kept[list(chosen)] = True
    filled = _subset(batch.filled, kept)
    apart = None if batch.apart is None else _subset(batch.apart, kept)
    template = None
    if batch.template is not None:
        slots = tuple(slot for slot, keep in zip(batch.template.slots, kept.tolist(), strict=True) if keep)
        template = replace(batch.template, slots=slots)
    return replace(
        batch,
        inputs=filled.inputs,
        rows=filled.rows,
        positions=filled.positions,
        factual=filled.tokens,
        counterfactual=batch.counterfactual[kept[batch.rows]] if apart is None else apart.tokens,
        apart=apart,
        template=template,
    )


def as_pair_batch(batch: dict[str, Tensor], model: nn.Module, task: str, source: str) -> PairBatch:
    """A batch of model inputs with `labels`, as one that has the factual side only.

    Args:
        batch: `input_ids`, `attention_mask`, … and `labels`: `(batch, seq)` token ids with −100 where nothing is
            predicted (in the place of the predicted token, as transformers has it for causal models too), or
            `(batch,)` label ids of a classifier.
        model: Makes the decoder's inputs of an encoder-decoder.
        task: As of `task_of`.
        source: What the adapter reads.

    Raises:
        ValueError: If there are no labels, a row has none, or the adapter reads more than the factual gradient.
    """
    if source != "factual":
        raise ValueError(
            f"The adapter reads the {source!r} gradient, which labels alone do not give: pass a batch of "
            "pair_batches()."
        )
    if "labels" not in batch:
        raise ValueError("The batch has no `labels`, of whose loss the gradient is taken; add them, or pass pairs.")
    inputs, labels = {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if task == "classification":
        labels = labels.reshape(-1, 1)
    elif task == "seq2seq" and "decoder_input_ids" not in inputs:
        bare: Any = model
        inputs["decoder_input_ids"] = bare.prepare_decoder_input_ids_from_labels(labels=labels)
    rows, at = (labels != IGNORED).nonzero(as_tuple=True)
    if task == "causal":
        rows, at = rows[at > 0], at[at > 0]  # nothing stands before the first token
    if len(rows.unique()) != len(labels):
        raise ValueError("Some rows of `labels` are −100 throughout: each row needs a token to predict.")
    tokens = labels[rows, at]
    return PairBatch(inputs, rows, at - 1 if task == "causal" else at, factual=tokens, counterfactual=tokens)


def _subset(filled: Filled, kept: Tensor) -> Filled:
    mine = kept[filled.rows]
    moved = kept.long().cumsum(0) - 1
    inputs = {name: value[kept] for name, value in filled.inputs.items()}
    return Filled(inputs, moved[filled.rows[mine]], filled.positions[mine], filled.tokens[mine])
