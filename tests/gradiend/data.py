"""Named gradients that the tests of the feature neuron share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_erasure.gradiend import FeatureDecoder
from hf_erasure.gradiend.features import dense

SHAPES = {"embed": (40, 16), "norm": (16,), "up": (32, 16), "bias": (32,), "scale": (1,)}
N = 40 * 16 + 16 + 32 * 16 + 32 + 1


def gradients(seed: int, sign: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Noise, with a direction common to all seeds added `sign` times."""
    noise, common = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10**6)
    return {
        name: torch.randn(shape, generator=noise) + 0.5 * sign * torch.randn(shape, generator=common)
        for name, shape in shapes.items()
    }


def joined(blocks: Mapping[str, Tensor]) -> Tensor:
    """`(n,)`: the blocks one after the other, in the order of `SHAPES`."""
    return torch.cat([blocks[name].reshape(-1) for name in SHAPES])


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two dictionaries hold the same numbers, to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_feature(a, b) -> bool:
    """Whether two features are the same to the bit."""
    scalars = ("scale", "bias", "activation", "unit_norm")
    return (
        equal(a.encoder.weight, b.encoder.weight)
        and equal(a.decoder.weight, b.decoder.weight)
        and equal(a.decoder.bias, b.decoder.bias)
        and all(getattr(a.encoder, name) == getattr(b.encoder, name) for name in scalars)
    )


def decode(decoder: FeatureDecoder, h: float) -> dict[str, Tensor]:
    """Name to dense float32 `h · Wd + bd` in the shape of the block, zero outside the kept entries."""
    decoded = {}
    for name, shape in decoder.shapes.items():
        values = torch.add(decoder.bias[name], decoder.weight[name], alpha=h)
        decoded[name] = dense(values, decoder.index[name], shape.numel()).view(shape)
    return decoded
