"""Who takes the output of a site: followed through the operations of a forward pass, by storage.

The inputs of modules do not tell: a residual connection adds a tensor that no module was called with, and a router of
experts multiplies by a parameter of its own. Views share the storage of what they show, so storage does.

What a probe batch does not run (an expert that no token chose, a branch that depends on values) is not seen; therefore
only architectures are folded in which every use is plain, and the outputs are compared afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..common.placement import has_quantised
from ..erasure.layer import ErasureLayer, erasure_layers
from .check import Probe
from .formulas import why_not_mergeable

# Operations that give a view without being declared as one, or that read a tensor's shape and not its values.
_VIEWS = {"_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "alias"}
_SHAPE_ONLY = {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"}


@dataclass
class Uses:
    """What a forward pass does with the activation of one site.

    Attributes:
        layers: Names of the linear layers that multiply it, in the order of their calls.
        obstacles: Names of the other operations it goes into.
        quantised: Names of the modules with quantised weights that it goes into.
        returned: Whether it is part of what the model returns.
        runs: How many times the site was reached.
    """

    layers: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    quantised: list[str] = field(default_factory=list)
    returned: bool = False
    runs: int = 0


def trace_uses(
    model: nn.Module, probe: Probe, sites: dict[str, ErasureLayer], names: list[str]
) -> tuple[dict[str, Uses], dict[str, set[str]]]:
    """Run the probe and note where the activations of `sites` go.

    Args:
        model: The base model.
        probe: What is run.
        sites: The layers whose erasers are to be folded, by path.
        names: The adapters to be merged. An erasure of another adapter stays in force and stands in the way.

    Returns:
        The uses of each site by path, and for each linear layer by name what its weight is used for: paths of sites,
        or names of operations in angle brackets.
    """
    trace = _Trace(model)
    with _observing(model, trace, sites, names), _inside_quantised(model, trace), trace:
        outputs = probe.run()
    for output in outputs:
        site = trace.source_of(output)
        if site is not None:
            trace.uses[site].returned = True
    return {path: trace.uses.get(path, Uses()) for path in sites}, trace.fed


@contextmanager
def _observing(model: nn.Module, trace: _Trace, sites: dict[str, ErasureLayer], names: list[str]) -> Iterator[None]:
    """Observers take the places of all erasers: at the sites they mark, at the others they look for marks."""
    watched = []
    try:
        for path, layer in erasure_layers(model).items():
            acting = {*layer.applied_adapters("output"), *layer.applied_adapters("input")}
            for name in sorted(acting | ({*names} & {*layer.adapters} - {*layer.merged_adapters})):
                if name in layer.observers:
                    continue
                if path in sites:
                    layer.observers[name] = trace.marker(path)
                elif name in names:
                    layer.observers[name] = _unchanged
                else:
                    layer.observers[name] = trace.sentinel(f"erasure of {name!r} at {path!r}")
                watched.append((layer, name))
        yield
    finally:
        for layer, name in watched:
            layer.observers.pop(name, None)


@contextmanager
def _inside_quantised(model: nn.Module, trace: _Trace) -> Iterator[None]:
    """Let the trace know while a module with quantised weights runs, whose operations mean nothing to a reader."""

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: setattr(trace, "quantised", name)

    handles = []
    for name, module in model.named_modules():
        if has_quantised(module):
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(enter(""))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


class _Trace(TorchDispatchMode):
    """Follows marked storages through a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.uses: dict[str, Uses] = {}
        self.fed: dict[str, set[str]] = {}
        wrapped = [n for n, m in model.named_modules() if _is_wrapper(m)]
        self._owners = _weight_owners(model, wrapped)
        self._wrapped = {p.data_ptr(): n for n in wrapped for p in model.get_submodule(n).parameters()}
        self._weight_storages = {_storage(m.get_parameter("weight")): n for n, m in self._owners.values()}
        # The tensors are kept, so that no other takes the place in memory that stands for them.
        self._sources: dict[int, tuple[str, Tensor]] = {}
        self._paused = False
        self.quantised = ""

    def marker(self, path: str) -> Callable[[Tensor], Tensor]:
        """An observer that gives the activation of a site a storage of its own, and remembers it."""

        def mark(hidden: Tensor) -> Tensor:
            source = self.source_of(hidden)
            uses = self.uses.setdefault(path, Uses())
            uses.runs += 1
            if source is not None and source != path:
                self.uses[source].obstacles.append(f"erasure at {path!r}")
            self._paused = True
            marked = hidden.clone()
            self._paused = False
            self._sources[_storage(marked)] = (path, marked)
            return marked

        return mark

    def sentinel(self, name: str) -> Callable[[Tensor], Tensor]:
        """An observer that changes nothing, and notes when a marked activation comes by."""

        def look(hidden: Tensor) -> Tensor:
            source = self.source_of(hidden)
            if source is not None:
                self.uses[source].obstacles.append(name)
            return hidden

        return look

    def source_of(self, tensor: Tensor) -> str | None:
        """The site whose activation a tensor shows, or None."""
        found = self._sources.get(_storage(tensor))
        return None if found is None else found[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (self._paused or func.is_view or name in _VIEWS or name in _SHAPE_ONLY):
            self._note(name, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sources = [source for source in map(self.source_of, tensors) if source is not None]
        factor, owner = self._product(name, args, kwargs)
        source = None if factor is None else self.source_of(factor)
        if owner is not None and source is not None and sources == [source]:
            self.uses[source].layers.append(owner)
            self.fed.setdefault(owner, set()).add(source)
            return
        wrapper = next((self._wrapped[t.data_ptr()] for t in tensors if t.data_ptr() in self._wrapped), None)
        for path in sources:
            if self.quantised:
                self.uses[path].quantised.append(self.quantised)
                continue
            self.uses[path].obstacles.append(name if wrapper is None else f"{name} of the adapter around {wrapper!r}")
        for tensor in tensors:
            weight_of = self._weight_storages.get(_storage(tensor))
            if weight_of is not None:
                self.fed.setdefault(weight_of, set()).add(f"<{name}>")

    def _product(self, name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, str | None]:
        """What is multiplied by the whole weight of which linear layer, where an operation is such a product."""
        position = {"mm": 0, "linear": 0, "addmm": 1}.get(name)
        if position is None or kwargs:
            return None, None
        factor, weight = args[position], args[position + 1]
        owner, module = self._owners.get(weight.data_ptr(), (None, None))
        if module is None or module.get_parameter("weight").numel() != weight.numel():
            return None, None
        return factor, owner


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module is another method's, in the place of one of the model's."""
    return isinstance(module, BaseTunerLayer) and not isinstance(module, ErasureLayer)


def _weight_owners(model: nn.Module, wrapped: list[str]) -> dict[int, tuple[str, nn.Module]]:
    """The layers that can take an eraser at their input, by the address of their weight."""
    prefixes = tuple(f"{name}." for name in wrapped)
    return {
        module.get_parameter("weight").data_ptr(): (name, module)
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding)
        and not name.startswith(prefixes)
        and why_not_mergeable(module, "input") is None
    }


def _storage(tensor: Tensor) -> int:
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return -1
    return tensor.untyped_storage().data_ptr() or -1
