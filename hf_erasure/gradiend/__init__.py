"""The feature neuron on named gradients (GRADIEND, arXiv 2502.01406): tensors in, tensors out, torch and nothing else.

`FeatureNeuron` is the paper's encoder-decoder, trained step by step; `ClosedFormEstimator` gets a feature from one
pass of class means. Either gives a frozen `Feature`: a `FeatureEncoder` that reads a gradient and a `FeatureDecoder`
that says how weights change.
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
