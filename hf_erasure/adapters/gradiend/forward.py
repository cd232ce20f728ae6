"""The arithmetic of a GRADIEND adapter, and a forward pass in which changed values hide parameters.

`W + α (h Wd + bd)`, dense or at a few positions (arXiv 2502.01406, section 3), is computed in float32 (float64 for a
float64 weight) and rounded once to the dtype of the weight. A forward pass with the adapter, a merge and a trial edit
all call `edited_tensor`, so that they agree bit for bit.

Some modules read a parameter without calling its owner, as Mamba's mixer does with its convolution. Then the changed
value is in place while the reading module's `forward` runs. Such modules are found in the code of their classes, so
that no path is missed: some weights are read so only while tokens are generated one by one. It does no harm to find too
many: the changed value is then only in place earlier.
"""

from __future__ import annotations

import dis
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationMixin, PreTrainedModel

from ..common.layer import AdapterChild
from ..common.placement import is_quantised, value_on_execution_device

if TYPE_CHECKING:
    from .layer import GradiendLayer


# This lock is held while a forward pass puts its values in place or removes them, never while a module runs.
_LOCK = threading.RLock()
# The id of a thread, and whether it runs with gradients.
_PassKey = tuple[int, bool]

# The name of an object and that of its attribute that code reads: `self.proj.weight` is ("proj", "weight"), and
# `self.weight` is (SELF, "weight"). ANY stands for an object without such a name: a local variable, an item, a result.
Read = tuple[str, str]
SELF, ANY = "self", "*"

# Classes whose methods do not take part in a forward pass, and such methods of other classes.
_FOUNDATIONS = {*PreTrainedModel.__mro__, *GenerationMixin.__mro__}
_NO_FORWARD = {"__init__", "__repr__", "extra_repr", "_init_weights", "init_weights", "reset_parameters", "tie_weights"}
_NO_FORWARD |= {"set_input_embeddings", "set_output_embeddings", "resize_token_embeddings"}
# Attributes of a weight that do not read its values, and functions that only call these; `detach` makes changed values.
_NO_VALUES = {"dtype", "device", "shape", "ndim", "size", "numel", "requires_grad"}
_NO_USE = {*_NO_VALUES, "__get__", "is_floating_point", "detach"}
# What a message says of a weight in whose place another tensor is.
NOT_A_PARAMETER = (
    "is not a parameter of the model any more, as after pruning, a parametrization, or in a LoRA with "
    "target_parameters. Make that permanent (torch.nn.utils.prune.remove, parametrize.remove_parametrizations, "
    "merge_and_unload), or load the adapter into its own base model."
)


@dataclass(frozen=True)
class WeightEdit:
    """One adapter's change of one weight."""

    index: Tensor | None  # (count,) int32 flat positions; None where every entry changes
    values: Tensor  # (count,) the numbers that are added there

    def to(self, device: torch.device) -> WeightEdit:
        """The edit on a device."""
        return WeightEdit(None if self.index is None else self.index.to(device), self.values.to(device))


def edited_tensor(weight: Tensor, edits: Sequence[WeightEdit]) -> Tensor:
    """A new tensor like `weight` with the changes added; `weight` is not changed."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    flat = weight.detach().reshape(-1)
    if len(edits) == 1 and edits[0].index is not None and flat.dtype != dtype:
        # In half precision, all entries but a few would be converted to float32 and back for nothing.
        index, values = edits[0].index, edits[0].values
        changed = flat.index_select(0, index).to(dtype) + values
        return flat.clone().index_copy_(0, index.long(), changed.to(flat.dtype)).view(weight.shape)
    result = flat.to(dtype, copy=True)
    for edit in edits:
        values = edit.values.to(dtype)
        if edit.index is not None:
            result.index_add_(0, edit.index, values)
        elif values.shape == result.shape:
            result += values
        else:
            raise ValueError(
                f"A GRADIEND adapter changes {values.numel():,} entries of a weight that has shape "
                f"{list(weight.shape)} now: it was resized after the adapter, as by resize_token_embeddings. Resize "
                "the model first; then add and fit the adapter, or load it."
            )
    return result.to(weight.dtype).view(weight.shape)


class _PassGradient(torch.autograd.Function):
    """Add the change to a weight; the gradient is passed to the weight unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *parts: Tensor | None) -> Tensor:
        edits = [WeightEdit(parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]  # type: ignore[arg-type]
        return edited_tensor(weight, edits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (gradients[0], *[None] * (len(ctx.needs_input_grad) - 1))


@dataclass
class UndoRecord:
    """The values that were overwritten in one weight, so that they can be put back."""

    parameter: nn.Parameter
    index: Tensor | None  # (count,) int64 flat positions that were written; None for all
    before: Tensor  # the former values at these positions
    edits: list[WeightEdit]  # the changes that were added to them

    def undo(self) -> None:
        """Put the values back: bit for bit, unless other code has changed the weight in between."""
        flat = self.parameter.detach().reshape(-1)
        before, index = self.before.to(flat.device), None if self.index is None else self.index.to(flat.device)
        after = edited_tensor(before, [edit.to(flat.device) for edit in self.edits])
        now = flat if index is None else flat.index_select(0, index)
        if torch.allclose(now, after.to(flat.dtype), rtol=0, atol=0, equal_nan=True):
            values = before.to(flat.dtype)
        else:  # for example, a LoRA was merged into the same weight since
            dtype = torch.promote_types(flat.dtype, torch.float32)
            values = (now.to(dtype) - (after.to(dtype) - before.to(dtype))).to(flat.dtype)
        _overwrite(self.parameter, flat, index, values)


def write_edits(parameter: nn.Parameter, edits: list[WeightEdit]) -> UndoRecord:
    """Add changes to a weight in place."""
    flat, index = parameter.detach().reshape(-1), None
    edits = [edit.to(flat.device) for edit in edits]
    positions = [edit.index.long() for edit in edits if edit.index is not None]
    if len(positions) == len(edits) == 1:  # only the entries that change are read and written
        index, edits = positions[0], [WeightEdit(None, edits[0].values)]
    elif len(positions) == len(edits):
        index, values = torch.cat(positions).unique(), [edit.values for edit in edits]
        edits = [WeightEdit(torch.searchsorted(index, at), v) for at, v in zip(positions, values, strict=True)]
    before = flat.clone() if index is None else flat.index_select(0, index)
    _overwrite(parameter, flat, index, edited_tensor(before, edits))
    return UndoRecord(parameter, index, before, edits)


@torch.no_grad()
def _overwrite(parameter: nn.Parameter, flat: Tensor, index: Tensor | None, values: Tensor) -> None:
    # `detach` shares memory and version counter, so a backward pass that needs the old values raises an error.
    target = parameter.detach()
    if index is None:
        target.copy_(values.view(parameter.shape))
    elif flat.data_ptr() == parameter.data_ptr():  # a view of the weight; of one that is not contiguous it is a copy
        flat.index_copy_(0, index, values)
    else:
        target.copy_(flat.index_copy(0, index, values).view(parameter.shape))


def why_not_editable(parameter: Tensor) -> str | None:
    """The reason why a weight cannot be written to; None when it can."""
    if is_quantised(parameter):
        return "is quantised, and an edit of it would not be exact. Load the float weights"
    if type(parameter.data) is not Tensor:
        return "is sharded. Load the model whole"
    if parameter.device.type == "meta":
        return "is offloaded. Load the model on one device"
    return None


def rounded_share(changes: Iterable[tuple[Tensor, WeightEdit]]) -> float:
    """The share of the changes of weights that is left after rounding to the weights' dtype; 1 if all is left."""
    squares = product = 0.0
    for parameter, edit in changes:
        flat = parameter.detach().reshape(-1)
        edit = edit.to(flat.device)
        if edit.index is not None:
            flat, edit = flat.index_select(0, edit.index), WeightEdit(None, edit.values)
        wanted = edited_tensor(torch.zeros_like(flat, dtype=torch.float32), [edit]).double()
        kept = edited_tensor(flat, [edit]).double() - flat.double()
        squares += float(wanted.square().sum())
        product += float((wanted * kept).sum())
    return min(1.0, product / squares) if squares else 1.0


# ---- changed values in a forward pass --------------------------------------------------------------------------------


class ForwardWithEdits:
    """Replace a module's `forward`, and hide parameters behind their changed values while it runs.

    It is put inside accelerate's own wrapper, which loads the weights of an offloaded module. Several threads may run
    it at once: the values stay until the last thread leaves.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # The changes of its own parameters: a layer, the parameter's name in the layer, and its name in this module.
        self.edits: list[tuple[GradiendLayer, str, str]] = []
        # The layers, each with this object or that of another module whose parameters this one reads without a call.
        self.reads: list[tuple[GradiendLayer, ForwardWithEdits]] = []
        self._owner_forwards: list[ForwardWithEdits] = []
        self._depths: dict[_PassKey, int] = {}
        self._wrapped: Callable[..., Any] | None = None

    def hide(self, layer: GradiendLayer, at: ForwardWithEdits, *edits: tuple[str, str]) -> None:
        """Hide parameters of `at` while this module runs; `edits` are (name in `layer`, name here) of its own ones."""
        self.edits += [(layer, *edit) for edit in edits]
        self.reads.append((layer, at))
        self._replace_forward()

    def remove(self, layer: GradiendLayer) -> None:
        """Stop hiding parameters for a layer; after the last layer, the module has its own `forward` again."""
        self.edits = [edit for edit in self.edits if edit[0] is not layer]
        self.reads = [read for read in self.reads if read[0] is not layer]
        self._replace_forward()

    def _replace_forward(self) -> None:
        """Replace the module's forward while parameters are hidden for a layer, and restore it afterwards."""
        was_replaced = bool(self._owner_forwards)
        self._owner_forwards = list({id(other): other for _, other in self.reads}.values())
        place, attributes = _forward_attribute(self.module), self.module.__dict__
        if self._owner_forwards and not was_replaced:
            self._wrapped = attributes.get(place)
            attributes[place] = self
        elif not self._owner_forwards and attributes.get(place) is self:
            if self._wrapped is not None:
                attributes[place] = self._wrapped
            elif place == "forward":
                del attributes[place]
            else:  # accelerate came later, and keeps this object as the module's own forward
                attributes[place] = type(self.module).forward.__get__(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the module's `forward` with the changed values in place."""
        if args and args[0] is self.module:  # accelerate binds the function that it unwraps to the module
            args = args[1:]
        if torch.compiler.is_compiling():
            return self._compiled(*args, **kwargs)
        pass_key = (threading.get_ident(), torch.is_grad_enabled())
        entered: list[ForwardWithEdits] = []
        try:
            for edits in self._owner_forwards:
                if edits._enter(pass_key):
                    entered.append(edits)
            return self._run(*args, **kwargs)
        finally:
            for edits in entered:
                edits._leave(pass_key)

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        replaced = []
        for edits in self._owner_forwards:
            attributes = edits.module.__dict__
            # An outer module that reads the same parameters may have put their values in place already.
            values = {name: value for name, value in edits._values().items() if name not in attributes}
            attributes.update(values)
            replaced.append((edits.module, values))
            _refresh_flat_weights(edits.module)
        try:
            return self._run(*args, **kwargs)
        finally:
            for module, values in replaced:
                for name in values:
                    del module.__dict__[name]
                _refresh_flat_weights(module)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._wrapped is not None:
            return self._wrapped(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _enter(self, pass_key: _PassKey) -> bool:
        """Put the changed values in place; return False where no parameter is changed."""
        with _LOCK:
            # A module that reads them may have put them in place before it calls this module.
            if pass_key not in self._depths:
                values = self._values()
                if not values:
                    return False
                attributes = self.module.__dict__
                for name, value in values.items():
                    # A thread without gradients must not replace a value that another thread needs with its graph.
                    if name not in attributes or value.requires_grad or not attributes[name].requires_grad:
                        attributes[name] = value
                _refresh_flat_weights(self.module)
            self._depths[pass_key] = self._depths.get(pass_key, 0) + 1
            return True

    def _leave(self, pass_key: _PassKey) -> None:
        with _LOCK:
            self._depths[pass_key] -= 1
            if not self._depths[pass_key]:
                del self._depths[pass_key]
            if not self._depths:
                for _, _, name in self.edits:
                    self.module.__dict__.pop(name, None)
                _refresh_flat_weights(self.module)

    def _values(self) -> dict[str, Tensor]:
        """Parameter name → its value with the changes of the acting adapters; unchanged parameters are left out."""
        weights: dict[str, Tensor] = {}
        edits: dict[str, list[WeightEdit]] = {}
        for layer, parameter, name in self.edits:
            weight: Tensor | None = self.module._parameters.get(name)
            if weight is not None and weight.device.type == "meta":
                weight = value_on_execution_device(self.module, name)
            if weight is None and layer.acting_adapters():
                raise ValueError(f"{layer.path}.{parameter} {NOT_A_PARAMETER}")
            if weight is not None:
                weights[name] = weight
                edits.setdefault(name, []).extend(layer.acting_edits(parameter, weight.device))
        changed: dict[str, Tensor] = {}
        for name, found in edits.items():
            if found and weights[name].requires_grad and torch.is_grad_enabled():
                parts = (part for edit in found for part in (edit.index, edit.values))
                changed[name] = _PassGradient.apply(weights[name], *parts)
            elif found:
                with torch.no_grad():
                    changed[name] = edited_tensor(weights[name], found)
        return changed

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function whose signature `inspect.signature` shows."""
        return self._wrapped or type(self.module).forward.__get__(self.module)


def forward_of(module: nn.Module) -> ForwardWithEdits:
    """The object that replaces the forward of a module; a new one if the forward is not replaced yet."""
    present = module.__dict__.get(_forward_attribute(module))
    return present if isinstance(present, ForwardWithEdits) else ForwardWithEdits(module)


def _forward_attribute(module: nn.Module) -> str:
    """The attribute in which a module's forward is replaced; with accelerate's wrapper, the one that this calls."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def _refresh_flat_weights(module: nn.Module) -> None:
    """Make a recurrent network's list of its weights anew, since its forward reads the weights from this list."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


# ---- modules that read a parameter of another one --------------------------------------------------------------------


class Readers:
    """Find the modules of a model that may read parameters of others; modules of adapter children do not count."""

    def __init__(self, model: nn.Module) -> None:
        # A module may be registered in several others.
        self._parents: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, child in module._modules.items():
                if child is not None and not isinstance(module, AdapterChild):
                    self._parents.setdefault(id(child), []).append((module, name))

    def find(self, owner: nn.Module, parameter: str) -> list[nn.Module]:
        """The modules around `owner`, the nearest first, that may read its parameter without calling its forward."""
        names = frozenset(name for _, name in self._parents.get(id(owner), ()))
        kind: Any = type(owner)
        methods = _methods_that_read(kind, frozenset({(SELF, parameter)}), frozenset({"forward"})) - {"forward"}
        reads = frozenset({(ANY, parameter), *((name, parameter) for name in names)})
        # An owner that cannot be called is read by another module; a list of parameters, for example, by positions.
        pending = not _has_forward(owner)
        mentions = names if pending else frozenset()
        found = []
        for ancestor in self._ancestors(owner):
            kind = type(ancestor)
            if _modifies(kind, parameter):  # RWKV divides its weights in place: it must write the weight, not our value
                break
            reading = _methods_that_read(kind, reads, methods | mentions)
            methods |= reading - {"forward"}
            # A LoRA may have another part, such as DoRA's magnitude, to which it passes the module that it wraps.
            has_variant = isinstance(ancestor, BaseTunerLayer) and bool(getattr(ancestor, "lora_variant", None))
            pending = pending or bool(reading) or has_variant
            if pending and _has_forward(ancestor):
                found.append(ancestor)
                pending = False
        return found

    def _ancestors(self, owner: nn.Module) -> Iterator[nn.Module]:
        seen, queue = {id(owner)}, [owner]
        for module in queue:
            for parent, _ in self._parents.get(id(module), ()):
                if id(parent) not in seen:
                    seen.add(id(parent))
                    queue.append(parent)
                    yield parent


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


@functools.lru_cache(maxsize=10_000)
def _methods_that_read(kind: type, reads: frozenset[Read], methods: frozenset[str]) -> frozenset[str]:
    """Names of the methods of a class that read one of `reads`, or use one of `methods` or a method found so."""
    found: frozenset[str] = frozenset()
    known = {name: _code_reads(function) for name, function in _functions(kind)}
    while True:
        wanted = methods | (found - {"forward"})
        more = frozenset(n for n, read in known.items() if read & reads or any(name in wanted for _, name in read))
        if more == found:
            return found
        found = more


@functools.lru_cache(maxsize=10_000)
def _modifies(kind: type, parameter: str) -> bool:
    """Whether methods of a class call an in-place method, such as `mul_`, on an attribute of this name."""
    known = [_code_reads(function) for _, function in _functions(kind)]
    return any(holder == parameter and name[-1] == "_" != name[-2:-1] for read in known for holder, name in read)


def _functions(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The functions of a class that may be part of a forward pass."""
    for cls in reversed([cls for cls in kind.__mro__ if cls not in _FOUNDATIONS]):
        for name, value in vars(cls).items():
            # PEFT's wrappers also read weights when they are made and merged, which is not a forward pass.
            if name in _NO_FORWARD or (issubclass(kind, BaseTunerLayer) and name != "forward"):
                continue
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FunctionType):
                yield name, function


@functools.lru_cache(maxsize=10_000)
def _code_reads(function: FunctionType) -> frozenset[Read]:
    """The attributes that a function reads, and those that the functions read which it wraps or calls by name."""
    found: set[Read] = set()
    queue = [function]
    for current in queue:
        codes = [current.__code__]
        for code in codes:
            codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
            bytecode = list(dis.get_instructions(code))
            # An object is loaded before its attribute, and something is done with the attribute afterwards.
            for before, read, after in zip(bytecode, bytecode[1:], bytecode[2:], strict=False):
                if _is_attribute(read) and not (_is_attribute(after) and after.argval in _NO_VALUES):
                    found.add((_object_name(before), read.argval))
            if "getattr" in code.co_names:
                found.update((ANY, value) for value in code.co_consts if isinstance(value, str))
            # Functions of PyTorch are not followed: they know only PyTorch's modules, which are examined themselves.
            called = [current.__globals__.get(name) for name in code.co_names]
            known = [f for f in called if isinstance(f, FunctionType) and f.__module__.partition(".")[0] != "torch"]
            queue += [f for f in known if f not in queue]
        for cell in current.__closure__ or ():
            with suppress(ValueError):  # an empty cell raises it
                if isinstance(cell.cell_contents, FunctionType) and cell.cell_contents not in queue:
                    queue.append(cell.cell_contents)
    return frozenset(found)


def _is_attribute(instruction: dis.Instruction) -> bool:
    # From Python 3.12 on, `super().forward` has its own instruction.
    return instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")


def _object_name(instruction: dis.Instruction) -> str:
    """The name of the object of which an attribute is read, from the instruction that loads the object."""
    if _is_attribute(instruction):
        return str(instruction.argval)
    # Newer releases of Python load two variables at once.
    variable = instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval
    return SELF if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and variable == SELF else ANY


class UneditedUses(TorchFunctionMode):
    """Find the parameters that PyTorch functions get unchanged, while changed values hide them as attributes."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._known = {id(parameter): name for name, parameter in parameters.items()}
        self.names: list[str] = []  # in the order of their use

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record the known parameters among a function's arguments, and call the function."""
        if getattr(func, "__name__", "") not in _NO_USE:
            used = [self._known.get(id(value)) for value in (*args, *(kwargs or {}).values())]
            self.names += [name for name in used if name is not None and name not in self.names]
        return func(*args, **(kwargs or {}))
