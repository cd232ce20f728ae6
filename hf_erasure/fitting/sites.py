"""An adapter's sites, how the model is run and its activations are observed there, and the erasers of their moments.

The pool of a fit says which rows the label of a sequence counts for; `pool_for` finds what the model's head reads.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.adapters import ConceptErasureConfig, ErasureLayer, site_layers
from hf_erasure.adapters.common.config import Provenance
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.erasers import ConceptMoments, Eraser, apply_erasure, joint_moments
from hf_erasure.erasers.eraser import MeanIsErased, concept_columns, whiten_concept
from hf_erasure.models.layout import Visit
from hf_erasure.models.model import Runner, on_cpu
from hf_erasure.models.pooling import IN_WORDS, POOLS, reading_of

from .labels import BatchLabels, SiteStatistics, Source, label_tensor
from .layouts import Layouts, few_rows, observed
from .processes import Processes
from .report import SiteReport

# A head that reads every token by itself also reads the tokens of these two pools.
_POSITION_POOLS = ("cls", "last")
# Rounding in float32 statistics may give a constant activation this much variance, as a share of its mean square.
_ROUNDING = 1e-12


@dataclass
class FitTask:
    """One adapter that is fitted or measured."""

    owner: Any  # The bare model that has the adapter.
    runner: Runner  # Calls the model.
    layers: dict[str, ErasureLayer]  # The sites, by the name of their module, in the model's order.
    name: str  # The adapter.
    config: ConceptErasureConfig  # Its configuration, or the copy that a fit writes into until it cannot fail any more.
    layouts: Layouts  # Tells what the axes of activations are.
    pool: str  # Which rows a sequence label counts for, one of `POOLS`.
    reader: str  # What the model's head reads, in words.
    processes: Processes  # The processes that share the data.
    progress: bool = False  # Whether this process shows progress bars.
    linear: Collection[str] = ()  # The sites whose erasers have no affine part; `solve_sites` sets them.

    def batches_to_run(self, batches: Iterable[BatchLabels]) -> Iterator[tuple[BatchLabels, bool]]:
        """The batches to run the model on, each with whether it counts.

        Every forward pass of a sharded model needs all processes, so processes with fewer batches repeat one.
        """
        if self.runner.is_sharded and self.processes.count > 1:
            return self.processes.equally_often(batches)
        return ((batch, True) for batch in batches)

    def run_over(
        self, batches: Iterable[BatchLabels], observer: Callable[[BatchLabels | None, str, int, Tensor], Tensor]
    ) -> None:
        """Run the model over this process's batches.

        The observer is called instead of the adapter's eraser, with the batch (None where it does not count), the site,
        how often the site was visited, and the activation. It returns the activation that goes on.
        """
        running: list[BatchLabels | None] = [None]
        visits: Counter[str] = Counter()

        def observe(site: str, hidden: Tensor) -> Tensor:
            visits[site] += 1
            return observer(running[0], site, visits[site], hidden)

        with observed(self.layers, self.name, observe):
            for labels, counts in self.batches_to_run(batches):
                running[0] = labels if counts else None
                visits.clear()
                self.runner(labels.batch)


def task_for(
    model: nn.Module,
    name: str,
    batches: Iterable[Any],
    pool: str | None,
    *,
    concept: ConceptErasureConfig | None = None,
    as_fitted: bool = False,
    progress: bool = False,
) -> tuple[FitTask, Iterator[Any]]:
    """Look at the first batch, and return the task of fitting or measuring an adapter, and all labelled batches.

    The labels are those of `concept`, by default the adapter's own. With `as_fitted` and without `pool`, the pool is
    the one that the adapter was fitted for, if that is recorded.
    """
    if pool is not None and pool not in POOLS:
        raise ValueError(
            f"pool={pool!r} is not known; choose one of {', '.join(map(repr, POOLS))}, or None for what the model's "
            "head reads."
        )
    adapter = adapter_of(model, name, ConceptErasureConfig)
    layers = site_layers(adapter.owner, name)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("Adapters are merged into the weights: call unmerge_adapter() before fitting.")
    config, runner, processes = adapter.config, Runner(model, layers.values()), Processes()
    with processes.fail_together("reading its batches"):
        rest = iter(batches)
        first = list(itertools.islice(rest, 1))
    layouts = Layouts(runner, layers, name)
    # Every forward pass of a sharded model needs all processes, and one of them may have no batch.
    few = processes.gathered([few_rows(first[0]) if first else None])
    rows = next((rows for rows in few if rows is not None), None)
    if rows is not None:
        layouts.of(rows)
    known = Provenance.of(config) if as_fitted and pool is None else None
    if known is not None and known.pool in POOLS:
        guarded, reader = known.pool, known.reader
    else:
        guarded, reader = pool_for(pool, model, layouts, concept or config, rows)
    shows = progress and processes.is_main
    task = FitTask(adapter.owner, runner, layers, name, config, layouts, guarded, reader, processes, shows)
    return task, itertools.chain(first, rest)


# ---- the pool of a fit -----------------------------------------------------------------------------------------------


def pool_for(
    pool: str | None, model: nn.Module, layouts: Layouts, config: ConceptErasureConfig, rows: dict[str, Any] | None
) -> tuple[str, str]:
    """What a fit guards, one of `POOLS`, and what the model's head reads, in words.

    Warns where the two differ, or where it could not be found what the head reads. `model` is the one that the caller
    gave; `rows` are some rows of the first batch with the labels of `config`, or None without a batch.
    """
    if rows is None:
        return pool or "tokens", ""  # fitting raises an error about the batches later
    of_tokens = 2 if config.labels is not None else 3
    if pool in (None, "tokens") and "concept_labels" in rows and label_tensor(rows).dim() == of_tokens:
        return "tokens", "the labels are of single tokens"

    def real_of(hidden: Tensor, name: str) -> Tensor:
        labels = BatchLabels(rows, Source(None), "tokens", layouts.of(rows), layouts.frames_of(rows))
        return labels.select(hidden, Visit(name))[1].real

    reading = reading_of(model, layouts.runner, rows, real_of)
    if pool is None:
        if not reading.clear:
            warnings.warn(
                f"pool=None: {reading.text}, so that all tokens count alike. Name what the fit should guard, "
                f"pool={' or '.join(map(repr, POOLS))}, and pad batches on the side that the head expects.",
                stacklevel=4,
            )
        alike = ": all tokens count alike" if reading.pool is None else ""
        return reading.pool or "tokens", reading.text + alike
    is_read = pool == reading.pool or (reading.pool == "tokens" and pool in _POSITION_POOLS)
    remedy, beside = "", "" if reading.pool is None else f" (pool={reading.pool!r})"
    if reading.pool is not None and not is_read:
        remedy = f"Leave pool out, or give pool={reading.pool!r}."
    elif reading.is_other and pool != "tokens":
        remedy = "Pad batches on the side that the head expects, or give pool='tokens'."
    if remedy:
        warnings.warn(
            f"pool={pool!r} guards {IN_WORDS[pool]}, but {reading.text}{beside}: what the head reads is not guarded. "
            f"{remedy}",
            stacklevel=4,
        )
    return pool, reading.text


# ---- erasers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteFit:
    """The eraser of one site, and figures of the moments that it was solved from."""

    eraser: Eraser  # float64.
    dtype: torch.dtype  # The dtype of the stored eraser: float32, or float64 for float64 activations.
    shares: Tensor  # `(z_dim,)` mean of the concept; for classes, the share of each class.
    line: SiteReport  # The site's line of the report, without the figures of held-out batches.
    axis: int = -1  # The axis of the features.
    examples: int = 0  # The axis of the examples.
    readings: Tensor | None = None  # `(rows, rank)`, what is read in the mean of each class; None for several concepts.

    def erase(self, hidden: Tensor) -> Tensor:
        """Erase an activation as an adapter with this eraser does, equal to the bit."""
        return apply_erasure(hidden, *self.eraser.parts(hidden.device, self.dtype), self.axis)


def solve(task: FitTask, sites: Sequence[str], sources: Sequence[SiteStatistics]) -> dict[str, SiteFit]:
    """Solve for the erasers of sites, each in one of the processes; all processes end with the same fits.

    `sources` has statistics for each concept that is erased, and may have some of a background (without a `concept`),
    whose rows show what should not be disturbed.
    """
    processes = task.processes
    with processes.fail_together("solving for its sites"):
        mine = sites[processes.rank :: processes.count]
        own = {site: solve_site(site, sources, task.config, site in task.linear) for site in mine}
    for site, fit in own.items() if processes.count > 1 else ():  # they exchange tensors in main memory
        readings = None if fit.readings is None else fit.readings.cpu()
        own[site] = dataclasses.replace(fit, eraser=fit.eraser.to("cpu"), shares=fit.shares.cpu(), readings=readings)
    solved = {site: fit for fits in processes.gathered([own]) for site, fit in fits.items()}
    return {site: dataclasses.replace(solved[site], **task.layouts.site_axes(site)) for site in sites}


@on_cpu()
def solve_site(site: str, sources: Sequence[SiteStatistics], config: ConceptErasureConfig, is_linear: bool) -> SiteFit:
    """Solve for one site, as `solve` does for several.

    For a module that is called several times the columns of all visits are erased, each taken about the means of its
    visit. If no linear map keeps the mean, and the user did not ask for a linear one, the affine map is taken instead.
    """
    seen = {visit for statistics in sources for visit in statistics.moments}
    visits = list(itertools.takewhile(seen.__contains__, (Visit(site, number) for number in itertools.count(1))))
    of_concepts = [statistics for statistics in sources if statistics.concept]
    in_strata = [(s.strata, s.moments[visit]) for s in of_concepts for visit in visits if visit in s.moments]
    labelled = [strata.concept(moments) for strata, moments in in_strata]
    kept = [columns for strata, moments in in_strata if (columns := strata.kept_columns(moments)) is not None]
    of_background = [s.moments[visit] for s in sources if not s.concept for visit in visits if visit in s.moments]
    background = ConceptMoments(of_background[0].x_dim, 0) if of_background else None
    for more in of_background:
        background.merge(more)  # type: ignore[union-attr]
    # The rank that was asked for, or else the rank that the guarantee needs, once for each visit.
    rank = config.max_rank if config.rank is not None else config.max_rank * len(visits)
    # Both methods give the same map, and mean projection takes the class means of one visit only.
    method = "orth" if len(visits) > 1 and config.method == "mean_projection" else config.method
    try:
        moments = labelled[0] if len(labelled) == 1 else joint_moments(labelled)
        spread = moments.spread()
        mean, variance = spread.mean, spread.variance
        if bool(variance.max() <= _ROUNDING * (mean.square().mean() + variance.mean())):
            # Nothing varies, as at the first norm of a [CLS] token, so nothing can be read.
            empty = torch.zeros(moments.x_dim, 0, dtype=torch.float64)
            eraser = Eraser(left=empty, right=empty.T.clone(), bias=None if is_linear else mean)
        else:
            beside = _extra_columns(of_concepts, visits)
            shared = torch.cat(kept, 1) if kept else None
            solving = partial(moments.eraser, method, rank=rank, background=background, beside=beside, kept=shared)
            try:
                eraser = solving(affine=not is_linear)
            except MeanIsErased:
                if config.affine is not None:
                    raise
                eraser = solving()
    except ValueError as error:
        raise ValueError(f"At {site!r}: {error}") from error
    line = SiteReport(
        site,
        width=eraser.x_dim,
        rank=eraser.rank,
        visits=len(visits),
        rows=spread.rows,
        change_labelled=spread.change(eraser) if eraser.rank else 0.0,
    )
    dtype = torch.float64 if sources[0].dtypes[visits[0]] == torch.float64 else torch.float32
    readings = _readings(eraser, labelled, config) if len(of_concepts) == 1 else None
    return SiteFit(eraser, dtype, spread.shares[: labelled[0].z_dim], line, readings=readings)


def _extra_columns(sources: Sequence[SiteStatistics], visits: Sequence[Visit]) -> list[tuple[Tensor, int | None]]:
    """The columns of pairs and of environments that are erased too, each with its number of directions (None: all)."""
    columns: list[tuple[Tensor, int | None]] = []
    for statistics in sources:
        concept, strata = statistics.concept, statistics.strata
        of_pairs = (statistics.moments.get(visit._replace(of_pairs=True)) for visit in visits)
        spreads = [moments.spread() for moments in of_pairs if moments is not None]
        columns += [(concept_columns(spread), None) for spread in spreads]
        if concept is not None and concept.environment_rank is not None and strata.environments > 1:
            more = concept.environment_rank - (strata.classes - 1)
            every = [statistics.moments[visit] for visit in visits if visit in statistics.moments]
            columns += [(strata.environment_columns(moments), more) for moments in every if more]
        if concept is not None and concept.pair_rank:
            roots = [spread.root() for spread in spreads]
            columns += [(torch.cat(roots, 1), concept.pair_rank * len(roots))] if roots else []
    return columns


def _readings(eraser: Eraser, visits: Sequence[ConceptMoments], config: ConceptErasureConfig) -> Tensor:
    """`(rows, rank)` float64: what an eraser reads, relative to its bias, in the mean of each class.

    For a concept of values, the means are those that a regression gives at the value 0 and at 1 in each column. For
    several visits, the readings are those of the mean over all visits.
    """
    total = sum(part.weight for part in visits)
    class_means = []
    for part in visits:
        spread = part.spread()
        shares, cross = spread.shares, spread.cross
        if config.labels is not None:
            offsets = torch.where(shares > 0, cross / shares, 0.0).T
        else:
            regression = cross @ (whitener := whiten_concept(spread.concept)) @ whitener.T
            values = torch.cat([shares.new_zeros(1, part.z_dim), torch.eye(part.z_dim).to(shares)])
            offsets = (values - shares) @ regression.T
        class_means.append((spread.mean + offsets) * (part.weight / total))
    bias = 0.0 if eraser.bias is None else eraser.bias
    return (torch.stack(class_means).sum(0) - bias) @ eraser.right.T


def known_readings(config: ConceptErasureConfig, fits: Iterable[SiteFit]) -> tuple[list[str] | None, list[int]]:
    """The names of the classes or columns whose readings all fits have (None if a fit has none), and their rows."""
    rows: list[int] = []
    names = None
    known = list(fits)
    if all(fit.readings is not None for fit in known):
        labels = config.labels or config.value_rows
        shares = torch.stack([fit.shares for fit in known]).amin(0).tolist()
        rows = [row for row in range(len(labels)) if config.labels is None or shares[row] > 0]
        names = [labels[row] for row in rows]
    config.check_target(names)
    return names, rows
