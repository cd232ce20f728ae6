"""Properties of frozen features: flipping, pruning, decoding, encoding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_erasure.gradiend import FeatureDecoder, FeatureEncoder, prune_together
from hf_erasure.gradiend.blocks import BINS

from .data import SHAPES, N, decode, equal, gradients, joined

ALL = dict.fromkeys(SHAPES)
SIZES = {name: torch.Size(shape) for name, shape in SHAPES.items()}


def flat(seed: int, decimals: int | None = None) -> dict[str, torch.Tensor]:
    blocks = {name: g.reshape(-1) for name, g in gradients(seed).items()}
    return blocks if decimals is None else {name: g.round(decimals=decimals) for name, g in blocks.items()}


def decoder(seed: int = 0, decimals: int | None = None) -> FeatureDecoder:
    return FeatureDecoder(flat(seed, decimals), flat(seed + 1), ALL, SIZES)


def encoder(seed: int = 0, **options) -> FeatureEncoder:
    return FeatureEncoder(flat(seed), ALL, SIZES, scale=0.02, bias=1.5, **options)


def mask_of(scores: torch.Tensor, density: float) -> torch.Tensor:
    """The largest `ceil(density · n)` entries, of equal ones the first, by a stable sort of all entries."""
    order = torch.argsort(-scores.abs().double(), stable=True)[: math.ceil(density * N)]
    return torch.zeros(N, dtype=torch.bool).index_fill_(0, order, True)


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_encoding_is_the_formula(unit_norm, activation):
    g = gradients(5)
    vector = joined(g).double()
    inner = joined(flat(0)).double() @ (vector / vector.norm() if unit_norm else vector)
    expected = 0.02 * (float(inner) + 1.5)
    expected = math.tanh(expected) if activation == "tanh" else expected
    found = encoder(unit_norm=unit_norm, activation=activation).encode(g)
    # The products within a block are added in float32.
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_unit_norm_is_over_all_blocks_given():
    sparse = encoder(unit_norm=True).prune(0.01)
    g = gradients(5)
    more = g | {"head": torch.full((10,), 3.0)}
    ratio = float(joined(g).norm()) / math.sqrt(float(joined(g).square().sum()) + 90.0)
    inner = math.atanh(sparse.encode(g)) / 0.02 - 1.5
    assert math.atanh(sparse.encode(more)) / 0.02 - 1.5 == pytest.approx(inner * ratio, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 1.0), st.sampled_from([None, 1, 0]), st.integers(0, 5))
def test_pruning_keeps_exactly_the_largest(density, decimals, seed):
    dense = decoder(seed, decimals)
    pruned = dense.prune(density)
    mask = mask_of(joined(dense.weight), density)
    for h in (1.0, -0.5):
        assert torch.equal(joined(decode(pruned, h)), torch.where(mask, joined(decode(dense, h)), 0.0))
    # The biases have no zeros, so that every kept entry is nonzero.
    kept = sum(count for *_, count in pruned.importance().values())
    assert kept == math.ceil(density * N) == int(joined(decode(pruned, 0.0)).count_nonzero())


class LargestMade(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.entries = max(self.entries, result.numel())
        return result


def test_pruning_joins_no_blocks():
    """All blocks together may be as large as the model: nothing of this size is made."""
    sizes = {f"block {number}": torch.Size([BINS]) for number in range(8)}
    blocks = {name: torch.randn(BINS, generator=torch.Generator().manual_seed(7)) for name in sizes}
    with LargestMade() as made:
        FeatureDecoder(blocks, blocks, dict.fromkeys(sizes), sizes).prune(0.01)
    assert made.entries <= BINS


def test_pruning_to_one_is_the_identity():
    for whole in (encoder(), decoder()):
        assert whole.prune(1.0) is whole


def test_pruning_twice_is_pruning_to_the_smaller():
    for once, twice in ((0.8, 0.6), (0.8, 0.1), (0.2, 0.01), (0.05, 0.5)):
        twofold = decoder().prune(once).prune(twice)
        assert equal(decode(twofold, 1.0), decode(decoder().prune(min(once, twice)), 1.0))


def test_a_block_is_sparse_below_half_and_dense_from_half_on():
    for density in (0.01, 0.45, 0.55, 0.9):
        pruned = decoder().prune(density)
        for name, (_, _, kept) in pruned.importance().items():
            sparse = 2 * kept < SIZES[name].numel()
            assert (pruned.index[name] is not None) == sparse
            assert pruned.weight[name].numel() == (kept if sparse else SIZES[name].numel())
            if sparse:
                assert pruned.index[name].dtype == torch.int32
                assert torch.equal(pruned.index[name], pruned.index[name].sort().values)


def test_pruning_the_encoder_masks_its_weight():
    pruned = encoder().prune(0.1)
    mask = mask_of(joined(flat(0)), 0.1)
    inner = torch.where(mask, joined(flat(0)), 0.0).double() @ joined(gradients(4)).double()
    assert pruned.encode(gradients(4)) == pytest.approx(math.tanh(0.02 * (float(inner) + 1.5)), abs=1e-6)
    assert sum(map(len, pruned.weight.values())) >= math.ceil(0.1 * N)


def test_decoders_pruned_together_share_their_support():
    several = [decoder(seed) for seed in (0, 10, 20)]
    pruned = prune_together(several, 0.1)
    mask = mask_of(torch.stack([joined(d.weight).abs() for d in several]).amax(0), 0.1)
    for before, after in zip(several, pruned, strict=True):
        assert torch.equal(joined(decode(after, 0.7)), torch.where(mask, joined(decode(before, 0.7)), 0.0))
        assert all(a is b for a, b in zip(after.index.values(), pruned[0].index.values(), strict=True))
    with pytest.raises(ValueError, match="same blocks and entries"):
        prune_together([several[0], several[1].prune(0.1)], 0.05)


def test_importance_says_where_the_feature_sits():
    importance = decoder().importance()
    for name, weight in flat(0).items():
        assert importance[name] == pytest.approx(
            (float(weight.double().abs().sum()), float(weight.double().square().sum()), weight.numel()), rel=1e-6
        )


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
def test_a_density_out_of_range_is_refused(density):
    for thing in (decoder(), encoder()):
        with pytest.raises(ValueError, match="density is"):
            thing.prune(density)


def test_weights_that_are_not_finite_cannot_be_ranked():
    weight = flat(0)
    weight["up"][5] = math.nan
    with pytest.raises(ValueError, match="'up' are not finite"):
        FeatureDecoder(weight, flat(1), ALL, SIZES).prune(0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_encoding_refuses_what_is_not_finite(bad):
    g = gradients(0)
    g["norm"][2] = bad
    with pytest.raises(ValueError, match="'norm' is not finite"):
        encoder().encode(g)
    # The value is not among the entries that are read, but it is in the norm.
    with pytest.raises(ValueError, match="is not finite"):
        encoder(unit_norm=True).prune(1e-6).encode(g)


def test_a_gradient_of_zeros_reads_as_no_direction():
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert encoder(unit_norm=True).encode(zeros) == pytest.approx(math.tanh(0.03))
