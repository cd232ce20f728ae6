"""Loading an adapter into a transformers model, into a `PeftModel`, or by `PeftModel.from_pretrained`.

The three functions here are called in the place of those of transformers and PEFT. An adapter of another method is left
to them. One of this package is read and checked before it touches a model; then PEFT attaches it, and its values are
put where they belong. What fails is undone, and a value that is missing or not finite is noticed.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, get_origin, get_type_hints

import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from transformers.utils.loading_report import LoadStateDictInfo

from ..common.acting import all_configs, comparing_with_fitting, naming_what_goes_off
from ..common.config import ChildConfig
from ..common.files import COMMIT, PREFIX, UNSEEN, WEIGHTS
from ..common.layer import adapter_children, outside_inference_mode
from ..common.model_state import auxiliary_wrappers, undone_on_failure
from ..common.placement import execution_device, left_in_place
from ..saving import finish
from .file_checks import Read, Source, prefix_of, read_adapter, rename_tensors

# What `from_pretrained` has read when it calls `load_adapter`.
_READ: ContextVar[Read | None] = ContextVar("read", default=None)


def load_adapter(
    original: Callable,
    model: Any,
    peft_model_id: Any = None,
    adapter_name: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`load_adapter` of a transformers model."""
    call = inspect.signature(original).bind(peft_model_id, adapter_name, *args, **kwargs)
    name, given, config = adapter_name or "default", call.arguments, call.arguments.get("peft_config")
    load_config, more, tensors = given.get("load_config"), given.get("kwargs", {}), given.get("adapter_state_dict")
    place = given.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
    with _loading(model, name):
        if place is None or tensors is not None:
            read = Read()
            if tensors is not None and isinstance(config, ChildConfig):
                read = Read(config.copied(), {key.removeprefix(PREFIX): value for key, value in tensors.items()})
        else:
            downloads = (getattr(load_config, "download_kwargs", None), more.get("download_kwargs"))
            source = Source.of(place, *downloads, given.get("adapter_kwargs"), more, given)
            pickled = more.get("use_safetensors", getattr(load_config, "use_safetensors", None)) is False
            read = _read(model, source, config, pickled=pickled)
        if read.config is None:
            return _by_others(read, original, call)
        if given.get("hotswap") is True:
            raise ValueError(f"hotswap=True is for a LoRA: leave it out to load the {read.config.described}.")
        if model._hf_peft_config_loaded and name in model.peft_config:
            raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
        read.config.inference_mode = not given.get("is_trainable", False)
        inject_adapter_in_model(read.config, model, name)
        model._hf_peft_config_loaded = True
        _take(model, name, read.tensors, config)
        if model.peft_config[name].inference_mode:
            model.eval()
            layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            for layer in layers:
                layer.requires_grad_(False)
    # Nothing is missing and nothing too many; releases have other fields.
    hints = get_type_hints(LoadStateDictInfo)
    return LoadStateDictInfo(**{field: (get_origin(hint) or hint)() for field, hint in hints.items()})


def load_into_peft_model(
    original: Callable, model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """`PeftModel.load_adapter`, also over an adapter that is there."""
    call = inspect.signature(original).bind(model_id, adapter_name, *args, **kwargs)
    is_trainable, present = call.arguments.get("is_trainable", False), model.peft_config.get(adapter_name)
    with _loading(model, adapter_name):
        read = _READ.get() or _read(model, Source.of(model_id, kwargs), present, is_given=False)
        if read.config is None:
            return _by_others(read, original, call)
        if present is None:
            read.config.inference_mode = not is_trainable
            model.add_adapter(adapter_name, read.config)
            if is_trainable and hasattr(model, "set_requires_grad"):  # older releases have left it so
                model.set_requires_grad(adapter_name)
        _take(model, adapter_name, read.tensors)
        if not is_trainable:
            model.eval()
    return _IncompatibleKeys([], [])


def peft_model_from_pretrained(original: Callable, cls: type, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`PeftModel.from_pretrained`, which injects an adapter, freezes the model and then loads the weights."""
    call = inspect.signature(original).bind(model, *args, **kwargs)
    given = call.arguments
    name, config = given.get("adapter_name", "default"), given.get("config")
    with _loading(model, name), ExitStack() as stack:
        read = _read(model, Source.of(given["model_id"], kwargs), config)
        stack.callback(_READ.reset, _READ.set(read))
        if read.config is None:
            return _by_others(read, original, call)
        given["config"] = read.config
        stack.enter_context(left_in_place(model))
        result = original(*call.args, **call.kwargs)
        _give_back(result, name, config)
    return result


# ---- what all have in common -----------------------------------------------------------------------------------------


@contextmanager
def _loading(model: Any, name: str) -> Iterator[None]:
    """Undo a load that fails, and say after another what is not any more as it was."""
    with undone_on_failure(model, name), naming_what_goes_off(model, name), comparing_with_fitting(model, name):
        yield


def _read(model: Any, source: Source, config: PeftConfig | None, **options: bool) -> Read:
    """Read and check an adapter, after a save into its folder that was killed is finished."""
    if os.path.lexists(source.folder / COMMIT):
        finish(source.folder)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return read_adapter(base, source, config, **options)


def _by_others(read: Read, original: Callable, call: inspect.BoundArguments) -> Any:
    """Let PEFT or transformers load an adapter that is not of this package, as far as could be seen."""
    token = UNSEEN.set(read.unseen)
    try:
        return original(*call.args, **call.kwargs)
    finally:
        UNSEEN.reset(token)


def _give_back(model: Any, name: str, config: Any) -> None:
    """Make the configuration that a caller gave the adapter's own, as PEFT does."""
    if isinstance(config, ChildConfig):
        config.__dict__.update(vars(model.peft_config[name]))
        model.peft_config[name] = config


def _take(model: Any, name: str, tensors: dict[str, Tensor], given: Any = None) -> None:
    """Put the values of a file into an adapter that was attached, and raise where one is missing or not finite.

    A class of PEFT may want a head that was not saved. It is the head that was trained with a LoRA, where there is one,
    or the model's own.

    Args:
        model: With the adapter.
        name: The adapter.
        tensors: By their names without PEFT's prefix.
        given: The configuration that a caller gave for loading, if one did.
    """
    _give_back(model, name, given)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    named = rename_tensors(tensors, model.peft_config[name], prefix_of(base))
    with outside_inference_mode():
        for child in adapter_children(base, name):
            stem = f"{child.path}.{child.child_name}"
            values = {part: named.get(f"{stem}.{part}") for part in child.stores(name)}
            child.take(name, values, execution_device(child.host))
        configs = all_configs(model)
        for path, wrapper in auxiliary_wrappers(base).items():
            if name not in wrapper._adapters:
                continue
            copies: Any = wrapper.modules_to_save
            trained = [copies[other] for other in copies if not isinstance(configs.get(other), ChildConfig)]
            present: dict[str, Tensor] = [*trained, wrapper.original_module][0].state_dict()
            found = {key: named.get(f"{path}.{key}", value) for key, value in present.items()}
            found = {key: value for key, value in found.items() if not value.is_meta}
            if any(value.is_floating_point() and not bool(torch.isfinite(value).all()) for value in found.values()):
                raise ValueError(
                    f"The modules_to_save={model.peft_config[name].modules_to_save} of adapter {name!r} are not "
                    f"finite: {WEIGHTS} holds NaN. Copy or download it again."
                )
            is_elsewhere = any(value.is_meta for value in copies[name].parameters())
            copies[name].load_state_dict(found, strict=False, assign=is_elsewhere)
