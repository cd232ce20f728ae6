"""What an erasure does on data it was not fitted on: leakage before and after, and how far activations move."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor

from hf_erasure.erasers import ConceptMoments, apply_erasure, correlation_interval, cross_validated_correlation
from hf_erasure.models.model import evaluating, on_cpu

from .labels import Selection, Source, check_batch, mean_pooled
from .processes import Processes
from .rows_seen import RowsSeen, hashes_of
from .sites import SiteStatistics, Tally, bar, observed, observed_final
from .task import FitTask


@dataclass
class Movement:
    """Relative change `sqrt(E|x' − x|² / E|x − E x|²)` over a set of rows."""

    rows: int = 0
    moved: float = 0.0
    squares: float = 0.0
    total: Tensor | None = None

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add rows `(rows, width)`."""
        if not before.numel():
            return
        old, new = before.double(), after.double()
        self.rows += old.shape[0]
        self.moved += float((new - old).square().sum())
        self.squares += float(old.square().sum())
        total = old.sum(0).cpu()
        self.total = total if self.total is None else self.total + total

    def merge(self, other: Movement) -> None:
        """Add the rows of another."""
        self.rows += other.rows
        self.moved += other.moved
        self.squares += other.squares
        if other.total is not None:
            self.total = other.total if self.total is None else self.total + other.total

    @property
    def relative(self) -> float | None:
        """The change, or None without rows."""
        if self.total is None or not self.rows:
            return None
        variance = self.squares / self.rows - float((self.total / self.rows).square().sum())
        return (self.moved / self.rows / variance) ** 0.5 if variance > 0 else None


@dataclass
class HeldOut:
    """Held-out figures of one site.

    Attributes:
        before: Leakage without the adapter, a magnitude between 0 and 1: the cross-validated correlation with the
            concept, 0 where the other half does not confirm a direction. None only for a visit with too few rows.
        after: The same with it.
        before_interval: 95 % by Fisher's z over distinct sequences.
        after_interval: The same with the adapter.
        labelled: Movement of labelled positions.
        ignored: Movement of the others.
        visits: Where a module is called several times in one forward pass: the same figures of each call.
    """

    before: float | None
    after: float | None
    labelled: float | None
    ignored: float | None
    before_interval: tuple[float, float] | None = None
    after_interval: tuple[float, float] | None = None
    visits: list[HeldOut] = field(default_factory=list)


@dataclass
class Measured:
    """What was measured.

    Attributes:
        sites: Its figures by site.
        tally: On how much.
        fitted: How many of those sequences were fitted on.
    """

    sites: dict[str, HeldOut]
    tally: Tally
    fitted: int


@dataclass
class _Measurement:
    """Both runs of the model over the held-out batches, one with the adapter and one without.

    What is known of a site is kept by visit: calls of its module in one forward pass are counted from 1.
    """

    task: FitTask
    source: Source
    halves: dict[tuple[bool, int, int], SiteStatistics] = field(init=False)  # (erased, half, visit)
    labelled: dict[tuple[str, int], Movement] = field(default_factory=lambda: defaultdict(Movement))
    ignored: dict[tuple[str, int], Movement] = field(default_factory=lambda: defaultdict(Movement))
    random: torch.Generator = field(default_factory=lambda: torch.Generator("cpu").manual_seed(0))
    drawn: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    called: Counter[tuple[bool, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.halves = defaultdict(lambda: SiteStatistics(self.source.z_dim))

    def batch(self, batch: dict[str, Any], counts: bool = True) -> None:
        """Run over a batch without and with the erasure; one that does not count only keeps up with the others."""
        if not counts:
            self.task.runner(batch)
            self.task.runner(batch)
            return
        labels = self.source.labels_of(batch, self.task.pool.name)
        finals = {
            n: m for n, m in self.task.runner.final_states().items() if labels.covers(self.task.runner.side_of(n))
        }
        plain: dict[str, Tensor] = {}
        self.called.clear()
        # Halves are made of whole sequences, since two tokens of one text are no independent evidence, and drawn at
        # random, since rows often alternate between the classes.
        self.drawn = torch.randint(0, 2, (labels.rows,), generator=self.random, device="cpu")

        def without(site: str, hidden: Tensor) -> Tensor:
            self.called[False, site] += 1
            self._record(False, site, *labels.select(hidden, site))
            return hidden

        def erase(site: str, hidden: Tensor) -> Tensor:
            layer = self.task.layers[site]
            self.called[True, site] += 1
            erased = apply_erasure(hidden, *layer.parts_on(self.task.name, hidden.device))
            aligned, selection = labels.select(erased, site)
            self._record(True, site, aligned, selection)
            self._move(site, labels.select(hidden, site)[0], aligned, selection)
            return erased

        def final_without(name: str, state: Tensor) -> Tensor:
            plain[name], selection = labels.select(state, self.task.runner.side_of(name))
            self._record(False, name, plain[name], selection)
            return state

        def final_erased(name: str, state: Tensor) -> Tensor:
            aligned, selection = labels.select(state, self.task.runner.side_of(name))
            self._record(True, name, aligned, selection)
            self._move(name, plain[name], aligned, selection)
            return state

        with observed(self.task.layers, self.task.name, without), observed_final(finals, final_without):
            self.task.runner(batch)
        with observed(self.task.layers, self.task.name, erase), observed_final(finals, final_erased):
            self.task.runner(batch)

    @on_cpu
    def _record(self, erased: bool, site: str, aligned: Tensor, selection: Selection) -> None:
        aligned, selection = mean_pooled(aligned.float() if aligned.dtype.itemsize < 4 else aligned, selection)
        # The last hidden states are not counted: there is one a forward pass.
        visit = max(1, self.called[erased, site])
        for half in (0, 1):
            mask = (self.drawn == half).unsqueeze(1).to(aligned.device)
            self.halves[erased, half, visit].update(site, aligned, selection, mask)

    @on_cpu
    def _move(self, site: str, before: Tensor, after: Tensor, selection: Selection) -> None:
        rest, visit = selection.real & ~selection.counted, max(1, self.called[True, site])
        for movements, rows in ((self.labelled, selection.counted), (self.ignored, rest)):
            old, new = (t[rows].reshape(-1, t.shape[-1]) for t in (before, after))
            movements[site, visit].update(old, new)

    def pool(self, processes: Processes) -> None:
        """Add what all processes have measured, in every one of them."""
        if processes.count == 1:
            return
        seen = [(key, site) for key, statistics in self.halves.items() for site in statistics.moments]
        everywhere: dict[tuple[bool, int, int], set[str]] = {}
        for key, site in processes.gathered(seen):
            everywhere.setdefault(key, set()).add(site)
        for key in sorted(everywhere):
            self.halves[key].pool(processes, sorted(everywhere[key]))
        for movements in (self.labelled, self.ignored):
            shares = processes.gathered([dict(movements)])
            movements.clear()
            for share in shares:
                for place, movement in share.items():
                    movements[place].merge(movement)

    @on_cpu
    def figures(self, groups: int) -> dict[str, HeldOut]:
        """Site → what was measured there, on so many distinct sequences."""
        sites: dict[str, set[int]] = {}
        for (_, _, visit), statistics in self.halves.items():
            for site in statistics.moments:
                sites.setdefault(site, set()).add(visit)
        figures = {site: self._held_out(site, sorted(visits), groups) for site, visits in sites.items()}
        for site, visits in sites.items():
            if len(visits) > 1:
                figures[site].visits = [self._held_out(site, [visit], groups) for visit in sorted(visits)]
        return figures

    def _held_out(self, site: str, visits: list[int], groups: int) -> HeldOut:
        """The figures of a site, over some of its visits together."""
        magnitudes: list[float | None] = []
        intervals: list[tuple[float, float] | None] = []
        for erased in (False, True):
            one, other = (self._moments(erased, half, site, visits) for half in (0, 1))
            if _varies(one) and _varies(other):
                correlation = cross_validated_correlation(one, other)
                magnitudes.append(max(0.0, correlation))
                intervals.append(correlation_interval(correlation, groups))
            else:
                magnitudes.append(None)
                intervals.append(None)
        moved = []
        for movements in (self.labelled, self.ignored):
            together = Movement()
            for visit in visits:
                together.merge(movements[site, visit])
            moved.append(together.relative)
        return HeldOut(magnitudes[0], magnitudes[1], moved[0], moved[1], intervals[0], intervals[1])

    def _moments(self, erased: bool, half: int, site: str, visits: list[int]) -> ConceptMoments | None:
        """Moments of a half over these visits; None if it has no rows there."""
        found = [self.halves[erased, half, visit].moments.get(site) for visit in visits]
        there = [moments for moments in found if moments is not None]
        if len(there) < 2:
            return there[0] if there else None
        together = ConceptMoments(there[0].x_dim, there[0].z_dim)
        for moments in there:
            together.merge(moments)
        return together


def measure(task: FitTask, batches: Iterable[Any], fitted_on: RowsSeen | None = None) -> Measured:
    """Leakage and movement on held-out batches, at every site and at the last hidden states.

    Leakage is measured in what the fit guards: tokens, or with `pool="mean"` the mean over each sequence. It is
    cross-validated: the direction of one half of the sequences, judged on the other. A correlation
    taken in-sample would read `sqrt(width / rows)` where nothing is left. A module that is called several times in one
    forward pass is measured over all its visits together, as it is fitted, and at each.

    Every process measures batches of its own; all end with the figures of all. Warns where the batches share sequences
    with those that were fitted on.

    Raises:
        ValueError: If the batches are empty or one half of them lacks a class.
        RuntimeError: If another process failed.
    """
    source = Source("eval", "eval_batches", batches, task.config)
    measurement, tally, processes, own, fitted = _Measurement(task, source), Tally(), task.processes, RowsSeen(), 0
    checked = (check_batch(batch, position, labelled=True) for position, batch in enumerate(batches))
    with (
        processes.agreeing("measuring its batches"),
        evaluating(task.runner.model),
        bar(f"measuring {task.name}", task.progress, processes) as shown,
    ):
        for batch, counts in task.in_step(checked):
            measurement.batch(batch, counts)
            if counts:
                shown.update(tally.count(batch))
                hashes = hashes_of(batch)
                own.add(hashes)
                fitted += fitted_on.count(hashes) if fitted_on is not None else 0
    measurement.pool(processes)
    tally = tally.pooled(processes)
    if not tally.examples:
        raise ValueError("eval_batches is empty: there is nothing to measure on. Leave it out, or give held-out data.")
    own.pool(processes)
    fitted = int(processes.total(fitted))
    if fitted:
        warnings.warn(
            f"{fitted} of the {tally.examples} rows of eval_batches are rows that {task.name!r} was fitted on: the "
            "figures are on fitted rows, and say little of others. Give rows that are not in batches.",
            stacklevel=4,
        )
    figures = measurement.figures(len(own.hashes) or tally.examples)
    if any(found.before is None or found.after is None for found in figures.values()):
        raise ValueError(
            f"eval_batches hold too little to measure on: {tally.examples} sequences are split into halves at "
            "random, and each half needs rows of two classes. Give more held-out data."
        )
    return Measured(figures, tally, fitted)


def _varies(moments: ConceptMoments | None) -> TypeGuard[ConceptMoments]:
    return moments is not None and bool(moments.covariance_z.diagonal().max() > 0)
