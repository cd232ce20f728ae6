"""The measures in reports: leakage and movement, computed from moments alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_erasure.erasers import (
    ConceptMoments,
    Eraser,
    correlation_interval,
    cross_validated_correlation,
)
from tests.erasers.data import canonical_correlations, moments_of, rows


def halves(x: Tensor, z: Tensor, k: int = 2) -> tuple[ConceptMoments, ConceptMoments]:
    return moments_of(x[::2], z[::2], k), moments_of(x[1::2], z[1::2], k)


def test_it_is_about_zero_under_independence() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1600, 200, generator=generator)
    z = torch.randint(2, (1600,), generator=generator)
    one, other = halves(x, z)
    # The mean of two correlations of 800 independent rows each: standard deviation at most 1/sqrt(800).
    assert abs(cross_validated_correlation(one, other)) < 4 / math.sqrt(800)
    in_sample = float(canonical_correlations(x[::2], z[::2])[0])
    assert in_sample == pytest.approx(math.sqrt(200 / 800), rel=0.2)


def test_it_finds_what_carries_over() -> None:
    x, z = rows(4000, 20, 2)
    one, other = halves(x, z)
    truth = float(canonical_correlations(x, z)[0])
    assert cross_validated_correlation(one, other) == pytest.approx(truth, rel=0.02)
    assert cross_validated_correlation(other, one) == pytest.approx(cross_validated_correlation(one, other), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["leace", "orth"])
def test_little_is_left_on_held_out_rows(dtype: torch.dtype, method: str) -> None:
    x, z = rows(6000, 10, 2, dtype=dtype)
    eraser = Eraser.fit(x[:4000], z[:4000], method)
    before = cross_validated_correlation(*halves(x[4000:], z[4000:]))
    after = cross_validated_correlation(*halves(eraser(x[4000:]), z[4000:]))
    assert before > 0.5
    # The eraser has an error of about sqrt(10 / 4000) in the class means, and the measurement one of 1/sqrt(1000).
    assert abs(after) < 0.15


def test_rounding_is_no_leak() -> None:
    """After erasure, x is the same row for all but float32 rounding."""
    x, z = rows(2000, 2, 2, dtype=torch.float32)
    x[:, 1] = 0
    x[:, 0] += 5 * z
    erased = Eraser.fit(x, z)(x)
    assert float(erased.std(0).max()) < 1e-5
    assert float(erased.std(0).max()) > 0
    assert cross_validated_correlation(*halves(erased, z)) == 0.0
    assert cross_validated_correlation(*halves(torch.full_like(x, 0.1), z)) == 0.0


def test_a_direction_that_is_rounding_is_read_as_such() -> None:
    """float32 knows the difference of two equal features to 1e-6 of them only, float64 much better."""
    x, z = rows(2000, 1, 2)
    x -= x[z == 1].mean() * (z == 1)[:, None] + x[z == 0].mean() * (z == 0)[:, None]
    twins = torch.cat([x, x + 1e-6 * z[:, None]], 1)
    assert cross_validated_correlation(*halves(twins, z), shrinkage=None) > 0.5
    # float32 leaves the common direction, which is independent of the class: chance over two halves of 1000 rows.
    assert abs(cross_validated_correlation(*halves(twins.float(), z), shrinkage=None)) < 4 / math.sqrt(1000)


def test_a_half_with_one_class_or_none_moving_reads_zero() -> None:
    x, z = rows(400, 5, 2)
    one = moments_of(x, z, 2)
    single = moments_of(x, torch.zeros_like(z), 2)
    assert cross_validated_correlation(one, single) == 0.0
    assert cross_validated_correlation(single, single) == 0.0


def test_halves_that_do_not_fit_are_refused() -> None:
    one = moments_of(*rows(40, 5, 2))
    with pytest.raises(ValueError, match=r"no rows \(rows=0\)"):
        cross_validated_correlation(one, ConceptMoments(5, 2))
    with pytest.raises(ValueError, match=r"are ConceptMoments\(x_dim=5, z_dim=0.*labelled rows"):
        cross_validated_correlation(ConceptMoments(5, 0).update(torch.randn(9, 5)), one)
    with pytest.raises(ValueError, match=r"x_dim=5.*x_dim=6.*one site and concept"):
        cross_validated_correlation(one, moments_of(*rows(40, 6, 2)))
    with pytest.raises(TypeError, match="half_b is list"):
        cross_validated_correlation(one, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shrinkage is 2"):
        cross_validated_correlation(one, one, shrinkage=2)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("method", ["leace", "orth"])
def test_relative_change_equals_the_rows(affine: bool, method: str) -> None:
    x, z = rows(900, 150, 3)
    x = x + 2
    eraser = Eraser.fit(x, z, method, affine=affine)
    y = rows(500, 150, 3, seed=4)[0]
    for seen in (x, y):
        moved = (eraser(seen) - seen).square().sum() / (seen - seen.mean(0)).square().sum()
        moments = ConceptMoments(150, 0).update(seen)
        assert moments.spread().change(eraser) == pytest.approx(float(moved) ** 0.5, rel=1e-10)


def test_relative_change_refuses_what_it_cannot_say() -> None:
    eraser = Eraser.fit(*rows(100, 5, 2))
    with pytest.raises(ValueError, match="does not vary over the 9 rows"):
        ConceptMoments(5, 0).update(torch.full((9, 5), 0.1)).spread().change(eraser)
    empty = torch.zeros(5, 0, dtype=torch.float64)
    assert moments_of(*rows(40, 5, 2)).spread().change(Eraser(empty, empty.T, None)) == 0.0


def test_the_interval_holds_the_true_correlation_as_often_as_it_says() -> None:
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        z = torch.arange(400) % 2
        x = torch.randn(400, 2, generator=generator, dtype=torch.float64)
        x[:, 0] += 0.8 * z
        halves = []
        for half in (0, 1):
            moments = ConceptMoments(2, 2)
            rows = torch.arange(400) // 2 % 2 == half
            moments.update(x[rows], z[rows])
            halves.append(moments)
        low, high = correlation_interval(cross_validated_correlation(*halves), 400)
        held += low <= 0.4 / (1 + 0.16) ** 0.5 <= high
    assert 0.9 < held / 300 < 0.99


def test_the_interval_of_a_value_below_zero_begins_at_zero() -> None:
    low, high = correlation_interval(-0.05, 400)
    assert low == 0.0 < high < 0.1 and correlation_interval(-0.9, 400) == (0.0, 0.0)
    assert correlation_interval(0.5, 6) == (0.0, 1.0)
