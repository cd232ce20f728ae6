"""What Trainer saves and loads of a model with adapters of ours, where it offers callbacks no event.

Two methods of Trainer are wrapped for every program: `train` and `_save`. A trainer whose model has adapters of ours
gets, when one of them is called, methods of its own in the place of a few others; see `OWN_METHODS`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback

from hf_erasure.adapters.common.layer import adapter_children, child_configs
from hf_erasure.adapters.saved_tensors import refuse_loss
from hf_erasure.hub.pushing import create_model_card, write_pushed_card

from .checkpoints import is_lost, load_trained, own_trained, save_adapters, saving_all, several_active
from .checks import is_sharded, warn_of_what_is_left_out
from .logs import LoggingCallback


class _Figures(TrainerCallback):
    """The first callback while a trainer trains: it asks ours for figures before anybody is told of a log."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        # Only logs of training: those of an evaluation are on their own.
        if logs is None or "loss" not in logs:
            return
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, LoggingCallback):
                added = callback.logged(state, self.trainer.callback_handler.model)
                logs.update(added)
                if state.log_history:
                    state.log_history[-1].update(added)


def train(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`Trainer.train`: it says first what its saves would lose, and logs what our callbacks measure."""
    if not _saves_all(trainer):
        if trainer.args.save_strategy != "no" and isinstance(trainer.model, (PreTrainedModel, PeftModel)):
            refuse_loss(trainer.model)  # its first save would
        warn_of_what_is_left_out(trainer.model)
    _give_own_methods(trainer)
    callbacks = trainer.callback_handler.callbacks
    if not any(isinstance(callback, LoggingCallback) for callback in callbacks):
        return original(*args, **kwargs)
    figures = _Figures(trainer)
    callbacks.insert(0, figures)
    try:
        return original(*args, **kwargs)
    finally:
        trainer.callback_handler.callbacks.remove(figures)


def save(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """`Trainer._save`, which saves the active adapter alone: all that training changes."""
    _give_own_methods(trainer)
    if _saves_all(trainer):
        if is_lost(trainer.model):
            with saving_all(trainer.model):
                return original(*args, **kwargs)
    elif child_configs(trainer.model) and own_trained(trainer.model):
        warnings.warn(
            f"{len(own_trained(trainer.model))} weights of the model itself are trained, but Trainer saves only the "
            "adapter of a model that has one. Give Trainer a ConceptErasureCallback or a GradiendCallback, with which "
            "it saves both, or delete the adapter before you save.",
            stacklevel=4,
        )
    return original(*args, **kwargs)


# ---- methods of one trainer ------------------------------------------------------------------------------------------


def load_from_checkpoint(original: Callable, trainer: Any, folder: str, model: Any = None) -> None:
    """What training goes on from."""
    if _saves_all(trainer):
        load_trained(trainer.model if model is None else model, Path(folder))
    else:
        original(folder, model)


def load_best_model(original: Callable, trainer: Any) -> None:
    """What `load_best_model_at_end` asks for."""
    if _saves_all(trainer):
        load_trained(trainer.model, Path(trainer.state.best_model_checkpoint))
    else:
        original()


def push_from_checkpoint(original: Callable, trainer: Any, folder: str) -> None:
    """Trainer copies the files that it knows from a checkpoint before it pushes them, and no folders and no card."""
    if trainer.is_world_process_zero():
        if _saves_all(trainer):
            places = [name for name in child_configs(trainer.model) if (Path(folder) / name).is_dir()]
            save_adapters(trainer.model, Path(trainer.args.output_dir), only=places)
        write_pushed_card(trainer, Path(folder))
    original(folder)


# Name of a method → what is called in its place, with the method, on a trainer whose model has adapters of ours.
OWN_METHODS: dict[str, Callable[..., Any]] = {
    "_load_from_checkpoint": load_from_checkpoint,
    "_load_best_model": load_best_model,
    "_push_from_checkpoint": push_from_checkpoint,
    "create_model_card": create_model_card,
}


def _give_own_methods(trainer: Any) -> None:
    if not adapter_children(trainer.model):
        return
    for name, method in OWN_METHODS.items():
        theirs = getattr(type(trainer), name, None)
        if theirs is not None and name not in vars(trainer):
            setattr(trainer, name, functools.partial(method, theirs.__get__(trainer), trainer))


def _saves_all(trainer: Any) -> bool:
    """Whether checkpoints hold all that training changes, of a model with adapters that is whole on every process.

    They do with a callback of this package, and where several adapters are active, which Trainer itself cannot save.
    """
    ours = any(isinstance(callback, LoggingCallback) for callback in trainer.callback_handler.callbacks)
    is_whole = isinstance(trainer.model, (PreTrainedModel, PeftModel)) and not is_sharded()
    return is_whole and bool(child_configs(trainer.model)) and (ours or several_active(trainer.model))
