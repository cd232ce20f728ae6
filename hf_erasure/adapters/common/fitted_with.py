"""The other adapters that acted while one was fitted, and whether the same act now.

What is fitted is fitted on the activations, or the gradients, of a model with all that acts in it. Beside other
adapters it is an eraser, or a feature, of another model. So fitting writes down which others acted, each with a few of
its values, since names change from one session to the next.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..gradiend.config import GradiendConfig
from .acting import acting_adapters, all_configs, loaded_adapters, users_level
from .config import ChildConfig
from .provenance import Provenance
from .type_checks import fits, short

_COMPARING: ContextVar[bool] = ContextVar("comparing", default=False)
# So many tensors of an adapter are looked at, two values of each.
_TENSORS = 16
# What rounding to bfloat16 may change of a value, with a margin.
_ROUNDING = 2.0**-7


def active_beside(model: nn.Module, adapter_name: str) -> list[dict[str, Any]]:
    """The other adapters that act, as fitting writes them down: `{"name", "kind", "sample"}` of each.

    Args:
        model: Bare or wrapped in a `PeftModel`.
        adapter_name: The adapter that is fitted, or was.
    """
    others = {name: noun for name, noun in acting_adapters(model).items() if name != adapter_name}
    configs = all_configs(model)
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
    """Name the loaded adapters that do not act while one is fitted.

    Args:
        model: Bare or wrapped in a `PeftModel`.
        adapter_name: The adapter that is about to be fitted.
        expected: Adapters that are off on purpose.
    """
    configs, on = all_configs(model), acting_adapters(model)
    off = {
        name: noun
        for name, noun in loaded_adapters(model).items()
        if name not in on and name not in (adapter_name, *expected) and _has_effect(configs.get(name))
    }
    if off:
        together = [*(name for name in on if name != adapter_name), *off, adapter_name]
        warnings.warn(
            f"{adapter_name!r} is being fitted while {_listed(off)} {_are(off)} off: what is fitted is for the model "
            f"without {'them' if len(off) > 1 else 'it'}. Where they are to act together, call "
            f"model.set_adapter({together}) first, and fit then.",
            stacklevel=users_level(),
        )


def other_than_when_fitted(model: nn.Module, adapter_name: str) -> str:
    """In words, how the other adapters that act differ from those that acted at fitting; empty if they are the same."""
    config = all_configs(model).get(adapter_name)
    record = Provenance.of(config).active_adapters if isinstance(config, ChildConfig) and config.fitted else None
    if record is None:  # of an older release
        return ""
    now = active_beside(model, adapter_name)
    gone, come, changed = _matched(record, now)
    loaded = loaded_adapters(model)
    said = []
    for entry in gone:
        place = "is off now" if entry.get("name") in loaded else "is not loaded here, unless it is part of the weights"
        said.append(f"{_called(entry)} was on and {place}")
    said += [f"{_called(entry)} is on and was not" for entry in come]
    said += [f"{_called(entry)} has other values than it had" for entry in changed]
    if not said:
        return ""
    return (
        f"Other adapters act here than when {adapter_name!r} was fitted: {'; '.join(said)}. What was measured then "
        "holds for the model of then: switch on what was on, or fit again."
    )


@contextmanager
def comparing_with_fitting(model: nn.Module, newcomer: str) -> Iterator[None]:
    """Warn, after an adapter was loaded, of each that now acts among other adapters than those it was fitted among."""
    if _COMPARING.get():  # what is loaded belongs to a load that says it
        yield
        return
    before = {name: other_than_when_fitted(model, name) for name in all_configs(model)}
    token = _COMPARING.set(True)
    try:
        yield
    finally:
        _COMPARING.reset(token)
    acting = acting_adapters(model)
    for name in all_configs(model):
        said = other_than_when_fitted(model, name) if name in acting or name == newcomer else ""
        if said and said != before.get(name):
            warnings.warn(said, stacklevel=users_level())


# ---- one adapter -----------------------------------------------------------------------------------------------------


def _has_effect(config: Any) -> bool:
    """Whether an adapter would do anything if it were on."""
    if not isinstance(config, ChildConfig):
        return True
    return config.fitted and not (isinstance(config, GradiendConfig) and config.learning_rate == 0)


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
    if isinstance(config, GradiendConfig):
        found += [config.feature_factor, config.learning_rate]
    layers = (module for module in model.modules() if isinstance(module, LoraLayer) and name in module.scaling)
    found += [float(layer.scaling[name]) for layer in list(layers)[:1]]
    return [float(f"{value:.6g}") for value in found] if all(map(math.isfinite, found)) else []


def _matched(record: list[Any], now: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Of the adapters then and now: those that are gone, that have come, and that have other values."""
    gone, come = list(record), list(now)
    changed = []
    for entry in record:
        same = next((other for other in come if _is_same(entry, other)), None)
        if same is not None:
            gone.remove(entry)
            come.remove(same)
    for entry in list(gone):
        namesake = next((o for o in come if (o["name"], o["kind"]) == (entry.get("name"), entry.get("kind"))), None)
        if namesake is not None:
            gone.remove(entry)
            come.remove(namesake)
            changed.append(namesake)
    return gone, come, changed


def _is_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if then.get("kind") != now["kind"]:
        return False
    kept, seen = then.get("sample"), now["sample"]
    if not kept or not seen or not fits(kept, list[float]):
        return then.get("name") == now["name"]
    return len(kept) == len(seen) and all(
        math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=1e-30) for a, b in zip(kept, seen, strict=True)
    )


def _called(entry: Mapping[str, Any]) -> str:
    return f"the {short(entry.get('kind'))[1:-1]} {short(entry.get('name'))}"


def _listed(adapters: Mapping[str, str]) -> str:
    return ", ".join(f"the {noun} {name!r}" for name, noun in sorted(adapters.items()))


def _are(adapters: Mapping[str, str]) -> str:
    return "are" if len(adapters) > 1 else "is"
