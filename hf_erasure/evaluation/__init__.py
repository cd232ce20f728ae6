"""Measure a model before and after adapters: bias, what is still readable, and the cost in capability."""

from .data import LAYOUT, DataFolder, MissingData
from .loading import AdapterDoesNotAct
from .measures import SUITES
from .results import LIMITS, Results
from .running import evaluate
from .subject import Evaluation

__all__ = [
    "LAYOUT", "LIMITS", "SUITES", "AdapterDoesNotAct", "DataFolder", "Evaluation", "MissingData", "Results", "evaluate",
]  # fmt: skip
