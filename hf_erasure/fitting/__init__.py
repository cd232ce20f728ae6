"""Run a model over data and fill an adapter."""

from .combining import combine_adapters
from .data import concept_dataloader
from .erasure import fit_concept_erasure
from .report import ErasureReport, SiteReport

__all__ = ["ErasureReport", "SiteReport", "combine_adapters", "concept_dataloader", "fit_concept_erasure"]
