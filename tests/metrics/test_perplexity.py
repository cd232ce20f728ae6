"""Perplexity and bits per byte, computed by hand and for a code of known length."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_erasure.metrics import perplexity


def test_figures_by_hand():
    found = perplexity.score([30.0, 21.5, 44.0], [10, 8, 12], [40, 35, 50])
    assert found["loss"] == pytest.approx(95.5 / 30)
    assert found["perplexity"] == pytest.approx(math.exp(95.5 / 30))
    assert found["bits_per_byte"] == pytest.approx(95.5 / math.log(2) / 125)
    assert (found["tokens"], found["bytes"], found["segments"]) == (30, 125, 3)


def test_uniform_bytes_cost_eight_bits():
    # A model of bytes that has learned nothing: ln 256 nats for each byte, whatever the segments.
    found = perplexity.score([math.log(256) * n for n in (3, 10, 7)], [3, 10, 7], [3, 10, 7])
    assert found["bits_per_byte"] == pytest.approx(8.0) and found["perplexity"] == pytest.approx(256.0)
    assert np.allclose(found["intervals"]["bits_per_byte"], 8.0)


def test_bits_per_byte_do_not_depend_on_the_tokens():
    coarse, fine = (perplexity.score([30.0, 20.0], tokens, [40, 30]) for tokens in ([5, 5], [40, 30]))
    assert coarse["bits_per_byte"] == fine["bits_per_byte"] and coarse["perplexity"] > fine["perplexity"]


def test_a_sure_model_is_at_the_limit():
    found = perplexity.score([0.0, 0.0], [3, 3], [3, 3])
    assert found["perplexity"] == 1.0 and found["bits_per_byte"] == 0.0


def test_interval_covers_a_ratio():
    # The segments have different lengths, and 2 nats for each byte on average.
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(20, 200, size=40)
        losses = sizes * rng.gamma(20, 0.1, size=40)
        low, high = perplexity.score(losses, sizes, sizes, resamples=200, seed=seed)["intervals"]["bits_per_byte"]
        hits += low <= 2 / math.log(2) <= high
    assert 86 <= hits <= 99  # 95 ± 2.2, and percentile intervals of 40 segments are a little narrow


def test_one_segment_has_no_interval():
    assert perplexity.score([1.0], [2], [3])["intervals"] == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([-1.0], [1], [1]), "negative log-likelihoods"),
        (([1.0], [0], [1]), "tokens are all 0"),
        (([1.0], [1], [-1]), "bytes are negative somewhere"),
        (([1.0], [1, 2], [1]), "2 tokens, but 1 predictions"),
        (([1.0], [1], []), "bytes are empty"),
    ],
)
def test_refused(arguments: tuple, words: str):
    with pytest.raises(ValueError, match=words):
        perplexity.score(*arguments)
