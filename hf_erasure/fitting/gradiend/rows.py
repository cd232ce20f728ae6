"""Batches for reading a feature: cut into rows, or made of a batch with labels as transformers' losses take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .pairs import Filled, PairBatch

IGNORED = -100


def single_rows(batch: PairBatch) -> Iterator[PairBatch]:
    """Every row of a batch as a batch of its own."""
    for row in range(batch.size):
        filled = _row(batch.filled, row)
        apart = None if batch.apart is None else _row(batch.apart, row)
        counterfactual = batch.counterfactual[batch.rows == row] if apart is None else apart.tokens
        yield replace(
            batch,
            inputs=filled.inputs,
            rows=filled.rows,
            positions=filled.positions,
            factual=filled.tokens,
            counterfactual=counterfactual,
            apart=apart,
            template=None,
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


def _row(filled: Filled, row: int) -> Filled:
    mine = filled.rows == row
    inputs = {name: value[row : row + 1] for name, value in filled.inputs.items()}
    return Filled(inputs, filled.rows[mine] - row, filled.positions[mine], filled.tokens[mine])
