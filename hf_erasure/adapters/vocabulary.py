"""Weights with a row for each token, of which two models may have different numbers: tokens were added or removed.

`resize_token_embeddings` makes new rows at random, around the mean of the others, so that they differ from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# New rows that differ from others by at most this share of the spread of the weight: both are the mean of the old ones.
_NEARLY = 1e-2


def token_weights(model: nn.Module) -> set[str]:
    """The names of the weights with a row for each token; none of a model without tokens."""
    layers: list[Any] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        find: Any = getattr(model, getter, None)
        try:
            layer = find() if find is not None else None
        except (NotImplementedError, AttributeError):
            continue
        layers.append(getattr(layer, "base_layer", layer))
    layers = [layer for layer in layers if isinstance(layer, (nn.Embedding, nn.Linear))]
    counts = {layer.weight.shape[0] for layer in layers if isinstance(layer.weight, Tensor)}
    own = {id(parameter) for layer in layers for parameter in layer._parameters.values() if parameter is not None}
    found = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0]
        is_another = isinstance(model.get_submodule(path), nn.Embedding) and parameter.shape[0] in counts
        if id(parameter) in own or is_another:
            found.add(name.replace(".base_layer.", "."))
    return found


def first_new_row(rows: Tensor, differ: Tensor, change: Tensor) -> int | None:
    """The row from which on two weights differ since their rows were made anew; None where that is not the reason.

    All rows before it are the same, and after it all differ, or by next to nothing.

    Args:
        rows: `(n,)`, the row of each sampled value.
        differ: `(n,)` bool.
        change: `(n,)`, the difference of the values in units of the weight's spread.
    """
    if not bool(differ.any()):
        return None
    first = int(rows[differ].min())
    later = rows >= first
    if bool(later.all()) or not (bool(differ[later].all()) or bool((change[later].abs() <= _NEARLY).all())):
        return None
    return first


def row_size(shape: list[int]) -> int:
    """How many values a row of a weight has."""
    return max(1, int(torch.Size(shape[1:]).numel()))
