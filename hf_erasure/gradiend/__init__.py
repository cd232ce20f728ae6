"""The feature neuron on named gradients (GRADIEND, arXiv 2502.01406): tensors in, tensors out, with torch only.

`FeatureNeuron` is the paper's encoder-decoder, trained step by step; `ClosedFormEstimator` computes a feature from
class means in one pass. Both return a frozen `Feature`: a `FeatureEncoder`, which reads a gradient, and a
`FeatureDecoder`, which computes the change of the weights.
"""

from .closed_form import ClosedFormEstimator
from .features import Feature, FeatureDecoder, FeatureEncoder, prune_together
from .neuron import FeatureNeuron, Step

__all__ = [
    "ClosedFormEstimator",
    "Feature",
    "FeatureDecoder",
    "FeatureEncoder",
    "FeatureNeuron",
    "Step",
    "prune_together",
]
