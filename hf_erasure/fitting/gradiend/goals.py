"""What an edit is chosen for (arXiv 2502.01406, section 5): a number from class probabilities and language modelling.

Every goal is `LMS · mean over texts of …` with `p` the probabilities of the classes at the slot and LMS the
language-modelling score:

- `bpi`, balanced prediction: `(1 − |p₀ − p₁|)(p₀ + p₁)`;
- the name of any class `c`: `(1 − max over the others of p) · p_c`;
- `fpi` and `mpi`, female and male prediction: the same for the two classes female and male, and for no others;
- `balance`, for any number of classes: `(1 − (max p − min p)) · min p`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hf_erasure.fitting.concepts import female_and_male

Goal = Callable[[Tensor], Tensor]  # (texts, classes) probabilities → (texts,)

_GENDERS = ("fpi", "mpi")


def goal_by_name(name: str, classes: Sequence[str]) -> Goal:
    """The goal of that name.

    Args:
        name: `"bpi"`, `"fpi"`, `"mpi"`, `"balance"` or one of the classes.
        classes: The feature's classes, in the order of the columns of `p`.

    Raises:
        ValueError: If the name means nothing for these classes.
    """
    if name in classes:
        return _prefers(list(classes).index(name))
    if name == "balance":
        return lambda p: (1 - (p.amax(1) - p.amin(1))) * p.amin(1)
    if name == "bpi" and len(classes) == 2:
        return lambda p: (1 - (p[:, 0] - p[:, 1]).abs()) * p.sum(1)
    genders = female_and_male(classes)
    if name in _GENDERS and genders is not None:
        return _prefers(genders[_GENDERS.index(name)])
    raise ValueError(
        f"goal={name!r} is not defined for the classes {list(classes)}: write one of the class names, 'balance'"
        + (", 'bpi', or 'fpi' and 'mpi' for a female and a male class." if len(classes) == 2 else ".")
    )


def goal_names(classes: Sequence[str]) -> list[str]:
    """Every name that `goal_by_name` knows for these classes."""
    names = ["balance", *classes]
    if len(classes) == 2:
        names.append("bpi")
    return [*names, *(name for name in _GENDERS if female_and_male(classes) is not None and name not in classes)]


def _prefers(index: int) -> Goal:
    def goal(p: Tensor) -> Tensor:
        others = p.clone()
        others[:, index] = 0
        return (1 - others.amax(1)) * p[:, index]

    return goal
