"""Figures of a callback in the Trainer's own log.

A callback is told of a log after those that report it, so what it added would be in no report. One wrapper around
`CallbackHandler.on_log` asks for figures before anybody is told.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import CallbackHandler

_MARK = "_hf_erasure_seam"


class LoggingCallback(TrainerCallback):
    """A callback with figures for the log."""

    def figures(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        """What to add to the log that is about to be written.

        Args:
            state: Of the Trainer.
            model: Unwrapped.
        """
        raise NotImplementedError


def install() -> None:
    """Wrap the seam; called again, it puts this wrapper in the place of the former."""
    present = CallbackHandler.on_log
    original = getattr(present, _MARK, present)

    @functools.wraps(original)
    def on_log(self: Any, args: Any, state: Any, control: Any, logs: dict[str, float]) -> Any:
        # Only logs of training: those of an evaluation are on their own.
        for callback in self.callbacks if "loss" in logs else ():
            if isinstance(callback, LoggingCallback):
                added = callback.figures(state, self.model)
                logs.update(added)
                if state.log_history:
                    state.log_history[-1].update(added)
        return original(self, args, state, control, logs)

    setattr(on_log, _MARK, original)
    CallbackHandler.on_log = on_log
