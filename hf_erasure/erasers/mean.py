"""What becomes of the mean of x: it stays by an affine part, by the choice of the linear map, or it is let go."""

from __future__ import annotations

import torch
from torch import Tensor

from .eraser import Eraser, Factor, Spread, significance, variance_floor


class MeanIsErased(ValueError):
    """The mean lies in the span of what is erased, so that no linear map keeps it."""


def eraser_about(
    left: Tensor, right: Tensor, spread: Spread, *, affine: bool, keep_mean: bool, factor: Factor | None = None
) -> Eraser:
    """The eraser that subtracts along `left`, and does with the mean what was asked for.

    A linear map `P = I − left · right` keeps the mean where `right · μ = 0`. Of all P with `P · left = 0` and `P μ = μ`
    it takes the one that changes x least in the metric of Σ: its readings are, whitened, those of `left` among the
    directions orthogonal to the whitened mean. With the methods' Σ it is LEACE with the limit of `(Σ + λ μ μᵀ)⁻¹` for
    large λ, `Σ⁻¹ − Σ⁻¹ μ μᵀ Σ⁻¹ / (μᵀ Σ⁻¹ μ)`, in the place of `Σ⁻¹`. Since `left` is what it is without, so is what a
    linear probe can find. Features that Σ says never vary are neither read nor changed.

    Args:
        left: `(d, r)`, what is subtracted; orthonormal once it is whitened.
        right: `(r, d)`, what reads it where the mean does not count.
        spread: Its mean stays.
        affine: By an affine part.
        keep_mean: Whether it stays where there is no affine part.
        factor: The factored Σ; None for the identity, the metric of orthogonal projections.

    Raises:
        ValueError: If an affine map is not to keep the mean.
        MeanIsErased: If no linear map can keep it.
    """
    if affine:
        if not keep_mean:
            raise ValueError(
                "keep_mean is False and affine True, but the affine part is what keeps the mean: give affine=False, or "
                "leave keep_mean out."
            )
        return Eraser(left, right, spread.mean)
    read, deviation = right @ spread.mean, spread.sigma.quadratic(right).diagonal().clamp_min(0).sqrt()
    # Of a mean that is rounding beside what varies nothing is read anyway.
    if not keep_mean or bool((read.abs() <= significance(spread.resolution) * deviation).all()):
        return Eraser(left, right, None)
    mean = spread.mean[:, None]
    basis, whitened = (left, mean) if factor is None else (factor.whiten(left), factor.whiten(mean))
    length = whitened.norm()
    beside = whitened / length
    for _ in range(2):  # once more, for what rounding left of the basis
        beside = beside - basis @ (basis.T @ beside)
    # The square of the sine between mean and span, by which the new readings are longer: the least singular value of
    # right · left in the whitened space beside the mean. It is a share of variance, so its rounding is that of one.
    # Whitening multiplies errors of the rows by one over the root of the jitter of `factorise`: 7e-10 for float64 and
    # 2e-4 for float32 rows, whose squares lie below that floor.
    share = float(beside.square().sum())
    if share <= variance_floor(spread.resolution):
        raise MeanIsErased(
            "affine is False, but the mean of x lies in the span of the directions that are erased (but for "
            f"{share:.0e} of its square), so that no linear map erases these and keeps it: give affine=True."
        )
    beside = beside / share**0.5
    own = beside.T if factor is None else factor.readings(beside)
    reads, directions = torch.cat([right, own]), torch.cat([left, mean / length], dim=1)
    # The readings that find each direction and not the others, of which the mean is one.
    return Eraser(left, torch.linalg.solve(reads @ directions, reads)[: left.shape[1]], None)
