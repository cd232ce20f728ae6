"""One pass over data for the moments at every site at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .checkpoint import Digest
from .labels import BatchLabels, check_batch
from .observing import observed
from .running import evaluating
from .statistics import SiteStatistics, Tally, bar, check_reached, labels_of
from .task import FitTask


def gather(task: FitTask, batches: Iterable[Any], *, labelled: bool) -> tuple[SiteStatistics, Tally]:
    """Run the model over batches, with the adapter left out, and collect the moments at its sites.

    Where the task has a checkpoint, batches that its moments hold already are passed over.

    Args:
        task: What is fitted.
        batches: Dicts of model inputs, plus `concept_labels` where `labelled`.
        labelled: False for a background, which has no concept.

    Raises:
        ValueError: If there is no data, a site is never reached, or its rows cannot be used.
    """
    z_dim, kept_name = (task.config.z_dim, "labelled") if labelled else (0, "background")
    statistics, tally, done, kept = SiteStatistics(z_dim), Tally(), 0, ""
    if task.checkpoint is not None:
        statistics, tally, done, kept = task.checkpoint.load_moments(kept_name, z_dim)
    digest, data, seen = Digest(), "", 0
    current: list[BatchLabels] = []

    def observer(site: str, activation: Tensor) -> Tensor:
        aligned, selection = current[0].select(activation, site)
        statistics.update(site, aligned, selection)
        return activation

    what = f"fitting {task.name}" if labelled else "background"
    with evaluating(task.runner.model), observed(task.layers, task.name, observer), bar(what, task.progress) as shown:
        for position, given in enumerate(batches):
            batch, seen = check_batch(given, position, labelled=labelled), position + 1
            if task.checkpoint is not None:
                data = digest.update(batch)
                if seen == done:
                    task.checkpoint.check_data(kept, data)
            if seen <= done:
                continue
            current[:] = [labels_of(batch, task.config if labelled else None, task.pool)]
            task.runner(batch)
            shown.update(tally.count(batch))
            if task.checkpoint is not None:
                task.checkpoint.save_moments(kept_name, statistics, tally, seen, data, final=False)
    if task.checkpoint is not None:
        if seen < done:
            task.checkpoint.check_data(kept, data)
        task.checkpoint.save_moments(kept_name, statistics, tally, seen, data, final=True)
    check_reached(statistics.moments, tally, task.layers, labelled)
    return statistics, tally
