"""What an adapter file holds: its tensors, their digest, and what would not come back from it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from hf_erasure.models.model import as_attribute

from .common.acting import warn_user
from .common.config import ChildConfig, fault_of
from .common.files import PICKLE, PREFIX, WEIGHTS
from .common.layer import AdapterChild, is_child
from .common.lookup import adapters_in

# The types of tensors that adapters have, by the names that safetensors has for them.
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"}
# What stands in the name of a module that was compiled, sharded or checkpointed by itself.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def adapter_state_dict(
    original: Callable, model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """`get_peft_model_state_dict`, which gives `own_tensors` for an adapter of either kind."""
    given = inspect.signature(original).bind(model, state_dict, adapter_name, *args, **kwargs).arguments
    whole = getattr(model, "_orig_mod", model)
    if not isinstance(whole.peft_config.get(adapter_name), ChildConfig):
        return original(model, state_dict, adapter_name, *args, **kwargs)
    refuse_embeddings(given.get("save_embedding_layers", "auto"))
    prefix = PREFIX if hasattr(whole, "get_base_model") else ""
    found = own_tensors(whole, adapter_name, whole.state_dict() if state_dict is None else state_dict)
    return {f"{prefix}{name}": tensor.detach() for name, tensor in found.items()}


def own_tensors(model: Any, adapter_name: str, state_dict: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter of either kind, with those of its `modules_to_save`, by the keys of its file.

    Values in a `state_dict`, as gathered from shards, go before the model's own. Keys are without PEFT's prefix.
    """
    config: ChildConfig = model.peft_config[adapter_name]
    is_wrapped = hasattr(model, "get_base_model")
    base: nn.Module = model.get_base_model() if is_wrapped else model
    given, root = state_dict or {}, PREFIX if is_wrapped else ""
    own: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for path, module in base.named_modules():
        kept: dict[str, tuple[str, Tensor]] = {}  # by the key below the module: the same in a file, and a value
        if isinstance(module, AdapterChild) and adapter_name in module.sticky_adapters:
            module.check_values(adapter_name)
            stores = module.stores(adapter_name)
            kept = {f"{part}.{adapter_name}": (part, store[adapter_name]) for part, store in stores.items()}
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            copied = module.modules_to_save[adapter_name].state_dict(keep_vars=True)
            kept = {f"modules_to_save.{adapter_name}.{name}": (name, tensor) for name, tensor in copied.items()}
        place = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
        for key, (name, tensor) in kept.items():
            value = given.get(f"{root}{path}.{key}", given.get(f"{root}{place}.{key}", tensor))
            (own if isinstance(module, AdapterChild) else copies)[f"{place}.{name}"] = value
    if not own:
        raise ValueError(
            f"The {config.described} cannot be saved: no module of this {type(base).__name__} has adapter "
            f"{adapter_name!r} any more, as after merge_and_unload() or unload(). Nothing was written. Save the "
            "adapter before that, or load it again. A merged model is saved by save_pretrained of what "
            "merge_and_unload() returned, into a folder of its own."
        )
    found = {name: (_TYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)) for name, tensor in own.items()}
    fault = fault_of(found, config, f"in this {type(base).__name__}") if config.fitted else None
    if fault is not None:
        raise ValueError(
            f"The {config.described} cannot be saved: {fault}. Nothing was written. Modules were taken out of the "
            "model or moved in it, or fields that fitting writes were changed: save the adapter before that, or load "
            "it into the model that it was fitted on."
        )
    for end in config.modules_to_save or ():  # a name that no module has is nothing to save
        named = [path for path, _ in base.named_modules() if path.endswith(end) and "modules_to_save" not in path]
        if named and not any(name.startswith(f"{path}.") for path in named for name in copies):
            raise ValueError(
                f"The {config.described} cannot be saved: {named[0]!r} is one of its modules_to_save="
                f"{config.modules_to_save}, and the adapter has no copy of it any more. Nothing was written. Load the "
                "adapter again, with PeftModel.from_pretrained(model, folder)."
            )
    for name, tensor in (own | copies).items():
        if tensor.device.type == "meta":
            raise ValueError(
                f"The {config.described} cannot be saved: {name!r} is on the meta device and has no values. Load the "
                "adapter again, into a model that has its weights."
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"The {config.described} cannot be saved: {name!r} has values that are not finite, and could not be "
                "loaded again. Nothing was written. Load the adapter again, or look at the state_dict that was given."
            )
    return own | copies


def refuse_embeddings(wish: Any) -> None:
    """Raise a `ValueError` where a caller wants the model's own embeddings among the tensors of an adapter."""
    if wish not in ("auto", False):
        raise ValueError(
            f"save_embedding_layers={wish!r} would put the model's own embeddings into the adapter, where no model "
            "loads them from: save the model itself, without adapters."
        )


# What decides on the effect of an adapter beside its tensors.
_SETTINGS = (
    "peft_type",
    "site",
    "feature_factor",
    "learning_rate",
    "pair",
    "lora_alpha",
    "alpha_pattern",
    "use_rslora",
)


def digest_of(folder: str | Path, config: Any) -> str | None:
    """Identify what an adapter does.

    The digest is the same for every copy, whether it was saved from a bare encoder or from a model with a head.

    Returns:
        16 hexadecimal digits; None where the folder, or the repository on the Hub, holds no weights.
    """
    named = (cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False) for name in (WEIGHTS, PICKLE))
    file = next(filter(None, named), None)
    if file is None:
        return None
    hashed = hashlib.sha256()
    settings: dict[str, Any] = {name: getattr(config, name, None) for name in _SETTINGS}
    dial = getattr(config, "dial", None)
    if dial is not None:
        settings["dial"] = [dial.strength, *dial.weights]
    hashed.update(json.dumps(settings, sort_keys=True, default=str).encode())
    if file.endswith(PICKLE):  # it is not opened
        hashed.update(Path(file).read_bytes())
        return hashed.hexdigest()[:16]
    with torch.device("cpu"), safe_open(file, framework="pt") as content:
        names = sorted(content.keys())
        # Names are hashed below what all begin with: a head on top of the encoder prefixes them all.
        first, last = (names[0].split("."), names[-1].split(".")) if names else ([], [])
        shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first) - 1)
        for name in names:
            value = content.get_tensor(name)
            value = value.float() if value.is_floating_point() else value
            hashed.update(f"{'.'.join(name.split('.')[shared:])} {list(value.shape)} {value.dtype}".encode())
            hashed.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


def digest_of_data(value: Any) -> str | None:
    """16 hexadecimal digits for plain data; None for nothing."""
    if not value:
        return None
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def refuse_loss(model: Any, state_dict: Mapping[str, Any] | None = None) -> None:
    """Refuse, or warn of, what a save of all of a model's tensors or a `state_dict` would lose of adapters in it."""
    saved: Any = model if getattr(model, "_hf_peft_config_loaded", False) else None
    if isinstance(model, PeftModel):
        saved = model.get_base_model()
    if all(m is saved or isinstance(m, BaseTuner) or "peft_config" not in vars(m) for m in model.modules()):
        return
    lost = [place for place in adapters_in(model, ChildConfig) if place.owner is not saved]
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
    own = list(getattr(model, "peft_config", None) or ())
    if not own:
        raise ValueError(
            f"Saving this {name} would lose {told}: {keep}. After {part}.delete_adapter({first.name!r}) the model is "
            "saved without it. An adapter that is loaded into the whole model, model.load_adapter(folder), is saved by "
            "model.save_pretrained; it may come from the part's folder."
        )
    # Of an adapter that is on here transformers would look for the configuration here.
    acting = saved.active_adapters() if saved is model else []
    foreign = [adapter for adapter in acting if adapter not in own]
    if foreign:
        raise ValueError(
            f"This {name} cannot be saved: {foreign} is on, which is not an adapter of it but of {part}, and {own} is "
            f"off. {keep}. Call model.set_adapter({own}) before saving this model with its own."
        )
    warn_user(f"Saving this {name} leaves out {told}: {keep}.")
