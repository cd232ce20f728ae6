"""Fit an erasure adapter in closed form: `fit_concept_erasure`, from its batches to its report.

Fitting all sites on one plain pass leaves the concept readable in deeper layers, because erasing upstream changes what
arrives there. Concept scrubbing (arXiv 2306.03819, section 5) fits every eraser on activations that are already erased
upstream: all batches stop at a site, its eraser is fitted on them, and they go on with erased activations; every module
runs once a batch.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_erasure._version import __version__
from hf_erasure.adapters import ErasureLayer
from hf_erasure.adapters.common.acting import active_beside, warn_of_what_is_off
from hf_erasure.adapters.common.config import RECORD
from hf_erasure.adapters.common.model_state import take_off
from hf_erasure.adapters.common.tuner import exactly
from hf_erasure.adapters.loading.fingerprint import fingerprint
from hf_erasure.models.model import class_name, evaluating

from .batch_threads import BatchThread, OutOfStep, batch_threads
from .checkpoint import FitCheckpoint, MomentsOfAPass, digest_of, together
from .dataloader import ConceptCollator
from .heldout import RowsSeen, measure
from .labels import BatchLabels, Source
from .layouts import observed
from .report import ErasureReport
from .sites import FitTask, SiteFit, residual_of, solve, task_for, visit_of, visits_of

logger = logging.getLogger(__name__)
# What is left at a visit counts for rounding up to here, as a share of |x| |z|: activations in float32 that went
# through several blocks differ by about so much of their size.
SETTLED = 1e-5
# A fit that has not settled after so many passes over the data will not.
_MOST_PASSES = 12


def fit_concept_erasure(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str = "default",
    *,
    sequential: bool = True,
    pool: str | None = None,
    eval_batches: Iterable[Any] | None = None,
    background: Iterable[Any] | None = None,
    resident_batches: int | None = None,
    checkpoint_dir: str | Path | None = None,
    progress: bool = True,
) -> ErasureReport:
    """Estimate the erasers of an adapter from labelled data and put them in place.

    Under `torchrun` or `accelerate launch` every process gives batches of its own: their shares of the data
    (`concept_dataloader(…, split_between_processes=True)`). The statistics are added, so that all processes end with
    the same erasers, those that one process would find on all the data. A share may be empty.

    Args:
        model: A model with a `ConceptErasureConfig` adapter, or whatever it is inside of: a `PeftModel`, a
            `SentenceTransformer`, `DataParallel`, DDP, FSDP, a compiled model, a module of your own.
        batches: Dicts of model inputs plus `concept_labels`: `(batch,)` class ids for whole sequences, `(batch, seq)`
            class ids for tokens with −100 = ignore, or floats `(…, concept_dim)`. Padding never counts.
        adapter_name: The adapter to fit. Other active adapters stay active while it is, and are written down in its
            provenance; loaded ones that are off are named in a warning.
        sequential: Fit each site on activations that are already erased upstream (concept scrubbing, arXiv 2306.03819
            section 5). `False` fits all sites in one pass.
        pool: Which rows a sequence label counts for: `"tokens"` (all alike), `"mean"` (each weighted 1/length, so that
            the mean-pooled embedding is guarded), `"cls"` (the first) or `"last"` (the last real one). By default what
            the model's head reads, or the pooling module of a SentenceTransformer; it is found by one backward from
            the logits of two rows of the first batch. A bare model has no head: all tokens alike. Labels of tokens
            always count for their token.
        eval_batches: Held-out batches to measure leakage and distortion on.
        background: Unlabelled batches to take the covariance and the mean from. They decide how little other text is
            disturbed, and never touch the guarantee.
        resident_batches: In sequential fitting, how many batches keep their activations in memory; those of the others
            wait on disk (of an accelerator: in main memory). All when None. The erasers are the same for any number.
        checkpoint_dir: A folder where finished sites, or the moments of one pass, are kept. A fit that was killed and
            is started again with the same batches in the same order continues there, and ends with the same erasers.
        progress: Show progress bars, on the main process.

    Returns:
        An `ErasureReport`, one line a site and one for `last_hidden_state`. With `eval_batches` also one for each visit
        of a module that is called several times in one forward pass.

    Raises:
        ValueError: If the adapter, the batches or the labels do not fit; the adapter is as it was then.
    """
    check_resident(resident_batches, sequential)
    task, labelled = task_for(model, adapter_name, batches, pool, progress=progress)
    collator = getattr(batches, "collate_fn", None)
    if isinstance(collator, ConceptCollator):
        collator.check_labels(task.config.labels)
    warn_of_what_is_off(model, adapter_name)
    checkpoint = None
    if checkpoint_dir is not None:
        with task.processes.agreeing("opening checkpoint_dir"):
            checkpoint = FitCheckpoint(
                checkpoint_dir,
                task.config,
                task.layers,
                pool=task.pool,
                sequential=sequential,
                processes=task.processes.count,
                active=active_beside(model, adapter_name),
            )
    rows = None if eval_batches is None else RowsSeen()
    source = Source(task.config, labelled if rows is None else rows.watching(labelled))
    fits = solved(
        task,
        [source],
        background,
        sequential=sequential,
        resident_batches=resident_batches,
        checkpoint=checkpoint,
    )
    left_out = [site for site in task.layers if site not in fits]
    report = conclude(task, [source], fits, eval_batches, rows)
    if left_out and checkpoint is not None and task.processes.is_main:
        checkpoint.leave_out(left_out)
    task.config.provenance["data"] = dict(getattr(collator, "origin", {}))
    return report


def check_resident(resident_batches: int | None, sequential: bool) -> None:
    """Raise a `ValueError` for a number of resident batches that makes no sense."""
    if resident_batches is not None and (not sequential or resident_batches < 1):
        raise ValueError(
            f"resident_batches={resident_batches}: give at least 1, and only with sequential=True; a fit in one pass "
            "holds one batch at a time anyway."
        )


def solved(
    task: FitTask,
    labelled: list[Source],
    background: Iterable[Any] | None,
    *,
    sequential: bool,
    resident_batches: int | None = None,
    checkpoint: FitCheckpoint | None = None,
) -> dict[str, SiteFit]:
    """The erasers of all sites; options are those of `fit_concept_erasure`.

    Raises:
        ValueError: If there is no data, a site is never reached, or its rows cannot be used.
        RuntimeError: If the model fails on a batch, or another process failed.
    """
    sources = list(labelled)
    if background is not None:
        sources.append(Source(None, background, "background", "background"))
    if sequential:
        return Scrubber(task, sources, resident_batches, checkpoint).fit()
    sites = list(task.layers)
    for source in sources:
        _gather(task, source, checkpoint)
        sites = source.check_reached(sites, may_lack=task.may_lack and source.concept is not None)
    return solve(task, sites, sources)


# ---- all sites in one pass -------------------------------------------------------------------------------------------


def _gather(task: FitTask, source: Source, checkpoint: FitCheckpoint | None) -> None:
    """Run the model over the batches of a source, with the adapter left out, and collect the moments at its sites.

    Every process runs over batches of its own; all end with the moments of all. Batches that the moments of a
    checkpoint hold already are passed over.
    """
    processes, kept = task.processes, None

    def look(labels: BatchLabels | None, site: str, visit: int, hidden: Tensor) -> Tensor:
        if labels is not None and (labels.covers(site) or not task.may_lack):
            source.update(visit_of(site, visit), *labels.select(hidden, site))
        return hidden

    def keep(labels: BatchLabels) -> None:
        shown.update(labels.rows)
        if kept is not None:
            kept.save()

    with processes.agreeing("running over its batches"):
        batches = source.read(task.pool, task.layouts)
        if checkpoint is not None:
            kept = MomentsOfAPass(checkpoint, source, processes)
            batches = kept.remaining(batches)
        what = f"fitting {task.name}" if source.concept else "background"
        with evaluating(task.runner.model), tqdm(desc=what, unit=" rows", disable=not task.progress) as shown:
            task.run_over(batches, look, keep)
        if kept is not None:
            kept.save(final=True)
    source.pool(processes)
    source.pool_counts(processes)
    if kept is not None:
        kept.save_sum()


# ---- one site after another ------------------------------------------------------------------------------------------


@dataclass
class Scrubber:
    """Fits the sites of one adapter in the order in which the model reaches them.

    All batches of the sources are held.

    Attributes:
        task: What is fitted.
        sources: What it is fitted on.
        resident_batches: How many batches keep their activations in memory; all when None.
        checkpoint: Where finished sites are kept, if anywhere; those that are there are not fitted again.
        fits: Site → its fit, so far.
    """

    task: FitTask
    sources: list[Source]
    resident_batches: int | None = None
    checkpoint: FitCheckpoint | None = None
    fits: dict[str, SiteFit] = field(default_factory=dict, init=False)
    _batches: list[BatchLabels] = field(default_factory=list, init=False)
    _running: BatchThread = field(init=False)
    # Sites that the checkpoint had, and what identifies the batches that they were fitted on.
    _kept: set[str] = field(default_factory=set, init=False)
    _data: str = field(default="", init=False)
    # Sites that nobody has named, and that the labels do not speak of.
    _left_out: set[str] = field(default_factory=set, init=False)

    def fit(self) -> dict[str, SiteFit]:
        """Fit all sites, with every module run once a batch where the model calls its sites so that this is right."""
        task, processes, checkpoint = self.task, self.task.processes, self.checkpoint
        with processes.agreeing("reading its batches"):
            self._batches += [labels for source in self.sources for labels in source.read(task.pool, task.layouts)]
        for source in self.sources:
            source.pool_counts(processes)
            source.check_reached(())
        self._left_out = self.sources[0].uncovered - self.sources[0].covered if task.may_lack else set()
        one_by_one = task.runner.is_sharded
        if checkpoint is not None:
            self._data = together(processes.gathered([digest_of(self._batches)]))
            with processes.agreeing("reading the checkpoint"):
                finished = checkpoint.load_sites(self._data) if processes.is_main else {}
                one_by_one = one_by_one or checkpoint.one_site_a_pass
            kept, one_by_one = processes.from_one((finished, one_by_one))
            self.fits = task.along(kept)
            self._kept = set(self.fits)
        shown = tqdm(desc=f"scrubbing {task.name}", unit=" sites", disable=not task.progress)
        with evaluating(task.runner.model), shown:
            shown.reset(len(task.layers))
            try:
                if not one_by_one:
                    self._side_by_side(shown)
            except OutOfStep as reason:
                one_by_one = True
                self._start_over(reason)
                shown.reset()
            if one_by_one:
                self._one_site_a_pass(shown)
        self.sources[0].check_reached(task.layers, self.fits, may_lack=task.may_lack)
        return self.fits

    def _start_over(self, reason: OutOfStep) -> None:
        logger.warning(
            "%s Its eraser has to be fitted on all its visits together, so the sites are fitted one a pass: %d passes "
            "over the data instead of one.",
            reason,
            len(self.task.layers),
        )
        self.fits.clear()
        self._kept.clear()
        for source in self.sources:
            source.moments.clear()
        if self.checkpoint is not None and self.task.processes.is_main:
            self.checkpoint.begin_one_site_a_pass()

    def _stop_at(self, site: str, hidden: Tensor) -> Tensor:
        """Let the running batch wait at a site until its eraser is there; called in the batch's thread."""
        thread = self._running
        if site in self._left_out:
            return hidden
        if site in thread.visited:
            raise OutOfStep(f"{site!r} is called several times in one forward pass.")
        if site in self._kept:
            thread.visited.append(site)
        elif site in self.fits:
            raise OutOfStep(f"{site!r} is reached in different orders by different batches.")
        else:
            thread.stop(site, hidden)
        return self.fits[site].erase(hidden) if site in self.fits else hidden

    def _side_by_side(self, shown: tqdm) -> None:
        """Bring the batches of all processes to the next site, fit it, let them go on, until none is left.

        Raises:
            OutOfStep: If a batch of any process calls a site in a way that this does not allow for.
        """
        forwards = [functools.partial(self.task.runner, labels.batch) for labels in self._batches]
        with (
            observed(self.task.layers, self.task.name, self._stop_at),
            batch_threads(forwards, self.resident_batches) as threads,
        ):
            waiting = threads
            while (site := self._next_stop(threads, waiting)) is not None:
                waiting = [thread for thread in threads if thread.site == site]
                self._pool(site)
                self._solve([] if site in self._left_out else [site])
                shown.update()

    def _next_stop(self, threads: list[BatchThread], waiting: list[BatchThread]) -> str | None:
        """Let the batches that wait run to their next sites; returns the one to fit next, in all processes the same."""
        processes, order, refusal = self.task.processes, list(self.task.layers), None
        with processes.agreeing("running over its batches"):
            try:
                # To and fro, so that those whose tensors are in memory go first. The direction depends on the site
                # alone: sums are the same to the bit however many batches are resident, and wherever a killed fit
                # continues.
                for thread in waiting if len(self.fits) % 2 == 0 else waiting[::-1]:
                    self._running = thread
                    thread.advance()
                    if thread.site is not None and thread.hidden is not None:
                        labels = self._batches[thread.index]
                        labels.source.update(thread.site, *labels.select(thread.hidden, thread.site))
                        thread.hidden = None
            except OutOfStep as reason:
                refusal = str(reason)
        # Where a batch skips a module, others wait further up: the first in the model's order comes first.
        first = min((order.index(thread.site) for thread in threads if thread.site is not None), default=None)
        reached = processes.gathered([(first, refusal)])
        for _, refused in reached:
            if refused is not None:
                raise OutOfStep(refused)
        stops = [index for index, _ in reached if index is not None]
        return order[min(stops)] if stops else None

    def _one_site_a_pass(self, shown: tqdm) -> None:
        """Fit each site with all sites before it erased; the definition, for sites that are called several times."""
        task, processes = self.task, self.task.processes
        order: dict[str, None] = {}

        def note(labels: BatchLabels | None, site: str, visit: int, hidden: Tensor) -> Tensor:
            order.setdefault(site)
            return hidden

        with processes.agreeing("running over its first batch"):
            task.run_over(self._batches[:1], note)
        visited = max(processes.gathered([list(order)]), key=len)
        for site in [*visited, *(site for site in task.layers if site not in visited)]:
            if site not in self.fits and site not in self._left_out:
                self._gather([site])
                self._solve([] if site in self._left_out else [site])
            shown.update()
        if any(fit.line.visits > 1 for fit in self.fits.values()):
            self._settle()

    def _gather(self, sites: Sequence[str]) -> None:
        """Gather the moments of some sites with all erasers that there are in place, theirs at earlier visits too."""

        def look(labels: BatchLabels | None, site: str, visit: int, hidden: Tensor) -> Tensor:
            if site in sites and labels is not None:
                labels.source.update(visit_of(site, visit), *labels.select(hidden, site))
            return self.fits[site].erase(hidden) if site in self.fits else hidden

        with self.task.processes.agreeing(f"running over its batches to {sites[0]!r}"):
            self.task.run_over(self._batches, look)
        for site in sites:
            self._pool(site)

    def _settle(self) -> None:
        """Fit all sites again while a module is called several times, until nothing but rounding is left anywhere.

        An eraser changes what arrives at later visits of its module, and through them what arrives at others. Those
        that leave least are kept, and what they leave is said.
        """
        best, least, sites = dict(self.fits), float("inf"), list(self.fits)
        for _ in range(_MOST_PASSES):
            self._gather(sites)
            left = {site: self._left(site) for site in sites}
            for site, fit in self.fits.items():
                if fit.line.visits > 1:
                    self.fits[site] = replace(fit, line=replace(fit.line, residual=left[site]))
            if max(left.values()) < least:
                best, least = dict(self.fits), max(left.values())
            if least <= SETTLED:
                break
            self._solve([site for site in sites if left[site] > SETTLED])
        for source in self.sources:
            source.moments.clear()
        self.fits = best
        for site in sites:
            self._save(site)

    def _left(self, site: str) -> float:
        """The most that the eraser of a site leaves at a visit, by the moments that were gathered."""
        parts = [source.moments[key] for source in self.sources if source.concept for key in visits_of(site, [source])]
        return max(residual_of(self.fits[site].eraser, part) for part in parts)

    def _pool(self, site: str) -> None:
        """Make the moments of a site those of all processes; it is left out if it may be and has none."""
        processes = self.task.processes
        keys = max(processes.gathered([visits_of(site, self.sources)]), key=len)
        for source in self.sources:
            source.pool(processes, keys)
            if source.concept and self.task.may_lack and site not in source.moments:
                self._left_out.add(site)
                return
            source.check_reached([site])

    def _solve(self, sites: Sequence[str]) -> None:
        """The erasers of sites from the moments that were gathered, which are then let go."""
        self.fits |= solve(self.task, sites, self.sources)
        for source in self.sources:
            source.moments.clear()
        for site in sites:
            self._save(site)

    def _save(self, site: str) -> None:
        if self.checkpoint is not None and self.task.processes.is_main:
            self.checkpoint.save_site(site, self.fits[site], self._data)


# ---- what becomes of them --------------------------------------------------------------------------------------------


def conclude(
    task: FitTask,
    labelled: list[Source],
    fits: dict[str, SiteFit],
    eval_batches: Iterable[Any] | None = None,
    rows: RowsSeen | None = None,
) -> ErasureReport:
    """Measure the erasers on held-out batches, put them in place, and write down what was done.

    Sites without an eraser are left out: the adapter is taken off them.
    """
    left_out = {site: layer for site, layer in task.layers.items() if site not in fits}
    task.layers = {site: layer for site, layer in task.layers.items() if site in fits}
    config, lines, examples, fitted = task.config, [fits[site].line for site in task.layers], 0, 0
    if eval_batches is not None:
        lines, examples, fitted = measure(
            task, eval_batches, lambda site, hidden: fits[site].erase(hidden), lines, rows
        )
    for site, layer in task.layers.items():
        layer.set_eraser(task.name, fits[site].eraser, fits[site].dtype, fits[site].axis)
    report = ErasureReport(
        concept=config.concept,
        adapter_name=task.name,
        method=config.method,
        pool=task.pool,
        reader=task.reader,
        examples=sum(source.examples for source in labelled),
        tokens=sum(source.tokens for source in labelled),
        eval_examples=examples,
        eval_fitted=fitted,
        sites=lines,
    )
    _record(task, fits, report)
    if left_out:
        _leave_out(task, left_out, labelled[0].uncovered)
    left = {line.site: line.residual for line in lines if line.residual is not None and line.residual > SETTLED}
    if left:
        worst = max(left, key=lambda site: left[site])
        warnings.warn(
            f"{worst!r} is called several times in one forward pass, and no eraser was found that leaves nothing at "
            f"each: {left[worst]:.1g} of |x| |z| is left, there and at {len(left) - 1} other sites at most. The "
            "guarantee does not hold there: name other target_modules.",
            stacklevel=3,
        )
    # Shares of the classes, the same at every site.
    shares = next(iter(fits.values())).shares.tolist()
    absent = [label for label, share in zip(config.labels or (), shares, strict=False) if share == 0]
    if absent:
        warnings.warn(
            f"No row was labelled {absent} while fitting {config.concept!r}: those classes are not guarded.",
            stacklevel=3,
        )
    return report


def _leave_out(task: FitTask, layers: dict[str, ErasureLayer], uncovered: set[str]) -> None:
    """Take an adapter off sites that nobody has named, and say which, and why."""
    take_off(layers.values(), task.name)
    task.config.target_modules = exactly(list(task.layers), task.owner)
    unlabelled = [site for site in layers if site in uncovered]
    unreached = [site for site in layers if site not in uncovered]
    told = [f"the batches do not reach {unreached}"] if unreached else []
    told += [f"concept_labels label tokens, which are not the rows of {unlabelled}"] if unlabelled else []
    warnings.warn(
        f"{task.name!r} leaves out {len(layers)} of its default sites, and does not act there: {'; '.join(told)}.",
        stacklevel=4,
    )


def _record(task: FitTask, fits: dict[str, SiteFit], report: ErasureReport) -> None:
    """What the saved adapter says about itself."""
    config = task.config
    config.fitted_sites = {site: task.layers[site].size_of(task.name) for site in fits}
    config.fitted = True
    config.provenance = {
        "hf_erasure_version": __version__,
        "base_class": class_name(task.owner),
        "examples": report.examples,
        "tokens": report.tokens,
        "pool": report.pool,
        "reader": report.reader,
        "leakage": report.leakage,
        "leakage_intervals": report.leakage_intervals,
        "measured_on": report.measured_on,
        "fingerprint": fingerprint(task.owner, list(fits)),
        RECORD: active_beside(task.runner.model, task.name),
    }
