"""Concept scrubbing (arXiv 2306.03819, section 5): every eraser is fitted on activations that are erased upstream.

All batches stop at a site, its eraser is fitted on them, and they go on with erased activations; every module runs once
for each batch. If a module is called several times in one forward pass, its eraser acts at every visit, but must be
known at the first. So the fit assumes that later visits are as in the pass before, and repeats passes until they are.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_erasure.erasers import ConceptMoments, Eraser
from hf_erasure.models.layout import Visit
from hf_erasure.models.model import evaluating, on_cpu

from .checkpoint import FitCheckpoint, digest_of, joint_digest
from .forward_passes import ForwardPass, OutOfStep, forward_passes
from .labels import BatchesOnDisk, BatchLabels, SiteStatistics, Source
from .layouts import observed
from .report import SETTLED
from .sites import FitTask, SiteFit, solve

logger = logging.getLogger(__name__)

# The most passes over the data in one fit. With four visits an ALBERT of width 128 takes 22; a wider model takes fewer.
MOST_PASSES = 60
# A fit is stuck if it has not halved what is left in this many passes. An ALBERT of width 32, which settles, takes 6.
PATIENCE = 8
# How many of the latest passes are combined. The erasers of earlier passes are too different to be of use.
_MEMORY = 20
# Singular values of the changes below this share of the largest are not divided by.
_CUTOFF = 1e-8


@dataclass
class Scrubber:
    """Fits the sites of one adapter in the order in which the model reaches them.

    All batches of the sources are held: on disk if `resident_batches` is given, else in memory.
    """

    task: FitTask  # What is fitted.
    sources: list[Source]  # What it is fitted on.
    resident_batches: int | None = None  # How many batches keep their activations in memory; None for the default.
    # Holds finished sites, which are not fitted again.
    checkpoint: FitCheckpoint | None = None
    fits: dict[str, SiteFit] = field(default_factory=dict, init=False)  # Site → its fit, so far.
    _batches: Sequence[BatchLabels] = field(default=(), init=False)
    _running: ForwardPass = field(init=False)
    # Sites that the checkpoint had, and the digest of the batches that they were fitted on.
    _restored: set[str] = field(default_factory=set, init=False)
    _digest: str = field(default="", init=False)
    # Sites that the user did not name, and whose rows have no labels.
    _left_out: set[str] = field(default_factory=set, init=False)
    _one_by_one: bool = field(default=False, init=False)
    # Key of a source → its statistics of later visits as they are in this pass, and as the erasers assume them.
    _later: dict[str, SiteStatistics] = field(default_factory=dict, init=False)
    _assumed: dict[str, SiteStatistics] = field(default_factory=dict, init=False)

    def fit(self) -> dict[str, SiteFit]:
        """Fit all sites, with one run of every module for each batch if the order of the model's calls allows it."""
        task, processes, checkpoint = self.task, self.task.processes, self.checkpoint
        with processes.fail_together("reading its batches"):
            read = (labels for source in self.sources for labels in source.read(task.pool, task.layouts))
            self._batches = list(read) if self.resident_batches is None else BatchesOnDisk(read)
        for source in self.sources:
            source.pool_counts(processes)
            source.check_reached(())
        if task.config.has_default_targets:
            self._left_out = self.sources[0].uncovered - self.sources[0].covered
        self._one_by_one = task.runner.is_sharded
        if checkpoint is not None:
            self._digest = joint_digest(processes.gathered([digest_of(self._batches)]))
            with processes.fail_together("reading the checkpoint"):
                finished = checkpoint.load_sites(self._digest) if processes.is_main else {}
                self._one_by_one = self._one_by_one or checkpoint.one_site_a_pass
            kept, self._one_by_one = processes.broadcast((finished, self._one_by_one))
            self.fits = {site: replace(fit, **task.layouts.site_axes(site)) for site, fit in kept.items()}
            self._restored = set(self.fits)
        shown = tqdm(desc=f"scrubbing {task.name}", unit=" sites", disable=not task.progress)
        with evaluating(task.runner.model), shown:
            self._fit_until_settled(shown)
        self.sources[0].check_reached(task.layers, self.fits, may_lack=task.config.has_default_targets)
        return self.fits

    # ---- passes over the data ----------------------------------------------------------------------------------------

    def _fit_until_settled(self, shown: tqdm) -> None:
        """Fit all sites, and repeat it as long as erasers change what arrives at later visits of their modules.

        The erasers that leave least are kept, and their report lines say what they leave.
        """
        columns, best, lowest, worst_by_pass = Columns(), dict[str, SiteFit](), float("inf"), list[float]()
        # INLP, and a rank below what the guarantee needs, leave a part of the concept in any case.
        config = self.task.config
        most_passes = MOST_PASSES if config.rank is None and config.method != "inlp" else 2
        labelled = [source for source in self.sources if source.concept]
        for number in itertools.count(1):
            self._run_pass(shown)
            residuals: dict[str, list[float]] = {}  # Site → what is left at its later visits.
            for source in labelled:
                for visit, moments in self._later[source.key].moments.items():
                    if not visit.of_pairs:  # the guarantee is about the labelled rows
                        own = source.strata.concept(moments)
                        share = residual_of(self.fits[visit.site].eraser, own).norm() / scale_of(own)
                        residuals.setdefault(visit.site, []).append(float(share))
            for site, each in residuals.items():
                line = replace(self.fits[site].line, residual=max(each), visits=1 + len(each) // len(labelled))
                self.fits[site] = replace(self.fits[site], line=line)
            worst = max(map(max, residuals.values()), default=0.0)
            if worst < lowest:
                best, lowest = dict(self.fits), worst
            worst_by_pass.append(worst)
            stuck = len(worst_by_pass) > PATIENCE and min(worst_by_pass) > min(worst_by_pass[:-PATIENCE]) / 2
            if worst <= SETTLED or (stuck and columns.adds_residual) or number == most_passes:
                break
            if number == 1:
                logger.warning(
                    "Modules are called several times in one forward pass (%s), so that erasers change what arrives at "
                    "later visits: at most %d more passes over the data follow.",
                    ", ".join(sorted({visit.site for later in self._later.values() for visit in later.moments})[:3]),
                    most_passes - 1,
                )
            logger.info("Pass %d over the data left at most %.1g of |x| |z| at a later visit.", number, worst)
            self._assumed = self.task.processes.broadcast(columns.next(self._later, self.fits, stuck=stuck))
            worst_by_pass = worst_by_pass[:1] if stuck else worst_by_pass
            self.fits.clear()
            self._restored.clear()
        self.fits = best

    def _run_pass(self, shown: tqdm) -> None:
        """Fit every site on its first visit and on the assumed later visits, and gather the real later visits.

        If this fails with the sites of a checkpoint, they are fitted again; otherwise one site is fitted per pass.
        """
        while True:
            shown.reset(len(self.task.layers))
            self._later = {s.key: SiteStatistics(s.concept) for s in self.sources}
            try:
                self._one_site_a_pass(shown) if self._one_by_one else self._side_by_side(shown)
                break
            except OutOfStep as reason:
                if not self._restored:
                    more = "%s So one site is fitted per pass: %d passes over the data instead of one."
                    logger.warning(more, reason, len(self.task.layers) + 1)
                    self._one_by_one = True
                    if self.checkpoint is not None and self.task.processes.is_main:
                        self.checkpoint.begin_one_site_a_pass()
            self.fits.clear()
            self._restored.clear()
            for source in self.sources:
                source.moments.clear()
        for later in self._later.values():
            later.pool(self.task.processes)

    # ---- side by side ------------------------------------------------------------------------------------------------

    def _side_by_side(self, shown: tqdm) -> None:
        """Bring the batches of all processes to the next site, fit it and let them go on, until all have ended."""
        task, order = self.task, list(self.task.layers)
        running = forward_passes(task.runner, self._batches, self.resident_batches)
        with observed(task.layers, task.name, self._stop_at), running as passes:
            waiting = passes
            while True:
                refusal = None
                with task.processes.fail_together("running over its batches"):
                    try:
                        # In turn forwards and backwards, so that batches whose tensors are in memory go first. The
                        # direction depends on the site alone: sums are the same to the bit for any number of resident
                        # batches, and wherever a killed fit continues.
                        for forward in waiting if len(self.fits) % 2 == 0 else waiting[::-1]:
                            self._advance(forward)
                    except OutOfStep as reason:
                        refusal = str(reason)
                # If a batch skips a module, others wait at an earlier one: the first in the model's order is next.
                stops = [order.index(forward.visit.site) for forward in passes if forward.visit is not None]
                reached = task.processes.gathered([(min(stops, default=len(order)), refusal)])
                for _, refused in reached:
                    if refused is not None:
                        raise OutOfStep(refused)
                first = min(index for index, _ in reached)
                if first == len(order):
                    return
                site = order[first]
                waiting = [forward for forward in passes if forward.visit == Visit(site)]
                self._solve(site)
                shown.update()

    def _advance(self, forward: ForwardPass) -> None:
        """Let a batch run to the next site that it has not visited, and add its activations there and on the way."""
        self._running, labels = forward, self._batches[forward.index]
        while True:
            forward.advance()
            if forward.visit is None or forward.hidden is None:
                return
            is_first = forward.visit.number == 1
            (labels.source if is_first else self._later[labels.source.key]).add(forward.visit, labels, forward.hidden)
            forward.hidden = None
            if is_first:
                return

    def _stop_at(self, site: str, hidden: Tensor) -> Tensor:
        """Let the running batch wait at a site until its eraser is fitted; called within its pass."""
        forward = self._running
        if site in self._left_out:
            return hidden
        visit = Visit(site, 1 + sum(earlier.site == site for earlier in forward.visited))
        if visit.number > 1 and site in self._restored:
            raise OutOfStep(f"{site!r} was fitted before its later visits were seen.")
        if visit.number == 1 and site in self._restored:
            forward.visited.append(visit)
        elif visit.number == 1 and site in self.fits:
            raise OutOfStep(f"{site!r} is reached in different orders by different batches.")
        else:
            forward.stop(visit, hidden)
        return self.fits[site].erase(hidden) if site in self.fits else hidden

    # ---- one site per pass -----------------------------------------------------------------------------------------

    def _one_site_a_pass(self, shown: tqdm) -> None:
        """Fit each site with all sites before it erased: right by definition, in any order of the sites."""
        task = self.task
        # `widths` has the sites in the order in which a pass over a few rows reached them.
        reached = list(dict.fromkeys(visit.site for visit in task.layouts.widths))
        visited = max(task.processes.gathered([reached]), key=len)
        for site in [*visited, *(site for site in task.layers if site not in visited)]:
            if site not in self.fits and site not in self._left_out:
                self._gather_moments(site)
                self._solve(site)
            shown.update()
        self._gather_moments(None)

    def _gather_moments(self, chosen: str | None) -> None:
        """Gather moments, with the erasers so far: at first visits of a site, or with None at later visits of all."""

        def add_activation(labels: BatchLabels | None, site: str, visit: int, hidden: Tensor) -> Tensor:
            is_due = visit > 1 and site in self.fits if chosen is None else visit == 1 and site == chosen
            if labels is not None and is_due:
                statistics = labels.source if visit == 1 else self._later[labels.source.key]
                statistics.add(Visit(site, visit), labels, hidden)
            return self.fits[site].erase(hidden) if site in self.fits else hidden

        with self.task.processes.fail_together(f"running over its batches to {chosen or 'the end'!r}"):
            self.task.run_over(self._batches, add_activation)

    # ---- one site ----------------------------------------------------------------------------------------------------

    def _solve(self, site: str) -> None:
        """Solve for the eraser of a site from its moments in all processes, and free the moments.

        A site without moments is left out if the user did not name it.
        """
        statistics, visits = [], (Visit(site), Visit(site, of_pairs=True))
        for source in self.sources:
            source.pool(self.task.processes, visits)
            if source.concept and self.task.config.has_default_targets and Visit(site) not in source.moments:
                self._left_out.add(site)
                for other in self.sources:
                    for visit in visits:
                        other.moments.pop(visit, None)
                return
            source.check_reached([site])
            assumed = self._assumed[source.key].moments if self._assumed else {}
            later = {visit: moments for visit, moments in assumed.items() if visit.site == site}
            first = {visit: source.moments.pop(visit) for visit in visits if visit in source.moments}
            statistics.append(SiteStatistics(source.concept, first | later, source.dtypes))
        self.fits |= solve(self.task, [site], statistics)
        if self.checkpoint is not None and self.task.processes.is_main and not self._assumed:
            self.checkpoint.save_site(site, self.fits[site], self._digest)


# ---- later visits ----------------------------------------------------------------------------------------------------


@dataclass
class Columns:
    """The columns (covariances with the concept) at later visits of modules, pass by pass.

    An eraser acts at every visit of its module, so it changes the columns at later visits. It should remove exactly the
    columns that arrive while it acts. The columns of one pass may be removed in the next, but this rarely settles: in
    small models it leaves as much after forty passes as after four. Anderson acceleration (Walker and Ni, "Anderson
    Acceleration for Fixed-Point Iterations", 2011, doi 10.1137/10078356X) takes the combination of the passes so far
    whose changes cancel best. If almost nothing arrives once the columns are removed, the arriving columns do not tell
    which to remove; then the part that the erasers leave is added to the columns instead.
    """

    # One entry for each pass: the columns that its erasers removed at later visits, flat, in units of `|x| |z|`. The
    # last entry is that of the next pass.
    removed: list[Tensor] = field(default_factory=list)
    # One entry for each pass: the columns that its erasers should have removed. They are the columns that arrived, or
    # with `adds_residual` the columns that were removed plus what was left.
    wanted: list[Tensor] = field(default_factory=list)
    keys: list[tuple[str, Visit]] = field(default_factory=list)  # The sources and visits whose columns these are.
    adds_residual: bool = False  # Whether what is left is added.
    # The first entry of `removed`, and its entry of `wanted` with `adds_residual`.
    _first: list[Tensor] = field(default_factory=list)

    @on_cpu()
    def next(
        self, later: Mapping[str, SiteStatistics], fits: Mapping[str, SiteFit], *, stuck: bool = False
    ) -> dict[str, SiteStatistics]:
        """The later visits that the erasers of the next pass assume, from the last pass (`later`) and its erasers.

        `stuck` begins again with the columns of the first pass, and adds what is left from there on.
        """
        parts = [(of, visit, later[of].moments[visit]) for of in later for visit in sorted(later[of].moments, key=str)]
        labelled = [part for part in parts if later[part[0]].concept]
        keys = [(of, visit) for of, visit, _ in labelled]
        arrived = torch.cat([(m.cross_covariance.cpu() / scale_of(m)).flatten() for *_, m in labelled])
        left = [(residual_of(fits[visit.site].eraser, m).cpu() / scale_of(m)).flatten() for _, visit, m in labelled]
        if keys != self.keys:
            self.keys, self.removed, self.wanted, self._first, next_columns = keys, [], [], [], arrived
        else:
            added = self.removed[-1] + torch.cat(left)
            self._first = self._first or [self.removed[-1], added]
            self.wanted.append(added if self.adds_residual else arrived)
            if stuck:
                self.removed, self.wanted, self.adds_residual = self._first[:1], self._first[1:], True
            self.removed, self.wanted = self.removed[-_MEMORY:], self.wanted[-_MEMORY:]
            next_columns = _anderson_step(self.removed, self.wanted)
        self.removed.append(next_columns)
        columns = dict(zip(keys, next_columns.split([part.numel() for part in left]), strict=True))
        assumed = {of: SiteStatistics(s.concept) for of, s in later.items()}
        for of, visit, m in parts:
            if later[of].concept:
                cross = columns[of, visit].view(m.x_dim, m.z_dim) * scale_of(m)
                m = m.with_concept(m.mean_z, cross.to(m.mean_z), m.covariance_z)
            assumed[of].moments[visit] = m
        return assumed


def residual_of(eraser: Eraser, moments: ConceptMoments) -> Tensor:
    """`(x_dim, z_dim)` cross-covariance with the concept that is left after an eraser."""
    cross = moments.cross_covariance
    return cross - eraser.left.to(cross) @ (eraser.right.to(cross) @ cross)


def scale_of(moments: ConceptMoments) -> float:
    """`|x| |z|`, or 1 where nothing varies."""
    return float((moments.variance_x.sum() * moments.covariance_z.trace()).sqrt()) or 1.0


def _anderson_step(removed: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The next columns, by Anderson acceleration in its second form, without damping."""
    change = [after - before for before, after in zip(removed, wanted, strict=True)]
    if len(change) == 1:
        return wanted[-1]
    differences = torch.stack([after - before for before, after in itertools.pairwise(change)], 1)
    steps = torch.stack([after - before for before, after in itertools.pairwise(wanted)], 1)
    weights = torch.linalg.lstsq(differences, change[-1][:, None], rcond=_CUTOFF, driver="gelsd").solution
    return wanted[-1] - (steps @ weights)[:, 0]
