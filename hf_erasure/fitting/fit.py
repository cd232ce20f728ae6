"""Fit an erasure adapter in closed form: `fit_concept_erasure`, from its batches to its report.

Fitting all sites in one plain pass leaves the concept readable in deeper layers, because erasing upstream changes the
activations that arrive there. `scrubbing` describes how sites are fitted one after the other.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable
from copy import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_erasure._version import __version__
from hf_erasure.adapters import ConceptErasureConfig, ErasureLayer, erasure_layers
from hf_erasure.adapters.common.acting import remove_from_children, warn_of_inactive
from hf_erasure.adapters.common.config import ACTIVE
from hf_erasure.adapters.common.tuner import exact_targets
from hf_erasure.adapters.loading.fingerprint import fingerprint, other_acting_adapters
from hf_erasure.adapters.merging.probe import sites_without_bias
from hf_erasure.erasers.statistics import PackedGram
from hf_erasure.models.layout import Visit
from hf_erasure.models.model import class_name, evaluating

from .checkpoint import FitCheckpoint
from .dataloader import ConceptCollator
from .heldout import measure, noting_rows
from .labels import BatchLabels, Source, length_of
from .report import ErasureReport
from .scrubbing import Scrubber
from .sites import FitTask, SiteFit, known_readings, solve, task_for

logger = logging.getLogger(__name__)


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
    pair_rank: int | None = None,
    environment_rank: int | None = None,
    progress: bool = True,
) -> ErasureReport:
    """Estimate the erasers of an adapter from labelled data and put them in place.

    Under `torchrun` or `accelerate launch` every process gives its own batches, its share of the data
    (`concept_dataloader(…, split_between_processes=True)`). The statistics are added, so that all processes end with
    the erasers that one process would find on all the data. A share may be empty.

    Args:
        model: A model with a `ConceptErasureConfig` adapter, or a module that contains it: a `PeftModel`, a
            `SentenceTransformer`, `DataParallel`, DDP, FSDP, a compiled model, a module of your own.
        batches: Dicts of model inputs plus `concept_labels`: `(batch,)` class ids for whole sequences, `(batch, seq)`
            class ids for tokens with −100 = ignore, or floats `(…, concept_dim)`. Padding never counts.
        adapter_name: The adapter to fit. Other active adapters stay active during the fit and are recorded in its
            provenance. A warning names loaded adapters that are off.
        sequential: Fit each site on activations that are already erased upstream (concept scrubbing, arXiv 2306.03819
            section 5). Where a module is called several times in one forward pass, more passes over the data follow
            until its eraser leaves nothing at any call. A warning and the report say where this is not reached. `False`
            fits all sites in one pass, on activations from which nothing is erased. Where their sums take more than
            2 GiB and the batches can be read again, it takes several passes, with the same erasers.
        pool: Which rows a sequence label counts for: `"tokens"` (all alike), `"mean"` (each weighted 1/length, so that
            the mean-pooled embedding is guarded), `"cls"` (the first) or `"last"` (the last real one). By default the
            rows that the model's head, or the pooling module of a SentenceTransformer, reads: one backward pass from
            the logits of two rows of the first batch finds them. In a model without a head all tokens count alike. A
            label of a token always counts for that token.
        eval_batches: Held-out batches to measure leakage and distortion on.
        background: Unlabelled batches to take the covariance and the mean from. They decide how little other text is
            disturbed, and do not affect the guarantee.
        resident_batches: In sequential fitting, how many batches keep their inputs and activations in memory. Those of
            the others wait on disk. None keeps all inputs and the activations of 256 batches in memory. The erasers are
            the same for any number.
        checkpoint_dir: A folder where finished sites, or the moments of one pass, are kept. A fit that was killed and
            is started again with the same batches in the same order continues there, and ends with the same erasers.
        pair_rank: For batches with counterfactuals (`concept_dataloader(…, counterfactual_words=…)`): how many of the
            directions in which pairs differ most are erased, in addition to the difference of the classes and the mean
            difference within pairs. It is written into the configuration, whose value is the default.
        environment_rank: For batches with environments: how many directions of the class differences within
            environments are erased, including those over all. It is written into the configuration, as `pair_rank`.
        progress: Show progress bars, on the main process.

    Returns:
        An `ErasureReport`, with a line for each site and for `last_hidden_state`. With `eval_batches` it also has a
        line for each visit (call) of a module that is called several times in one forward pass.

    Raises:
        ValueError: If the adapter, the batches or the labels do not fit; the adapter is left as it was.
    """
    task, labelled = task_for(model, adapter_name, batches, pool, progress=progress)
    collator = getattr(batches, "collate_fn", None)
    if isinstance(collator, ConceptCollator):
        collator.check_labels(task.config.labels)
    warn_of_inactive(model, adapter_name)
    task.config = _with_extras(task.config, collator, pair_rank, environment_rank)
    checkpoint, rows = None, set[int]()
    if checkpoint_dir is not None:
        with task.processes.fail_together("opening checkpoint_dir"):
            active = other_acting_adapters(model, task.name)
            checkpoint = FitCheckpoint(
                checkpoint_dir,
                task.config,
                task.layers,
                pool=task.pool,
                sequential=sequential,
                processes=task.processes.count,
                active=active,
                samples=fingerprint(task.owner, list(task.layers)) | {x["name"]: x["sample"] for x in active},
            )
    read = labelled if eval_batches is None else noting_rows(labelled, rows)
    source = Source(task.config, read, original=batches)
    fits = solve_sites(task, [source], background, sequential, resident_batches, checkpoint)
    left_out = [site for site in task.layers if site not in fits]
    report = finish_fit(task, [source], fits, eval_batches, rows)
    task.config.provenance["data"] = dict(getattr(collator, "origin", {}))
    if left_out and checkpoint is not None and task.processes.is_main:
        checkpoint.leave_out(left_out)
    return report


def _with_extras(
    config: ConceptErasureConfig, collator: Any, pair_rank: int | None, environment_rank: int | None
) -> ConceptErasureConfig:
    """A copy of a configuration that says what is erased and kept in addition to the concept."""
    config = copy(config)
    config.pair_rank = config.pair_rank if pair_rank is None else pair_rank
    config.environment_rank = config.environment_rank if environment_rank is None else environment_rank
    for name in ("environments", "kept"):
        ids = collator.id_columns.get(f"concept_{name}") if isinstance(collator, ConceptCollator) else None
        if ids is None or (name == "environments" and config.environment_rank is None):
            continue
        names = list(ids.names)
        if getattr(config, name) not in (None, names):
            raise ValueError(
                f"The batches have {name} {names}, and the configuration {getattr(config, name)}: give both the same, "
                f"as a ClassLabel column of the data set does, or leave {name} out of the configuration."
            )
        setattr(config, name, names)
    if config.environment_rank is not None and config.environments is None:
        raise ValueError(
            f"environment_rank={config.environment_rank}, and the batches name no environments: give "
            "concept_dataloader(…, environment_column=…), or ConceptErasureConfig(environments=[…]) for batches of "
            "your own with concept_environments."
        )
    config.check_extras()
    return config


def solve_sites(
    task: FitTask,
    labelled: list[Source],
    background: Iterable[Any] | None,
    sequential: bool,
    resident_batches: int | None = None,
    checkpoint: FitCheckpoint | None = None,
) -> dict[str, SiteFit]:
    """Solve for the erasers of all sites; the options are those of `fit_concept_erasure`."""
    if resident_batches is not None and (not sequential or resident_batches < 1):
        raise ValueError(
            f"resident_batches={resident_batches}: give at least 1, and only with sequential=True; a fit in one pass "
            "holds one batch at a time anyway."
        )
    if task.config.affine is None:
        own = sites_without_bias(task.owner, task.name, task.config, task.layers, may_run=not task.runner.is_sharded)
        task.linear = task.processes.broadcast(own)
    elif not task.config.affine:
        task.linear = task.layers.keys()
    sources = list(labelled)
    if background is not None:
        sources.append(Source(None, background, "background"))
    if sequential:
        return Scrubber(task, sources, resident_batches, checkpoint).fit()
    fits: dict[str, SiteFit] = {}
    reached: dict[str, set[str]] = {source.key: set() for source in sources}
    for sites in _site_groups(task, sources, checkpoint):
        for source in sources:
            _gather_moments(task, source, checkpoint, sites)
            reached[source.key] |= {site for site in sites if Visit(site) in source.moments}
            sites = [site for site in sites if site in reached[source.key]]
        fits |= solve(task, sites, sources)
        for source in sources:
            source.moments.clear()
    left = list(task.layers)
    for source in sources:
        may_lack = task.config.has_default_targets and source.concept is not None
        left = source.check_reached(left, reached[source.key], may_lack=may_lack)
    return fits


# ---- all sites in one pass -------------------------------------------------------------------------------------------

# Texts are far fewer than features where there is less than one of them for this many features.
_FEATURES_PER_TEXT = 2
# The most bytes of float64 sums that a pass holds. The weights of a model with so many wide sites take more.
MOST_BYTES = 1 << 31


def _site_groups(task: FitTask, sources: list[Source], checkpoint: FitCheckpoint | None) -> list[list[str]]:
    """The sites, in groups whose sums are held at once: one group where the batches or a checkpoint allow one pass."""
    own = task.layouts.widths, all(source.rereadable is not None for source in sources)
    every = task.processes.gathered([own])
    widths = {visit: width for found, _ in every for visit, width in found.items()}
    # The sums of a site are little more than half of a float64 matrix, for each kind of batches.
    sizes = dict.fromkeys(task.layers, 0)
    for visit, width in widths.items():
        sizes[visit.site] += 8 * PackedGram.size_of(width) * len(sources)
    if sum(sizes.values()) <= MOST_BYTES:
        return [list(task.layers)]
    if checkpoint is not None or not all(is_rereadable for _, is_rereadable in every):
        logger.warning(
            "The sums of %d sites take %.1f GB, and all are held in memory: to hold %.1f GB and take several passes, "
            "give a list or a DataLoader instead of an iterator, and leave checkpoint_dir out.",
            *(len(sizes), sum(sizes.values()) / 1e9, MOST_BYTES / 1e9),
        )
        return [list(task.layers)]
    groups: list[list[str]] = [[]]
    room = MOST_BYTES
    for site, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = MOST_BYTES
        groups[-1].append(site)
        room -= size
    return groups


def _gather_moments(task: FitTask, source: Source, checkpoint: FitCheckpoint | None, sites: Collection[str]) -> None:
    """Run the model over the batches of a source, with the adapter left out, and collect the moments at some sites.

    Every process runs over its own batches, and all processes end with the moments of all batches. Batches that are
    already in the moments of a checkpoint are skipped.
    """
    earlier = source.examples
    if earlier and source.rereadable is not None:  # not the first pass
        source.batches, source.examples, source.tokens, source.pairs = source.rereadable, 0, 0, 0

    def add_activation(labels: BatchLabels | None, site: str, visit: int, hidden: Tensor) -> Tensor:
        if labels is not None and site in sites and (labels.covers(site) or not task.config.has_default_targets):
            source.add(Visit(site, visit), labels, hidden)
        return hidden

    with task.processes.fail_together("running over its batches"):
        batches = source.read(task.pool, task.layouts)
        if checkpoint is not None:
            batches = checkpoint.unsaved(source, batches, task.processes)
        what = f"fitting {task.name}" if source.concept else "background"
        total = length_of(source.rereadable)
        with evaluating(task.runner.model):
            task.run_over(tqdm(batches, what, total, unit=" batches", disable=not task.progress), add_activation)
    source.pool(task.processes)
    source.pool_counts(task.processes)
    if earlier and source.examples != earlier:
        raise ValueError(
            f"{source.title} gave {earlier} examples in one pass over them and {source.examples} in the next: with so "
            "many wide sites they are read several times. Give a list, or a data set that gives the same rows again."
        )


# ---- after the solution ----------------------------------------------------------------------------------------------


def finish_fit(
    task: FitTask,
    labelled: list[Source],
    fits: dict[str, SiteFit],
    eval_batches: Iterable[Any] | None = None,
    fitted_rows: set[int] | None = None,
) -> ErasureReport:
    """Measure the erasers on held-out batches, put them in place, and record the fit in the configuration.

    Sites without an eraser are left out: the adapter is taken off them.
    """
    left_out = {site: layer for site, layer in task.layers.items() if site not in fits}
    task.layers = {site: layer for site, layer in task.layers.items() if site in fits}
    names, reading_rows = known_readings(task.config, fits.values())
    lines = [fits[site].line for site in task.layers]
    examples, fitted, environments = 0, 0, None
    if eval_batches is not None:
        lines, examples, fitted, environments = measure(
            task, eval_batches, lambda site, x: fits[site].erase(x), lines, fitted_rows
        )
    config: ConceptErasureConfig = task.owner.peft_config[task.name]
    config.__dict__.update(task.config.__dict__)
    task.config = config
    config.readings = names
    for site, layer in task.layers.items():
        fit = fits[site]
        readings = None if names is None or fit.readings is None else fit.readings[reading_rows]
        layer.set_eraser(task.name, fit.eraser, fit.dtype, fit.axis, fit.examples, readings)
        layer.erasures[task.name].dial = config.dial
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
        eval_environments=environments,
        sites=lines,
        reach=config.reach,
        classes=None if config.labels is None else len(config.labels),
        counterfactuals=sum(source.pairs for source in labelled),
        environments=None if config.environment_rank is None else len(config.environments or ()),
    )
    _record_fit(task, fits, report)
    if left_out:
        _leave_out(task, left_out, labelled[0].uncovered)
    if report.residuals or report.unsettled:
        warnings.warn(report.shortfall, stacklevel=3)
    if _FEATURES_PER_TEXT * report.examples < max(line.width or 0 for line in lines) and (outlook := report.outlook):
        logger.warning("%r was fitted on far fewer texts than activations have features. %s", task.name, outlook)
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
    """Take an adapter off sites that the user did not name, and warn which sites these are, and why."""
    sharers = erasure_layers(task.owner, task.name).values()
    remove_from_children([layer for layer in sharers if layer.erasures[task.name].holder in layers.values()], task.name)
    if task.config.weights is not None:
        task.config.weights = {site: task.config.weights[site] for site in task.layers}
    task.config.target_modules = exact_targets(list(task.config.fitted_modules), task.owner)
    unlabelled = [site for site in layers if site in uncovered]
    unreached = [site for site in layers if site not in uncovered]
    why = [f"the batches do not reach {unreached}"] if unreached else []
    why += [f"concept_labels label tokens, which are not the rows of {unlabelled}"] if unlabelled else []
    warnings.warn(
        f"{task.name!r} leaves out {len(layers)} sites that were not named, and does not act there: {'; '.join(why)}.",
        stacklevel=4,
    )


def _record_fit(task: FitTask, fits: dict[str, SiteFit], report: ErasureReport) -> None:
    """Write the sites and the provenance of a fit into its configuration."""
    config = task.config
    config.fitted_sites = {site: task.layers[site].size_of(task.name) for site in fits}
    config.fitted = True
    figures = ("examples", "tokens", "pool", "reader", "leakage", "leakage_intervals", "measured_on")
    config.provenance = {
        "hf_erasure_version": __version__,
        "base_class": class_name(task.owner),
        **{name: getattr(report, name) for name in figures},
        **{name: left for name in ("residuals", "unsettled", "counterfactuals") if (left := getattr(report, name))},
        "fingerprint": fingerprint(task.owner, list(fits)),
        ACTIVE: other_acting_adapters(task.runner.model, task.name),
    }
