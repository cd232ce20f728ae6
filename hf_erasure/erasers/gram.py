"""The matrix of second moments, kept as the block columns of its upper triangle."""

from __future__ import annotations

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
        self.values = self.empty(torch.float64, device).zero_()

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised values in this layout."""
        size = sum(stop * (stop - start) for start, stop in self._edges())
        return torch.empty(size, dtype=dtype, device=device)

    def columns(self, values: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Every block column `[:stop, start:stop]` of a matrix in this layout, as `(start, stop, view)`."""
        offset = 0
        for start, stop in self._edges():
            size = stop * (stop - start)
            yield start, stop, values[offset : offset + size].view(stop, stop - start)
            offset += size

    def _edges(self) -> list[tuple[int, int]]:
        return [(start, min(start + self.block, self.dim)) for start in range(0, self.dim, self.block)]

    def products(self, rows: Tensor, out: Tensor, *, add: bool) -> None:
        """`out (+)= rowsᵀ rows` for rows `(n, dim)`, in their dtype."""
        for start, stop, column in self.columns(out):
            column.addmm_(rows[:, :stop].T, rows[:, start:stop], beta=int(add))

    def add_outer(self, vectors: Tensor, scales: Tensor) -> None:
        """Add `Σ scalesᵣ · vectorsᵣ vectorsᵣᵀ` for float64 `(r, dim)` vectors."""
        scaled = (vectors * scales[:, None]).T
        for start, stop, column in self.columns(self.values):
            column.addmm_(scaled[:stop], vectors[:, start:stop])

    def dense(self) -> Tensor:
        """The full matrix, `(dim, dim)`, symmetric to the bit."""
        full = self.values.new_empty(self.dim, self.dim)
        for start, stop, column in self.columns(self.values):
            full[:start, start:stop] = column[:start]
            full[start:stop, :start] = column[:start].T
            # Two triangles of one product may round differently.
            full[start:stop, start:stop] = (column[start:] + column[start:].T) / 2
        return full

    def diagonal(self, values: Tensor) -> Tensor:
        """The diagonal, `(dim,)`, of a matrix in this layout."""
        return torch.cat([column[start:].diagonal() for start, _, column in self.columns(values)])
