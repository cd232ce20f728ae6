"""Names of modules and tensors of an adapter in the bare model, and in the same model with a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from ..common.config import ChildConfig

Rename = Callable[[str], str]
T = TypeVar("T")


def renaming(model: nn.Module, names: Iterable[str]) -> Rename | None:
    """What turns names of modules into those that the same modules have in a model.

    Returns:
        None where a module is in this model neither as it is called, nor with or without the `base_model_prefix`.
    """
    names, modules = list(names), {name for name, _ in model.named_modules()}
    return next((rename for rename in _known(model) if all(rename(name) in modules for name in names)), None)


def absent(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Of the names of modules, those that are not in a model; those under none of its names, where some have one."""
    modules = {name for name, _ in model.named_modules()}
    missing = [name for name in names if name not in modules]
    nowhere = [name for name in missing if all(rename(name) not in modules for rename in _known(model))]
    return nowhere or missing


def _known(model: nn.Module) -> list[Rename]:
    prefix = f"{prefix_of(model)}."
    return [str, lambda name: prefix + name, lambda name: name.removeprefix(prefix)]


def prefix_of(model: Any) -> str:
    """What stands before the names of the bare model's modules in the same model with a head; may be empty."""
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model:
        return next(name for name, module in model.named_modules() if module is body)
    return getattr(model, "base_model_prefix", "")


def rename_fitted(config: ChildConfig, rename: Rename) -> None:
    """Let a fitted adapter act at the modules of other names, and say so in all that it has written down of them."""
    at = list(config.fitted_modules)
    config.provenance = dict(config.provenance)
    for field in ("fitted_sites", "fitted_parameters"):
        if getattr(config, field, None):
            setattr(config, field, {rename(name): value for name, value in getattr(config, field).items()})
    measured = {key: config.provenance[key] for key in ("leakage", "leakage_intervals") if config.provenance.get(key)}
    for key, figures in measured.items():
        config.provenance[key] = {rename(name) if name in at else name: value for name, value in figures.items()}
    kept = config.provenance.get("fingerprint") or {}
    config.provenance["fingerprint"] = {rename(name): sample for name, sample in kept.items()}
    # Patterns were made for the other names; where it acts is known.
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        setattr(config, field, None)


def rename_tensors(tensors: dict[str, T], config: ChildConfig, prefix: str) -> dict[str, T]:
    """The tensors of a file under the names that the adapter's modules have in the model it is loaded into.

    Args:
        tensors: By their names in the file, without PEFT's prefix.
        config: The adapter's, with the names of this model.
        prefix: See `prefix_of`.
    """
    expected = config.tensors() if config.fitted else {}

    def renamed(name: str) -> str:
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        return next((known for known in names if known in expected), name)

    named = {renamed(name): value for name, value in tensors.items()}
    return named if len(named) == len(tensors) else tensors
