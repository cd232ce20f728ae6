"""Statistics of activations at the sites, gathered while the model runs over batches."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_erasure.erasers import ConceptMoments

from .labels import BatchLabels, Selection
from .processes import Processes
from .running import on_cpu
from .sources import Source


@dataclass
class Tally:
    """How much data was seen.

    Attributes:
        examples: Labelled sequences.
        tokens: Real positions.
    """

    examples: int = 0
    tokens: int = 0

    def count(self, batch: dict[str, Any]) -> int:
        """Add a batch; returns its sequences."""
        rows = BatchLabels(batch, 0, True, "tokens").rows
        mask = batch.get("attention_mask")
        self.examples += rows
        self.tokens += int(mask.sum()) if isinstance(mask, Tensor) else rows
        return rows

    @classmethod
    def sum(cls, tallies: Iterable[Tally]) -> Tally:
        """What was seen in all."""
        total = cls()
        for tally in tallies:
            total.examples, total.tokens = total.examples + tally.examples, total.tokens + tally.tokens
        return total

    def pooled(self, processes: Processes) -> Tally:
        """What all processes have seen together."""
        return Tally(int(processes.total(self.examples)), int(processes.total(self.tokens)))


@dataclass
class SiteStatistics:
    """Moments by site, created when the width of the activation is known."""

    z_dim: int
    moments: dict[str, ConceptMoments] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

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

    def pool(self, processes: Processes, sites: Iterable[str]) -> None:
        """Make the moments of these sites those of all processes together, in every one of them."""
        if processes.count == 1:
            return
        found = {site: (self.moments[site].x_dim, self.dtypes[site]) for site in sites if site in self.moments}
        everywhere = {site: facts for own in processes.gathered([found]) for site, facts in own.items()}
        for site in sites:
            if site in everywhere:
                width, self.dtypes[site] = everywhere[site]
                moments = self.moments.setdefault(site, ConceptMoments(width, self.z_dim))
                moments.pool(lambda own: processes.gathered([own]), processes.add_one)


def bar(what: str, progress: bool, processes: Processes, unit: str = " rows") -> tqdm:
    """A progress bar, on the main process only."""
    return tqdm(desc=what, unit=unit, disable=not (progress and processes.is_main))


def check_reached(found: Container[str], tally: Tally, sites: Iterable[str], source: Source) -> None:
    """Check that a source had data, and that every site saw some of it.

    Raises:
        ValueError: Says which was missing, and the remedy.
    """
    if not tally.examples:
        raise ValueError(
            f"{source.title} is empty: there is nothing to fit on. An iterator that was used up gives none either."
        )
    sites = list(sites)
    absent = [site for site in sites if site not in found]
    if not absent:
        return
    if len(absent) == len(sites) and source.labelled:
        raise ValueError(
            f"None of the {tally.examples} examples has a labelled position at {absent[0]!r}: concept_labels are "
            "-100, or the forward pass does not call this module, as where another one reads its weight itself. Name "
            "modules that are called."
        )
    raise ValueError(
        f"{absent[0]!r} and {len(absent) - 1} other sites were never reached while the model ran over {source.title}: "
        "name only modules that the forward pass calls (one whose weight another module reads itself is not called), "
        "or give batches that use them (decoder inputs for a decoder)."
    )
