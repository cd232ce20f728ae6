"""Which entries of a configuration give biases to the linear layers of an architecture.

Found by building the architecture anew with each candidate set, without memory for its weights: a table would be out
of date with the next release of transformers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .ledger import BiasSwitch


def bias_switches(model: nn.Module) -> list[BiasSwitch]:
    """The entries that are off and would give biases, and nothing else, to layers of `model` that have none."""
    if not isinstance(model, PreTrainedModel):
        return []
    candidates = [(keys, name) for keys, name in _bias_entries(model.config)]
    plain = _shapes(model, model.config) if candidates else {}
    found = []
    for keys, name in candidates:
        config = copy.deepcopy(model.config)
        setattr(_part(config, keys), name, True)
        try:
            shapes = _shapes(model, config)
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            continue  # the architecture does not support what its configuration can say
        new = [key for key in shapes if key not in plain]
        if not new or any(plain[key] != shapes.get(key) for key in plain):
            continue
        modules = {key.removesuffix(".bias"): _bias_free(model, key) for key in new}
        if all(module is not None for module in modules.values()):
            part = _part(model.config, keys)
            layers = {path: module for path, module in modules.items() if module is not None}
            found.append(BiasSwitch(part, name, getattr(part, name), layers))
    return found


def _bias_entries(config: PretrainedConfig, keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """Entries that speak of a bias and are off, in the configuration and the configurations inside it."""
    found = []
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found += _bias_entries(value, (*keys, name))
        elif "bias" in name and (value is False or value is None):
            found.append((keys, name))
    return found


def _part(config: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        config = getattr(config, key)
    return config


def _shapes(model: nn.Module, config: PretrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(config))
    return {name: value.shape for name, value in built.state_dict().items()}


def _bias_free(model: nn.Module, key: str) -> nn.Module | None:
    path, _, name = key.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    is_free = type(module).forward is nn.Linear.forward and module._parameters.get("bias") is None
    return module if name == "bias" and is_free else None
