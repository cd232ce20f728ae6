"""Logistic regression of class ids on rows: the probe of the methods that train one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid, one_hot

from .rows import infer_z_dim, read_rows


@dataclass(frozen=True)
class ClassRows:
    """Rows to train a probe on.

    Attributes:
        x: `(n, d)` float64, centred and divided by one number, so that the features have variance 1 on average.
        target: `(n, c)` float64 indicators of the classes; one column for two classes.
        weight: `(n,)` float64, sums to 1.
        mean: `(d,)` float64 mean of the rows as they were given.
        varies: `(d,)` bool, False for features that are switched off: rounding is all they could be given.
    """

    x: Tensor
    target: Tensor
    weight: Tensor
    mean: Tensor
    varies: Tensor

    def with_x(self, x: Tensor) -> ClassRows:
        """The same classes with other features."""
        return replace(self, x=x)

    def cleaned(self, basis: Tensor) -> Tensor:
        """Orthonormal directions `(d, r)` without the rounding on features that are switched off.

        Trained norms switch features off by weights such as 1e-33. A direction with 1e-17 there would write what it
        reads into such a feature, where a probe of standardised features finds it.
        """
        return basis * self.varies[:, None]


@dataclass(frozen=True)
class LogisticProbe:
    """A trained probe `x ↦ x · weights + intercept`.

    Attributes:
        weights: `(d, c)`.
        intercept: `(c,)`.
        loss: Mean log loss on the rows it was trained on, in nats, without the penalty.
    """

    weights: Tensor
    intercept: Tensor
    loss: float

    def directions(self) -> Tensor:
        """`(d, r)` orthonormal directions the probe reads: 1 for two classes, at most k − 1 for k."""
        weights = self.weights
        if weights.shape[1] > 1:  # what is common to all classes changes no probability
            weights = weights - weights.mean(1, keepdim=True)
        vectors, strength, _ = torch.linalg.svd(weights, full_matrices=False)
        # The minimum is found to about 1e-8; the direction that centring took away is far below.
        return vectors[:, strength > 1e-6 * strength[0]]


def class_rows(x: Tensor, z: Tensor, weight: Tensor | None, mask: Tensor | None, method: str) -> ClassRows:
    """Check a batch and bring its counted rows to one scale.

    Raises:
        TypeError: If an argument is no tensor, or holds the wrong kind of numbers.
        ValueError: If `z` is no class ids, there is one class only, or x does not vary.
    """
    from .moments import ConceptMoments  # which solves for some methods that train probes

    if not isinstance(x, Tensor) or x.ndim == 0:
        raise TypeError(f"x is {type(x).__name__}: give a tensor of shape (…, x_dim).")
    width, classes = x.shape[-1], infer_z_dim(x, z, mask)
    rows = read_rows(x, z, weight, mask, width, classes)
    if rows.ids is None:
        raise ValueError(
            f"z has shape {tuple(z.shape)} and dtype {z.dtype}, but method={method!r} trains a classifier: give one "
            "integer class id per row, or take 'leace' or 'orth', which erase values as well."
        )
    # The moments know best whether there is something to erase; they read the rows as every other method does.
    moments = ConceptMoments(width, classes).update(x, z, weight, mask=mask)
    moments.check_concept()
    variance = moments.spread().variance
    if not bool((variance > 0).any()):
        raise ValueError(f"x is constant over all {rows.count} rows: no feature varies, so there is nothing to erase.")
    varies = variance > 1e-24 * variance.max()
    centred = (rows.chunk(0, rows.count).double() - moments.mean_x) / variance.mean().sqrt() * varies
    present, ids = rows.ids.unique(return_inverse=True)
    target = one_hot(ids, present.numel()).double()
    shares = torch.ones(rows.count, dtype=torch.float64, device=x.device) if rows.weight is None else rows.weight
    target = target[:, 1:] if present.numel() == 2 else target
    return ClassRows(centred, target, shares / shares.sum(), moments.mean_x, varies)


def nothing_known(rows: ClassRows) -> float:
    """The log loss of the best constant, in nats: the entropy of the classes."""
    shares = rows.weight @ rows.target
    if shares.numel() == 1:
        shares = torch.cat([1 - shares, shares])
    return float(-(shares * shares.log()).sum())


def logistic_probe(
    rows: ClassRows,
    penalty: float | None = None,
    start: LogisticProbe | None = None,
    frame: Tensor | None = None,
    tolerance: float = 1e-9,
) -> LogisticProbe:
    """Minimise the mean log loss plus `penalty / 2 · ‖weights‖²`; the intercept is free.

    Args:
        rows: What is learned from.
        penalty: None for one over the rows.
        start: Where to start from.
        frame: What a `Curvature` of similar rows made for the penalty; None to make one of these.
        tolerance: The largest slope, in nats, at which the minimum counts as found.

    Raises:
        ValueError: If `penalty` is not positive.
    """
    ridge = ridge_of(rows, penalty)
    frame = Curvature.of(rows).frame(ridge) if frame is None else frame
    begin = rows.x.new_zeros(rows.x.shape[1] + 1, rows.target.shape[1])
    if start is not None:
        begin[:-1], begin[-1] = torch.linalg.solve(frame, start.weights), start.intercept
    with torch.inference_mode(False):
        point = begin.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [point], 1.0, 300, None, tolerance, tolerance_change=1e-14, history_size=20, line_search_fn="strong_wolfe"
        )
        optimiser.step(lambda: _objective(point, rows, frame, ridge))
        found = point.detach()
    weights, intercept = frame @ found[:-1], found[-1]
    return LogisticProbe(weights, intercept, float(_losses(rows, rows.x @ weights + intercept)))


def ridge_of(rows: ClassRows, penalty: float | None) -> float:
    """The penalty that is meant: one over the rows where none is given.

    Raises:
        ValueError: If it is not positive.
    """
    ridge = 1 / rows.x.shape[0] if penalty is None else float(penalty)
    if not ridge > 0:
        raise ValueError(f"penalty is {penalty!r}: it must be positive; without it a probe of separable classes grows.")
    return ridge


@dataclass(frozen=True)
class Curvature:
    """Variances `(d,)` of rows along their principal directions `(d, d)`: how the log loss curves, up to a factor."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, rows: ClassRows) -> Curvature:
        """That of the given rows."""
        values, vectors = torch.linalg.eigh(rows.x.T @ (rows.x * rows.weight[:, None]))
        return cls(values.clamp_min(0), vectors)

    def frame(self, ridge: float) -> Tensor:
        """`(d, d)` coordinates in which a penalised loss curves about alike everywhere: few steps are enough."""
        return self.vectors * (self.values / 4 + ridge).rsqrt()


def _objective(point: Tensor, rows: ClassRows, frame: Tensor, ridge: float) -> Tensor:
    weights = frame @ point.detach()[:-1]
    logits = rows.x @ weights + point.detach()[-1]
    error = errors(rows, logits)
    slope = frame.T @ (rows.x.T @ error + ridge * weights)
    point.grad = torch.cat([slope, error.sum(0, keepdim=True)])
    return _losses(rows, logits) + ridge / 2 * weights.square().sum()


def errors(rows: ClassRows, logits: Tensor) -> Tensor:
    """`(n, c)` derivative of the mean log loss with respect to the logits."""
    predicted = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
    return (predicted - rows.target) * rows.weight[:, None]


def _losses(rows: ClassRows, logits: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        signs = 2 * rows.target - 1
        return -(rows.weight @ logsigmoid(signs * logits)[:, 0])
    return -(rows.weight @ (rows.target * log_softmax(logits, 1)).sum(1))
