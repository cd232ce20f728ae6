"""Modules that read a parameter of another module without calling that one, as Mamba's mixer does with its convolution.

They are found in the code of their classes. So no input is needed, and no way through the model is missed: some weights
are read past their module only while tokens are generated one by one. It may find too many modules, which does no harm:
a changed value that is in place earlier is the same value.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, TypeGuard

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationMixin, PreTrainedModel

# An attribute that code reads, after what it is read of: `self.proj.weight` is ("proj", "weight"), and it is SELF in
# `self.weight`. ANY is what code does not name: a local variable, an entry of a list, what a call returns.
Read = tuple[str, str]
SELF, ANY = "self", "*"

# Classes of which no method takes part in a forward pass, and such methods of other classes.
_FOUNDATIONS = {*PreTrainedModel.__mro__, *GenerationMixin.__mro__}
_ELSEWHERE = {"__init__", "__repr__", "extra_repr", "_init_weights", "init_weights", "reset_parameters", "tie_weights"}
_ELSEWHERE |= {"set_input_embeddings", "set_output_embeddings", "resize_token_embeddings"}
# What is read of a weight without its values, and functions that do no more; a changed value is made from `detach`.
_NO_VALUES = {"dtype", "device", "shape", "ndim", "size", "numel", "requires_grad"}
_NO_USE = {*_NO_VALUES, "__get__", "is_floating_point", "detach"}


class Readers:
    """Finds the modules of a model that may read parameters of others.

    Args:
        model: The model.
        left_out: Modules of this kind are none of the model's own.
    """

    def __init__(self, model: nn.Module, left_out: type[nn.Module]) -> None:
        # A module may be registered in several others.
        self._parents: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, child in module._modules.items():
                if child is not None and not isinstance(module, left_out):
                    self._parents.setdefault(id(child), []).append((module, name))

    def of(self, owner: nn.Module, parameter: str) -> list[nn.Module]:
        """The modules around `owner`, from the nearest, whose forward may read a parameter of it past its own."""
        names = frozenset(name for _, name in self._parents.get(id(owner), ()))
        kind: Any = type(owner)
        methods = _methods_that_read(kind, frozenset({(SELF, parameter)}), frozenset({"forward"})) - {"forward"}
        reads = frozenset({(ANY, parameter), *((name, parameter) for name in names)})
        # What is not called is read, in whatever way; a list of parameters is read by positions.
        pending = not _has_forward(owner)
        mentions = names if pending else frozenset()
        found = []
        for ancestor in self._ancestors(owner):
            kind = type(ancestor)
            if _writes(kind, parameter):  # as RWKV divides its weights; that must not go into a hidden value
                break
            reading = _methods_that_read(kind, reads, methods | mentions)
            methods |= reading - {"forward"}
            pending = pending or bool(reading) or _has_variant(ancestor)
            if pending and _has_forward(ancestor):
                found.append(ancestor)
                pending = False
        return found

    def _ancestors(self, owner: nn.Module) -> Iterator[nn.Module]:
        seen, line = {id(owner)}, [owner]
        for module in line:
            for parent, _ in self._parents.get(id(module), ()):
                if id(parent) not in seen:
                    seen.add(id(parent))
                    line.append(parent)
                    yield parent


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _has_variant(module: nn.Module) -> bool:
    """Whether a LoRA has a part of its own, like DoRA's magnitude, that it hands the module it wraps."""
    return isinstance(module, BaseTunerLayer) and bool(getattr(module, "lora_variant", None))


@functools.lru_cache(maxsize=10_000)
def _methods_that_read(kind: type, reads: frozenset[Read], methods: frozenset[str]) -> frozenset[str]:
    """Names of the methods of a class that read one of these attributes, or use one of these methods or such a one."""
    found: frozenset[str] = frozenset()
    known = {name: _code_reads(function) for name, function in _functions(kind)}
    while True:
        wanted = methods | (found - {"forward"})
        more = frozenset(n for n, read in known.items() if read & reads or any(name in wanted for _, name in read))
        if more == found:
            return found
        found = more


@functools.lru_cache(maxsize=10_000)
def _writes(kind: type, parameter: str) -> bool:
    """Whether methods of a class call a method in place, like `mul_`, on an attribute of this name."""
    known = [_code_reads(function) for _, function in _functions(kind)]
    return any(holder == parameter and name[-1] == "_" != name[-2:-1] for read in known for holder, name in read)


def _functions(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The functions of a class that may be part of a forward pass."""
    for cls in reversed([cls for cls in kind.__mro__ if cls not in _FOUNDATIONS]):
        for name, value in vars(cls).items():
            # A wrapper of PEFT reads weights when it is made and when it merges, too.
            if name in _ELSEWHERE or (issubclass(kind, BaseTunerLayer) and name != "forward"):
                continue
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FunctionType):
                yield name, function


@functools.lru_cache(maxsize=10_000)
def _code_reads(function: FunctionType) -> frozenset[Read]:
    """What a function reads, and what the functions that it wraps or calls by their name read."""
    found: set[Read] = set()
    line = [function]
    for each in line:
        for code in _codes(each.__code__):
            found.update(_attributes(code))
            # Not into PyTorch: it knows no module but its own, and those are looked at where they are.
            called = [each.__globals__.get(name) for name in code.co_names]
            line += [f for f in called if isinstance(f, FunctionType) and f not in line and not _is_torch(f)]
        cells = [cell.cell_contents for cell in each.__closure__ or () if _is_filled(cell)]
        line += [f for f in cells if isinstance(f, FunctionType) and f not in line]
    return frozenset(found)


def _is_torch(function: FunctionType) -> bool:
    return function.__module__.partition(".")[0] == "torch"


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _attributes(code: CodeType) -> Iterator[Read]:
    instructions = list(dis.get_instructions(code))
    for before, instruction, after in zip([None, *instructions], instructions, [*instructions[1:], None], strict=False):
        if _is_attribute(instruction) and not (_is_attribute(after) and after.argval in _NO_VALUES):
            yield _holder(before), instruction.argval
    if "getattr" in code.co_names:
        yield from ((ANY, value) for value in code.co_consts if isinstance(value, str))


def _is_attribute(instruction: dis.Instruction | None) -> TypeGuard[dis.Instruction]:
    # From Python 3.12 on, `super().forward` is an instruction of its own.
    return instruction is not None and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")


def _holder(instruction: dis.Instruction | None) -> str:
    """What an attribute is read of, by the instruction that loads it."""
    if instruction is None:
        return ANY
    if _is_attribute(instruction):
        return str(instruction.argval)
    # Newer releases of Python load two variables at once.
    variable = instruction.argval[-1] if isinstance(instruction.argval, tuple) else instruction.argval
    return SELF if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and variable == SELF else ANY


class UsedAsTheyAre(TorchFunctionMode):
    """Finds out which parameters functions of PyTorch get as they are, while attributes of changed values hide them.

    Args:
        parameters: The parameters by name.

    Attributes:
        names: Those that were used, in the order of their use.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._known = {id(parameter): name for name, parameter in parameters.items()}
        self.names: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note what a function is called with."""
        if getattr(func, "__name__", "") not in _NO_USE:
            used = [self._known.get(id(value)) for value in (*args, *(kwargs or {}).values())]
            self.names += [name for name in used if name is not None and name not in self.names]
        return func(*args, **(kwargs or {}))
