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
from .sites import SiteFit, SiteObserver, SiteStatistics, bar, check_reached, observed, share_out, solve_site
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
        self._batches: list[tuple[str, BatchLabels]] = []
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
                    self._batches.append((source.key, labels))
                    statistics.count(labels)
        for key, source in self._sources.items():
            self._statistics[key].pool_counts(processes)
            check_reached({}, self._statistics[key].examples, [], source)
        one_by_one = task.runner.is_sharded
        if task.checkpoint is not None:
            checkpoint, batches = task.checkpoint, (labels.batch for _, labels in self._batches)
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
        forwards = [functools.partial(self.task.runner, labels.batch) for _, labels in self._batches]
        running: list[BatchThread] = []

        def observer(site: str, hidden: Tensor) -> Tensor:
            thread = running[0]
            if site in thread.visited:
                raise _OutOfStep(f"{site!r} is called several times in one forward pass.")
            if site in self._kept:
                thread.visited.append(site)
            elif site in self.fits:
                raise _OutOfStep(f"{site!r} is reached in different orders by different batches.")
            else:
                thread.stop(site, hidden)
            return self._erased(site, hidden)

        try:
            with (
                observed(self.task.layers, self.task.name, observer),
                batch_threads(forwards, self.task.resident_batches) as threads,
            ):
                self._all_to_the_end(threads, running, shown)
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

    def _all_to_the_end(self, threads: list[BatchThread], running: list[BatchThread], shown: tqdm) -> None:
        """Bring the batches of all processes to the next site, fit it, let them go on, until none is left."""
        waiting = threads
        while True:
            # To and fro, so that those whose tensors are in memory go first. The direction depends on the site alone:
            # sums are the same to the bit however many batches are resident, and wherever a killed fit continues.
            refusal = None
            with self.task.processes.agreeing("running over its batches"):
                try:
                    for thread in waiting if len(self.fits) % 2 == 0 else waiting[::-1]:
                        running[:] = [thread]
                        self._advance(thread)
                        if thread.site is not None and thread.hidden is not None:
                            key, labels = self._batches[thread.index]
                            self._statistics[key].update(thread.site, *labels.select(thread.hidden, thread.site))
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
        order: dict[str, None] = {}
        running: list[tuple[str, BatchLabels]] = []

        def note(site: str, hidden: Tensor) -> Tensor:
            order.setdefault(site)
            return hidden

        def look(wanted: str, site: str, hidden: Tensor) -> Tensor:
            if site == wanted and running:
                key, labels = running[0]
                self._statistics[key].update(site, *labels.select(hidden, site))
            return self._erased(site, hidden) if site in self.fits else hidden

        self._pass_over("its first batch", self._batches[:1], note, running)
        visited = max(self.task.processes.gathered([list(order)]), key=len)
        for site in [*visited, *(site for site in self.task.layers if site not in visited)]:
            if site not in self.fits:
                self._pass_over(f"its batches to {site!r}", self._batches, functools.partial(look, site), running)
                self._solve(site)
            shown.update()

    def _pass_over(
        self,
        what: str,
        batches: list[tuple[str, BatchLabels]],
        observer: SiteObserver,
        running: list[tuple[str, BatchLabels]],
    ) -> None:
        """Run over batches; `running` holds the one that runs, and nothing where that only keeps up with others."""
        with (
            self.task.processes.agreeing(f"running over {what}"),
            observed(self.task.layers, self.task.name, observer),
        ):
            for batch, counts in self.task.in_step(batches):
                running[:] = [batch] if counts else []
                self.task.runner(batch[1].batch)

    # ---- one site ---------------------------------------------------------------------------------------------------

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
