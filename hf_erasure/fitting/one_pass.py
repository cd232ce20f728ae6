"""One pass over data for the moments at every site at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from hf_erasure.models.model import evaluating

from .checkpoint import Digest, together
from .labels import BatchLabels, Source, check_batch
from .sites import SiteStatistics, Tally, bar, check_reached, observed
from .task import FitTask


def gather(task: FitTask, source: Source) -> tuple[SiteStatistics, Tally]:
    """Run the model over the batches of a source, with the adapter left out, and collect the moments at its sites.

    Every process runs over batches of its own; all end with the moments of all. Where the task has a checkpoint,
    batches that its moments hold already are passed over.

    Args:
        task: What is fitted.
        source: The batches.

    Raises:
        ValueError: If there is no data, a site is never reached, or its rows cannot be used.
        RuntimeError: If another process failed.
    """
    with task.processes.agreeing("running over its batches"):
        progress = _Progress(task, source)
        _run_over(task, progress, source)
        progress.save(final=True)
    progress.statistics.pool(task.processes, task.layers)
    tally = progress.tally.pooled(task.processes)
    progress.save_sum(tally)
    check_reached(progress.statistics.moments, tally, task.layers, source)
    return progress.statistics, tally


def _run_over(task: FitTask, progress: _Progress, source: Source) -> None:
    current: list[BatchLabels] = []
    what = f"fitting {task.name}" if source.labelled else "background"

    def observer(site: str, activation: Tensor) -> Tensor:
        if current:
            aligned, selection = current[0].select(activation, site)
            progress.statistics.update(site, aligned, selection)
        return activation

    with (
        evaluating(task.runner.model),
        observed(task.layers, task.name, observer),
        bar(what, task.progress, task.processes) as shown,
    ):
        for batch, counts in task.in_step(progress.remaining()):
            current[:] = [source.labels_of(batch, task.pool.name)] if counts else []
            task.runner(batch)
            if counts:
                shown.update(progress.tally.count(batch))
                progress.save()


class _Progress:
    """How far one process has come, kept in the task's checkpoint if it has one.

    Attributes:
        statistics: The moments so far.
        tally: How much was seen.
    """

    def __init__(self, task: FitTask, source: Source) -> None:
        self._source, self._checkpoint, self._processes = source, task.checkpoint, task.processes
        self._digest, self._data, self._seen = Digest(), "", 0
        self._done, self._kept = 0, ""
        self.statistics, self.tally = SiteStatistics(source.z_dim), Tally()
        if self._checkpoint is not None:
            self.statistics, self.tally, self._done, self._kept = self._checkpoint.load_moments(
                self._own_name, self.statistics.z_dim
            )

    @property
    def _own_name(self) -> str:
        """Every process keeps the moments of its own share."""
        key, processes = self._source.key, self._processes
        return key if processes.count == 1 else f"{key}-{processes.rank}-of-{processes.count}"

    def remaining(self) -> Iterator[dict[str, Any]]:
        """The batches that the moments do not hold yet."""
        for position, given in enumerate(self._source.batches):
            batch, self._seen = check_batch(given, position, labelled=self._source.labelled), position + 1
            if self._checkpoint is not None:
                self._data = self._digest.update(batch)
                if self._seen == self._done:
                    self._checkpoint.check_data(self._kept, self._data)
            if self._seen > self._done:
                yield batch
        if self._checkpoint is not None and self._seen < self._done:
            self._checkpoint.check_data(self._kept, self._data)

    def save(self, *, final: bool = False) -> None:
        """Keep the moments of this process's share, if there is where, and it was not done a moment ago."""
        if self._checkpoint is not None:
            self._checkpoint.save_moments(
                self._own_name, self.statistics, self.tally, self._seen, self._data, final=final
            )

    def save_sum(self, tally: Tally) -> None:
        """Keep the moments of all processes, as if one had gathered them; a continued fit reads the shares."""
        if self._checkpoint is None or self._processes.count == 1:
            return
        batches, data = int(self._processes.total(self._seen)), together(self._processes.gathered([self._data]))
        if self._processes.is_main:
            self._checkpoint.save_moments(self._source.key, self.statistics, tally, batches, data, final=True)
