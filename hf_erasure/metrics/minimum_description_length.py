"""Minimum description length probing with the online code (Voita & Titov 2020, arXiv 2003.12298, section 2.2).

The labels are sent in portions. The first costs `log2 K` bits a label; each later one is coded with a probe fitted on
everything before it. What is easy to read from few examples makes a short code. The rows themselves are known to both
sides, so features are standardised on all of them.

With more features than rows an unrestrained probe is sure and wrong, and its code longer than a uniform one. The paper
stops training early; here probes of several penalties are fitted each time, and the penalty that coded one portion best
codes the next one. Both sides know by then which that was, so it costs no bits.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from datasets import Sequence, Value
from torch import Tensor
from torch.nn import functional as F

from hf_erasure.metrics import base, resampling

# A feature that varies by less than this share of its size is constant but for rounding.
_CONSTANT = 1e-10
# Penalties of the probes that are tried: from hardly any to one that leaves little but the uniform code.
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)
# Where the paper cuts, in percent of the rows.
PORTIONS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25.0, 50.0, 100.0)


def score(
    x: Any,
    labels: Any,
    *,
    portions: Many[float] = PORTIONS,
    l2: float | Many[float] = PENALTIES,
    shuffle: bool = True,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The online code length of labels given representations.

    Args:
        x: `(rows, width)` Representations.
        labels: `(rows,)` The concept.
        portions: Ends of the portions in percent, increasing, the last 100; ends on the same row are one.
        l2: Penalty of the probe, bias included, so that a label not seen yet keeps a probability; of several, the one
            that was best on the portion before, and the greatest for the first probe.
        shuffle: Send the rows in an order drawn by seed; else as they are.
        confidence: Of the intervals.
        resamples: Of the bootstrap over the rows' code lengths, the probes as they are.
        seed: Of the order and the resamples.

    Returns:
        `compression` = `uniform_bits` / `codelength_bits`, both lengths, the ends of the `portions` as numbers of rows,
        the `portion_bits` that each took, `rows`, `classes`, `intervals`.

    Raises:
        ValueError: If there is one class only, `portions` do not increase to 100, or the input is malformed.
    """
    x = base.numbers("predictions", x)
    y, names = base.class_ids("references", base.labels("references", labels, len(x)))
    ends = _ends(portions, len(x))
    order = np.random.default_rng(seed).permutation(len(x)) if shuffle else np.arange(len(x))
    penalties = sorted(np.atleast_1d(np.asarray(l2, dtype=float)).tolist())
    bits = _code(_standardised(x)[order], torch.from_numpy(y[order]), len(names), ends, penalties)
    uniform = float(np.log2(len(names)))

    def figures(index: base.Ints) -> dict[str, float]:
        return {"compression": uniform / bits[index].mean(), "codelength_bits": bits[index].mean() * len(bits)}

    found = resampling.bootstrap(figures, len(x), resamples=resamples, confidence=confidence, seed=seed)
    each = [float(part.sum()) for part in np.split(bits, ends[:-1])]
    sizes = {"portions": ends, "portion_bits": each, "rows": len(x), "classes": len(names)}
    return {**found, "uniform_bits": uniform * len(x), **sizes}


def _ends(portions: Many[float], rows: int) -> list[int]:
    shares = list(portions)
    if not shares or shares[0] <= 0 or shares[-1] != 100 or any(a >= b for a, b in pairwise(shares)):
        raise ValueError(f"portions={shares}: write percentages that increase to 100.")
    return sorted({int(np.ceil(share / 100 * rows)) for share in shares})


def _code(x: Tensor, y: Tensor, classes: int, ends: list[int], penalties: list[float]) -> base.Floats:
    """`(rows,)` Bits that each label costs."""
    bits = torch.full((len(y),), float(np.log2(classes)), dtype=torch.float64)
    best = len(penalties) - 1
    for known, end in pairwise(ends):
        costs = []
        for l2 in penalties:
            found = LogisticProbe.fit(x[:known], y[:known], classes, l2=l2, penalise_bias=True)
            log_p = found.log_probabilities(x[known:end])
            costs.append(-log_p.gather(1, y[known:end, None])[:, 0] / np.log(2))
        bits[known:end] = costs[best]
        best = int(torch.stack(costs).sum(1).argmin())
    return bits.numpy()


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
            scores = inputs @ theta.T
            logits = scores if scores.shape[1] > 1 else torch.cat([torch.zeros_like(scores), scores], 1)
            value = F.cross_entropy(logits, y) + l2 / (2 * len(x)) * theta[:, penalised].square().sum()
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


def _standardised(x: base.Floats) -> Tensor:
    """Features with mean 0 and deviation 1; a constant feature is only centred."""
    mean, deviation = x.mean(0), x.std(0)
    constant = deviation <= _CONSTANT * np.sqrt((x**2).mean(0))
    return torch.from_numpy((x - mean) / np.where(constant, 1.0, deviation))


class MinimumDescriptionLength(base.Measure):
    """`score` as an `evaluate` metric."""

    facts = base.Facts(
        title="Minimum description length probe (online code)",
        figure="compression",
        paper="Voita & Titov 2020",
        url="https://arxiv.org/abs/2003.12298",
        formula="n log2 K / (t₁ log2 K − Σᵢ log2 p(y of portion i+1 | x, probe fitted on the first tᵢ))",
        better="lower",
        bounds=(0.0, float("inf")),
        ideal=1.0,
        interval="bootstrap over the rows' code lengths, order and probes as they are",
    )
    inputs = base.either_kind(["references"], predictions=Sequence(Value("float64")))
    usage = "predictions: representations; references: labels; portions=, l2=, shuffle="
    score = staticmethod(score)
