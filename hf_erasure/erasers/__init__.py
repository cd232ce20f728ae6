"""Closed-form concept erasure on tensors: linear algebra that needs torch and nothing else.

`ConceptMoments` gathers means and covariances over any number of batches; `ConceptMoments.eraser` turns them into a
frozen `Eraser`; `apply_erasure` is what an eraser does to an activation. A method is one file with its paper:

* from moments, for arrays and for adapters: `leace`, `orth` (which is SAL, spectral attribute removal),
  `mean_projection`, and `inlp` with a least-squares probe,
* from rows, for arrays (`Eraser.fit`): `inlp` with logistic regression, and `rlace`,
* told the concept of every row, for analysis alone: `OracleEraser` and `QuadraticEraser`.

LEACE, `orth` and `mean_projection` guard against every linear probe, and so does `OracleEraser`; `inlp` and `rlace`
against those they came to; only `QuadraticEraser` against quadratic ones as well; none against all others.
"""

from .analysis import OracleEraser, QuadraticEraser
from .eraser import Eraser, apply_erasure
from .joint import combine_erasers, joint_moments
from .leakage import correlation_interval, cross_validated_correlation, expected_accuracy, relative_change
from .moments import ConceptMoments
from .on_rows import fit_inlp, fit_rlace

__all__ = [
    "ConceptMoments",
    "Eraser",
    "OracleEraser",
    "QuadraticEraser",
    "apply_erasure",
    "combine_erasers",
    "correlation_interval",
    "cross_validated_correlation",
    "expected_accuracy",
    "fit_inlp",
    "fit_rlace",
    "joint_moments",
    "relative_change",
]
