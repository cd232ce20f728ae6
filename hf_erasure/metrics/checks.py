"""Refusals that metrics share, each a sentence that names the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hf_erasure.models.scorer import whole as whole  # counts are checked alike here

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class NotFinite(ValueError):
    """A number is missing or not finite."""


def numbers(name: str, values: Any, *, width: int | None = None, dims: int = 2) -> Floats:
    """An array of finite float64.

    Args:
        name: Of the input, for the message.
        values: A tensor, an array or lists.
        width: How many numbers each row must have.
        dims: 1 for `(rows,)`, 2 for `(rows, width)`.

    Raises:
        ValueError: If there are no rows, the shape is another, or a number is missing or not finite.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} are no numbers in rows of one length: {error}.") from error
    if array.size == 0:
        raise ValueError(f"{name} are empty: give at least one row.")
    if array.ndim != dims or (width is not None and array.shape[-1] != width):
        wanted = "(rows,)" if dims == 1 else f"(rows, {width or 'width'})"
        raise ValueError(f"{name} have the shape {tuple(array.shape)}: give {wanted}.")
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise NotFinite(f"{name} hold NaN, infinity or nothing, first in row {row}: leave such rows out and say so.")
    return array


def labels(name: str, values: Any, count: int, *, of: str = "predictions") -> list[Any]:
    """One label a row, as a list of strings or numbers.

    Raises:
        ValueError: If their number is not `count`, or one is missing.
    """
    found = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else list(values)
    if len(found) != count:
        raise ValueError(f"{len(found)} {name}, but {count} {of}: give one for each.")
    for row, label in enumerate(found):
        if label is None or label != label:
            raise ValueError(f"{name} have no label in row {row}: leave such rows out and say so.")
    return found


def class_ids(name: str, values: Sequence[Any], *, least: int = 2) -> tuple[Ints, list[str]]:
    """Whole numbers from 0 for labels, and the labels' names in their order.

    Raises:
        ValueError: If there are fewer classes than `least`.
    """
    names = sorted(set(values), key=lambda label: (isinstance(label, str), label))
    if not names:
        raise ValueError(f"{name} are empty: give at least one row.")
    if len(names) < least:
        raise ValueError(f"{name} hold the one class {names[0]!r}: this metric compares at least {least}.")
    index = {label: position for position, label in enumerate(names)}
    return np.array([index[label] for label in values], dtype=np.int64), [str(label) for label in names]
