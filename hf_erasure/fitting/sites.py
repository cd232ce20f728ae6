"""The sites of an adapter: running its model and looking at them, their statistics, and the erasers that these give."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_erasure.adapters import ConceptErasureConfig, ErasureLayer, erasure_layers
from hf_erasure.adapters.common.config import Provenance
from hf_erasure.adapters.common.lookup import Found, adapter_of
from hf_erasure.erasers import ConceptMoments, Eraser, joint_moments, relative_change
from hf_erasure.models import POOLS, check_pool
from hf_erasure.models.model import Runner, last_hidden_state, on_cpu

from .labels import BatchLabels, Pool, Selection, pool_for
from .processes import Processes

SiteObserver = Callable[[str, Tensor], Tensor]
# Variance of an activation, as a share of its mean square, that the rounding of float32 statistics may make.
_ROUNDING = 1e-12


@dataclass
class FitTask:
    """One adapter that is fitted or measured.

    Attributes:
        owner: The model that has the adapter.
        runner: Calls the model.
        layers: The sites, by the name of their module, in the model's order.
        name: The adapter.
        config: Its configuration.
        pool: Which rows a sequence label counts for, and what the model's head reads.
        processes: Those that share the data.
        progress: Whether to show progress bars.
    """

    owner: nn.Module
    runner: Runner
    layers: dict[str, ErasureLayer]
    name: str
    config: ConceptErasureConfig
    pool: Pool
    processes: Processes
    progress: bool = False

    def in_step(self, batches: Iterable[BatchLabels]) -> Iterator[tuple[BatchLabels, bool]]:
        """The batches to run the model on, and which of them count.

        Every forward pass of a sharded model needs all processes, so that those with fewer batches repeat one.
        """
        if self.runner.is_sharded and self.processes.count > 1:
            return self.processes.equally_often(batches)
        return ((batch, True) for batch in batches)

    def run_over(
        self,
        batches: Iterable[BatchLabels],
        observer: Callable[[BatchLabels | None, str, Tensor], Tensor],
        then: Callable[[BatchLabels], None] = lambda labels: None,
    ) -> None:
        """Run the model over this process's batches.

        The observer sees the batch, the site and its activation in the place of the adapter's eraser, and returns what
        goes on; the batch is None where it does not count. `then` is called with each that counts after its pass.
        """
        running: list[BatchLabels | None] = [None]
        with observed(self.layers, self.name, lambda site, hidden: observer(running[0], site, hidden)):
            for labels, counts in self.in_step(batches):
                running[0] = labels if counts else None
                self.runner(labels.batch)
                if counts:
                    then(labels)


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
    """The task of fitting or measuring an adapter, and its batches, of which the first was looked at.

    Args:
        model: With the adapter, or whatever that is inside of.
        name: The adapter.
        batches: Labelled batches; the labels' form and two rows of the first one decide on the pool.
        pool: As in `fit_concept_erasure`.
        concept: By whose labels the batches are read; the adapter's own when None.
        as_fitted: Take the pool that the adapter was fitted for, if there is one and none is asked for.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the pool is not known, there is no such adapter, or it is merged.
    """
    check_pool(pool)
    found, layers = adapter_to_fit(model, name)
    config, runner, processes = found.config, Runner(model, layers.values()), Processes()
    with processes.agreeing("reading its batches"):
        rest = iter(batches)
        first = list(itertools.islice(rest, 1))
    known = Provenance.of(config) if as_fitted and pool is None else None
    if known is not None and known.pool in POOLS:
        guarded = Pool(known.pool, known.reader)
    else:
        guarded = pool_for(pool, model, runner, concept or config, first[0] if first else None, processes)
    task = FitTask(found.owner, runner, layers, name, config, guarded, processes, progress)
    return task, itertools.chain(first, rest)


def adapter_to_fit(model: nn.Module, name: str) -> tuple[Found[ConceptErasureConfig], dict[str, ErasureLayer]]:
    """An adapter that can be fitted, and its sites.

    Raises:
        ValueError: If there is no such adapter, or its eraser is part of the weights at present.
    """
    found = adapter_of(model, name, ConceptErasureConfig)
    layers = erasure_layers(found.owner, name)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("Adapters are merged into the weights: call unmerge_adapter() before fitting.")
    return found, layers


@contextmanager
def observed(layers: dict[str, ErasureLayer], adapter_name: str, observer: SiteObserver) -> Iterator[None]:
    """While open, `observer(site, activation)` stands in for the adapter's eraser at every site.

    It sees the activation after all erasers that act before this one, and what it returns goes on.
    """
    try:
        for path, layer in layers.items():
            layer.observers[adapter_name] = functools.partial(observer, path)
        yield
    finally:
        for layer in layers.values():
            layer.observers.pop(adapter_name, None)


@contextmanager
def observed_final(finals: dict[str, nn.Module], observer: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """While open, `observer(name, state)` sees every last hidden state; what it returns is not used."""

    def at(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        observer(name, last_hidden_state(output))

    handles = [module.register_forward_hook(functools.partial(at, name)) for name, module in finals.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bar(what: str, progress: bool, processes: Processes, unit: str = " rows") -> tqdm:
    """A progress bar, on the main process only."""
    return tqdm(desc=what, unit=unit, disable=not (progress and processes.is_main))


# ---- statistics ------------------------------------------------------------------------------------------------------


@dataclass
class SiteStatistics:
    """What was seen of one kind of batches: how much, and the moments by site.

    Attributes:
        z_dim: Columns of the concept; 0 for a background.
        title: What messages call the batches.
        moments: By site, created when the width of the activation is known.
        dtypes: Of the activations, by site.
        examples: Sequences.
        tokens: Real positions.
    """

    z_dim: int
    title: str = "batches"
    moments: dict[str, ConceptMoments] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    examples: int = 0
    tokens: int = 0

    def count(self, labels: BatchLabels) -> None:
        """Add a batch to what was seen."""
        mask = labels.batch.get("attention_mask")
        self.examples += labels.rows
        self.tokens += int(mask.sum()) if isinstance(mask, Tensor) else labels.rows

    @on_cpu
    def update(self, site: str, activation: Tensor, selection: Selection, mask: Tensor | None = None) -> None:
        """Add an activation `(batch, seq, …, width)`; `mask` narrows the selection further.

        Raises:
            ValueError: Names the site, and what was wrong with its rows.
        """
        counted = selection.counted if mask is None else selection.counted & mask
        if not bool(counted.any()):
            return
        if site not in self.moments:
            self.moments[site] = ConceptMoments(activation.shape[-1], self.z_dim)
            self.dtypes[site] = activation.dtype
        # Heads between the positions and the width carry the label of their position.
        rows = activation[counted]
        heads = rows[0].numel() // rows.shape[-1]
        z = None if selection.z is None else selection.z[counted].repeat_interleave(heads, 0)
        weight = None if selection.weight is None else selection.weight[counted].repeat_interleave(heads, 0)
        try:
            self.moments[site].update(rows.reshape(-1, rows.shape[-1]), z, weight)
        except ValueError as error:
            raise ValueError(f"At {site!r}: {error}") from error

    def pool_counts(self, processes: Processes) -> None:
        """Make what was seen that of all processes together, in every one of them."""
        examples, tokens = zip(*processes.gathered([(self.examples, self.tokens)]), strict=True)
        self.examples, self.tokens = sum(examples), sum(tokens)

    def pool(self, processes: Processes, sites: Collection[str] | None = None) -> None:
        """Make the moments of these sites, or of all, those of all processes together, in every one of them."""
        if processes.count == 1:
            return
        chosen = [site for site in self.moments if sites is None or site in sites]
        found = {site: (self.moments[site].x_dim, self.dtypes[site]) for site in chosen}
        everywhere = {site: facts for own in processes.gathered([found]) for site, facts in own.items()}
        for site, (width, dtype) in sorted(everywhere.items()):
            self.dtypes[site] = dtype
            moments = self.moments.setdefault(site, ConceptMoments(width, self.z_dim))
            moments.pool(lambda own: processes.gathered([own]), processes.add)

    def check_reached(self, sites: Collection[str], found: Container[str] | None = None) -> None:
        """Check that there was data, and that every site is in `found`, by default those that have moments.

        Raises:
            ValueError: Says which was missing, and the remedy.
        """
        if not self.examples:
            raise ValueError(
                f"{self.title} is empty: there is nothing to fit on. An iterator that was used up gives none either."
            )
        absent = [site for site in sites if site not in (self.moments if found is None else found)]
        if absent and len(absent) == len(sites) and self.z_dim:
            raise ValueError(
                f"None of the {self.examples} examples has a labelled position at {absent[0]!r}: concept_labels are "
                "-100, or the forward pass does not call this module, as where another one reads its weight itself. "
                "Name modules that are called."
            )
        if absent:
            raise ValueError(
                f"{absent[0]!r} and {len(absent) - 1} other sites were never reached while the model ran over "
                f"{self.title}: name only modules that the forward pass calls (one whose weight another module reads "
                "itself is not called), or give batches that use them (decoder inputs for a decoder)."
            )


# ---- erasers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteFit:
    """The eraser of one site, and what its moments told.

    Attributes:
        eraser: float64.
        dtype: What the eraser is kept and applied in: float32, or float64 on float64 activations.
        rows: Labelled rows.
        shares: `(z_dim,)` mean of the concept; the shares of the classes.
        correlation: Largest canonical correlation with the concept on these rows, before erasure.
        change: `sqrt(E|r(x) − x|² / E|x − E x|²)` on these rows.
    """

    eraser: Eraser
    dtype: torch.dtype
    rows: int
    shares: Tensor
    correlation: float
    change: float


def solve(
    processes: Processes, sites: Sequence[str], seen: Sequence[SiteStatistics], config: ConceptErasureConfig
) -> dict[str, SiteFit]:
    """Solve for the erasers of sites, each in one of the processes; all end with the same fits.

    The statistics are those of each concept that is erased, and perhaps of a background (`z_dim` is 0), of rows that
    say what should not be disturbed.

    Raises:
        ValueError: Names the site, and what the moments lack, if that was in this process.
        RuntimeError: If one failed in another.
    """
    if processes.count == 1:
        return {site: solve_site(site, seen, config) for site in sites}
    with processes.agreeing("solving for its sites"):
        mine = {site: solve_site(site, seen, config) for site in processes.mine(sites)}
        # Processes hand over what lies in main memory.
        mine = {
            site: dataclasses.replace(fit, eraser=fit.eraser.to("cpu"), shares=fit.shares.cpu())
            for site, fit in mine.items()
        }
    solved = {site: fit for own in processes.gathered([mine]) for site, fit in own.items()}
    return {site: solved[site] for site in sites}


@on_cpu
def solve_site(site: str, seen: Sequence[SiteStatistics], config: ConceptErasureConfig) -> SiteFit:
    """Solve for one site, as `solve` does for several."""
    labelled = [statistics.moments[site] for statistics in seen if statistics.z_dim]
    background = next((statistics.moments[site] for statistics in seen if not statistics.z_dim), None)
    try:
        moments = labelled[0] if len(labelled) == 1 else joint_moments(labelled)
        variance = moments.variance_x
        if bool(variance.max() <= _ROUNDING * (moments.mean_x.square().mean() + variance.mean())):
            # As the first norm of a [CLS] token: nothing varies, so nothing can be read.
            empty = torch.zeros(moments.x_dim, 0, dtype=torch.float64)
            eraser = Eraser(left=empty, right=empty.T.clone(), bias=moments.mean_x)
        else:
            eraser = moments.eraser(config.method, affine=config.affine, rank=config.max_rank, background=background)
    except ValueError as error:
        raise ValueError(f"At {site!r}: {error}") from error
    acts = eraser.rank > 0
    return SiteFit(
        eraser=eraser,
        dtype=torch.float64 if seen[0].dtypes[site] == torch.float64 else torch.float32,
        rows=moments.rows,
        shares=moments.mean_z,
        correlation=float(moments.canonical_correlations()[0]) if acts else 0.0,
        change=relative_change(eraser, moments) if acts else 0.0,
    )
