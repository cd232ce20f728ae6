"""Measure an erasure on data that it was not fitted on: leakage before and after, and how far activations move.

Each row is recognised by a hash of eight bytes, so that held-out rows that were also fitted on are noticed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.adapters.common.acting import warn_user
from hf_erasure.adapters.common.config import number_of
from hf_erasure.erasers import ConceptMoments, apply_erasure, correlation_interval, cross_validated_correlation
from hf_erasure.models.layout import Visit
from hf_erasure.models.model import MEDIA, TEXTS, evaluating, inputs_of, on_cpu

from .labels import BatchLabels, Selection, SiteStatistics, Source, length_of, mean_pooled
from .layouts import observed
from .pairs import ids_in, without_counterfactuals
from .processes import Processes
from .report import SiteReport, rows_in_words
from .sites import FitTask, task_for

# Environments are put into halves in pairs, one into each half. This many pairs have a random draw of their own.
_MOST_PAIRS = 1 << 16
# In a batch without texts or media, the inputs that are not content, such as labels, or that follow from padding.
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
    fitted_on: set[int] | None = None,
) -> tuple[list[SiteReport], int, int, int | None]:
    """Measure leakage and movement on held-out batches, at every site and at the last hidden states.

    Leakage is measured in what the fit guards: tokens, or with `pool="mean"` the mean over each sequence. It is
    cross-validated: the direction is found on one half of the sequences and judged on the other. An in-sample
    correlation would be `sqrt(width / rows)` where nothing is left. Where batches have environments, such as templates,
    each environment is in one half, so that a direction is not judged on an environment that it was found on. So is a
    sequence that comes again. A module that is called several times in one forward pass is measured over all its
    visits, as it is fitted, and at each.

    `erase(site, activation)` returns the erased activation; the adapter itself need not have its values yet. Every
    process measures its own batches, and all processes end with the figures of all batches, put into the lines of the
    fit, `fit_lines`. Warns where the batches share sequences with those that were fitted on.

    Returns:
        One line for each site, and one for each visit of a site with several; the number of sequences; how many of
        these were fitted on; and the number of their environments, None where the batches name none.
    """
    # Environments, and classes of what is kept, matter to fitting alone.
    concept = copy.copy(task.config)
    concept.environment_rank = concept.kept = None
    measurement, processes = _Measurement(task, concept, erase), task.processes
    if isinstance(batches, ObservedBatches):
        measurement.observer, batches = batches.observer, batches.batches
    source, fitted = Source(concept, map(without_counterfactuals, batches)), 0
    fitted_rows = set().union(*processes.gathered([fitted_on or set()]))
    what, total, read = f"measuring {task.name}", length_of(batches), source.read(task.pool, task.layouts)
    with processes.fail_together("measuring its batches"), evaluating(task.runner.model):
        shown = tqdm(read, what, total, unit=" batches", disable=not task.progress)
        for labels, counts in task.batches_to_run(shown):
            if not counts:  # only keeps this process in step with the others
                task.runner(labels.batch)
                task.runner(labels.batch)
                continue
            hashes = hashes_of(labels.batch)
            measurement.measure_batch(labels, hashes)
            fitted += sum(row in fitted_rows for row in itertools.compress(hashes, labels.labelled.tolist()))
    measurement.pool(processes)
    examples, fitted = (sum(processes.gathered([count])) for count in (source.examples, fitted))
    if not examples:
        raise ValueError(
            "eval_batches is empty, or has no labels: there is nothing to measure on. Leave it out, or give held-out "
            "data."
        )
    if fitted:
        warn_user(
            f"{fitted} of the {number_of(examples, 'row')} of eval_batches are rows that {task.name!r} was fitted on: "
            "the figures are on fitted rows, and say little about others. Give rows that are not in batches."
        )
    groups = measurement.environments or measurement.sequences or range(examples)
    return measurement.lines(fit_lines, len(groups), examples), examples, fitted, len(measurement.environments) or None


def measured_leakage(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str = "default",
    *,
    pool: str | None = None,
    fitted_on: set[int] | None = None,
) -> tuple[dict[str, float], str]:
    """Measure the leakage of the erased activations at every module, and at the last hidden states.

    The model runs twice over the batches, which are held out. By default the pool is the one that the adapter was
    fitted for, or else the one that the head reads. `fitted_on` has the hashes of the rows that it was fitted on.

    Returns:
        Name of a module, or of a last hidden state → the leakage there, a magnitude; and the rows in words.
    """
    task, read = task_for(model, adapter_name, batches, pool, as_fitted=True)

    def erase(site: str, hidden: Tensor) -> Tensor:
        return apply_erasure(hidden, *task.layers[site].parts_on(adapter_name, hidden.device))

    lines, examples, fitted, environments = measure(task, read, erase, fitted_on=fitted_on)
    whole = (line for line in lines if line.visit is None)
    leakage = {line.site: line.correlation_after for line in whole if line.correlation_after is not None}
    return leakage, rows_in_words(examples, fitted, environments)


# ---- both runs of the model ------------------------------------------------------------------------------------------


class _Measurement:
    """Both runs of the model over the held-out batches, one with the adapter and one without.

    The figures of a site are kept by visit.
    """

    def __init__(self, task: FitTask, concept: ConceptErasureConfig, erase: Callable[[str, Tensor], Tensor]) -> None:
        self._task, self._erase = task, erase
        # (erased, half) → the moments at each visit.
        self._halves = {(erased, half): SiteStatistics(concept) for erased in (False, True) for half in (0, 1)}
        # (visit, whether of labelled positions) → `(3 + width,)` float64, the sums over rows x, which were moved to x',
        # of 1, |x' − x|², |x|² and the entries of x.
        self._movements: dict[tuple[Visit, bool], Tensor] = {}
        self._random = torch.Generator("cpu").manual_seed(0)
        # For each pair of environments, which one is in the first half; the same in every process.
        self._draws = torch.randint(0, 2, (_MOST_PAIRS,), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        self._half_of: dict[int, int] = {}  # The hash of a sequence → its half, where no environment decides.
        # The ids of the environments of labelled rows, and the hashes of the labelled sequences.
        self.environments, self.sequences = set[int](), set[int]()
        self.observer: Callable[[bool, str, Tensor, Selection], None] | None = None

    def measure_batch(self, labels: BatchLabels, hashes: Sequence[int]) -> None:
        """Run the model over a batch, whose sequences have these hashes, without and with the erasure."""
        task, runner = self._task, self._task.runner
        finals = {name: m for name, m in runner.final_states().items() if labels.covers(name)}
        plain: dict[str, Tensor] = {}
        called: Counter[tuple[bool, str]] = Counter()
        # Halves are made of whole sequences, since two tokens of one text are not independent evidence, and drawn at
        # random, since rows often alternate between the classes. A sequence that comes again stays in its half.
        half_of = torch.randint(0, 2, (labels.rows,), generator=self._random, device="cpu")
        if len(hashes) == labels.rows:
            drawn = zip(hashes, half_of.tolist(), strict=True)
            half_of = torch.tensor([self._half_of.setdefault(row, half) for row, half in drawn], device="cpu")
            self.sequences.update(itertools.compress(hashes, labels.labelled.tolist()))
        if "concept_environments" in labels.batch:
            environments = ids_in(labels.batch, "concept_environments", labels.rows)
            self.environments |= set(environments[labels.labelled].tolist())
            half_of = self._draws[environments // 2 % _MOST_PAIRS] ^ (environments % 2)
        if labels.pairs is not None:  # a text and its counterfactual are in one half
            half_of = torch.where(labels.pairs.is_text, half_of, half_of[labels.pairs.text_of.clamp_min(0)])

        def observe(erased: bool, site: str, hidden: Tensor) -> Tensor:
            called[erased, site] += 1
            # A forward pass has one last hidden state, so it is always the first visit.
            visit = Visit(site) if site in finals else Visit(site, called[erased, site])
            before = None
            now, selection = labels.select(hidden, visit)
            if site in finals and erased:
                before = plain[site]
            elif site in finals:
                plain[site] = now
            elif erased:
                before, hidden = now, self._erase(site, hidden)
                now, _ = labels.select(hidden, visit)
            if self.observer is not None:
                self.observer(erased, site, now, selection)
            self._add_activation(visit, half_of, selection, now, before)
            return hidden

        for erased in (False, True):
            with observed(task.layers, task.name, functools.partial(observe, erased), finals):
                runner(labels.batch)

    @on_cpu()
    def _add_activation(
        self, visit: Visit, half_of: Tensor, selection: Selection, now: Tensor, before: Tensor | None = None
    ) -> None:
        """Add the activation of one visit, aligned with the labels; `before` is its value before an erasure."""
        guarded, rows = mean_pooled(now.float() if now.dtype.itemsize < 4 else now, selection)
        for half in (0, 1):
            of_half = rows.counted & (half_of == half).unsqueeze(1).to(now.device)
            statistics = self._halves[before is not None, half]
            statistics.update(visit, guarded, dataclasses.replace(rows, counted=of_half))
        if before is not None:
            for labelled, chosen in ((True, selection.counted), (False, selection.real & ~selection.counted)):
                old, new = (t[chosen].reshape(-1, t.shape[-1]).double() for t in (before, now))
                figures = [float(len(old)), float((new - old).square().sum()), float(old.square().sum())]
                moved = torch.cat([torch.tensor(figures, dtype=torch.float64), old.sum(0).cpu()])
                key = visit, labelled
                self._movements[key] = self._movements[key] + moved if key in self._movements else moved

    def pool(self, processes: Processes) -> None:
        """Add what all processes have measured, in every one of them."""
        for statistics in self._halves.values():
            statistics.pool(processes)
        seen = processes.gathered([(self.environments, self.sequences)])
        self.environments, self.sequences = (set().union(*found) for found in zip(*seen, strict=True))
        shares, self._movements = processes.gathered([self._movements]), {}
        for share in shares:
            for key, moved in share.items():
                self._movements[key] = self._movements[key] + moved if key in self._movements else moved

    @on_cpu()
    def lines(self, fit_lines: Iterable[SiteReport], groups: int, examples: int) -> list[SiteReport]:
        """The lines of all sites, measured on `groups` sequences or environments, the last hidden states at the end."""
        visits: dict[str, set[Visit]] = {site: set() for site in self._task.layers}
        for statistics in self._halves.values():
            for visit in statistics.moments:
                visits.setdefault(visit.site, set()).add(visit)
        lines, by_site = [], {line.site: line for line in fit_lines}
        for site, here in visits.items():
            line, calls = by_site.get(site) or SiteReport(site), sorted(here)
            if not calls:
                lines.append(line)
                continue
            whole = self._measured_line(line, calls, groups)
            if whole.correlation_before is None or whole.correlation_after is None:
                of = f" in {number_of(groups, 'environment')}" if self.environments else ""
                raise ValueError(
                    f"eval_batches hold too little to measure on: {number_of(examples, 'sequence')}{of} "
                    f"{'is' if examples == 1 else 'are'} split into halves at random, "
                    f"{'by whole environments, ' if of else ''}and each half needs rows of two classes. Give more "
                    "held-out data."
                )
            lines.append(whole)
            for visit in calls if len(calls) > 1 else ():
                of_visit = SiteReport(site, visit.number, width=line.width, rank=line.rank)
                lines.append(self._measured_line(of_visit, [visit], groups))
        return lines

    def _measured_line(self, line: SiteReport, visits: list[Visit], groups: int) -> SiteReport:
        """The line with the figures of its site, over some of its visits together.

        It has no leakage where one half of the sequences lacks a class, and no change without rows.
        """
        figures: dict[str, Any] = {"change_labelled": None, "change_ignored": None}
        for erased, name in ((False, "before"), (True, "after")):
            halves = []
            for half in (0, 1):
                moments_at = self._halves[erased, half].moments
                there = [moments_at[visit] for visit in visits if visit in moments_at]
                together = ConceptMoments(there[0].x_dim if there else 1, self._task.config.z_dim)
                for moments in there:
                    together.merge(moments)
                halves.append(together)
            if all(half.rows and bool(half.covariance_z.diagonal().max() > 0) for half in halves):
                correlation = cross_validated_correlation(*halves)
                figures[f"correlation_{name}"] = max(0.0, correlation)
                figures[f"interval_{name}"] = correlation_interval(correlation, groups)
        for labelled, name in ((True, "change_labelled"), (False, "change_ignored")):
            keys = ((visit, labelled) for visit in visits)
            if moved := [self._movements[key] for key in keys if key in self._movements]:
                total = torch.stack(moved).sum(0)
                rows, squared, squares = total[:3].tolist()
                variance = squares / rows - float((total[3:] / rows).square().sum()) if rows else 0.0
                figures[name] = (squared / rows / variance) ** 0.5 if variance > 0 else None
        return dataclasses.replace(line, **figures)


# ---- rows that are recognised ----------------------------------------------------------------------------------------


def noting_rows(batches: Iterable[Any], rows: set[int]) -> Iterator[Any]:
    """Yield the same batches, and add the hashes of the rows of each to `rows`."""
    for batch in batches:
        rows.update(hashes_of(batch))
        yield batch


def hashes_of(batch: Any) -> list[int]:
    """One hash for each row, of its inputs without padding; empty where `batch` is not a batch."""
    inputs = {
        name: value.detach().cpu()
        for name, value in (sorted(inputs_of(batch).items()) if isinstance(batch, Mapping) else ())
        if isinstance(value, Tensor) and value.dim() and name not in _NOT_CONTENT
        if not name.endswith("mask") and not name.startswith("decoder_")
    }
    if not inputs:
        return []
    # A batch may hold more than the content of a row, such as the row's number.
    inputs = {name: inputs[name] for name in (*TEXTS, *MEDIA) if name in inputs} or inputs
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
    return hashes
