"""The base model's own gradients, whatever an adapter is steered to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_erasure.adapters import GradiendConfig, gradiend_layers, steer


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
    peft_config: dict[str, Any] = model.peft_config  # type: ignore[assignment]
    config: GradiendConfig = peft_config[adapter_name]
    if not config.fitted:  # it has no effect
        yield
        return
    rate = config.learning_rate
    steer(model, adapter_name, learning_rate=0.0)
    try:
        yield
    finally:
        steer(model, adapter_name, learning_rate=rate)
