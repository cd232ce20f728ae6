"""Measures of bias, leakage and capability, each an `evaluate` metric in a file of its own.

Three ways to one number: `hf_erasure.metrics.WEAT().compute(…)`; `evaluate.load(metric_path("weat")).compute(…)`,
without a network; and, for large arrays without the detour through Arrow, `hf_erasure.metrics.weat.score(…)`. What runs
a model is in `benchmarks`: a file and a model in, figures out.
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
# By the name of the file.
METRICS = {metric.__module__.rpartition(".")[2]: metric for metric in _CLASSES}


def metric_path(name: str) -> str:
    """The script of a metric, for `evaluate.load`.

    Raises:
        ValueError: If there is no metric of that name.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}: write one of {', '.join(METRICS)}.")
    return str(Path(__file__).with_name(f"{name}.py"))


__all__ = [
    "METRICS", "WEAT", "CrowSPairs", "EncoderCorrelation", "Facts", "LinearLeakage", "Measure",
    "MinimumDescriptionLength", "Perplexity", "PredictionBalance", "PronounGap", "StereoSet", "TPRGap", "metric_path",
]  # fmt: skip
