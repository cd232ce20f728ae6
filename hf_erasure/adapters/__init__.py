"""All code that uses PEFT's internals."""

from .internals import register  # isort: skip  it checks the internals that the other imports need, so it comes first
from .erasure.config import ConceptErasureConfig
from .erasure.layer import ErasureLayer, erasure_layers, site_layers
from .erasure.model import ConceptErasureModel, set_strength, set_target
from .gradiend.config import GradiendConfig
from .gradiend.layer import gradiend_layers
from .gradiend.model import GradiendModel
from .gradiend.state import edited, features_of, kept_share, set_features, stated_bytes, steer, targeted_parameters
from .merging.export import LoraExport, export_to_lora, export_to_sentence_transformers
from .verification import Verification, verify_adapter

register("concept_erasure", ConceptErasureConfig, ConceptErasureModel)
register("gradiend", GradiendConfig, GradiendModel)

__all__ = [
    "ConceptErasureConfig",
    "ConceptErasureModel",
    "ErasureLayer",
    "GradiendConfig",
    "GradiendModel",
    "LoraExport",
    "Verification",
    "edited",
    "erasure_layers",
    "export_to_lora",
    "export_to_sentence_transformers",
    "features_of",
    "gradiend_layers",
    "kept_share",
    "set_features",
    "set_strength",
    "set_target",
    "site_layers",
    "stated_bytes",
    "steer",
    "targeted_parameters",
    "verify_adapter",
]
