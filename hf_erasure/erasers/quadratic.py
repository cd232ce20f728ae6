"""Quadratic concept erasure: mean and covariance of x made the same in every class.

Belrose et al. (arXiv 2306.03819) erase what linear probes read, the class means. A quadratic probe reads the class
covariances too. Here every class is transported, by the optimal map between Gaussians
`T_c = K_c^{-½} (K_c^{½} K K_c^{½})^{½} K_c^{-½}`, to the mean μ and to the covariance K of the 2-Wasserstein barycentre
of the classes, weighted by their shares: of all targets that the classes can share, the one nearest to them. The
barycentre is the fixed point of Álvarez-Esteban et al. (2016, arXiv 1511.05355).

The map of a row depends on its class, so it is a tool for analysis, no adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import ConceptMoments
from .oracle import check_activations, check_ids
from .rows import infer_z_dim, read_rows
from .shrinkage import check_shrinkage, oas_shrinkage


@dataclass(frozen=True, eq=False)
class QuadraticEraser:
    """The map `(x, c) ↦ μ + T_c (x − μ_c)`.

    On the rows it was fitted on without shrinkage, `E[x | c]` and `E[x xᵀ | c]` are the same for all c, so that no
    probe that is quadratic in x and trained with a convex loss beats the best constant. Third and higher moments may
    still tell the classes apart.

    Attributes:
        class_means: `(k, x_dim)` float64.
        mean: `(x_dim,)` float64, that of all rows.
        maps: `(k, x_dim, x_dim)` float64, symmetric.
    """

    class_means: Tensor
    mean: Tensor
    maps: Tensor

    @classmethod
    def fit(
        cls,
        x: Tensor,
        z: Tensor,
        *,
        shrinkage: str | float | None = None,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> QuadraticEraser:
        """Fit on one batch of rows.

        Args:
            x: `(…, x_dim)` activations.
            z: Integer class ids `(…)`, −100 to leave a row out.
            shrinkage: As in `of`.
            weight: `(…)` non-negative weights of rows.
            mask: `(…)` bool, False leaves a row out.

        Raises:
            TypeError: If an argument is no tensor of numbers.
            ValueError: If `z` is no class ids, or as in `of`.
        """
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise TypeError(f"x is {type(x).__name__}: give a tensor of shape (…, x_dim).")
        classes = infer_z_dim(x, z, mask)
        rows = read_rows(x, z, weight, mask, x.shape[-1], classes)
        if rows.ids is None:
            raise ValueError(f"z has shape {tuple(z.shape)} and dtype {z.dtype}: give one integer class id per row.")
        counted = rows.chunk(0, rows.count)
        parts = []
        for label in range(classes):
            own = rows.ids == label
            if not bool(own.any()):
                raise ValueError(f"Class {label} of {classes} has no rows: number the classes that occur from 0.")
            own_weight = None if rows.weight is None else rows.weight[own]
            parts.append(ConceptMoments(x.shape[-1], 0).update(counted[own].double(), None, own_weight))
        return cls.of(parts, shrinkage=shrinkage)

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def of(cls, classes: Sequence[ConceptMoments], *, shrinkage: str | float | None = None) -> QuadraticEraser:
        """Solve from the moments of each class.

        Args:
            classes: One for each class, in the order of their ids; their concept, if any, does not count.
            shrinkage: "oas", a share of the identity in [0, 1], or None; applied to the correlation matrix of each
                class. Unlike in LEACE it costs the guarantee: the covariances that are matched are the shrunk ones.

        Raises:
            ValueError: If there are fewer than two classes, one has seen no rows, widths differ, `shrinkage` is
                unknown, or a class varies in fewer directions than the others, as with fewer rows than features.
        """
        check_shrinkage(shrinkage)
        if len(classes) < 2 or any(part.rows == 0 for part in classes):
            raise ValueError(f"classes have rows {[part.rows for part in classes]}: give at least two, none empty.")
        if len({part.x_dim for part in classes}) > 1:
            raise ValueError(f"classes have widths {[part.x_dim for part in classes]}: use moments of the same site.")
        weights = torch.tensor([part.weight for part in classes], dtype=torch.float64)
        means = torch.stack([part.mean_x for part in classes])
        shares = (weights / weights.sum()).to(means.device)
        covariances = torch.stack([_shrunk(part, shrinkage) for part in classes])
        target = barycentre(covariances, shares)
        maps = torch.stack([_transport(covariance, target) for covariance in covariances])
        reached = maps @ covariances @ maps
        missed = (reached - target).flatten(1).norm(dim=1) / target.norm().clamp_min(torch.finfo(target.dtype).tiny)
        if bool((missed > 1e-6).any()):
            short = int(missed.argmax())
            raise ValueError(
                f"The covariance of class {short} ({classes[short].rows} rows of width {classes[short].x_dim}) has "
                "fewer directions than that of the others, so no linear map makes them equal: give more rows than "
                "features for every class, fewer features, or shrinkage='oas', which matches them only about."
            )
        return cls(means, shares @ means, maps)

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Erase the concept.

        Args:
            x: `(…, x_dim)`.
            z: Integer class ids `(…)` of every row.

        Returns:
            `(…, x_dim)` in the dtype of `x`; computed in float32 or, for float64, in it.

        Raises:
            TypeError: If `x` is no floating-point tensor or `z` no tensor of integers.
            ValueError: If a shape does not fit or a class id is out of range.
        """
        count, width = self.class_means.shape
        check_activations(x, z, width)
        if z.dtype.is_floating_point:
            raise TypeError(f"z has dtype {z.dtype}: give integer class ids.")
        if z.shape != x.shape[:-1]:
            raise ValueError(f"z has shape {tuple(z.shape)} and x {tuple(x.shape)}: give one class id per row.")
        ids = check_ids(z, count).to(x.device).reshape(-1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        means, mean, maps = (part.to(x.device, dtype) for part in (self.class_means, self.mean, self.maps))
        rows = x.to(dtype).reshape(-1, width)
        erased = torch.empty_like(rows)
        for label in range(count):
            own = ids == label
            erased[own] = (rows[own] - means[label]) @ maps[label] + mean
        return erased.reshape(x.shape).to(x.dtype)


def barycentre(covariances: Tensor, shares: Tensor) -> Tensor:
    """`(d, d)` covariance of the 2-Wasserstein barycentre of centred Gaussians `(k, d, d)` with weights `(k,)`."""
    weights = shares[:, None, None]
    centre = (weights * covariances).sum(0)
    for _ in range(200):
        root, inverse = _roots(centre)
        middle = inverse @ (weights * _roots(root @ covariances @ root)[0]).sum(0) @ inverse
        following = middle @ centre @ middle
        change = float((following - centre).norm())
        centre = (following + following.T) / 2
        # The iteration contracts; below this it turns in its own rounding.
        if change <= 1e-13 * float(centre.norm()):
            break
    return centre


def _transport(source: Tensor, target: Tensor) -> Tensor:
    """The symmetric T of least change with `T · source · T = target`."""
    root, inverse = _roots(source)
    return inverse @ _roots(root @ target @ root)[0] @ inverse


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of symmetric `(…, d, d)` and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    keep = values > values[..., -1:] * values.shape[-1] * torch.finfo(values.dtype).eps
    root = torch.where(keep, values, 0.0).sqrt()
    inverse = torch.where(keep, 1 / torch.where(keep, root, 1.0), 0.0)
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT


def _shrunk(moments: ConceptMoments, shrinkage: str | float | None) -> Tensor:
    covariance = moments.covariance_x
    if shrinkage is None:
        return covariance
    variance = covariance.diagonal().clone()
    if shrinkage == "oas":
        scale = torch.where(variance > 0, variance, 1.0).rsqrt()
        correlation = covariance * scale * scale[:, None]
        shrinkage = oas_shrinkage(float(correlation.square().mean()), moments.x_dim, moments.effective_rows)
    return (1 - float(shrinkage)) * covariance + float(shrinkage) * variance.diag()
