"""Everything that touches PEFT's internals."""

from . import required  # noqa: F401  it checks what the others import, so it comes first
from .config import ConceptErasureConfig
from .gradiend_config import GradiendConfig
from .gradiend_state import (
    StoredFeature,
    edited,
    features_of,
    gradiend_layers,
    kept_share,
    set_features,
    stated_bytes,
    steer,
    targeted_parameters,
)
from .gradiend_tuner import GradiendModel
from .layer import ErasureLayer, erasure_layers
from .lora_export import LoraExport, export_to_lora
from .registration import register
from .seams import install
from .tuner import ConceptErasureModel
from .verification import Verification, verify_adapter

register("concept_erasure", ConceptErasureConfig, ConceptErasureModel)
register("gradiend", GradiendConfig, GradiendModel)
install()

__all__ = [
    "ConceptErasureConfig",
    "ConceptErasureModel",
    "ErasureLayer",
    "GradiendConfig",
    "GradiendModel",
    "LoraExport",
    "StoredFeature",
    "Verification",
    "edited",
    "erasure_layers",
    "export_to_lora",
    "features_of",
    "gradiend_layers",
    "kept_share",
    "set_features",
    "stated_bytes",
    "steer",
    "targeted_parameters",
    "verify_adapter",
]
