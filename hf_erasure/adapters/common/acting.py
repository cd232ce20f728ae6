"""Which adapters act in a model, what they leave on it beside their layers, and undoing a call that failed.

Modules that are trained with an adapter (`modules_to_save`, and embeddings with `trainable_token_indices`) are wrapped
by PEFT, with a copy for each adapter. PEFT switches the layers of one method at a time, but the wrappers of all: every
one without a copy for the newcomer goes back to the module of the base model, and an untrained head answers.
transformers fails there. With an adapter of this package, a wrapper keeps the copy that acts in it.

Calls are inside of one another, as `from_pretrained` calls `load_adapter`: the outermost undoes what failed.
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
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from .config import ChildConfig
from .files import PREFIX
from .layer import AdapterChild, adapter_children, child_configs, configs_of, is_child, refuse_names

# The base models that a call is being undone for if it fails, by their ids.
_UNDONE: ContextVar[frozenset[int]] = ContextVar("undone", default=frozenset())
# Where DDP looks when it wraps a module, for names relative to that module.
_IGNORED = "_ddp_params_and_buffers_to_ignore"
# Set while an adapter is being added or loaded: what went off is said once, when all is done.
ADDING: ContextVar[bool] = ContextVar("adding", default=False)
_LIBRARIES = ("hf_erasure", "peft", "transformers", "trl", "torch", "contextlib")


@dataclass(frozen=True)
class Present:
    """The adapters of a model, each with what messages call it."""

    configs: dict[str, PeftConfig] = field(default_factory=dict)  # of those that hang on a part of the model, too
    loaded: dict[str, str] = field(default_factory=dict)  # those that are there, acting or not
    # Those that act, and those that would but for having no effect yet, as before they are fitted.
    on: dict[str, str] = field(default_factory=dict)
    acting: dict[str, str] = field(default_factory=dict)  # those that act, merged or not


def adapters_now(model: nn.Module) -> Present:
    """The adapters of a model as they are now, those of other methods too."""
    found, modules = Present(), list(model.modules())
    # What a wrapper of an embedding has inside goes with the adapter that it was trained with.
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
        found.on.update((name, noun) for name, noun in nouns.items() if name in on)
        found.acting.update((name, noun) for name, noun in nouns.items() if name in acting)
    return found


def kind_of(config: PeftConfig | None, layer: nn.Module | None = None) -> str:
    """What PEFT calls the method of an adapter, as in "LORA"."""
    if config is not None:
        return str(getattr(config.peft_type, "value", config.peft_type))
    return type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0].upper()


def warn_user(told: str) -> None:
    """Warn the first caller outside of the libraries."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(told, stacklevel=level)


# ---- modules that are trained with an adapter ------------------------------------------------------------------------


def auxiliary_wrappers(model: nn.Module) -> dict[str, AuxiliaryTrainingWrapper]:
    """The wrappers of a model, by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}


class _Stays(str):
    """The name of an adapter whose copy goes on acting, whichever PEFT wants to switch on."""


@dataclass(eq=False)
class Within:
    """The model that children are in. Whoever copies a part of it, with children, does not copy all of it."""

    model: Callable[[], nn.Module | None]  # A weak reference to it

    def __deepcopy__(self, memo: dict[int, Any]) -> Within:
        copied = memo.get(id(self.model()))
        return self if copied is None else Within(weakref.ref(copied))

    def __getstate__(self) -> tuple[nn.Module | None]:
        return (self.model(),)

    def __setstate__(self, state: tuple[nn.Module | None]) -> None:
        (model,) = state
        self.model = (lambda: None) if model is None else weakref.ref(model)

    def note(self) -> None:
        """Tell the model that a child has gone, if it was the last one."""
        model = self.model()
        if model is not None and not any(isinstance(module, AdapterChild) for module in model.modules()):
            note_adapters(model, deleting=True)


class _Trained(AuxiliaryTrainingWrapper):
    """PEFT's wrapper in a model with adapters of this package: the copy that acts goes on acting."""

    ours: set[str]  # the adapters of this package that have a copy here
    within: Within

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Remove an adapter's copy; without another one, the module takes the wrapper's place."""
        left, before = self._adapters - {adapter_name}, self._active_adapter
        acting = [name for name in self.active_adapters if name in left]
        follows = [] if acting else [name for name in new_active_adapters or () if name in left]
        super().delete_adapter(adapter_name, follows[:1])
        if acting:
            self._active_adapter = before if isinstance(before, str) else acting
        model = self.within.model()
        if model is not None and not left:
            for place in [name for name, module in model.named_modules() if module is self]:
                model.set_submodule(place, self.original_module)
        if model is None or not adapter_children(model):
            self.be_plain()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Let the copy that one of these adapters has act, or none; transformers names adapters without one, too."""
        if not isinstance(adapter_names, _Stays):
            names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
            known = [name for name in names if name in self._adapters]
            super().set_adapter(adapter_names if known == [adapter_names] else known, inference_mode=inference_mode)

    def be_plain(self) -> None:
        """Become PEFT's own wrapper again."""
        _, self.__class__ = type(self).__bases__
        del self.ours, self.within


class TrainedTokens(_Trained, TrainableTokensWrapper):
    """An embedding of which an adapter trains some rows."""


class TrainedModule(_Trained, ModulesToSaveWrapper):
    """A module that is trained with an adapter; one of ours stays on when another method switches its layers."""

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """The adapter to switch on, when PEFT switches the layers of a method."""
        found = super().check_set_adapter(adapter_name)
        acting = self.ours.intersection(self.active_adapters)
        return _Stays(*acting) if acting and found not in self._adapters else found


class ActiveCopies:
    """Which copies act in the wrappers of a model, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        # Name of a wrapper → the adapter whose copy acts there; without those where the base model's module does.
        self.on: dict[str, str] = {}
        self.wrappers = auxiliary_wrappers(model)
        # By the wrapper's name: what was active in it and in what it has inside, and which parameters were trained.
        self._active: dict[str, list[tuple[Any, Any]]] = {}
        self._trained: dict[str, list[tuple[nn.Parameter, bool]]] = {}
        for name, wrapper in self.wrappers.items():
            active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper._adapters]
            if active and not wrapper.disable_adapters:
                self.on[name] = active[0]
            parts: list[Any] = [wrapper, wrapper._modules.get("token_adapter")]
            self._active[name] = [(part, part._active_adapter) for part in parts if part is not None]
            self._trained[name] = [(parameter, parameter.requires_grad) for parameter in wrapper.parameters()]

    def restore(self, places: Iterable[str] | None = None, *, trained: bool = True) -> None:
        """Let the copies act again that did, all or those at `places`, and the parameters be `trained` that were."""
        for name in self.wrappers if places is None else places:
            for part, active in self._active[name]:
                part._active_adapter = active
            for parameter, required in self._trained[name] if trained else ():
                parameter.requires_grad_(required)

    def follow(self, names: Iterable[str], stays: Callable[[str], bool], *, trained: bool = True) -> None:
        """After adapters were switched on: where they have no copy, that of an adapter that `stays` acts, or none."""
        left = [place for place, wrapper in self.wrappers.items() if not wrapper._adapters.intersection(names)]
        for place in left:
            self.wrappers[place].set_adapter([])
        self.restore([place for place in left if place in self.on and stays(self.on[place])], trained=trained)


def check_one_copy(model: nn.Module, adapters: str | Iterable[str]) -> list[str]:
    """The names of adapters to switch on; refused where several have copies of one module."""
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    for place, wrapper in auxiliary_wrappers(model).items():
        rivals = [name for name in dict.fromkeys(names) if name in wrapper._adapters]
        if len(rivals) > 1:
            left = [name for name in dict.fromkeys(names) if name not in rivals[1:]]
            raise ValueError(
                f"{rivals} cannot all be active: each has a trained copy of {place!r}, and one module can act. Switch "
                f"on one of them, as in set_adapter({left}), or add the others without that module in their "
                "modules_to_save."
            )
    return names


def _remove_adapter(model: Any, adapter_name: str) -> None:
    """Take an adapter off all its modules, with the children that are empty then and its configuration."""
    take_off(adapter_children(model, adapter_name), adapter_name)
    for child in adapter_children(model):
        if not child.adapters:
            child.detach()
    for name, wrapper in reversed(auxiliary_wrappers(model).items()):  # the innermost first
        if adapter_name in wrapper._adapters:  # some wrappers would switch off what acts in them all the same
            wrapper.delete_adapter(adapter_name, [])
        if not wrapper._adapters:
            model.set_submodule(name, wrapper.original_module)
    note_adapters(model)
    configs = configs_of(model)
    configs.pop(adapter_name, None)
    if not configs and "peft_config" in vars(model):
        del model.peft_config


def take_off(children: Iterable[AdapterChild], adapter_name: str) -> None:
    """Take an adapter off some of its modules; a child that is empty then goes."""
    for child in children:
        child.merged_adapters = [name for name in child.merged_adapters if name != adapter_name]
        # So that PEFT does not choose another one to switch on, and say so: callers put back what was on.
        child._active_adapter = [name for name in child.active_adapters if name != adapter_name]
        child.delete_adapter(adapter_name)


def note_adapters(model: Any, *, deleting: bool = False) -> None:
    """What the model itself is told when adapters were added or removed; without any, it is as it was.

    Its modules that are trained with an adapter keep what acts in them; but while PEFT is `deleting` one, it will turn
    to those modules next. DDP does not broadcast the buffers of adapters. And the model refuses `adapter_names`, which
    most models of transformers take and do not read; a `PeftModel` reads it and does not hand it on.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    within = Within(weakref.ref(base))
    ours = {name for child in adapter_children(base) for name in child.sticky_adapters}
    for wrapper in [] if deleting else auxiliary_wrappers(base).values():
        if ours:
            wrapper.__class__ = TrainedModule if isinstance(wrapper, ModulesToSaveWrapper) else TrainedTokens
            vars(wrapper).update(ours=ours & wrapper._adapters, within=within)
        elif isinstance(wrapper, _Trained):
            wrapper.be_plain()
    ignored = base.__dict__.get(_IGNORED)
    refusing = [key for key, hook in base._forward_pre_hooks.items() if hook is refuse_names]
    if ours:
        if not isinstance(ignored, AdapterBuffers):
            setattr(base, _IGNORED, AdapterBuffers(base, ignored or ()))
        if not refusing:
            base.register_forward_pre_hook(refuse_names, with_kwargs=True)
        return
    if isinstance(ignored, AdapterBuffers):
        delattr(base, _IGNORED)
        if ignored.others:
            setattr(base, _IGNORED, ignored.others)
    for key in refusing:
        del base._forward_pre_hooks[key]
        base._forward_pre_hooks_with_kwargs.pop(key, None)


@dataclass(eq=False)
class AdapterBuffers(Iterable[str]):
    """The names of the buffers of all adapters at present, since fitting changes them, and what was there before."""

    model: nn.Module  # the base model
    others: Iterable[str]  # names that someone else wants ignored

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        for path, module in self.model.named_modules():
            if isinstance(module, AdapterChild):
                for name, _ in module.named_buffers(prefix=path):
                    yield name
                    # DDP may wrap a `PeftModel`, which hands on the attribute of the model inside.
                    yield PREFIX + name


def refuse_copies(model: nn.Module, adapter_name: str, modules_to_save: Iterable[str] = ()) -> None:
    """Refuse copies for `modules_to_save` of a module with children: PEFT saves no adapter from inside the copy."""
    copied = [n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    copied += [n for n, _ in model.named_modules() if n and any(n.endswith(end) for end in modules_to_save)]
    for child in adapter_children(model):
        inside = next((n for n in copied if f"{child.path}.".startswith(f"{n}.")), None)
        if inside is not None and not is_child(inside):
            raise ValueError(
                f"{adapter_name!r} cannot be added: {inside!r} is one of modules_to_save, and a copy of it would have "
                f"the {child.noun} at {child.path!r} too, which is not saved from there. Leave {inside!r} out of the "
                f"targets of the {child.noun}: PEFT does so where modules_to_save=[{inside!r}] is in the same "
                "configuration."
            )


def rehome_layers(model: nn.Module) -> None:
    """Move the children of wrapped modules out to the wrapper: adapters act alike in whatever order they came."""
    modules, within = dict(model.named_modules()), Within(weakref.ref(model))
    for child in adapter_children(model):
        child.within = within
        outermost = modules.get(child.path)
        if outermost is not None and outermost is not child.host:
            child.rehome(outermost)
    for link in {type(child).link for child in adapter_children(model)}:
        if link is not None:
            link(model)


@contextmanager
def undone_on_failure(model: Any, adapter_name: str, *, is_ours: bool = False, is_new: bool = False) -> Iterator[None]:
    """Put a model back as it was if the block raises, and what came is an adapter of this package.

    Where the adapter is there already, its values are put back too. A failed adapter of another method is left to PEFT,
    but for the trained copies that an adapter of ours acts with. Whether it `is_ours` is otherwise seen from what the
    block has left, and whether it `is_new` from the configurations of the model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if id(base) in _UNDONE.get():  # the outer block undoes all
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
    token = _UNDONE.set(_UNDONE.get() | {id(base)})
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
            if loaded is not None:  # `add_adapter` of transformers says so before anything is added
                model._hf_peft_config_loaded = loaded and bool(configs_of(model))
        elif adapter_children(model):
            trained_copies.restore()
        raise
    finally:
        _UNDONE.reset(token)


# ---- what goes off when another comes --------------------------------------------------------------------------------


@contextmanager
def naming_what_goes_off(model: Any, newcomer: str, expected: Iterable[str] = ()) -> Iterator[None]:
    """Warn of what acted before an adapter came and does not afterwards, unless that is `expected`."""
    if ADDING.get():  # the call that this one is a part of says it
        yield
        return
    before, copies = adapters_now(model).on, ActiveCopies(model)
    token = ADDING.set(True)
    try:
        yield
    finally:
        ADDING.reset(token)
    if not adapter_children(model):
        return
    now = adapters_now(model)
    off = {name: noun for name, noun in before.items() if name not in now.on and name not in expected}
    if off:
        of_ours = any(isinstance(now.configs.get(name), ChildConfig) for name in off)
        sticky = ", or write sticky=True in the configuration of an adapter that must stay on" if of_ours else ""
        kept = [f"{place!r} of {name!r}" for place, name in ActiveCopies(model).on.items() if name in off]
        stays = f" The trained {' and '.join(kept)} stays on." if kept else ""
        together, elsewhere = [*sorted(off), newcomer], [name for name in sorted(off) if name not in configs_of(model)]
        if elsewhere:
            both = f"{elsewhere} and {newcomer!r} are of different models, one a part of the other: load both into one"
        else:
            holder = "model" if getattr(model, "_hf_peft_config_loaded", False) else "base_model"
            both = f"Use both with {holder}.set_adapter({together})"
            both += " of the PeftModel" if holder == "base_model" else ""
        warn_user(
            f"Adding {newcomer!r} switched {_listed(off)} off, since PEFT activates only the newcomer.{stays} "
            f"{both}{sticky}."
        )
    if copies.wrappers or auxiliary_wrappers(model):
        warn_of_copies(model, copies.on, newcomer if newcomer in now.on else "")


def warn_of_copies(model: nn.Module, before: dict[str, str], newcomer: str | None = None) -> None:
    """Name the copies that acted before and do not any more, and those of a newcomer that acts without them."""
    if ADDING.get():
        return
    copies_now = ActiveCopies(model)
    for place, name in before.items():
        acting = copies_now.on.get(place)
        # A user who switches adapters knows of a copy in whose place another acts.
        if acting != name and (newcomer is not None or acting is None):
            instead = "the untrained one of the base model does" if acting is None else f"that of {acting!r} does"
            warn_user(
                f"The {place!r} that was trained with the adapter {name!r} does not act any more: {instead}. It acts "
                f"where {name!r} is among the adapters that are switched on."
            )
    for place, name in copies_now.on.items():
        copies: Any = copies_now.wrappers[place]._modules.get("modules_to_save")
        if name == newcomer or copies is None or newcomer not in copies:
            continue
        own, acting_copy = copies[newcomer].state_dict(), copies[name].state_dict()
        if any(not torch.equal(own[key], acting_copy[key]) for key in own):
            warn_user(
                f"The {place!r} that was trained with the adapter {newcomer!r} does not act: that of {name!r} does. "
                f"It acts where {newcomer!r} is switched on without {name!r}."
            )


def _listed(adapters: Mapping[str, str]) -> str:
    return ", ".join(f"the {noun} {name!r}" for name, noun in sorted(adapters.items()))


def set_adapter(original: Callable, model: Any, adapter_name: list[str] | str) -> None:
    """`set_adapter` of a transformers model, which stops halfway at trained modules, and tells nobody what goes off."""
    if not adapter_children(model):
        return original(adapter_name)
    names, copies = check_one_copy(model, adapter_name), ActiveCopies(model)
    note_adapters(model)  # a class of a task may have added its head since
    ours = {name for name, config in adapters_now(model).configs.items() if isinstance(config, ChildConfig)}
    # `add_adapter` switches its newcomer on last, as a user would: only the calls that are running tell.
    running = (frame for frame, _ in traceback.walk_stack(sys._getframe()) if frame.f_code.co_name == "add_adapter")
    is_adding = any(frame.f_locals.get("self") is model for frame in running)
    with naming_what_goes_off(model, names[0]) if is_adding else nullcontext():
        original(adapter_name)
        for wrapper in copies.wrappers.values():
            wrapper.set_adapter(names)
        if is_adding and copies.wrappers:
            copies.follow(names, lambda on: on in ours or bool(ours.intersection(names)), trained=False)
    if not is_adding:
        warn_of_copies(model, copies.on)


def warn_of_what_is_off(model: nn.Module, adapter_name: str, expected: Iterable[str] = ()) -> None:
    """Name the loaded adapters that do not act while one is fitted, but for those `expected` to be off."""
    now = adapters_now(model)
    known = {*now.acting, *expected, adapter_name}
    off = {name: noun for name, noun in now.loaded.items() if name not in known}
    for name, config in now.configs.items():
        if name in off and isinstance(config, ChildConfig) and not config.has_effect:
            del off[name]
    if off:
        together = [*(name for name in now.acting if name != adapter_name), *off, adapter_name]
        are, them = ("are", "them") if len(off) > 1 else ("is", "it")
        warn_user(
            f"{adapter_name!r} is being fitted while {_listed(off)} {are} off: what is fitted is for the model "
            f"without {them}. Where they are to act together, call model.set_adapter({together}) first, and fit then."
        )
