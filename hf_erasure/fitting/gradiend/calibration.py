"""Encoders whose values mean the same whatever they were fitted on: ±0.9 for a class, in the mean over its texts.

The gradient of one text points less clearly than the mean gradient of a batch, and an encoder reduced to its largest
entries gives smaller inner products. Either would bring values nearer to 0 than those of the fit; a factor and an
offset put them back. The correlation of pre-activations with the classes does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from hf_erasure.gradiend import FeatureEncoder
from hf_erasure.gradiend.closed_form import CLASS_MEAN

Gradients = dict[str, Tensor]
# So many pairs of each class are read again: enough for two means.
ENOUGH = 24


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
    (dense_up, sparse_up), (dense_down, sparse_down) = _means((encoder, sparse), positive, negative)
    factor = (dense_up - dense_down) / (sparse_up - sparse_down) if sparse_up != sparse_down else math.inf
    if not math.isfinite(factor) or factor == 0:
        raise ValueError(
            f"The {sparse.count} entries that density={density} leaves of the encoder do not tell the classes apart: "
            "give GradiendConfig a larger density, or keep_encoder=False."
        )
    # scale · (factor · (x − mean of the sparse) + mean of the dense), written as scale' · (⟨w, g⟩ + bias').
    offset = dense_up / factor - sparse_up
    return replace(sparse, scale=encoder.scale * factor, bias=sparse.bias + offset)


def centred(
    encoder: FeatureEncoder, positive: Iterable[Callable[[], Gradients]], negative: Iterable[Callable[[], Gradients]]
) -> FeatureEncoder:
    """Bring the class means of the pre-activation to where tanh is ±0.9.

    Args:
        encoder: Of the closed form.
        positive: Give gradients of class 0, of what will be encoded.
        negative: Give gradients of class 1.

    Returns:
        The encoder with another scale and bias; `encoder` itself where the classes come out the wrong way about, which
        no scale can mend.
    """
    (up,), (down,) = _means((encoder,), positive, negative)
    if not up > down:
        return encoder
    return replace(encoder, scale=2 * math.atanh(CLASS_MEAN) / (up - down), bias=encoder.bias - (up + down) / 2)


def _means(
    encoders: tuple[FeatureEncoder, ...],
    positive: Iterable[Callable[[], Gradients]],
    negative: Iterable[Callable[[], Gradients]],
) -> list[list[float]]:
    """Each encoder's mean `⟨w, g⟩ + bias` over the gradients of either class."""
    linear = [_linear(encoder) for encoder in encoders]
    means = []
    for group in (positive, negative):
        rows = [[encoder.encode(g) for encoder in linear] for g in (read() for read in group)]
        means.append([sum(column) / len(rows) for column in zip(*rows, strict=True)])
    return means


def _linear(encoder: FeatureEncoder) -> FeatureEncoder:
    """The encoder without its activation and scale: `⟨w, g⟩ + bias`."""
    return replace(encoder, scale=1.0, activation="identity")
