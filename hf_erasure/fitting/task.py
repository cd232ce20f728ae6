"""What a fit is about, in one piece: every step of it is handed the same things."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from hf_erasure.adapters import ConceptErasureConfig, ErasureLayer

from .checkpoint import FitCheckpoint
from .pools import Pool
from .processes import Processes
from .running import Runner

T = TypeVar("T")


@dataclass(frozen=True)
class FitTask:
    """One adapter to be fitted.

    Attributes:
        runner: Calls the model.
        layers: The sites, by the name of their module, in the model's order.
        name: The adapter.
        config: Its configuration.
        pool: Which rows a sequence label counts for, and what the model's head reads.
        progress: Whether to show progress bars.
        resident_batches: How many batches keep their activations in memory in sequential fitting; all when None.
        checkpoint: Where to keep what is finished, if anywhere.
        processes: Those that share the data.
    """

    runner: Runner
    layers: dict[str, ErasureLayer]
    name: str
    config: ConceptErasureConfig
    pool: Pool
    progress: bool
    resident_batches: int | None = None
    checkpoint: FitCheckpoint | None = None
    processes: Processes = field(default_factory=Processes)

    def in_step(self, batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """The batches to run the model on, and which of them count.

        Every forward pass of a sharded model needs all processes, so that those with fewer batches repeat one.
        """
        if self.runner.is_sharded and self.processes.count > 1:
            return self.processes.equally_often(batches)
        return ((batch, True) for batch in batches)
