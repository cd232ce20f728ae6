"""Where an adapter is, whatever is passed as the model: the one look-up that everything uses.

Users pass what they train or serve: a model, a `PeftModel`, a `SentenceTransformer`, what `DataParallel`, DDP, FSDP,
DeepSpeed or `torch.compile` make of a model, or a module of their own. The adapter is on a bare model inside: the one
whose `add_adapter` or `load_adapter` was called, or that a `PeftModel` was made of. The names of the adapter's modules
are those within that model, the *owner*. The owner may be a part of a model, such as the encoder below a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel

from .base_config import ChildConfig
from .child import adapter_children

C = TypeVar("C", bound=ChildConfig)
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel, FullyShardedDataParallel)


class AdapterNotFound(ValueError):
    """There is no such adapter in a model; the message says which are there, and how to add or load one."""


@dataclass(frozen=True)
class Found(Generic[C]):
    """One adapter in a model.

    Attributes:
        name: Its name.
        config: Its configuration.
        owner: The bare model that has it; the names of the adapter's modules are those within this model.
        path: The owner's name within the model that was passed.
        model: The outermost transformers model around the owner, such as the one with the head; the owner itself where
            there is none. It is what a batch goes through.
        holder: What adapters are added to, switched on and saved by: the `PeftModel` of the owner, or the owner.
        callee: What to call instead of `model`, with the same inputs: the wrapper of FSDP, which gathers weights.
    """

    name: str
    config: C
    owner: Any
    path: str
    model: Any
    holder: Any
    callee: Any


def adapter_of(model: nn.Module, name: str, kind: type[C]) -> Found[C]:
    """Find an adapter.

    Args:
        model: What the user has: a bare model, or any module with one inside.
        name: The adapter's name.
        kind: Its kind; `ChildConfig` for either.

    Raises:
        AdapterNotFound: If there is none of that name and kind. It is a `ValueError`.
        ValueError: If several models inside have one; names their paths.
    """
    found = list(adapters_in(model, kind, name))
    if not found:
        raise AdapterNotFound(_absent(model, name, kind))
    if len(found) > 1:
        paths = [as_attribute(place.path) for place in found]
        raise ValueError(
            f"adapter_name={name!r} fits {len(found)} models inside this {type(model).__name__}: {', '.join(paths)}. "
            f"Pass the one that you mean, as in {paths[0]}."
        )
    return found[0]


def adapters_in(model: nn.Module, kind: type[C], only: str | None = None) -> Iterator[Found[C]]:
    """The adapters of a kind, or those of one name, with the models that have them, in the model's order."""
    for path, owner, configs in _owners(model):
        for name, config in configs.items():
            if only in (None, name) and isinstance(config, kind) and adapter_children(owner, name):
                around = _around(model, path)
                outer = next((module for module in around if isinstance(module, PreTrainedModel)), owner)
                peft_models = (m for m in around if isinstance(m, PeftModel) and m.get_base_model() is owner)
                holder = next(peft_models, owner)
                yield Found(name, config, owner, path, outer, holder, callee_of(model, outer))


def only_adapter(model: nn.Module, kind: type[C]) -> str:
    """The name of the one adapter of a kind.

    Raises:
        ValueError: If there are none or several.
    """
    names = [place.name for place in adapters_in(model, kind)]
    if len(names) == 1:
        return names[0]
    if not names:
        raise AdapterNotFound(f"This {type(model).__name__} has no {kind.noun}. {_remedy(kind, 'default')}")
    raise ValueError(f"This {type(model).__name__} has several {kind.noun}s, {names}: say which with adapter_name=….")


def bare_model(model: Any) -> Any:
    """The model inside a `PeftModel` and other wrappers: the outermost transformers model, if there is one.

    A module that holds several transformers models beside each other, or none, is taken for the model itself.
    """
    inner = unwrapped(model)
    while inner is not model:
        model, inner = inner, unwrapped(inner)
    within = {path: module for path, module in model.named_modules() if _is_bare(module)}
    outermost = next(iter(within), "")
    is_around = all(path.startswith(f"{outermost}.") for path in within if path != outermost)
    return within[outermost] if outermost and is_around else model


def class_name(model: nn.Module) -> str:
    """The name of a model's class in transformers; FSDP2 puts its own in front."""
    name = type(model).__name__
    return name.removeprefix("FSDP") if isinstance(model, FSDPModule) else name


def callee_of(model: nn.Module, bare: nn.Module) -> Any:
    """What to call so that the bare model inside `model` is run: FSDP gathers weights at its outermost wrapper."""
    path = next(path for path, module in model.named_modules() if module is bare)
    return next((m for m in _around(model, path) if isinstance(m, (FSDPModule, FullyShardedDataParallel))), bare)


def as_attribute(path: str) -> str:
    """How to write the submodule of `model` at a path."""
    if not path:
        return "the model itself"
    if all(part.isidentifier() for part in path.split(".")):
        return f"model.{path}"
    return f"model.get_submodule({path!r})"


def _is_bare(module: nn.Module) -> bool:
    """Whether it is a model that adapters are added to, and no wrapper of one."""
    return isinstance(module, PreTrainedModel) or _configs_on(module) is not None


def _configs_on(module: nn.Module) -> dict[str, PeftConfig] | None:
    """What PEFT has noted on a bare model; a `PeftModel` and its tuner show the same, and are not asked."""
    configs = None if isinstance(module, BaseTuner) else module.__dict__.get("peft_config")
    return configs if isinstance(configs, dict) else None


def unwrapped(model: Any) -> Any:
    """What is inside of one wrapper of accelerate's, torch's or PEFT's own; other modules are given back."""
    # Older releases of accelerate fail at a module that has compiled ones inside.
    inner = model._modules.get("_orig_mod", model.__dict__.get("_orig_mod", model))
    while isinstance(inner, _PARALLEL) or type(inner).__name__ == "DeepSpeedEngine":
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, PeftConfig]]]:
    """The modules that PEFT has noted adapters on, with the names they have in `model`."""
    for path, module in model.named_modules():
        configs = _configs_on(module)
        if configs is not None:
            yield path, module, configs


def _around(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules from `model` down to the one at a path, both among them."""
    found = [model]
    for part in path.split(".") if path else ():
        found.append(found[-1]._modules[part])  # type: ignore[arg-type]
    return found


def _absent(model: nn.Module, name: str, kind: type[ChildConfig]) -> str:
    others = [configs[name] for _, _, configs in _owners(model) if name in configs]
    known = [place.name for place in adapters_in(model, kind)]
    article = "an" if kind.noun.startswith("hf") else "a"
    told = f"adapter_name={name!r} is not {article} {kind.noun} of this model ({type(model).__name__})"
    if any(isinstance(config, kind) for config in others):
        return f"{told} any more: its modules are gone. {_remedy(kind, name)}"
    told += f", but a {getattr(others[0].peft_type, 'value', others[0].peft_type)} adapter" if others else ""
    return f"{told}; those here are {known or 'none'}. {_remedy(kind, name)}"


def _remedy(kind: type[ChildConfig], name: str) -> str:
    return (
        f"Add one, model.add_adapter({kind.example}, adapter_name={name!r}), or load one, model.load_adapter(folder, "
        f"adapter_name={name!r})."
    )
