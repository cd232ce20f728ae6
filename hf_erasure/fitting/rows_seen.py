"""Which rows were seen, as one hash of eight bytes each, so that splits that share rows are noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .processes import Processes

_INPUTS = ("input_ids", "pixel_values", "input_features", "input_values", "inputs_embeds")


class RowsSeen:
    """A set of rows, whatever their order, padding and number of visits.

    Attributes:
        hashes: `(rows,)` uint64, sorted and each once.
    """

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._waiting = 0
        self._known = np.empty(0, np.uint64)

    def watching(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; their rows are added as they go by."""
        for batch in batches:
            self.add(hashes_of(batch))
            yield batch

    def add(self, hashes: np.ndarray) -> None:
        """Add rows by their hashes."""
        self._parts.append(hashes)
        self._waiting += len(hashes)
        if self._waiting > max(1 << 16, len(self._known)):
            self._settle()

    @property
    def hashes(self) -> np.ndarray:
        """Sorted and each once."""
        self._settle()
        return self._known

    def pool(self, processes: Processes) -> None:
        """Make these the rows of all processes, in every one of them."""
        for hashes in processes.gathered([self.hashes]):
            self.add(hashes)

    def count(self, hashes: np.ndarray) -> int:
        """How many of these rows were seen."""
        return int(np.isin(hashes, self.hashes).sum())

    def _settle(self) -> None:
        if self._parts:
            self._known = np.unique(np.concatenate([self._known, *self._parts]))
            self._parts, self._waiting = [], 0


def hashes_of(batch: Any) -> np.ndarray:
    """One hash a row, of its input without padding: `(rows,)` uint64; empty for what is not a batch."""
    if not isinstance(batch, Mapping):
        return np.empty(0, np.uint64)
    found = {name: batch[name] for name in _INPUTS if isinstance(batch.get(name), Tensor)}
    if not found:
        return np.empty(0, np.uint64)
    value = next(iter(found.values())).detach().cpu()
    mask = batch.get("attention_mask")
    real = mask.detach().cpu().bool() if isinstance(mask, Tensor) and mask.shape == value.shape[:2] else None
    rows = [row if real is None else row[real[index]] for index, row in enumerate(value)]
    return np.array([_hash(row) for row in rows], np.uint64)


def _hash(row: Tensor) -> int:
    whole = row.to(torch.int64) if not row.is_floating_point() else row.float()
    return int.from_bytes(hashlib.blake2b(whole.contiguous().numpy().tobytes(), digest_size=8).digest(), "little")


def in_words(examples: int, fitted: int) -> str:
    """What figures are on, to follow "on".

    Args:
        examples: How many rows they are on.
        fitted: How many of these were fitted on.
    """
    if not fitted:
        return f"{examples} held-out examples"
    return f"fitted rows ({'all' if fitted == examples else fitted} of {examples})"
