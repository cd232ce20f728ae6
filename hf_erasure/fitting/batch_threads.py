"""Run many batches through a model side by side, all stopping at the same module.

Every batch has its own forward pass, in its own thread, and only one thread runs at a time. A hook stops the batch at
each site; once all batches wait, the caller decides which activations go on, and lets the batches run to the next stop.
So a decision at one depth can use all batches, no module runs twice, and nothing needs to be known about the
architecture: what a block passes to the next one stays in the frames of its forward pass.

Only a limited number of batches keep their threads. The thread of any other batch ends while it waits, and the results
of its operations are written to disk: the bytes of tensors that are alive, and the shapes of others. When the batch is
due, the pass starts again in a new thread, where each operation returns the written result at once (an empty tensor if
it is no longer read), until the pass is where it was. So its Python code runs again, but nothing is computed twice. If
an operation is not the written one, or the model keeps tensors of a pass, passes are computed again instead.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import gc
import logging
import os
import pickle
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hf_erasure.models.model import TextTooLong

logger = logging.getLogger(__name__)

Modes = list[Callable[[], AbstractContextManager[Any]]]
# Makes a batch ready, and returns its forward pass.
Forward = Callable[[], Callable[[], Any]]

# How many batches keep their threads by default: a system has some ten thousand threads in all, and a waiting thread
# holds a stack in addition to its tensors.
MOST_THREADS = 256
# Integers and booleans decide which Python branch is taken. Up to this many, their values are written in any case.
_MAX_NUMEL = 1 << 13
# Bytes of an activation from which a pass gives memory back at each stop: giving it back takes some milliseconds.
_LARGE_BYTES = 1 << 20
# With smaller activations, memory is given back each time that this many threads have ended.
_ENDS_PER_TRIM = 16
# Operations that give a tensor another storage, or a storage another size.
_STORAGE_OPERATIONS = {"aten::set_", "aten::set_data", "aten::resize_", "aten::resize_as_"}


class OutOfStep(Exception):
    """A site is called again, or different batches reach it in different orders."""


class _Abandoned(BaseException):
    """Unwinds a forward pass that will not be continued in this thread."""


class _OperationsDiffer(BaseException):
    """Unwinds a forward pass whose operations are not the ones that are written."""


class BatchThread:
    """One batch that runs through the model, with stops at the sites."""

    def __init__(self, index: int, forward: Forward, modes: Modes, waiting: WaitingBatches | None) -> None:
        self.index = index  # The position of the batch.
        self.site: str | None = None  # Where it waits; None before the start and after the end.
        self.hidden: Tensor | None = None  # The activation there.
        self.visited: list[str] = []  # The sites where it has stopped so far.
        self._forward, self._modes, self._waiting = forward, modes, waiting
        self.past_stops: list[str] = []  # The sites where it stopped in ended threads: it does not wait there again.
        self._record = None if waiting is None else Record(waiting.folder / f"batch-{index}")
        self._finished = self._abandoned = self._is_large = False
        self._error: BaseException | None = None
        self._may_run, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                for mode in self._modes:
                    stack.enter_context(mode())
                forward = self._forward()
                try:
                    with self._record or nullcontext():
                        forward()
                except _OperationsDiffer:
                    self.visited.clear()
                    if self._waiting is not None and self._record is not None:
                        self._waiting.stop_replays("a forward pass does not take the same operations a second time")
                        self._record.forget()
                    forward()
            self._finished, self.site, self.hidden = True, None, None
        except _Abandoned:
            pass
        except BaseException as error:  # raised again in the thread that waits
            self._error = error
        finally:
            self._stopped.release()

    def advance(self) -> None:
        """Let the batch run to its next stop, or to the end; errors name the batch, and the site before them."""
        try:
            if self._waiting is not None:
                self._waiting.make_room_for(self)
            if self._thread is not None:
                self._may_run.release()
            else:
                self.visited.clear()
                self.site = None
                if self._waiting is not None and not self._waiting.replays:
                    self._record = None
                if self._record is not None and self.past_stops:
                    self._record.read()
                run, name = contextvars.copy_context().run, f"hf-erasure-batch-{self.index}"
                self._thread = threading.Thread(target=run, args=(self._run,), name=name, daemon=True)
                self._thread.start()
            self._stopped.acquire()
            if self._error is not None:
                raise self._error
            if self.hidden is not None:
                self._is_large = self.hidden.device.type == "cpu" and self.hidden.nbytes >= _LARGE_BYTES
            if self._finished and self._waiting is not None:
                self._waiting.threaded.remove(self)
                self._finish_thread()
            elif self._is_large:
                _trim_memory()
        except OutOfStep:
            raise
        except TextTooLong as error:
            raise TextTooLong(f"Batch {self.index}: {error}") from error
        except Exception as error:
            place = f"after {self.visited[-1]!r}" if self.visited else "before the first site"
            raise RuntimeError(f"Batch {self.index} failed {place}: {type(error).__name__}: {error}") from error

    def stop(self, site: str, hidden: Tensor) -> None:
        """Offer the activation to the caller, and wait until it lets the batch go on; called in the batch's thread."""
        self.visited.append(site)
        if site in self.past_stops:
            return
        self.site, self.hidden = site, hidden
        del hidden
        self._stopped.release()
        self._may_run.acquire()
        self.site, self.hidden = None, None
        if self._abandoned:
            raise _Abandoned

    def suspend(self) -> None:
        """Write the results of the pass, and end the thread; a new thread can go on from here."""
        site, self.past_stops = self.site, list(self.visited)
        if self._record is not None:
            self._record.write()
        self.abandon()
        self._stopped.acquire()
        self._finish_thread()
        self._thread, self._abandoned, self.site = None, False, site

    def _finish_thread(self) -> None:
        """Note that a thread has ended, and check whether the model keeps tensors of its pass."""
        if self._thread is not None:
            self._thread.join()
        if self._record is not None and self._waiting is not None and self._record.has_live_tensors():
            self._waiting.stop_replays("the model keeps tensors of a forward pass")
        if self._waiting is not None:
            self._waiting.ends += 1
            if self._is_large or self._waiting.ends % _ENDS_PER_TRIM == 0:
                _trim_memory()

    def abandon(self) -> None:
        """End the forward pass where it is, and its thread."""
        if self._thread is not None:
            self._abandoned = True
            self._may_run.release()
            self._thread.join()


def _trim_memory() -> None:
    """Give free memory back to the system.

    The allocator of glibc keeps an arena for every thread, and other threads cannot use what was freed there: a batch
    that waits would hold as much as its pass took at most, several times what it needs.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


@contextmanager
def batch_threads(forwards: Sequence[Forward], resident: int | None = None) -> Iterator[list[BatchThread]]:
    """One thread for each forward pass, in the modes of the caller; all threads end when the block is left in any way.

    At most `resident` batches, the running one included, keep their threads and tensors; `MOST_THREADS` batches when
    None.
    """
    # A new thread does not inherit these modes: inference and grad mode, default device, autocast.
    device, cached = torch.get_default_device(), torch.is_autocast_cache_enabled()
    modes: Modes = [
        functools.partial(torch.inference_mode, torch.is_inference_mode_enabled()),
        functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()),
    ]
    # A default device that is set costs a check at every call, so the usual one is not set.
    if device.type != "cpu":
        modes.append(functools.partial(torch.device, device))
    for kind in {"cpu", device.type, *(["cuda"] if torch.cuda.is_available() else [])}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            modes.append(functools.partial(torch.autocast, kind, dtype=dtype, cache_enabled=cached))
    is_bounded = resident is not None or len(forwards) > MOST_THREADS
    waiting = WaitingBatches(resident or MOST_THREADS) if is_bounded else None
    threads = [BatchThread(index, forward, modes, waiting) for index, forward in enumerate(forwards)]
    try:
        yield threads
    finally:
        for thread in threads:
            thread.abandon()
        if waiting is not None:
            shutil.rmtree(waiting.folder, ignore_errors=True)


class WaitingBatches:
    """Lets a number of batches, at least the running one, keep their threads, and ends the threads of others."""

    def __init__(self, resident: int) -> None:
        self._resident = resident
        self.folder = Path(tempfile.mkdtemp(prefix="hf-erasure-"))  # Holds the written results.
        self.threaded: list[BatchThread] = []  # The batches with a thread, the one that ran longest ago first.
        self.ends = 0  # How many threads have ended.
        self.replays = True  # Whether passes are built again from written results, or computed again.

    def make_room_for(self, thread: BatchThread) -> None:
        """End threads until there is room for one."""
        if thread in self.threaded:
            self.threaded.remove(thread)
        while len(self.threaded) >= self._resident:
            # The one that ran longest ago: batches run in turn forwards and backwards, so it is needed again last.
            self.threaded.pop(0).suspend()
        self.threaded.append(thread)

    def stop_replays(self, reason: str) -> None:
        """Compute passes again from now on, instead of reading their results."""
        if self.replays:
            logger.warning(
                "Batches that wait are run again from the beginning, since %s: that is slow; give more "
                "resident_batches, or fewer and larger batches.",
                reason,
            )
        self.replays = False


# ---- the results of operations ---------------------------------------------------------------------------------------


class Record(TorchDispatchMode):
    """The results of the operations of one pass: written when a thread ends, and returned again in the next thread.

    Storages that the recorded operations made have numbers. Other storages, such as those of weights and inputs, do
    not: operations that return views of them are run again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        # For each operation: what identifies it, its results (None: it is run again), and "list" or "tuple" if they are
        # in one. The entries hold only plain numbers, strings and bytes, which are pickled fast.
        self._entries: list[tuple[int, list[tuple[Any, ...]] | None, str]] = []
        self._kinds: list[tuple[torch.dtype, torch.device]] = []  # The dtypes and devices of the results.
        self._position = 0
        self._numbers: dict[int, int] = {}  # Address of a storage → its number.
        # These references reserve the address of a storage, and do not keep its bytes.
        self._storages: dict[int, StorageWeakRef] = {}
        self._count = 0
        self._unfilled: set[int] = set()  # The numbers of storages that were made again without their bytes.
        self._read: dict[int, np.ndarray] = {}  # Number of a storage → its bytes, until it is filled with them.
        self._is_usable = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._position == len(self._entries):
            result = func(*args, **kwargs)
            if self._is_usable and func._schema.name in _STORAGE_OPERATIONS:
                self.forget()
            if self._is_usable:
                self._record_operation(func, _argument_tensors(args, kwargs), result)
            return result
        inputs = _argument_tensors(args, kwargs)
        operation, results, results_in = self._entries[self._position]
        if operation != _operation_hash(func, inputs):
            raise _OperationsDiffer
        self._position += 1
        if results is None:
            result = func(*args, **kwargs)
        else:
            leaves = [self._rebuild(inputs, *one) for one in results]
            result = leaves if results_in == "list" else tuple(leaves) if results_in == "tuple" else leaves[0]
        if self._position == len(self._entries):
            self._fill_storages()
        return result

    def _record_operation(self, func: Any, inputs: list[Tensor], result: Any) -> None:
        leaves = result if isinstance(result, (list, tuple)) else [result]
        results: list[tuple[Any, ...]] = []
        viewed = 0
        for leaf in leaves:
            if isinstance(leaf, (tuple, list)):
                return self.forget()
            if not isinstance(leaf, Tensor):
                results.append(("value", leaf))
                continue
            same = next((place for place, tensor in enumerate(inputs) if tensor is leaf), None)
            if same is not None:
                results.append(("input", same, _small_values(leaf)))
                continue
            if leaf.layout != torch.strided or leaf.is_conj() or leaf.is_neg():
                return self.forget()
            storage, content = leaf.untyped_storage(), None
            number = self._numbers.get(storage._cdata)
            if number is None:
                if any(tensor.untyped_storage()._cdata == storage._cdata for tensor in inputs):
                    viewed += 1
                    continue
                number, content = self._number_storage(storage), _small_values(leaf)
            kind = leaf.dtype, leaf.device
            if kind not in self._kinds:
                self._kinds.append(kind)
            shape = tuple(leaf.shape), leaf.stride(), leaf.storage_offset()
            results.append(("made", number, content, storage.nbytes(), self._kinds.index(kind), *shape))
        if viewed and results:
            return self.forget()
        results_in = "" if leaves is not result else "list" if isinstance(result, list) else "tuple"
        self._entries.append((_operation_hash(func, inputs), None if viewed else results, results_in))
        self._position += 1

    def _number_storage(self, storage: torch.UntypedStorage, number: int | None = None) -> int:
        number = self._count if number is None else number
        self._count = max(self._count, number + 1)
        self._numbers[storage._cdata], self._storages[number] = number, StorageWeakRef(storage)
        return number

    def _live_storage(self, number: int) -> torch.UntypedStorage | None:
        """The storage with this number, if a tensor still uses it."""
        found = self._storages.get(number)
        return None if found is None else torch.UntypedStorage._new_with_weak_ptr(found.cdata)

    def _rebuild(self, inputs: list[Tensor], kind: str, value: Any, content: bytes | None = None, *made: Any) -> Any:
        """One result, made again from what is written of it."""
        if kind == "value":
            return value
        if kind == "input":
            tensor = inputs[value]
        else:
            size, kind_index, shape, strides, offset = made
            (dtype, device), storage = self._kinds[kind_index], self._live_storage(value)
            if storage is None:
                storage = torch.empty(size, dtype=torch.uint8, device=device).untyped_storage()
                self._unfilled.add(self._number_storage(storage, value))
            tensor = torch.empty(0, dtype=dtype, device=device).set_(storage, offset, shape, strides)
        if content is not None:
            values = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            _bytes_of(values.untyped_storage()).copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            tensor.copy_(values)
        return tensor

    def _fill_storages(self) -> None:
        """Fill the storages with their bytes, when the pass is where it was."""
        while self._read:  # the bytes are in memory twice for one storage at a time
            number, content = self._read.popitem()
            self._unfilled.discard(number)
            if (storage := self._live_storage(number)) is not None:
                _bytes_of(storage).copy_(torch.from_numpy(content))

    def write(self) -> None:
        """Write the operations and the bytes of live storages to disk."""
        if not self._is_usable:
            return
        alive = {number: storage for number in self._storages if (storage := self._live_storage(number)) is not None}
        content = {number: _bytes_of(storage).cpu().numpy() for number, storage in alive.items()}
        with self._path.open("wb") as file:
            pickle.dump((self._entries, self._count, content), file, pickle.HIGHEST_PROTOCOL)
        self._entries, self._position = [], 0

    def read(self) -> None:
        """Read the operations, and begin the pass again."""
        self._numbers, self._storages, self._unfilled = {}, {}, set()
        with self._path.open("rb") as file:  # written by this process, into its own folder
            self._entries, self._count, self._read = pickle.load(file)
        self._position = 0

    def forget(self) -> None:
        """Drop the results: this pass cannot be written."""
        self._entries, self._position, self._is_usable = [], 0, False

    def has_live_tensors(self) -> bool:
        """Whether tensors of the pass are still alive, although its thread has ended."""
        if not self._is_usable:
            return True
        if not all(storage.expired() for storage in self._storages.values()):
            gc.collect()  # frames may be in cycles
        alive = {number for number, storage in self._storages.items() if not storage.expired()}
        if alive & self._unfilled:
            raise RuntimeError(
                "the model keeps tensors of a forward pass and replaces them for other batches, so waiting batches "
                "cannot be built again, and the model now holds tensors without values. Load the model anew, and "
                f"give batches of one length, or at most {MOST_THREADS} batches and no resident_batches."
            )
        # These are hundreds of objects for each batch, which a batch that waits or has ended does not need.
        self._entries, self._numbers, self._storages, self._unfilled = [], {}, {}, set()
        return bool(alive)


def _operation_hash(func: Any, inputs: list[Tensor]) -> int:
    """A number that identifies an operation and the shapes of its arguments, within this process."""
    return hash((id(func), *[tensor.shape for tensor in inputs]))


def _argument_tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments of an operation, and in lists among them."""
    found = []
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += [one for one in argument if isinstance(one, Tensor)]
    return found


def _small_values(tensor: Tensor) -> bytes | None:
    """The bytes of a small tensor of integers or booleans, whose values Python code may read; else None."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized or not 0 < tensor.numel() <= _MAX_NUMEL:
        return None
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # an expanded tensor
        return None
    values = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return _bytes_of(values.untyped_storage()).numpy().tobytes()


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A view of a storage's bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
