"""Erasures that need the label of every row at test time, for analysis: oracle and quadratic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .eraser import check_activations, check_shrinkage, whiten_concept
from .moments import ConceptMoments, batch_moments
from .statistics import infer_dims, read_rows


@dataclass(frozen=True, eq=False)
class OracleEraser:
    """The map `(x, z) ↦ x − coefficients · (z − mean_z)`.

    The guarantee is that of LEACE: on the rows of the fit no linear probe with a convex loss beats the best constant.
    A quadratic probe may beat it.

    Attributes:
        coefficients: `(x_dim, z_dim)` float64, the regression of x on z.
        mean_z: `(z_dim,)` float64.
    """

    coefficients: Tensor
    mean_z: Tensor

    @classmethod
    def fit(cls, x: Tensor, z: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None) -> OracleEraser:
        """Fit on one batch of rows; arguments and errors are those of `ConceptMoments.update`."""
        return cls.of(batch_moments(x, z, weight, mask))

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def of(cls, moments: ConceptMoments) -> OracleEraser:
        """Solve from moments.

        Raises:
            ValueError: If no rows were seen, or z does not vary.
        """
        moments.check_concept()
        # The pseudo-inverse is relative to the variance of every class: a rare class is erased like a common one.
        whitener = whiten_concept(moments.covariance_z)
        return cls(moments.cross_covariance @ whitener @ whitener.T, moments.mean_z)

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Erase the concept.

        Args:
            x: `(…, x_dim)`.
            z: Integer class ids `(…)`, or values `(…, z_dim)`, of every row.

        Returns:
            `(…, x_dim)` in the dtype of `x`; computed in float32, or in float64 for a float64 `x`.

        Raises:
            TypeError: If `x` is not a floating-point tensor or `z` not a tensor.
            ValueError: If a shape does not fit or a class id is out of range.
        """
        width, classes = self.coefficients.shape
        check_activations(x, width)
        if isinstance(z, Tensor) and classes == 1 and z.shape == x.shape[:-1]:
            z = z.unsqueeze(-1)
        has_values = isinstance(z, Tensor) and z.shape == (*x.shape[:-1], classes)
        if isinstance(z, Tensor) and z.is_floating_point() and not has_values:
            shapes = f"z has shape {tuple(z.shape)} and x {tuple(x.shape)}"
            raise ValueError(f"{shapes}: give z_dim={classes} values per row, or one integer class id.")
        values = z if has_values else one_hot(_checked_ids(x, z, classes), classes)
        dtype = torch.promote_types(x.dtype, torch.float32)
        offset = (values.double() - self.mean_z.to(z.device)).to(x.device, dtype)
        return (x.to(dtype) - offset @ self.coefficients.to(x.device, dtype).T).to(x.dtype)


def _checked_ids(x: Tensor, z: Tensor, classes: int) -> Tensor:
    """The class ids of the rows of `x` as int64; an error is raised if a row has none: it is erased by its label."""
    if not isinstance(z, Tensor) or z.dtype.is_floating_point:
        kind = f"has dtype {z.dtype}" if isinstance(z, Tensor) else f"is {type(z).__name__}"
        raise TypeError(f"z {kind}: give a tensor of integer class ids.")
    if z.shape != x.shape[:-1]:
        raise ValueError(f"z has shape {tuple(z.shape)} and x {tuple(x.shape)}: give one class id per row.")
    low, high = (int(edge) for edge in z.aminmax()) if z.numel() else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(
            f"z holds class id {low if low < 0 else high}, but ids run from 0 to {classes - 1}: this eraser needs the "
            "label of every row; leave rows without a label out."
        )
    return z.to(torch.int64)


@dataclass(frozen=True, eq=False)
class QuadraticEraser:
    """The map `(x, c) ↦ μ + T_c (x − μ_c)`.

    After a fit without shrinkage, `E[x | c]` and `E[x xᵀ | c]` are the same for all c on the rows of the fit, so no
    probe that is quadratic in x and trained with a convex loss beats the best constant. Third and higher moments may
    still tell the classes apart.

    Attributes:
        class_means: `(k, x_dim)` float64.
        mean: `(x_dim,)` float64, the mean of all rows.
        maps: `(k, x_dim, x_dim)` float64, symmetric.
    """

    class_means: Tensor
    mean: Tensor
    maps: Tensor

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
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
            shrinkage: "oas", a share of the identity in [0, 1], or None; applied to the correlation matrix of each
                class. Unlike in LEACE it costs the guarantee: the shrunk covariances are matched, not the own ones.
            weight: `(…)` non-negative weights of rows.
            mask: `(…)` bool, False leaves a row out.

        Raises:
            TypeError: If an argument is not a tensor of numbers.
            ValueError: If `z` does not hold the ids of at least two classes, each with rows, `shrinkage` is unknown, or
                a class varies in fewer directions than the others, as with fewer rows than features.
        """
        check_shrinkage(shrinkage)
        width, count = infer_dims(x, z, mask)
        rows = read_rows(x, z, weight, mask, width, count)
        if rows.ids is None:
            raise ValueError(f"z has shape {tuple(z.shape)} and dtype {z.dtype}: give one integer class id per row.")
        sizes = rows.ids.bincount(minlength=count).tolist()
        if count < 2 or 0 in sizes:
            raise ValueError(f"The classes have {sizes} rows: give at least two, and number those that occur from 0.")
        counted, owns = rows.chunk(0, rows.count), [rows.ids == label for label in range(count)]
        classes = [ConceptMoments(width, 0).update(counted[own].double(), None, rows.weight[own]) for own in owns]
        weights = torch.tensor([part.weight for part in classes], dtype=torch.float64)
        means = torch.stack([part.mean_x for part in classes])
        shares = (weights / weights.sum()).to(means.device)
        covariances = torch.stack([part.covariance_x for part in classes])
        for covariance, part in zip(covariances, classes, strict=True):
            variance = part.variance_x
            share = part.spread().share(shrinkage, torch.where(variance > 0, variance, 1.0).rsqrt())
            covariance.mul_(1 - share).diagonal().add_(share * variance)
        target = barycentre(covariances, shares)
        # The symmetric maps T with T · covariance · T = target, which change x least. The middle is a root of
        # `roots · target · roots`, without a product that squares rounding. Features that are switched off, as by a
        # norm's weight of 1e-33, become their mean: rounding of the others would be more than what they hold.
        roots, inverses = _roots(covariances)
        _, strength, directions = torch.linalg.svd(_roots(target)[0] @ roots)
        varies = target.diagonal() > 1e-24 * target.diagonal().max()
        maps = inverses @ (directions.mT * strength[:, None]) @ directions @ inverses * torch.outer(varies, varies)
        scale = torch.where(varies, target.diagonal().rsqrt(), 0.0)
        missed = ((maps @ covariances @ maps - target) * torch.outer(scale, scale)).abs().flatten(1).amax(1)
        if bool((missed > 1e-4).any()):
            short = int(missed.argmax())
            raise ValueError(
                f"The covariance of class {short} ({classes[short].rows} rows of width {width}) has "
                "fewer directions than those of the others, or features of scales that differ too much, so no linear "
                "map was found that makes them equal: give more rows than features for every class, fewer features or "
                "features of like scales, or shrinkage='oas', which matches them approximately."
            )
        return cls(means, shares @ means, maps)

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Erase the concept.

        Args:
            x: `(…, x_dim)`.
            z: Integer class ids `(…)` of every row.

        Returns:
            `(…, x_dim)` in the dtype of `x`; computed in float32, or in float64 for a float64 `x`.

        Raises:
            TypeError: If `x` is not a floating-point tensor or `z` not a tensor of integers.
            ValueError: If a shape does not fit or a class id is out of range.
        """
        count, width = self.class_means.shape
        check_activations(x, width)
        ids = _checked_ids(x, z, count).to(x.device).reshape(-1)
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
        # The iteration contracts; changes below this are rounding.
        if change <= 1e-13 * float(centre.norm()):
            break
    return centre


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of symmetric `(…, d, d)` and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    keep = values > values[..., -1:] * values.shape[-1] * torch.finfo(values.dtype).eps
    root = torch.where(keep, values, 0.0).sqrt()
    inverse = torch.where(keep, 1 / torch.where(keep, root, 1.0), 0.0)
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT
