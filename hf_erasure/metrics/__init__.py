"""Measures of bias, leakage and capability, each an `evaluate` metric in a file of its own.

There are three ways to compute a number: `hf_erasure.metrics.WEAT().compute(…)`;
`evaluate.load(metric_path("weat")).compute(…)`, which needs no network; and `hf_erasure.metrics.weat.score(…)`, for
large arrays without a copy through Arrow. The functions of `benchmarks` run a model on a file and return figures.
"""

from pathlib import Path

from .base import Facts, Measure
from .crows_pairs import CrowSPairs
from .encoder_correlation import EncoderCorrelation
from .linear_leakage import LinearLeakage
from .minimum_description_length import MinimumDescriptionLength
from .perplexity import Perplexity
from .prediction_balance import PredictionBalance
from .pronoun_gap import PronounGap
from .stereoset import StereoSet
from .tpr_gap import TPRGap
from .weat import WEAT

_CLASSES: list[type[Measure]] = [
    CrowSPairs, EncoderCorrelation, LinearLeakage, MinimumDescriptionLength, Perplexity, PredictionBalance, PronounGap,
    StereoSet, TPRGap, WEAT,
]  # fmt: skip
# Name of the file → the metric in it.
METRICS = {metric.__module__.rpartition(".")[2]: metric for metric in _CLASSES}


def metric_path(name: str) -> str:
    """The path of the script of a metric, for `evaluate.load`.

    Raises:
        ValueError: If there is no metric with that name.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}: write one of {', '.join(METRICS)}.")
    return str(Path(__file__).with_name(f"{name}.py"))


__all__ = [
    "METRICS", "WEAT", "CrowSPairs", "EncoderCorrelation", "Facts", "LinearLeakage", "Measure",
    "MinimumDescriptionLength", "Perplexity", "PredictionBalance", "PronounGap", "StereoSet", "TPRGap", "metric_path",
]  # fmt: skip
