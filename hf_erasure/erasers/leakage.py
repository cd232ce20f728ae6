"""Measures from moments alone: how much of a concept is left."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch

from .eraser import factorise, significance, variance_floor, whiten_concept
from .moments import ConceptMoments


@torch.no_grad()
def cross_validated_correlation(
    half_a: ConceptMoments, half_b: ConceptMoments, *, shrinkage: str | float | None = "oas"
) -> float:
    """The correlation with the concept of the direction that is the most correlated in the *other* half.

    The first canonical pair `(u, v)` is found on one half, and the Pearson correlation of `u·x` and `v·z` is taken on
    the other; the result is the mean of both ways. If x and z are independent it is about 0, and may be slightly
    negative; a canonical correlation on the same rows would be `sqrt(x_dim / rows)`.

    If the variance of a direction is below `1e-6` (float64 rows: `1e-13`) of the variance that it would have with
    uncorrelated features, this floor takes its place: an eraser leaves only rounding of a direction, whose correlation
    means nothing. If all of x is rounding around one row, the result is 0.0.

    On the rows an eraser was fitted on, the result after erasure is negative: what is left in the two halves cancels in
    their sum, so the direction of one half is opposite in the other. Judge an eraser on rows that it has not seen.

    Args:
        half_a: Moments of some rows.
        half_b: Moments of other rows, independent of the first: split by sequence, not by token.
        shrinkage: See `ConceptMoments.eraser`.

    Returns:
        A correlation between −1 and 1; 0.0 if x or z does not vary.

    Raises:
        TypeError: If an argument is not a `ConceptMoments`.
        ValueError: If the halves have different dimensions, no concept, or no rows.
    """
    for name, half in (("half_a", half_a), ("half_b", half_b)):
        if not isinstance(half, ConceptMoments):
            raise TypeError(f"{name} is {type(half).__name__}: give ConceptMoments.")
    if half_a.z_dim == 0 or (half_a.x_dim, half_a.z_dim) != (half_b.x_dim, half_b.z_dim):
        raise ValueError(f"The halves are {half_a} and {half_b}: give labelled rows of one site and concept.")
    there = _held_out_correlation(half_a, half_b, shrinkage)
    return (there + _held_out_correlation(half_b, half_a, shrinkage)) / 2


def correlation_interval(correlation: float, groups: int) -> tuple[float, float]:
    """A 95 % interval for the magnitude of a cross-validated correlation, by Fisher's z transformation.

    `tanh(atanh r ± 1.96 / sqrt(groups − 6))`: each of the two halves costs three groups. It is for the directions that
    were found, and groups, not rows, count as independent. It ends at 0, since a value below 0 is not leakage.

    Args:
        correlation: The signed result of `cross_validated_correlation`.
        groups: Independent groups of rows in both halves together, such as sequences.

    Returns:
        The lower and upper end, between 0 and 1; `(0.0, 1.0)` for 6 groups or fewer.
    """
    if groups <= 6:
        return 0.0, 1.0
    middle = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, correlation)))
    spread = 1.96 / math.sqrt(groups - 6)
    return max(0.0, math.tanh(middle - spread)), max(0.0, math.tanh(middle + spread))


def expected_accuracy(before: float, width: int, fitted: int) -> float:
    """The expected accuracy of a linear probe on unseen rows after LEACE has erased two balanced classes.

    The erasure removes the difference of the class means of its rows; the error of that difference falls with their
    number. With m the Mahalanobis distance of the classes and s = 4 width / fitted, the accuracy of the best probe is
    Φ(½ √(m² s / (m² + s))). It is lower after a fit on counterfactuals, in which other differences of rows cancel.

    Args:
        before: The accuracy without the erasure, which gives m: Φ(m / 2).
        width: The number of features.
        fitted: The number of independent rows of the fit; if rows belong to groups, nearer the number of groups.

    Returns:
        An accuracy between ½ and `before`.
    """
    if width < 1 or fitted < 1:
        raise ValueError(f"width={width}, fitted={fitted}: write numbers of features and of rows.")
    normal = NormalDist()
    distance = 2 * normal.inv_cdf(min(max(before, 0.5), 1 - 1e-9))
    spread = 4 * width / fitted
    return normal.cdf(math.sqrt(distance**2 * spread / (distance**2 + spread)) / 2) if distance else 0.5


def _held_out_correlation(found_on: ConceptMoments, read_on: ConceptMoments, shrinkage: str | float | None) -> float:
    """The correlation, on the rows of `read_on`, of the pair that is the most correlated on the rows of `found_on`."""
    found, spread = found_on.spread(), read_on.spread()
    whitener = whiten_concept(found.concept)
    if whitener.shape[1] == 0:
        return 0.0
    # The result is 0 if all rows are the same, except for the digits that their dtype rounds.
    cutoff, total = max(significance(spread.resolution), spread.resolution), float(spread.variance.sum())
    if total <= cutoff**2 * (total + float(spread.mean.square().sum())):
        return 0.0
    factor = factorise(found, shrinkage)
    basis, _, mixing = torch.linalg.svd(factor.whiten(found.cross @ whitener), full_matrices=False)
    u, v = (part.to(spread.mean.device) for part in (factor.readings(basis[:, :1])[0], whitener @ mixing[0]))
    unrelated = u.square() @ spread.variance
    floor = variance_floor(max(found.resolution, spread.resolution))
    variance_x = torch.maximum(spread.sigma.quadratic(u[None])[0, 0], floor * unrelated)
    variance_z = v @ spread.concept @ v
    scale = float((variance_x * variance_z.clamp_min(0.0)).sqrt())
    if scale == 0.0:
        return 0.0
    return max(-1.0, min(1.0, float(u @ spread.cross @ v) / scale))
