"""The matrix of second moments, kept as the block columns of its upper triangle."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor


class PackedGram:
    """A symmetric `(dim, dim)` sum of products in float64, of which only the upper block triangle exists.

    Half the products and half the memory of a full matrix are saved: the float64 sum takes little more room than a
    full float32 matrix would. Block columns, `block` wide and as tall as the diagonal is deep, because products of
    that shape run nearly as fast as one of the whole matrix; tiles and block rows were measured to be slower.

    Attributes:
        dim: Side of the matrix.
        block: Width of a block column.
        values: float64, all block columns one after another, each row by row.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        # Measured on CPU: narrower blocks run slower, wider ones waste more below the diagonal.
        self.dim = dim
        self.block = 128 if dim <= 1024 else 256
        self._edges = [(start, min(start + self.block, dim)) for start in range(0, dim, self.block)]
        self.values = self.empty(torch.float64, device).zero_()

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised values in this layout."""
        size = sum(stop * (stop - start) for start, stop in self._edges)
        return torch.empty(size, dtype=dtype, device=device)

    def columns(self, values: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Every block column `[:stop, start:stop]` of a matrix in this layout, as `(start, stop, view)`."""
        offset = 0
        for start, stop in self._edges:
            size = stop * (stop - start)
            yield start, stop, values[offset : offset + size].view(stop, stop - start)
            offset += size

    def products(self, rows: Tensor, out: Tensor, *, add: bool) -> None:
        """`out (+)= rowsᵀ rows` for rows `(n, dim)`, in their dtype."""
        for start, stop, column in self.columns(out):
            column.addmm_(rows[:, :stop].T, rows[:, start:stop], beta=int(add))

    def absorb(self, values: Tensor | None, vectors: Tensor, scales: Tensor) -> None:
        """Add values in this layout and `Σ scalesᵣ · vectorsᵣ vectorsᵣᵀ`.

        Args:
            values: What `products` made, in any dtype; None for no values.
            vectors: `(r, dim)` float64.
            scales: `(r,)` float64.
        """
        scaled = (vectors * scales[:, None]).T
        added = None if values is None else self.columns(values)
        for start, stop, column in self.columns(self.values):
            # One column after another: it is still in the cache for the second addition.
            if added is not None:
                column.add_(next(added)[2])
            if scaled.shape[1]:
                column.addmm_(scaled[:stop], vectors[:, start:stop])

    def like(self, values: Tensor) -> PackedGram:
        """A matrix of the same size that holds `values`."""
        other = copy.copy(self)
        other.values = values
        return other

    @property
    def diagonal(self) -> Tensor:
        """The diagonal, `(dim,)`, as a copy."""
        return torch.cat([column[start:].diagonal() for start, _, column in self.columns(self.values)])

    def set_diagonal(self, diagonal: Tensor) -> None:
        """Replace the diagonal."""
        for start, stop, column in self.columns(self.values):
            column[start:].diagonal().copy_(diagonal[start:stop])

    def scale(self, scale: Tensor) -> None:
        """Multiply rows and columns by `scale` `(dim,)`, in place."""
        for start, stop, column in self.columns(self.values):
            column.mul_(scale[start:stop]).mul_(scale[:stop, None])

    def mean_square(self) -> float:
        """Mean of the squares of all `dim²` entries."""
        total = 0.0
        for start, _, column in self.columns(self.values):
            total += 2 * float(torch.linalg.vector_norm(column[:start])) ** 2
            total += float(torch.linalg.vector_norm(column[start:])) ** 2
        return total / self.dim**2

    def quadratic(self, forms: Tensor) -> Tensor:
        """`forms · matrix · formsᵀ` for float64 `(r, dim)` forms."""
        total = forms.new_zeros(forms.shape[0], forms.shape[0])
        for start, stop, column in self.columns(self.values):
            above = forms[:, :start] @ column[:start] @ forms[:, start:stop].T
            total += above + above.T + forms[:, start:stop] @ column[start:] @ forms[:, start:stop].T
        return total

    def cholesky(self, shift: float) -> Tensor | None:
        """The upper factor `U`, `Uᵀ U = matrix + shift · I`; None if that is not positive definite."""
        full = self.values.new_zeros(self.dim, self.dim)
        for start, stop, column in self.columns(self.values):
            full[start:stop, :stop] = column.T
        full.diagonal().add_(shift)
        # The transpose lies in memory as LAPACK wants it, and is factored where it lies: no copy, no second matrix.
        upper, info = full.mT, torch.zeros((), dtype=torch.int32, device=full.device)
        torch.linalg.cholesky_ex(upper, upper=True, out=(upper, info))
        return upper if int(info) == 0 else None

    def dense(self) -> Tensor:
        """The full matrix, `(dim, dim)`, symmetric to the bit."""
        full = self.values.new_empty(self.dim, self.dim)
        for start, stop, column in self.columns(self.values):
            full[:start, start:stop] = column[:start]
            full[start:stop, :start] = column[:start].T
            # Two triangles of one product may round differently.
            full[start:stop, start:stop] = (column[start:] + column[start:].T) / 2
        return full
