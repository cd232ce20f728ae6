"""The tensors of an adapter as its file has them: all that its configuration names, or an error.

PEFT chooses what it saves by names: a tensor is left out if another adapter is called like a part of its key, the
model's embeddings are added where its vocabulary has changed, and of an adapter that was unloaded an empty file is
written. So the tensors are taken from the modules themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .base_config import ChildConfig
from .child import AdapterChild
from .untrusted import PREFIX, TYPES

# What stands in the name of a module that was compiled, sharded or checkpointed by itself.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def adapter_state_dict(
    original: Callable, model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """`get_peft_model_state_dict`, which gives `own_tensors` for an adapter of either kind.

    Raises:
        ValueError: If the model does not have all tensors, or those of the model itself are asked for too.
    """
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

    Args:
        model: A transformers model or a `PeftModel` with the adapter.
        adapter_name: The adapter.
        state_dict: Values that go before the model's own, as gathered from shards.

    Returns:
        Key without PEFT's prefix → tensor.

    Raises:
        ValueError: If the model does not have all of them, or has values that are missing or not finite.
    """
    config: ChildConfig = model.peft_config[adapter_name]
    is_wrapped = hasattr(model, "get_base_model")
    base: nn.Module = model.get_base_model() if is_wrapped else model
    given, root = state_dict or {}, PREFIX if is_wrapped else ""
    own: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for path, module in base.named_modules():
        place = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
        for key, name, tensor in _saved(module, adapter_name):
            value = given.get(f"{root}{path}.{key}", given.get(f"{root}{place}.{key}", tensor))
            (own if isinstance(module, AdapterChild) else copies)[f"{place}.{name}"] = value
        if isinstance(module, AdapterChild) and adapter_name in module.adapters:
            module.check_values(adapter_name)
    _check_whole(own, config, adapter_name, base)
    _check_copies(copies, config, base)
    nowhere = next((name for name, tensor in (own | copies).items() if tensor.device.type == "meta"), None)
    if nowhere is not None:
        raise ValueError(
            f"The {config.described} cannot be saved: {nowhere!r} is on the meta device and has no values. Load the "
            "adapter again, into a model that has its weights."
        )
    infinite = next(
        (n for n, t in (own | copies).items() if t.is_floating_point() and not bool(t.isfinite().all())), None
    )
    if infinite is not None:
        raise ValueError(
            f"The {config.described} cannot be saved: {infinite!r} has values that are not finite, and could not be "
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


def _saved(module: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, Tensor]]:
    """What one module keeps for an adapter: the key below the module, the same without the adapter's name, a value."""
    if isinstance(module, AdapterChild):
        for key, tensor in module.state_dict(keep_vars=True).items():
            if key.endswith(f".{adapter_name}"):
                yield key, key.removesuffix(f".{adapter_name}"), tensor
    elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
        for name, tensor in module.modules_to_save[adapter_name].state_dict(keep_vars=True).items():
            yield f"modules_to_save.{adapter_name}.{name}", name, tensor


def _check_whole(own: dict[str, Tensor], config: ChildConfig, adapter_name: str, base: nn.Module) -> None:
    """Raise if the model has only a part of an adapter, or nothing of it any more, or more than its configuration."""
    if not own:
        raise ValueError(
            f"The {config.described} cannot be saved: no module of this {type(base).__name__} has adapter "
            f"{adapter_name!r} any more, as after merge_and_unload() or unload(). Nothing was written. Save the "
            "adapter before that, or load it again. A merged model is saved by save_pretrained of what "
            "merge_and_unload() returned, into a folder of its own."
        )
    if not config.fitted:
        return
    expected = config.tensors()
    missing = [name for name in expected if name not in own]
    if missing:
        raise ValueError(
            f"The {config.described} cannot be saved: this {type(base).__name__} has {len(expected) - len(missing)} of "
            f"the {len(expected)} tensors of adapter {adapter_name!r}, and {missing[0]!r} is not among them. Nothing "
            "was written. Modules were taken out of the model or moved in it: save the adapter before that, or load "
            "it into the model that it was fitted on."
        )
    wrong = [
        name
        for name, tensor in own.items()
        if name not in expected
        or tuple(tensor.shape) != expected[name][0]
        or TYPES.get(tensor.dtype) not in expected[name][1]
    ]
    if wrong:
        raise ValueError(
            f"The {config.described} cannot be saved: {wrong[0]!r} of adapter {adapter_name!r}, shape "
            f"{list(own[wrong[0]].shape)} and {own[wrong[0]].dtype}, is not what its configuration says, and could not "
            "be loaded again. Nothing was written. Leave the fields that fitting writes as they are, or fit it again."
        )


def _check_copies(copies: dict[str, Tensor], config: ChildConfig, base: nn.Module) -> None:
    """Raise if a module that the configuration names has no copy; a name that no module has is nothing to save."""
    for end in config.modules_to_save or ():
        named = [path for path, _ in base.named_modules() if path.endswith(end) and "modules_to_save" not in path]
        if named and not any(name.startswith(f"{path}.") for path in named for name in copies):
            raise ValueError(
                f"The {config.described} cannot be saved: {named[0]!r} is one of its modules_to_save="
                f"{config.modules_to_save}, and the adapter has no copy of it any more. Nothing was written. Load the "
                "adapter again, with PeftModel.from_pretrained(model, folder)."
            )
