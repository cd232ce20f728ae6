"""Concept scrubbing: every eraser is fitted on activations that are already erased upstream.

Arxiv 2306.03819, section 5. Fitting all sites in one pass leaves the concept readable in deeper layers, because erasing
upstream changes what arrives there. Here all batches stop at a site, its eraser is fitted on them, and they go on with
erased activations; every module runs once a batch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from tqdm import tqdm

from hf_erasure.erasers import apply_erasure
from hf_erasure.models.model import evaluating
from hf_erasure.models.runner import TextTooLong

from .activation_offload import Shelf
from .batch_threads import Lane, lanes
from .checkpoint import Digest, together
from .labels import BatchLabels, Source, check_batch
from .sites import SiteFit, SiteStatistics, Tally, bar, check_reached, observed, share_out, solve_site
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
        self._tallies: dict[str, Tally] = {}
        self._labels: list[tuple[str, BatchLabels]] = []
        self._batches: list[dict[str, Any]] = []
        self._digest, self._data = Digest(), ""

    def fit(self, sources: Iterable[Source]) -> tuple[dict[str, SiteFit], Tally]:
        """Fit all sites.

        Args:
            sources: Labelled batches of every concept that is erased, and perhaps a background; in each process its
                own. All are held, and of the activations those of `task.resident_batches`.

        Returns:
            Site → its fit, and how much labelled data was seen.

        Raises:
            ValueError: If there is no data, a site is never reached, or its rows cannot be used.
            RuntimeError: If the model fails on a batch, or another process failed.
        """
        task, processes = self.task, self.task.processes
        with processes.agreeing("reading its batches"):
            for source in sources:
                self._take(source)
        self._tallies = {key: tally.pooled(processes) for key, tally in self._tallies.items()}
        for key, source in self._sources.items():
            check_reached({}, self._tallies[key], [], source)
        self._data = together(processes.gathered([self._data]))
        many = task.runner.is_sharded
        if task.checkpoint is not None:
            checkpoint, data = task.checkpoint, self._data
            self.fits, once = processes.on_main(
                lambda: (checkpoint.load_sites(data), checkpoint.one_site_a_pass), "reading the checkpoint"
            )
            self._kept, many = set(self.fits), many or once
        title = f"scrubbing {task.name}"
        with evaluating(task.runner.model), bar(title, task.progress, processes, " sites") as shown:
            shown.reset(len(task.layers))
            if not many:
                many = not self._side_by_side(shown)
            if many:
                shown.reset(len(task.layers))
                self._one_site_a_pass(shown)
        labelled = [source for source in self._sources.values() if source.labelled]
        check_reached(self.fits, self._tallies[labelled[0].key], task.layers, labelled[0])
        return self.fits, Tally.sum(self._tallies[source.key] for source in labelled)

    def _take(self, source: Source) -> None:
        self._sources[source.key], self._tallies[source.key] = source, Tally()
        for position, batch in enumerate(source.batches):
            batch = check_batch(batch, position, labelled=source.labelled)
            self._labels.append((source.key, source.labels_of(batch, self.task.pool.name)))
            self._batches.append(batch)
            self._tallies[source.key].count(batch)
            if self.task.checkpoint is not None:
                self._data = self._digest.update(batch)

    # ---- every module once ------------------------------------------------------------------------------------------

    def _side_by_side(self, shown: tqdm) -> bool:
        """Fit in one pass; False if the model calls a site in a way for which that is not the definition."""
        forwards = [functools.partial(self.task.runner, batch) for batch in self._batches]
        running: list[Lane] = []

        def observer(site: str, hidden: Tensor) -> Tensor:
            lane = running[0]
            if site in lane.visited:
                raise _OutOfStep(f"{site!r} is called several times in one forward pass.")
            if site in self._kept:
                lane.visited.append(site)
            elif site in self.fits:
                raise _OutOfStep(f"{site!r} is reached in different orders by different batches.")
            else:
                lane.stop(site, hidden)
            return self._erased(site, hidden)

        shelf = None if self.task.resident_batches is None else Shelf(self.task.resident_batches)
        try:
            with observed(self.task.layers, self.task.name, observer), lanes(forwards, shelf) as opened:
                self._all_to_the_end(opened, running, shelf, shown)
        except _OutOfStep as reason:
            self._give_up_one_pass(reason)
            return False
        return True

    def _all_to_the_end(self, opened: list[Lane], running: list[Lane], shelf: Shelf | None, shown: tqdm) -> None:
        """Bring the batches of all processes to the next site, fit it, let them go on, until none is left."""
        statistics, waiting = self._statistics(), opened
        while True:
            # To and fro, so that those whose tensors are in memory go first. The direction depends on the site alone:
            # sums are the same to the bit however many batches are resident, and wherever a killed fit continues.
            refusal = None
            with self.task.processes.agreeing("running over its batches"):
                try:
                    for lane in waiting if len(self.fits) % 2 == 0 else waiting[::-1]:
                        running[:] = [lane]
                        self._advance(lane, shelf)
                        if lane.site is not None and lane.hidden is not None:
                            self._look(statistics, lane.index, lane.site, lane.hidden)
                            lane.hidden = None
                except _OutOfStep as reason:
                    refusal = str(reason)
            site = self._next_stop([lane for lane in opened if not lane.finished], refusal)
            if site is None:
                return
            waiting = [lane for lane in opened if lane.site == site]
            self._solve(site, statistics)
            shown.update()

    def _next_stop(self, stopped: list[Lane], refusal: str | None) -> str | None:
        """The site to fit next, the same in all processes; None when all batches have come to the end.

        Raises:
            _OutOfStep: If a batch of any process cannot be fitted so.
        """
        order = list(self.task.layers)
        # Where a batch skips a module, others wait further up: the first in the model's order comes first.
        first = min((order.index(lane.site) for lane in stopped if lane.site is not None), default=None)
        reached = self.task.processes.gathered([(first, refusal)])
        for _, reason in reached:
            if reason is not None:
                raise _OutOfStep(reason)
        return min((order[index] for index, _ in reached if index is not None), key=order.index, default=None)

    def _give_up_one_pass(self, reason: _OutOfStep) -> None:
        logger.warning(
            "%s Its eraser has to be fitted on all its visits together, so the sites are fitted one a pass: %d passes "
            "over the data instead of one.",
            reason,
            len(self.task.layers),
        )
        self.fits.clear()
        self._kept.clear()
        if self.task.checkpoint is not None and self.task.processes.is_main:
            self.task.checkpoint.begin_one_site_a_pass()

    def _advance(self, lane: Lane, shelf: Shelf | None) -> None:
        """Let one batch run on; what its forward pass raises is told with the place where it stood.

        Raises:
            RuntimeError: If the model failed.
        """
        if shelf is not None and lane.live is not None:
            shelf.fetch(lane.live)
        try:
            lane.advance()
        except _OutOfStep:
            raise
        except TextTooLong as error:
            raise TextTooLong(f"Batch {lane.index}: {error}") from error
        except Exception as error:
            place = f"after {lane.visited[-1]!r}" if lane.visited else "before the first site"
            raise RuntimeError(f"Batch {lane.index} failed {place}: {type(error).__name__}: {error}") from error
        if shelf is not None and lane.live is not None and lane.finished:
            shelf.drop(lane.live)

    # ---- the naive procedure ----------------------------------------------------------------------------------------

    def _one_site_a_pass(self, shown: tqdm) -> None:
        """Fit each site with all sites before it erased; the definition, for sites that are called several times."""
        for site in self._order():
            if site not in self.fits:
                self._solve(site, self._pass_over(site))
            shown.update()

    def _pass_over(self, site: str) -> dict[str, SiteStatistics]:
        """One pass over all batches, with every fitted site erased, for the moments at one site."""
        statistics, current = self._statistics(), [-1]

        def observer(at: str, hidden: Tensor) -> Tensor:
            if at == site and current[0] >= 0:
                self._look(statistics, current[0], at, hidden)
            return self._erased(at, hidden) if at in self.fits else hidden

        with (
            self.task.processes.agreeing(f"running over its batches to {site!r}"),
            observed(self.task.layers, self.task.name, observer),
        ):
            for (index, batch), counts in self.task.in_step(enumerate(self._batches)):
                current[0] = index if counts else -1
                self.task.runner(batch)
        return statistics

    def _order(self) -> list[str]:
        """The sites in the order of their first visit, the same in all processes."""
        order: dict[str, None] = {}

        def observer(site: str, hidden: Tensor) -> Tensor:
            order.setdefault(site)
            return hidden

        with (
            self.task.processes.agreeing("running over its first batch"),
            observed(self.task.layers, self.task.name, observer),
        ):
            for batch, _ in self.task.in_step(self._batches[:1]):
                self.task.runner(batch)
        visited = max(self.task.processes.gathered([list(order)]), key=len)
        return [*visited, *(site for site in self.task.layers if site not in visited)]

    # ---- one site ---------------------------------------------------------------------------------------------------

    def _statistics(self) -> dict[str, SiteStatistics]:
        """Moments of the rows of each source."""
        return {key: SiteStatistics(source.z_dim) for key, source in self._sources.items()}

    def _look(self, statistics: dict[str, SiteStatistics], index: int, site: str, hidden: Tensor) -> None:
        key, labels = self._labels[index]
        aligned, selection = labels.select(hidden, site)
        statistics[key].update(site, aligned, selection)

    def _solve(self, site: str, statistics: dict[str, SiteStatistics]) -> None:
        labelled, background = [], None
        for key, source in self._sources.items():
            statistics[key].pool(self.task.processes, [site])
            check_reached(statistics[key].moments, self._tallies[key], [site], source)
            # The moments are let go: only one site's are ever held.
            moments = statistics[key].moments.pop(site)
            if source.labelled:
                labelled.append(moments)
                dtype = statistics[key].dtypes[site]
            else:
                background = moments
        solve = functools.partial(solve_site, site, labelled, background, dtype, self.task.config)
        self.fits[site] = share_out(self.task.processes, {site: solve})[site]
        if self.task.checkpoint is not None and self.task.processes.is_main:
            self.task.checkpoint.save_site(site, self.fits[site], self._data)

    def _erased(self, site: str, hidden: Tensor) -> Tensor:
        return apply_erasure(hidden, *self.fits[site].parts(hidden.device))
