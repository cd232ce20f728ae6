"""Trainer callbacks: keep an erasure up to date during fine-tuning, and watch or guard a feature."""

from .concept_erasure import ConceptErasureCallback
from .gradiend import GradiendCallback

__all__ = ["ConceptErasureCallback", "GradiendCallback"]
