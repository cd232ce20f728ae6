"""What later visits of a module bring to its eraser, from pass to pass over the data, until it no longer changes.

An eraser acts at every visit of its module, and so it changes the covariances with the concept, the columns, at later
visits; it should remove just those that arrive with it in place. Columns of one pass may be put in place in the next,
but that rarely settles: in small models it leaves as much after forty passes as after four. Anderson acceleration
(Walker and Ni, "Anderson Acceleration for Fixed-Point Iterations", 2011, doi 10.1137/10078356X) takes the combination
of the passes so far whose changes cancel best.

Where hardly anything arrives once the columns are removed, what arrives says nothing of them. Then what the erasers
leave is added to the columns instead of what arrives being put in their place.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_erasure.models.model import on_cpu

from .labels import SiteStatistics
from .layouts import site_of
from .sites import SiteFit, left_of, scale_of

# Passes over the data of one fit. With four visits an ALBERT of width 128 takes 22; a wider model takes fewer.
MOST_PASSES = 60
# Not even half of what was left this many passes ago. Of models that settle, ALBERT of width 32 takes 6 to halve it.
PATIENCE = 8
# So many passes are combined. Those before were of erasers that are too different to tell of this one.
_MEMORY = 20
# Singular values of the changes, as a share of the largest, that are not divided by.
_CUTOFF = 1e-8


@dataclass
class Columns:
    """The columns at later visits, pass by pass.

    Attributes:
        given: What the erasers of a pass removed of later visits, flat, each in units of `|x| |z|`; the last is that of
            the pass to come.
        wanted: What they would better have removed: what arrived there in that pass, or, where that is added, what they
            removed and what they left.
        keys: Which visits they are of.
        adds: Whether what is left is added.
    """

    given: list[Tensor] = field(default_factory=list)
    wanted: list[Tensor] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    adds: bool = False
    # The first columns, and what is wanted where what they left is added.
    _first: list[Tensor] = field(default_factory=list)

    @on_cpu
    def next(
        self, seen: Mapping[str, SiteStatistics], fits: Mapping[str, SiteFit], *, stuck: bool = False
    ) -> dict[str, SiteStatistics]:
        """What the erasers of the next pass take later visits to be, by what was seen in the last, and its erasers.

        `stuck` begins again with the columns of the first pass, and adds what is left from there.
        """
        parts = [(of, key, m) for of, statistics in seen.items() for key, m in sorted(statistics.moments.items())]
        labelled = [part for part in parts if seen[part[0]].z_dim]
        keys = [f"{of}: {key}" for of, key, _ in labelled]
        found = torch.cat([(m.cross_covariance.cpu() / scale_of(m)).flatten() for *_, m in labelled])
        left = [(left_of(fits[site_of(key)].eraser, m).cpu() / scale_of(m)).flatten() for _, key, m in labelled]
        if keys != self.keys:
            self.keys, self.given, self.wanted, self._first, mixed = keys, [], [], [], found
        else:
            added = self.given[-1] + torch.cat(left)
            self._first = self._first or [self.given[-1], added]
            self.wanted.append(added if self.adds else found)
            if stuck:
                self.given, self.wanted, self.adds = self._first[:1], self._first[1:], True
            self.given, self.wanted = self.given[-_MEMORY:], self.wanted[-_MEMORY:]
            mixed = _mixed(self.given, self.wanted)
        self.given.append(mixed)
        columns = dict(zip(keys, mixed.split([part.numel() for part in left]), strict=True))
        taken = {of: SiteStatistics(statistics.z_dim) for of, statistics in seen.items()}
        for of, key, m in parts:
            if seen[of].z_dim:
                cross = columns[f"{of}: {key}"].view(m.x_dim, m.z_dim) * scale_of(m)
                m = m.with_concept(m.mean_z, cross.to(m.mean_z), m.covariance_z)
            taken[of].moments[key] = m
        return taken


def _mixed(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The next columns, by Anderson acceleration in its second form, without damping."""
    change = [after - before for before, after in zip(given, wanted, strict=True)]
    if len(change) == 1:
        return wanted[-1]
    differences = torch.stack([after - before for before, after in itertools.pairwise(change)], 1)
    steps = torch.stack([after - before for before, after in itertools.pairwise(wanted)], 1)
    weights = torch.linalg.lstsq(differences, change[-1][:, None], rcond=_CUTOFF, driver="gelsd").solution
    return wanted[-1] - (steps @ weights)[:, 0]
