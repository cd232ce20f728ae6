"""Which linear maps read the hidden state, and which write it."""

from __future__ import annotations

import pytest

from hf_erasure.models.streams import Weight, readers_of, writers_of
from tests.breadth.zoo import build


def test_readers_of_a_sequential_decoder_are_grouped_by_what_they_take():
    groups = readers_of(build("llama"))
    attention, mlp = groups[:2]
    assert attention == [Weight(f"layers.0.self_attn.{name}_proj", "weight", 1) for name in "qkv"]
    assert mlp == [Weight(f"layers.0.mlp.{name}_proj", "weight", 1) for name in ("gate", "up")]
    assert len(groups) == 4 and not any(group.also for group in groups)


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
