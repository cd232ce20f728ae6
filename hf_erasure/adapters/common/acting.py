"""Which adapters act in a model, what they change on it apart from their layers, and undoing a call that failed.

PEFT wraps modules that are trained with an adapter (`modules_to_save`, and embeddings with `trainable_token_indices`),
with a copy for each adapter. PEFT switches the layers of one method at a time, but the wrappers of all methods: a
wrapper without a copy for the new adapter goes back to the module of the base model, so an untrained head answers.
transformers raises an error there. With an adapter of this package, a wrapper keeps the copy that acts in it.

Such calls are nested, as `from_pretrained` calls `load_adapter`: the outermost call undoes a failure.
"""

from __future__ import annotations

import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from hf_erasure.models.model import base_of

from .config import ChildConfig
from .files import PREFIX
from .layer import AdapterChild, adapter_children, child_configs, configs_of, is_child, refuse_adapter_names

# The ids of the base models on which a running call will be undone if it fails.
_GUARDED: ContextVar[frozenset[int]] = ContextVar("guarded", default=frozenset())
# The attribute that DDP reads when it wraps a module; it lists names relative to that module.
_IGNORED = "_ddp_params_and_buffers_to_ignore"
# True while an adapter is being added or loaded: the warning of adapters that went off comes once, at the end.
ADDING: ContextVar[bool] = ContextVar("adding", default=False)
_LIBRARIES = ("hf_erasure", "peft", "transformers", "trl", "torch", "contextlib")


@dataclass(frozen=True)
class PresentAdapters:
    """The adapters of a model: name → the noun that messages use for it."""

    configs: dict[str, PeftConfig] = field(default_factory=dict)  # includes adapters on a part of the model
    loaded: dict[str, str] = field(default_factory=dict)  # all adapters that are present, acting or not
    # The adapters that act, and those that are switched on but have no effect yet, such as unfitted ones.
    switched_on: dict[str, str] = field(default_factory=dict)
    acting: dict[str, str] = field(default_factory=dict)  # the adapters that act, merged or not


def adapters_now(model: nn.Module) -> PresentAdapters:
    """The present adapters of a model, including those of other methods."""
    found, modules = PresentAdapters(), list(model.modules())
    # The token layer inside an embedding's wrapper belongs to the adapter that it was trained with.
    wrappers = (module for module in modules if isinstance(module, AuxiliaryTrainingWrapper))
    inside = {id(wrapper._modules.get("token_adapter")) for wrapper in wrappers}
    for module in modules:
        for name, config in (module.__dict__.get("peft_config") or {}).items():
            found.configs.setdefault(name, config)
    for module in modules:
        if isinstance(module, AdapterChild):
            nouns = dict.fromkeys(module.sticky_adapters, module.noun)
            acting = {*module.acting_adapters(), *module.merged_adapters}
            on = acting | {*module.switched_on()}
        elif isinstance(module, BaseTunerLayer) and id(module) not in inside:
            names = {name for part in module.adapter_layer_names for name in getattr(module, part, ())}
            nouns = {name: f"{kind_of(found.configs.get(name), module)} adapter" for name in names}
            on = acting = set() if module.disable_adapters else {*module.active_adapters, *module.merged_adapters}
        else:
            continue
        found.loaded.update(nouns)
        found.switched_on.update((name, noun) for name, noun in nouns.items() if name in on)
        found.acting.update((name, noun) for name, noun in nouns.items() if name in acting)
    return found


def active_adapters(model: Any) -> list[str]:
    """The active adapters of a transformers model; its own method asks one layer, which knows those of its method."""
    listed = list(model.active_adapters())
    on = (name for name in adapters_now(model).switched_on if name in model.peft_config and name not in listed)
    return listed + [name for name in on if not getattr(model.peft_config[name], "sticky", False)]


def kind_of(config: PeftConfig | None, layer: nn.Module | None = None) -> str:
    """PEFT's name for the method of an adapter, such as "LORA"."""
    if config is not None:
        return str(getattr(config.peft_type, "value", config.peft_type))
    return type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0].upper()


def warn_user(message: str) -> None:
    """Warn the first caller outside of the libraries."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


# ---- modules that are trained with an adapter ------------------------------------------------------------------------


def auxiliary_wrappers(model: nn.Module) -> dict[str, AuxiliaryTrainingWrapper]:
    """The wrappers of a model, by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}


def remove_wrappers(model: nn.Module, *, only_empty: bool = False) -> None:
    """Put the modules inside PEFT's wrappers, or the trained copies that act, in the places of the wrappers.

    With `only_empty`, only those wrappers of layers go that hold no adapter any more: PEFT leaves them in the model.
    """
    for path, trained in () if only_empty else reversed(auxiliary_wrappers(model).items()):
        model.set_submodule(path, trained.unload_and_optionally_merge_module(True, False, None))
    wrappers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for path, wrapper in reversed(wrappers.items()):  # the innermost first
        inner = wrapper._modules.get("base_layer")
        is_kept = only_empty and any(getattr(wrapper, part, ()) for part in wrapper.adapter_layer_names)
        if inner is None or is_kept or path.endswith(".token_adapter"):
            continue
        for child in adapter_children(wrapper):
            if child.host is wrapper:
                child.move_to(inner)
        model.set_submodule(path, inner)


class _KeptCopy(str):
    """The name of an adapter whose copy goes on acting, whichever adapter PEFT switches on."""


@dataclass(eq=False)
class ModelReference:
    """The model that contains the children. A deep copy of a part, with its children, does not copy the whole model."""

    model: Callable[[], nn.Module | None]  # a weak reference to the model

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelReference:
        copied = memo.get(id(self.model()))
        return self if copied is None else ModelReference(weakref.ref(copied))

    def __getstate__(self) -> tuple[nn.Module | None]:
        return (self.model(),)

    def __setstate__(self, state: tuple[nn.Module | None]) -> None:
        (model,) = state
        self.model = (lambda: None) if model is None else weakref.ref(model)

    def update_model(self) -> None:
        """Update the model after a child has gone, if it was the last one."""
        model = self.model()
        if model is not None and not any(isinstance(module, AdapterChild) for module in model.modules()):
            update_model(model, deleting=True)


class _TrainedWrapper(AuxiliaryTrainingWrapper):
    """PEFT's wrapper in a model with adapters of this package: the copy that acts now goes on acting."""

    own_adapters: set[str]  # the adapters of this package that have a copy here
    model_reference: ModelReference

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Remove an adapter's copy; after the last copy, the original module replaces the wrapper."""
        left, before = self._adapters - {adapter_name}, self._active_adapter
        acting = [name for name in self.active_adapters if name in left]
        follows = [] if acting else [name for name in new_active_adapters or () if name in left]
        super().delete_adapter(adapter_name, [])  # with a name, PEFT fails where no copy acts
        if acting:
            self._active_adapter = before if isinstance(before, str) else acting
        elif follows:
            self.set_adapter(follows[:1])
        model = self.model_reference.model()
        if model is not None and not left:
            for place in [name for name, module in model.named_modules() if module is self]:
                model.set_submodule(place, self.original_module)
        if model is None or not adapter_children(model):
            self.restore_class()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Let the copy of one of these adapters act, or no copy; transformers also passes adapters without a copy."""
        if not isinstance(adapter_names, _KeptCopy):
            names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
            known = [name for name in names if name in self._adapters]
            super().set_adapter(adapter_names if known == [adapter_names] else known, inference_mode=inference_mode)

    def restore_class(self) -> None:
        """Become PEFT's own wrapper again."""
        _, self.__class__ = type(self).__bases__
        del self.own_adapters, self.model_reference


class TrainedTokens(_TrainedWrapper, TrainableTokensWrapper):
    """The wrapper of an embedding in which an adapter trains some rows."""


class TrainedModule(_TrainedWrapper, ModulesToSaveWrapper):
    """The wrapper of a module that is trained with an adapter; our copy stays on when another method is switched."""

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """The adapter whose copy is switched on when PEFT switches the layers of a method."""
        found = super().check_set_adapter(adapter_name)
        acting = self.own_adapters.intersection(self.active_adapters)
        return _KeptCopy(*acting) if acting and found not in self._adapters else found


class ActiveCopies:
    """A record of the copies that act in a model's wrappers, from which they can be restored."""

    def __init__(self, model: nn.Module) -> None:
        # Name of a wrapper → the adapter whose copy acts there; left out where the base model's module acts.
        self.acting: dict[str, str] = {}
        self.wrappers = auxiliary_wrappers(model)
        # Name of a wrapper → what was active in it and in its inner token layer; and → which parameters were trained.
        self._active: dict[str, list[tuple[Any, Any]]] = {}
        self._trained: dict[str, list[tuple[nn.Parameter, bool]]] = {}
        for name, wrapper in self.wrappers.items():
            active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper._adapters]
            if active and not wrapper.disable_adapters:
                self.acting[name] = active[0]
            parts: list[Any] = [wrapper, wrapper._modules.get("token_adapter")]
            self._active[name] = [(part, part._active_adapter) for part in parts if part is not None]
            self._trained[name] = [(parameter, parameter.requires_grad) for parameter in wrapper.parameters()]

    def restore(self, places: Iterable[str] | None = None, *, trained: bool = True) -> None:
        """Restore which copies act, everywhere or at `places`; and, if `trained`, which parameters are trained."""
        for name in self.wrappers if places is None else places:
            for part, active in self._active[name]:
                part._active_adapter = active
            for parameter, required in self._trained[name] if trained else ():
                parameter.requires_grad_(required)

    def keep_former(self, names: Iterable[str], keeps: Callable[[str], bool], *, trained: bool = True) -> None:
        """Where the adapters just switched on have no copy, let the former copy act if its adapter `keeps`, or none."""
        left = [place for place, wrapper in self.wrappers.items() if not wrapper._adapters.intersection(names)]
        for place in left:
            self.wrappers[place].set_adapter([])
        self.restore([place for place in left if place in self.acting and keeps(self.acting[place])], trained=trained)


def check_single_copy(model: nn.Module, adapters: str | Iterable[str]) -> list[str]:
    """Return the names of the adapters to switch on; raise an error where several have a copy of the same module."""
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    for place, wrapper in auxiliary_wrappers(model).items():
        with_copy = [name for name in dict.fromkeys(names) if name in wrapper._adapters]
        if len(with_copy) > 1:
            left = [name for name in dict.fromkeys(names) if name not in with_copy[1:]]
            raise ValueError(
                f"{with_copy} cannot all be active: each has a trained copy of {place!r}, and only one copy can act. "
                f"Switch on one of them, as in set_adapter({left}), or add the others without that module in their "
                "modules_to_save."
            )
    return names


def _remove_adapter(model: Any, adapter_name: str) -> None:
    """Remove an adapter from all its modules, with its configuration and the children that become empty."""
    remove_from_children(adapter_children(model, adapter_name), adapter_name)
    for child in adapter_children(model):
        if not child.adapters:
            child.detach()
    for name, wrapper in reversed(auxiliary_wrappers(model).items()):  # the innermost first
        if adapter_name in wrapper._adapters:  # without this check some wrappers would switch off the copy that acts
            wrapper.delete_adapter(adapter_name, [])
        if not wrapper._adapters:
            model.set_submodule(name, wrapper.original_module)
    update_model(model)
    configs = configs_of(model)
    configs.pop(adapter_name, None)
    if not configs and "peft_config" in vars(model):
        del model.peft_config


def remove_from_children(children: Iterable[AdapterChild], adapter_name: str) -> None:
    """Remove an adapter from some of its modules; children that become empty are removed too."""
    for child in children:
        child.merged_adapters = [name for name in child.merged_adapters if name != adapter_name]
        # Otherwise PEFT would switch on another adapter and warn; the callers restore which adapters are on.
        child._active_adapter = [name for name in child.active_adapters if name != adapter_name]
        child.delete_adapter(adapter_name)


def update_model(model: Any, *, deleting: bool = False) -> None:
    """Change the model itself after adapters were added or removed; without adapters, it becomes as it was before.

    Its modules that are trained with an adapter keep the copy that acts; this is skipped while PEFT is `deleting` an
    adapter, since PEFT deletes the copies next. DDP does not broadcast the buffers of adapters. And the model refuses
    `adapter_names`, which most transformers models accept and ignore; a `PeftModel` reads it and does not pass it on.
    """
    base = base_of(model) if hasattr(model, "get_base_model") else model
    model_reference = ModelReference(weakref.ref(base))
    own_adapters = {name for child in adapter_children(base) for name in child.sticky_adapters}
    for wrapper in [] if deleting else auxiliary_wrappers(base).values():
        if own_adapters:
            wrapper.__class__ = TrainedModule if isinstance(wrapper, ModulesToSaveWrapper) else TrainedTokens
            vars(wrapper).update(own_adapters=own_adapters & wrapper._adapters, model_reference=model_reference)
        elif isinstance(wrapper, _TrainedWrapper):
            wrapper.restore_class()
    holders = {child.model_reference.model() for child in adapter_children(base) if child.model_reference is not None}
    for holder in {base, *holders} - {None}:  # a child may be of a model around this one
        others = [name for name in vars(holder).get(_IGNORED, ()) if not is_child(name)]
        children = {path: module for path, module in holder.named_modules() if isinstance(module, AdapterChild)}
        own = [name for path, child in children.items() for name, _ in child.named_buffers(prefix=path)]
        if own or others:
            # DDP may wrap a `PeftModel`, which forwards the attribute of the model inside.
            setattr(holder, _IGNORED, [*others, *own, *(PREFIX + name for name in own)])
        elif _IGNORED in vars(holder):
            delattr(holder, _IGNORED)
    refusing = [key for key, hook in base._forward_pre_hooks.items() if hook is refuse_adapter_names]
    if own_adapters and not refusing:
        base.register_forward_pre_hook(refuse_adapter_names, with_kwargs=True)
    for key in [] if own_adapters else refusing:
        del base._forward_pre_hooks[key]
        base._forward_pre_hooks_with_kwargs.pop(key, None)


def refuse_copies(model: nn.Module, adapter_name: str, modules_to_save: Iterable[str] = ()) -> None:
    """Refuse to copy a module with children, named by its end: PEFT does not save adapters inside a copy."""
    copied = [n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    copied += [n for n, _ in model.named_modules() if n and any(n.endswith(end) for end in modules_to_save)]
    for child in adapter_children(model):
        inside = next((n for n in copied if f"{child.path}.".startswith(f"{n}.")), None)
        if inside is not None and not is_child(inside):
            raise ValueError(
                f"{adapter_name!r} cannot be added: {inside!r} is one of modules_to_save (or trainable_token_indices), "
                f"and a copy of it would have the {child.noun} at {child.path!r} too, which is not saved from there. "
                f"Leave {inside!r} out of the targets of the {child.noun}: PEFT does so where modules_to_save="
                f"[{inside!r}] is in the same configuration."
            )


def move_to_wrappers(model: nn.Module, children: Iterable[AdapterChild] = ()) -> None:
    """Move the children of wrapped modules out to the wrapper: the order in which adapters came does not matter.

    Given `children`, which wrappers may have taken out of the model, are put back.
    """
    modules, model_reference = dict(model.named_modules()), ModelReference(weakref.ref(model))
    for child in dict.fromkeys([*children, *adapter_children(model)]):
        holder = None if child.model_reference is None else child.model_reference.model()
        if holder is None or not any(module is model for module in holder.modules()):  # a model around this one stays
            child.model_reference = model_reference
        outermost = modules.get(child.path, child.host)
        if outermost is not child.host and child.child_name in outermost._modules:
            child.detach()  # it is in a copy of the module, such as the one that LN tuning trains
        elif outermost is not child.host:
            child.move_to(outermost)
    for link in {type(child).link for child in adapter_children(model)}:
        if link is not None:
            link(model)


@contextmanager
def undone_on_failure(model: Any, adapter_name: str, *, is_ours: bool = False, is_new: bool = False) -> Iterator[None]:
    """Restore a model if the block raises an error and its adapter is one of this package.

    If the adapter existed before the block, its values are restored too. A failed adapter of another method is left to
    PEFT; only the trained copies that our adapters act with are restored. Without `is_ours`, the adapter is recognised
    by what the block has left in the model; without `is_new`, by the configurations of the model.
    """
    base = base_of(model) if hasattr(model, "get_base_model") else model
    if id(base) in _GUARDED.get():  # the outer block undoes all
        yield
        return
    is_new = is_new or adapter_name not in (getattr(model, "peft_config", None) or {})
    loaded, trained_copies = getattr(model, "_hf_peft_config_loaded", None), ActiveCopies(model)
    modules = [(module, module.training) for module in model.modules()]
    active = [(module, module._active_adapter) for module, _ in modules if isinstance(module, BaseTunerLayer)]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    children = adapter_children(model, adapter_name)
    values = [(child, tuple(part.clone() for part in child.state_of(adapter_name))) for child in children]
    wrappers = [w.modules_to_save for w in model.modules() if isinstance(w, ModulesToSaveWrapper)]
    copies = [wrapper[adapter_name].state_dict(keep_vars=True) for wrapper in wrappers if adapter_name in wrapper]
    tensors = [(tensor, tensor.detach().clone()) for copy in copies for tensor in copy.values()]
    token = _GUARDED.set(_GUARDED.get() | {id(base)})
    try:
        yield
    except BaseException:
        if is_ours or adapter_name in child_configs(model) or adapter_children(model, adapter_name):
            if is_new:
                _remove_adapter(model, adapter_name)
            for child, state in values:
                child.restore_state(adapter_name, state)
            with torch.no_grad():
                for tensor, value in tensors:
                    tensor.copy_(value)
            for module, training in modules:
                module.training = training
            for tuner_layer, names in active:
                tuner_layer._active_adapter = names
            for parameter, required in trainable:
                parameter.requires_grad_(required)
            trained_copies.restore()
            if loaded is not None:  # `add_adapter` of transformers sets it before it adds an adapter
                model._hf_peft_config_loaded = loaded and bool(configs_of(model))
        elif adapter_children(model):
            trained_copies.restore()
        raise
    finally:
        _GUARDED.reset(token)


# ---- adapters that go off when another comes -------------------------------------------------------------------------


@contextmanager
def warn_of_switched_off(model: Any, newcomer: str, expected: Iterable[str] = ()) -> Iterator[None]:
    """Warn of adapters that acted before a new one came and do not act afterwards, except the `expected` ones."""
    if ADDING.get():  # the outer call warns
        yield
        return
    before, copies = adapters_now(model).switched_on, ActiveCopies(model)
    token = ADDING.set(True)
    try:
        yield
    finally:
        ADDING.reset(token)
    if not adapter_children(model):
        return
    now = adapters_now(model)
    off = {name: noun for name, noun in before.items() if name not in now.switched_on and name not in expected}
    if off:
        of_ours = any(isinstance(now.configs.get(name), ChildConfig) for name in off)
        sticky = ", or write sticky=True in the configuration of an adapter that must stay on" if of_ours else ""
        kept = [f"{place!r} of {name!r}" for place, name in ActiveCopies(model).acting.items() if name in off]
        stays = f" The trained {' and '.join(kept)} stays on." if kept else ""
        together, elsewhere = [*sorted(off), newcomer], [name for name in sorted(off) if name not in configs_of(model)]
        if elsewhere:
            both = f"{elsewhere} and {newcomer!r} are of different models, one a part of the other: load both into one"
        else:
            holder = "model" if getattr(model, "_hf_peft_config_loaded", False) else "base_model"
            both = f"Use both with {holder}.set_adapter({together})"
            both += " of the PeftModel" if holder == "base_model" else ""
        warn_user(
            f"Adding {newcomer!r} switched {_in_words(off)} off, since PEFT activates only the new one.{stays} "
            f"{both}{sticky}."
        )
    if copies.wrappers or auxiliary_wrappers(model):
        warn_of_copies(model, copies.acting, newcomer if newcomer in now.switched_on else "")


def warn_of_copies(model: nn.Module, before: dict[str, str], newcomer: str | None = None) -> None:
    """Warn of copies that acted before and do not act now, and of a new adapter that acts without its own copies."""
    if ADDING.get():
        return
    copies_now = ActiveCopies(model)
    for place, name in before.items():
        acting = copies_now.acting.get(place)
        # A user who switches adapters knows that another copy then acts in this place.
        if acting != name and (newcomer is not None or acting is None):
            instead = "the untrained one of the base model does" if acting is None else f"that of {acting!r} does"
            warn_user(
                f"The {place!r} that was trained with the adapter {name!r} does not act any more: {instead}. It acts "
                f"where {name!r} is among the adapters that are switched on."
            )
    for place, name in copies_now.acting.items():
        copies: Any = copies_now.wrappers[place]._modules.get("modules_to_save")
        if name == newcomer or copies is None or newcomer not in copies:
            continue
        own, acting_copy = copies[newcomer].state_dict(), copies[name].state_dict()
        if any(not torch.equal(own[key], acting_copy[key]) for key in own):
            warn_user(
                f"The {place!r} that was trained with the adapter {newcomer!r} does not act: that of {name!r} does. "
                f"It acts where {newcomer!r} is switched on without {name!r}."
            )


def _in_words(adapters: Mapping[str, str]) -> str:
    return ", ".join(f"the {noun} {name!r}" for name, noun in sorted(adapters.items()))


def set_adapter(original: Callable, model: Any, adapter_name: list[str] | str) -> None:
    """`set_adapter` of a transformers model, which by itself fails at trained modules and warns of nothing."""
    if not adapter_children(model):
        return original(adapter_name)
    names, copies = check_single_copy(model, adapter_name), ActiveCopies(model)
    update_model(model)  # a task class of PEFT may have added its head since
    ours = {name for name, config in adapters_now(model).configs.items() if isinstance(config, ChildConfig)}
    # `add_adapter` ends with the same call as a user's: only the running frames tell the two apart.
    running = (frame for frame, _ in traceback.walk_stack(sys._getframe()) if frame.f_code.co_name == "add_adapter")
    is_adding = any(frame.f_locals.get("self") is model for frame in running)
    with warn_of_switched_off(model, names[0]) if is_adding else nullcontext():
        original(adapter_name)
        for wrapper in copies.wrappers.values():
            wrapper.set_adapter(names)
        if is_adding and copies.wrappers:
            copies.keep_former(names, lambda on: on in ours or bool(ours.intersection(names)), trained=False)
    if not is_adding:
        warn_of_copies(model, copies.acting)


def warn_of_inactive(model: nn.Module, adapter_name: str, expected: Iterable[str] = ()) -> None:
    """Warn of the loaded adapters that do not act while one is fitted, except those `expected` to be off."""
    wrappers = (module for module in model.modules() if isinstance(module, PeftModel))
    prompts = [name for m in wrappers for name, config in m.peft_config.items() if config.is_prompt_learning]
    if prompts:  # a batch goes through the model inside the `PeftModel`
        warn_user(f"{adapter_name!r} is being fitted without the prompts {prompts}: the result is for the model alone.")
    now = adapters_now(model)
    known = {*now.acting, *expected, adapter_name}
    off = {name: noun for name, noun in now.loaded.items() if name not in known}
    for name, config in now.configs.items():
        if name in off and isinstance(config, ChildConfig) and config.why_idle:
            del off[name]
    if off:
        together = [*(name for name in now.acting if name != adapter_name), *off, adapter_name]
        are, them = ("are", "them") if len(off) > 1 else ("is", "it")
        warn_user(
            f"{adapter_name!r} is being fitted while {_in_words(off)} {are} off: the result is for the model without "
            f"{them}. If they should act together, call model.set_adapter({together}) first, and then fit."
        )
