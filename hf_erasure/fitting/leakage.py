"""How much of a concept an adapter leaves readable at present, without fitting anything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .erasure import adapter_to_fit
from .heldout import measure
from .labels import check_pool
from .running import Runner
from .task import FitTask


def measured_leakage(
    model: nn.Module, batches: Iterable[Any], adapter_name: str = "default", *, pool: str = "tokens"
) -> dict[str, float]:
    """The correlation of erased activations with the concept, at every site and at the last hidden states.

    Args:
        model: With a concept-erasure adapter, bare or wrapped in a `PeftModel`; it runs twice over the batches.
        batches: Held-out batches with `concept_labels`.
        adapter_name: The adapter.
        pool: As in `fit_concept_erasure`.

    Returns:
        Module name → cross-validated canonical correlation, 0 where nothing is left.

    Raises:
        ValueError: If there is no such adapter, it is merged, or the batches hold too little.
    """
    check_pool(pool)
    config, layers = adapter_to_fit(model, adapter_name)
    task = FitTask(Runner(model, list(layers)), layers, adapter_name, config, pool, False, None, None)
    figures, _ = measure(task, batches)
    return {site: found.after for site, found in figures.items() if found.after is not None}
