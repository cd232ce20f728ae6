"""The outcomes of the steps that are tried on a model type."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.utils import ModelOutput

PASS, REFUSED, TOLD, WRONG, FAILS = "pass", "refused", "says that it does not hold", "wrong", "fails"
DOES_NOT_APPLY, NOT_REACHED = "does not apply", "–"
_REASON = 300  # The largest number of characters of a reason.


class WrongError(Exception):
    """The result is wrong, and no error was raised."""


class ToldError(Exception):
    """The result is wrong, and a message of the package says so."""


class DoesNotApplyError(Exception):
    """A step does not apply to the model."""


@dataclass
class Outcomes:
    """The outcome of each step, and the reasons of those that did not pass."""

    of: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def step(self, name: str, function: Callable[[], None], *needs: str) -> None:
        """Run a step if the steps that it needs have ended with a result."""
        if any(self.of[earlier] not in (PASS, TOLD, WRONG) for earlier in needs):
            self.of[name] = NOT_REACHED
            return
        try:
            function()
            self.of[name] = PASS
        except Exception as error:
            known = {WrongError: WRONG, ToldError: TOLD, DoesNotApplyError: DOES_NOT_APPLY}
            self.of[name] = known.get(type(error), REFUSED if _is_refusal(error) else FAILS)
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f" ({frame.filename.rpartition('/')[2]}:{frame.lineno})" if self.of[name] == FAILS else ""
            if str(error):
                self.reasons[name] = f"{' '.join(str(error).split())[:_REASON]}{where}"

    def together(self, name: str, *steps: str) -> str:
        """The outcome of several steps: that of the first step that did not pass."""
        bad = [step for step in steps if self.of.get(step, PASS) not in (PASS, DOES_NOT_APPLY)]
        if bad and bad[0] in self.reasons:
            self.reasons.setdefault(name, self.reasons[bad[0]])
        if not bad and all(self.of.get(step) == DOES_NOT_APPLY for step in steps):
            return DOES_NOT_APPLY
        return self.of[bad[0]] if bad else PASS


def _is_refusal(error: Exception) -> bool:
    """Whether the package raised the error, with a whole sentence."""
    frames = traceback.extract_tb(error.__traceback__)
    is_kind = isinstance(error, (ValueError, TypeError, RuntimeError, NotImplementedError))
    return is_kind and "/hf_erasure/" in frames[-1].filename and len(str(error)) > 40


# ---- comparing outputs -----------------------------------------------------------------------------------------------


def tensors(output: object, path: str = "") -> dict[str, Tensor]:
    """Path → floating-point tensor, for all tensors in an output."""
    if isinstance(output, Tensor):
        return {path: output} if output.is_floating_point() else {}
    if isinstance(output, (ModelOutput, dict)):
        items = list(output.items())
    elif isinstance(output, (list, tuple)):
        items = list(enumerate(output))
    else:
        return {}
    return {name: value for key, part in items for name, value in tensors(part, f"{path}.{key}").items()}


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference, as a share of the largest value of its tensor; infinite where shapes differ."""
    if left.keys() != right.keys():
        raise WrongError("the outputs have other parts")
    if any(left[name].shape != right[name].shape for name in left):  # VITS computes the length of its sound
        return float("inf")
    most = [
        (left[name] - right[name]).abs().max() / right[name].abs().max().clamp_min(torch.finfo(torch.float32).eps)
        for name in left
        if left[name].numel()
    ]
    return float(torch.stack(most).nan_to_num(float("inf")).max()) if most else 0.0


def same(left: dict[str, Tensor], right: dict[str, Tensor], what: str, tolerance: float = 0.0) -> None:
    """Raise a `WrongError` if two outputs differ by more than the tolerance."""
    difference = apart(left, right)
    if difference > tolerance:
        raise WrongError(f"{what}: the outputs differ by {difference:.2g}")


def different(left: dict[str, Tensor], right: dict[str, Tensor], what: str) -> None:
    """Raise a `WrongError` if two outputs differ by less than an adapter should change them."""
    difference = apart(left, right)
    if difference <= 1e-4:  # rounding is some 1e-6
        raise WrongError(f"{what}: the outputs differ by only {difference:.2g}")
