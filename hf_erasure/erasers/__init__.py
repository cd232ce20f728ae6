"""Closed-form concept erasure on tensors: linear algebra that needs torch only.

`ConceptMoments` gathers means and covariances over any number of batches; `ConceptMoments.eraser` turns them into a
frozen `Eraser`; `apply_erasure` applies an eraser to an activation. The methods by what they are fitted from:

* from moments, for arrays and for adapters: `leace`, `orth` (which is SAL, spectral attribute removal),
  `mean_projection`, and `inlp` with a least-squares probe,
* from rows, for arrays (`Eraser.fit`): `inlp` with logistic regression, and `rlace`,
* from rows, given the concept of every row at test time, for analysis only: `OracleEraser` and `QuadraticEraser`.

LEACE, `orth`, `mean_projection` and `OracleEraser` guard against every linear probe; `inlp` and `rlace` guard against
their own probes; only `QuadraticEraser` guards against quadratic probes too. No method guards against all probes.
"""

from .analysis import OracleEraser, QuadraticEraser
from .eraser import Eraser, apply_erasure
from .joint import combine_erasers, joint_moments
from .leakage import correlation_interval, cross_validated_correlation, expected_accuracy
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
]
