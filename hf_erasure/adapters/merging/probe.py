"""What a small forward pass tells: where the output of a site goes, and whether a merge has kept the model's outputs.

The output is followed through the operations of the pass, by storage. The inputs of modules do not tell: a residual
connection adds a tensor that no module was called with, and a router of experts multiplies by a parameter of its own.
Views share the storage of what they show, so storage does.

What a probe batch does not run (an expert that no token chose, a branch that depends on values) is not seen; therefore
only architectures are folded in which every use is plain, and the outputs are compared afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_erasure.models.dummy import dummy_batch
from hf_erasure.models.model import distance, evaluating, tensors_of, without_drawing

from ..common.placement import has_quantised
from ..erasure.layer import ErasureLayer, erasure_layers
from .record import CONVOLUTIONS, axis_of, why_not_mergeable

# A merge may take the outputs so many times as far as another rounding of the weights does: that is one sample of what
# rounding does, and others are larger.
_TIMES_ROUNDING = 4
# Operations that give a view without being declared as one, or that read a tensor's shape and not its values.
_VIEWS = {"_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "alias"}
_SHAPE_ONLY = {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"}


class Probe:
    """A model's own dummy input, run the same way each time.

    Attributes:
        failure: Why the model cannot be run on it; None when it can.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.failure: str | None = None
        self.inputs: dict[str, Tensor] = {}
        try:
            self.inputs = dummy_batch(model)
            self.run()
        except Exception as error:  # whatever a model may raise at an input it was not made for
            self.failure = f"{type(error).__name__}: {error}"

    def run(self) -> list[Tensor]:
        """The tensors the model returns, without dropout, gradients or autocast; draws of its own are not used up."""
        device = next(self.model.parameters()).device.type
        autocast = torch.amp.is_autocast_available(device)
        with (
            torch.inference_mode(False),
            evaluating(self.model),
            torch.autocast(device if autocast else "cpu", enabled=False),
            without_drawing(self.model),
        ):
            output: Any = self.model(**self.inputs)
        return tensors_of(output)


def check_drift(probe: Probe, before: list[Tensor], modules: list[nn.Module], names: list[str]) -> None:
    """Compare the outputs of a probe after adapters were merged into modules with those before.

    Raises:
        ValueError: If the outputs differ by more than rounding.
    """
    after = probe.run()
    drift = distance(after, before)
    if drift == 0:
        return
    rounding = _TIMES_ROUNDING * distance(_run_with_other_rounding(probe, modules), after)
    # The outputs are rounded too: of few numbers that differ in their last bit a sample of weights may have none.
    rounding += max(torch.finfo(value.dtype).eps / 2 for value in after if value.is_floating_point())
    if not drift <= rounding:
        raise ValueError(
            f"Merging {names} changed the model's output by {drift:.1e} of its norm, where rounding explains "
            f"{rounding:.1e}: the merge was taken back. Use the adapter unmerged, and please report the architecture."
        )
    if rounding >= 1:
        warnings.warn(
            f"The outputs after merging {names} could not be compared with those before: other rounding of weights "
            "changes them by as much as they are. Compare them yourself, in float64.",
            stacklevel=5,
        )


def _run_with_other_rounding(probe: Probe, modules: list[nn.Module]) -> list[Tensor]:
    """The outputs with every weight of the modules one rounding step up or down."""
    generator = torch.Generator().manual_seed(0)
    kept = [(p, p.data) for module in modules for p in module.parameters(recurse=False)]
    try:
        for parameter, value in kept:
            signs = 2 * torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8, device="cpu") - 1
            steps = torch.finfo(value.dtype).eps * signs.to(value.device, torch.float64)
            parameter.data = (value.double() * (1 + steps)).to(value.dtype)
        return probe.run()
    finally:
        for parameter, value in kept:
            parameter.data = value


# ---- what takes the output of a site ---------------------------------------------------------------------------------


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
    model: nn.Module, run: Callable[[], list[Tensor]], sites: dict[str, ErasureLayer], names: list[str]
) -> tuple[dict[str, Uses], dict[str, set[str]]]:
    """Run the model on a small input and note where the activations of `sites` go, whose erasers are to be folded.

    An erasure of another adapter than `names` stays in force and stands in the way.

    Returns:
        The uses of each site by path, and for each linear layer by name what its weight is used for: paths of sites,
        or names of operations in angle brackets.
    """
    trace = _Trace(model, {path: Uses() for path in sites})
    with _observing(model, trace, sites, names), _inside_quantised(model, trace), trace:
        outputs = run()
    for source in filter(None, map(trace.source_of, outputs)):
        trace.uses[source].returned = True
    return trace.uses, trace.fed


@contextmanager
def _observing(model: nn.Module, trace: _Trace, sites: Container[str], names: list[str]) -> Iterator[None]:
    """Observers take the places of all erasers: at the sites they mark, at the others they look for marks."""
    watched = []
    try:
        for path, layer in erasure_layers(model).items():
            to_merge = {*names} & {*layer.adapters} - {*layer.merged_adapters}
            for name in sorted({*layer.acting_adapters()} | to_merge):
                if name not in layer.observers:
                    observer = trace.marker(path) if path in sites else trace.sentinel(path, name, expected=names)
                    layer.observers[name] = observer
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


class _Trace(TorchDispatchMode):
    """Follows marked storages through a forward pass."""

    def __init__(self, model: nn.Module, uses: dict[str, Uses]) -> None:
        super().__init__()
        self.uses = uses
        self.fed: dict[str, set[str]] = {}
        # Modules of other methods, in the place of modules of the model.
        modules = dict(model.named_modules())
        wrapped = [n for n, m in modules.items() if isinstance(m, BaseTunerLayer) and not isinstance(m, ErasureLayer)]
        inside = tuple(f"{name}." for name in wrapped)
        # The layers that can take an eraser at their input, by the address of their weight.
        self._owners = {
            module.get_parameter("weight").data_ptr(): (name, module)
            for name, module in modules.items()
            if axis_of(module, "input") is not None
            and not isinstance(module, CONVOLUTIONS)
            and not name.startswith(inside)
            and why_not_mergeable(module, "input") is None
        }
        self._wrapped = {p.data_ptr(): name for name in wrapped for p in modules[name].parameters()}
        self._weight_storages = {_storage(m.get_parameter("weight")): n for n, m in self._owners.values()}
        # The tensors are kept, so that no other takes the place in memory that stands for them.
        self._sources: dict[int, tuple[str, Tensor]] = {}
        self._paused = False
        self.quantised = ""

    def marker(self, path: str) -> Callable[[Tensor], Tensor]:
        """An observer that gives the activation of a site a storage of its own, and remembers it."""

        def mark(hidden: Tensor) -> Tensor:
            source = self.source_of(hidden)
            self.uses[path].runs += 1
            if source is not None and source != path:
                self.uses[source].obstacles.append(f"erasure at {path!r}")
            self._paused = True
            marked = hidden.clone()
            self._paused = False
            self._sources[_storage(marked)] = (path, marked)
            return marked

        return mark

    def sentinel(self, path: str, name: str, expected: Container[str]) -> Callable[[Tensor], Tensor]:
        """An observer that changes nothing, and notes when a marked activation comes by an eraser that stays."""

        def look(hidden: Tensor) -> Tensor:
            source = self.source_of(hidden)
            if source is not None and name not in expected:
                self.uses[source].obstacles.append(f"erasure of {name!r} at {path!r}")
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


def _storage(tensor: Tensor) -> int:
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return -1
    return tensor.untyped_storage().data_ptr() or -1
