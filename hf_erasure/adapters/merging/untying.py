"""Tied tables, such as those of the embedding and of the head, that a merge must give values of their own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..common.layer import innermost
from ..common.placement import is_offloaded, shared_weights

_ENTRY = "tie_word_embeddings"


class Untied:
    """All tied weights of a model, each with values of its own; the configuration says so, and reloading does too.

    One entry of the configuration ties all of them.

    Args:
        model: As transformers made it.

    Attributes:
        owners: Each tied weight, with the modules that own it and its names there.
        modules: All these modules.

    Raises:
        ValueError: If this model cannot be made, or saved, with the same weights and not tied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owners = _tied_by_configuration(model)
        self.modules = [module for places in self.owners.values() for module, _ in places]
        self._shared = {weight: places[0][0].get_parameter(places[0][1]) for weight, places in self.owners.items()}
        self._configs = [(c, getattr(c, _ENTRY)) for c in _configs_of(model) if getattr(c, _ENTRY, False)]
        models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        self._keys: list[tuple[Any, dict[str, str]]] = [
            (m, m.all_tied_weights_keys) for m in models if getattr(m, "all_tied_weights_keys", None)
        ]
        self.is_open = False

    @property
    def bytes(self) -> int:
        """How many bytes the model has more."""
        return sum((len(self.owners[weight]) - 1) * p.numel() * p.element_size() for weight, p in self._shared.items())

    def untie(self) -> None:
        """Give all but the first owner of each weight a copy; the configuration says that nothing is tied."""
        self.is_open = True
        for config, _ in self._configs:
            setattr(config, _ENTRY, False)
        for model, _ in self._keys:
            model.all_tied_weights_keys = {}
        for places in self.owners.values():
            for module, name in places[1:]:
                shared = module.get_parameter(name)
                module._parameters[name] = nn.Parameter(shared.detach().clone(), shared.requires_grad)

    def tie_again(self) -> None:
        """Put the shared weights back, with the values that their first owners have now."""
        for config, value in self._configs:
            setattr(config, _ENTRY, value)
        for model, keys in self._keys:
            model.all_tied_weights_keys = keys
        for weight, places in self.owners.items() if self.is_open else ():
            for module, name in places:
                module._parameters[name] = self._shared[weight]
        self.is_open = False


def why_not_untied(model: nn.Module, path: str) -> str | None:
    """The reason why a module cannot get a weight of its own, in words that follow its name; None where it can."""
    if is_offloaded(model):
        return "weights of this model are offloaded: load it on one device to untie them"
    module = model.get_submodule(path)
    for places in _tied_by_configuration(model).values():
        if any(owner is module for owner, _ in places):
            return None
    return f"{type(model).__name__} has no {_ENTRY} in its configuration that ties it"


def _tied_by_configuration(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """The weights that an entry of the configuration ties, with their owners, each once."""
    keys: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    by_configuration = {*keys, *keys.values()}
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for names in shared_weights(model).values():
        plain = [name.replace(".base_layer.", ".") for name in names]
        if not by_configuration & {*plain} or names[0] in found:
            continue
        owners: dict[int, tuple[nn.Module, str]] = {}
        for name in names:
            path, _, own = name.rpartition(".")
            module = innermost(model.get_submodule(path))
            owners.setdefault(id(module), (module, own))
        if len(owners) > 1:
            found[names[0]] = list(owners.values())
    return found


def _configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """The configurations in a model, and those inside them, each once."""
    left = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    found: dict[int, PretrainedConfig] = {}
    while left:
        config = left.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            left += [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return list(found.values())
