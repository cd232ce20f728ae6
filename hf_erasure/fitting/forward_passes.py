"""Run many batches through a model side by side, all stopping at the same module.

Every batch has its own forward pass, in its own greenlet: a call that can be left in the middle and continued later, in
the same thread. A hook stops the batch at each site; once all batches wait, the caller decides which activations go on,
and lets the batches run to the next stop. So a decision at one depth can use all batches, no module runs twice, and
nothing needs to be known about the architecture: what a block passes to the next one stays in the frames of its forward
pass.

Together, the tensors in these frames may be larger than memory. So only a limited number of batches keep them there.
The bytes of the others' tensors are on disk, and their storages are empty, until their batch goes on. A model may keep
a tensor of one pass and use it in another, such as a table of positions: it gets its bytes back before it is used.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.overrides as function_modes
import torch.utils._python_dispatch as dispatch_modes
from greenlet import greenlet
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from hf_erasure.models.layout import Visit
from hf_erasure.models.model import TextTooLong

from .labels import BatchesOnDisk, BatchLabels

# How many batches keep their tensors in memory by default.
RESIDENT = 256
# In bytes. Smaller storages stay in memory: to write and read them takes longer than their room is worth.
_SMALLEST = 4096
# Gives free memory back to the system. The allocator of glibc does not put a tensor into the gap that one of the same
# size has left, because of alignment.
_TRIM_MEMORY = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
# The largest share of time for this. It takes longer the more batches wait.
_SHARE_FOR_TRIMS = 0.05
# The devices whose autocast a model may switch in a part of its forward pass.
_AUTOCAST_DEVICES = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
# What returns, leaves and enters the modes of operations and of functions.
_MODES: tuple[tuple[Callable[..., Any], ...], ...] = (
    (dispatch_modes._get_current_dispatch_mode_stack, dispatch_modes._pop_mode, dispatch_modes._push_mode),
    (function_modes._get_current_function_mode_stack, function_modes._pop_mode, function_modes._push_mode),
)
# The parts of a sparse tensor.
_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}


class OutOfStep(Exception):
    """A site is called again, or different batches reach it in different orders."""


class ForwardPass:
    """The forward pass of one batch, with stops at the sites."""

    next_trim: ClassVar[float] = 0.0  # When free memory is given back again, in seconds of the clock.

    def __init__(self, index: int, run: Callable[[], None], tensors: TensorsOnDisk | None) -> None:
        self.index = index  # The position of the batch.
        self.visit: Visit | None = None  # Where it waits; None before the start and after the end.
        self.hidden: Tensor | None = None  # The activation there.
        self.visited: list[Visit] = []  # Where it has stopped so far.
        self._inference = torch.is_inference_mode_enabled()  # The caller's mode.
        self._tensors = tensors
        self.greenlet = greenlet(run)
        self.greenlet.gr_context = contextvars.copy_context()

    def advance(self) -> None:
        """Let the batch run to its next stop, or to the end; errors name the batch, and the site before them."""
        try:
            if self._tensors is not None:
                self._tensors.make_room_for(self.index)
            if _TRIM_MEMORY is not None and (began := time.perf_counter()) >= ForwardPass.next_trim:
                _TRIM_MEMORY(0)
                ForwardPass.next_trim = began + (time.perf_counter() - began) / _SHARE_FOR_TRIMS
            with self._tensors or nullcontext():
                _with_modes_kept(self.greenlet.switch)
            if self.greenlet.dead and self._tensors is not None:
                self._tensors.forget(self.index)
        except OutOfStep:
            raise
        except TextTooLong as error:
            raise TextTooLong(f"Batch {self.index}: {error}") from error
        except Exception as error:
            place = f"after {self.visited[-1]!r}" if self.visited else "before the first site"
            raise RuntimeError(f"Batch {self.index} failed {place}: {type(error).__name__}: {error}") from error

    def stop(self, visit: Visit, hidden: Tensor) -> None:
        """Offer the activation to the caller, and wait until it lets the batch go on; called within the pass."""
        self.visited.append(visit)
        # An operation, so that an activation that the model has kept from another pass gets its bytes back.
        self.visit, self.hidden = visit, hidden.detach()
        del hidden
        is_other = torch.is_inference_mode_enabled() != self._inference
        with torch.inference_mode(self._inference) if is_other else nullcontext():
            _with_modes_kept(self.greenlet.parent.switch)
        self.visit, self.hidden = None, None


@contextmanager
def forward_passes(
    run: Callable[[Any], Any], batches: Sequence[BatchLabels], resident: int | None = None
) -> Iterator[list[ForwardPass]]:
    """A forward pass for each batch, in the modes of the caller; all have ended when the block is left in any way.

    At most `resident` batches, the running one included, keep their tensors in memory; `RESIDENT` batches when None.
    """
    is_limited = resident is not None or len(batches) > RESIDENT
    tensors = TensorsOnDisk(resident or RESIDENT) if is_limited else None

    def run_batch(index: int) -> None:
        batch = batches[index].batch
        if tensors is not None and isinstance(batches, BatchesOnDisk):
            tensors.note(_storages_in(batch))  # nothing else needs these inputs, so they are written too
        run(batch)

    passes = [ForwardPass(index, functools.partial(run_batch, index), tensors) for index in range(len(batches))]
    with nullcontext() if tensors is None else closing(tensors):
        try:
            # Compiled code cannot be left in the middle.
            with torch.compiler.set_stance("force_eager"):
                yield passes
        finally:
            for each in passes:
                while each.greenlet:  # it has begun and not ended; a model may catch this, and go on to a stop
                    # The caller is not told of errors that the model raises because of this.
                    with suppress(Exception), tensors or nullcontext():
                        _with_modes_kept(each.greenlet.throw)


def _with_modes_kept(switch: Callable[[], Any]) -> None:
    """Switch to another greenlet; afterwards the modes of torch that a part of a model may change are as before."""
    grad, forward_grad = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
    stacks = [entered() for entered, *_ in _MODES]
    casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _AUTOCAST_DEVICES]
    try:
        switch()
    finally:
        torch.set_grad_enabled(grad)
        torch._C._set_fwd_grad_enabled(forward_grad)
        for (entered, pop, push), stack in zip(_MODES, stacks, strict=True):
            if (current := entered()) != stack:
                for _ in current:
                    pop()
                for mode in stack:
                    push(mode)
        for kind, is_on, dtype in casts:
            torch.set_autocast_enabled(kind, is_on)
            torch.set_autocast_dtype(kind, dtype)


# ---- the tensors of batches that wait --------------------------------------------------------------------------------


class TensorsOnDisk(dispatch_modes.TorchDispatchMode):
    """Keeps the tensors of some passes in memory, and those of others on disk while they wait.

    While a pass runs, it notes the storages that operations make, and fills those that they need.
    """

    def __init__(self, resident: int) -> None:
        super().__init__()
        self._resident = resident
        self._folder = tempfile.TemporaryDirectory(prefix="hf-erasure-")
        self._in_memory: list[int] = []  # Passes, the one that ran longest ago first; the last one is running.
        # Pass → the storages that were made in it, by their addresses, which the references reserve.
        self._made: dict[int, dict[int, StorageWeakRef]] = {}
        # Address of an empty storage → the file of its bytes, their position there and their number.
        self._written: dict[int, tuple[Path, int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = set()
        for storage in _storages_in((args, kwargs)):
            given.add(storage._cdata)
            if storage._cdata in self._written:  # the model has kept it from another pass
                if func is torch.ops.aten.set_.source_Storage:  # Python has asked the storage for its size
                    raise NotImplementedError(
                        "The model copies a tensor that it keeps from another batch with copy.deepcopy, which cannot "
                        "read it from disk: let it use clone(), or hold all batches in memory, resident_batches=their "
                        "number."
                    )
                self._fill(storage)
                for made in self._made.values():
                    made.pop(storage._cdata, None)
        result = func(*args, **(kwargs or {}))
        self.note(storage for storage in _storages_in(result) if storage._cdata not in given)
        return result

    def note(self, storages: Iterator[torch.UntypedStorage]) -> None:
        """Let these storages be written with the tensors of the running pass."""
        made = self._made[self._in_memory[-1]] if self._in_memory else {}  # a pass that is ended may run operations
        for storage in storages:
            if storage._cdata not in made:
                made[storage._cdata] = StorageWeakRef(storage)

    def make_room_for(self, index: int) -> None:
        """Write passes to disk until there is room for one, and read what is written of this one."""
        if index in self._in_memory:
            self._in_memory.remove(index)
        while len(self._in_memory) >= self._resident:
            # The one that ran longest ago: batches run in turn forwards and backwards, so it is needed again last.
            self._write(self._in_memory.pop(0))
        self._in_memory.append(index)
        self._made[index] = dict(self._read(index))

    def forget(self, index: int) -> None:
        """A pass has ended: what is still alive of it, the model keeps."""
        self._in_memory.remove(index)
        del self._made[index]

    def close(self) -> None:
        """Fill what is still alive, and delete the files."""
        for index in self._made:
            list(self._read(index))
        self._folder.cleanup()

    def _write(self, index: int) -> None:
        path, written = Path(self._folder.name, str(index)), []
        with path.open("wb") as file:
            for reference in self._made[index].values():
                storage = _live(reference)
                if storage is not None and storage.nbytes() >= _SMALLEST and storage.resizable():
                    written.append((storage, (path, file.tell(), storage.nbytes())))
                    # A copy, since the storage of an array of numpy cannot be emptied.
                    file.write(_bytes_of(storage).to("cpu", copy=True).numpy().data)
        for storage, place in written:  # the disk had room for all of them
            self._written[storage._cdata] = place
            storage.resize_(0)

    def _read(self, index: int) -> Iterator[tuple[int, StorageWeakRef]]:
        """Fill the storages of a pass that are alive, and yield them."""
        for address, reference in self._made.get(index, {}).items():
            storage = _live(reference)
            if storage is None:
                self._written.pop(address, None)
            else:
                if address in self._written:
                    self._fill(storage)
                yield address, reference

    def _fill(self, storage: torch.UntypedStorage) -> None:
        path, position, size = self._written[storage._cdata]
        storage.resize_(size)
        content = np.fromfile(path, np.uint8, size, offset=position)
        _bytes_of(storage).copy_(torch.from_numpy(content))
        del self._written[storage._cdata]


def _storages_in(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of the tensors in an operation's arguments or results."""
    for leaf in tree_leaves(tree):
        if dispatch_modes.is_traceable_wrapper_subclass(leaf):  # such as packed weights
            yield from _storages_in([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        elif isinstance(leaf, Tensor) and leaf.layout in _PARTS:
            yield from _storages_in([getattr(leaf, name)() for name in _PARTS[leaf.layout]])
        elif isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_meta:
            # The storage of a subclass with its own dispatch may be without bytes, as one on the meta device.
            yield from [leaf.untyped_storage()] if type(leaf).__torch_dispatch__ is Tensor.__torch_dispatch__ else []
        elif isinstance(leaf, torch.UntypedStorage):
            yield leaf


def _live(reference: StorageWeakRef) -> torch.UntypedStorage | None:
    """The storage of a reference, if a tensor still uses it."""
    return torch.UntypedStorage._new_with_weak_ptr(reference.cdata)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A view of a storage's bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
