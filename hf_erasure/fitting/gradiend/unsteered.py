"""The base model's own gradients, whatever an adapter is steered to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_erasure.adapters import GradiendConfig, gradiend_layers, steer
from hf_erasure.adapters.lookup import adapter_of


@contextmanager
def unsteered(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Let an adapter have no effect for a while.

    Raises:
        ValueError: If it is merged.
    """
    if any(adapter_name in layer.merged_adapters for layer in gradiend_layers(model, adapter_name).values()):
        raise ValueError(
            f"The adapter {adapter_name!r} is merged into the weights, whose gradients are not those of the base "
            "model: call unmerge_adapter() first."
        )
    config = adapter_of(model, adapter_name, GradiendConfig).config
    if not config.fitted:  # it has no effect
        yield
        return
    rate = config.learning_rate
    steer(model, adapter_name, learning_rate=0.0)
    try:
        yield
    finally:
        steer(model, adapter_name, learning_rate=rate)
