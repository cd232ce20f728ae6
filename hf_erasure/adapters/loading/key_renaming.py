"""Keys of an adapter file under other names: with or without a head, or as transformers renames old checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from transformers.core_model_loading import WeightRenaming

from ..common.config import ChildConfig
from ..common.files import PREFIX

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


def rename_tensors(tensors: dict[str, T], config: ChildConfig, prefix: str, outer: str = "") -> dict[str, T]:
    """The tensors of a file under the names that the adapter's modules have in the model it is loaded into.

    Args:
        tensors: By their names in the file, with `outer` in front or without.
        config: The adapter's, with the names of this model.
        prefix: See `prefix_of`.
        outer: What PEFT puts in front of all names.
    """
    expected = config.tensors() if config.fitted else {}

    def renamed(key: str) -> str:
        name = key.removeprefix(outer)
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        return key.removesuffix(name) + next((known for known in names if known in expected), name)

    named = {renamed(key): value for key, value in tensors.items()}
    return named if len(named) == len(tensors) else tensors


# Where a model notes how its checkpoint was converted.
_NOTE = "_weight_conversions"


def weight_mapping(
    original: Callable[..., Any], weight_conversions: Any, adapter_name: str, peft_config: Any = None
) -> Any:
    """What `load_adapter` does to the keys of a file: PEFT's prefix goes, and the adapter's name comes."""
    if not isinstance(peft_config, ChildConfig):
        return original(weight_conversions, adapter_name, peft_config=peft_config)
    kind = str(peft_config.peft_type).rpartition(".")[2].lower()
    return [
        WeightRenaming(rf"^{re.escape(PREFIX)}(.+)", r"\1"),
        WeightRenaming(rf"(\.{kind}\.{kind}_[^.]+)$", rf"\1.{adapter_name}"),
    ]


@contextmanager
def conversions_kept(model: Any, name: str) -> Iterator[None]:
    """Keep the model's note of how its checkpoint was converted, by which it is saved, while an adapter is loaded.

    transformers puts what the adapter's keys went through in its place, and all keys of the model would have PEFT's
    prefix when it is saved without the adapter.
    """
    noted = model.__dict__.get(_NOTE, _NOTE)
    yield
    if isinstance(model.peft_config.get(name), ChildConfig):
        if noted is _NOTE:
            model.__dict__.pop(_NOTE, None)
        else:
            setattr(model, _NOTE, noted)
