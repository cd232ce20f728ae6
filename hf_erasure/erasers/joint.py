"""One eraser for several concepts: from joint statistics, or from erasers that are already fitted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .eraser import EXACT, Eraser, significance
from .moments import ConceptMoments


def joint_moments(parts: Sequence[ConceptMoments]) -> ConceptMoments:
    """Return the moments from which an eraser of all concepts is solved.

    The covariance of x with each concept is taken over the rows that are labelled with the concept; the eraser removes
    all of them. Mean and covariance of x are taken over all rows. The covariances between concepts are unknown and set
    to zero: they decide the coordinates in which directions are compared, and do not change the guarantee.

    Args:
        parts: Moments at one site, at least one, each with a concept that varies. A row that is labelled with two
            concepts is in two of them.

    Returns:
        Moments whose concept has the concepts of the parts side by side.

    Raises:
        ValueError: If `parts` is empty, the widths differ, a part has seen no rows, or a concept does not vary.
    """
    if not parts:
        raise ValueError("parts is empty: give the moments of at least one concept.")
    if len(parts) == 1:
        return parts[0]
    for part in parts:
        part.check_concept()
    surroundings = ConceptMoments(parts[0].x_dim, 0)
    none = parts[0].mean_z[:0]
    for part in parts:
        surroundings.merge(part.with_concept(none, part.cross_covariance[:, :0], none.diag()))
    return surroundings.with_concept(
        mean=torch.cat([part.mean_z for part in parts]),
        cross=torch.cat([part.cross_covariance for part in parts], dim=1),
        covariance=torch.block_diag(*(part.covariance_z for part in parts)),
    )


def combine_erasers(erasers: Sequence[Eraser], weights: Sequence[float] | None = None) -> Eraser:
    """Return the eraser that removes the concepts of all `erasers`.

    It projects along the joint span of the lefts, and reads from the joint span of the rights. So it is

    * exact: `(I − P) A = 0` for every `A` in the span of any of the lefts,
    * the LEACE eraser of the joint concept, if all were fitted with the same covariance of x: the rights of LEACE span
      `Σ⁻¹ A`, so the rights of the joint concept span the same space as all rights together,
    * the orthogonal projection away from all concepts, if all erasers are orthogonal.

    Linear erasers that keep the same mean also keep it together; if their means differ, none is kept exactly.

    Concepts that overlap share directions, which count once. If the rights cannot tell a direction from the directions
    of the other erasers (this does not happen with the same covariance), the direction is read by itself, as in the
    orthogonal method: this is still exact, and needs no covariance.

    Args:
        erasers: At least one; erasers of rank 0 are left out.
        weights: The weight of the mean of each eraser, such as its number of rows; equal if None. The weights decide
            where the activations are moved to, and do not change what can be read from them.

    Returns:
        A float64 eraser on the device of the first eraser, whose rank is that of the joint span.

    Raises:
        ValueError: If `erasers` is empty, widths differ, or only some of the erasers keep a mean.
    """
    if not erasers:
        raise ValueError("erasers is empty: give at least one eraser.")
    widths = sorted({eraser.x_dim for eraser in erasers})
    if len(widths) > 1:
        raise ValueError(f"The erasers act on activations of different widths {widths}, so they have no joint eraser.")
    if len({eraser.bias is None for eraser in erasers if eraser.rank}) > 1:
        raise ValueError(
            "Some of the erasers have an affine part and some are linear: fit all of them with the same affine."
        )
    if weights is not None and (len(weights) != len(erasers) or min(weights) < 0 or not sum(weights) > 0):
        raise ValueError(f"weights={list(weights)}: give one for each of the {len(erasers)} erasers, none negative.")
    shares = [1.0] * len(erasers) if weights is None else [float(weight) for weight in weights]
    acting = [(eraser, share) for eraser, share in zip(erasers, shares, strict=True) if eraser.rank]
    if len(acting) < 2:
        return (acting[0][0] if acting else erasers[0]).to(dtype=torch.float64)
    device = acting[0][0].left.device
    parts = [(e.left.to(device).double(), e.right.to(device).double()) for e, _ in acting]
    resolution = max(torch.finfo(e.left.dtype).eps for e, _ in acting)
    left, right = _joint_projection(parts, resolution)
    means = [eraser.bias.to(device).double() for eraser, _ in acting if eraser.bias is not None]
    if not means:
        return Eraser(left, right, None)
    total = sum(share for _, share in acting)
    # The means have equal weights if only erasers of rank 0 have a weight.
    mean_shares = [share / total if total else 1 / len(means) for _, share in acting]
    return Eraser(left, right, torch.stack([m * part for m, part in zip(means, mean_shares, strict=True)]).sum(0))


def _joint_projection(parts: list[tuple[Tensor, Tensor]], resolution: float) -> tuple[Tensor, Tensor]:
    """Return `left` `(d, r)`, which spans all lefts, and `right` `(r, d)`; `right @ left` is the identity.

    With orthonormal bases Q of the lefts and B of the rights, the singular values of `B Q` are the cosines of the
    angles between the two spans. `left` and `right` are the directions of these angles, and the norm of the projection
    is one over the smallest cosine.
    """
    # A feature of large scale would make all directions look alike, so lengths are taken in balanced coordinates.
    # Lefts are covariances with x and grow with the scale of a feature; rights read x and shrink with it. So the root
    # of their ratio is the scale; it is one for the orthogonal method, whose left and right are the same.
    left_norms = torch.stack([left.square().sum(1) for left, _ in parts]).sum(0).sqrt()
    right_norms = torch.stack([right.square().sum(0) for _, right in parts]).sum(0).sqrt()
    # A feature that is only read, or only changed, gets its scale from that side; one that is neither gets the scale 1.
    one_sided = torch.where(right_norms > 0, 1 / right_norms, torch.where(left_norms > 0, left_norms, 1.0))
    scale = torch.where((left_norms > 0) & (right_norms > 0), (left_norms / right_norms).sqrt(), one_sided)
    spans = [(_orthonormal(left / scale[:, None]), _orthonormal((right * scale).T)) for left, right in parts]
    cutoff = significance(resolution)
    basis = _joint_basis([own for own, _ in spans], cutoff)
    readings = _joint_basis([own for _, own in spans], cutoff)
    own_cosines = [torch.linalg.svdvals(reads.T @ own).min() for own, reads in spans]
    within, cosines, directions = torch.linalg.svd(readings.T @ basis, full_matrices=True)
    # The least cosine that is divided by, relative to the smallest of the parts. The rest of a concept after rounding
    # grows with one over the cosine: 1e-16 to 1e-11 in float64, 1e-7 to 1e-4 in float32. The distortion grows by
    # the same factor, which is the price for reading a concept as it was fitted.
    least = (1e-5 if resolution <= EXACT else 1e-3) * torch.stack(own_cosines).min()
    count = int((cosines > least).sum())  # the first `count`, since the cosines are in descending order
    left = basis @ directions.T
    read = (readings @ within[:, :count] / cosines[:count]).T
    right = torch.cat([read, left[:, count:].T])
    left, right = left * scale[:, None], right / scale
    # One correction makes right · left the identity again, as in `leace_factors`.
    return left, torch.linalg.solve(right @ left, right)


def _orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns with the span of linearly independent columns."""
    lengths = matrix.norm(dim=0)
    return torch.linalg.qr(matrix / torch.where(lengths > 0, lengths, 1.0))[0]


def _joint_basis(bases: list[Tensor], cutoff: float) -> Tensor:
    """Orthonormal columns with the span of all `bases`, each of which is orthonormal.

    The singular values of the bases side by side are `sqrt(1 ± cos θ)` for two spans at angles θ. A direction in both
    spans gives a zero, or a value below `cutoff`, since the bases are exact to `cutoff` only. Leaving it out leaves at
    most this share of a covariance, which is the error of the covariance itself.
    """
    vectors, values, _ = torch.linalg.svd(torch.cat(bases, dim=1), full_matrices=False)
    return vectors[:, values > cutoff * values[0]]
