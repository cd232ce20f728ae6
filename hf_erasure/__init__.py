"""Erase a concept from a Hugging Face model, as an adapter.

Importing this package registers its adapter types with PEFT; from then on `model.add_adapter`, `model.load_adapter`,
`PeftModel.from_pretrained` and all the other calls of PEFT work with them.
"""

from ._version import __version__
from .adapters import (
    ConceptErasureConfig,
    GradiendConfig,
    LoraExport,
    Verification,
    export_to_lora,
    verify_adapter,
)
from .callbacks import ConceptErasureCallback, GradiendCallback
from .fitting import ErasureReport, combine_adapters, concept_dataloader, fit_concept_erasure
from .fitting.gradiend import GradiendAdapter, GradiendTrainer, GradiendTrainingArguments

__all__ = [
    "ConceptErasureCallback",
    "ConceptErasureConfig",
    "ErasureReport",
    "GradiendAdapter",
    "GradiendCallback",
    "GradiendConfig",
    "GradiendTrainer",
    "GradiendTrainingArguments",
    "LoraExport",
    "Verification",
    "__version__",
    "combine_adapters",
    "concept_dataloader",
    "export_to_lora",
    "fit_concept_erasure",
    "verify_adapter",
]
