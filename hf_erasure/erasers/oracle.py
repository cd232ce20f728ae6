"""Oracle-LEACE: erasure that is told the concept of every row (arXiv 2306.03819, appendix on oracle erasure).

Where z is known at run time, the least-squares optimal eraser is not a map of x alone: it takes the best linear
prediction of x from z away, `x − Σ_xz Σ_zz⁺ (z − E z)`. It changes x less than any map that does not see z can, LEACE
included. It is a tool for analysis, no adapter: a model in use does not know the label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .linalg import whiten_concept
from .moments import ConceptMoments
from .rows import infer_z_dim


@dataclass(frozen=True, eq=False)
class OracleEraser:
    """The map `(x, z) ↦ x − coefficients · (z − mean_z)`.

    The guarantee is that of LEACE, no linear probe with a convex loss beats the best constant, on the rows it was
    fitted on. A quadratic probe may.

    Attributes:
        coefficients: `(x_dim, z_dim)` float64, the regression of x on z.
        mean_z: `(z_dim,)` float64.
    """

    coefficients: Tensor
    mean_z: Tensor

    @classmethod
    def fit(cls, x: Tensor, z: Tensor, *, weight: Tensor | None = None, mask: Tensor | None = None) -> OracleEraser:
        """Fit on one batch of rows; arguments and errors are those of `ConceptMoments.update`."""
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise TypeError(f"x is {type(x).__name__}: give a tensor of shape (…, x_dim).")
        return cls.of(ConceptMoments(x.shape[-1], infer_z_dim(x, z, mask)).update(x, z, weight, mask=mask))

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def of(cls, moments: ConceptMoments) -> OracleEraser:
        """Solve from moments.

        Raises:
            ValueError: If no rows were seen, or z does not vary.
        """
        moments.check_concept()
        # The pseudo-inverse is relative to the variance of every class: a rare one is erased as a common one is.
        whitener = whiten_concept(moments.covariance_z)
        return cls(moments.cross_covariance @ whitener @ whitener.T, moments.mean_z)

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Erase the concept.

        Args:
            x: `(…, x_dim)`.
            z: Integer class ids `(…)`, or values `(…, z_dim)`, of every row.

        Returns:
            `(…, x_dim)` in the dtype of `x`; computed in float32 or, for float64, in it.

        Raises:
            TypeError: If `x` is no floating-point tensor or `z` no tensor.
            ValueError: If a shape does not fit or a class id is out of range.
        """
        width, classes = self.coefficients.shape
        check_activations(x, z, width)
        if z.shape == x.shape[:-1] and not z.dtype.is_floating_point and classes > 1:
            values = one_hot(check_ids(z, classes), classes)
        elif z.shape == (*x.shape[:-1], classes):
            values = z
        elif classes == 1 and z.shape == x.shape[:-1]:
            values = z.unsqueeze(-1)
        else:
            raise ValueError(
                f"z has shape {tuple(z.shape)} and x {tuple(x.shape)}: give one class id per row, or z_dim={classes} "
                "values."
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        offset = (values.double() - self.mean_z.to(z.device)).to(x.device, dtype)
        return (x.to(dtype) - offset @ self.coefficients.to(x.device, dtype).T).to(x.dtype)


def check_activations(x: Tensor, z: Tensor, width: int) -> None:
    """Refuse what an eraser that is told z cannot act on."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is {kind}: an eraser acts on floating-point activations; call x.float() first.")
    if not isinstance(z, Tensor):
        raise TypeError(f"z is {type(z).__name__}: give a tensor with the concept of every row.")
    if x.shape[-1:] != (width,):
        raise ValueError(f"x has shape {tuple(x.shape)}, but the eraser acts on a last dimension of {width}.")


def check_ids(z: Tensor, classes: int) -> Tensor:
    """Class ids as int64, all of them known: a row without a label cannot be erased by its label."""
    low, high = (int(edge) for edge in z.aminmax()) if z.numel() else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(
            f"z holds class id {low if low < 0 else high}, but ids run from 0 to {classes - 1}: this eraser needs the "
            "label of every row; leave rows without one out."
        )
    return z.to(torch.int64)
