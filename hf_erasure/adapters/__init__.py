"""Everything that touches PEFT's internals."""

from .config import ConceptErasureConfig
from .layer import ErasureLayer, erasure_layers
from .registration import register
from .seams import install
from .tuner import ConceptErasureModel
from .verification import Verification, verify_adapter

register("concept_erasure", ConceptErasureConfig, ConceptErasureModel)
install()

__all__ = [
    "ConceptErasureConfig",
    "ConceptErasureModel",
    "ErasureLayer",
    "Verification",
    "erasure_layers",
    "verify_adapter",
]
