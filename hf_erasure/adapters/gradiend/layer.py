"""The change of weights, kept in a child of the module that owns them; it acts while that module's `forward` runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..common.config import INDICES
from ..common.layer import AdapterChild, StateDict, innermost
from ..common.placement import FLOAT_FIRST, is_quantised, owns_offloaded, shared_weights, values_of, write_value
from ..merging.record import record_of
from .config import FEATURE, INDEX, OFFSET, GradiendConfig
from .forward import NOT_A_PARAMETER, Readers, UndoRecord, WeightEdit, forward_of, why_not_editable, write_edits

CHILD = "gradiend"
# A module that owns a parameter, with the parameter's name there.
Owner = tuple[nn.Module, str]


class GradiendLayer(AdapterChild):
    """The changes of every adapter to the parameters of one module."""

    child_name = CHILD
    noun = "GRADIEND adapter"
    entries = ("sticky_adapters", "gradiend_parameters", "gradiend_on")

    def __init__(self, host: nn.Module, path: str) -> None:
        super().__init__(host, path)
        # Adapter name → the module's parameters that it changes; and → whether it is fitted and α is not 0.
        self.gradiend_parameters: dict[str, tuple[str, ...]] = {}
        self.gradiend_on: dict[str, bool] = {}
        # (2, pairs): the factors of Wd and bd for each pair. They are written in place, so compiled code stays valid.
        self.gradiend_steering = StateDict(persistent=False)
        # Parameter name → all modules that own this tensor; and pairs of a module that reads one itself and its owner.
        self.owners: dict[str, list[Owner]] = {}
        self.readers: list[tuple[nn.Module, nn.Module]] = []
        # One entry for each merge: the adapters, and what was written to each parameter.
        self._merges: list[tuple[list[str], list[tuple[str, UndoRecord]]]] = []

    @property
    def owner(self) -> nn.Module:
        """The module that owns the parameters: the host, or the module inside it if other adapters have wrapped one."""
        return innermost(self.host)

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter of the module, by its own name."""
        parameter = self.owner._parameters.get(name)
        if parameter is None:
            raise ValueError(f"{self.path}.{name} {NOT_A_PARAMETER}")
        return parameter

    def add_adapter(self, name: str, config: GradiendConfig, parameters: tuple[str, ...] = ()) -> None:
        """Create the tensors of an adapter: NaN until they are loaded if it was fitted, empty otherwise."""
        self.gradiend_parameters[name] = parameters
        self.sticky_adapters[name] = config.sticky
        self.gradiend_on[name] = False
        for parameter in parameters:
            # The tensors are empty until a feature is fitted, so that an unfitted adapter can be saved like any other.
            parts = {FEATURE: torch.zeros(0, 0, device="cpu")}
            if config.fitted and config.fitted_parameters is not None:
                shapes = config.parts(f"{self.path}.{parameter}").items()
                dtypes = {kind: torch.int32 if types == INDICES else torch.float32 for kind, (_, types) in shapes}
                parts = {kind: torch.empty(shape, device="cpu", dtype=dtypes[kind]) for kind, (shape, _) in shapes}
            for kind, tensor in parts.items():
                self.set_part(name, parameter, kind, tensor)
        if config.fitted:
            self.await_values(name)
        self.steer(name, config)

    def set_part(self, name: str, parameter: str, kind: str, value: Tensor | None) -> None:
        """Store a tensor of an adapter on the device of its weight; None removes it."""
        self._awaits_values.discard(name)
        key = f"gradiend_{kind}_{parameter}"
        store: Any = self._modules.get(key)
        if value is not None:
            if store is None:
                store = StateDict(persistent=True)
                self.add_module(key, store)
            device, dtype = self.state_placement()
            # Store a contiguous copy, since loading makes contiguous tensors too.
            value = value.clone(memory_format=torch.contiguous_format)
            store[name] = value.to(device, dtype if value.is_floating_point() else torch.int32)
        elif store is not None and name in store:
            del store[name]
            self._drop_empty_stores()

    def part(self, name: str, parameter: str, kind: str) -> Tensor | None:
        """A tensor of an adapter; None where it has no such part."""
        store = self._modules.get(f"gradiend_{kind}_{parameter}")
        return store[name] if isinstance(store, StateDict) and name in store else None

    def _drop_empty_stores(self) -> None:
        for key, store in list(self._modules.items()):
            if isinstance(store, StateDict) and store.persistent and not len(store):
                del self._modules[key]

    def _are_positions(self, key: str, value: Tensor) -> bool:
        if not value.numel():
            return True
        *_, parameter = key.split("_", 2)
        is_inside = int(value[0]) >= 0 and int(value[-1]) < self.parameter(parameter).numel()
        return is_inside and bool((value[1:] > value[:-1]).all())

    def _part_in_words(self, key: str, name: str) -> str:
        _, kind, parameter = key.split("_", 2)
        return f"The {kind} of adapter {name!r} for {self.path}.{parameter}"

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged."""
        super().delete_adapter(adapter_name)
        self._drop_empty_stores()
        used = {name for names in self.gradiend_parameters.values() for name in names}
        owners = {name: places for name, places in self.owners.items() if name in used}
        left = {id(module) for places in owners.values() for module, _ in places}
        self._set_owners(owners, [(reader, owner) for reader, owner in self.readers if id(owner) in left])

    def _set_owners(self, owners: dict[str, list[Owner]], readers: list[tuple[nn.Module, nn.Module]]) -> None:
        self._unhook()
        self.owners, self.readers = owners, readers
        self._hook()

    def _hook(self) -> None:
        for name, places in self.owners.items():
            for module, own_name in places:
                forward = forward_of(module)
                forward.hide(self, forward, (name, own_name))
        for reader, owner in self.readers:
            forward_of(reader).hide(self, forward_of(owner))

    def _unhook(self) -> None:
        owners = (module for places in self.owners.values() for module, _ in places)
        for module in (*owners, *(reader for reader, _ in self.readers)):
            forward_of(module).remove(self)

    @staticmethod
    def link(model: nn.Module) -> None:
        """Find all modules that own the parameters (a tied weight has several), and other modules that read them."""
        full_names = {id(parameter): name for name, parameter in model.named_parameters()}
        shared, readers, layers = shared_weights(model), Readers(model), GradiendLayer.by_path(model)
        for forward in map(forward_of, model.modules()):
            for layer in {layer for layer, _ in forward.reads} - {*layers.values()}:
                # A copy of an owner, such as a trained head, has weights of its own, and its layer is in no model.
                holder = layer.model_reference.model() if layer.model_reference is not None else None
                if holder is None or all(module is not layer for module in holder.modules()):
                    forward.remove(layer)
        for layer in layers.values():
            places: dict[str, list[Owner]] = {}
            for name in dict.fromkeys(name for names in layer.gradiend_parameters.values() for name in names):
                full = full_names[id(layer.parameter(name))]
                at = (other.rpartition(".") for other in shared.get(full, [full]))
                places[name] = list(dict.fromkeys((model.get_submodule(path), own) for path, _, own in at))
            read = [(m, owner) for place in places.values() for owner, name in place for m in readers.find(owner, name)]
            layer._set_owners(places, list(dict.fromkeys(read)))

    def acting_adapters(self) -> list[str]:
        """The adapters that change weights on a forward pass, in the order in which they were added."""
        on, silent = self.switched_on(), {*self.merged_adapters, *self._suspended}
        return [n for n in self.gradiend_parameters if n in on and self.gradiend_on[n] and n not in silent]

    def steer(self, name: str, config: GradiendConfig) -> None:
        """Set how strongly an adapter acts, as its configuration says."""
        steering = steering_factors(config)
        if name in self.gradiend_steering and self.gradiend_steering[name].shape == steering.shape:
            self.gradiend_steering[name].copy_(steering)
        else:
            self.gradiend_steering[name] = steering.to(self.state_placement()[0])
        self.gradiend_on[name] = config.fitted and config.learning_rate != 0

    def edit_of(self, name: str, parameter: str, steering: Tensor | None = None) -> WeightEdit | None:
        """An adapter's change of a parameter, at the strength `(2, pairs)` if one is given; None without a change."""
        feature, offset = self.part(name, parameter, FEATURE), self.part(name, parameter, OFFSET)
        if feature is None or offset is None or not feature.shape[-1]:
            return None
        factors = self.gradiend_steering[name] if steering is None else steering.to(feature.device)
        if feature.shape[0] == 1:
            values = feature[0] * factors[0, 0] + offset[0] * factors[1, 0]
        else:
            values = factors[0] @ feature + factors[1] @ offset
        return WeightEdit(self.part(name, parameter, INDEX), values)

    def edits_of(self, name: str, steering: Tensor | None = None) -> Iterator[tuple[str, WeightEdit]]:
        """Each parameter that an adapter changes, with the change, at the strength that is given if there is one."""
        for parameter in self.gradiend_parameters[name]:
            edit = self.edit_of(name, parameter, steering)
            if edit is not None:
                yield parameter, edit

    def acting_edits(self, parameter: str, device: torch.device) -> list[WeightEdit]:
        """The changes of a parameter that act in a forward pass, on a device."""
        found = []
        for name in self.acting_adapters():
            # A check of values cannot be compiled; in compiled code a NaN appears in the output.
            if name in self._awaits_values and not torch.compiler.is_compiling():
                self.check_values(name)
            edit = self.edit_of(name, parameter)
            if edit is not None and edit.values.device != device:
                self.move_state(name, device)
                edit = edit.to(device)
            if edit is not None:
                found.append(edit)
        if found and not torch.compiler.is_compiling() and is_quantised(self.parameter(parameter)):
            raise ValueError(
                f"{self.path}.{parameter} was quantised after a GRADIEND adapter was attached to it. Instead, "
                f"{FLOAT_FIRST}."
            )
        return found

    def why_not_editable(self, parameter: str) -> str | None:
        """The reason why a parameter cannot be written to; None when it can."""
        if any(owns_offloaded(module) for module, _ in self.owners[parameter]):
            return "is offloaded. Load the model on one device"
        return why_not_editable(self.parameter(parameter))

    def why_not_mergeable(self, names: list[str]) -> str | None:
        """The reason why adapters cannot be written into the weights here; None when they can."""
        for parameter in (p for name in names for p in self.gradiend_parameters.get(name, ())):
            reason = self.why_not_editable(parameter)
            if reason is not None:
                return f"{self.path}.{parameter} {reason} to merge"
            if any(record_of(module) is not None for module, _ in self.owners[parameter]):
                return f"an erasure is merged into {self.path!r}. Unmerge the erasure, and merge it last"
        return None

    def merge_weights(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the weights of this module; without names, the adapters that are switched on."""
        wanted = self.switched_on() if adapter_names is None else adapter_names
        names = [name for name in self.adapters if name in wanted and name not in self.merged_adapters]
        for name in names:
            self.check_values(name)
        written: list[tuple[str, UndoRecord]] = []
        for parameter in dict.fromkeys(p for name in names for p in self.gradiend_parameters[name]):
            found = [self.edit_of(name, parameter) for name in names if self.gradiend_on[name]]
            edits = [edit for edit in found if edit is not None]
            if edits:
                written.append((parameter, write_edits(self.parameter(parameter), edits)))
            if safe_merge and not bool(torch.isfinite(self.parameter(parameter)).all()):
                for _, change in reversed(written):
                    change.undo()
                raise ValueError(f"Merging {names} makes {self.path}.{parameter} non-finite; the adapter seems broken.")
        self._merges.append((names, written))
        self.merged_adapters.extend(names)

    def unmerge_weights(self) -> None:
        """Put the weights back; they are equal bit for bit unless other code has changed them since."""
        while self._merges:
            self.unmerge_last()
        self.merged_adapters.clear()

    def unmerge_last(self) -> None:
        """Undo the last merge."""
        names, written = self._merges.pop()
        for name, change in reversed(written):
            # accelerate may have moved the weight since the merge. If it offloads a tied one, each owner has a copy.
            places = {id(m._parameters[own]): (m, own) for m, own in self.owners[name]}
            for module, own in places.values():
                change.parameter = module.get_parameter(own)
                if owns_offloaded(module):
                    change.parameter = nn.Parameter(values_of(module)[own].clone(), requires_grad=False)
                change.undo()
                if owns_offloaded(module):
                    write_value(module, own, change.parameter)
        self.merged_adapters = [name for name in self.merged_adapters if name not in names]

    def forget_originals(self) -> None:
        """Drop the copies that `unmerge_weights` needs: merged adapters stay merged."""
        self._merges.clear()


gradiend_layers = GradiendLayer.by_path


def steering_factors(config: GradiendConfig) -> Tensor:
    """The factors of Wd and bd for each pair, `(2, pairs)`; zero for pairs that do not act."""
    factors = torch.zeros(2, config.expected_pairs(), device="cpu", dtype=torch.float32)
    acting = config.pair_index(config.pair) if config.fitted else 0
    factors[0, acting], factors[1, acting] = config.learning_rate * config.feature_factor, config.learning_rate
    return factors
