"""Finds which norms of a model read or write the hidden state that its blocks pass on.

One small forward pass is watched operation by operation. The input of a block is the hidden state; so is a tensor that
is made of it by adding to it, rearranging, cutting or scaling. A norm that takes the hidden state normalises it if the
norm's output goes on as the hidden state (post-LN), or if a branch computed from the output is added to the hidden
state (pre-LN). A norm whose output is itself added to the hidden state (Gemma 2, the last BatchNorm of a residual
branch) normalises it too. Norms of queries and keys, of gates, of states of a mixer and of patches do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from .dummy import dummy_batch
from .graph import REARRANGING
from .model import axis_of_kind, floats_of, is_norm

_SUMS = {"add", "add_", "sub"}
_SCALINGS = {"mul", "mul_", "div", "div_"}
_LAST = ("last_hidden_state", "pooler_output")
_MIXINGS = {"bmm", "mm", "baddbmm"}


def norms_of_hidden_state(model: nn.Module) -> list[str]:
    """The names of a bare model's norms of the hidden state, or of the wrappers that other adapters put around them.

    Raises:
        ValueError: If there are none, or no input is known that the model accepts; it names modules to erase at.
    """
    found: set[str] = set()
    try:
        dummy_batch(model, watch=lambda call: found.update(NormFinder(model, call).sites))
    except ValueError as error:
        raise _no_norms_error(
            model,
            f"No input is known that {type(model).__name__} accepts, to see what flows in a small forward pass",
            "; a class of your own can have dummy_inputs, a dict, which are tried first",
        ) from error
    found = set(map(wrapper_finder(model), found))
    if not found:
        blocks = f"the blocks of {type(model).__name__} that reads or writes its hidden state"
        raise _no_norms_error(model, f"No normalization layer was found inside {blocks}")
    return [name for name, _ in model.named_modules() if name in found]


def wrapper_finder(model: nn.Module) -> Callable[[str], str]:
    """A function from a module's name to that of the wrapper around it, or to the same name if it has no wrapper."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    wrappers = [name for name, module in model.named_modules() if isinstance(module, kinds) and name]
    return lambda name: next((w for w in wrappers if name.startswith(f"{w}.")), name)


def _no_norms_error(model: nn.Module, why: str, besides: str = "") -> ValueError:
    """The error for a model without a default; it suggests the last layers with a matrix in the last blocks."""
    blocks = blocks_of(model) or [part for m in model.modules() if isinstance(m, nn.ModuleList) for part in m]
    found = {id(block) for block in blocks}
    matrices = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.dim() > 1}
    layers = [name for name, m in model.named_modules() if axis_of_kind(m, 4) is not None and name in matrices]
    names = []
    for block in [name for name, module in model.named_modules() if id(module) in found][-2:]:
        names += [name for name in layers if f"{name}.".startswith(f"{block}.")][-1:] or [block]
    return ValueError(
        f"{why}, so there is no default for target_modules. Name the modules whose output is to be erased, e.g. "
        f"target_modules={names or ['layer.0', 'layer.1']}{besides}."
    )


@dataclass(frozen=True)
class Trace:
    """What is known about a tensor."""

    # The shape of the hidden state that the tensor is, or is a rearrangement of; empty if it is neither.
    sizes: tuple[int, ...] = ()
    # The names of the norms that it was computed from since the last sum with the hidden state.
    norms: frozenset[str] = frozenset()
    output_of: str | None = None  # The norm whose output it is, at most rearranged or scaled.
    is_rearranged: bool = False  # Whether that output was rearranged or scaled.
    was_in_block: bool = False  # Whether it has been in a block; embeddings have not.
    # The norm to whose output another tensor was added, where the sum may be a hidden state of its own.
    summed_norm: str | None = None


_NO_TRACE = Trace()


class NormFinder(TorchDispatchMode):
    """Watches a forward pass, and finds the norms of the hidden state.

    Args:
        model: A bare model.
        call: Makes the pass.

    Attributes:
        sites: The norms of the hidden state, in the order of their first calls.
    """

    def __init__(self, model: nn.Module, call: Callable[[], Any]) -> None:
        super().__init__()
        self._model = model
        self._traces = WeakTensorKeyDictionary()
        self._input_norms: set[str] = set()
        self._found_norms: set[str] = set()
        self._hidden_sizes: set[tuple[int, ...]] = set()  # the shapes of the inputs of blocks
        self._norm_calls: list[str] = []
        # For each block and part of a block that runs at present, from the outermost: whether it is a block.
        self._running: list[bool] = []
        # Some models call the children of a block without calling the block.
        blocks = blocks_of(model)
        self._blocks = {id(block) for block in blocks}
        self._children = {id(part) for block in blocks for part in block.children()} - self._blocks
        self._norms = {id(module) for module in model.modules() if is_norm(module)}
        self._block_prefixes = tuple(f"{name}." for name, m in model.named_modules() if id(m) in self._blocks)
        # Modules inside a block that have several parts with weights. If such a module takes the output of a norm
        # unchanged, in the shape of a hidden state, the norm normalises the hidden state of a branch, without a sum in
        # between (Zamba's shared block). The modules that an adapter adds to a layer are not parts of it.
        self._inner_modules = {
            id(m)
            for name, m in model.named_modules()
            if name.startswith(self._block_prefixes) and id(m) not in self._blocks | self._norms
            if not isinstance(m, nn.Linear) and not hasattr(m, "base_layer")
            if sum(any(True for _ in part.parameters()) for part in m.children()) > 1
        }
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                enter, leave = partial(self._before_call, name), partial(self._after_call, name)
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
            with self:
                call()
        self.sites = [name for name in dict.fromkeys(self._norm_calls) if name in self._found_norms]

    # ---- modules -----------------------------------------------------------------------------------------------------

    def _before_call(self, name: str, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        if id(module) in self._blocks | self._children:
            self._running.append(id(module) in self._blocks)
        hidden = next(floats_of((args, kwargs)), None)
        if hidden is None:
            return
        trace = self._traces.get(hidden, _NO_TRACE)
        is_direct = trace.output_of is None or not trace.is_rearranged
        is_inside = trace.was_in_block or name.startswith(self._block_prefixes)
        # The hidden state of sounds is empty where a batch has none (Higgs Audio).
        if id(module) in self._norms and hidden.numel() and is_direct and is_inside:
            features = {p.numel() for p in module.parameters(recurse=False)} or {hidden.shape[-1]}
            if features & set(trace.sizes):
                self._input_norms.add(name)
                # The earlier norm of a state that is normalised twice, or the norm whose sum with a branch is taken.
                self._found_norms |= {norm for norm in (trace.output_of, trace.summed_norm) if norm is not None}
        if id(module) in self._blocks:
            for given in floats_of((args, kwargs)):  # reversible blocks take two hidden states
                if given.shape == hidden.shape:
                    trace = self._traces.get(given, _NO_TRACE)
                    self._hidden_sizes.add(tuple(given.shape))
                    if trace.output_of in self._input_norms:
                        self._found_norms.add(str(trace.output_of))
                    self._traces[given] = Trace(trace.sizes or tuple(given.shape), was_in_block=True)
        trace = self._traces.get(hidden, _NO_TRACE)
        is_whole = trace.output_of is not None and not trace.is_rearranged and tuple(hidden.shape) in self._hidden_sizes
        # Norms over batches in branches of convolutions do not count.
        kind = type(self._model.get_submodule(trace.output_of or "")).__name__.lower()
        if id(module) in self._inner_modules and is_whole and "batchnorm" not in kind:
            self._found_norms.add(str(trace.output_of))

    def _after_call(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if not name or isinstance(module, PreTrainedModel):
            parts = list(output.items()) if isinstance(output, Mapping) else []
            for _, value in parts:  # the loop extends the list
                parts += value.items() if isinstance(value, Mapping) else ()
            # The last hidden states in the output of a model: the tensors with such a name, or else the first tensor.
            states = [tensor for key, value in parts if key.endswith(_LAST) for tensor in floats_of(value)]
            ends = [self._traces.get(tensor, _NO_TRACE) for tensor in states or [*floats_of(output)][:1]]
            self._found_norms |= {last.output_of for last in ends if last.output_of is not None}
            # A head may normalise the hidden state, or its mean, behind all blocks (VideoMAE, PoolFormer).
            read = {norm for last in ends if not states for norm in last.norms & self._input_norms}
            self._found_norms |= {norm for norm in read if not norm.startswith(self._block_prefixes)}
        if isinstance(module, nn.Embedding):
            for rows in floats_of(output):
                self._traces[rows] = Trace(tuple(rows.shape))
        found = next(floats_of(output), None)
        if id(module) in self._norms and found is not None:
            taken = self._traces.get(args[0], _NO_TRACE) if args else _NO_TRACE
            if taken.sizes and name not in self._input_norms and not taken.was_in_block:
                self._traces[found] = Trace(taken.sizes)  # the norm of embeddings
            else:
                self._norm_calls.append(name)
                sizes = taken.sizes if name in self._input_norms else ()
                self._traces[found] = Trace(sizes, taken.norms | {name}, name, was_in_block=True)
        if id(module) in self._blocks | self._children:
            self._running.pop()
        ended = None if found is None else self._traces.get(found, _NO_TRACE).output_of
        if id(module) in self._blocks and ended is not None:
            self._found_norms.add(ended)  # the block returns the hidden state that goes on

    # ---- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = list(floats_of((args, kwargs)))
        traced = [(tensor, trace) for tensor in inputs if (trace := self._traces.get(tensor)) is not None]
        if traced:
            name = func.overloadpacket.__name__
            if name == "convolution" and args[8] > 1 and args[8] == args[0].shape[1]:
                name = "view"  # a convolution of each channel by itself moves positions, not features
            trace = self._trace_after(name, inputs, traced)
            for made in floats_of(output):
                self._traces[made] = trace
        return output

    def _trace_after(self, operation: str, inputs: list[Tensor], traced: list[tuple[Tensor, Trace]]) -> Trace:
        norms = frozenset().union(*(trace.norms for _, trace in traced))
        hidden = next((trace for _, trace in traced if trace.sizes), None)
        if operation in _SUMS and len(inputs) > 1:
            ends = {trace.output_of for _, trace in traced} - {None}
            of_block = bool(self._running) and self._running[-1] and len(traced) > 1 and bool(norms & self._input_norms)
            if hidden is not None or len(ends) > 1 or of_block:
                # The sum of the outputs of two norms, of a branch and of its bypass, begins another hidden state. So
                # does a sum of the outputs of a block's parts that the block itself makes (Hiera).
                was_in_block = hidden is None or any(trace.was_in_block for _, trace in traced if trace.sizes)
                for _, trace in traced if was_in_block else ():  # the norms that the other terms of the sum came from
                    if trace.output_of is not None:
                        self._found_norms.add(trace.output_of)
                    if not trace.sizes:
                        self._found_norms |= trace.norms & self._input_norms
                sizes = tuple(traced[0][0].shape) if hidden is None else hidden.sizes
                return Trace(sizes, was_in_block=was_in_block)
            if ends and len(traced) > 1:
                # So does the sum of one norm's output and a branch if it is normalised, which shows later (MobileBERT).
                return Trace(tuple(traced[0][0].shape), norms, was_in_block=True, summed_norm=ends.pop())
        if operation in _MIXINGS and hidden is not None and hidden.output_of is None and len(traced) > 1:
            return hidden  # streams that are mixed by computed weights
        if operation.startswith("_scaled_dot_product") and len(inputs) > 2:
            streams = self._traces.get(inputs[2], _NO_TRACE)
            if streams.sizes and inputs[2].dim() > len(streams.sizes):
                return Trace(streams.sizes, was_in_block=True)  # attention mixes streams side by side, after a norm
        largest = max(inputs, key=Tensor.numel)
        scaled = operation in _SCALINGS and all(t is largest or t.numel() < largest.numel() for t in inputs)
        if operation in REARRANGING or scaled:
            first = self._traces.get(largest, _NO_TRACE) if scaled else traced[0][1]
            first = first if scaled else hidden or first
            return replace(first, norms=norms, is_rearranged=True)
        return Trace(norms=norms)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that pass a hidden state on: those in the outermost lists, and those with a norm in inner lists."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}
    found: list[nn.Module] = []
    for name, modules in lists.items():
        outer = [other for other in lists if name.startswith(f"{other}.")]
        # Lists of lists are never called themselves.
        around = [part for other in outer for part in (lists[other], *lists[other].children())]
        is_outermost = all(isinstance(part, nn.ModuleList) for part in around)
        for module in modules:
            # Quantised weights may be buffers.
            tensors = (*module.parameters(), *module.buffers())
            has_weights = sum(t.dim() > 1 and t.dtype != torch.bool for t in tensors) > 1
            has_norm = any(is_norm(m) for m in module.modules() if m is not module)
            if not isinstance(module, nn.ModuleList) and has_weights and (has_norm or is_outermost):
                found.append(module)
    return found
