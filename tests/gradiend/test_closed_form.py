"""The closed form against least squares and direct means; shards that add up, and states that can be loaded."""

from __future__ import annotations

import copy
import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_erasure.gradiend import ClosedFormEstimator

from .data import SHAPES, N, equal, gradients, joined, same_feature

BATCHES = [(seed, 1 if seed % 3 else -1) for seed in range(24)]


def add(estimator: ClosedFormEstimator, source: dict, target: dict, sign: int) -> None:
    """Add the source and target gradients of one batch."""
    add_source(estimator, source, sign)
    for name, block in target.items():
        estimator.add("target", name, block, sign)


def add_source(estimator: ClosedFormEstimator, source: dict, sign: int) -> None:
    """Add all blocks of the source gradient of a batch."""
    norm = math.sqrt(sum(float(block.double().square().sum()) for block in source.values()))
    for name, block in source.items():
        estimator.add("source", name, block, sign, norm)


def fitted(batches=BATCHES) -> ClosedFormEstimator:
    estimator = ClosedFormEstimator(SHAPES)
    for seed, sign in batches:
        add(estimator, gradients(seed, sign), gradients(seed + 100, sign), sign)
    return estimator


def test_the_decoder_is_the_least_squares_fit_for_h_of_one():
    decoder = fitted().feature().decoder
    h = torch.tensor([float(sign) for _, sign in BATCHES], dtype=torch.float64)
    targets = torch.stack([joined(gradients(seed + 100, sign)) for seed, sign in BATCHES]).double()
    design = torch.stack([h, torch.ones_like(h)], 1)
    expected = torch.linalg.lstsq(design, targets).solution
    # The means are float32.
    torch.testing.assert_close(joined(decoder.weight).double(), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(joined(decoder.bias).double(), expected[1], rtol=0, atol=1e-6)


def test_the_class_means_read_nine_tenths():
    encoder = fitted().feature().encoder
    read = {1: [], -1: []}
    for seed, sign in BATCHES:
        read[sign].append(math.atanh(encoder.encode(gradients(seed, sign))))
    for sign, values in read.items():
        # The mean is taken of the projections, hence of the pre-activations; the accumulators are float32.
        assert math.tanh(sum(values) / len(values)) == pytest.approx(sign * 0.9, abs=1e-5)


def test_the_encoder_reads_held_out_gradients():
    encoder = fitted().feature().encoder
    assert all(encoder.encode(gradients(seed, sign)) * sign > 0.2 for seed in range(500, 510) for sign in (1, -1))


def test_the_encoder_does_not_depend_on_the_scale_of_a_gradient():
    encoder = fitted().feature().encoder
    value = encoder.encode(gradients(7))
    for factor in (1e-25, 1e-6, 1e6, 1e25):
        # The factor rounds each entry once.
        scaled = encoder.encode({name: g * factor for name, g in gradients(7).items()})
        assert scaled == pytest.approx(value, abs=1e-5)


def pooled(shards: list[ClosedFormEstimator]) -> None:
    """Pool the estimators, each in a thread of its own, like processes that run side by side."""
    meeting, counts, given = threading.Barrier(len(shards)), [None] * len(shards), [None] * len(shards)

    def pool(own: int) -> None:
        def together(held: list, value) -> list:
            held[own] = value
            meeting.wait()
            found = copy.deepcopy(held)
            meeting.wait()
            return found

        shares = together(counts, shards[own].counts)
        shards[own].pool(shares, lambda mean: mean.copy_(sum(together(given, mean))))

    with ThreadPoolExecutor(len(shards)) as threads:
        list(threads.map(pool, range(len(shards))))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=len(BATCHES), max_size=len(BATCHES)))
def test_shards_add_up(shard_of):
    shards = [
        fitted([batch for batch, place in zip(BATCHES, shard_of, strict=True) if place == shard]) for shard in range(3)
    ]
    pooled(shards)
    merged = shards[0]
    assert all(equal(merged.state_dict(), other.state_dict()) for other in shards[1:])
    whole = fitted()
    a, b = merged.state_dict(), whole.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b if name.endswith("count"))
    for name in b:
        # Means of two dozen float32 numbers of size 1, added in another order.
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-6)


def test_targets_may_come_in_any_order():
    streamed = ClosedFormEstimator(SHAPES)
    for seed, sign in BATCHES:
        add_source(streamed, dict(reversed(gradients(seed, sign).items())), sign)
        for name, target in reversed(gradients(seed + 100, sign).items()):
            streamed.add("target", name, target, sign)
    assert equal(streamed.state_dict(), fitted().state_dict())


def test_the_mean_of_a_block_is_over_the_batches_that_had_it():
    estimator = fitted(BATCHES[:4])
    before = estimator._means["target", 1]["embed"].clone()
    estimator.add("target", "up", gradients(99, 1)["up"], 1)
    up = [gradients(seed + 100, sign)["up"] for seed, sign in BATCHES[:4] if sign == 1] + [gradients(99, 1)["up"]]
    state = estimator.state_dict()
    torch.testing.assert_close(state["target+/up"], torch.stack(up).mean(0).reshape(-1), rtol=0, atol=1e-6)
    assert torch.equal(state["target+/embed"], before)


def test_thirty_thousand_batches_stay_accurate():
    estimator = ClosedFormEstimator({"a": (3,)})
    constant = torch.full((30_000,), 0.1)
    alternating = constant.clone()
    alternating[::2] *= 3
    noisy = 0.1 + 0.1 * torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    values = torch.stack([constant, alternating, noisy], 1)
    for row in values:
        estimator.add("target", "a", row, 1)
    # A running float32 sum of the first row (all 0.1) would be off by 2e-4 here, one of the second row by 5e-5.
    found = estimator._means["target", 1]["a"].double()
    torch.testing.assert_close(found, values.double().mean(0), rtol=1e-5, atol=0)


def test_resuming_equals_going_on_to_the_bit(tmp_path):
    first = fitted(BATCHES[:11])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = ClosedFormEstimator(SHAPES)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed, sign in BATCHES[11:]:
        add(resumed, gradients(seed, sign), gradients(seed + 100, sign), sign)
    assert equal(resumed.state_dict(), fitted().state_dict())
    assert same_feature(resumed.feature(), fitted().feature())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["source", "target"])
def test_gradients_that_are_not_finite_are_refused_with_nothing_changed(bad, where):
    estimator = fitted()
    before = estimator.state_dict()
    blocks = gradients(0)
    blocks["up"][1, 2] = bad
    with pytest.raises(ValueError, match=f"{where}.*'up' is not finite"):
        estimator.add(where, "up", blocks["up"], 1)
    assert equal(estimator.state_dict(), before)


def test_bad_input_is_named():
    estimator = fitted()
    before = estimator.state_dict()
    with pytest.raises(KeyError, match="0"):
        add(estimator, gradients(0), gradients(1), 0)
    with pytest.raises(ValueError, match="has no direction"):
        add_source(estimator, {name: torch.zeros(shape) for name, shape in SHAPES.items()}, 1)
    with pytest.raises(KeyError, match="'head'"):
        estimator.add("target", "head", torch.zeros(3), 1)
    assert equal(estimator.state_dict(), before)
    with pytest.raises(ValueError, match="sign -1"):
        fitted([(0, 1), (1, 1)]).feature()


def test_equal_classes_have_nothing_to_read():
    estimator = ClosedFormEstimator(SHAPES)
    for sign in (1, -1):
        add(estimator, gradients(0), gradients(sign), sign)
    with pytest.raises(ValueError, match="equal"):
        estimator.feature()


def test_memory_is_four_vectors():
    state = fitted().state_dict()
    assert sum(value.numel() for name, value in state.items() if "/" in name) == 4 * N


def test_a_source_is_refused_where_it_does_not_fit():
    estimator = ClosedFormEstimator(SHAPES)
    name, *_ = SHAPES
    block = gradients(1)[name]
    for norm in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="has no direction"):
            estimator.add("source", name, block, 1, norm)
    with pytest.raises(KeyError, match="'nowhere'"):
        estimator.add("source", "nowhere", block, 1)
    with pytest.raises(ValueError, match="finite"):
        estimator.add("source", name, torch.full_like(block, math.nan), 1)
    add(estimator, gradients(1), gradients(2), 1)


def test_making_the_feature_frees_the_means() -> None:
    estimator = fitted()
    means = [weakref.ref(mean) for part in estimator._means.values() for mean in part.values()]
    estimator.feature()
    assert all(mean() is None for mean in means)
    with pytest.raises(ValueError, match="No batch of sign"):
        estimator.feature()
