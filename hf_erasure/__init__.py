"""Erase a concept from a Hugging Face model, as an adapter.

Importing this package registers its adapter types with PEFT, so that `model.add_adapter`, `model.load_adapter`,
`PeftModel.from_pretrained` and all other functions of PEFT work with them.
"""

import importlib
from types import ModuleType

from ._version import __version__
from .adapters import (
    ConceptErasureConfig,
    GradiendConfig,
    LoraExport,
    Verification,
    export_to_sentence_transformers,
    set_strength,
    set_target,
    verify_adapter,
)
from .callbacks import ConceptErasureCallback, GradiendCallback
from .fitting import ErasureReport, combine_adapters, concept_dataloader, fit_concept_erasure
from .fitting.gradiend import GradiendAdapter, GradiendTrainer, GradiendTrainingArguments
from .hub import export_to_lora
from .moved import install as _find_moved
from .patches import install as _wrap

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
    "export_to_sentence_transformers",
    "fit_concept_erasure",
    "set_strength",
    "set_target",
    "verify_adapter",
]

_find_moved()
_wrap()


def __getattr__(name: str) -> ModuleType:
    """Import `hf_erasure.metrics` when it is first used: most programs do not need it."""
    if name == "metrics":
        return importlib.import_module("hf_erasure.metrics")
    raise AttributeError(f"module 'hf_erasure' has no attribute {name!r}")
