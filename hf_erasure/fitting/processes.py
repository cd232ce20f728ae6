"""Several processes that fit one adapter: who takes what, and how what they found is added."""

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
    """Work that all processes share cannot go on, for what another one raised."""


class Processes:
    """The processes that a launcher started, or the only one there is."""

    def __init__(self) -> None:
        # Without an accelerator, accelerate connects processes only when it is told that they run on the CPU.
        self._state = PartialState(cpu=True) if share_the_cpu() else PartialState()
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if self._state.num_processes != launched and launched > 1:
            raise RuntimeError(
                f"The launcher started {launched} processes (WORLD_SIZE), but accelerate was set up in each as the "
                "only one. Where there is no GPU, write PartialState(cpu=True) or Accelerator(cpu=True), or "
                "use_cpu=True in training arguments, in the place of what was made first."
            )
        self.count: int = self._state.num_processes
        self.rank: int = self._state.process_index
        self.is_main: bool = self._state.is_main_process

    @property
    def device(self) -> torch.device:
        """Where this process's model goes: an accelerator that knows float64, or the CPU."""
        device: torch.device = self._state.device
        return torch.device("cpu") if device.type == "mps" else device

    # ---- who takes what ---------------------------------------------------------------------------------------------

    def mine(self, items: Sequence[T]) -> list[T]:
        """Every so-many-th item, beginning with the rank of this process."""
        return list(items[self.rank :: self.count])

    def in_step(self, groups: Iterable[Sequence[T]]) -> list[list[T]]:
        """Cut groups of what may be taken in one step together, such as batches of one class, into a row a step.

        A row has one item a process; the last row of a group may be shorter.
        """
        return [list(group[i : i + self.count]) for group in groups for i in range(0, len(group), self.count)]

    def equally_often(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """As many items in every process as the one with the most has: forward passes of a sharded model must meet.

        Args:
            items: This process's own; an exception it raises is raised in all processes.

        Yields:
            An item, and whether it is this process's next; otherwise it is one to keep up with the others.
        """
        source, spare = iter(items), None
        while True:
            with self.agreeing("reading its batches"):
                item = next(source, None)
            spare = item if item is not None else spare
            states = self.gathered([(item is not None, spare is not None)])
            if not any(more for more, _ in states):
                return
            if not all(has for _, has in states):
                lent = self.from_one(spare, next(rank for rank, (_, has) in enumerate(states) if has))
                spare = lent if spare is None else spare
            yield (spare if item is None else item), item is not None  # type: ignore[misc]

    # ---- what they found --------------------------------------------------------------------------------------------

    def add(self, tensor: Tensor) -> None:
        """Add a tensor over all processes, in place, wherever it lives: a backend may know its own device only."""
        if self.count == 1:
            return
        there = tensor.to(self._state.device)
        torch.distributed.all_reduce(there)
        if there is not tensor:
            tensor.copy_(there)

    def gathered(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in an order that is the same in each."""
        return gather_object(items) if self.count > 1 else items

    def from_one(self, item: T, rank: int = 0) -> T:
        """The item of one process, in all."""
        if self.count == 1:
            return item
        held = [item]
        broadcast_object_list(held, from_process=rank)
        return held[0]

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    @contextmanager
    def agreeing(self, doing: str) -> Iterator[None]:
        """A process's own work, of which none may go on if one has failed: the others would wait for it in vain.

        Raises:
            AnotherProcessFailed: In the others, with what the one that failed has raised; that one raises its own.
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
