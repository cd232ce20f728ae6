"""Concept scrubbing: every eraser is fitted on activations that are already erased upstream.

Arxiv 2306.03819, section 5. Fitting all sites on one plain pass leaves the concept readable in deeper layers, because
erasing upstream changes what arrives there. Here all batches stop at a site, its eraser is fitted on them, and they go
on with erased activations; every module runs once a batch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable

from torch import Tensor
from tqdm import tqdm

from hf_erasure.erasers import apply_erasure
from hf_erasure.models.model import evaluating
from hf_erasure.models.runner import TextTooLong

from .batch_threads import BatchThread, batch_threads
from .checkpoint import digest_of, together
from .labels import BatchLabels, Source
from .sites import SiteFit, SiteStatistics, bar, check_reached, observed, share_out, solve_site
from .task import FitTask

logger = logging.getLogger(__name__)


class _OutOfStep(Exception):
    """A site that is called again, or that batches reach in different orders."""


class Scrubber:
    """Fits the sites of one adapter in the order in which the model reaches them.

    Args:
        task: What is fitted. Where it has a checkpoint, sites that are finished there are not fitted again.
    """

    def __init__(self, task: FitTask) -> None:
        self.task = task
        self.fits: dict[str, SiteFit] = {}
        self._kept: set[str] = set()
        self._sources: dict[str, Source] = {}
        self._statistics: dict[str, SiteStatistics] = {}
        self._batches: list[BatchLabels] = []
        self._running: BatchThread
        self._data = ""

    def fit(self, sources: Iterable[Source]) -> tuple[dict[str, SiteFit], list[SiteStatistics]]:
        """Fit all sites.

        Args:
            sources: Labelled batches of every concept that is erased, and perhaps a background; in each process its
                own. All are held, and of the activations those of `task.resident_batches`.

        Returns:
            Site → its fit, and what was seen of each source of labels.

        Raises:
            ValueError: If there is no data, a site is never reached, or its rows cannot be used.
            RuntimeError: If the model fails on a batch, or another process failed.
        """
        task, processes = self.task, self.task.processes
        with processes.agreeing("reading its batches"):
            for source in sources:
                self._sources[source.key], statistics = source, SiteStatistics(source.z_dim)
                self._statistics[source.key] = statistics
                for labels in source.read(task.pool.name):
                    self._batches.append(labels)
                    statistics.count(labels)
        for key, source in self._sources.items():
            self._statistics[key].pool_counts(processes)
            check_reached({}, self._statistics[key].examples, [], source)
        one_by_one = task.runner.is_sharded
        if task.checkpoint is not None:
            checkpoint, batches = task.checkpoint, (labels.batch for labels in self._batches)
            self._data = together(processes.gathered([digest_of(batches)]))
            self.fits, was_one_by_one = processes.on_main(
                lambda: (checkpoint.load_sites(self._data), checkpoint.one_site_a_pass), "reading the checkpoint"
            )
            self._kept, one_by_one = set(self.fits), one_by_one or was_one_by_one
        title = f"scrubbing {task.name}"
        with evaluating(task.runner.model), bar(title, task.progress, processes, " sites") as shown:
            shown.reset(len(task.layers))
            if one_by_one or not self._side_by_side(shown):
                shown.reset(len(task.layers))
                self._one_site_a_pass(shown)
        labelled = [statistics for statistics in self._statistics.values() if statistics.z_dim]
        check_reached(self.fits, labelled[0].examples, task.layers, next(iter(self._sources.values())))
        return self.fits, labelled

    # ---- every module once ------------------------------------------------------------------------------------------

    def _side_by_side(self, shown: tqdm) -> bool:
        """Fit with every module run once; False if the model calls a site in a way that this does not allow for."""
        forwards = [functools.partial(self.task.runner, labels.batch) for labels in self._batches]
        try:
            with (
                observed(self.task.layers, self.task.name, self._stop_at),
                batch_threads(forwards, self.task.resident_batches) as threads,
            ):
                self._all_to_the_end(threads, shown)
        except _OutOfStep as reason:
            logger.warning(
                "%s Its eraser has to be fitted on all its visits together, so the sites are fitted one a pass: %d "
                "passes over the data instead of one.",
                reason,
                len(self.task.layers),
            )
            self.fits.clear()
            self._kept.clear()
            for statistics in self._statistics.values():
                statistics.moments.clear()
            if self.task.checkpoint is not None and self.task.processes.is_main:
                self.task.checkpoint.begin_one_site_a_pass()
            return False
        return True

    def _stop_at(self, site: str, hidden: Tensor) -> Tensor:
        """Let the running batch wait at a site until its eraser is there; called in the batch's thread."""
        thread = self._running
        if site in thread.visited:
            raise _OutOfStep(f"{site!r} is called several times in one forward pass.")
        if site in self._kept:
            thread.visited.append(site)
        elif site in self.fits:
            raise _OutOfStep(f"{site!r} is reached in different orders by different batches.")
        else:
            thread.stop(site, hidden)
        return self._erased(site, hidden)

    def _all_to_the_end(self, threads: list[BatchThread], shown: tqdm) -> None:
        """Bring the batches of all processes to the next site, fit it, let them go on, until none is left."""
        waiting = threads
        while True:
            # To and fro, so that those whose tensors are in memory go first. The direction depends on the site alone:
            # sums are the same to the bit however many batches are resident, and wherever a killed fit continues.
            refusal = None
            with self.task.processes.agreeing("running over its batches"):
                try:
                    for thread in waiting if len(self.fits) % 2 == 0 else waiting[::-1]:
                        self._running = thread
                        self._advance(thread)
                        if thread.site is not None and thread.hidden is not None:
                            self._look(self._batches[thread.index], thread.site, thread.hidden)
                            thread.hidden = None
                except _OutOfStep as reason:
                    refusal = str(reason)
            site = self._next_stop([thread for thread in threads if not thread.finished], refusal)
            if site is None:
                return
            waiting = [thread for thread in threads if thread.site == site]
            self._solve(site)
            shown.update()

    def _advance(self, thread: BatchThread) -> None:
        """Let one batch run on; what its forward pass raises is told with the place where it stood.

        Raises:
            RuntimeError: If the model failed.
        """
        try:
            thread.advance()
        except _OutOfStep:
            raise
        except TextTooLong as error:
            raise TextTooLong(f"Batch {thread.index}: {error}") from error
        except Exception as error:
            place = f"after {thread.visited[-1]!r}" if thread.visited else "before the first site"
            raise RuntimeError(f"Batch {thread.index} failed {place}: {type(error).__name__}: {error}") from error

    def _next_stop(self, stopped: list[BatchThread], refusal: str | None) -> str | None:
        """The site to fit next, the same in all processes; None when all batches have come to the end.

        Raises:
            _OutOfStep: If a batch of any process cannot be fitted so.
        """
        order = list(self.task.layers)
        # Where a batch skips a module, others wait further up: the first in the model's order comes first.
        first = min((order.index(thread.site) for thread in stopped if thread.site is not None), default=None)
        reached = self.task.processes.gathered([(first, refusal)])
        for _, reason in reached:
            if reason is not None:
                raise _OutOfStep(reason)
        return min((order[index] for index, _ in reached if index is not None), key=order.index, default=None)

    # ---- the naive procedure ----------------------------------------------------------------------------------------

    def _one_site_a_pass(self, shown: tqdm) -> None:
        """Fit each site with all sites before it erased; the definition, for sites that are called several times."""
        task, processes = self.task, self.task.processes
        order: dict[str, None] = {}

        def note(labels: BatchLabels | None, site: str, hidden: Tensor) -> Tensor:
            order.setdefault(site)
            return hidden

        def look(wanted: str, labels: BatchLabels | None, site: str, hidden: Tensor) -> Tensor:
            if site == wanted and labels is not None:
                self._look(labels, site, hidden)
            return self._erased(site, hidden) if site in self.fits else hidden

        with processes.agreeing("running over its first batch"):
            task.run_over(self._batches[:1], note)
        visited = max(processes.gathered([list(order)]), key=len)
        for site in [*visited, *(site for site in task.layers if site not in visited)]:
            if site not in self.fits:
                with processes.agreeing(f"running over its batches to {site!r}"):
                    task.run_over(self._batches, functools.partial(look, site))
                self._solve(site)
            shown.update()

    # ---- one site ---------------------------------------------------------------------------------------------------

    def _look(self, labels: BatchLabels, site: str, hidden: Tensor) -> None:
        self._statistics[labels.source].update(site, *labels.select(hidden, site))

    def _solve(self, site: str) -> None:
        labelled, background = [], None
        for key, source in self._sources.items():
            statistics = self._statistics[key]
            statistics.pool(self.task.processes, [site])
            check_reached(statistics.moments, statistics.examples, [site], source)
            # The moments are let go: only one site's are ever held.
            moments = statistics.moments.pop(site)
            if source.z_dim:
                labelled.append(moments)
                dtype = statistics.dtypes[site]
            else:
                background = moments
        solve = functools.partial(solve_site, site, labelled, background, dtype, self.task.config)
        self.fits |= share_out(self.task.processes, {site: solve})
        if self.task.checkpoint is not None and self.task.processes.is_main:
            self.task.checkpoint.save_site(site, self.fits[site], self._data)

    def _erased(self, site: str, hidden: Tensor) -> Tensor:
        return apply_erasure(hidden, *self.fits[site].parts(hidden.device))
