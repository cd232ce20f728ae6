"""What the tuners of both kinds share: attaching children to modules without leaving a trace of a failure."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.hooks import ModelHook
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from .child import AdapterChild, adapter_children
from .fingerprint import check_base


class ChildTuner(BaseTuner):
    """A tuner that hangs a child on every targeted module; the modules themselves stay in place."""

    tuner_layer_cls: type[AdapterChild]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  as in every tuner of PEFT

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if adapter_children(model, adapter_name):
            raise ValueError(
                f"adapter_name={adapter_name!r} is the name of an adapter that is there already. Choose another name, "
                "or delete that adapter first."
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter; a failure leaves the model as it was.

        Raises:
            ValueError: If the name, the targets or the base model do not fit the adapter.
        """
        # A configuration of its own: fitting writes into it, and the caller may use one for several models.
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            _check_name(adapter_name, model)
            if config.fitted:
                check_base(model, config)
            self._check_config(config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._complete(model, adapter_name)
            _enter_in_device_map(model, adapter_name)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            remove_adapter(model, adapter_name)
            for parameter, required in trainable:
                parameter.requires_grad_(required)
            raise

    def _check_config(self, config: Any) -> None:
        """Refuse a configuration that cannot be attached to any model."""

    def _complete(self, model: nn.Module, adapter_name: str) -> None:
        """What is left to do when every child is in its place."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the children that held no other."""
        super().delete_adapter(adapter_name)
        remove_empty_layers(self.model)

    def _children(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def _acting_adapters(self) -> list[str]:
        """The active adapters, and before them the sticky ones that act all the same."""
        sticky = {name for child in self._children() for name, on in child.sticky_adapters.items() if on}
        return [*sorted(sticky - set(self.active_adapters)), *self.active_adapters]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        children = self._children()
        if merge:
            self.merge_adapter(adapter_names, safe_merge=safe_merge)
        for child in children:
            if not merge and child.merged:
                child.unmerge()
            child.forget_originals()
            child.detach()
        left = {name: config for name, config in self.peft_config.items() if adapter_children(self.model, name)}
        if left:  # adapters of the other kind
            self.model.peft_config = left
        elif hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off all its modules, and the children that are empty then."""
    for child in adapter_children(model, adapter_name):
        child.merged_adapters = [name for name in child.merged_adapters if name != adapter_name]
        if child.adapters == [adapter_name]:
            child.detach()
        else:
            child.delete_adapter(adapter_name)


def remove_empty_layers(model: nn.Module) -> None:
    """Take off the children whose last adapter was deleted, so that the model is as it was before the first."""
    for child in adapter_children(model):
        if not child.adapters:
            child.detach()


def rehome_layers(model: nn.Module) -> None:
    """Move the children of modules that another adapter has wrapped out to the wrapper.

    An erasure then sees what the wrapped module and the other adapter give together, whichever came first, and the
    keys in the state dict stay as they are.
    """
    modules = dict(model.named_modules())
    for child in adapter_children(model):
        outermost = modules.get(child.path)
        if outermost is not None and outermost is not child.host:
            child.rehome(outermost)


def move_inside_wrappers(model: nn.Module) -> None:
    """The way back from `rehome_layers`, for when the wrappers are about to be taken away."""
    for child in adapter_children(model):
        if isinstance(child.host, BaseTunerLayer):
            child.rehome(child.host.get_base_layer())


def exactly(names: list[str], model: nn.Module) -> Any:
    """`target_modules` that mean these modules and no others.

    PEFT takes a name in a list for a suffix too, so that the final norm `norm` would stand for every `….norm`.
    """
    suffixes = tuple(f".{name}" for name in names)
    if any(name.endswith(suffixes) and name not in names for name, _ in model.named_modules()):
        return "|".join(re.escape(name) for name in names)
    return set(names)


def execution_device(module: nn.Module) -> Any:
    """Where accelerate runs a module whose weights it keeps elsewhere; None where it has no say."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook]) if isinstance(hook, ModelHook) else []
    return next((h.execution_device for h in hooks if getattr(h, "execution_device", None) is not None), None)


@contextmanager
def device_map_of_offloaded(model: Any) -> Iterator[None]:
    """Give a model whose weights accelerate keeps elsewhere a map while an adapter is loaded, if it has none.

    Without one, transformers would load to the device of the placeholders, that is nowhere.
    """
    devices = [] if hasattr(model, "hf_device_map") else [execution_device(module) for module in model.modules()]
    device = next((device for device in devices if device is not None), None)
    if device is None:
        yield
        return
    model.hf_device_map = {"": device}
    try:
        yield
    finally:
        del model.hf_device_map


def _enter_in_device_map(model: nn.Module, adapter_name: str) -> None:
    """Loading sends tensors where the map of an offloaded model sends their module: to disk, that is nowhere."""
    places: Any = getattr(model, "hf_device_map", None)
    if not places:
        return
    for child in adapter_children(model, adapter_name):
        device = execution_device(child.host)
        if device is not None:
            places[f"{child.path}.{child.child_name}"] = device


def is_child(key: str) -> bool:
    """Whether a module's name is that of a child, or of something inside one."""
    return any(kind.child_name in key.split(".") for kind in _kinds())


def _kinds(kind: type[AdapterChild] = AdapterChild) -> list[type[AdapterChild]]:
    return [known for child in kind.__subclasses__() for known in (child, *_kinds(child))]


def _check_name(name: str, model: nn.Module) -> None:
    for kind in _kinds():
        prefix = f"{kind.child_name}_"
        if "." in name or prefix in name or name in ("", kind.child_name):
            raise ValueError(
                f"adapter_name={name!r} cannot be used: it becomes part of state-dict keys, so it must not be empty, "
                f"contain a dot, be {kind.child_name!r} or contain {prefix!r}."
            )
    if any(name in path.split(".") for path, _ in model.named_modules()):
        raise ValueError(
            f"adapter_name={name!r} cannot be used: {type(model).__name__} has modules of that name, and PEFT would "
            "leave their tensors out when it saves any other adapter. Choose another name."
        )
