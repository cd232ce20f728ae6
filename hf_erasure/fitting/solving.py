"""From the moments at one site to its eraser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.erasers import ConceptMoments, Eraser, joint_moments, relative_change

from .processes import Processes
from .running import on_cpu


@dataclass(frozen=True)
class SiteFit:
    """The eraser of one site, and what its moments told.

    Attributes:
        eraser: float64.
        dtype: What the eraser is kept and applied in: float32, or float64 on float64 activations.
        rows: Labelled rows.
        shares: `(z_dim,)` mean of the concept; the shares of the classes.
        correlation: Largest canonical correlation with the concept on these rows, before erasure.
        change: `sqrt(E|r(x) − x|² / E|x − E x|²)` on these rows.
    """

    eraser: Eraser
    dtype: torch.dtype
    rows: int
    shares: Tensor
    correlation: float
    change: float

    def parts(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`left`, `right` and `bias` as the adapter keeps them: a purely linear eraser has a zero bias."""
        bias = self.eraser.left.new_zeros(self.eraser.x_dim) if self.eraser.bias is None else self.eraser.bias
        left, right, bias = (t.to(device, self.dtype) for t in (self.eraser.left, self.eraser.right, bias))
        return left, right, bias

    def to(self, device: torch.device) -> SiteFit:
        """The same fit on another device."""
        eraser = self.eraser
        bias = None if eraser.bias is None else eraser.bias.to(device)
        moved = Eraser(left=eraser.left.to(device), right=eraser.right.to(device), bias=bias)
        return dataclasses.replace(self, eraser=moved, shares=self.shares.to(device))


def share_out(processes: Processes, solvers: Mapping[str, Callable[[], SiteFit]]) -> dict[str, SiteFit]:
    """Solve each site in one of the processes; all end with the same fits.

    Raises:
        ValueError: What a solver raised in this process.
        RuntimeError: If one failed in another.
    """
    if processes.count == 1:
        return {site: solve() for site, solve in solvers.items()}
    with processes.agreeing("solving for its sites"):
        mine = {site: solvers[site]().to(torch.device("cpu")) for site in processes.mine(list(solvers))}
    solved = {site: fit for own in processes.gathered([mine]) for site, fit in own.items()}
    return {site: solved[site] for site in solvers}


@on_cpu
def solve_site(
    site: str,
    labelled: Sequence[ConceptMoments],
    background: ConceptMoments | None,
    dtype: torch.dtype,
    config: ConceptErasureConfig,
) -> SiteFit:
    """Solve for one site.

    Args:
        site: Its name, for messages.
        labelled: Moments of the labelled rows, one for each concept that is erased together.
        background: Moments of rows that say what should not be disturbed; the labelled ones when None.
        dtype: Of the activations.
        config: Method, rank and whether the mean is kept.

    Raises:
        ValueError: Names the site, and what the moments lack.
    """
    try:
        moments = joint_moments(labelled)
    except ValueError as error:
        raise ValueError(f"At {site!r}: {error}") from error
    if _is_constant(moments):
        # As the first norm of a [CLS] token: nothing varies, so nothing can be read.
        empty = torch.zeros(moments.x_dim, 0, dtype=torch.float64)
        eraser = Eraser(left=empty, right=empty.T.clone(), bias=moments.mean_x.clone())
    else:
        try:
            eraser = moments.eraser(config.method, affine=config.affine, rank=config.max_rank, background=background)
        except ValueError as error:
            raise ValueError(f"At {site!r}: {error}") from error
    acts = eraser.rank > 0
    return SiteFit(
        eraser=eraser,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        rows=moments.rows,
        shares=moments.mean_z.clone(),
        correlation=float(moments.canonical_correlations()[0]) if acts else 0.0,
        change=relative_change(eraser, moments) if acts else 0.0,
    )


def _is_constant(moments: ConceptMoments) -> bool:
    """Whether activations differ by no more than the rounding of float32 statistics."""
    variance = moments.covariance_x.diagonal()
    return bool(variance.max() <= 1e-12 * (moments.mean_x.square().mean() + variance.mean()))
