"""Taking adapters off a model, and undoing a call that failed: it leaves the model as it was, or does all of it.

Neither PEFT nor transformers does so. Calls are inside of one another, as `from_pretrained` calls `load_adapter`, which
injects an adapter: the outermost one undoes everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from .acting import ActiveCopies
from .config import ChildConfig
from .layer import adapter_children
from .placement import keep_from_broadcast

# The base models that a call is being undone for if it fails, by their ids.
_UNDONE: ContextVar[frozenset[int]] = ContextVar("undone", default=frozenset())


@contextmanager
def undone_on_failure(
    model: Any, adapter_name: str, *, is_ours: bool = False, is_new: bool = False
) -> Iterator[ModelState | None]:
    """Put a model back as it was if the block raises, and what came is an adapter of this package.

    A failed adapter of another method is left to PEFT, but for the trained copies that an adapter of ours acts with.

    Args:
        model: A bare model or a `PeftModel`.
        adapter_name: The adapter that comes. Where it is there already, its values are put back too.
        is_ours: Whether it is known to be one of this package; otherwise that is seen from what the block has left.
        is_new: Whether it is known to be new, though the model has a configuration of that name.

    Yields:
        What the model was; None inside of another such block for the same model, which undoes all.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if id(base) in _UNDONE.get():
        yield None
        return
    before = ModelState(model, adapter_name, is_new=is_new)
    token = _UNDONE.set(_UNDONE.get() | {id(base)})
    try:
        yield before
    except BaseException:
        if is_ours or is_of_ours(model, adapter_name) or adapter_children(model, adapter_name):
            before.restore()
        elif adapter_children(model):
            before.trained_copies.restore()
        raise
    finally:
        _UNDONE.reset(token)


class ModelState:
    """What a failed call must leave as it was.

    Args:
        model: A bare model or a `PeftModel`.
        adapter_name: The adapter that is about to come.
        is_new: As in `undone_on_failure`.
    """

    def __init__(self, model: nn.Module, adapter_name: str, *, is_new: bool = False) -> None:
        self.model, self.adapter_name = model, adapter_name
        self.loaded = getattr(model, "_hf_peft_config_loaded", None)
        self.is_new = is_new or adapter_name not in (getattr(model, "peft_config", None) or {})
        self.training = [(module, module.training) for module in model.modules()]
        self.trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.active = [(m, m._active_adapter) for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self.trained_copies = ActiveCopies(model)
        children = adapter_children(model, adapter_name)
        self.values = [(child, tuple(part.clone() for part in child.state_of(adapter_name))) for child in children]
        self.copies = [(tensor, tensor.detach().clone()) for tensor in trained_tensors(model, adapter_name)]

    def restore(self) -> None:
        """Undo whatever the call did to the model."""
        if self.is_new:
            remove_adapter(self.model, self.adapter_name)
            configs = getattr(self.model, "peft_config", None) or {}
            configs.pop(self.adapter_name, None)
            if not configs and "peft_config" in self.model.__dict__:
                del self.model.peft_config
        for child, state in self.values:
            child.restore_state(self.adapter_name, state)
        with torch.no_grad():
            for tensor, value in self.copies:
                tensor.copy_(value)
        for tuner_layer, active in self.active:
            tuner_layer._active_adapter = active
        self.trained_copies.restore()
        for parameter, required in self.trainable:
            parameter.requires_grad_(required)
        for module, training in self.training:
            module.training = training
        if self.loaded is not None:
            self.model._hf_peft_config_loaded = self.loaded


def is_of_ours(model: Any, name: str) -> bool:
    """Whether a model has the configuration of an adapter of this package by that name."""
    return isinstance((getattr(model, "peft_config", None) or {}).get(name), ChildConfig)


def trained_tensors(model: nn.Module, name: str) -> list[Tensor]:
    """The tensors of an adapter's copies of `modules_to_save`."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    copies = [wrapper.modules_to_save[name] for wrapper in wrappers if name in wrapper.modules_to_save]
    return [tensor for copy in copies for tensor in copy.state_dict(keep_vars=True).values()]


# ---- taking adapters off ---------------------------------------------------------------------------------------------


def note_adapters(model: nn.Module) -> None:
    """What the model itself is told when adapters were added or removed; without any, it is as it was."""
    keep_from_broadcast(model)
    _keep_from_ignoring(model)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off all its modules, and the children that are empty then."""
    for child in adapter_children(model, adapter_name):
        child.merged_adapters = [name for name in child.merged_adapters if name != adapter_name]
        if child.adapters == [adapter_name]:
            child.detach()
        else:
            # So that PEFT does not choose another one to switch on, and say so: callers put back what was on.
            child._active_adapter = [name for name in child.active_adapters if name != adapter_name]
            child.delete_adapter(adapter_name)
    for _, _, wrapper in wrapped_modules(model):
        if adapter_name in wrapper._adapters:  # some wrappers would switch off what acts in them all the same
            wrapper.delete_adapter(adapter_name, [])
    _unwrap_saved(model)
    note_adapters(model)


def remove_empty_layers(model: nn.Module) -> None:
    """Take off the children whose last adapter was deleted, so that the model is as it was before the first."""
    for child in adapter_children(model):
        if not child.adapters:
            child.detach()
    _unwrap_saved(model)
    note_adapters(model)


def wrapped_modules(model: nn.Module) -> list[tuple[nn.Module, str, AuxiliaryTrainingWrapper]]:
    """The wrappers of `modules_to_save`, with where they are."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    return [(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2], wrapper) for n, wrapper in found]


def _unwrap_saved(model: nn.Module) -> None:
    """Put the modules back that no adapter has a copy of any more."""
    for parent, name, wrapper in wrapped_modules(model):
        if not wrapper._adapters:
            setattr(parent, name, wrapper.original_module)


def _keep_from_ignoring(model: Any) -> None:
    """Let a model with adapters refuse `adapter_names`, which most models of transformers take and do not read.

    A `PeftModel` reads it and does not hand it on. Without adapters, the model is as it was.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    present = [key for key, hook in base._forward_pre_hooks.items() if hook is _refuse_names]
    if adapter_children(base):
        if not present:
            base.register_forward_pre_hook(_refuse_names, with_kwargs=True)
        return
    for key in present:
        del base._forward_pre_hooks[key]
        base._forward_pre_hooks_with_kwargs.pop(key, None)


def _refuse_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            f"adapter_names={kwargs['adapter_names']!r}: {type(model).__name__} would ignore it, and run all rows with "
            "the active adapters. PeftModel.from_pretrained(model, folder) makes a model that follows it; or run the "
            "rows of each adapter as a batch of their own, with set_adapter(name)."
        )
