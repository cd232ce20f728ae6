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

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_erasure.models.model import as_attribute, configs_on, modules_along

from .config import ChildConfig
from .layer import adapter_children

C = TypeVar("C", bound=ChildConfig)


class AdapterNotFound(ValueError):
    """There is no such adapter in a model; the message says which are there, and how to add or load one."""


@dataclass(frozen=True)
class Found(Generic[C]):
    """One adapter in a model."""

    name: str  # its name
    config: C  # its configuration
    owner: Any  # the bare model that has it; the names of the adapter's modules are those within this model
    path: str  # the owner's name within the model that was passed
    # The outermost transformers model around the owner, such as the one with the head; the owner itself where there is
    # none. It is what a batch goes through.
    model: Any
    holder: Any  # what adapters are added to, switched on and saved by: the `PeftModel` of the owner, or the owner


def adapter_of(model: nn.Module, name: str, kind: type[C]) -> Found[C]:
    """Find an adapter of a kind, `ChildConfig` for either, in a bare model or any module with one inside.

    Raises:
        AdapterNotFound: If there is none of that name and kind. It is a `ValueError`.
        ValueError: If several models inside have one; names their paths.
    """
    found = list(adapters_in(model, kind, name))
    if not found:
        others = [configs[name] for configs in map(configs_on, model.modules()) if configs and name in configs]
        article = "an" if kind.noun.startswith("hf") else "a"
        told = f"adapter_name={name!r} is not {article} {kind.noun} of this model ({type(model).__name__})"
        if any(isinstance(config, kind) for config in others):
            raise AdapterNotFound(f"{told} any more: its modules are gone. {_remedy(kind, name)}")
        told += f", but a {getattr(others[0].peft_type, 'value', others[0].peft_type)} adapter" if others else ""
        known = [place.name for place in adapters_in(model, kind)]
        raise AdapterNotFound(f"{told}; those here are {known or 'none'}. {_remedy(kind, name)}")
    if len(found) > 1:
        paths = [as_attribute(place.path) for place in found]
        raise ValueError(
            f"adapter_name={name!r} fits {len(found)} models inside this {type(model).__name__}: {', '.join(paths)}. "
            f"Pass the one that you mean, as in {paths[0]}."
        )
    return found[0]


def adapters_in(model: nn.Module, kind: type[C], only: str | None = None) -> Iterator[Found[C]]:
    """The adapters of a kind, or those of one name, with the models that have them, in the model's order."""
    for path, owner in model.named_modules():
        for name, config in (configs_on(owner) or {}).items():
            if only in (None, name) and isinstance(config, kind) and adapter_children(owner, name):
                around = modules_along(model, path)
                outer = next((module for module in around if isinstance(module, PreTrainedModel)), owner)
                peft_models = (m for m in around if isinstance(m, PeftModel) and m.get_base_model() is owner)
                holder = next(peft_models, owner)
                yield Found(name, config, owner, path, outer, holder)


def only_adapter(model: nn.Module, kind: type[C]) -> str:
    """The name of the one adapter of a kind."""
    names = [place.name for place in adapters_in(model, kind)]
    if len(names) == 1:
        return names[0]
    if not names:
        raise AdapterNotFound(f"This {type(model).__name__} has no {kind.noun}. {_remedy(kind, 'default')}")
    raise ValueError(f"This {type(model).__name__} has several {kind.noun}s, {names}: say which with adapter_name=….")


def _remedy(kind: type[ChildConfig], name: str) -> str:
    return (
        f"Add one, model.add_adapter({kind.example}, adapter_name={name!r}), or load one, model.load_adapter(folder, "
        f"adapter_name={name!r})."
    )
