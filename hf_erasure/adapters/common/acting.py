"""Which adapters, and which of the modules trained with them, act in a model, and which go off when another comes.

Modules that are trained with an adapter (`modules_to_save`, and embeddings with `trainable_token_indices`) are wrapped
by PEFT. The wrapper holds a copy for each adapter, of which one acts, or else the module of the base model. PEFT
switches the layers of one method at a time, but the wrappers of all methods: whichever adapter comes last, every
wrapper without a copy for it goes back to the module of the base model, and an untrained head answers. transformers
fails there instead. With an adapter of this package, a wrapper keeps the copy that acts in it when an adapter of
another method comes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import ChildConfig
from .layer import AdapterChild, adapter_children

# Set while an adapter is being added or loaded: what went off is said once, when all is done.
_ADDING: ContextVar[bool] = ContextVar("adding", default=False)
_LIBRARIES = ("hf_erasure", "peft", "transformers", "trl", "torch", "contextlib")


# ---- adapters --------------------------------------------------------------------------------------------------------


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
            yield from ((name, module.noun, name in on | acting, name in acting) for name in module.sticky_adapters)
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


# ---- modules that are trained with an adapter ------------------------------------------------------------------------


def auxiliary_wrappers(model: nn.Module) -> dict[str, AuxiliaryTrainingWrapper]:
    """The wrappers of a model, by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}


def active_copies(model: nn.Module) -> dict[str, str]:
    """Name of a wrapper → the adapter whose copy acts there; without those where the base model's module does."""
    found = {}
    for name, wrapper in auxiliary_wrappers(model).items():
        active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper._adapters]
        if active and not wrapper.disable_adapters:
            found[name] = active[0]
    return found


class ActiveCopies:
    """Which copies act in the wrappers of a model, to be put back.

    Args:
        model: The model.

    Attributes:
        on: As `active_copies` gives them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.on = active_copies(model)
        self._wrappers = auxiliary_wrappers(model)
        # By the wrapper's name: what was active in it and in what it has inside, and which parameters were trained.
        self._active: dict[str, list[tuple[Any, Any]]] = {}
        self._trained: dict[str, list[tuple[nn.Parameter, bool]]] = {}
        for name, wrapper in self._wrappers.items():
            parts: list[Any] = [wrapper, wrapper._modules.get("token_adapter")]
            self._active[name] = [(part, part._active_adapter) for part in parts if part is not None]
            self._trained[name] = [(parameter, parameter.requires_grad) for parameter in wrapper.parameters()]

    def restore(
        self, *, trained: bool = True, where: Callable[[str, AuxiliaryTrainingWrapper], bool] | None = None
    ) -> None:
        """Let the copies act again that did.

        Args:
            trained: Also put back which of their parameters are trained.
            where: Of the adapter whose copy acted ("" for none) and the wrapper: whether to; everywhere when None.
        """
        for name, wrapper in self._wrappers.items():
            if where is None or where(self.on.get(name, ""), wrapper):
                for part, active in self._active[name]:
                    part._active_adapter = active
                for parameter, required in self._trained[name] if trained else ():
                    parameter.requires_grad_(required)

    def hand_on(self, newcomer: str, but: Collection[str]) -> None:
        """Let the copies of a newcomer start from those that acted; PEFT takes them from the base model, untrained.

        Args:
            newcomer: An adapter.
            but: Not from the copies of these, of the same method: they go off with all that is theirs.
        """
        for name, acted in self.on.items():
            copies: Any = self._wrappers[name]._modules.get("modules_to_save")
            if copies is not None and newcomer in copies and acted not in but:
                copies[newcomer].load_state_dict(copies[acted].state_dict())


def check_one_copy(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to switch on adapters that have copies of one module.

    Raises:
        ValueError: Names the module and the adapters.
    """
    names = list(dict.fromkeys(names))
    for place, wrapper in auxiliary_wrappers(model).items():
        rivals = [name for name in names if name in wrapper._adapters]
        if len(rivals) > 1:
            left = [name for name in names if name not in rivals[1:]]
            raise ValueError(
                f"{rivals} cannot all be active: each has a trained copy of {place!r}, and one module can act. Switch "
                f"on one of them, as in set_adapter({left}), or add the others without that module in their "
                "modules_to_save."
            )


def set_copies(model: nn.Module, names: Iterable[str]) -> None:
    """Let each wrapper have the adapter of `names` that it has a copy of, or none."""
    for wrapper in auxiliary_wrappers(model).values():
        wrapper.set_adapter([name for name in names if name in wrapper._adapters])


def enable_copies(model: nn.Module) -> None:
    """Let the wrappers take part again, which `enable_adapters` of transformers forgets."""
    for wrapper in auxiliary_wrappers(model).values():
        wrapper.enable_adapters(True)


@contextmanager
def set_by_hand(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """While transformers switches adapters on, let each wrapper have the one of `names` that it has a copy of, or none.

    It would tell every wrapper all of the names, and fail at those that a wrapper does not know.
    """
    with _replaced(auxiliary_wrappers(model).values(), "set_adapter", lambda *args, **kwargs: None):
        yield
    set_copies(model, names)


@contextmanager
def keys_of_own_copies(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """While PEFT loads an adapter, let only the wrappers that it has a copy in look for keys in its file.

    A wrapper of trained tokens would look for those of any adapter, and fail.
    """
    others = [wrapper for wrapper in auxiliary_wrappers(model).values() if adapter_name not in wrapper._adapters]
    with _replaced(others, "adapter_state_dict_load_map", lambda name: {}):
        yield


@contextmanager
def _replaced(wrappers: Collection[nn.Module], method: str, by: Callable[..., Any]) -> Iterator[None]:
    wrappers = list(wrappers)
    for wrapper in wrappers:
        wrapper.__dict__[method] = by
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.__dict__[method]


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
        if off:
            _warn_of_adapters(model, off, newcomer)
        _warn_of_copies(model, copies, newcomer if newcomer in after else None)


def say_which_copies_went_off(model: nn.Module, before: dict[str, str]) -> None:
    """Warn of modules of the base model that act in the place of trained copies, after a user switched adapters."""
    if not _ADDING.get():
        now = active_copies(model)
        _warn_of_copies(model, {place: name for place, name in before.items() if place not in now}, None)


def _warn_of_adapters(model: Any, off: dict[str, str], newcomer: str) -> None:
    dark = ", ".join(f"the {noun} {name!r}" for name, noun in sorted(off.items()))
    configs = all_configs(model)
    of_ours = any(isinstance(configs.get(name), ChildConfig) for name in off)
    sticky = ", or write sticky=True in the configuration of an adapter that must stay on" if of_ours else ""
    kept = [f"{place!r} of {name!r}" for place, name in active_copies(model).items() if name in off]
    copies = f" The trained {' and '.join(kept)} stays on." if kept else ""
    elsewhere = [name for name in sorted(off) if name not in (getattr(model, "peft_config", None) or {})]
    together = [*sorted(off), newcomer]
    if elsewhere:
        both = f"{elsewhere} and {newcomer!r} are of different models, one a part of the other: load both into one"
    elif getattr(model, "_hf_peft_config_loaded", False):
        both = f"Use both with model.set_adapter({together})"
    else:
        both = f"Use both with base_model.set_adapter({together}) of the PeftModel"
    warnings.warn(
        f"Adding {newcomer!r} switched {dark} off, since PEFT activates only the newcomer.{copies} {both}{sticky}.",
        stacklevel=users_level(),
    )


def _warn_of_copies(model: nn.Module, before: dict[str, str], newcomer: str | None) -> None:
    """Name the copies that acted before and do not any more, and those of a newcomer that acts without them."""
    after, wrappers = active_copies(model), auxiliary_wrappers(model)
    for place, name in before.items():
        if after.get(place) != name:
            acting = f"that of {after[place]!r} does" if place in after else "the untrained one of the base model does"
            warnings.warn(
                f"The {place!r} that was trained with the adapter {name!r} does not act any more: {acting}. It acts "
                f"where {name!r} is among the adapters that are switched on.",
                stacklevel=users_level(),
            )
    for place, name in after.items():
        copies: Any = wrappers[place]._modules.get("modules_to_save")
        if newcomer is None or name == newcomer or copies is None or newcomer not in copies:
            continue
        own, acting_copy = copies[newcomer].state_dict(), copies[name].state_dict()
        if any(not torch.equal(own[key], acting_copy[key]) for key in own):
            warnings.warn(
                f"The {place!r} that was trained with the adapter {newcomer!r} does not act: that of {name!r} does. "
                f"It acts where {newcomer!r} is switched on without {name!r}.",
                stacklevel=users_level(),
            )


def users_level() -> int:
    """The `stacklevel` of the first caller outside of the libraries, for a warning that is raised by our caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
