"""Run many batches through a model side by side, all stopping at the same module.

Every batch has a forward pass of its own, in a thread of its own, and only one thread runs at a time. A hook stops the
batch where the caller wants to look; once all batches wait, the caller decides what goes on and lets them run to the
next stop. So a decision at one depth can rest on all batches, no module runs twice, and nothing needs to be known about
the architecture: what a block hands to the next stays in the frames of its forward pass.

The tensors of waiting batches may be kept out of memory. They are locals of suspended frames, out of reach, but their
storages are not: a dispatch mode sees every tensor the pass makes, so the bytes of those that are alive can be copied
out, the storages emptied, and later filled again, and the frames never notice. Tensors on an accelerator go to main
memory, those there to disk.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from hf_erasure.models.model import TextTooLong

Modes = list[Callable[[], AbstractContextManager[Any]]]


class OutOfStep(Exception):
    """A site that is called again, or that batches reach in different orders."""


class _Abandoned(BaseException):
    """Unwinds a forward pass that will not be continued."""


class BatchThread:
    """One batch on its way through the model."""

    def __init__(self, index: int, forward: Callable[[], Any], modes: Modes, offload: ActivationOffload | None) -> None:
        self.index = index  # The position of the batch.
        self.site: str | None = None  # Where it waits; None before the start and after the end.
        self.hidden: Tensor | None = None  # The activation there.
        self.visited: list[str] = []  # The sites where it has stopped so far.
        self._finished = False
        self._live = None if offload is None else LiveTensors(offload, index)
        self._error: BaseException | None = None
        self._abandoned = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._run, forward, modes),
            name=f"hf-erasure-batch-{index}",
            daemon=True,
        )

    def _run(self, forward: Callable[[], Any], modes: Modes) -> None:
        try:
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode())
                with self._live or nullcontext():
                    forward()
        except _Abandoned:
            pass
        except BaseException as error:  # carried to the thread that waits
            self._error = error
        finally:
            self._finished, self.site, self.hidden = True, None, None
            self._stopped.release()

    def advance(self) -> None:
        """Let the batch run to its next stop, or to the end; what fails says in which batch, and after which site."""
        try:
            if self._live is not None:
                self._live.offload.fetch(self._live)
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._go.release()
            self._stopped.acquire()
            if self._error is not None:
                raise self._error
        except OutOfStep:
            raise
        except TextTooLong as error:
            raise TextTooLong(f"Batch {self.index}: {error}") from error
        except Exception as error:
            place = f"after {self.visited[-1]!r}" if self.visited else "before the first site"
            raise RuntimeError(f"Batch {self.index} failed {place}: {type(error).__name__}: {error}") from error
        if self._live is not None and self._finished:
            self._live.offload.present.remove(self._live)

    def stop(self, site: str, hidden: Tensor) -> None:
        """Called in the batch's own thread: show the activation, and wait until the caller lets it go on."""
        self.site, self.hidden = site, hidden
        del hidden
        self.visited.append(site)
        self._stopped.release()
        self._go.acquire()
        self.site, self.hidden = None, None
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End the forward pass where it stands, and its thread."""
        if self._thread.ident is not None:
            self._abandoned = True
            self._go.release()
            self._thread.join()


@contextmanager
def batch_threads(forwards: Sequence[Callable[[], Any]], resident: int | None = None) -> Iterator[list[BatchThread]]:
    """One thread a forward pass, in the modes of the caller; all have ended when the block is left, however it is.

    So many batches as are `resident` keep their tensors in memory, the running one included; all when None.
    """
    # What a new thread does not inherit: inference and grad mode, default device, autocast.
    device, cached = torch.get_default_device(), torch.is_autocast_cache_enabled()
    modes: Modes = [
        functools.partial(torch.inference_mode, torch.is_inference_mode_enabled()),
        functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()),
    ]
    # Setting a default device costs a check at every call, so it is left alone where it is the usual one.
    if device.type != "cpu":
        modes.append(functools.partial(torch.device, device))
    for kind in {"cpu", device.type, *(["cuda"] if torch.cuda.is_available() else [])}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            modes.append(functools.partial(torch.autocast, kind, dtype=dtype, cache_enabled=cached))
    offload = None if resident is None else ActivationOffload(resident)
    threads = [BatchThread(index, forward, modes, offload) for index, forward in enumerate(forwards)]
    try:
        yield threads
    finally:
        for thread in threads:
            thread.abandon()
        if offload is not None:
            shutil.rmtree(offload.folder, ignore_errors=True)


# ---- tensors of waiting batches --------------------------------------------------------------------------------------


class LiveTensors(TorchDispatchMode):
    """Knows the tensors made under it that are still alive, and moves their bytes out and in."""

    def __init__(self, offload: ActivationOffload, index: int) -> None:
        super().__init__()
        self.offload, self._path = offload, offload.folder / f"batch-{index}.pt"
        # What was moved out: where a storage is → the storage and its size in bytes.
        self.moved: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._alive = WeakTensorKeyDictionary()
        self._copies: dict[str, Tensor] = {}
        offload.batches.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            if tensor.numel() and not tensor.untyped_storage().nbytes():
                # Made by another batch and kept by the model, as a cache of positions may be.
                self.offload.restore_owner(tensor)
        result = func(*args, **kwargs)
        foreign = {_key(tensor) for tensor in given if tensor not in self._alive}
        for leaf in tree_leaves(result):
            # A view of a weight or of an input is not this batch's to move.
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and _key(leaf) not in foreign:
                self._alive[leaf] = None
        return result

    def move_out(self) -> None:
        """Move the bytes of all live tensors out."""
        storages = [t.untyped_storage() for t in list(self._alive.keys())]
        self.moved = {s._cdata: (s, s.nbytes()) for s in storages if s.nbytes()}
        on_disk = {}
        for key, (storage, _) in self.moved.items():
            content = _bytes_of(storage)
            if storage.device.type == "cpu":
                on_disk[str(key)] = content
            else:
                self._copies[str(key)] = content.cpu()
        if on_disk:
            torch.save(on_disk, self._path)
        del on_disk
        for storage, _ in self.moved.values():
            storage.resize_(0)
        # The allocator of glibc keeps an arena for every thread, and what one batch's thread has freed there serves no
        # other thread: unless it is handed back to the system, moving tensors out saves next to nothing.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
        if trim is not None:
            trim(0)

    def move_in(self) -> None:
        """Put the bytes back where they were."""
        copies = dict(self._copies)
        if self._path.exists():
            copies |= torch.load(self._path, weights_only=True)
            self._path.unlink()
        for key, (storage, size) in self.moved.items():
            storage.resize_(size)
            _bytes_of(storage).copy_(copies[str(key)])
        self.moved.clear()
        self._copies.clear()


class ActivationOffload:
    """Lets so many batches keep their tensors in memory, at least the running one, and moves those of others out."""

    def __init__(self, resident: int) -> None:
        self._resident = resident
        self.folder = Path(tempfile.mkdtemp(prefix="hf-erasure-"))  # Where tensors of the CPU go.
        self.batches: list[LiveTensors] = []  # The live tensors of each batch.
        self.present: list[LiveTensors] = []  # Those in memory, the one that ran longest ago first.

    def fetch(self, live: LiveTensors) -> None:
        """Make room for a batch and bring its tensors in."""
        if live in self.present:
            self.present.remove(live)
        while len(self.present) >= self._resident:
            # The one that ran longest ago: batches run to and fro, so it is the last to be needed again.
            self.present.pop(0).move_out()
        if live.moved:
            live.move_in()
        self.present.append(live)

    def restore_owner(self, tensor: Tensor) -> None:
        """Bring in the batch whose tensor another one reads."""
        for live in self.batches:
            if _key(tensor) in live.moved:
                live.move_in()
                self.present.insert(0, live)
                return


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A view of a storage's bytes. Never by way of numpy, which would forbid to resize it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
