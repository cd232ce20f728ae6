"""Find the adapter in any object that a user passes as the model. The whole package uses this one look-up.

Users pass what they train or serve: a model, a `PeftModel`, a `SentenceTransformer`, the wrapper that `DataParallel`,
DDP, FSDP, DeepSpeed or `torch.compile` puts around a model, or a module of their own. The adapter is on a bare model
inside, the *owner*: the model whose `add_adapter` or `load_adapter` was called, or from which a `PeftModel` was made.
The adapter names its modules as the owner does. The owner may be a part of a model, such as the encoder below a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from hf_erasure.models.model import as_attribute, base_of, configs_on, modules_along

from .config import ChildConfig
from .layer import adapter_children

C = TypeVar("C", bound=ChildConfig)


class AdapterNotFound(ValueError):
    """A model does not have the adapter; the message names those that it has, and says how to add or load one."""


@dataclass(frozen=True)
class FoundAdapter(Generic[C]):
    """One adapter in a model."""

    name: str  # its name
    config: C  # its configuration
    owner: Any  # the bare model that has the adapter, which names its modules as this model does
    path: str  # the owner's name within the model that was passed
    # The outermost transformers model around the owner, such as the model with the head; the owner itself where no
    # other is around it. A batch goes through this model.
    model: Any
    holder: Any  # the `PeftModel` of the owner, or else the owner: its methods add, switch on and save adapters


def adapter_of(model: nn.Module, name: str, kind: type[C]) -> FoundAdapter[C]:
    """Find an adapter of a kind, `ChildConfig` for either, in a bare model or any module with one inside.

    Raises:
        AdapterNotFound: If the model has no adapter of that name and kind. It is a `ValueError`.
        ValueError: If several models inside have one; the message names their paths.
    """
    found = list(adapters_in(model, kind, name))
    if not found:
        others = [configs[name] for configs in map(configs_on, model.modules()) if configs and name in configs]
        article = "an" if kind.noun.startswith("hf") else "a"
        message = f"adapter_name={name!r} is not {article} {kind.noun} of this model ({type(model).__name__})"
        if any(isinstance(config, kind) for config in others):
            raise AdapterNotFound(f"{message} any more: its modules are gone. {_remedy(kind, name)}")
        message += f", but a {getattr(others[0].peft_type, 'value', others[0].peft_type)} adapter" if others else ""
        known = [place.name for place in adapters_in(model, kind)]
        raise AdapterNotFound(f"{message}; those here are {known or 'none'}. {_remedy(kind, name)}")
    if len(found) > 1:
        paths = [as_attribute(place.path) for place in found]
        raise ValueError(
            f"adapter_name={name!r} fits {len(found)} models inside this {type(model).__name__}: {', '.join(paths)}. "
            f"Pass the one that you mean, as in {paths[0]}."
        )
    return found[0]


def adapters_in(model: nn.Module, kind: type[C], only: str | None = None) -> Iterator[FoundAdapter[C]]:
    """The adapters of a kind, or only those with one name, each with the model that has it, in the model's order."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, such as a transformers model, got {type(model).__name__}.")
    for path, owner in model.named_modules():
        for name, config in (configs_on(owner) or {}).items():
            if only in (None, name) and isinstance(config, kind) and adapter_children(owner, name):
                around = modules_along(model, path)
                outer = next((module for module in around if isinstance(module, PreTrainedModel)), owner)
                peft_models = (m for m in around if isinstance(m, PeftModel) and base_of(m) is owner)
                holder = next(peft_models, owner)
                yield FoundAdapter(name, config, owner, path, outer, holder)


def only_adapter(model: nn.Module, kind: type[C]) -> str:
    """The name of the only adapter of a kind; none or several raise an error."""
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
