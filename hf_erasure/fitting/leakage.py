"""How much of a concept an adapter leaves readable at present, without fitting anything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hf_erasure.models import POOLS

from .erasure import adapter_to_fit
from .heldout import measure
from .pools import Peeked, Pool, pool_for
from .processes import Processes
from .running import Runner
from .task import FitTask


def measured_leakage(
    model: nn.Module, batches: Iterable[Any], adapter_name: str = "default", *, pool: str | None = None
) -> dict[str, float]:
    """The leakage of erased activations, a magnitude, at every site and at the last hidden states.

    Args:
        model: With a concept-erasure adapter, or whatever it is inside of; it runs twice over the batches.
        batches: Held-out batches with `concept_labels`.
        adapter_name: The adapter.
        pool: As in `fit_concept_erasure`; by default what the adapter was fitted for, or else what the head reads.

    Returns:
        Module name → cross-validated correlation with the concept, 0 where nothing is left and never below.

    Raises:
        ValueError: If there is no such adapter, it is merged, or the batches hold too little.
    """
    config, layers = adapter_to_fit(model, adapter_name)
    runner, processes, peeked = Runner(model, layers.values()), Processes(), Peeked(batches)
    known = config.provenance.get("pool") if pool is None else None
    if known in POOLS:
        guarded = Pool(known, config.provenance.get("reader", ""))
    else:
        guarded = pool_for(pool, model, runner, config, peeked.first, processes)
    task = FitTask(runner, layers, adapter_name, config, guarded, False, processes=processes)
    found = measure(task, peeked).sites
    return {site: figures.after for site, figures in found.items() if figures.after is not None}
