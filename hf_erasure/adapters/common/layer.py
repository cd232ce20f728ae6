"""The base class of the adapter layers of both kinds: it keeps the state of each adapter and knows which ones act.

Replacing a module would lose LoRA targets inside it, change the keys of other adapters and bypass
`output_hidden_states`. Therefore the module (the *host*) is not replaced: a child of it holds the state of all adapters
as buffers, and hooks on the host let them act.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import ChildConfig

if TYPE_CHECKING:
    from .acting import ModelReference

Child = TypeVar("Child", bound="AdapterChild")


class StateDict(BufferDict):
    """Tensors by the name of their adapter, which accelerate does not move.

    When accelerate attaches hooks to a module, it asks the module for its buffers. The hooks would move the buffers to
    the meta device (`offload_buffers=True`), from where no forward pass of this module brings them back. On removal
    they would overwrite later values with the old ones. The `buffers()` of the whole model include these tensors.
    """

    def __setitem__(self, key: str, value: Tensor) -> None:
        """Keep a tensor that autograd can use, even if the given one was made in inference mode."""
        super().__setitem__(key, ordinary(value))

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Return no buffers when this module alone is asked."""
        return iter(())


# PEFT's status functions recognise the containers whose devices they report by the name of their class.
StateDict.__name__ = BufferDict.__name__


@dataclass(frozen=True)
class RowAdapters:
    """Which adapter each row of a batch has: `model(…, adapter_names=[…])` on a `PeftModel`."""

    names: tuple[str, ...]  # one for each row that the user gave
    beams: int = 1  # into how many adjacent copies `generate` may expand a row

    def positions_of(self, name: str, hidden: Tensor, path: str, axis: int = 0) -> Tensor:
        """The positions of an adapter's rows along an axis of an activation, `(rows of that adapter,)`."""
        count = len(self.names)
        size = hidden.shape[axis] if axis < hidden.dim() else 0
        if size not in (count, count * self.beams):
            raise ValueError(
                f"adapter_names has {count} names, but the activation of {path!r} has {size} rows: give one "
                "name for each row of the batch. Where a module sees rows of another kind, run the rows of each "
                "adapter as a batch of their own, with set_adapter(name)."
            )
        copies = size // count
        chosen = [i * copies + copy for i, own in enumerate(self.names) if own == name for copy in range(copies)]
        return torch.tensor(chosen, device=hidden.device)


def refuse_adapter_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise an error before the forward pass of a model that is not a `PeftModel`: it would ignore `adapter_names`."""
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            f"adapter_names={kwargs['adapter_names']!r}: {type(model).__name__} would ignore it, and run all rows with "
            "the active adapters. PeftModel.from_pretrained(model, folder) makes a model that follows it; or run the "
            "rows of each adapter as a batch of their own, with set_adapter(name)."
        )


class AdapterChild(nn.Module, BaseTunerLayer):
    """The state of every adapter of one kind at one module: one `StateDict` for each part that a file has."""

    child_name: ClassVar[str]  # the name of the child on its host
    noun: ClassVar[str]  # what messages call an adapter of this kind
    # The dtypes that floating-point state may have, the usual one first.
    precisions: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    # The attributes that have an entry for each adapter, apart from the state.
    entries: ClassVar[tuple[str, ...]] = ("sticky_adapters",)
    optional: ClassVar[tuple[str, ...]] = ()  # the parts that a file leaves out where they have no rows
    # A function that is called after a model's modules have changed; it connects the children with other modules.
    link: ClassVar[Any] = None
    host: nn.Module  # the module that this is a child of
    # PEFT's `disable_input_dtype_casting` switches it; activations are cast to the precision of the state all the same.
    cast_input_dtype_enabled = True
    _hook: Callable[[], None]  # lets the adapters act in the forward pass of the host
    _unhook: Callable[[], None]  # undoes what `_hook` did
    unmerge_weights: Callable[[], None]  # puts the weights back that the host had before adapters were merged
    _part_in_words: Callable[[str, str], str]  # how messages name a part: (attribute that holds it, adapter) → words
    _are_positions: Callable[[str, Tensor], bool]  # whether the integers in a part are positions in ascending order

    def __init__(self, host: nn.Module, path: str) -> None:
        super().__init__()
        self.path = path  # the host's name in the model
        # This bypasses `nn.Module.__setattr__`: the host must not become a submodule of its own child.
        self.__dict__["host"] = host
        # Adapter name → whether it stays on when others are activated; in the order in which they were added.
        self.sticky_adapters: dict[str, bool] = {}
        self._awaits_values: set[str] = set()
        self._suspended: set[str] = set()
        self.rows: RowAdapters | None = None  # set while `adapter_names` are given
        self.model_reference: ModelReference | None = None  # set when an adapter is added
        self.merged_adapters = []
        # PEFT keeps this on the class until it is first set on a layer, and compiled code is then compiled again.
        self._disable_adapters = False

    @classmethod
    def by_path(cls: type[Child], model: nn.Module, adapter_name: str | None = None) -> dict[str, Child]:
        """Name of the host → layer of this kind; with an adapter's name, only the layers that hold that adapter."""
        return {child.path: child for child in adapter_children(model, adapter_name) if isinstance(child, cls)}

    @property
    def adapters(self) -> list[str]:
        """The adapters present here, in the order in which they were added."""
        return list(self.sticky_adapters)

    @property
    def other_param_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of all attributes that have an entry for each adapter; PEFT deletes an adapter from them."""
        return (*self.entries, *self._modules)

    def _no_weight(self) -> Tensor:
        raise AttributeError(f"the {self.noun} has no weight, bias or features of its own")

    # BaseTunerLayer reads these from the module that it wraps, and this layer does not wrap a module.
    weight = bias = in_features = out_features = property(_no_weight)

    def stores(self, name: str, *, empty: bool = False) -> dict[str, StateDict]:
        """Attribute → the part of an adapter that it holds and a file has; `empty` adds optional parts without rows."""
        stores: Iterator[tuple[str, Any]] = self.named_children()
        found = {key: store for key, store in stores if store.persistent and name in store}
        return {key: store for key, store in found.items() if empty or key not in self.optional or len(store[name])}

    def state_placement(self) -> tuple[torch.device, torch.dtype]:
        """The device and dtype of the state; the device is the CPU where accelerate has offloaded the weights."""
        # A quantised layer may have no floating-point weight; its packed weight then gives the device.
        weight = next(iter(sorted(self.host.parameters(), key=lambda p: not p.is_floating_point())), None)
        if weight is None:
            return torch.device("cpu"), self.precisions[0]
        device = torch.device("cpu") if weight.device.type == "meta" else weight.device
        return device, weight.dtype if weight.dtype in self.precisions else self.precisions[0]

    def await_values(self, name: str) -> None:
        """Fill an adapter with NaN, and positions with −1, so that values that are never loaded are noticed."""
        for store in self.stores(name).values():
            store[name] = torch.full_like(store[name], torch.nan if store[name].is_floating_point() else -1)
        self._awaits_values.add(name)

    def check_values(self, name: str) -> None:
        """Raise a `ValueError` if a value of an adapter is missing or not finite."""
        for key, store in self.stores(name).items():
            value = store[name]
            if value.device.type == "meta":
                continue
            if not (value.isfinite().all() if value.is_floating_point() else self._are_positions(key, value)):
                raise ValueError(
                    f"{self._part_in_words(key, name)} is missing or not finite: adapter_model.safetensors lacks its "
                    "tensors or holds NaN. Load the complete folder, or fit the adapter again."
                )
        self._awaits_values.discard(name)

    def state_of(self, name: str) -> tuple[Tensor, ...]:
        """An adapter's present tensors, for `restore_state`; they include parts that a file leaves out."""
        return tuple(store[name] for store in self.stores(name, empty=True).values())

    def restore_state(self, name: str, state: tuple[Tensor, ...]) -> None:
        """Put back the tensors that `state_of` returned; they are checked when they are first used."""
        for store, value in zip(self.stores(name, empty=True).values(), state, strict=True):
            store[name] = value
        self._awaits_values.add(name)

    def load_values(self, name: str, values: Mapping[str, Tensor | None]) -> None:
        """Store a file's values, attribute → tensor."""
        self.await_values(name)
        device, dtype = self.state_placement()
        for key, store in self.stores(name).items():
            value = values.get(key)
            if value is None:
                continue
            if value.shape != store[name].shape:
                raise ValueError(
                    f"{self._part_in_words(key, name)} has shape {list(store[name].shape)}, and the values that are "
                    f"loaded have {list(value.shape)}: they belong to another adapter."
                )
            store[name] = value.to(device, dtype if store[name].is_floating_point() else torch.int32)
        self.check_values(name)

    def move_state(self, name: str, device: torch.device) -> None:
        """Move an adapter to the device where accelerate runs the module; the meta device is ignored."""
        stores: Any = self.children() if device.type != "meta" else ()
        for store in stores:
            if name in store:
                store[name] = store[name].to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterChild:
        """Apply `.to(…)` to the state: a device always, a dtype only if it is among `precisions`."""
        sharding = PartialState._shared_state.get("distributed_type") == DistributedType.FSDP
        for store in self.children():
            for name, value in [(name, value) for name, value in store._buffers.items() if value is not None]:
                converted = fn(value)
                if converted.device.type == "meta" and sharding:
                    raise ValueError(
                        f"The {self.noun} at {self.path!r} would be lost: with cpu_ram_efficient_loading accelerate "
                        "moves the model to the meta device to shard it, and brings back parameters but not buffers. "
                        "Set cpu_ram_efficient_loading=False (fsdp_cpu_ram_efficient_loading: false in its file), or "
                        "attach the adapter after accelerator.prepare(…)."
                    )
                follows = converted.dtype in (value.dtype, *self.precisions)
                store._buffers[name] = ordinary(
                    converted if follows else value.to(converted.device, self.precisions[0])
                )
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged; if it was the last one here, the child leaves the host too."""
        self.refuse_if_merged(adapter_name)
        super().delete_adapter(adapter_name)
        self._awaits_values.discard(adapter_name)
        if not self.adapters:
            self.detach()
            if self.model_reference is not None:
                self.model_reference.update_model()

    def refuse_if_merged(self, adapter_name: str) -> None:
        """Raise a `ValueError` if an adapter is merged: once it is deleted, it cannot be unmerged."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is merged into the weights: call unmerge_adapter() first.")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Do nothing: PEFT calls it on every layer when another method merges; our tuners call `merge_weights`."""

    def unmerge(self) -> None:
        """Do nothing, as `merge`; our tuners call `unmerge_weights`."""

    def move_to(self, host: nn.Module) -> None:
        """Move this child and its hooks to another host, for example when PEFT wraps the old host."""
        self.detach()
        self.__dict__["host"] = host
        host.add_module(self.child_name, self)
        self._hook()

    def detach(self) -> None:
        """Remove this child and its hooks from the host."""
        self._unhook()
        # The host gets a new dictionary, since PEFT iterates over the present one while it deletes an adapter.
        left = {name: module for name, module in self.host._modules.items() if module is not self}
        self.host.__dict__["_modules"] = left

    def _get_available_adapters(self) -> set[str]:
        """The adapters that PEFT reports as available; PEFT itself looks for parameters, which children do not have."""
        return set(self.adapters)

    def switched_on(self) -> list[str]:
        """The adapters here that are switched on, in order: sticky ones that are not active, then the active ones."""
        if self._disable_adapters:
            return []
        active = self.active_adapters if self.rows is None else dict.fromkeys(self.rows.names)
        on = [name for name, sticky in self.sticky_adapters.items() if sticky and name not in active]
        return on + [name for name in active if name in self.sticky_adapters]

    def acting_adapters(self) -> list[str]:
        """The adapters that act unmerged on a forward pass."""
        return [name for name in self.switched_on() if name not in self.merged_adapters and name not in self._suspended]

    @contextmanager
    def suspend(self, name: str) -> Iterator[None]:
        """Let one adapter not act inside the block; the other adapters are not affected."""
        was_suspended = name in self._suspended
        self._suspended.add(name)
        try:
            yield
        finally:
            if not was_suspended:
                self._suspended.discard(name)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; switching off also unmerges them from the weights."""
        if not enabled and self.merged:
            self.unmerge_weights()
        super().enable_adapters(enabled)
        # `enable_adapters` of transformers leaves out trained modules, such as a head: the first child enables them.
        model = self.model_reference.model() if enabled and self.model_reference is not None else None
        if model is not None and next((m for m in model.modules() if isinstance(m, AdapterChild)), None) is self:
            for module in model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.enable_adapters(True)


def adapter_children(model: nn.Module, adapter_name: str | None = None) -> list[AdapterChild]:
    """The children of both kinds in a model, in its order; with a name, only those that hold that adapter."""
    children = [module for module in model.modules() if isinstance(module, AdapterChild)]
    return [child for child in children if adapter_name is None or adapter_name in child.sticky_adapters]


def is_child(key: str) -> bool:
    """Whether a name is that of a child, or of a module inside a child."""
    return any(kind.child_name in key.split(".") for kind in AdapterChild.__subclasses__())


def innermost(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of other adapters; the module itself where it is not a wrapper."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def configs_of(model: Any) -> dict[str, PeftConfig]:
    """The configurations of a model's adapters, by name."""
    return getattr(model, "peft_config", None) or {}


def child_configs(model: Any) -> dict[str, ChildConfig]:
    """The configurations of a model's adapters of both kinds, by name."""
    return {name: config for name, config in configs_of(model).items() if isinstance(config, ChildConfig)}


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd can use: a tensor that was made in inference mode is copied, another is returned as is."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()
