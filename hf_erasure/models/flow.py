"""What flows through a model: which of its norms read or write the hidden state that its blocks pass on.

One small forward pass is watched operation by operation. What a block takes is the hidden state; so is what is made of
it by adding to it, and by rearranging, cutting or scaling. A norm that takes the hidden state, and whose output goes on
as the hidden state (post-LN) or comes back to it in a sum (pre-LN), normalises it; so does one whose output is added to
it as it is (Gemma 2, the last BatchNorm of a residual branch). Norms of queries and keys, of gates, of states of a
mixer and of patches do neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from .graph import REARRANGING
from .model import floats_of, is_norm, tensors_of

_SUMS = {"add", "add_", "sub"}
_SCALINGS = {"mul", "mul_", "div", "div_"}
_LAST = ("last_hidden_state", "pooler_output")
_MIXINGS = {"bmm", "mm", "baddbmm"}


@dataclass(frozen=True)
class Trace:
    """What is known of a tensor."""

    # The sizes of the hidden state that it is or is made of by rearranging; empty where it is not.
    sizes: tuple[int, ...] = ()
    # Names of norms that it was computed from since the last sum with the hidden state.
    norms: frozenset[str] = frozenset()
    output_of: str | None = None  # The norm whose output it is, rearranged or scaled at most.
    is_rearranged: bool = False  # Whether it is that output no more as it was.
    is_begun: bool = False  # Whether it has been in a block; embeddings have not.
    # The norm whose output was added to, where that is taken for a hidden state of its own.
    begun_by: str | None = None


_NOTHING = Trace()


class Flow(TorchDispatchMode):
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
        self._reads: set[str] = set()
        self._kept: set[str] = set()
        self._hidden: set[tuple[int, ...]] = set()  # shapes of what blocks take
        self._called: list[str] = []
        # Of the blocks and their parts that run at present, from the outermost: whether it is a block.
        self._running: list[bool] = []
        # Some models call what is in their blocks without calling these.
        blocks = blocks_of(model)
        self._blocks = {id(block) for block in blocks}
        self._children = {id(part) for block in blocks for part in block.children()} - self._blocks
        self._norms = {id(module) for module in model.modules() if is_norm(module)}
        self._within = tuple(f"{name}." for name, m in model.named_modules() if id(m) in self._blocks)
        # Modules inside a block that have several parts with weights. A norm whose output such a one takes as it is,
        # with the shape of a hidden state, normalises that of a branch without a sum in between (Zamba's shared block).
        # What adapters hang on or around a layer are not parts of it.
        self._parts = {
            id(m)
            for name, m in model.named_modules()
            if name.startswith(self._within) and id(m) not in self._blocks | self._norms
            if not isinstance(m, nn.Linear) and not hasattr(m, "base_layer")
            if sum(any(True for _ in part.parameters()) for part in m.children()) > 1
        }
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
            with self:
                call()
        self.sites = [name for name in dict.fromkeys(self._called) if name in self._kept]

    # ---- modules -----------------------------------------------------------------------------------------------------

    def _enter(self, name: str, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        if id(module) in self._blocks | self._children:
            self._running.append(id(module) in self._blocks)
        hidden = next(floats_of((args, kwargs)), None)
        if hidden is None:
            return
        known = self._traces.get(hidden, _NOTHING)
        is_direct = known.output_of is None or not known.is_rearranged
        is_inside = known.is_begun or name.startswith(self._within)
        # Of sounds, where there are none, it is empty (Higgs Audio).
        if id(module) in self._norms and hidden.numel() and is_direct and is_inside:
            features = {p.numel() for p in module.parameters(recurse=False)} or {hidden.shape[-1]}
            if features & set(known.sizes):
                self._reads.add(name)
                # One of a hidden state that is normalised twice, or the one whose sum with a branch is.
                self._kept |= {norm for norm in (known.output_of, known.begun_by) if norm is not None}
        if id(module) in self._blocks:
            for given in floats_of((args, kwargs)):  # reversible blocks take two
                if given.shape == hidden.shape:
                    known = self._traces.get(given, _NOTHING)
                    self._hidden.add(tuple(given.shape))
                    if known.output_of in self._reads:
                        self._kept.add(str(known.output_of))
                    self._traces[given] = Trace(known.sizes or tuple(given.shape), is_begun=True)
        known = self._traces.get(hidden, _NOTHING)
        is_whole = known.output_of is not None and not known.is_rearranged and tuple(hidden.shape) in self._hidden
        # Norms over batches in branches of convolutions do not count.
        kind = type(self._model.get_submodule(known.output_of or "")).__name__.lower()
        if id(module) in self._parts and is_whole and "batchnorm" not in kind:
            self._kept.add(str(known.output_of))

    def _leave(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if not name or isinstance(module, PreTrainedModel):
            parts = list(output.items()) if isinstance(output, Mapping) else []
            for _, value in parts:  # which grows meanwhile
                parts += value.items() if isinstance(value, Mapping) else ()
            # The last hidden states among what a model returns: those called so, or else the first tensor.
            states = [tensor for key, value in parts if key.endswith(_LAST) for tensor in tensors_of(value)]
            ends = [self._traces.get(tensor, _NOTHING).output_of for tensor in states or tensors_of(output)[:1]]
            self._kept |= {last for last in ends if last is not None}
        if isinstance(module, nn.Embedding):
            for rows in floats_of(output):
                self._traces[rows] = Trace(tuple(rows.shape))
        found = next(floats_of(output), None)
        if id(module) in self._norms and found is not None:
            taken = self._traces.get(args[0], _NOTHING) if args else _NOTHING
            if taken.sizes and name not in self._reads and not taken.is_begun:
                self._traces[found] = Trace(taken.sizes)  # of embeddings
            else:
                self._called.append(name)
                sizes = taken.sizes if name in self._reads else ()
                self._traces[found] = Trace(sizes, taken.norms | {name}, name, is_begun=True)
        if id(module) in self._blocks | self._children:
            self._running.pop()
        ended = None if found is None else self._traces.get(found, _NOTHING).output_of
        if id(module) in self._blocks and ended is not None:
            self._kept.add(ended)  # it gives the hidden state that goes on

    # ---- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = list(floats_of((args, kwargs)))
        known = [(tensor, trace) for tensor in given if (trace := self._traces.get(tensor)) is not None]
        if known:
            name = func.overloadpacket.__name__
            if name == "convolution" and args[8] > 1 and args[8] == args[0].shape[1]:
                name = "view"  # a convolution of each channel by itself moves positions and no features
            trace = self._after(name, given, known)
            for made in floats_of(output):
                self._traces[made] = trace
        return output

    def _after(self, operation: str, given: list[Tensor], known: list[tuple[Tensor, Trace]]) -> Trace:
        norms = frozenset().union(*(trace.norms for _, trace in known))
        hidden = next((trace for _, trace in known if trace.sizes), None)
        if operation in _SUMS and len(given) > 1:
            ends = {trace.output_of for _, trace in known} - {None}
            of_block = bool(self._running) and self._running[-1] and len(known) > 1 and bool(norms & self._reads)
            if hidden is not None or len(ends) > 1 or of_block:
                # Two norms that are added begin another hidden state: a branch, and what it goes around by. So does
                # what a block itself adds of what its parts gave (Hiera).
                return self._summed(known, hidden or Trace(tuple(known[0][0].shape), is_begun=True))
            if ends and len(known) > 1:
                # So does one whose sum with a branch is normalised, which shows later (MobileBERT).
                return Trace(tuple(known[0][0].shape), norms, is_begun=True, begun_by=ends.pop())
        if operation in _MIXINGS and hidden is not None and hidden.output_of is None and len(known) > 1:
            return hidden  # streams that are mixed by weights that were computed
        if operation.startswith("_scaled_dot_product") and len(given) > 2:
            streams = self._traces.get(given[2], _NOTHING)
            if streams.sizes and given[2].dim() > len(streams.sizes):
                return Trace(streams.sizes, is_begun=True)  # so are streams that lie side by side, once normalised
        largest = max(given, key=Tensor.numel)
        scaled = operation in _SCALINGS and all(t is largest or t.numel() < largest.numel() for t in given)
        if operation in REARRANGING or scaled:
            first = self._traces.get(largest, _NOTHING) if scaled else known[0][1]
            first = first if scaled else hidden or first
            return replace(first, norms=norms, is_rearranged=True)
        return Trace(norms=norms)

    def _summed(self, known: list[tuple[Tensor, Trace]], hidden: Trace) -> Trace:
        """The hidden state after a sum: what came back to it was computed from norms, of which some are its own."""
        is_begun = any(trace.is_begun for _, trace in known if trace.sizes) or hidden.is_begun
        for _, trace in known if is_begun else ():
            if trace.output_of is not None:
                self._kept.add(trace.output_of)
            if not trace.sizes:
                self._kept |= trace.norms & self._reads
        return Trace(hidden.sizes, is_begun=is_begun)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that pass a hidden state on: those in the outermost lists, and those with a norm in lists inside."""
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
