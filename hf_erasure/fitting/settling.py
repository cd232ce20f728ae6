"""What later visits of a module bring to its eraser, from pass to pass over the data, until it no longer changes.

An eraser acts at every visit of its module, and so it changes the covariances with the concept, the columns, at later
visits; it should remove just those that arrive with it in place. Columns of one pass may be put in place in the next,
but that rarely settles: in small models it leaves as much after forty passes as after four. Anderson acceleration
(Walker and Ni, "Anderson Acceleration for Fixed-Point Iterations", 2011, doi 10.1137/10078356X) takes the combination
of the passes so far whose changes cancel best.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_erasure.models.model import on_cpu

from .labels import SiteStatistics
from .sites import scale_of

# Passes over the data of one fit. With four visits an ALBERT of width 128 takes 22; a wider model takes fewer.
MOST_PASSES = 60
# Not even half of what was left this many passes ago: the columns of two such passes have little in common.
PATIENCE = 15
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
        found: What arrived there in that pass.
        keys: Which visits they are of.
    """

    given: list[Tensor] = field(default_factory=list)
    found: list[Tensor] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    @on_cpu
    def next(self, seen: Mapping[str, SiteStatistics]) -> dict[str, SiteStatistics]:
        """What the erasers of the next pass take later visits to be, from what was seen of these in the last."""
        parts = [(of, key, m) for of, statistics in seen.items() for key, m in sorted(statistics.moments.items())]
        labelled = [part for part in parts if seen[part[0]].z_dim]
        keys = [f"{of}: {key}" for of, key, _ in labelled]
        sizes = [m.x_dim * m.z_dim for *_, m in labelled]
        found = torch.cat([(m.cross_covariance.cpu() / scale_of(m)).flatten() for *_, m in labelled])
        if keys != self.keys or not self.given:
            self.keys, self.given, self.found, mixed = keys, [], [], found
        else:
            self.found = [*self.found, found][-_MEMORY:]
            self.given = self.given[-_MEMORY:]
            mixed = _mixed(self.given, self.found)
        self.given.append(mixed)
        columns = dict(zip(keys, mixed.split(sizes), strict=True))
        taken = {of: SiteStatistics(statistics.z_dim) for of, statistics in seen.items()}
        for of, key, m in parts:
            if seen[of].z_dim:
                cross = columns[f"{of}: {key}"].view(m.x_dim, m.z_dim) * scale_of(m)
                m = m.with_concept(m.mean_z, cross.to(m.mean_z), m.covariance_z)
            taken[of].moments[key] = m
        return taken


def _mixed(given: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """The next columns, by Anderson acceleration in its second form, without damping."""
    change = [after - before for before, after in zip(given, found, strict=True)]
    if len(change) == 1:
        return found[-1]
    differences = torch.stack([after - before for before, after in itertools.pairwise(change)], 1)
    steps = torch.stack([after - before for before, after in itertools.pairwise(found)], 1)
    weights = torch.linalg.lstsq(differences, change[-1][:, None], rcond=_CUTOFF, driver="gelsd").solution
    return found[-1] - (steps @ weights)[:, 0]
