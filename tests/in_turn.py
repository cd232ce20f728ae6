"""Fewer cases than a full product, for parameters that cannot act on each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def in_turn(arguments: str, *choices: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise with every combination of all choices but the last; each gets one value of the last choice, in turn.

    Each value of the last choice meets each value of another choice if one of the other choices has as many values as
    the last, or if there are two other choices. Say beside it why the last need not meet all combinations of others.

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
