"""Run a model over data and fill an adapter."""

from .combine import combine_adapters
from .dataloader import concept_dataloader
from .fit import fit_concept_erasure
from .report import ErasureReport, SiteReport

__all__ = ["ErasureReport", "SiteReport", "combine_adapters", "concept_dataloader", "fit_concept_erasure"]
