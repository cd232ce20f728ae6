"""What every metric says of itself, and the class of `evaluate` that they share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Literal

import evaluate
from datasets import Features, Value

from hf_erasure.fitting.report import badness


@dataclass(frozen=True)
class Facts:
    """How a metric is to be read.

    Attributes:
        title: Its name in the field.
        figure: The key of its main number in the result.
        paper: Who defined it, where.
        url: Of the paper.
        formula: The main number as a formula.
        better: `"lower"`, `"higher"`, or `"closer"` to the ideal.
        bounds: The least and the greatest value there can be; infinite where there is no limit.
        ideal: The value of a model without the bias, or without loss.
        interval: What was drawn again for the interval.
        harness: The task of lm-evaluation-harness that measures the same on causal models, if there is one.
        citation: BibTeX.
    """

    title: str
    figure: str
    paper: str
    url: str
    formula: str
    better: Literal["lower", "higher", "closer"]
    bounds: tuple[float, float]
    ideal: float
    interval: str
    harness: str | None = None
    citation: str = ""

    def badness(self, value: float) -> float:
        """How far a value falls short of the ideal; 0 at it, and beyond it unless the ideal is to be met exactly."""
        return badness(value, self.better, self.ideal)

    def __str__(self) -> str:
        low, high = self.bounds
        words = {"lower": "lower is better", "higher": "higher is better", "closer": f"best at {self.ideal:g}"}
        return (
            f"{self.title} ({self.paper}, {self.url}). {self.figure} = {self.formula}; "
            f"between {low:g} and {high:g}, {words[self.better]}. Interval: {self.interval}."
        )


class Measure(evaluate.Metric):
    """A metric with its facts; subclasses give `facts`, `inputs` and `_compute`.

    Scripts that `evaluate.load` reads must not import this class by name: `evaluate` takes the first metric class that
    it finds in a script for the script's own.
    """

    facts: ClassVar[Facts]
    inputs: ClassVar[Features | list[Features]]
    usage: ClassVar[str] = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.facts),
            citation=self.facts.citation or f"{self.facts.paper}, {self.facts.url}",
            inputs_description=self.usage,
            features=self.inputs,
            reference_urls=[self.facts.url],
        )


def either_kind(labels: list[str], **others: Any) -> list[Features]:
    """Columns whose labels may be strings or whole numbers, each column for itself."""
    kinds = product(("string", "int64"), repeat=len(labels))
    # `evaluate` names the inputs in the order of the first entry: predictions stay first.
    return [Features({**others, **dict(zip(labels, map(Value, kind), strict=True))}) for kind in kinds]
