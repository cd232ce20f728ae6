"""Relaxed linear adversarial concept erasure, R-LACE (Ravfogel et al. 2022, arXiv 2201.12091).

A game: the eraser chooses an orthogonal projection of a given rank, the adversary the linear probe that then reads the
concept best, and the eraser wants that probe's loss to be high. Projections are no convex set; the Fantope
`{0 ≤ P ≤ I, tr P = rank}` is the smallest one around them, and the game is played on it.

For k classes and a rank of at least k − 1 the value of the game is known: the projection away from the class means
leaves the probe with the loss of a constant, and no eraser can do better. Of rank k − 1 it is the only one that can, so
that the optimum of R-LACE is what `orth` computes in closed form. A game of finitely many steps only comes near it,
and near is said of the adversary it was played against: a probe with a weaker ridge reads what little is left of the
class means where features hardly vary. With fewer directions there is no closed form, and R-LACE has a place of its
own: it leaves less to a probe than `orth` with its rank capped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .eraser import Eraser
from .logistic import ClassRows, Curvature, class_rows, errors, logistic_probe, ridge_of

STEPS = 100

# The first step is as long as a projection of rank 1, the last this share of it.
_LAST_STEP = 1e-3
# The adversary's ridge falls from this to what was asked for, over this share of the steps. On 450 rows of width 384,
# which a weakly penalised probe separates with nearly any direction gone, 100 steps end 4e-4 nats from the optimum so;
# after 300 steps with the last ridge from the start a probe still read held-out rows with 92 % accuracy.
_FIRST_RIDGE, _SOFTENED = 10.0, 0.9
# Steps after which the projection is rounded and judged.
_EVERY = 10
# Slope at which a probe's answer counts as found.
_TOLERANCE = 1e-6


@torch.inference_mode(False)
@torch.no_grad()
def fit_rlace(
    x: Tensor,
    z: Tensor,
    *,
    rank: int | None = None,
    steps: int = STEPS,
    affine: bool = True,
    penalty: float | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Eraser:
    """R-LACE on one batch of rows.

    The adversary is logistic regression and answers every projection with its best probe; the slope of the value of
    the game is then that of the loss with the probe held fixed (Danskin), and the eraser takes a step along it, of a
    length that falls geometrically to a thousandth, back onto the Fantope. The adversary begins with a strong ridge,
    which makes it look at large differences first, and ends with the one that was asked for. The paper takes stochastic
    steps for both sides; these have no randomness. Of the relaxed projections, rounded to their leading eigenvectors,
    the one with the highest loss is kept. Every step takes the eigenvectors of an x_dim × x_dim matrix.

    Args:
        x: `(…, x_dim)` activations.
        z: Integer class ids `(…)`, −100 to leave a row out.
        rank: The number of directions that are removed; None for k − 1.
        steps: Of the eraser.
        affine: Keep the mean in place. The paper's map is without.
        penalty: Ridge on the adversary's weights; None for one over the rows.
        weight: `(…)` non-negative weights of rows.
        mask: `(…)` bool, False leaves a row out.

    Returns:
        An orthogonal projection of exactly that rank.

    Raises:
        TypeError: If an argument is no tensor of numbers, or a count no int.
        ValueError: If `z` is no class ids, there is one class only, x does not vary, or an option is out of range.
    """
    rows = class_rows(x, z, weight, mask, "rlace")
    width = rows.x.shape[1]
    count = min(width, max(1, rows.target.shape[1] - 1)) if rank is None else rank
    for name, value, most in (("rank", count, width), ("steps", steps, None)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}: give an int.")
        if value < 1 or (most is not None and value > most):
            raise ValueError(f"{name} is {value}: it must be 1 or more{'' if most is None else f', at most {most}'}.")
    basis = rows.cleaned(_play(rows, count, steps, penalty))
    return Eraser(basis, basis.T, rows.mean if affine else None)


def _play(rows: ClassRows, rank: int, steps: int, penalty: float | None) -> Tensor:
    """`(d, rank)` orthonormal directions of the best projection found."""
    width, last = rows.x.shape[1], ridge_of(rows, penalty)
    relaxed = torch.eye(width, dtype=torch.float64, device=rows.x.device) * (rank / width)
    probe, curvature = None, Curvature.of(rows)
    best, highest = relaxed[:, :rank], -1.0
    for step in range(steps):
        ridge = max(last, _FIRST_RIDGE * (last / _FIRST_RIDGE) ** (step / (_SOFTENED * steps)))
        remaining = rows.x - rows.x @ relaxed
        probe = logistic_probe(rows.with_x(remaining), ridge, probe, curvature.frame(ridge), _TOLERANCE)
        logits = remaining @ probe.weights + probe.intercept
        slope = -(rows.x.T @ errors(rows, logits)) @ probe.weights.T
        slope = slope + slope.T
        length = float(slope.norm())
        if length > 0:
            relaxed = relaxed + slope * (_LAST_STEP ** (step / steps) / length)
        relaxed, basis = _onto_fantope(relaxed, rank)
        if length == 0 or step == steps - 1 or step % _EVERY == _EVERY - 1:
            rounded = rows.with_x(rows.x - rows.x @ basis @ basis.T)
            loss = logistic_probe(rounded, last, None, curvature.frame(last), _TOLERANCE).loss
            if loss > highest:
                best, highest = basis, loss
        if length == 0:
            break
    return best


def _onto_fantope(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest point of the Fantope (Vu et al. 2013, Lemma 4.1), and its `rank` leading eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    # The sum of clamp(values − shift, 0, 1) falls with the shift from d to 0.
    low, high = values.min() - 1, values.max()
    for _ in range(60):
        shift = (low + high) / 2
        total = (values - shift).clamp(0, 1).sum()
        low, high = torch.where(total > rank, shift, low), torch.where(total > rank, high, shift)
    projected = (vectors * (values - (low + high) / 2).clamp(0, 1)) @ vectors.T
    return projected, vectors[:, -rank:]
