"""Which norms read or write the hidden state follows from the forward pass, not from their names and places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_erasure.models.flow import NormFinder


class Attention(nn.Module):
    """Mixes the positions; its norm of the queries is as wide as the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.anything_norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        query = self.anything_norm(self.query(x))
        return self.out((query @ x.transpose(1, 2)).softmax(-1) @ self.value(x))


class Gated(nn.Module):
    """A mixer that normalises its own state before a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)) * self.gate(x).sigmoid())


class Block(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.mixer, self.mlp = order, Attention(), Gated()
        self.first, self.second, self.unused_norm = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "before":
            x = x + self.mixer(self.first(x))
            return x + self.mlp(self.second(x))
        if self.order == "after":
            x = self.first(x + self.mixer(x))
            return self.second(x + self.mlp(x))
        x = x + 0.5 * self.first(self.mixer(x))
        return x + self.second(self.mlp(x))


class Model(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.embedding_norm = nn.LayerNorm(8)  # the final norm in the forward pass, despite its name
        self.table, self.first_norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.parts = nn.ModuleList([Block(order), Block(order)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first_norm(self.table(ids))
        for part in self.parts:
            x = part(x)
        return self.embedding_norm(x)


@pytest.mark.parametrize("order", ["before", "after", "on the way back"])
def test_norms_of_the_hidden_state_are_found(order: str) -> None:
    torch.manual_seed(0)
    model = Model(order).eval()
    with torch.no_grad():
        sites = NormFinder(model, lambda: model(torch.randint(0, 20, (2, 5)))).sites
    inside = [f"parts.{block}.{name}" for block in (0, 1) for name in ("first", "second")]
    assert sites == [*inside, "embedding_norm"]


@pytest.mark.parametrize("is_pooled", [True, False])
def test_the_norm_of_a_head_behind_the_blocks_counts_and_one_of_its_own_states_does_not(is_pooled: bool) -> None:
    class Headed(Model):
        """Classifies by the norm of the mean (VideoMAE), or by the mean of the norm (PoolFormer)."""

        def __init__(self) -> None:
            super().__init__("before")
            self.dense, self.own_norm, self.out = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            for part in self.parts:
                x = part(x)
            x = self.embedding_norm(x.mean(1)) if is_pooled else self.embedding_norm(x).mean(1)
            return self.out(self.own_norm(self.dense(x)))

    model = Headed().eval()
    with torch.no_grad():
        sites = NormFinder(model, lambda: model(torch.randint(0, 20, (2, 5)))).sites
    assert sites == [f"parts.{block}.{name}" for block in (0, 1) for name in ("first", "second")] + ["embedding_norm"]


def test_blocks_that_are_not_called_themselves_count() -> None:
    class Direct(Model):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.first_norm(self.table(ids))
            for part in self.parts:
                x = part.forward(x)
            return x

    model = Direct("after").eval()
    with torch.no_grad():
        sites = NormFinder(model, lambda: model(torch.randint(0, 20, (2, 5)))).sites
    assert sites == ["parts.0.first", "parts.0.second", "parts.1.first", "parts.1.second"]


def test_the_last_norm_of_a_branch_of_convolutions_counts_and_the_first_does_not() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.two, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.norm2(self.two(self.norm1(self.one(x)).relu()))).relu()

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Residual(), Residual()).eval()
    with torch.no_grad():
        sites = NormFinder(model, lambda: model(torch.randn(2, 3, 6, 6))).sites
    assert sites == ["1.norm2", "2.norm2"]


def test_a_block_that_changes_the_width_begins_another_hidden_state() -> None:
    class Widening(nn.Module):
        """Adds two projections of the same norm's output, as Hiera and BiT do."""

        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(16)
            self.around, self.mixer, self.mlp = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(x)
            x = self.around(x) + self.mixer(x)
            return x + self.mlp(self.norm2(x))

    model = nn.Sequential(Block("before"), Widening()).eval()
    with torch.no_grad():
        sites = NormFinder(model, lambda: model(torch.randn(2, 5, 8))).sites
    assert sites == ["0.first", "0.second", "1.norm1", "1.norm2"]


def test_a_norm_of_a_part_without_a_sum_of_its_own_counts_and_one_of_queries_does_not() -> None:
    class Shared(nn.Module):
        """Has attention and an MLP without a residual sum between them, as Zamba's shared blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.mixer, self.second, self.mlp = nn.LayerNorm(8), Attention(), nn.LayerNorm(8), Gated()

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.second(self.mixer(self.first(x))))

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.out = Shared(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(self.shared(x))

    model = nn.Sequential(Around(), Around()).eval()
    with torch.no_grad():
        sites = NormFinder(model, lambda: model(torch.randn(2, 5, 8))).sites
    assert sites == [f"{block}.shared.{name}" for block in (0, 1) for name in ("first", "second")]


def test_a_norm_whose_output_is_normalised_again_counts() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x + self.mixer(x)))

    model = nn.Sequential(Twice("after"), Twice("after")).eval()
    with torch.no_grad():
        sites = NormFinder(model, lambda: model(torch.randn(2, 5, 8))).sites
    assert sites == ["0.first", "0.second", "1.first", "1.second"]


def test_what_streams_are_mixed_to_is_the_hidden_state_and_their_norm_does_not_count() -> None:
    class Mixed(nn.Module):
        """Attends to the states of earlier blocks, as Inkling 2 does."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.norm = nn.Parameter(torch.randn(8)), nn.LayerNorm(8, elementwise_affine=False)
            self.first, self.mlp = nn.LayerNorm(8), Gated()

        def forward(self, x: Tensor, before: Tensor) -> Tensor:
            states = self.norm(torch.stack([x, before], -2))
            query = self.query.expand(*states.shape[:-2], 1, 8)
            mixed = nn.functional.scaled_dot_product_attention(query, states, states).squeeze(-2)
            return x + self.mlp(self.first(mixed))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.parts = nn.Embedding(20, 8), nn.ModuleList([Mixed(), Mixed()])

        def forward(self, ids: Tensor) -> Tensor:
            x = before = self.table(ids)
            for part in self.parts:
                x, before = part(x, before), x
            return x

    model = Stack().eval()
    with torch.no_grad():
        sites = NormFinder(model, lambda: model(torch.randint(0, 20, (2, 5)))).sites
    assert sites == ["parts.0.first", "parts.1.first"]


def test_hooks_are_gone_afterwards() -> None:
    model = Model("before").eval()
    with torch.no_grad():
        NormFinder(model, lambda: model(torch.randint(0, 20, (2, 5))))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
