"""Class ids of a concept numbered together with those of other labels, and what their moments tell of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .eraser import whiten_concept
from .moments import ConceptMoments
from .statistics import IGNORED


@dataclass(frozen=True)
class Strata:
    """The classes of a concept, told apart by environment and by the class of what is kept.

    One id stands for all three, so that the moments of one pass have the covariances of each.

    Attributes:
        classes: The number of classes of the concept.
        environments: The number of environments, such as templates or sources; 1 where there are none.
        kept: The number of classes of the label that is kept; 1 where there is none.
    """

    classes: int
    environments: int = 1
    kept: int = 1

    @property
    def size(self) -> int:
        """How many ids there are."""
        return self.classes * self.environments * self.kept

    def ids(self, labels: Tensor, environments: Tensor | int = 0, kept: Tensor | int = 0) -> Tensor:
        """The ids of rows, `IGNORED` where their label is; all of one shape, or of one that broadcasts to it."""
        return torch.where(
            labels == IGNORED, IGNORED, labels + self.classes * (environments + self.environments * kept)
        )

    def concept(self, moments: ConceptMoments) -> ConceptMoments:
        """The moments of the concept alone."""
        return moments if self.size == self.classes else moments.grouped(self._all() % self.classes, self.classes)

    def kept_columns(self, moments: ConceptMoments) -> Tensor | None:
        """`(x_dim, m)` covariances of x with what is kept; None where nothing is."""
        if self.kept == 1:
            return None
        whole = moments.grouped(self._all() // (self.classes * self.environments), self.kept)
        return whole.cross_covariance @ whiten_concept(whole.covariance_z)

    def environment_columns(self, moments: ConceptMoments) -> Tensor:
        """`(x_dim, m)` covariances of x with the concept within each environment, weighted by the root of its share.

        An environment in which one class alone occurs has none.
        """
        apart = moments.grouped(self._all() % (self.classes * self.environments), self.classes * self.environments)
        shares = apart.mean_z.view(self.environments, self.classes)
        crosses = apart.cross_covariance.unflatten(1, shares.shape)
        columns = []
        for place, own in enumerate(shares):
            share = own.sum()
            if share > 0:
                within, cross = own / share, crosses[:, place] / share
                centred = cross - cross.sum(1, keepdim=True) * within
                concept = within.diag() - torch.outer(within, within)
                columns.append(share.sqrt() * centred @ whiten_concept(concept))
        return torch.cat(columns, 1)

    def _all(self) -> Tensor:
        return torch.arange(self.size, device="cpu")
