"""The frozen result of a fit: an affine map of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .apply import apply_erasure


@dataclass(frozen=True, eq=False)
class Eraser:
    """The map `x ↦ x − left · right · (x − bias)` (arXiv 2306.03819, Theorem 4.3).

    The tensors are copies: nothing that happens to the moments later reaches an eraser.

    Attributes:
        left: `(x_dim, rank)` float64, the directions that are subtracted.
        right: `(rank, x_dim)` float64, the readings of the concept; `right @ left` is the identity.
        bias: `(x_dim,)` float64, the mean that stays in place; None for a map without affine part.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.shape != self.left.shape[::-1]:
            raise ValueError(
                f"left has shape {tuple(self.left.shape)} and right {tuple(self.right.shape)}: they must be "
                "(x_dim, rank) and (rank, x_dim)."
            )
        if self.bias is not None and self.bias.shape != self.left.shape[:1]:
            raise ValueError(
                f"bias has shape {tuple(self.bias.shape)}: it must be ({self.left.shape[0]},), the width of left."
            )
        # A copy made outside inference mode may become a buffer that is later changed in place.
        with torch.inference_mode(False):
            for name in ("left", "right", "bias"):
                value = getattr(self, name)
                if value is not None:
                    object.__setattr__(self, name, value.detach().clone())

    @classmethod
    def fit(
        cls,
        x: Tensor,
        z: Tensor,
        method: str = "leace",
        *,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Eraser:
        """Fit an eraser on one batch of rows.

        Args:
            x: `(…, x_dim)` activations.
            z: Integer class ids `(…)`, −100 to leave a row out; or values `(…, z_dim)`; or one value per row `(…)`.
            method: "leace", "orth" (which is SAL) or "mean_projection", from the moments of the rows; "inlp" or
                "rlace", which train probes on the rows.
            weight: `(…)` non-negative weights of rows.
            mask: `(…)` bool, False leaves a row out.
            **options: As for `ConceptMoments.eraser`; for "inlp" as for `fit_inlp`, for "rlace" as for `fit_rlace`.
                `probe="least_squares"` with "inlp" takes the rounds from the moments, as `ConceptMoments.eraser` does;
                the default is `probe="logistic"`.

        Raises:
            TypeError: If `x` or `z` is not a tensor of numbers.
            ValueError: As `ConceptMoments.update` and `ConceptMoments.eraser` do.
        """
        if method == "rlace":
            from .rlace import fit_rlace

            return fit_rlace(x, z, weight=weight, mask=mask, **options)
        if method == "inlp":
            from .inlp import check_probe, fit_inlp

            if check_probe(options.pop("probe", "logistic")) == "logistic":
                return fit_inlp(x, z, weight=weight, mask=mask, **options)
        from .moments import ConceptMoments
        from .rows import infer_z_dim

        moments = ConceptMoments(_width(x), infer_z_dim(x, z, mask))
        return moments.update(x, z, weight, mask=mask).eraser(method, **options)

    def __call__(self, x: Tensor) -> Tensor:
        """Erase the concept from `x` `(…, x_dim)`; computed on the device of `x`, in float32 or, for float64, in it."""
        bias = None if self.bias is None else self.bias.to(x.device)
        return apply_erasure(x, self.left.to(x.device), self.right.to(x.device), bias)

    @property
    def rank(self) -> int:
        """How many directions are removed."""
        return self.left.shape[1]

    @property
    def x_dim(self) -> int:
        """Width of the activations."""
        return self.left.shape[0]

    @property
    def matrix(self) -> Tensor:
        """`(x_dim, x_dim)`: the linear part `I − left · right`."""
        identity = torch.eye(self.x_dim, dtype=self.left.dtype, device=self.left.device)
        return identity - self.left @ self.right

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Eraser:
        """A copy on another device or in another dtype."""
        bias = None if self.bias is None else self.bias.to(device=device, dtype=dtype)
        return Eraser(self.left.to(device=device, dtype=dtype), self.right.to(device=device, dtype=dtype), bias)


def _width(x: Tensor) -> int:
    if not isinstance(x, Tensor) or x.ndim == 0:
        raise TypeError(f"x is {type(x).__name__}: give a tensor of shape (…, x_dim).")
    return x.shape[-1]
