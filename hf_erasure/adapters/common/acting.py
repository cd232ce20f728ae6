"""Which adapters act in a model: now, after another has come, and when one of them was fitted.

Beside other adapters an eraser, or a feature, is one of another model. So fitting writes down which others acted, each
with a few of its values, since names change from one session to the next.
"""

from __future__ import annotations

import functools
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import ChildConfig, Provenance, fits, short
from .layer import AdapterChild, adapter_children, configs_of
from .model_state import ActiveCopies, auxiliary_wrappers, check_one_copy, note_adapters, undone_on_failure

# Set while an adapter is being added or loaded: what went off is said once, when all is done.
_ADDING: ContextVar[bool] = ContextVar("adding", default=False)
_LIBRARIES = ("hf_erasure", "peft", "transformers", "trl", "torch", "contextlib")
# So many tensors of an adapter are looked at, two values of each.
_TENSORS = 16
# What rounding to bfloat16 may change of a value, relative to it, with a margin.
_ROUNDING = 2.0**-7


@dataclass(frozen=True)
class Present:
    """The adapters of a model, each with what messages call it."""

    loaded: dict[str, str] = field(default_factory=dict)  # those that are there, acting or not
    # Those that act, and those that would but for having no effect yet, as before they are fitted.
    on: dict[str, str] = field(default_factory=dict)
    acting: dict[str, str] = field(default_factory=dict)  # those that act, merged or not


def adapters_now(model: nn.Module) -> Present:
    """The adapters of a model as they are now, those of other methods too."""
    found, configs = Present(), all_configs(model)
    # What a wrapper of an embedding has inside goes with the adapter that it was trained with.
    wrappers = (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))
    inside = {id(wrapper._modules.get("token_adapter")) for wrapper in wrappers}
    for module in model.modules():
        if isinstance(module, AdapterChild):
            nouns = dict.fromkeys(module.sticky_adapters, module.noun)
            acting = {*module.acting_adapters(), *module.merged_adapters}
            on = acting | {*module.switched_on()}
        elif isinstance(module, BaseTunerLayer) and id(module) not in inside:
            names = {name for part in module.adapter_layer_names for name in getattr(module, part, ())}
            nouns = {name: f"{kind_of(configs.get(name), module)} adapter" for name in names}
            on = acting = set() if module.disable_adapters else {*module.active_adapters, *module.merged_adapters}
        else:
            continue
        found.loaded.update(nouns)
        found.on.update((name, noun) for name, noun in nouns.items() if name in on)
        found.acting.update((name, noun) for name, noun in nouns.items() if name in acting)
    return found


def all_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """The configurations of all adapters by name, also of those that hang on a part of the model."""
    found: dict[str, PeftConfig] = {}
    for module in model.modules():
        for name, config in (module.__dict__.get("peft_config") or {}).items():
            found.setdefault(name, config)
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


# ---- what goes off when another comes --------------------------------------------------------------------------------


@contextmanager
def naming_what_goes_off(model: Any, newcomer: str, expected: Iterable[str] = ()) -> Iterator[None]:
    """Warn of what acted before an adapter came and does not afterwards, unless that is `expected`."""
    if _ADDING.get():  # the call that this one is a part of says it
        yield
        return
    before, copies = adapters_now(model).on, ActiveCopies(model)
    token = _ADDING.set(True)
    try:
        yield
    finally:
        _ADDING.reset(token)
    if not adapter_children(model):
        return
    after, configs = adapters_now(model).on, all_configs(model)
    off = {name: noun for name, noun in before.items() if name not in after and name not in expected}
    if off:
        of_ours = any(isinstance(configs.get(name), ChildConfig) for name in off)
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
        warn_of_copies(model, copies.on, newcomer if newcomer in after else "")


def warn_of_copies(model: nn.Module, before: dict[str, str], newcomer: str | None = None) -> None:
    """Name the copies that acted before and do not any more, and those of a newcomer that acts without them."""
    if _ADDING.get():
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
    names, copies, configs = check_one_copy(model, adapter_name), ActiveCopies(model), all_configs(model)
    note_adapters(model)  # a class of a task may have added its head since
    ours = {name for name, config in configs.items() if isinstance(config, ChildConfig)}
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


# ---- what acts beside an adapter that is fitted, and afterwards ------------------------------------------------------


def active_beside(model: nn.Module, adapter_name: str) -> list[dict[str, Any]]:
    """The other adapters that act, as fitting writes them down: `{"name", "kind", "sample"}` of each."""
    configs = all_configs(model)
    others = {name: noun for name, noun in adapters_now(model).acting.items() if name != adapter_name}
    fitted = [name for name in others if not isinstance(configs.get(name), ChildConfig) or configs[name].fitted]
    return [{"name": name, "kind": others[name], "sample": _sample(model, name)} for name in fitted]


def without(record: Iterable[Any], names: Collection[Any]) -> list[Any]:
    """A record without some adapters, and without what it has twice."""
    left: list[Any] = []
    for entry in record:
        if entry not in left and (not isinstance(entry, dict) or entry.get("name") not in names):
            left.append(entry)
    return left


def warn_of_what_is_off(model: nn.Module, adapter_name: str, expected: Iterable[str] = ()) -> None:
    """Name the loaded adapters that do not act while one is fitted, but for those `expected` to be off."""
    now = adapters_now(model)
    known = {*now.acting, *expected, adapter_name}
    off = {name: noun for name, noun in now.loaded.items() if name not in known}
    for name, config in all_configs(model).items():
        if name in off and isinstance(config, ChildConfig) and not config.has_effect:
            del off[name]
    if off:
        together = [*(name for name in now.acting if name != adapter_name), *off, adapter_name]
        are, them = ("are", "them") if len(off) > 1 else ("is", "it")
        warn_user(
            f"{adapter_name!r} is being fitted while {_listed(off)} {are} off: what is fitted is for the model "
            f"without {them}. Where they are to act together, call model.set_adapter({together}) first, and fit then."
        )


def other_than_when_fitted(model: nn.Module, adapter_name: str) -> str:
    """In words, how the other adapters that act differ from those that acted at fitting; empty if they are the same."""
    config = all_configs(model).get(adapter_name)
    record = Provenance.of(config).active_adapters if isinstance(config, ChildConfig) and config.fitted else None
    if record is None:  # of an older release
        return ""
    gone, come = list(record), active_beside(model, adapter_name)
    for entry in record:
        same = next((other for other in come if _is_same(entry, other)), None)
        if same is not None:
            gone.remove(entry)
            come.remove(same)
    loaded, said, changed = adapters_now(model).loaded, [], []
    for entry in gone:
        called = f"the {short(entry.get('kind'))[1:-1]} {short(entry.get('name'))}"
        namesake = next((o for o in come if (o["name"], o["kind"]) == (entry.get("name"), entry.get("kind"))), None)
        if namesake is not None:
            come.remove(namesake)
            changed.append(f"{called} has other values than it had")
        elif entry.get("name") in loaded:
            said.append(f"{called} was on and is off now")
        else:
            said.append(f"{called} was on and is not loaded here, unless it is part of the weights")
    said += [f"the {entry['kind']} {entry['name']!r} is on and was not" for entry in come]
    said += changed
    if not said:
        return ""
    return (
        f"Other adapters act here than when {adapter_name!r} was fitted: {'; '.join(said)}. What was measured then "
        "holds for the model of then: switch on what was on, or fit again."
    )


@contextmanager
def undone_or_told(model: nn.Module, newcomer: str) -> Iterator[None]:
    """Undo a load that fails, and say after another what went off, and what acts among others than at fitting."""
    is_part = _ADDING.get()  # of a load that says it
    with undone_on_failure(model, newcomer), naming_what_goes_off(model, newcomer):
        before = {} if is_part else {name: other_than_when_fitted(model, name) for name in all_configs(model)}
        yield
        acting = adapters_now(model).acting
        for name in () if is_part else all_configs(model):
            said = other_than_when_fitted(model, name) if name in acting or name == newcomer else ""
            if said and said != before.get(name):
                warn_user(said)


def _sample(model: nn.Module, name: str) -> list[float]:
    """A few values by which an adapter is known again; none where they are elsewhere, or in parts."""
    named = [*model.named_parameters(), *model.named_buffers()]
    own = {key: tensor for key, tensor in named if name in key.split(".")[-2:] and "modules_to_save" not in key}
    # By names without the adapter's own, which may be another one in another session.
    keys = sorted((key for key in own if own[key].numel()), key=lambda key: key.replace(f".{name}", ""))
    keys = keys[:: math.ceil(len(keys) / _TENSORS)] if keys else []
    found = []
    for key in keys:
        tensor = own[key].data
        if tensor.device.type == "meta" or type(tensor) is not Tensor:
            return []
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().view(-1)
        positions = torch.tensor([flat.numel() // 3, 2 * flat.numel() // 3], device=flat.device)
        found += flat[positions].double().tolist()
    config = all_configs(model).get(name)
    if isinstance(config, ChildConfig):
        found += config.strengths
    layers = (module for module in model.modules() if isinstance(module, LoraLayer) and name in module.scaling)
    found += [float(layer.scaling[name]) for layer in list(layers)[:1]]
    return [float(f"{value:.6g}") for value in found] if all(map(math.isfinite, found)) else []


def _is_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    kept, seen = then.get("sample"), now["sample"]
    if then.get("kind") != now["kind"] or not kept or not seen or not fits(kept, list[float]):
        return then.get("kind") == now["kind"] and then.get("name") == now["name"]
    is_near = functools.partial(math.isclose, rel_tol=_ROUNDING, abs_tol=1e-30)
    return len(kept) == len(seen) and all(map(is_near, kept, seen))
