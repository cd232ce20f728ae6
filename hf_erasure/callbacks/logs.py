"""What our callbacks share: figures for the Trainer's own log, and a memory that outlives a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from hf_erasure.adapters.common.config import ChildConfig
from hf_erasure.adapters.common.provenance import TRAINING

from .checkpoints import configs_of


class LoggingCallback(TrainerCallback):
    """A callback with figures for the log.

    Attributes:
        adapter_name: The adapter it is about.
        memory: What a resumed training must know, in JSON's types.
        measured_on: What the figures are on, in words; empty where nothing else than training's own rows is read.
    """

    measured_on = ""

    def __init__(self, adapter_name: str, memory: dict[str, Any]) -> None:
        self.adapter_name = adapter_name
        self.memory = memory

    def figures(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        """What to add to the log that is about to be written.

        Args:
            state: Of the Trainer.
            model: Unwrapped.
        """
        raise NotImplementedError

    def logged(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        """The figures, taken without moving the random numbers that training draws; the adapter's card has them too."""
        with torch.random.fork_rng(devices=devices_of(model)):
            found = self.figures(state, model)
        config = configs_of(model).get(self.adapter_name)
        if found and isinstance(config, ChildConfig):
            told = {"step": state.global_step, "figures": found, "measured_on": self.measured_on}
            config.provenance = config.provenance | {TRAINING: told}
        return found

    def remember(self, state: TrainerState) -> None:
        """Let the Trainer keep `memory` in its state, after taking over what a checkpoint has brought.

        `ExportableState` would have the callback built anew from JSON, and its batches are no JSON.
        """
        key = f"{type(self).__name__} {self.adapter_name}"
        self.memory.update(state.stateful_callbacks.get(key, {}))
        state.stateful_callbacks[key] = self.memory


def devices_of(model: nn.Module) -> list[torch.device]:
    """The accelerators that a model is on."""
    return list({p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")})
