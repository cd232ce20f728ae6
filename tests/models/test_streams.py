"""Which linear maps read the hidden state, and which write it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.models.streams import Weight, readers_of, writers_of
from tests.breadth.examples import batch_of
from tests.breadth.zoo import build


def test_readers_of_a_sequential_decoder_are_grouped_by_what_they_take():
    groups = readers_of(build("llama"))
    attention, mlp = groups[:2]
    assert attention == [Weight(f"layers.0.self_attn.{name}_proj", "weight", 1) for name in "qkv"]
    assert mlp == [Weight(f"layers.0.mlp.{name}_proj", "weight", 1) for name in ("gate", "up")]
    assert len(groups) == 4


def test_writers_of_a_sequential_decoder_are_embedding_and_projections():
    blocks = [
        Weight(f"layers.{n}.{name}", "weight", 0) for n in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert writers_of(build("llama")) == [Weight("embed_tokens", "weight", 1), *blocks]


def test_conv1d_and_embeddings_have_their_features_along_the_other_axis():
    model = build("gpt2")
    assert readers_of(model)[0] == [Weight("h.0.attn.c_attn", "weight", 0)]
    assert writers_of(model)[:3] == [Weight(name, "weight", 1) for name in ("wte", "wpe", "h.0.attn.c_proj")]


def test_writers_are_refused_where_norms_make_the_stream():
    with pytest.raises(ValueError, match=r"'embeddings.LayerNorm' is the stream.*target_modules='readers'"):
        writers_of(build("bert"))
    assert readers_of(build("bert"))[-1] == [Weight("pooler.dense", "weight", 1)]


class Own(nn.Module):
    """A model of one block: `x + down(relu(up(norm(x))))`; tests override parts of it."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.last = nn.Embedding(11, 6), nn.LayerNorm(6), nn.LayerNorm(6)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 3)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(10).view(2, 5)}

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        hidden = hidden + self.branch(self.norm(hidden))
        return self.head(self.last(hidden))

    def branch(self, normed: Tensor) -> Tensor:
        return self.down(self.up(normed).relu())


def _names(weights: Iterable[Weight]) -> list[str]:
    return [weight.module for weight in weights]


def test_a_model_of_ones_own():
    assert [_names(group) for group in readers_of(Own())] == [["up"], ["head"]]
    assert _names(writers_of(Own())) == ["embed", "down"]


def test_a_map_that_is_not_called_is_told_of():
    class Functional(Own):
        def branch(self, normed: Tensor) -> Tensor:
            return self.down(linear(normed, self.up.weight).relu())

    with pytest.warns(UserWarning, match=r"does not guard all that Functional reads: the weight 'up.weight' takes it"):
        groups = readers_of(Functional())
    assert [_names(group) for group in groups] == [["head"]]


def test_blocks_that_the_pass_does_not_run_are_told_of():
    class Skips(Own):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

        def branch(self, normed: Tensor) -> Tensor:
            return self.blocks[0](super().branch(normed))

    class Experts(Own):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

        def branch(self, normed: Tensor) -> Tensor:
            return self.experts[1](normed)

    with pytest.warns(UserWarning, match=r"does not run 'blocks.1'"):
        readers_of(Skips())
    assert [_names(group) for group in readers_of(Experts())] == [["experts.1", "experts.0"], ["head"]]
    assert _names(writers_of(Experts())) == ["embed", "experts.1", "experts.0"]


def test_features_that_are_cut_in_two_do_not_share_an_eraser():
    class Halves(Own):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 8), nn.Linear(3, 8)

        def branch(self, normed: Tensor) -> Tensor:
            return self.down(self.left(normed[..., :3]) + self.right(normed[..., 3:]))

    assert [_names(group) for group in readers_of(Halves())] == [["left"], ["right"], ["head"]]


def test_maps_from_positions_to_positions_do_not_read_features():
    class Mixing(Own):
        def __init__(self) -> None:
            super().__init__()
            self.across = nn.Linear(5, 5)

        def branch(self, normed: Tensor) -> Tensor:
            return self.down(self.up(self.across(normed.transpose(1, 2)).transpose(1, 2)).relu())

    assert "across" not in {name for group in readers_of(Mixing()) for name in _names(group)}


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        (lambda model, x: x + model.offset, "the parameter 'offset' is added to it"),
        (lambda model, x: x + torch.arange(6.0), "something that no weight makes is added to it"),
        (lambda model, x: x.relu(), "what `relu` gives is added to it, which is not a linear map"),
        (lambda model, x: model.last(x), "the output of the norm 'last' is the stream or is added to it"),
    ],
)
def test_writers_are_refused_where_something_else_is_added(added: Callable[[nn.Module, Tensor], Tensor], reason: str):
    class Other(Own):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.ones(6))

        def branch(self, normed: Tensor) -> Tensor:
            return added(self, super().branch(normed))

    with pytest.raises(ValueError, match=re.escape(reason)):
        writers_of(Other())


def test_a_module_that_is_called_on_two_tensors_makes_them_one_group():
    class Twice(Own):
        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.embed(input_ids)
            hidden = hidden + self.branch(self.norm(hidden))
            return self.head(self.last(hidden + self.branch(self.last(hidden))))

    assert [_names(group) for group in readers_of(Twice())] == [["up"], ["head"]]


def test_layers_with_quantised_weights_are_found_by_their_sizes():
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 6, 8
            self.weight = nn.Parameter(torch.ones(8, 6, dtype=torch.uint8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.to(x.dtype).T

    model = Own()
    model.up = Quantised()
    assert readers_of(model)[0] == [Weight("up", "weight", 1)]


def test_another_adapter_is_named_in_the_place_of_what_it_wraps_and_erasures_do_not_count():
    model = build("llama")
    before = readers_of(model)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "down_proj"]))
    model.add_adapter(ConceptErasureConfig(labels=["a", "b"]), adapter_name="fitted")
    fit_concept_erasure(model, [batch_of(model)], "fitted", progress=False)
    assert readers_of(model) == before
