"""A logistic-regression probe with a unique minimum, in float64, and folds that keep groups together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import Floats, Ints

# A feature that varies by less than this share of its size is constant but for rounding.
_CONSTANT = 1e-10


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


def standardised(x: Floats, on: Ints | None = None) -> Tensor:
    """Features with mean 0 and deviation 1 on some rows (all by default); a constant feature is only centred."""
    rows = x if on is None else x[on]
    mean, deviation = rows.mean(0), rows.std(0)
    constant = deviation <= _CONSTANT * np.sqrt((rows**2).mean(0))
    return torch.from_numpy((x - mean) / np.where(constant, 1.0, deviation))


def grouped_folds(groups: Ints, y: Ints, folds: int, seed: int) -> Ints:
    """`(rows,)` The fold of every row; a group's rows share one, and folds get the classes in like shares.

    Args:
        groups: `(rows,)` ids from 0.
        y: `(rows,)` class ids from 0.
        folds: How many.
        seed: Of the order in which groups are dealt.

    Raises:
        ValueError: If there are fewer groups than folds.
    """
    counts = np.zeros((groups.max() + 1, y.max() + 1))
    np.add.at(counts, (groups, y), 1)
    if not 2 <= folds <= len(counts):
        raise ValueError(f"folds={folds}, but there are {len(counts)} groups: write a number between 2 and that.")
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]  # the largest first, or they spoil the balance
    shares = counts / counts.sum(0)
    filled = np.zeros((folds, counts.shape[1]))
    chosen = np.empty(len(counts), dtype=np.int64)
    for group in order:
        crowded = ((filled + shares[group]) ** 2 - filled**2).sum(1)
        chosen[group] = np.lexsort((filled.sum(1), np.round(crowded, 12)))[0]
        filled[chosen[group]] += shares[group]
    return chosen[groups]
