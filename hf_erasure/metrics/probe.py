"""Probes of representations: one whose code length can be told, and those of scikit-learn on folds of whole groups."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import Floats, Ints

# A feature that varies by less than this share of its size is constant but for rounding.
_CONSTANT = 1e-10
# Logistic regression ends where no entry of the gradient of the mean loss is larger, or after so many steps.
_GRADIENT, _STEPS_TO_MINIMUM = 1e-6, 1000
# The perceptron: hidden units, full-batch steps of Adam, and their rate.
_HIDDEN, _STEPS, _RATE = 64, 200, 1e-2


@dataclass(frozen=True)
class LogisticProbe:
    """Class probabilities as a softmax of affine functions.

    Attributes:
        weight: `(classes, width)` float64.
        bias: `(classes,)` float64.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, classes: int, *, l2: float = 1.0, penalise_bias: bool = False) -> LogisticProbe:
        """Minimise `Σ −log p(y) + l2/2 · ‖weight‖²` (with two classes, of the one logit's weight).

        Args:
            x: `(rows, width)`, best standardised.
            y: `(rows,)` class ids; some classes may be absent if the bias is penalised.
            classes: How many classes there are.
            l2: Strength of the penalty; above 0, so that there is one minimum.
            penalise_bias: Penalise the bias as well; an absent class then keeps a probability above 0.

        Raises:
            ValueError: If `l2` is not positive.
        """
        if not l2 > 0:
            raise ValueError(f"l2={l2}: write a number above 0, or the probe has no unique minimum.")
        rows = x.double()
        inputs = torch.cat([rows, rows.new_ones(len(x), 1)], 1)
        # Two classes share one logit, as everywhere in the field; more have one each.
        theta = inputs.new_zeros(1 if classes == 2 else classes, inputs.shape[1]).requires_grad_()
        penalised = slice(None) if penalise_bias else slice(-1)
        optimiser = torch.optim.LBFGS(
            [theta], max_iter=2000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimiser.zero_grad()
            nll = F.cross_entropy(_logits(inputs @ theta.T), y)
            value = nll + l2 / (2 * len(x)) * theta[:, penalised].square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimiser.step(loss)
        found = theta.detach()
        if classes == 2:
            found = torch.cat([torch.zeros_like(found), found])
        return cls(found[:, :-1], found[:, -1])

    def log_probabilities(self, x: Tensor) -> Tensor:
        """`(rows, classes)` float64."""
        return (x.double() @ self.weight.T + self.bias).log_softmax(-1)


def _logits(scores: Tensor) -> Tensor:
    return scores if scores.shape[1] > 1 else torch.cat([torch.zeros_like(scores), scores], 1)


def standardised(x: Floats) -> Tensor:
    """Features with mean 0 and deviation 1; a constant feature is only centred."""
    mean, deviation = x.mean(0), x.std(0)
    constant = deviation <= _CONSTANT * np.sqrt((x**2).mean(0))
    return torch.from_numpy((x - mean) / np.where(constant, 1.0, deviation))


def held_out_answers(
    x: Floats,
    y: Ints,
    names: list[str],
    groups: Ints,
    *,
    folds: int = 5,
    seed: int = 0,
    l2: float = 1.0,
    nonlinear: bool = False,
) -> Ints:
    """The class that a probe fitted on the other folds gives to each row; features are standardised on those folds.

    Args:
        x: `(rows, width)`.
        y: `(rows,)` class ids from 0.
        names: Of the classes, for messages.
        groups: `(rows,)` ids from 0. Rows of one group are never split between fitting and judging.
        folds: How many probes are fitted; the folds get the classes in like shares.
        seed: Of folds and initial weights.
        l2: Penalty of the probe, `1 / C` of scikit-learn.
        nonlinear: A perceptron with one hidden layer instead of logistic regression.

    Returns:
        `(rows,)` class ids.

    Raises:
        ImportError: Without scikit-learn.
        ValueError: If there are fewer groups than folds, a class has all its rows in one fold, a fold is empty, or `l2`
            is not positive.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedGroupKFold
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("Probes need scikit-learn: pip install 'hf-erasure[metrics]'.") from error
    count = len(np.unique(groups))
    if not 2 <= folds <= count:
        raise ValueError(f"folds={folds}, but there are {count} groups: write a number between 2 and that.")
    if not l2 > 0:
        raise ValueError(f"l2={l2}: write a number above 0, or the probe has no unique minimum.")
    given = np.empty(len(y), dtype=np.int64)
    with warnings.catch_warnings():
        # A class with fewer groups than folds is fine as long as every probe sees it, which is checked below; and the
        # perceptron takes as many steps whatever the data, so that it always "stops early".
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        warnings.filterwarnings("ignore", "Stochastic Optimizer: Maximum iterations", UserWarning)
        for fitted, held in StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(x, y, groups):
            _check_fold(y, fitted, held, names)
            if nonlinear:
                probe: Any = MLPClassifier((_HIDDEN,), max_iter=_STEPS, n_iter_no_change=_STEPS, random_state=seed)
                probe.set_params(batch_size=len(fitted), learning_rate_init=_RATE, alpha=l2)
            else:
                probe = LogisticRegression(C=1 / l2, tol=_GRADIENT, max_iter=_STEPS_TO_MINIMUM)
            given[held] = make_pipeline(StandardScaler(), probe).fit(x[fitted], y[fitted]).predict(x[held])
    return given


def _check_fold(y: Ints, fitted: Ints, held: Ints, names: list[str]) -> None:
    absent = set(range(len(names))) - set(y[fitted].tolist())
    if absent:
        raise ValueError(
            f"All rows of the class {names[min(absent)]!r} are in one fold, so no probe could learn it: give rows of "
            "at least two groups for every class."
        )
    if not len(held):
        raise ValueError("A fold is empty: write fewer folds.")
