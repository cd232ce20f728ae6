"""Fit an erasure adapter in closed form: `fit_concept_erasure`, from its batches to its report.

What is asked for is in `task`, batches and their labels in `labels`, the sequential procedure in `scrubbing`, the one
pass here; both gather statistics of the sites and solve for their erasers as in `sites`.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_erasure._version import __version__
from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.adapters.common.fitted_with import active_beside, warn_of_what_is_off
from hf_erasure.adapters.common.provenance import RECORD
from hf_erasure.adapters.loading.fingerprint import fingerprint
from hf_erasure.models.model import class_name, evaluating

from .checkpoint import FitCheckpoint, MomentsOfAPass
from .heldout import RowsSeen, measure
from .labels import BatchLabels, Source, labelled_by
from .report import ErasureReport, SiteReport
from .scrubbing import Scrubber
from .sites import SiteFit, SiteStatistics, bar, check_reached, share_out, solve_site
from .task import FitTask, task_for


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
    if resident_batches is not None and (not sequential or resident_batches < 1):
        raise ValueError(
            f"resident_batches={resident_batches}: give at least 1, and only with sequential=True; a fit in one pass "
            "holds one batch at a time anyway."
        )
    task, labelled = task_for(model, adapter_name, batches, pool)
    task.progress, task.resident_batches = progress, resident_batches
    # What a loader of `concept_dataloader` knows of its data.
    collator = getattr(batches, "collate_fn", None)
    _check_label_order(getattr(collator, "labels", None), task.config)
    warn_of_what_is_off(model, adapter_name)
    if checkpoint_dir is not None:
        with task.processes.agreeing("opening checkpoint_dir"):
            task.checkpoint = FitCheckpoint(
                checkpoint_dir,
                task.config,
                task.layers,
                pool=task.pool.name,
                sequential=sequential,
                processes=task.processes.count,
                active=active_beside(model, adapter_name),
            )
    rows = None if eval_batches is None else RowsSeen()
    source = labelled_by(task.config, labelled if rows is None else rows.watching(labelled))
    fits, seen = solved(task, [source], background, sequential=sequential)
    report = conclude(task, fits, seen, eval_batches, rows)
    task.config.provenance["data"] = dict(getattr(collator, "origin", {}))
    return report


def _check_label_order(named: tuple[str, ...] | None, config: ConceptErasureConfig) -> None:
    """The names of the class ids, where the loader knows them, must be the adapter's."""
    if named is None or config.labels is None:
        return
    if unknown := [label for label in named if label not in config.labels]:
        raise ValueError(
            f"The batches have the class {unknown[0]!r}, and the adapter has {list(config.labels)}: name it in "
            "ConceptErasureConfig(labels=[…]), or filter its rows out of the data and write "
            "concept_dataloader(…, labels=config.labels)."
        )
    if list(named) != list(config.labels):
        raise ValueError(
            f"The batches number their classes {list(named)}, the adapter {list(config.labels)}. Give both the same "
            "order: concept_dataloader(…, labels=config.labels)."
        )


# ---- the erasers -----------------------------------------------------------------------------------------------------


def solved(
    task: FitTask, sources: list[Source], background: Iterable[Any] | None, *, sequential: bool
) -> tuple[dict[str, SiteFit], list[SiteStatistics]]:
    """The erasers of all sites, and what was seen of each source of labels.

    Args:
        task: What is fitted.
        sources: Labelled batches of every concept that is erased; in each process its own.
        background: Unlabelled batches, if there are any.
        sequential: Whether each site is fitted on activations that are erased upstream.

    Raises:
        ValueError: If there is no data, a site is never reached, or its rows cannot be used.
        RuntimeError: If the model fails on a batch, or another process failed.
    """
    if background is not None:
        sources = [*sources, Source("background", "background", background)]
    if sequential:
        return Scrubber(task).fit(sources)
    found = [_gathered(task, source) for source in sources]
    labelled = [statistics for statistics in found if statistics.z_dim]
    around = None if background is None else found[-1].moments
    solvers = {
        site: functools.partial(
            solve_site,
            site,
            [statistics.moments[site] for statistics in labelled],
            None if around is None else around[site],
            labelled[0].dtypes[site],
            task.config,
        )
        for site in task.layers
    }
    return share_out(task.processes, solvers), labelled


def _gathered(task: FitTask, source: Source) -> SiteStatistics:
    """Run the model over the batches of a source, with the adapter left out, and collect the moments at its sites.

    Every process runs over batches of its own; all end with the moments of all. Where the task has a checkpoint,
    batches that its moments hold already are passed over.
    """
    processes, kept = task.processes, None
    statistics = SiteStatistics(source.z_dim)

    def look(labels: BatchLabels | None, site: str, hidden: Tensor) -> Tensor:
        if labels is not None:
            statistics.update(site, *labels.select(hidden, site))
        return hidden

    def keep(labels: BatchLabels) -> None:
        shown.update(statistics.count(labels))
        if kept is not None:
            kept.save()

    with processes.agreeing("running over its batches"):
        batches = source.read(task.pool.name)
        if task.checkpoint is not None:
            kept = MomentsOfAPass(task.checkpoint, source.key, source.z_dim, processes)
            statistics, batches = kept.statistics, kept.remaining(batches)
        what = f"fitting {task.name}" if source.z_dim else "background"
        with evaluating(task.runner.model), bar(what, task.progress, processes) as shown:
            task.run_over(batches, look, keep)
        if kept is not None:
            kept.save(final=True)
    statistics.pool(processes)
    statistics.pool_counts(processes)
    if kept is not None:
        kept.save_sum()
    check_reached(statistics.moments, statistics.examples, task.layers, source)
    return statistics


# ---- what becomes of them --------------------------------------------------------------------------------------------


def conclude(
    task: FitTask,
    fits: dict[str, SiteFit],
    seen: list[SiteStatistics],
    eval_batches: Iterable[Any] | None = None,
    rows: RowsSeen | None = None,
) -> ErasureReport:
    """Put the erasers in place, measure them, and write down what was done.

    Args:
        task: What was fitted.
        fits: Site → its eraser.
        seen: What was seen of each source of labels.
        eval_batches: Held-out batches.
        rows: Those fitted on.
    """
    config, name, layers = task.config, task.name, task.layers
    before = {} if eval_batches is None else {site: layer.state_of(name) for site, layer in layers.items()}
    for site, layer in layers.items():
        layer.set_eraser(name, fits[site].eraser, fits[site].dtype)
    measured: list[SiteReport] = []
    examples = fitted = 0
    if eval_batches is not None:
        try:
            measured, examples, fitted = measure(task, eval_batches, rows)
        except BaseException:
            for site, state in before.items():
                layers[site].restore_state(name, state)
            raise
    report = ErasureReport(
        concept=config.concept,
        adapter_name=name,
        method=config.method,
        pool=task.pool.name,
        reader=task.pool.reader,
        examples=sum(statistics.examples for statistics in seen),
        tokens=sum(statistics.tokens for statistics in seen),
        eval_examples=examples,
        eval_fitted=fitted,
        sites=[_with_fit(line, fits.get(line.site)) for line in measured or map(SiteReport, layers)],
    )
    _record(task, fits, report)
    # Shares of the classes, the same at every site.
    shares = next(iter(fits.values())).shares.tolist()
    absent = [label for label, share in zip(config.labels or (), shares, strict=False) if share == 0]
    if absent:
        warnings.warn(
            f"No row was labelled {absent} while fitting {config.concept!r}: those classes are not guarded.",
            stacklevel=3,
        )
    return report


def _with_fit(line: SiteReport, fit: SiteFit | None) -> SiteReport:
    """A line with what is known from fitting; of a visit that is the shape of the eraser alone."""
    if fit is None:
        return line
    line = dataclasses.replace(line, width=fit.eraser.x_dim, rank=fit.eraser.rank)
    if line.visit is not None:
        return line
    is_measured = line.correlation_before is not None
    change = line.change_labelled if is_measured else fit.change
    return dataclasses.replace(line, rows=fit.rows, correlation_fit=fit.correlation, change_labelled=change)


def _record(task: FitTask, fits: dict[str, SiteFit], report: ErasureReport) -> None:
    """What the saved adapter says about itself."""
    config = task.config
    config.fitted_sites = {site: {"width": f.eraser.x_dim, "rank": f.eraser.rank} for site, f in fits.items()}
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
