"""Sparse encoders that read on the scale of the dense one.

An encoder reduced to its largest entries gives smaller inner products, so that values which were near ±1 would drift
towards 0. A factor and an offset that match the means of both classes on training pairs put them back; the correlation
with the classes does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from hf_erasure.gradiend import FeatureEncoder

Gradients = dict[str, Tensor]
# So many pairs of each class are read again: enough for two means.
ENOUGH = 64


def calibrated(
    encoder: FeatureEncoder,
    density: float,
    positive: Iterable[Callable[[], Gradients]],
    negative: Iterable[Callable[[], Gradients]],
) -> FeatureEncoder:
    """Prune an encoder and match the class means of its pre-activation to those before.

    Args:
        encoder: Dense.
        density: The share of entries to keep.
        positive: Give gradients of class 0.
        negative: Give gradients of class 1.

    Returns:
        The sparse encoder; `encoder` itself where nothing is pruned.

    Raises:
        ValueError: If the kept entries do not tell the classes apart.
    """
    sparse = encoder.prune(density)
    if sparse is encoder:
        return encoder
    before, after = _linear(encoder), _linear(sparse)
    means = []
    for group in (positive, negative):
        rows = [(before.encode(g), after.encode(g)) for g in (read() for read in group)]
        means.append([sum(column) / len(rows) for column in zip(*rows, strict=True)])
    (dense_up, sparse_up), (dense_down, sparse_down) = means
    factor = (dense_up - dense_down) / (sparse_up - sparse_down) if sparse_up != sparse_down else math.inf
    if not math.isfinite(factor) or factor == 0:
        raise ValueError(
            f"The {sparse.count} entries that density={density} leaves of the encoder do not tell the classes apart: "
            "give GradiendConfig a larger density, or keep_encoder=False."
        )
    # scale · (factor · (x − mean of the sparse) + mean of the dense), written as scale' · (⟨w, g⟩ + bias').
    offset = dense_up / factor - sparse_up
    return replace(sparse, scale=encoder.scale * factor, bias=sparse.bias + offset)


def _linear(encoder: FeatureEncoder) -> FeatureEncoder:
    """The encoder without its activation and scale: `⟨w, g⟩ + bias`."""
    return replace(encoder, scale=1.0, activation="identity")
