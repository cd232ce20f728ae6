"""What flows through a model: which of its norms read or write the hidden state that its blocks pass on.

One small forward pass is watched operation by operation. What a block takes is the hidden state; so is what is made of
it by adding to it, and by rearranging, cutting or scaling. A norm that takes the hidden state, and whose output goes on
as the hidden state (post-LN) or comes back to it in a sum (pre-LN), normalises it; so does one whose output is added to
it as it is (Gemma 2, the last BatchNorm of a residual branch). Norms of queries and keys, of gates, of states of a
mixer and of patches do neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from .model import tensors_of

# Operations whose result holds the entries of what they are given, elsewhere or fewer of them.
_REARRANGING = {
    "_to_copy", "_unsafe_view", "alias", "as_strided", "bernoulli", "cat", "chunk", "clone", "constant_pad_nd", "copy_",
    "detach", "expand", "flatten", "flip", "gather", "im2col", "index", "index_select", "lift_fresh", "masked_fill",
    "masked_fill_", "masked_scatter", "mean", "native_dropout", "permute", "repeat", "reshape", "roll", "select",
    "slice", "split", "split_with_sizes", "squeeze", "squeeze_", "stack", "sum", "t", "transpose", "unbind", "unfold",
    "unsqueeze", "view", "where", "avg_pool2d", "adaptive_avg_pool2d",
}  # fmt: skip
_SUMS = {"add", "add_", "sub"}
_SCALINGS = {"mul", "mul_", "div", "div_"}
_LAST = ("last_hidden_state", "pooler_output")
_MIXINGS = {"bmm", "mm", "baddbmm"}


@dataclass(frozen=True)
class Trace:
    """What is known of a tensor.

    Attributes:
        sizes: The sizes of the hidden state that it is or is made of by rearranging; empty where it is not.
        norms: Names of norms that it was computed from since the last sum with the hidden state.
        output_of: The norm whose output it is, rearranged or scaled at most.
        is_rearranged: Whether it is that output no more as it was.
        is_begun: Whether it has been in a block; embeddings have not.
        begun_by: The norm whose output was added to, where that is taken for a hidden state of its own.
    """

    sizes: tuple[int, ...] = ()
    norms: frozenset[str] = frozenset()
    output_of: str | None = None
    is_rearranged: bool = False
    is_begun: bool = False
    begun_by: str | None = None


_NOTHING = Trace()


class Flow(TorchDispatchMode):
    """Watches a forward pass; afterwards `sites` are the norms of the hidden state, in the order of their calls.

    Args:
        model: A bare model.

    Attributes:
        called: Every norm that was called.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._traces = WeakTensorKeyDictionary()
        self._reads: set[str] = set()
        self._kept: set[str] = set()
        self._hidden: set[tuple[int, ...]] = set()  # shapes of what blocks take
        self.called: list[str] = []
        # Of the blocks and their parts that run at present, from the outermost: whether it is a block.
        self._running: list[bool] = []
        # Some models call what is in their blocks without calling these.
        self._blocks = blocks_of(model)
        inside = {id(block) for block in self._blocks}
        self._within = tuple(f"{name}." for name, m in model.named_modules() if id(m) in inside)

    @property
    def sites(self) -> list[str]:
        """The norms of the hidden state, in the order of their first calls."""
        return [name for name in dict.fromkeys(self.called) if name in self._kept]

    def run(self, call: Any) -> Flow:
        """Watch one forward pass.

        Args:
            call: Makes it, and returns what the model gives.
        """
        with ExitStack() as hooks:
            for name, module in self._model.named_modules():
                if isinstance(module, PreTrainedModel):
                    hooks.callback(module.register_forward_hook(self._leave_model).remove)
                if isinstance(module, nn.Embedding):
                    hooks.callback(module.register_forward_hook(self._leave_embedding).remove)
                if is_norm(module):
                    before = module.register_forward_pre_hook(partial(self._enter_norm, name), with_kwargs=True)
                    after = module.register_forward_hook(partial(self._leave_norm, name))
                    hooks.callback(before.remove)
                    hooks.callback(after.remove)
            for block in self._blocks:
                hooks.callback(block.register_forward_pre_hook(self._enter_block, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(self._leave_block).remove)
                for part in block.children():
                    if not any(part is other for other in self._blocks):
                        hooks.callback(part.register_forward_pre_hook(lambda *_: self._running.append(False)).remove)
                        hooks.callback(part.register_forward_hook(lambda *_: self._leave()).remove)
            for part in self._parts():
                hooks.callback(part.register_forward_pre_hook(self._enter_part, with_kwargs=True).remove)
            with self:
                output = call()
        self._leave_model(self._model, (), output)
        return self

    def _of(self, tensor: Tensor) -> Trace:
        return self._traces.get(tensor, _NOTHING)

    # ---- modules -----------------------------------------------------------------------------------------------------

    def _leave_embedding(self, table: nn.Module, args: tuple, output: Any) -> None:
        for table_rows in tree_leaves(output):
            if isinstance(table_rows, Tensor):
                self._traces[table_rows] = Trace(tuple(table_rows.shape))

    def _enter_block(self, block: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._running.append(True)
        hidden = _first(args, kwargs)
        for given in tree_leaves((args, kwargs)):
            # Reversible blocks take two.
            if hidden is not None and isinstance(given, Tensor) and given.shape == hidden.shape:
                known = self._of(given)
                self._hidden.add(tuple(given.shape))
                if known.output_of in self._reads:
                    self._kept.add(str(known.output_of))
                self._traces[given] = Trace(known.sizes or tuple(given.shape), is_begun=True)

    def _parts(self) -> Iterator[nn.Module]:
        """What has several parts with weights inside the blocks, and is itself neither a block nor a norm.

        A norm whose output such a part takes as it is, with the shape of a hidden state, normalises that of a branch
        without a sum in between (Zamba's shared block). Norms over batches in branches of convolutions do not count.
        """
        skipped = {id(module) for module in self._blocks}
        for name, module in self._model.named_modules():
            # What adapters hang on or around a layer are not parts of it.
            is_layer = isinstance(module, nn.Linear) or hasattr(module, "base_layer")
            inside = [m for m in module.children() if next(m.parameters(), None) is not None]
            is_part = len(inside) > 1 and not is_layer and not is_norm(module) and id(module) not in skipped
            if is_part and name.startswith(self._within):
                yield module

    def _enter_part(self, part: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        hidden = _first(args, kwargs)
        known = _NOTHING if hidden is None else self._of(hidden)
        if hidden is None or known.output_of is None or known.is_rearranged or tuple(hidden.shape) not in self._hidden:
            return
        if "batchnorm" not in type(self._model.get_submodule(known.output_of)).__name__.lower():
            self._kept.add(known.output_of)

    def _leave(self) -> None:
        self._running.pop()

    def _leave_block(self, block: nn.Module, args: tuple, output: Any) -> None:
        self._leave()
        hidden = _first((output,), {})
        ended = None if hidden is None else self._of(hidden).output_of
        if ended is not None:
            self._kept.add(ended)  # it gives the hidden state that goes on

    def _enter_norm(self, name: str, norm: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        hidden = _first(args, kwargs)
        if hidden is None or not hidden.numel():  # of sounds, where there are none (Higgs Audio)
            return
        known = self._of(hidden)
        is_direct = known.output_of is None or not known.is_rearranged
        if not is_direct or not (known.is_begun or name.startswith(self._within)):
            return
        sizes = known.sizes
        features = {p.numel() for p in norm.parameters(recurse=False)} or {hidden.shape[-1]}
        if sizes and features & set(sizes):
            self._reads.add(name)
            if known.output_of is not None:
                self._kept.add(known.output_of)  # one of a hidden state, normalised twice
            if known.begun_by is not None:
                self._kept.add(known.begun_by)

    def _leave_norm(self, name: str, norm: nn.Module, args: tuple, output: Any) -> None:
        found = next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None)
        if found is None:
            return
        taken = self._of(args[0]) if args else _NOTHING
        if taken.sizes and name not in self._reads and not taken.is_begun:
            self._traces[found] = Trace(taken.sizes)  # of embeddings
            return
        self.called.append(name)
        sizes = taken.sizes if name in self._reads else ()
        self._traces[found] = Trace(sizes, taken.norms | {name}, name, is_begun=True)

    def _leave_model(self, model: nn.Module, args: tuple, output: Any) -> None:
        for tensor in _last_states(output):
            if (last := self._of(tensor).output_of) is not None:
                self._kept.add(last)

    # ---- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
        known = [(tensor, trace) for tensor in given if (trace := self._traces.get(tensor)) is not None]
        if known:
            name = func.overloadpacket.__name__
            if name == "convolution" and args[8] > 1 and args[8] == args[0].shape[1]:
                name = "view"  # a convolution of each channel by itself moves positions and no features
            trace = self._after(name, given, known)
            for made in tree_leaves(output):
                if isinstance(made, Tensor) and made.is_floating_point():
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
            streams = self._of(given[2])
            if streams.sizes and given[2].dim() > len(streams.sizes):
                return Trace(streams.sizes, is_begun=True)  # so are streams that lie side by side, once normalised
        largest = max(given, key=Tensor.numel)
        scaled = operation in _SCALINGS and all(t is largest or t.numel() < largest.numel() for t in given)
        if operation in _REARRANGING or scaled:
            first = self._of(largest) if scaled else known[0][1]
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


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: it is called so, and has no parameters but vectors."""
    if "norm" not in type(module).__name__.lower():
        return False
    # Adapters may hang below a norm, parts of a model may not.
    own = [p for m in module.modules() if not hasattr(m, "adapters") for p in m.parameters(recurse=False)]
    return all(p.dim() <= 1 for p in own) and not any(isinstance(m, nn.Linear) for m in module.modules())


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that pass a hidden state on: those in the outermost lists, and those with a norm in lists inside."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}
    found: list[nn.Module] = []
    for name, modules in lists.items():
        outer = [other for other in lists if name.startswith(f"{other}.")]
        # Lists of lists are never called themselves.
        is_outermost = all(isinstance(lists[other], nn.ModuleList) and _holds_lists(lists[other]) for other in outer)
        found += [m for m in modules if not isinstance(m, nn.ModuleList) and _passes_on(m, needs_norm=not is_outermost)]
    return found


def _holds_lists(modules: nn.Module) -> bool:
    return all(isinstance(m, nn.ModuleList) for m in modules.children())


def _passes_on(module: nn.Module, needs_norm: bool) -> bool:
    # Quantised weights may be buffers.
    weights = sum(t.dim() > 1 and t.dtype != torch.bool for t in (*module.parameters(), *module.buffers()))
    has_norm = any(is_norm(m) for m in module.modules() if m is not module)
    return weights > 1 and (has_norm or not needs_norm)


def _last_states(output: Any, needed: bool = True) -> Iterator[Tensor]:
    """The last hidden states among what a model returns: those called so, or else the first tensor."""
    named = dict(output) if isinstance(output, Mapping) else {}
    found = [tensor for key, value in named.items() if key.endswith(_LAST) for tensor in tensors_of(value)]
    for value in named.values():
        found += _last_states(value, False) if isinstance(value, Mapping) else ()
    yield from found or (tensors_of(output)[:1] if needed else ())


def _first(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden state among what a module is given."""
    return next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()), None)
