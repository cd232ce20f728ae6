"""An eraser: an affine map of activations, frozen, and how it acts in the hot path of every hooked module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .factors import check_probe

# How an eraser is fitted on one batch: from its "moments", or on the rows themselves by method. The files that know
# how, and need the class below for it, enter theirs.
FITS: dict[str, Callable[..., Eraser]] = {}


@dataclass(frozen=True, eq=False)
class Eraser:
    """The map `x ↦ x − left · right · (x − bias)` (arXiv 2306.03819, Theorem 4.3).

    The tensors are copies: nothing that happens to the moments later reaches an eraser.

    Attributes:
        left: `(x_dim, rank)` float64, the directions that are subtracted.
        right: `(rank, x_dim)` float64, the readings of the concept; `right @ left` is the identity.
        bias: `(x_dim,)` float64, the mean that stays in place; None for a map without affine part.
        x_dim: Width of the activations.
        rank: How many directions are removed.
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None
    x_dim: int = field(init=False, repr=False)
    rank: int = field(init=False, repr=False)

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
        for name, size in zip(("x_dim", "rank"), self.left.shape, strict=True):
            object.__setattr__(self, name, size)
        # A copy made outside inference mode may become a buffer that is later changed in place. It has the strides that
        # loading gives it: with others, as a solver leaves them, matrix products may sum in another order.
        with torch.inference_mode(False):
            for name in ("left", "right", "bias"):
                value = getattr(self, name)
                if value is not None:
                    copied = value.detach().clone(memory_format=torch.contiguous_format)
                    object.__setattr__(self, name, copied)

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
        # Only INLP has a probe that the moments answer.
        if method == "rlace" or (method == "inlp" and check_probe(options.pop("probe", "logistic")) == "logistic"):
            return FITS[method](x, z, weight=weight, mask=mask, **options)
        return FITS["moments"](x, z, weight=weight, mask=mask, method=method, **options)

    def __call__(self, x: Tensor) -> Tensor:
        """Erase the concept from `x` `(…, x_dim)`; computed on the device of `x`, in float32 or, for float64, in it."""
        bias = None if self.bias is None else self.bias.to(x.device)
        return apply_erasure(x, self.left.to(x.device), self.right.to(x.device), bias)

    def parts(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """`left`, `right` and `bias` as an adapter keeps them: a purely linear eraser has a zero bias."""
        bias = self.left.new_zeros(self.x_dim) if self.bias is None else self.bias
        return self.left.to(device, dtype), self.right.to(device, dtype), bias.to(device, dtype)

    @property
    def matrix(self) -> Tensor:
        """`(x_dim, x_dim)`: the linear part `I − left · right`."""
        identity = torch.eye(self.x_dim, dtype=self.left.dtype, device=self.left.device)
        return identity - self.left @ self.right

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Eraser:
        """A copy on another device or in another dtype."""
        bias = None if self.bias is None else self.bias.to(device=device, dtype=dtype)
        return Eraser(self.left.to(device=device, dtype=dtype), self.right.to(device=device, dtype=dtype), bias)


def apply_erasure(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x − left · right · (x − bias)` for every row of `x` (arXiv 2306.03819, Theorem 4.3).

    The arithmetic runs in float32, or in float64 for a float64 `x`, whatever autocast says; the result has the dtype
    of `x`. Nothing branches on values, so the map compiles into one graph, differentiates and vectorises.

    Args:
        x: `(…, d)` activations of any floating dtype.
        left: `(d, rank)` directions that are subtracted.
        right: `(rank, d)` readings that say how much of each.
        bias: `(d,)` centre that the map leaves in place, or None for a linear map.

    Returns:
        `(…, d)` in the dtype of `x`; `x` itself when the rank is 0.

    Raises:
        TypeError: If `x` does not hold floating-point numbers.
        ValueError: If the width of `x` is not that of the eraser.
    """
    width, rank = left.shape
    if not x.dtype.is_floating_point or x.shape[-1:] != (width,):  # on the hot path, a call only where it refuses
        check_activations(x, width)
    if rank == 0:
        return x
    dtype, device = torch.promote_types(x.dtype, torch.float32), x.device.type
    # Devices without autocast (meta) refuse the context altogether.
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        rows = x.to(dtype).reshape(-1, width)
        left, right = left.to(dtype), right.to(dtype)
        # right · (x − bias) = right · x − right · bias saves a pass over x. The constant is a difference of large
        # numbers where the mean is far from zero, so it is formed in float64.
        shift = None if bias is None else (right.double() @ bias.to(right.device).double()).to(dtype)
        if rank == 1:
            reading = torch.mv(rows, right[0]).unsqueeze(-1)
            reading = reading if shift is None else reading - shift
            erased = torch.addcmul(rows, reading, left[:, 0], value=-1)
        else:
            reading = rows @ right.T if shift is None else torch.addmm(shift, rows, right.T, beta=-1)
            erased = torch.addmm(rows, reading, left.T, alpha=-1)
        return erased.reshape(x.shape).to(x.dtype)


def check_activations(x: Tensor, width: int) -> None:
    """Refuse what an eraser of that width cannot act on."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        kind = f"has dtype {x.dtype}" if isinstance(x, Tensor) else f"is {type(x).__name__}"
        raise TypeError(f"x {kind}: an eraser acts on floating-point activations; call x.float() first.")
    if x.shape[-1:] != (width,):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but the eraser acts on a last dimension of {width}: apply it to the "
            "activations it was fitted on."
        )
