"""Fit an erasure adapter in closed form."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from hf_erasure._version import __version__
from hf_erasure.adapters import ConceptErasureConfig, ErasureLayer, erasure_layers
from hf_erasure.adapters.common.fitted_with import RECORD, active_beside, warn_of_what_is_off
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.adapters.loading.fingerprint import fingerprint
from hf_erasure.models import POOLS, check_pool
from hf_erasure.models.model import class_name
from hf_erasure.models.runner import Runner

from .checkpoint import FitCheckpoint
from .heldout import HeldOut, Measured, measure
from .labels import Source, sources_of
from .one_pass import gather
from .processes import Processes
from .provenance import origin_of_batches
from .report import ErasureReport, SiteReport
from .rows_seen import RowsSeen
from .scrubbing import Scrubber
from .sites import SiteFit, Tally, share_out, solve_site
from .task import FitTask, Peeked, Pool, pool_for


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
    check_pool(pool)
    config, layers = adapter_to_fit(model, adapter_name)
    _check_label_order(batches, config)
    warn_of_what_is_off(model, adapter_name)
    processes, checkpoint, runner = Processes(), None, Runner(model, layers.values())
    with processes.agreeing("reading its batches"):
        peeked = Peeked(batches)
    guarded = pool_for(pool, model, runner, config, peeked.first, processes)
    if checkpoint_dir is not None:
        with processes.agreeing("opening checkpoint_dir"):
            checkpoint = FitCheckpoint(
                checkpoint_dir,
                config,
                layers,
                pool=guarded.name,
                sequential=sequential,
                processes=processes.count,
                active=active_beside(model, adapter_name),
            )
    task = FitTask(runner, layers, adapter_name, config, guarded, progress, resident_batches, checkpoint, processes)
    rows = RowsSeen()
    fits, tally = solved(task, sources_of(config, rows.watching(peeked), background), sequential=sequential)
    report = conclude(task, fits, tally, eval_batches, rows)
    config.provenance["data"] = origin_of_batches(batches)
    return report


def solved(task: FitTask, sources: list[Source], *, sequential: bool) -> tuple[dict[str, SiteFit], Tally]:
    """The erasers of all sites, and how much labelled data they rest on."""
    return Scrubber(task).fit(sources) if sequential else _one_pass(task, sources)


def _one_pass(task: FitTask, sources: list[Source]) -> tuple[dict[str, SiteFit], Tally]:
    """Fit all sites on the activations of the model as it is."""
    labelled = [gather(task, source) for source in sources if source.labelled]
    around = [gather(task, source)[0].moments for source in sources if not source.labelled]
    solvers = {
        site: functools.partial(
            solve_site,
            site,
            [found.moments[site] for found, _ in labelled],
            around[0][site] if around else None,
            labelled[0][0].dtypes[site],
            task.config,
        )
        for site in task.layers
    }
    return share_out(task.processes, solvers), Tally.sum(tally for _, tally in labelled)


def adapter_to_fit(model: nn.Module, name: str) -> tuple[ConceptErasureConfig, dict[str, ErasureLayer]]:
    """The configuration and the sites of an adapter that can be fitted.

    Raises:
        ValueError: If there is no such adapter, or its eraser is part of the weights at present.
    """
    found = adapter_of(model, name, ConceptErasureConfig)
    layers = erasure_layers(found.owner, name)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("Adapters are merged into the weights: call unmerge_adapter() before fitting.")
    return found.config, layers


def _check_label_order(batches: Any, config: ConceptErasureConfig) -> None:
    """A loader of `concept_dataloader` knows the names of its class ids; they must be the adapter's."""
    named = getattr(getattr(batches, "collate_fn", None), "labels", None)
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


def conclude(
    task: FitTask, fits: dict[str, SiteFit], tally: Tally, eval_batches: Iterable[Any] | None, rows: RowsSeen
) -> ErasureReport:
    """Put the erasers in place, measure them, and write down what was done; `rows` are those fitted on."""
    config, name, layers = task.config, task.name, task.layers
    before = {site: layer.eraser_state(name) for site, layer in layers.items()}
    for site, layer in layers.items():
        layer.set_eraser(name, fits[site].eraser, fits[site].dtype)
    measured = Measured({}, Tally(), 0)
    rows.pool(task.processes)
    try:
        if eval_batches is not None:
            measured = measure(task, eval_batches, rows)
    except BaseException:
        for site, layer in layers.items():
            layer.restore_state(name, before[site])
        raise
    finals = [site for site in measured.sites if site not in layers]
    lines = [line for site in [*layers, *finals] for line in _lines(site, fits.get(site), measured.sites.get(site))]
    report = ErasureReport(
        config.concept, name, config.method, task.pool.name, task.pool.reader, tally.examples, tally.tokens,
        measured.tally.examples, measured.fitted, lines,
    )  # fmt: skip
    _record(task, fits, report)
    _warn_of_absent_classes(config, fits)
    return report


def _lines(site: str, fit: SiteFit | None, held_out: HeldOut | None) -> list[SiteReport]:
    """The line of a site, and those of its visits where there are several."""
    eraser: dict[str, Any] = {} if fit is None else {"width": fit.eraser.x_dim, "rank": fit.eraser.rank}
    fitted: dict[str, Any] = {}
    if fit is not None:
        fitted = {"rows": fit.rows, "correlation_fit": fit.correlation, "change_labelled": fit.change}
    if held_out is None:
        return [SiteReport(site, **eraser, **fitted)]
    visits = [
        SiteReport(site, visit, **eraser, **_measured(figures)) for visit, figures in enumerate(held_out.visits, 1)
    ]
    return [SiteReport(site, **eraser, **fitted | _measured(held_out)), *visits]


def _measured(figures: HeldOut) -> dict[str, Any]:
    return {
        "correlation_before": figures.before,
        "correlation_after": figures.after,
        "interval_before": figures.before_interval,
        "interval_after": figures.after_interval,
        "change_labelled": figures.labelled,
        "change_ignored": figures.ignored,
    }


def _record(task: FitTask, fits: dict[str, SiteFit], report: ErasureReport) -> None:
    """What the saved adapter says about itself."""
    owner, config = adapter_of(task.runner.model, task.name, ConceptErasureConfig).owner, task.config
    config.fitted_sites = {site: {"width": f.eraser.x_dim, "rank": f.eraser.rank} for site, f in fits.items()}
    config.fitted = True
    config.provenance = {
        "hf_erasure_version": __version__,
        "base_class": class_name(owner),
        "examples": report.examples,
        "tokens": report.tokens,
        "pool": report.pool,
        "reader": report.reader,
        "leakage": report.leakage,
        "leakage_intervals": report.leakage_intervals,
        "measured_on": report.measured_on,
        "fingerprint": fingerprint(owner, list(fits)),
        RECORD: active_beside(task.runner.model, task.name),
    }


def _warn_of_absent_classes(config: ConceptErasureConfig, fits: dict[str, SiteFit]) -> None:
    if config.labels is None:
        return
    # Shares of the classes, the same at every site.
    shares = next(iter(fits.values())).shares
    absent = [label for label, share in zip(config.labels, shares.tolist(), strict=True) if share == 0]
    if absent:
        warnings.warn(
            f"No row was labelled {absent} while fitting {config.concept!r}: those classes are not guarded.",
            stacklevel=3,
        )


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
