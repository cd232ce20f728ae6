"""What metrics share: the facts about a metric, its class for `evaluate`, and the checks of its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Literal

import evaluate
import numpy as np
from datasets import Features, Value
from numpy.typing import NDArray
from torch import Tensor

from hf_erasure.models.scorer import whole as whole  # counts are checked in the same way here

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Facts:
    """The meaning of a metric's numbers.

    Attributes:
        title: The name of the metric in the field.
        figure: The key of the main number in the result.
        paper: The authors and the year of the definition.
        url: The address of the paper.
        formula: The main number as a formula.
        better: `"lower"`, `"higher"`, or `"closer"` to the ideal.
        bounds: The least and the greatest possible value; infinite if there is no limit.
        ideal: The value of a model without the bias, or without loss.
        interval: How the interval was computed.
        harness: The task of lm-evaluation-harness that measures the same on causal models, if there is one.
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

    def __str__(self) -> str:
        low, high = self.bounds
        words = {"lower": "lower is better", "higher": "higher is better", "closer": f"best at {self.ideal:g}"}
        return (
            f"{self.title} ({self.paper}, {self.url}). {self.figure} = {self.formula}; "
            f"between {low:g} and {high:g}, {words[self.better]}. Interval: {self.interval}."
        )


class Measure(evaluate.Metric):
    """A metric with its facts; subclasses define `facts`, `inputs` in the order of the arguments, and `score`.

    `evaluate.load` runs a copy of a metric's file from another folder, so such a file imports by absolute paths. It
    must not import this class by name: `evaluate` uses the first metric class in a file.
    """

    facts: ClassVar[Facts]
    inputs: ClassVar[Features | list[Features]]
    score: ClassVar[Callable[..., dict[str, Any]]]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.facts),
            citation=f"{self.facts.paper}, {self.facts.url}",
            inputs_description=f"The columns are the first arguments.\n\n{inspect.getdoc(self.score)}",
            features=self.inputs,
            reference_urls=[self.facts.url],
        )

    def _compute(self, **given: Any) -> dict[str, Any]:
        columns = [given.pop(name) for name in self._feature_names()]
        return self.score(*columns, **given)


def label_columns(labels: list[str], **others: Any) -> list[Features]:
    """The possible columns: each column of labels may have strings or whole numbers."""
    kinds = product(("string", "int64"), repeat=len(labels))
    # `evaluate` takes the order of the inputs from the first entry: predictions must be first.
    return [Features({**others, **dict(zip(labels, map(Value, kind), strict=True))}) for kind in kinds]


def numbers(name: str, values: Any, *, width: int | None = None, dims: int = 2) -> Floats:
    """Return an array of finite float64, `(rows,)` for `dims=1`, else `(rows, width)`.

    Raises `ValueError` if there are no rows, the shape is different, or a number is missing or not finite.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} are not numbers in rows of one length: {error}.") from error
    if array.size == 0:
        raise ValueError(f"{name} are empty: give at least one row.")
    if array.ndim != dims or (width is not None and array.shape[-1] != width):
        wanted = "(rows,)" if dims == 1 else f"(rows, {width or 'width'})"
        raise ValueError(f"{name} have the shape {tuple(array.shape)}: give {wanted}.")
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise ValueError(f"{name} hold NaN, infinity or None, first in row {row}: leave such rows out, and report it.")
    return array


def labels(name: str, values: Any, count: int, *, of: str = "predictions") -> list[Any]:
    """Return one label per row, as a list of strings or numbers. Raises `ValueError` if a label is missing."""
    found = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else list(values)
    if len(found) != count:
        raise ValueError(f"{len(found)} {name}, but {count} {of}: give one for each.")
    for row, label in enumerate(found):
        if label is None or label != label:
            raise ValueError(f"{name} have no label in row {row}: leave such rows out, and report it.")
    return found


def class_ids(name: str, values: Sequence[Any], *, least: int = 2) -> tuple[Ints, list[Any]]:
    """Return whole numbers from 0 for the labels, and the sorted classes, of which there must be at least `least`."""
    classes = sorted(set(values), key=lambda label: (isinstance(label, str), label))
    if not classes:
        raise ValueError(f"{name} are empty: give at least one row.")
    if len(classes) < least:
        raise ValueError(f"{name} hold only one class {classes[0]!r}: this metric compares at least {least}.")
    index = {label: position for position, label in enumerate(classes)}
    return np.array([index[label] for label in values], dtype=np.int64), classes
