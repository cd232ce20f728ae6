"""Methods that need the rows themselves: the logistic probe and R-LACE."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, one_hot

from .eraser import FITS, Eraser, Spread, check_count, constrained_eraser
from .least_squares import check_rounds, outside_span
from .moments import batch_moments
from .statistics import read_rows

# If a probe's loss is less than this share below the entropy of the concept, the probe finds nothing.
_LEAST_GAIN = 1e-3


@torch.inference_mode(False)
@torch.no_grad()
def fit_inlp(
    x: Tensor,
    z: Tensor,
    *,
    rounds: int | None = None,
    rank: int | None = None,
    affine: bool = True,
    keep_mean: bool = True,
    penalty: float | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Eraser:
    """INLP with logistic regression, on one batch of rows.

    The probe minimises the mean log loss plus `penalty / 2 · ‖W‖²`, for x divided by one overall standard deviation.
    A round removes one direction for two classes, k − 1 for k classes. The rounds end early when the loss of the probe
    is less than a thousandth below the entropy of the classes. The paper stops by accuracy instead, which a rare class
    hardly changes.

    Args:
        x: `(…, x_dim)` activations.
        z: Integer class ids `(…)`, −100 to leave a row out.
        rounds: The largest number of rounds; None for 10, or for as many as a given rank needs.
        rank: The largest number of directions, those of the first rounds.
        affine: Keep the mean in place by an affine part.
        keep_mean: With `affine=False` only: whether the linear map keeps the mean. The paper's map does not.
        penalty: The ridge on the weights; None for one over the number of rows, which is `C=1` in scikit-learn.
        weight: `(…)` non-negative weights of rows.
        mask: `(…)` bool, False leaves a row out.

    Raises:
        TypeError: If an argument is not a tensor of numbers, or a count is not an int.
        ValueError: If `z` does not hold class ids, has only one class, x does not vary, or an option is out of range.
    """
    limit = check_rounds(rounds, rank)
    rows = class_rows(x, z, weight, mask, "inlp")
    basis = rows.x.new_zeros(rows.x.shape[1], 0)
    for _ in range(limit):
        remaining = rows.x - (rows.x @ basis) @ basis.T
        probe = logistic_probe(replace(rows, x=remaining), penalty)
        if rows.entropy - probe.loss < _LEAST_GAIN * rows.entropy:
            break
        # A part that the weights of several classes share does not change the probabilities.
        several = probe.weights.shape[1] > 1
        weights = probe.weights - probe.weights.mean(1, keepdim=True) if several else probe.weights
        vectors, strength, _ = torch.linalg.svd(weights, full_matrices=False)
        # The minimum is found to about 1e-8; the direction that centring removed lies far below the cut-off.
        new = outside_span(vectors[:, strength > 1e-6 * strength[0]], basis)
        basis = torch.cat([basis, new], dim=1)
        if new.shape[1] == 0 or (rank is not None and basis.shape[1] >= rank):
            break
    basis = rows.without_constants(basis[:, :rank])
    return constrained_eraser(basis, basis.T, rows.spread, affine=affine, keep_mean=keep_mean)


@dataclass(frozen=True)
class ClassRows:
    """Rows to train a probe on."""

    x: Tensor  # `(n, d)` float64, centred and divided by one number, so that the features have variance 1 on average.
    target: Tensor  # `(n, c)` float64 indicators of the classes; one column for two classes.
    weight: Tensor  # `(n,)` float64, sums to 1.
    spread: Spread  # Mean and covariance of the rows as they were given.
    varies: Tensor  # `(d,)` bool, False for features that are switched off, which only rounding would change.

    def without_constants(self, basis: Tensor) -> Tensor:
        """Orthonormal directions `(d, r)` without the rounding on features that are switched off.

        Trained norms switch features off by weights such as 1e-33. A direction with 1e-17 there would write its reading
        into such a feature, where a probe of standardised features finds it.
        """
        return basis * self.varies[:, None]

    @functools.cached_property
    def curvature(self) -> tuple[Tensor, Tensor]:
        """Variances `(d,)` along the principal directions `(d, d)`: the curvature of the log loss, up to a factor."""
        values, vectors = torch.linalg.eigh(self.x.T @ (self.x * self.weight[:, None]))
        return values.clamp_min(0), vectors

    def preconditioner(self, ridge: float) -> Tensor:
        """`(d, d)` coordinates in which a penalised loss has about the same curvature everywhere: few steps suffice."""
        values, vectors = self.curvature
        return vectors * (values / 4 + ridge).rsqrt()

    @property
    def entropy(self) -> float:
        """The log loss of the best constant, in nats."""
        shares = self.weight @ self.target
        if shares.numel() == 1:
            shares = torch.cat([1 - shares, shares])
        return float(-(shares * shares.log()).sum())


@dataclass(frozen=True)
class LogisticProbe:
    """A trained probe `x ↦ x · weights + intercept`."""

    weights: Tensor  # `(d, c)`.
    intercept: Tensor  # `(c,)`.
    loss: float  # The mean log loss on its training rows, in nats, without the penalty.


def class_rows(x: Tensor, z: Tensor, weight: Tensor | None, mask: Tensor | None, method: str) -> ClassRows:
    """Check a batch and bring its counted rows to one scale; the errors are those of `fit_inlp`."""
    # The moments check whether there is something to erase, in the same way as for every other method.
    moments = batch_moments(x, z, weight, mask)
    rows = read_rows(x, z, weight, mask, moments.x_dim, moments.z_dim)
    if rows.ids is None:
        raise ValueError(
            f"z has shape {tuple(z.shape)} and dtype {z.dtype}, but method={method!r} trains a classifier: give one "
            "integer class id per row, or take 'leace' or 'orth', which also erase values."
        )
    moments.check_concept()
    spread = moments.spread()
    variance = spread.variance
    if not bool((variance > 0).any()):
        raise ValueError(f"x is constant over all {rows.count} rows: no feature varies, so there is nothing to erase.")
    varies = variance > 1e-24 * variance.max()
    centred = (rows.chunk(0, rows.count).double() - spread.mean) / variance.mean().sqrt() * varies
    present, ids = rows.ids.unique(return_inverse=True)
    target = one_hot(ids, present.numel()).double()
    target = target[:, 1:] if present.numel() == 2 else target
    return ClassRows(centred, target, rows.weight / rows.weight.sum(), spread, varies)


def logistic_probe(
    rows: ClassRows,
    penalty: float | None = None,
    start: LogisticProbe | None = None,
    preconditioner: Tensor | None = None,
    tolerance: float = 1e-9,
) -> LogisticProbe:
    """Minimise the mean log loss plus `penalty / 2 · ‖weights‖²`, until the largest slope, in nats, is `tolerance`.

    The intercept has no penalty. The `preconditioner` may come from similar rows with this penalty.
    """
    ridge = checked_ridge(rows, penalty)
    preconditioner = rows.preconditioner(ridge) if preconditioner is None else preconditioner
    begin = rows.x.new_zeros(rows.x.shape[1] + 1, rows.target.shape[1])
    if start is not None:
        begin[:-1], begin[-1] = torch.linalg.solve(preconditioner, start.weights), start.intercept
    with torch.inference_mode(False):
        point = begin.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [point], 1.0, 300, None, tolerance, tolerance_change=1e-14, history_size=20, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            weights = preconditioner @ point.detach()[:-1]
            logits = rows.x @ weights + point.detach()[-1]
            error = logit_gradient(rows, logits)
            slope = preconditioner.T @ (rows.x.T @ error + ridge * weights)
            point.grad = torch.cat([slope, error.sum(0, keepdim=True)])
            return _loss(rows, logits) + ridge / 2 * weights.square().sum()

        optimiser.step(objective)
        found = point.detach()
    weights, intercept = preconditioner @ found[:-1], found[-1]
    return LogisticProbe(weights, intercept, float(_loss(rows, rows.x @ weights + intercept)))


def checked_ridge(rows: ClassRows, penalty: float | None) -> float:
    """Check a penalty and return it; one over the number of rows if it is None."""
    ridge = 1 / rows.x.shape[0] if penalty is None else float(penalty)
    if not ridge > 0:
        raise ValueError(f"penalty is {penalty!r}: it must be positive, or weights for separable classes grow.")
    return ridge


def logit_gradient(rows: ClassRows, logits: Tensor) -> Tensor:
    """The derivative of the mean log loss with respect to the logits, `(n, c)`."""
    predicted = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
    return (predicted - rows.target) * rows.weight[:, None]


def _loss(rows: ClassRows, logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return -(rows.weight @ logsigmoid((2 * rows.target - 1) * logits)[:, 0])
    return cross_entropy(logits, rows.target, reduction="none") @ rows.weight


# The number of steps by default; `_FIRST_RIDGE` says how close they come to the optimum.
STEPS = 100
# The first step has the length of a projection of rank 1, the last step has this share of it.
_LAST_STEP = 1e-3
# The adversary's ridge falls from the first number to `penalty`, over the second as a share of the steps. On 450 rows
# of width 384, which a weakly penalised probe separates after nearly any direction is removed, 100 steps end 4e-4 nats
# from the optimum; after 300 steps with the last ridge from the start a probe read held-out rows with 92 % accuracy.
_FIRST_RIDGE, _DECAY_SHARE = 10.0, 0.9
# The number of steps between two checks of the rounded projection, each of which trains one more probe.
_CHECK_INTERVAL = 10
# The slope, in nats, below which a probe counts as trained.
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
    keep_mean: bool = True,
    penalty: float | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Eraser:
    """R-LACE on one batch of rows.

    The adversary is logistic regression, and finds the best probe for every projection. The slope of the game's value
    is then the slope of the loss with this probe held fixed (Danskin). The eraser takes a step along it, whose length
    falls geometrically to a thousandth, and goes back onto the Fantope. The adversary begins with a strong ridge, so
    that large differences count first, and ends with `penalty`. The paper takes stochastic steps for both sides; these
    steps are not random. The relaxed projections are rounded to their leading eigenvectors, and the one with the
    highest loss is kept. Every step computes the eigenvectors of an x_dim × x_dim matrix.

    Args:
        x: `(…, x_dim)` activations.
        z: Integer class ids `(…)`, −100 to leave a row out.
        rank: The number of directions that are removed; None for k − 1.
        steps: The number of steps of the eraser.
        affine: Keep the mean in place by an affine part.
        keep_mean: With `affine=False` only: whether the linear map keeps the mean. The paper's map does not.
        penalty: The ridge on the adversary's weights; None for one over the number of rows.
        weight: `(…)` non-negative weights of rows.
        mask: `(…)` bool, False leaves a row out.

    Returns:
        An orthogonal projection of exactly that rank; if it is linear and keeps the mean, an oblique projection along
        the same directions.

    Raises:
        TypeError: If an argument is not a tensor of numbers, or a count is not an int.
        ValueError: If `z` does not hold class ids, has only one class, x does not vary, or an option is out of range.
    """
    rows = class_rows(x, z, weight, mask, "rlace")
    width = rows.x.shape[1]
    count = min(width, max(1, rows.target.shape[1] - 1)) if rank is None else rank
    check_count("rank", count, most=width)
    check_count("steps", steps)
    basis = rows.without_constants(_best_projection(rows, count, steps, penalty))
    return constrained_eraser(basis, basis.T, rows.spread, affine=affine, keep_mean=keep_mean)


def _best_projection(rows: ClassRows, rank: int, steps: int, penalty: float | None) -> Tensor:
    """Play the game, and return the orthonormal directions `(d, rank)` of the best projection found."""
    width, last = rows.x.shape[1], checked_ridge(rows, penalty)
    relaxed = torch.eye(width, dtype=torch.float64, device=rows.x.device) * (rank / width)
    probe = None
    best, highest = relaxed[:, :rank], -1.0
    for step in range(steps):
        ridge = max(last, _FIRST_RIDGE * (last / _FIRST_RIDGE) ** (step / (_DECAY_SHARE * steps)))
        remaining = rows.x - rows.x @ relaxed
        probe = logistic_probe(replace(rows, x=remaining), ridge, probe, rows.preconditioner(ridge), _TOLERANCE)
        logits = remaining @ probe.weights + probe.intercept
        slope = -(rows.x.T @ logit_gradient(rows, logits)) @ probe.weights.T
        slope = slope + slope.T
        length = float(slope.norm())
        if length > 0:
            relaxed = relaxed + slope * (_LAST_STEP ** (step / steps) / length)
        relaxed, basis = _project_to_fantope(relaxed, rank)
        if length == 0 or step == steps - 1 or step % _CHECK_INTERVAL == _CHECK_INTERVAL - 1:
            rounded = replace(rows, x=rows.x - rows.x @ basis @ basis.T)
            loss = logistic_probe(rounded, last, None, rows.preconditioner(last), _TOLERANCE).loss
            if loss > highest:
                best, highest = basis, loss
        if length == 0:
            break
    return best


def _project_to_fantope(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
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


FITS.update(inlp=fit_inlp, rlace=fit_rlace)
