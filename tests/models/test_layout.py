"""The axes of activations are found by changing the rows and the lengths, and never by their sizes alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_erasure.models.layout import (
    Axes,
    Lengths,
    Passes,
    Summary,
    Visit,
    rows_of,
    with_lengths,
)

ROWS, WIDTH = 2, 5
Layout = Callable[[Tensor], Tensor]


def mirrored(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a batch, followed by the same rows in the opposite order."""
    return rows_of(batch, ROWS, [*range(ROWS), *reversed(range(ROWS))])


def states(ids: Tensor) -> Tensor:
    """A tensor `(rows, positions, width)` whose values differ by row, position and feature."""
    table = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))
    return table[ids] + torch.arange(ids.shape[1])[:, None]


def found(layout: Layout, width: int = -1, length: int = 8) -> tuple[Axes, Tensor]:
    """The axes that are found for states in a layout, and the states rearranged by them."""
    batch = {"input_ids": torch.arange(ROWS * length).reshape(ROWS, length)}
    now = Lengths.in_batch(batch)
    other = now.altered()
    given = [layout(states(each["input_ids"])) for each in (batch, mirrored(batch), with_lengths(batch, now, other))]
    axes = axes_of(given, width % given[0].dim(), now, other)
    return axes, axes.arranged(given[0], ROWS)


def axes_of(activations: list[Tensor], width: int, now: Lengths, other: Lengths) -> Axes:
    first = Summary.of(activations[0])
    seen = [first, Summary.of(activations[1], first, ROWS), Summary.of(activations[2])]
    passes = Passes(ROWS, now, other, *({Visit("here"): each} for each in seen))
    return passes.axes_of(Visit("here"), nn.Identity(), lambda: {width})


EXPECTED = states(torch.arange(ROWS * 8).reshape(ROWS, 8))
ALIGNED: dict[str, tuple[Layout, int]] = {
    "batch, position, width": (lambda x: x, -1),
    "position, batch, width": (lambda x: x.transpose(0, 1), -1),
    "batch, width, position": (lambda x: x.transpose(1, 2), 1),
    "one list, by row": (lambda x: x.flatten(0, 1), -1),
    "one list, by position": (lambda x: x.transpose(0, 1).flatten(0, 1), -1),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_positions_are_found(name: str) -> None:
    layout, width = ALIGNED[name]
    axes, rows = found(layout, width)
    assert axes.side == ""
    assert torch.equal(rows, EXPECTED)


def test_as_many_rows_as_positions_are_told_apart() -> None:
    for layout in (lambda x: x, lambda x: x.transpose(0, 1)):
        axes, rows = found(layout, length=ROWS)
        assert axes.side == ""
        assert torch.equal(rows, states(torch.arange(ROWS * ROWS).reshape(ROWS, ROWS)))


def test_heads_stand_between_the_positions_and_the_width() -> None:
    axes, rows = found(lambda x: torch.stack([x, 2 * x, 3 * x], 1))
    assert axes.side == ""
    assert rows.shape == (ROWS, 8, 3, WIDTH)
    assert torch.equal(rows[:, :, 1], 2 * EXPECTED)


WITHOUT_POSITIONS: dict[str, Layout] = {
    "a row each": lambda x: x.mean(1),
    "shortened": lambda x: x[:, ::2],
    "a prompt in front": lambda x: torch.cat([torch.ones(len(x), 3, WIDTH), x], 1),
    "three streams": lambda x: x.repeat(1, 3, 1),
    "as many as there are positions by chance": lambda x: x[:, :1].expand(-1, 8, -1) * torch.arange(8)[:, None],
    "windows of all rows": lambda x: x[:, :4].reshape(2 * len(x), 2, WIDTH),
}


@pytest.mark.parametrize("name", WITHOUT_POSITIONS)
def test_rows_that_are_not_positions_are_those_of_their_example(name: str) -> None:
    layout = WITHOUT_POSITIONS[name]
    axes, rows = found(layout)
    assert axes.side is None
    ids = torch.arange(ROWS * 8).reshape(ROWS, 8)
    for row in range(ROWS):
        alone = layout(states(ids[row : row + 1])).reshape(-1, WIDTH)
        assert torch.equal(rows[row].reshape(-1, WIDTH), alone)


def test_decoders_have_positions_of_their_own() -> None:
    batch = {"input_ids": torch.ones(2, 8).long(), "decoder_input_ids": torch.ones(2, 8).long()}
    now = Lengths.in_batch(batch)
    other = now.altered()
    given = with_lengths(batch, now, other)
    assert given["input_ids"].shape != given["decoder_input_ids"].shape
    assert now.side_of(8, other, given["decoder_input_ids"].shape[1]) == "decoder_"
    assert now.side_of(8, other, given["input_ids"].shape[1]) == ""
    assert now.side_of(8, other, 8) is None


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="no axis grows with the examples"):
        found(lambda x: torch.ones(3, WIDTH))


def test_rows_that_depend_on_their_content_are_refused() -> None:
    # The rows that an expert is given: 6 of the first example, 2 of the second.
    def of_an_expert(x: Tensor) -> Tensor:
        keep = torch.arange(x.shape[1]) < torch.where(x[:, :1, 0] == x[0, 0, 0], 6, 2)
        return x[keep]

    with pytest.raises(ValueError, match="rows of an example are others"):
        found(of_an_expert)
    axes = Axes(-1, 0, per_example=4)
    with pytest.raises(ValueError, match=r"holds 6 rows of 2 examples, but 4 for each example"):
        axes.arranged(torch.zeros(6, WIDTH), 2, "here")


@given(st.permutations(range(4)), st.integers(2, 4), st.integers(4, 6))
def test_any_order_of_axes_is_put_right(order: list[int], heads: int, length: int) -> None:
    batch = {"input_ids": torch.arange(ROWS * length).reshape(ROWS, length)}
    now = Lengths.in_batch(batch)
    other = now.altered()

    def layout(ids: Tensor) -> Tensor:
        return torch.stack([states(ids) * (head + 1) for head in range(heads)], 2).permute(order)

    passes = [layout(given["input_ids"]) for given in (batch, mirrored(batch), with_lengths(batch, now, other))]
    axes = axes_of(passes, order.index(3), now, other)
    assert torch.equal(axes.arranged(passes[0], ROWS), layout(batch["input_ids"]).permute(*map(order.index, range(4))))
