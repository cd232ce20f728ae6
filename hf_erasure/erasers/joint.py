"""Moments of several concepts, each labelled on rows of its own, as those of one concept."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .moments import ConceptMoments


def joint_moments(parts: Sequence[ConceptMoments]) -> ConceptMoments:
    """What an eraser of all concepts is solved from.

    The covariance of x with each concept is that of the rows which are labelled with it; an eraser removes all of them.
    Mean and covariance of x are those of all rows. How the concepts vary together was not seen and is taken for zero:
    it decides in which coordinates directions are compared, and nothing about the guarantee.

    Args:
        parts: Moments at one site, at least one, each with a concept that varies. A row that is labelled with two
            concepts is in two of them.

    Returns:
        Moments whose concept is that of the parts side by side.

    Raises:
        ValueError: If there are none, they are of different widths, have seen no rows, or a concept does not vary.
    """
    if not parts:
        raise ValueError("parts is empty: give the moments of at least one concept.")
    if len(parts) == 1:
        return parts[0]
    for part in parts:
        part.check_concept()
    surroundings = ConceptMoments(parts[0].x_dim, 0)
    for part in parts:
        surroundings.merge(part.without_concept())
    return surroundings.with_concept(
        mean=torch.cat([part.mean_z for part in parts]),
        cross=torch.cat([part.cross_covariance for part in parts], dim=1),
        covariance=torch.block_diag(*(part.covariance_z for part in parts)),
    )
