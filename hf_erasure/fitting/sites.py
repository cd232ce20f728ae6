"""The sites of an adapter: looking at them, their statistics, and the erasers that these give."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_erasure.adapters import ConceptErasureConfig, ErasureLayer
from hf_erasure.erasers import ConceptMoments, Eraser, joint_moments, relative_change
from hf_erasure.models.model import on_cpu
from hf_erasure.models.runner import last_hidden_state

from .labels import BatchLabels, Selection, Source
from .processes import Processes

SiteObserver = Callable[[str, Tensor], Tensor]
# Variance of an activation, as a share of its mean square, that the rounding of float32 statistics may make.
_ROUNDING = 1e-12


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


@dataclass
class SiteStatistics:
    """What was seen of one kind of batches: how much, and the moments by site.

    Attributes:
        z_dim: Columns of the concept; 0 for a background.
        moments: By site, created when the width of the activation is known.
        dtypes: Of the activations, by site.
        examples: Sequences.
        tokens: Real positions.
    """

    z_dim: int
    moments: dict[str, ConceptMoments] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    examples: int = 0
    tokens: int = 0

    def count(self, labels: BatchLabels) -> int:
        """Add a batch to what was seen; returns its sequences."""
        mask = labels.batch.get("attention_mask")
        self.examples += labels.rows
        self.tokens += int(mask.sum()) if isinstance(mask, Tensor) else labels.rows
        return labels.rows

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
        self.examples, self.tokens = int(processes.total(self.examples)), int(processes.total(self.tokens))

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
            moments.pool(lambda own: processes.gathered([own]), processes.add_one)


def bar(what: str, progress: bool, processes: Processes, unit: str = " rows") -> tqdm:
    """A progress bar, on the main process only."""
    return tqdm(desc=what, unit=unit, disable=not (progress and processes.is_main))


def check_reached(found: Container[str], examples: int, sites: Iterable[str], source: Source) -> None:
    """Check that a source had data, and that every site saw some of it.

    Raises:
        ValueError: Says which was missing, and the remedy.
    """
    if not examples:
        raise ValueError(
            f"{source.title} is empty: there is nothing to fit on. An iterator that was used up gives none either."
        )
    sites = list(sites)
    absent = [site for site in sites if site not in found]
    if not absent:
        return
    if len(absent) == len(sites) and source.z_dim:
        raise ValueError(
            f"None of the {examples} examples has a labelled position at {absent[0]!r}: concept_labels are "
            "-100, or the forward pass does not call this module, as where another one reads its weight itself. Name "
            "modules that are called."
        )
    raise ValueError(
        f"{absent[0]!r} and {len(absent) - 1} other sites were never reached while the model ran over {source.title}: "
        "name only modules that the forward pass calls (one whose weight another module reads itself is not called), "
        "or give batches that use them (decoder inputs for a decoder)."
    )


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

    def parts(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`left`, `right` and `bias` as the adapter keeps them: a purely linear eraser has a zero bias."""
        bias = self.eraser.left.new_zeros(self.eraser.x_dim) if self.eraser.bias is None else self.eraser.bias
        left, right, bias = (t.to(device, self.dtype) for t in (self.eraser.left, self.eraser.right, bias))
        return left, right, bias


def share_out(processes: Processes, solvers: Mapping[str, Callable[[], SiteFit]]) -> dict[str, SiteFit]:
    """Solve each site in one of the processes; all end with the same fits.

    Raises:
        ValueError: What a solver raised in this process.
        RuntimeError: If one failed in another.
    """
    if processes.count == 1:
        return {site: solve() for site, solve in solvers.items()}
    with processes.agreeing("solving for its sites"):
        mine = {site: solvers[site]() for site in processes.mine(list(solvers))}
        # Processes hand over what lies in main memory.
        mine = {
            site: dataclasses.replace(fit, eraser=fit.eraser.to("cpu"), shares=fit.shares.cpu())
            for site, fit in mine.items()
        }
    solved = {site: fit for own in processes.gathered([mine]) for site, fit in own.items()}
    return {site: solved[site] for site in solvers}


@on_cpu
def solve_site(
    site: str,
    labelled: Sequence[ConceptMoments],
    background: ConceptMoments | None,
    dtype: torch.dtype,
    config: ConceptErasureConfig,
) -> SiteFit:
    """Solve for one site.

    Args:
        site: Its name, for messages.
        labelled: Moments of the labelled rows, one for each concept that is erased together.
        background: Moments of rows that say what should not be disturbed; the labelled ones when None.
        dtype: Of the activations.
        config: Method, rank and whether the mean is kept.

    Raises:
        ValueError: Names the site, and what the moments lack.
    """
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
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        rows=moments.rows,
        shares=moments.mean_z,
        correlation=float(moments.canonical_correlations()[0]) if acts else 0.0,
        change=relative_change(eraser, moments) if acts else 0.0,
    )
