"""The change of weights as a child of the module that owns them, which acts while that module's `forward` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..common.config import INDICES
from ..common.layer import AdapterChild, StateDict, ordinary
from ..common.placement import held, owns_offloaded
from ..common.quantised import FLOAT_FIRST, is_quantised
from ..merging.record import ledger_of
from .config import FEATURE, INDEX, OFFSET, GradiendConfig
from .edit import Term, Written, why_not_editable, write
from .forward import forward_of

CHILD = "gradiend"
STEERING = "gradiend_steering"


class GradiendLayer(AdapterChild):
    """The changes of every adapter to the parameters of one module.

    Attributes:
        gradiend_parameters: Adapter name → names of the module's parameters that it changes.
        gradiend_sticky: Adapter name → whether it stays active beside others.
        owners: Parameter name → all modules that own that very tensor, with its name there.
        readers: Modules that may read a parameter of an owner without calling it, each with that owner.
    """

    child_name = CHILD
    noun = "GRADIEND adapter"

    def __init__(self, host: nn.Module, path: str) -> None:
        super().__init__(host, path)
        self.other_param_names: tuple[str, ...] = ("gradiend_parameters", "gradiend_sticky", "gradiend_on", STEERING)
        self.gradiend_parameters: dict[str, tuple[str, ...]] = {}
        self.gradiend_sticky: dict[str, bool] = {}
        self.gradiend_on: dict[str, bool] = {}
        # (2, pairs): what Wd and bd of each pair are multiplied by. Filled in place, so that compiled code stays valid.
        self.gradiend_steering = StateDict(persistent=False)
        self.owners: dict[str, list[tuple[nn.Module, str]]] = {}
        self.readers: list[tuple[nn.Module, nn.Module]] = []
        self._held: set[str] = set()
        # One entry a merge: whose it was, and what it wrote.
        self._written: list[tuple[list[str], list[tuple[str, Written]]]] = []

    @property
    def adapters(self) -> list[str]:
        """The adapters present here, in the order in which they were added."""
        return list(self.gradiend_parameters)

    @property
    def sticky_adapters(self) -> dict[str, bool]:
        """Adapter name → whether it stays active beside others."""
        return self.gradiend_sticky

    @property
    def owner(self) -> nn.Module:
        """The module that owns the parameters: the host, or what other adapters have wrapped in it."""
        return innermost(self.host)

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter of the module, by its own name."""
        parameter = self.owner._parameters[name]
        if parameter is None:
            raise ValueError(f"{self.path}.{name} is gone from the model: load the adapter into the model it is for.")
        return parameter

    # ---- state -------------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, config: GradiendConfig, parameters: tuple[str, ...] = ()) -> None:
        """Make room for an adapter: values that are missing until loaded if it was fitted, nothing otherwise."""
        self.gradiend_parameters[name] = parameters
        self.gradiend_sticky[name] = config.sticky
        self.gradiend_on[name] = False
        for parameter in parameters:
            # Empty while there is no feature, so that an adapter that was never fitted can be saved like any other.
            for kind, tensor in _layout(config, f"{self.path}.{parameter}").items():
                self._place(name, f"{kind}_{parameter}", tensor)
        if config.fitted:
            self.await_values(name)
        self.steer(name, config)

    def set_part(self, name: str, parameter: str, kind: str, value: Tensor | None) -> None:
        """Put a tensor of a fitted adapter in place, on the device of its weight; None takes it away."""
        store = self._modules.get(f"gradiend_{kind}_{parameter}")
        if value is not None:
            self._place(name, f"{kind}_{parameter}", value.clone(memory_format=torch.contiguous_format))
        elif isinstance(store, StateDict) and name in store:
            del store[name]
            self._drop_empty_stores()
        self._awaits_values.discard(name)

    def part(self, name: str, parameter: str, kind: str) -> Tensor | None:
        """A tensor of an adapter; None where it has no such part."""
        store = self._modules.get(f"gradiend_{kind}_{parameter}")
        return store[name] if isinstance(store, StateDict) and name in store else None

    def _place(self, name: str, key: str, value: Tensor) -> None:
        attribute = f"gradiend_{key}"
        if not isinstance(self._modules.get(attribute), StateDict):
            self.add_module(attribute, StateDict(persistent=True))
        if attribute not in self.other_param_names:
            self.other_param_names = (*self.other_param_names, attribute)
        store: Any = self._modules[attribute]
        store[name] = value.to(self.state_device(), torch.float32 if value.is_floating_point() else torch.int32)

    def _drop_empty_stores(self) -> None:
        stores = {key: store for key, store in self._modules.items() if isinstance(store, StateDict)}
        for key in [key for key, store in stores.items() if not len(store) and key != STEERING]:
            del self._modules[key]
            self.other_param_names = tuple(name for name in self.other_param_names if name != key)

    def state_device(self) -> torch.device:
        """Where the state belongs: with the weights, or on the CPU where accelerate keeps these elsewhere."""
        weight = next((p for p in self.owner.parameters(recurse=False)), None)
        return torch.device("cpu") if weight is None or weight.device.type == "meta" else weight.device

    def _stores(self, name: str) -> dict[str, StateDict]:
        found = {key: store for key, store in self._modules.items() if isinstance(store, StateDict)}
        return {key: store for key, store in found.items() if name in store and key != STEERING}

    def await_values(self, name: str) -> None:
        """Fill an adapter with NaN, and positions with −1: what never arrives must not pass for a feature."""
        for store in self._stores(name).values():
            store[name] = torch.full_like(store[name], torch.nan if store[name].is_floating_point() else -1)
        self._awaits_values.add(name)

    def check_values(self, name: str) -> None:
        """Raise if a part of `name` is missing, not finite, or points outside of its weight.

        Raises:
            ValueError: Names the parameter and the adapter.
        """
        for key, store in self._stores(name).items():
            value = store[name]
            if value.device.type == "meta" or not value.numel():
                continue
            kind, _, parameter = key.removeprefix("gradiend_").partition("_")
            if value.is_floating_point():
                sound = bool(torch.isfinite(value).all())
            else:
                inside = int(value[0]) >= 0 and int(value[-1]) < self.parameter(parameter).numel()
                sound = inside and bool((value[1:] > value[:-1]).all())
            if not sound:
                raise ValueError(
                    f"The {kind} of adapter {name!r} for {self.path}.{parameter} is missing or not finite: "
                    "adapter_model.safetensors lacks its tensors or holds NaN. Load the complete folder, or fit the "
                    "adapter again."
                )
        self._awaits_values.discard(name)

    def state_of(self, name: str) -> tuple[Tensor, ...]:
        """An adapter's tensors as they are, for `restore_state`."""
        return tuple(store[name] for store in self._stores(name).values())

    def restore_state(self, name: str, state: tuple[Tensor, ...]) -> None:
        """Put back what `state_of` gave."""
        for store, value in zip(self._stores(name).values(), state, strict=True):
            store[name] = value

    def settle(self, name: str) -> None:
        """Take values that were just loaded into memory of their own."""
        for store in self._stores(name).values():
            dtype = torch.float32 if store[name].is_floating_point() else torch.int32
            store[name] = store[name].to(dtype, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GradiendLayer:
        """Follow `.to(device)`, but stay in float32 whatever the model goes to."""
        for store in self.children():
            for name, value in list(store._buffers.items()):
                if value is not None:
                    converted = self._stay_real(fn(value))
                    same = converted.dtype == value.dtype or converted.is_meta
                    store._buffers[name] = ordinary((converted if same else value).to(converted.device, value.dtype))
        return self

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def link(self, owners: dict[str, list[tuple[nn.Module, str]]], readers: list[tuple[nn.Module, nn.Module]]) -> None:
        """Say which modules own the parameters, and which read them without calling their owner."""
        self._unhook()
        self.owners, self.readers = owners, readers
        self._hook()

    def _hook(self) -> None:
        for name, places in self.owners.items():
            for module, own_name in places:
                forward_of(module).add(self, name, own_name)
        for reader, owner in self.readers:
            forward_of(reader).add_read(self, forward_of(owner))

    def _unhook(self) -> None:
        for module in [module for places in self.owners.values() for module, _ in places]:
            forward_of(module).remove(self)
        for reader, _ in self.readers:
            forward_of(reader).remove(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged."""
        super().delete_adapter(adapter_name)
        self._drop_empty_stores()
        used = {name for names in self.gradiend_parameters.values() for name in names}
        self._unhook()
        self.owners = {name: places for name, places in self.owners.items() if name in used}
        left = {id(module) for places in self.owners.values() for module, _ in places}
        self.readers = [(reader, owner) for reader, owner in self.readers if id(owner) in left]
        self._hook()

    # ---- which adapters act ------------------------------------------------------------------------------------------

    def acting_adapters(self) -> list[str]:
        """The adapters that change weights on a forward pass, in the order in which they were added."""
        on = self.switched_on()
        return [
            name
            for name in self.gradiend_parameters
            if name in on and self.gradiend_on[name] and name not in self.merged_adapters and name not in self._held
        ]

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Let an adapter not act for a while."""
        held = name in self._held
        self._held.add(name)
        try:
            yield
        finally:
            if not held:
                self._held.discard(name)

    def steer(self, name: str, config: GradiendConfig) -> None:
        """Take over from the configuration how strongly an adapter acts."""
        acting = config.pair_index(config.pair) if config.fitted else 0
        steering = strength(config.expected_pairs(), acting, config.feature_factor, config.learning_rate)
        if name in self.gradiend_steering and self.gradiend_steering[name].shape == steering.shape:
            self.gradiend_steering[name].copy_(steering)
        else:
            self.gradiend_steering[name] = steering.to(self.state_device())
        self.gradiend_on[name] = config.fitted and config.learning_rate != 0

    def terms(self, name: str, parameter: str, steering: Tensor | None = None) -> Term | None:
        """An adapter's change of a parameter; None where it changes no entry of it.

        Args:
            name: The adapter.
            parameter: The parameter's own name.
            steering: `(2, pairs)`, to try another strength than the present one.
        """
        feature, offset = self.part(name, parameter, FEATURE), self.part(name, parameter, OFFSET)
        if feature is None or offset is None or not feature.shape[-1]:
            return None
        factors = self.gradiend_steering[name] if steering is None else steering.to(feature.device)
        if feature.shape[0] == 1:
            values = feature[0] * factors[0, 0] + offset[0] * factors[1, 0]
        else:
            values = factors[0] @ feature + factors[1] @ offset
        return Term(self.part(name, parameter, INDEX), values)

    def changed_entries(self, name: str) -> int:
        """How many entries of the module's parameters an adapter changes."""
        parts = [self.part(name, parameter, FEATURE) for parameter in self.gradiend_parameters[name]]
        return sum(part.shape[-1] for part in parts if part is not None and part.dim() == 2)

    def acting_terms(self, parameter: str, device: torch.device) -> list[Term]:
        """The changes of a parameter that a forward pass is to see, on a device.

        Raises:
            ValueError: If values are missing, or the weights were quantised under the adapter.
        """
        found = []
        for name in self.acting_adapters():
            # A check of values cannot be compiled; there a NaN shows in the output.
            if name in self._awaits_values and not torch.compiler.is_compiling():
                self.check_values(name)
            term = self.terms(name, parameter)
            if term is not None and term.values.device != device:
                self._move(name, device)
                term = term.to(device)
            if term is not None:
                found.append(term)
        if found and not torch.compiler.is_compiling() and is_quantised(self.parameter(parameter)):
            raise ValueError(
                f"{self.path}.{parameter} was quantised after a GRADIEND adapter was attached to it. Instead, "
                f"{FLOAT_FIRST}."
            )
        return found

    def _move(self, name: str, device: torch.device) -> None:
        """Stay where accelerate runs the module."""
        if device.type != "meta":
            for store in (*self._stores(name).values(), self.gradiend_steering):
                store[name] = store[name].to(device)

    # ---- merging -----------------------------------------------------------------------------------------------------

    def why_not_editable(self, parameter: str) -> str | None:
        """The reason why a parameter cannot be written to; None when it can."""
        if any(owns_offloaded(module) for module, _ in self.owners[parameter]):
            return "is offloaded. Load the model on one device"
        return why_not_editable(self.parameter(parameter))

    def why_not_mergeable(self, names: list[str]) -> str | None:
        """The reason why adapters cannot be written into the weights here; None when they can."""
        for name in names:
            for parameter in self.gradiend_parameters.get(name, ()):
                reason = self.why_not_editable(parameter)
                if reason is not None:
                    return f"{self.path}.{parameter} {reason} to merge"
                if any(ledger_of(module) is not None for module, _ in self.owners[parameter]):
                    return f"an erasure is merged into {self.path!r}. Unmerge that one, and merge it last"
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the weights of this module, the active ones when no names are given.

        Raises:
            ValueError: If a weight cannot take them, or with `safe_merge` would not be finite.
        """
        wanted = self.switched_on() if adapter_names is None else adapter_names
        names = [name for name in self.adapters if name in wanted and name not in self.merged_adapters]
        reason = self.why_not_mergeable(names)
        if reason is not None:
            raise ValueError(f"The GRADIEND adapter cannot be merged: {reason}.")
        for name in names:
            self.check_values(name)
        written = []
        for parameter in dict.fromkeys(p for name in names for p in self.gradiend_parameters[name]):
            found = [self.terms(n, parameter) for n in names if self.gradiend_on[n]]
            terms = [term for term in found if term is not None]
            if terms:
                written.append((parameter, write(self.parameter(parameter), terms)))
            if safe_merge and not bool(torch.isfinite(self.parameter(parameter)).all()):
                for _, change in reversed(written):
                    change.undo()
                raise ValueError(f"Merging {names} makes {self.path}.{parameter} non-finite; the adapter seems broken.")
        self._written.append((names, written))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the weights back, to the bit unless something else was written into them since."""
        while self._written:
            self.unmerge_last()
        self.merged_adapters.clear()

    def unmerge_last(self) -> None:
        """Take the last merge back."""
        names, written = self._written.pop()
        for name, change in reversed(written):
            # Not the tensor of then, if accelerate has put the weights elsewhere since.
            with held(self.owners[name]) as change.parameter:
                change.undo()
        self.merged_adapters = [name for name in self.merged_adapters if name not in names]

    def forget_originals(self) -> None:
        """Drop the copies that `unmerge` needs: what is merged stays merged."""
        self._written.clear()

    def extra_repr(self) -> str:
        """The adapters with how many entries they change."""
        return ", ".join(
            f"{n}: {', '.join(self._size(n, p) for p in ps)}" for n, ps in self.gradiend_parameters.items()
        )

    def _size(self, name: str, parameter: str) -> str:
        feature = self.part(name, parameter, FEATURE)
        return f"{parameter} {0 if feature is None else feature.shape[-1]}"


def innermost(module: nn.Module) -> nn.Module:
    """The module that other adapters have wrapped; the module itself where none has."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module


def strength(pairs: int, acting: int, feature_factor: float, learning_rate: float) -> Tensor:
    """`(2, pairs)`: what Wd and bd of each pair are multiplied by, zero for pairs that do not act."""
    factors = torch.zeros(2, pairs, device="cpu", dtype=torch.float32)
    factors[0, acting], factors[1, acting] = learning_rate * feature_factor, learning_rate
    return factors


def _layout(config: GradiendConfig, name: str) -> dict[str, Tensor]:
    """Empty tensors of the shapes that a file has for a parameter."""
    if not config.fitted or config.fitted_parameters is None:
        return {FEATURE: torch.zeros(0, 0, device="cpu")}
    kept = config.parts(name)
    return {
        kind: torch.empty(shape, device="cpu", dtype=torch.int32 if types == INDICES else torch.float32)
        for kind, (shape, types) in kept.items()
    }
