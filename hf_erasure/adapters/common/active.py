"""Which adapters act in a model, of whatever method, and which of them went off when another came."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .auxiliary import active_copies, auxiliary_wrappers
from .config import ChildConfig
from .layer import AdapterChild, adapter_children

# Set while an adapter is being added or loaded: what went off is said once, when all is done.
_ADDING: ContextVar[bool] = ContextVar("adding", default=False)
_LIBRARIES = ("hf_erasure", "peft", "transformers", "trl", "torch", "contextlib")


def all_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """The configurations of all adapters by name, also of those that hang on a part of the model."""
    found: dict[str, PeftConfig] = {}
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        found |= {name: config for name, config in configs.items() if name not in found} if configs else {}
    return found


def acting_adapters(model: nn.Module) -> dict[str, str]:
    """The adapters that act, merged or not, with what messages call them."""
    return {name: noun for name, noun, _, acts in _adapters(model) if acts}


def switched_on_adapters(model: nn.Module) -> dict[str, str]:
    """The same with those that would act but for having no effect yet, as before they are fitted."""
    return {name: noun for name, noun, on, _ in _adapters(model) if on}


def loaded_adapters(model: nn.Module) -> dict[str, str]:
    """The adapters that are there, acting or not, with what messages call them."""
    return {name: noun for name, noun, *_ in _adapters(model)}


def _adapters(model: nn.Module) -> Iterator[tuple[str, str, bool, bool]]:
    """Each adapter at each layer: its name, what messages call it, whether it is switched on, and acts, there."""
    configs = all_configs(model)
    # What a wrapper of an embedding has inside goes with the adapter that it was trained with.
    inside = {id(wrapper._modules.get("token_adapter")) for wrapper in auxiliary_wrappers(model).values()}
    for module in model.modules():
        if isinstance(module, AdapterChild):
            on, acting = {*module.switched_on()}, {*module.acting_adapters(), *module.merged_adapters}
            yield from ((name, module.noun, name in on | acting, name in acting) for name in module.adapters)
        elif isinstance(module, BaseTunerLayer) and id(module) not in inside:
            for name in {n for part in module.adapter_layer_names for n in getattr(module, part, ())}:
                noun = f"{kind_of(configs.get(name), module)} adapter"
                acts = name in {*module.active_adapters, *module.merged_adapters} and not module.disable_adapters
                yield name, noun, acts, acts


def kind_of(config: PeftConfig | None, layer: nn.Module | None = None) -> str:
    """What PEFT calls the method of an adapter, as in "LORA"."""
    if config is not None:
        return str(getattr(config.peft_type, "value", config.peft_type))
    return type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0].upper()


# ---- what goes off ---------------------------------------------------------------------------------------------------


@contextmanager
def naming_what_goes_off(model: nn.Module, newcomer: str, expected: Iterable[str] = ()) -> Iterator[None]:
    """Warn of what acted before an adapter came and does not afterwards, if one of this package is concerned.

    Args:
        model: What the adapter is added to or loaded into.
        newcomer: The name of that adapter.
        expected: Adapters of which nothing is to be said.
    """
    if _ADDING.get():
        yield
        return
    before, copies = switched_on_adapters(model), active_copies(model)
    token = _ADDING.set(True)
    try:
        yield
    finally:
        _ADDING.reset(token)
    if adapter_children(model):
        after = switched_on_adapters(model)
        off = {name: noun for name, noun in before.items() if name not in after and name not in expected}
        _warn_of_adapters(model, off, newcomer)
        _warn_of_copies(copies, active_copies(model))
        if newcomer in after:
            _warn_of_own_copies(model, newcomer)


def say_which_copies_went_off(model: nn.Module, before: dict[str, str]) -> None:
    """Warn of modules of the base model that act in the place of trained copies, after a user switched adapters."""
    if not _ADDING.get():
        _warn_of_copies({place: name for place, name in before.items() if place not in active_copies(model)}, {})


def _warn_of_adapters(model: nn.Module, off: dict[str, str], newcomer: str) -> None:
    if not off:
        return
    dark = ", ".join(f"the {noun} {name!r}" for name, noun in sorted(off.items()))
    configs = all_configs(model)
    of_ours = any(isinstance(configs.get(name), ChildConfig) for name in off)
    sticky = ", or write sticky=True in the configuration of an adapter that must stay on" if of_ours else ""
    kept = [f"{place!r} of {name!r}" for place, name in active_copies(model).items() if name in off]
    copies = f" The trained {' and '.join(kept)} stays on." if kept else ""
    elsewhere = [name for name in sorted(off) if name not in (getattr(model, "peft_config", None) or {})]
    if elsewhere:
        both = f"{elsewhere} and {newcomer!r} are of different models, one a part of the other: load both into one"
    else:
        both = f"Use both with {_switch(model, [*sorted(off), newcomer])}"
    warnings.warn(
        f"Adding {newcomer!r} switched {dark} off, since PEFT activates only the newcomer.{copies} {both}{sticky}.",
        stacklevel=users_level(),
    )


def _warn_of_copies(before: dict[str, str], after: dict[str, str]) -> None:
    """Of the copies that acted, name those that do not any more."""
    for place, name in before.items():
        if after.get(place) != name:
            acting = f"that of {after[place]!r} does" if place in after else "the untrained one of the base model does"
            warnings.warn(
                f"The {place!r} that was trained with the adapter {name!r} does not act any more: {acting}. It acts "
                f"where {name!r} is among the adapters that are switched on.",
                stacklevel=users_level(),
            )


def _warn_of_own_copies(model: nn.Module, newcomer: str) -> None:
    """Name the trained modules of an adapter that came, and acts without them, since those of another one act."""
    wrappers = auxiliary_wrappers(model)
    for place, name in active_copies(model).items():
        copies: Any = wrappers[place]._modules.get("modules_to_save")
        if name == newcomer or copies is None or newcomer not in copies:
            continue
        own, acting = copies[newcomer].state_dict(), copies[name].state_dict()
        if any(not torch.equal(own[key], acting[key]) for key in own):
            warnings.warn(
                f"The {place!r} that was trained with the adapter {newcomer!r} does not act: that of {name!r} does. "
                f"It acts where {newcomer!r} is switched on without {name!r}.",
                stacklevel=users_level(),
            )


def _switch(model: Any, names: list[str]) -> str:
    """How the adapters of a model are switched on together."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return f"model.set_adapter({names})"
    return f"base_model.set_adapter({names}) of the PeftModel"


def users_level() -> int:
    """The `stacklevel` of the first caller outside of the libraries, for a warning that is raised by our caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
