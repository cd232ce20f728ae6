"""Keep the tensors of waiting batches out of memory.

What a suspended forward pass still needs are locals of its frames, out of reach. Their storages are not: a dispatch
mode sees every tensor the pass makes, so the bytes of those that are alive can be copied out, the storages emptied, and
later filled again, and the frames never notice. Tensors on an accelerator go to main memory, those there to disk.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Bytes = dict[int, tuple[torch.UntypedStorage, int]]


class LiveTensors(TorchDispatchMode):
    """Knows the tensors made under it that are still alive, and moves their bytes out and in.

    Args:
        shelf: Where bytes go.
        index: Of the batch.
    """

    def __init__(self, shelf: Shelf, index: int) -> None:
        super().__init__()
        self._shelf, self._path = shelf, shelf.folder / f"batch-{index}.pt"
        self._alive = WeakTensorKeyDictionary()
        self._out: Bytes = {}
        self._copies: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            if tensor.numel() and not tensor.untyped_storage().nbytes():
                # Made by another batch and kept by the model, as a cache of positions may be.
                self._shelf.restore_owner(tensor)
        result = func(*args, **kwargs)
        foreign = {_key(tensor) for tensor in given if tensor not in self._alive}
        for leaf in tree_leaves(result):
            # A view of a weight or of an input is not this batch's to move.
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and _key(leaf) not in foreign:
                self._alive[leaf] = None
        return result

    @property
    def spilled(self) -> bool:
        """Whether the bytes are out."""
        return bool(self._out)

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor's bytes were moved out here."""
        return _key(tensor) in self._out

    def spill(self) -> None:
        """Move the bytes of all live tensors out."""
        storages = {_key(t): t.untyped_storage() for t in list(self._alive.keys()) if t.untyped_storage().nbytes()}
        self._out = {key: (storage, storage.nbytes()) for key, storage in storages.items()}
        on_disk = {}
        for key, (storage, _) in self._out.items():
            content = _bytes_of(storage)
            if storage.device.type == "cpu":
                on_disk[str(key)] = content
            else:
                self._copies[str(key)] = content.cpu()
        if on_disk:
            torch.save(on_disk, self._path)
        del on_disk
        for storage, _ in self._out.values():
            storage.resize_(0)
        _release_freed_memory()

    def restore(self) -> None:
        """Put the bytes back where they were."""
        copies = dict(self._copies)
        if self._path.exists():
            copies |= torch.load(self._path, weights_only=True)
            self._path.unlink()
        for key, (storage, size) in self._out.items():
            storage.resize_(size)
            _bytes_of(storage).copy_(copies[str(key)])
        self._out.clear()
        self._copies.clear()


class Shelf:
    """Lets so many batches keep their tensors in memory, and moves those of the others out.

    Args:
        resident: How many, the running one included. At least 1.
    """

    def __init__(self, resident: int) -> None:
        self.resident = resident
        self.folder = Path(tempfile.mkdtemp(prefix="hf-erasure-"))
        self._present: list[LiveTensors] = []
        self._all: list[LiveTensors] = []

    def batch(self, index: int) -> LiveTensors:
        """The live tensors of one batch, to be entered in its thread."""
        self._all.append(LiveTensors(self, index))
        return self._all[-1]

    def fetch(self, live: LiveTensors) -> None:
        """Make room for a batch and bring its tensors in."""
        if live in self._present:
            self._present.remove(live)
        while len(self._present) >= self.resident:
            # The one that ran longest ago: batches run to and fro, so it is the last to be needed again.
            self._present.pop(0).spill()
        if live.spilled:
            live.restore()
        self._present.append(live)

    def drop(self, live: LiveTensors) -> None:
        """Forget a batch that has ended."""
        if live in self._present:
            self._present.remove(live)

    def restore_owner(self, tensor: Tensor) -> None:
        """Bring in the batch whose tensor another one reads."""
        for live in self._all:
            if live.owns(tensor):
                live.restore()
                self._present.insert(0, live)
                return

    def close(self) -> None:
        """Delete what was moved out; the batches have ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _release_freed_memory() -> None:
    """Hand freed memory back to the system.

    The allocator of glibc keeps an arena for every thread, and what one batch's thread has freed there serves no other
    thread: without this, moving tensors out would save next to nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """A view of a storage's bytes. Never by way of numpy, which would forbid to resize it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
