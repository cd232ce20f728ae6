"""A save of a model from which an adapter of this package would not come back: one on a part of it, or inside PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from .active import users_level
from .base_config import ChildConfig
from .child_tuner import is_child
from .lookup import Found, adapters_in, as_attribute


def refuse_loss(model: nn.Module, state_dict: Mapping[str, Any] | None = None) -> None:
    """Called before `model.save_pretrained`, or before a training that will call it.

    A model that holds adapters itself saves the active one and no weights; it is told in a warning what is left out.

    Args:
        model: A transformers model, or a `PeftModel`.
        state_dict: What is to be written; all of the model's tensors when None.

    Raises:
        ValueError: If the weights of the model would be written, among them tensors of an adapter that nothing reads.
    """
    lost = [place for place in adapters_in(model, ChildConfig) if not _is_saved(model, place)]
    if not lost or (state_dict is not None and not any(is_child(key) for key in state_dict)):
        return
    first = lost[0]
    told, name = f"the {first.config.described}, {first.name!r}, on {as_attribute(first.path)}", type(model).__name__
    if first.owner is model:
        raise ValueError(
            f"Saving this {name} would lose {told}, which PEFT added to it. Save the PeftModel, peft_model."
            "save_pretrained(folder), or merge it first; or add adapters by model.add_adapter and model.load_adapter."
        )
    part = as_attribute(first.path)
    keep = f"{part}.save_pretrained(folder) saves it in a folder of its own"
    if getattr(model, "peft_config", None):
        _refuse_foreign(model, lost, keep)
        warnings.warn(f"Saving this {name} leaves out {told}: {keep}.", stacklevel=users_level())
        return
    raise ValueError(
        f"Saving this {name} would lose {told}: {keep}. After {part}.delete_adapter({first.name!r}) the model is saved "
        f"without it. An adapter that is loaded into the whole model, model.load_adapter(folder), is saved by "
        "model.save_pretrained; it may come from the part's folder."
    )


def _refuse_foreign(model: Any, lost: list[Found[ChildConfig]], keep: str) -> None:
    """Raise where the adapter of a part is on in the place of the model's own: transformers would look for it here."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return
    foreign = [name for name in model.active_adapters() if name not in model.peft_config]
    if foreign:
        own = list(model.peft_config)
        raise ValueError(
            f"This {type(model).__name__} cannot be saved: {foreign} is on, which is not an adapter of it but of "
            f"{as_attribute(lost[0].path)}, and {own} is off. {keep}. Call model.set_adapter({own}) before saving this "
            "model with its own."
        )


def _is_saved(model: Any, place: Found[ChildConfig]) -> bool:
    """Whether `save_pretrained` of the model takes an adapter for one of its own."""
    return place.holder is model and (model is not place.owner or getattr(model, "_hf_peft_config_loaded", False))
