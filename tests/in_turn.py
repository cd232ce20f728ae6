"""Fewer cases than a full product, where two things cannot act on each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def in_turn(arguments: str, *choices: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise with every combination of all choices but the last, and with one of the last for each.

    Every pair of a value of the last and a value of another one occurs, where one of the others has as many values as
    the last, or where there are two others. Write beside it why the last does not depend on all others together.

    Args:
        arguments: The names of the arguments, with commas.
        choices: The values of each argument.
    """
    *others, last = choices
    cells = [
        (*(values[at] for values, at in zip(others, index, strict=True)), last[sum(index) % len(last)])
        for index in itertools.product(*(range(len(values)) for values in others))
    ]
    return pytest.mark.parametrize([name.strip() for name in arguments.split(",")], cells, ids=str)
