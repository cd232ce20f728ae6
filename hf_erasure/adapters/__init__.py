"""Everything that touches PEFT's internals."""

from .config import ConceptErasureConfig
from .layer import ErasureLayer, erasure_layers
from .lora_export import LoraExport, export_to_lora
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
    "LoraExport",
    "Verification",
    "erasure_layers",
    "export_to_lora",
    "verify_adapter",
]
