"""What adapters leave on a model beside their layers, taking it off, and undoing a call that failed.

Modules that are trained with an adapter (`modules_to_save`, and embeddings with `trainable_token_indices`) are wrapped
by PEFT, with a copy for each adapter. PEFT switches the layers of one method at a time, but the wrappers of all: every
one without a copy for the newcomer goes back to the module of the base model, and an untrained head answers.
transformers fails there. With an adapter of this package, a wrapper keeps the copy that acts in it.

Calls are inside of one another, as `from_pretrained` calls `load_adapter`: the outermost undoes what failed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from .files import PREFIX
from .layer import AdapterChild, adapter_children, child_configs, configs_of, is_child, refuse_names

# The base models that a call is being undone for if it fails, by their ids.
_UNDONE: ContextVar[frozenset[int]] = ContextVar("undone", default=frozenset())
# Where DDP looks when it wraps a module, for names relative to that module.
_IGNORED = "_ddp_params_and_buffers_to_ignore"


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


def move_inside_wrappers(model: nn.Module) -> None:
    """The way back from `rehome_layers`, for when the wrappers are about to be taken away."""
    for child in adapter_children(model):
        if isinstance(child.host, BaseTunerLayer):
            child.rehome(child.host.get_base_layer())


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
