"""What the adapter layers of both kinds have in common: their state by adapter, and which adapters act.

Replacing a module would lose LoRA targets inside it, change the keys of other adapters and bypass
`output_hidden_states`. So the module (the *host*) stays what it is: a child of it holds the state of all adapters as
buffers, and hooks on the host let them act.
"""

from __future__ import annotations

import warnings
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
    from .acting import Within

Child = TypeVar("Child", bound="AdapterChild")


class StateDict(BufferDict):
    """Tensors by the name of their adapter, which accelerate leaves where they are.

    It asks a module for its buffers when it attaches hooks, and those would move them to the meta device
    (`offload_buffers=True`), where no forward of this module brings them back, and put the values of then in the place
    of later ones when the hooks are removed. A model that is asked for all its buffers has these among them.
    """

    def __setitem__(self, key: str, value: Tensor) -> None:
        """Keep a tensor that can be trained with, whatever mode it was made in."""
        super().__setitem__(key, ordinary(value))

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """None that are this module's alone."""
        return iter(())


# PEFT's status functions know the containers whose devices they report by the name of the class.
StateDict.__name__ = BufferDict.__name__


@dataclass(frozen=True)
class Rows:
    """Which adapter each row of a batch has: `model(…, adapter_names=[…])` on a `PeftModel`."""

    names: tuple[str, ...]  # one for each row that the user gave
    beams: int = 1  # in how many copies, one after the other, `generate` may pass a row on

    def of(self, name: str, hidden: Tensor, path: str, axis: int = 0) -> Tensor:
        """The positions of an adapter's rows along an axis of an activation, `(rows of that adapter,)`."""
        count = len(self.names)
        there = hidden.shape[axis] if axis < hidden.dim() else 0
        if there not in (count, count * self.beams):
            raise ValueError(
                f"adapter_names has {count} names, but the activation of {path!r} has {there} rows: give one "
                "name for each row of the batch. Where a module sees rows of another kind, run the rows of each "
                "adapter as a batch of their own, with set_adapter(name)."
            )
        copies = there // count
        chosen = [i * copies + copy for i, own in enumerate(self.names) if own == name for copy in range(copies)]
        return torch.tensor(chosen, device=hidden.device)


def refuse_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the forward of a model that is not a `PeftModel`: it does not read which adapter each row has."""
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            f"adapter_names={kwargs['adapter_names']!r}: {type(model).__name__} would ignore it, and run all rows with "
            "the active adapters. PeftModel.from_pretrained(model, folder) makes a model that follows it; or run the "
            "rows of each adapter as a batch of their own, with set_adapter(name)."
        )


class AdapterChild(nn.Module, BaseTunerLayer):
    """The state of every adapter of one kind at one module: one `StateDict` for each part that a file has."""

    child_name: ClassVar[str]  # on its host
    noun: ClassVar[str]  # what messages call an adapter of this kind
    # The dtypes that floating-point state may have, the usual one first.
    precisions: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    # The attributes that have an entry for each adapter, besides the state.
    entries: ClassVar[tuple[str, ...]] = ("sticky_adapters",)
    optional: ClassVar[tuple[str, ...]] = ()  # the parts that a file does not have where they have no rows
    # Tells the children of a kind in a model what else in it they concern, after its modules have changed.
    link: ClassVar[Any] = None
    host: nn.Module  # the module that this is a child of
    _hook: Callable[[], None]  # lets the adapters act in the forward pass of the host
    _unhook: Callable[[], None]  # takes back what `_hook` did
    _part_in_words: Callable[[str, str], str]  # a part of an adapter, by the attribute that holds it, in a message
    _are_positions: Callable[[str, Tensor], bool]  # whether integers in such a part are positions in order

    def __init__(self, host: nn.Module, path: str) -> None:
        super().__init__()
        self.path = path  # the host's name in the model
        # Past `nn.Module`, so that the host does not become a submodule of its own child.
        self.__dict__["host"] = host
        # Adapter name → whether it stays active beside others; in the order in which they were added.
        self.sticky_adapters: dict[str, bool] = {}
        self._awaits_values: set[str] = set()
        self._held: set[str] = set()
        self.rows: Rows | None = None  # while `adapter_names` are given
        self.within: Within | None = None  # since the last adapter was added
        self.merged_adapters = []
        # PEFT has it on the class until it is first set; compiled code notices the difference, and is compiled again.
        self._disable_adapters = False

    @classmethod
    def by_path(cls: type[Child], model: nn.Module, adapter_name: str | None = None) -> dict[str, Child]:
        """The layers of this kind in a model, or those that hold an adapter, by the name of their host."""
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

    # BaseTunerLayer reads these from the module that it wraps, and this one does not wrap any.
    weight = bias = in_features = out_features = property(_no_weight)

    def stores(self, name: str, *, empty: bool = False) -> dict[str, StateDict]:
        """The parts of an adapter that a file has, by the attribute that holds them; or also those without rows."""
        stores: Iterator[tuple[str, Any]] = self.named_children()
        found = {key: store for key, store in stores if store.persistent and name in store}
        return {key: store for key, store in found.items() if empty or key not in self.optional or len(store[name])}

    def state_placement(self) -> tuple[torch.device, torch.dtype]:
        """Where the state belongs, and in which precision; on the CPU where accelerate keeps the weights elsewhere."""
        # A quantised layer may not have a floating-point weight; where it is tells all the same.
        weight = next(iter(sorted(self.host.parameters(), key=lambda p: not p.is_floating_point())), None)
        if weight is None:
            return torch.device("cpu"), self.precisions[0]
        device = torch.device("cpu") if weight.device.type == "meta" else weight.device
        return device, weight.dtype if weight.dtype in self.precisions else self.precisions[0]

    def await_values(self, name: str) -> None:
        """Fill an adapter with NaN, and positions with −1: values that never arrive must not pass for an adapter."""
        for store in self.stores(name).values():
            store[name] = torch.full_like(store[name], torch.nan if store[name].is_floating_point() else -1)
        self._awaits_values.add(name)

    def check_values(self, name: str) -> None:
        """Raise if a value of an adapter is missing or not finite."""
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
        """An adapter's tensors as they are, for `restore_state`; also those that a file does not have."""
        return tuple(store[name] for store in self.stores(name, empty=True).values())

    def restore_state(self, name: str, state: tuple[Tensor, ...]) -> None:
        """Put back what `state_of` gave; it is checked when it is first used."""
        for store, value in zip(self.stores(name, empty=True).values(), state, strict=True):
            store[name] = value
        self._awaits_values.add(name)

    def take(self, name: str, values: Mapping[str, Tensor | None], device: Any = None) -> None:
        """Take a file's values, by the attribute that holds a part, to where accelerate runs the host."""
        self.await_values(name)
        place, dtype = self.state_placement()
        for key, store in self.stores(name).items():
            value = values.get(key)
            if value is None:
                continue
            if value.shape != store[name].shape:
                raise ValueError(
                    f"{self._part_in_words(key, name)} has shape {list(store[name].shape)}, and the values that are "
                    f"loaded have {list(value.shape)}: they are of another adapter."
                )
            store[name] = value.to(device or place, dtype if store[name].is_floating_point() else torch.int32)
        self.check_values(name)

    def move_state(self, name: str, device: torch.device) -> None:
        """Keep an adapter where accelerate runs the module; the meta device is not a place to be."""
        stores: Any = self.children() if device.type != "meta" else ()
        for store in stores:
            if name in store:
                store[name] = store[name].to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterChild:
        """Follow `.to(device)`, and a dtype only where it is among `precisions`."""
        sharding = PartialState._shared_state.get("distributed_type") == DistributedType.FSDP
        for store in self.children():
            for name, value in [(name, value) for name, value in store._buffers.items() if value is not None]:
                converted = fn(value)
                if converted.device.type == "meta" and sharding:
                    raise ValueError(
                        f"The {self.noun} at {self.path!r} would be lost: with cpu_ram_efficient_loading accelerate "
                        "moves the model to the meta device to shard it, and brings parameters back, but no buffers. "
                        "Set cpu_ram_efficient_loading=False (fsdp_cpu_ram_efficient_loading: false in its file), or "
                        "attach the adapter after accelerator.prepare(…)."
                    )
                follows = converted.dtype in (value.dtype, *self.precisions)
                store._buffers[name] = ordinary(
                    converted if follows else value.to(converted.device, self.precisions[0])
                )
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged; without another one, this child goes too."""
        self.refuse_if_merged(adapter_name)
        super().delete_adapter(adapter_name)
        self._awaits_values.discard(adapter_name)
        if not self.adapters:
            self.detach()
            if self.within is not None:
                self.within.note()

    def refuse_if_merged(self, adapter_name: str) -> None:
        """Raise a `ValueError` if an adapter is in the weights, since nothing could take it out of them afterwards."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is merged into the weights: call unmerge_adapter() first.")

    def rehome(self, host: nn.Module) -> None:
        """Move this child and its hooks to another host, as when PEFT wraps the old one."""
        self.detach()
        self.__dict__["host"] = host
        host.add_module(self.child_name, self)
        self._hook()

    def detach(self) -> None:
        """Take this child and its hooks off the host."""
        self._unhook()
        # In a dictionary of its own: PEFT walks over the present one while it deletes an adapter.
        left = {name: module for name, module in self.host._modules.items() if module is not self}
        self.host.__dict__["_modules"] = left

    def _get_available_adapters(self) -> set[str]:
        """What PEFT reports as available; it looks for parameters, and there are none here."""
        return set(self.adapters)

    def switched_on(self) -> list[str]:
        """The adapters here that are meant to act, in order: sticky ones that are not active, then the active."""
        if self._disable_adapters:
            return []
        active = self.active_adapters if self.rows is None else dict.fromkeys(self.rows.names)
        on = [name for name, sticky in self.sticky_adapters.items() if sticky and name not in active]
        return on + [name for name in active if name in self.sticky_adapters]

    def acting_adapters(self) -> list[str]:
        """The adapters that act unmerged on a forward pass."""
        return [name for name in self.switched_on() if name not in self.merged_adapters and name not in self._held]

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Let an adapter not act for a while, and all others as they do."""
        held = name in self._held
        self._held.add(name)
        try:
            yield
        finally:
            if not held:
                self._held.discard(name)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; off means that the weights are the base model's too."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        # `enable_adapters` of transformers forgets trained modules, such as a head: the first child sees to them.
        model = self.within.model() if enabled and self.within is not None else None
        if model is not None and next((m for m in model.modules() if isinstance(m, AdapterChild)), None) is self:
            for module in model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.enable_adapters(True)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's `convert_to_lora` names what it writes after the adapter's own modules, which are not the hosts."""
        warnings.warn(
            f"PEFT cannot convert the {self.noun} to a LoRA, but hf_erasure can: call "
            f"hf_erasure.export_to_lora(model, {adapter_name!r}, folder).",
            stacklevel=3,
        )
        return False


def adapter_children(model: nn.Module, adapter_name: str | None = None) -> list[AdapterChild]:
    """The children of either kind in a model, in its order; with a name, only those that hold that adapter."""
    children = [module for module in model.modules() if isinstance(module, AdapterChild)]
    return [child for child in children if adapter_name is None or adapter_name in child.sticky_adapters]


def is_child(key: str) -> bool:
    """Whether a module's name is that of a child, or of something inside one."""
    return any(kind.child_name in key.split(".") for kind in AdapterChild.__subclasses__())


def innermost(module: nn.Module) -> nn.Module:
    """The module that other adapters have wrapped; the module itself where none has."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module


def configs_of(model: Any) -> dict[str, PeftConfig]:
    """The configurations of a model's adapters, by name."""
    return getattr(model, "peft_config", None) or {}


def child_configs(model: Any) -> dict[str, ChildConfig]:
    """Those of the adapters of either kind."""
    return {name: config for name, config in configs_of(model).items() if isinstance(config, ChildConfig)}


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor that can be trained with; what inference mode has made cannot, and is copied."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave inference mode for a while; gradients stay off."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
