"""The few places where Trainer offers callbacks no event, wrapped once; every wrapper calls the original."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import CallbackHandler

from hf_erasure.adapters.common.layer import child_configs
from hf_erasure.adapters.saved_tensors import refuse_loss
from hf_erasure.adapters.wrapping import wrap

from .checkpoints import is_lost, load_trained, own_trained, save_adapters, saving_all, several_active
from .checks import is_sharded, warn_of_what_is_left_out
from .logs import LoggingCallback

_MARK = "hf_erasure.callbacks"


def install() -> None:
    """Wrap the seams; called again, it puts the wrappers of now in the place of the former."""
    wrap(CallbackHandler, "on_log", _on_log, _MARK)
    wrap(Trainer, "train", _train, _MARK)
    wrap(Trainer, "_save", _save, _MARK)
    wrap(Trainer, "_load_from_checkpoint", _load_from_checkpoint, _MARK)
    wrap(Trainer, "_load_best_model", _load_best_model, _MARK)
    wrap(Trainer, "_push_from_checkpoint", _push_from_checkpoint, _MARK)


def _on_log(original: Callable, handler: Any, args: Any, state: Any, control: Any, logs: dict[str, float]) -> Any:
    """A callback is told of a log after those that report it: ask ours for figures before anybody is told."""
    # Only logs of training: those of an evaluation are on their own.
    for callback in handler.callbacks if "loss" in logs else ():
        if isinstance(callback, LoggingCallback):
            added = callback.logged(state, handler.model)
            logs.update(added)
            if state.log_history:
                state.log_history[-1].update(added)
    return original(args, state, control, logs)


def _train(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    if not _saves_all(trainer):
        if trainer.args.save_strategy != "no" and isinstance(trainer.model, (PreTrainedModel, PeftModel)):
            refuse_loss(trainer.model)  # its first save would
        warn_of_what_is_left_out(trainer.model)
    return original(*args, **kwargs)


def _save(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> None:
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


def _load_from_checkpoint(original: Callable, trainer: Any, folder: str, model: Any = None) -> None:
    if _saves_all(trainer):
        load_trained(trainer.model if model is None else model, Path(folder))
    else:
        original(folder, model)


def _load_best_model(original: Callable, trainer: Any) -> None:
    if _saves_all(trainer):
        load_trained(trainer.model, Path(trainer.state.best_model_checkpoint))
    else:
        original()


def _push_from_checkpoint(original: Callable, trainer: Any, folder: str) -> None:
    """Trainer copies the files that it knows from a checkpoint before it pushes them, and no folders."""
    if _saves_all(trainer) and trainer.is_world_process_zero():
        places = [name for name in child_configs(trainer.model) if (Path(folder) / name).is_dir()]
        save_adapters(trainer.model, Path(trainer.args.output_dir), only=places)
    original(folder)


def _saves_all(trainer: Any) -> bool:
    """Whether checkpoints hold all that training changes, of a model with adapters that is whole on every process.

    They do with a callback of this package, and where several adapters are active, which Trainer itself cannot save.
    """
    ours = any(isinstance(callback, LoggingCallback) for callback in trainer.callback_handler.callbacks)
    is_whole = isinstance(trainer.model, (PreTrainedModel, PeftModel)) and not is_sharded()
    return is_whole and bool(child_configs(trainer.model)) and (ours or several_active(trainer.model))
