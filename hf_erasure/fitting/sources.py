"""The batches of a fit, and what they are good for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_erasure.adapters import ConceptErasureConfig

from .labels import BatchLabels


@dataclass(frozen=True)
class Source:
    """Batches of one kind.

    Attributes:
        key: Tells them from the others of the fit.
        title: What messages call them.
        batches: Dicts of model inputs, plus `concept_labels` where there is a concept.
        concept: By whose labels they are read; None for a background, which decides on mean and covariance alone.
    """

    key: str
    title: str
    batches: Iterable[Any]
    concept: ConceptErasureConfig | None

    @property
    def labelled(self) -> bool:
        """Whether there is a concept."""
        return self.concept is not None

    @property
    def z_dim(self) -> int:
        """The number of columns the concept is coded in; 0 for a background."""
        return 0 if self.concept is None else self.concept.z_dim

    def labels_of(self, batch: dict[str, Any], pool: str) -> BatchLabels:
        """Which rows of a batch count, and what they say of the concept."""
        if self.concept is None:
            return BatchLabels(batch, 0, True, "tokens")
        return BatchLabels(batch, self.concept.z_dim, self.concept.labels is not None, pool)


def sources_of(concept: ConceptErasureConfig, batches: Iterable[Any], background: Iterable[Any] | None) -> list[Source]:
    """The labelled batches of one concept, and unlabelled ones where they are given."""
    labelled = Source("labelled", "batches", batches, concept)
    return [labelled, *background_source(background)]


def background_source(background: Iterable[Any] | None) -> list[Source]:
    """Unlabelled batches, where they are given."""
    return [] if background is None else [Source("background", "background", background, None)]
