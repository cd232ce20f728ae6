"""Loading an adapter into a transformers model, into a `PeftModel`, or by `PeftModel.from_pretrained`.

Neither PEFT nor transformers undoes a load that fails, notices a missing or non-finite tensor, or looks at files before
it uses them. The three functions here are called in the place of theirs, call them, and add that.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import Tensor
from transformers.integrations import peft as integration

from hf_erasure.models.model import without_peft

from ..common.acting import all_configs, comparing_with_fitting, naming_what_goes_off
from ..common.config import ChildConfig
from ..common.files import COMMIT, PREFIX, WEIGHTS
from ..common.layer import adapter_children, outside_inference_mode
from ..common.model_state import is_of_ours, keys_of_own_copies, trained_tensors, undone_on_failure
from ..common.placement import device_map_of_offloaded, left_in_place
from ..saving import finish
from .file_checks import Source, looked_at, with_what_was_fitted
from .key_renaming import conversions_kept, prefix_of, rename_tensors

# Older releases report `modules_to_save` as weights that are not needed.
_LOADS_COPIES = "adapter_state_dict_load_map" in inspect.getsource(integration)
# Set within `from_pretrained`, which has looked at the files when it calls `load_adapter`.
_LOOKED: ContextVar[bool] = ContextVar("looked", default=False)


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
    source, pickled = _source_of(given)
    with _loading(model, name, source, config, pickled=pickled) as (place, wanted, is_ours):
        if source is not None:
            given["peft_model_id"] = place
        if wanted is not None:
            given["peft_config"] = wanted
        with device_map_of_offloaded(model), conversions_kept(model, name):
            result = original(*call.args, **call.kwargs)
        _check_loaded(model, name, config)
        copies = model.peft_config[name].modules_to_save if is_ours else None
        if copies and not _LOADS_COPIES:
            raise ValueError(
                f"This release of transformers does not load modules_to_save={copies} with load_adapter: load the "
                "adapter with PeftModel.from_pretrained(model, folder), or use a newer transformers."
            )
    return result


def _source_of(given: dict[str, Any]) -> tuple[Source | None, bool]:
    """Where `load_adapter` of transformers is about to read, and whether a pickle; nowhere when it is given tensors."""
    load_config, more = given.get("load_config"), given.get("kwargs", {})
    place = given.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
    if place is None or given.get("adapter_state_dict") is not None:
        return None, False
    options = (getattr(load_config, "download_kwargs", None), more.get("download_kwargs"), given.get("adapter_kwargs"))
    pickled = more.get("use_safetensors", getattr(load_config, "use_safetensors", None)) is False
    return Source.of(place, *options, more, given), pickled


def load_into_peft_model(
    original: Callable, model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """`PeftModel.load_adapter`, also over an adapter that is there."""
    if _LOOKED.get():
        return original(model_id, adapter_name, *args, **kwargs)
    present = model.peft_config.get(adapter_name)
    with _loading(model, adapter_name, Source.of(model_id, kwargs), present, is_given=False) as (place, _, is_ours):
        # Loading over an adapter would keep the old values of tensors that the file lacks.
        for child in adapter_children(model, adapter_name):
            child.await_values(adapter_name)
        with left_in_place(model) if is_ours else nullcontext():
            result = original(place, adapter_name, *args, **kwargs)
        _check_loaded(model, adapter_name)
    return result


def peft_model_from_pretrained(original: Callable, cls: type, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`PeftModel.from_pretrained`, which injects an adapter, freezes the model and then loads the weights."""
    call = inspect.signature(original).bind(model, *args, **kwargs)
    given = call.arguments
    name, config = given.get("adapter_name", "default"), given.get("config")
    with _loading(model, name, Source.of(given["model_id"], kwargs), config) as (place, wanted, is_ours):
        given["model_id"] = place
        if wanted is not None:
            given["config"] = wanted
        token = _LOOKED.set(True)
        try:
            with left_in_place(model) if is_ours else nullcontext():
                result = original(*call.args, **call.kwargs)
        finally:
            _LOOKED.reset(token)
        _check_loaded(result, name, config)
    return result


# ---- what all have in common -----------------------------------------------------------------------------------------


@contextmanager
def _loading(
    model: Any,
    name: str,
    source: Source | None,
    config: PeftConfig | None,
    *,
    is_given: bool = True,
    pickled: bool = False,
) -> Iterator[tuple[Any, ChildConfig | None, bool]]:
    """Look at the files first, and undo a load that fails.

    Args:
        model: What is loaded into.
        name: What the adapter will be called.
        source: Its files; None where the caller gives tensors.
        config: The configuration that is known already.
        is_given: Whether the caller gave it; otherwise it is that of an adapter which is overwritten.
        pickled: Whether the caller asked for a pickle.

    Yields:
        What to load instead of what was named, the configuration to load with, where the caller gave one of this
        package, and whether the adapter is one of this package.
    """
    with (
        undone_on_failure(model, name),
        naming_what_goes_off(model, name),
        comparing_with_fitting(model, name),
        ExitStack() as stack,
    ):
        wanted = config if is_given and isinstance(config, ChildConfig) else None
        if source is None:
            stack.enter_context(outside_inference_mode() if wanted else nullcontext())
            yield None, wanted, wanted is not None
            return
        if os.path.lexists(source.folder / COMMIT):
            finish(source.folder)
        wanted = wanted and with_what_was_fitted(wanted, source)
        place, is_ours = stack.enter_context(looked_at(model, source, wanted or config, pickled=pickled))
        stack.enter_context(outside_inference_mode() if is_ours else nullcontext())
        try:
            yield place, wanted, is_ours
        except SafetensorError as error:
            if not is_ours:
                raise
            raise ValueError(
                f"The {WEIGHTS} of {str(source.folder)!r} is damaged ({error}): copy or download it again."
            ) from error


def _check_loaded(model: Any, name: str, config: PeftConfig | None = None) -> None:
    """Take what was loaded into memory of its own, and raise where a value is missing or not finite.

    Args:
        model: With the adapter.
        name: The adapter.
        config: That a caller gave for loading. It is the adapter's own afterwards, as in PEFT.
    """
    if not is_of_ours(model, name):
        return
    if isinstance(config, ChildConfig):
        config.__dict__.update(model.peft_config[name].__dict__)
        model.peft_config[name] = config
    for child in adapter_children(model, name):
        child.settle(name)
        child.check_values(name)
    for tensor in trained_tensors(model, name):
        if tensor.device.type != "meta" and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"The modules_to_save={model.peft_config[name].modules_to_save} of adapter {name!r} are not finite: "
                f"{WEIGHTS} holds NaN. Copy or download it again."
            )


def set_peft_model_state_dict(
    original: Callable, model: Any, tensors: dict[str, Tensor], adapter_name: str = "default", *args: Any, **kwargs: Any
) -> Any:
    """PEFT's function as `PeftModel.load_adapter` calls it: a saved adapter without a head takes the model's own.

    A class of PEFT may want one all the same. It is the head that was trained with a LoRA, where there is one.
    """
    configs = all_configs(model)
    if not isinstance(configs.get(adapter_name), ChildConfig):
        return original(model, tensors, adapter_name, *args, **kwargs)
    trained = [name for name, config in configs.items() if not isinstance(config, ChildConfig)]
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            own = [module.modules_to_save[other] for other in trained if other in module.modules_to_save]
            for key, value in [*own, module.original_module][0].state_dict().items():
                tensors.setdefault(f"{name}.{key}", value)
    base = without_peft(model)
    tensors = rename_tensors(tensors, model.peft_config[adapter_name], prefix_of(base), PREFIX)
    with keys_of_own_copies(model, adapter_name):
        return original(model, tensors, adapter_name, *args, **kwargs)
