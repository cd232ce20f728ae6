"""Which rows were seen, as one hash of eight bytes each, so that splits that share rows are noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .processes import Processes

# The content of a row; a batch may hold more, such as the row's number.
_INPUTS = ("input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values", "pixel_values_videos")
# Of a batch without any of these: what is not the content of a row, such as labels, or follows from its padding.
_BESIDES = ("labels", "concept_labels", "token_type_ids", "position_ids", "cache_position")


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
    """One hash a row, of its inputs without padding: `(rows,)` uint64; empty for what is not a batch."""
    if not isinstance(batch, Mapping):
        return np.empty(0, np.uint64)
    inputs = {
        name: value.detach().cpu()
        for name, value in sorted(batch.items())
        if isinstance(value, Tensor) and value.dim() and name not in _BESIDES
        if not name.endswith("mask") and not name.startswith("decoder_")
    }
    if not inputs:
        return np.empty(0, np.uint64)
    inputs = {name: inputs[name] for name in _INPUTS if name in inputs} or inputs
    mask = batch.get("attention_mask")
    real = mask.detach().cpu().bool() if isinstance(mask, Tensor) else None
    rows = len(inputs.get("input_ids", next(iter(inputs.values()))))
    return np.array([_hash(_content(inputs, real, row, rows)) for row in range(rows)], np.uint64)


def _content(inputs: Mapping[str, Tensor], real: Tensor | None, row: int, rows: int) -> Iterator[Tensor]:
    """What a row holds; of inputs that are not one entry a row, such as the patches of all images, the whole."""
    for value in inputs.values():
        if len(value) != rows:
            yield value
        else:
            is_padded = real is not None and real.shape == value.shape[:2]
            yield value[row][real[row]] if is_padded and real is not None else value[row]


def _hash(parts: Iterable[Tensor]) -> int:
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        whole = part.float() if part.is_floating_point() else part.to(torch.int64)
        found.update(whole.contiguous().numpy().tobytes())
    return int.from_bytes(found.digest(), "little")


def shared_rows(batches: Iterable[Any], others: Iterable[Any]) -> tuple[int, int]:
    """How many rows the second batches have, and how many of these are among the first, in all processes together."""
    processes, seen, examples, shared = Processes(), RowsSeen(), 0, 0
    for batch in batches:
        seen.add(hashes_of(batch))
    seen.pool(processes)
    for batch in others:
        hashes = hashes_of(batch)
        examples, shared = examples + len(hashes), shared + seen.count(hashes)
    return int(processes.total(examples)), int(processes.total(shared))


def in_words(examples: int, fitted: int) -> str:
    """What figures are on, to follow "on".

    Args:
        examples: How many rows they are on.
        fitted: How many of these were fitted on.
    """
    if not fitted:
        return f"{examples} held-out examples"
    return f"fitted rows ({'all' if fitted == examples else fitted} of {examples})"
