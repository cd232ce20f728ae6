"""The few places where PEFT and transformers offer no hook, wrapped once.

Neither undoes a failed `add_adapter` or `load_adapter`, neither notices a missing or non-finite tensor, and neither
says that adding one adapter switched another off. Every wrapper calls the original and adds only that.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .config import ConceptErasureConfig
from .layer import erasure_layers
from .tuner import remove_adapter, remove_empty_layers

_MARK = "_hf_erasure_seam"


class _Before:
    """What a failed call must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.loaded = getattr(model, "_hf_peft_config_loaded", False)
        self.names = set(getattr(model, "peft_config", None) or {})
        self.training = [(module, module.training) for module in model.modules()]
        self.trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.active = [(m, m._active_adapter) for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self.erasing = _acting_erasures(model)

    def restore(self, adapter_name: str) -> None:
        """Undo whatever the call did to the model."""
        if adapter_name not in self.names:
            remove_adapter(self.model, adapter_name)
            configs = getattr(self.model, "peft_config", None) or {}
            configs.pop(adapter_name, None)
            if not configs and "peft_config" in self.model.__dict__:
                del self.model.peft_config
        for layer, active in self.active:
            layer._active_adapter = active
        for parameter, required in self.trainable:
            parameter.requires_grad_(required)
        for module, training in self.training:
            module.training = training
        self.model._hf_peft_config_loaded = self.loaded


def install() -> None:
    """Wrap the seams; a second call does nothing."""
    _wrap(PeftAdapterMixin, "add_adapter", _add_adapter)
    _wrap(PeftAdapterMixin, "load_adapter", _load_adapter)
    _wrap(PeftAdapterMixin, "delete_adapter", _delete_adapter)
    _wrap(PeftModel, "load_adapter", _peft_load_adapter)


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = owner.__dict__[name]
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def seam(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(functools.partial(original, self), self, *args, **kwargs)

    setattr(seam, _MARK, True)
    setattr(owner, name, seam)


def _add_adapter(original: Callable, model: Any, adapter_config: Any, adapter_name: str | None = None) -> None:
    before = _Before(model)
    try:
        original(adapter_config, adapter_name)
    except BaseException:
        # Another method's adapter is PEFT's to clean up.
        if isinstance(adapter_config, ConceptErasureConfig) or not isinstance(adapter_config, PeftConfig):
            before.restore(adapter_name or "default")
        raise
    _warn_of_darkened(before.erasing - _acting_erasures(model), adapter_name or "default")


def _load_adapter(
    original: Callable, model: Any, peft_model_id: Any = None, adapter_name: str | None = None, **kwargs: Any
) -> Any:
    before = _Before(model)
    name = adapter_name or "default"
    try:
        result = original(peft_model_id, adapter_name, **kwargs)
        _check_loaded(model, name)
    except BaseException:
        if name not in before.names and erasure_layers(model, name) or not before.active:
            before.restore(name)
        raise
    _warn_of_darkened(before.erasing - _acting_erasures(model), name)
    return result


def _delete_adapter(original: Callable, model: Any, adapter_names: list[str] | str) -> None:
    original(adapter_names)
    remove_empty_layers(model)


def _peft_load_adapter(original: Callable, model: PeftModel, model_id: Any, adapter_name: str, **kwargs: Any) -> Any:
    known = adapter_name in model.peft_config and not _awaits(model, adapter_name)
    try:
        result = original(model_id, adapter_name, **kwargs)
        _check_loaded(model, adapter_name)
    except BaseException:
        if not known and erasure_layers(model, adapter_name):
            remove_adapter(model, adapter_name)
            model.peft_config.pop(adapter_name, None)
            base = model.get_base_model()
            if not model.peft_config and hasattr(base, "peft_config"):
                del base.peft_config
        raise
    return result


def _awaits(model: nn.Module, name: str) -> bool:
    return any(name in layer._awaits_values for layer in erasure_layers(model, name).values())


def _check_loaded(model: nn.Module, name: str) -> None:
    for layer in erasure_layers(model, name).values():
        layer.check_values(name)


def _acting_erasures(model: nn.Module) -> set[str]:
    return {
        name
        for layer in erasure_layers(model).values()
        for site in ("output", "input")
        for name in layer.applied_adapters(site)
    }


def _warn_of_darkened(names: set[str], newcomer: str) -> None:
    if names:
        together = [*sorted(names), newcomer]
        warnings.warn(
            f"Adding {newcomer!r} switched the erasure {', '.join(map(repr, sorted(names)))} off, since PEFT activates "
            f"only the newcomer. Use both with model.set_adapter({together}), or write sticky=True in the "
            "ConceptErasureConfig of an erasure that must stay on.",
            stacklevel=4,
        )
