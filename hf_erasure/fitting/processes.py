"""Several processes that fit one adapter: how they share the work, and how their results are added."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

T = TypeVar("T")


class AnotherProcessFailed(RuntimeError):
    """Work that all processes share cannot go on, because another process raised an error."""


class Processes:
    """The processes that a launcher started, or the single process without one."""

    def __init__(self) -> None:
        # Without an accelerator, the library accelerate connects processes only with `cpu=True`.
        self._state = PartialState(cpu=True) if share_the_cpu() else PartialState()
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if self._state.num_processes != launched and launched > 1:
            raise RuntimeError(
                f"The launcher started {launched} processes (WORLD_SIZE), but accelerate was set up in each as the "
                "only one. Without a GPU, write PartialState(cpu=True) or Accelerator(cpu=True) where the first of "
                "these is made, or use_cpu=True in training arguments."
            )
        self.count: int = self._state.num_processes
        self.rank: int = self._state.process_index
        self.is_main: bool = self._state.is_main_process

    @property
    def device(self) -> torch.device:
        """The device for this process's model: an accelerator that supports float64, or the CPU."""
        device: torch.device = self._state.device
        return torch.device("cpu") if device.type == "mps" else device

    # ---- the work ---------------------------------------------------------------------------------------------------

    def step_rows(self, groups: Iterable[Sequence[T]]) -> list[list[T]]:
        """Cut groups of items that may share a step, such as batches of one class, into one row for each step.

        A row has one item for each process; the last row of a group may be shorter.
        """
        return [list(group[i : i + self.count]) for group in groups for i in range(0, len(group), self.count)]

    def equally_often(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Yield equally many items in every process, as many as the most: a sharded model runs in all at once.

        Args:
            items: The items of this process; if reading them raises an error, all processes raise one.

        Yields:
            An item, and whether it is this process's next; if not, it only keeps the process in step with the others.
        """
        source, spare = iter(items), None
        while True:
            with self.fail_together("reading its batches"):
                item = next(source, None)
            spare = item if item is not None else spare
            states = self.gathered([(item is not None, spare is not None)])
            if not any(more for more, _ in states):
                return
            if not all(has for _, has in states):
                lent = self.broadcast(spare, next(rank for rank, (_, has) in enumerate(states) if has))
                spare = lent if spare is None else spare
            yield (spare if item is None else item), item is not None  # type: ignore[misc]

    # ---- the results ------------------------------------------------------------------------------------------------

    def add(self, tensor: Tensor) -> None:
        """Add a tensor over all processes, in place. It may be on any device: it is copied to that of the backend."""
        if self.count == 1:
            return
        there = tensor.to(self._state.device)
        torch.distributed.all_reduce(there)
        if there is not tensor:
            tensor.copy_(there)

    def gathered(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in an order that is the same in each."""
        return gather_object(items) if self.count > 1 else items

    def broadcast(self, item: T, rank: int = 0) -> T:
        """Return the item of one process, in all processes."""
        if self.count == 1:
            return item
        held = [item]
        broadcast_object_list(held, from_process=rank)
        return held[0]

    def wait(self) -> None:
        """Wait until all processes have come to this call."""
        self._state.wait_for_everyone()

    @contextmanager
    def fail_together(self, doing: str) -> Iterator[None]:
        """Run each process's own work, and stop all if one fails, since the others would wait for it without end.

        Raises:
            AnotherProcessFailed: In the other processes, with the error of the one that failed, which raises its own.
        """
        if self.count == 1:
            yield
            return
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failures = self.gathered([None if error is None else f"{type(error).__name__}: {error}"])
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise AnotherProcessFailed(f"Process {rank} failed while {doing}. {failure}")


def share_the_cpu() -> bool:
    """Whether a launcher started several processes where there is no accelerator that could connect them."""
    accelerator = torch.accelerator.current_accelerator()
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and (accelerator is None or accelerator.type == "mps")
