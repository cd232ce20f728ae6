"""Measure an erasure on data that it was not fitted on: leakage before and after, and how far activations move.

Each row is recognised by a hash of eight bytes, so that held-out rows that were also fitted on are noticed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_erasure.erasers import ConceptMoments, apply_erasure, correlation_interval, cross_validated_correlation
from hf_erasure.models.model import evaluating, inputs_of, on_cpu

from .labels import BatchLabels, Selection, SiteStatistics, Source, length_of, mean_pooled
from .layouts import observed, visit_of
from .pairs import without_counterfactuals
from .processes import Processes
from .report import SiteReport
from .sites import FitTask, task_for

# Environments are put into halves in pairs, one into each half. This many pairs have a random draw of their own.
_MOST_PAIRS = 1 << 16
# The inputs that hold the content of a row; a batch may hold more, such as the row's number.
_INPUTS = ("input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values", "pixel_values_videos")
# In a batch without any of `_INPUTS`, the inputs that are not content, such as labels, or that follow from padding.
_NOT_CONTENT = ("labels", "token_type_ids", "position_ids", "cache_position")


@dataclasses.dataclass
class ObservedBatches:
    """Held-out batches, and a function that is called while they are measured.

    `observer(erased, site, activation, selection)` is called at each visit of a site and at the last hidden states,
    without the erasure and with it; the activation is aligned with the labels.
    """

    batches: Iterable[Any]
    observer: Callable[[bool, str, Tensor, Selection], None]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def measure(
    task: FitTask,
    batches: Iterable[Any],
    erase: Callable[[str, Tensor], Tensor],
    fit_lines: Iterable[SiteReport] = (),
    fitted_on: RowSet | None = None,
) -> tuple[list[SiteReport], int, int, int | None]:
    """Measure leakage and movement on held-out batches, at every site and at the last hidden states.

    Leakage is measured in what the fit guards: tokens, or with `pool="mean"` the mean over each sequence. It is
    cross-validated: the direction is found on one half of the sequences and judged on the other. An in-sample
    correlation would be `sqrt(width / rows)` where nothing is left. Where batches have environments, such as templates,
    each environment is in one half, so that a direction is not judged on an environment that it was found on. A module
    that is called several times in one forward pass is measured over all its visits, as it is fitted, and at each.

    `erase(site, activation)` returns the erased activation; the adapter itself need not have its values yet. Every
    process measures its own batches, and all processes end with the figures of all batches, put into the lines of the
    fit, `fit_lines`. Warns where the batches share sequences with those that were fitted on.

    Returns:
        One line for each site, and one for each visit of a site with several; the number of sequences; how many of
        these were fitted on; and the number of their environments, None where the batches name none.
    """
    measurement, processes, measured_rows = _Measurement(task, erase), task.processes, RowSet()
    if isinstance(batches, ObservedBatches):
        measurement.observer, batches = batches.observer, batches.batches
    source, fitted = Source(task.config, map(without_counterfactuals, batches), is_fitted=False), 0
    if fitted_on is not None:
        fitted_on.pool(processes)
    what = f"measuring {task.name}"
    with (
        processes.fail_together("measuring its batches"),
        evaluating(task.runner.model),
        tqdm(desc=what, unit=" batches", total=length_of(batches), disable=not task.progress) as shown,
    ):
        for labels, counts in task.batches_to_run(source.read(task.pool, task.layouts)):
            if not counts:  # only keeps this process in step with the others
                task.runner(labels.batch)
                task.runner(labels.batch)
                continue
            measurement.measure_batch(labels)
            shown.update()
            hashes = hashes_of(labels.batch)
            hashes = hashes if labels.pairs is None else hashes[labels.pairs.is_text.numpy()]
            measured_rows.add(hashes)
            fitted += 0 if fitted_on is None else fitted_on.count(hashes)
    measurement.pool(processes)
    examples, fitted = (sum(processes.gathered([count])) for count in (source.examples, fitted))
    if not examples:
        raise ValueError("eval_batches is empty: there is nothing to measure on. Leave it out, or give held-out data.")
    measured_rows.pool(processes)
    if fitted:
        warnings.warn(
            f"{fitted} of the {examples} rows of eval_batches are rows that {task.name!r} was fitted on: the "
            "figures are on fitted rows, and say little about others. Give rows that are not in batches.",
            stacklevel=4,
        )
    groups = measurement.environments or range(len(measured_rows.hashes) or examples)
    return measurement.lines(fit_lines, len(groups), examples), examples, fitted, len(measurement.environments) or None


def measured_leakage(
    model: nn.Module, batches: Iterable[Any], adapter_name: str = "default", *, pool: str | None = None
) -> dict[str, float]:
    """Name of a module, or of a last hidden state → the leakage of the erased activations there, a magnitude.

    The model runs twice over the batches, which are held out. By default the pool is the one that the adapter was
    fitted for, or else the one that the head reads.
    """
    task, read = task_for(model, adapter_name, batches, pool, as_fitted=True)

    def erase(site: str, hidden: Tensor) -> Tensor:
        return apply_erasure(hidden, *task.layers[site].parts_on(adapter_name, hidden.device))

    lines, *_ = measure(task, read, erase)
    whole = (line for line in lines if line.visit is None)
    return {line.site: line.correlation_after for line in whole if line.correlation_after is not None}


# ---- both runs of the model ------------------------------------------------------------------------------------------


class _Measurement:
    """Both runs of the model over the held-out batches, one with the adapter and one without.

    The figures of a site are kept by visit: calls of its module in one forward pass are counted from 1.
    """

    def __init__(self, task: FitTask, erase: Callable[[str, Tensor], Tensor]) -> None:
        self._task, self._erase, z_dim = task, erase, task.config.z_dim
        # (erased, half, visit) → the moments of each site.
        self._halves: dict[tuple[bool, int, int], SiteStatistics] = defaultdict(lambda: SiteStatistics(z_dim))
        # (site, visit, whether of labelled positions) → `(3 + width,)` float64, the sums over rows x, which were moved
        # to x', of 1, |x' − x|², |x|² and the entries of x.
        self._movements: dict[tuple[str, int, bool], Tensor] = {}
        self._random = torch.Generator("cpu").manual_seed(0)
        # For each pair of environments, which one is in the first half; the same in every process.
        self._draws = torch.randint(0, 2, (_MOST_PAIRS,), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        self.environments: set[int] = set()  # The ids of the environments that were seen.
        self.observer: Callable[[bool, str, Tensor, Selection], None] | None = None

    def measure_batch(self, labels: BatchLabels) -> None:
        """Run the model over a batch without and with the erasure."""
        task, runner = self._task, self._task.runner
        finals = {name: m for name, m in runner.final_states().items() if labels.covers(runner.side_of(name))}
        plain: dict[str, Tensor] = {}
        called: Counter[tuple[bool, str]] = Counter()
        # Halves are made of whole sequences, since two tokens of one text are not independent evidence, and drawn at
        # random, since rows often alternate between the classes.
        half_of = torch.randint(0, 2, (labels.rows,), generator=self._random, device="cpu")
        if (environments := labels.environments) is not None:
            self.environments |= set(environments.tolist())
            half_of = self._draws[environments // 2 % _MOST_PAIRS] ^ (environments % 2)
        if labels.pairs is not None:  # a text and its counterfactual are in one half
            half_of = torch.where(labels.pairs.is_text, half_of, half_of[labels.pairs.text_of.clamp_min(0)])

        def observe(erased: bool, site: str, hidden: Tensor) -> Tensor:
            called[erased, site] += 1
            where = runner.side_of(site) if site in finals else visit_of(site, called[erased, site])
            before = None
            now, selection = labels.select(hidden, where)
            if site in finals and erased:
                before = plain[site]
            elif site in finals:
                plain[site] = now
            elif erased:
                before, hidden = now, self._erase(site, hidden)
                now, _ = labels.select(hidden, where)
            if self.observer is not None:
                self.observer(erased, site, now, selection)
            # A forward pass has one last hidden state, so it is always the first visit.
            self._add_activation(site, 1 if site in finals else called[erased, site], half_of, selection, now, before)
            return hidden

        for erased in (False, True):
            with observed(task.layers, task.name, functools.partial(observe, erased), finals):
                runner(labels.batch)

    @on_cpu()
    def _add_activation(
        self, site: str, visit: int, half_of: Tensor, selection: Selection, now: Tensor, before: Tensor | None = None
    ) -> None:
        """Add the activation of one visit, aligned with the labels; `before` is its value before an erasure."""
        guarded, rows = mean_pooled(now.float() if now.dtype.itemsize < 4 else now, selection)
        for half in (0, 1):
            of_half = rows.counted & (half_of == half).unsqueeze(1).to(now.device)
            statistics = self._halves[before is not None, half, visit]
            statistics.update(site, guarded, dataclasses.replace(rows, counted=of_half))
        if before is not None:
            for labelled, chosen in ((True, selection.counted), (False, selection.real & ~selection.counted)):
                old, new = (t[chosen].reshape(-1, t.shape[-1]).double() for t in (before, now))
                figures = [float(len(old)), float((new - old).square().sum()), float(old.square().sum())]
                moved = torch.cat([torch.tensor(figures, dtype=torch.float64), old.sum(0).cpu()])
                key = site, visit, labelled
                self._movements[key] = self._movements[key] + moved if key in self._movements else moved

    def pool(self, processes: Processes) -> None:
        """Add what all processes have measured, in every one of them."""
        if processes.count == 1:
            return
        own = self.environments, {key: half.share() for key, half in self._halves.items()}, self._movements
        every = processes.gathered([own])
        self.environments = set().union(*(environments for environments, _, _ in every))
        for key in sorted({key for _, halves, _ in every for key in halves}):
            self._halves[key].pool_shares([halves.get(key, {}) for _, halves, _ in every], processes)
        self._movements = {}
        for _, _, share in every:
            for key, moved in share.items():
                self._movements[key] = self._movements[key] + moved if key in self._movements else moved

    @on_cpu()
    def lines(self, fit_lines: Iterable[SiteReport], groups: int, examples: int) -> list[SiteReport]:
        """The lines of all sites, measured on `groups` sequences or environments, the last hidden states at the end."""
        visits: dict[str, set[int]] = {site: set() for site in self._task.layers}
        for (_, _, visit), statistics in self._halves.items():
            for site in statistics.moments:
                visits.setdefault(site, set()).add(visit)
        lines, by_site = [], {line.site: line for line in fit_lines}
        for site, numbers in visits.items():
            line, calls = by_site.get(site) or SiteReport(site), sorted(numbers)
            if not calls:
                lines.append(line)
                continue
            whole = self._measured_line(line, calls, groups)
            if whole.correlation_before is None or whole.correlation_after is None:
                of = f" in {groups} environments" if self.environments else ""
                raise ValueError(
                    f"eval_batches hold too little to measure on: {examples} sequences{of} are split into halves at "
                    f"random, {'by whole environments, ' if of else ''}and each half needs rows of two classes. Give "
                    "more held-out data."
                )
            lines.append(whole)
            for visit in calls if len(calls) > 1 else ():
                of_visit = SiteReport(site, visit, width=line.width, rank=line.rank)
                lines.append(self._measured_line(of_visit, [visit], groups))
        return lines

    def _measured_line(self, line: SiteReport, visits: list[int], groups: int) -> SiteReport:
        """The line with the figures of its site, over some of its visits together.

        It has no leakage where one half of the sequences lacks a class.
        """
        figures: dict[str, Any] = {}
        for erased, name in ((False, "before"), (True, "after")):
            halves = [self._half_moments(erased, half, line.site, visits) for half in (0, 1)]
            if all(half.rows and bool(half.covariance_z.diagonal().max() > 0) for half in halves):
                correlation = cross_validated_correlation(*halves)
                figures[f"correlation_{name}"] = max(0.0, correlation)
                figures[f"interval_{name}"] = correlation_interval(correlation, groups)
        for labelled, name in ((True, "change_labelled"), (False, "change_ignored")):
            keys = ((line.site, visit, labelled) for visit in visits)
            figures[name] = _relative_change([self._movements[key] for key in keys if key in self._movements])
        return dataclasses.replace(line, **figures)

    def _half_moments(self, erased: bool, half: int, site: str, visits: list[int]) -> ConceptMoments:
        """The moments of one half of the sequences over some visits of a site."""
        found = [self._halves[erased, half, visit].moments.get(site) for visit in visits]
        there = [moments for moments in found if moments is not None]
        together = ConceptMoments(there[0].x_dim if there else 1, self._task.config.z_dim)
        for moments in there:
            together.merge(moments)
        return together


def _relative_change(moved: Sequence[Tensor]) -> float | None:
    """The change `sqrt(E|x' − x|² / E|x − E x|²)` over all rows of such sums; None without rows."""
    if not moved:
        return None
    total = torch.stack(list(moved)).sum(0)
    rows, squared, squares = total[:3].tolist()
    variance = squares / rows - float((total[3:] / rows).square().sum()) if rows else 0.0
    return (squared / rows / variance) ** 0.5 if variance > 0 else None


# ---- rows that are recognised ----------------------------------------------------------------------------------------


class RowSet:
    """A set of rows, regardless of their order, their padding and how often each was seen."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._known = np.empty(0, np.uint64)

    def adding(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the same batches, and add the rows of each."""
        for batch in batches:
            self.add(hashes_of(batch))
            yield batch

    def add(self, hashes: np.ndarray) -> None:
        """Add rows by their hashes."""
        self._parts.append(hashes)

    @property
    def hashes(self) -> np.ndarray:
        """`(rows,)` uint64, sorted and each once."""
        if self._parts:
            self._known, self._parts = np.unique(np.concatenate([self._known, *self._parts])), []
        return self._known

    def pool(self, processes: Processes) -> None:
        """Make this the set of the rows of all processes, in every process."""
        self._parts = processes.gathered([self.hashes])

    def count(self, hashes: np.ndarray) -> int:
        """How many rows with these hashes were seen."""
        return int(np.isin(hashes, self.hashes).sum())


def hashes_of(batch: Any) -> np.ndarray:
    """One hash for each row, of its inputs without padding: `(rows,)` uint64; empty where `batch` is not a batch."""
    inputs = {
        name: value.detach().cpu()
        for name, value in (sorted(inputs_of(batch).items()) if isinstance(batch, Mapping) else ())
        if isinstance(value, Tensor) and value.dim() and name not in _NOT_CONTENT
        if not name.endswith("mask") and not name.startswith("decoder_")
    }
    if not inputs:
        return np.empty(0, np.uint64)
    inputs = {name: inputs[name] for name in _INPUTS if name in inputs} or inputs
    mask = batch.get("attention_mask")
    real = mask.detach().cpu().bool() if isinstance(mask, Tensor) else None
    rows = len(inputs.get("input_ids", next(iter(inputs.values()))))
    hashes = []
    for row in range(rows):
        hashed = hashlib.blake2b(digest_size=8)
        for value in inputs.values():
            # An input that has not one entry for each row, such as the patches of all images, is hashed as a whole.
            part = value[row] if len(value) == rows else value
            if len(value) == rows and real is not None and real.shape == value.shape[:2]:
                part = part[real[row]]
            part = part.float() if part.is_floating_point() else part.to(torch.int64)
            hashed.update(part.contiguous().numpy().tobytes())
        hashes.append(int.from_bytes(hashed.digest(), "little"))
    return np.array(hashes, np.uint64)


def shared_rows(batches: Iterable[Any], others: Iterable[Any]) -> tuple[int, int, int | None]:
    """Count the rows that figures of `others` are on, as `measure` does, in all processes together.

    Returns:
        How many texts `others` have, how many of these are also in `batches`, and the number of their environments,
        None where the batches name none.
    """
    processes, seen, examples, shared, environments = Processes(), RowSet(), 0, 0, set[int]()
    for batch in batches:
        seen.add(hashes_of(batch))
    seen.pool(processes)
    for batch in others:
        hashes = hashes_of(batch)
        named = batch if isinstance(batch, Mapping) else {}
        if "concept_pairs" in named:
            hashes = hashes[(torch.as_tensor(named["concept_pairs"]) < 0).cpu().numpy()]
        examples, shared = examples + len(hashes), shared + seen.count(hashes)
        environments |= set(torch.as_tensor(named.get("concept_environments", ())).tolist())
    every = processes.gathered([(examples, shared, environments)])
    examples, shared = (sum(counts[place] for counts in every) for place in (0, 1))
    return examples, shared, len(set().union(*(environments for _, _, environments in every))) or None
