"""Closed-form concept erasure on tensors: linear algebra that needs torch and nothing else.

`ConceptMoments` gathers means and covariances over any number of batches; `ConceptMoments.eraser` turns them into a
frozen `Eraser`; `apply_erasure` is what an eraser does to an activation. LEACE is arXiv 2306.03819.
"""

from .apply import apply_erasure
from .combining import combine_erasers
from .eraser import Eraser
from .joint import joint_moments
from .leakage import cross_validated_correlation, relative_change
from .moments import ConceptMoments

__all__ = [
    "ConceptMoments",
    "Eraser",
    "apply_erasure",
    "combine_erasers",
    "cross_validated_correlation",
    "joint_moments",
    "relative_change",
]
