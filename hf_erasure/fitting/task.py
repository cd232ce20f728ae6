"""What a fit is about, in one piece: every step of it is handed the same things."""

from __future__ import annotations

from dataclasses import dataclass

from hf_erasure.adapters import ConceptErasureConfig, ErasureLayer

from .checkpoint import FitCheckpoint
from .running import Runner


@dataclass(frozen=True)
class FitTask:
    """One adapter to be fitted.

    Attributes:
        runner: Calls the model.
        layers: The sites, by the name of their module, in the model's order.
        name: The adapter.
        config: Its configuration.
        pool: Which rows a sequence label counts for.
        progress: Whether to show progress bars.
        resident_batches: How many batches keep their activations in memory in sequential fitting; all when None.
        checkpoint: Where to keep what is finished, if anywhere.
    """

    runner: Runner
    layers: dict[str, ErasureLayer]
    name: str
    config: ConceptErasureConfig
    pool: str
    progress: bool
    resident_batches: int | None = None
    checkpoint: FitCheckpoint | None = None
