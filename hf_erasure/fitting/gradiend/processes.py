"""Several processes that read gradients of one model: who takes which batch, and how what they found is added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

T = TypeVar("T")


class Processes:
    """The processes that accelerate started, or the only one there is."""

    def __init__(self) -> None:
        self._state = PartialState()
        self.count: int = self._state.num_processes
        self.rank: int = self._state.process_index
        self.is_main: bool = self._state.is_main_process

    def mine(self, items: Sequence[T]) -> list[T]:
        """Every so-many-th item, beginning with the rank of this process."""
        return list(items[self.rank :: self.count])

    def in_step(self, groups: Iterable[Sequence[T]]) -> list[list[T]]:
        """Cut each group into rows of one item a process; the last row of a group may be shorter.

        Args:
            groups: Items that may be taken in one step together, such as batches of one class.

        Returns:
            One row a step.
        """
        return [list(group[i : i + self.count]) for group in groups for i in range(0, len(group), self.count)]

    def take(self, row: Sequence[T]) -> T | None:
        """This process's item of a row, or `None` where the row has fewer."""
        return row[self.rank] if self.rank < len(row) else None

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors over all processes, in place."""
        if self.count > 1:
            for tensor in tensors.values():
                torch.distributed.all_reduce(tensor)

    def total(self, number: float) -> float:
        """The sum of a number over all processes."""
        if self.count == 1:
            return number
        return float(sum(gather_object([number])))

    def gathered(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in an order that is the same in each."""
        return gather_object(items) if self.count > 1 else items

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()
