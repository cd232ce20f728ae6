"""Errors that a naive implementation of closed-form erasure makes, one test for each.

The tests show only what this package does with such rows, not what other packages do.

`F32 = 1e-6` bounds what float32 rows may show after erasure: their own rounding is 6e-8 of a feature, 1e-6 is the
cut-off below which the project treats a float32 direction as rounding. `F64 = 1e-12` is the same for float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_erasure.erasers import ConceptMoments, Eraser, OracleEraser, cross_validated_correlation
from hf_erasure.fitting.labels import label_tensor
from tests.erasers.data import as_values, leak, moments_of, ols_r2, rows

F32, F64 = 1e-6, 1e-12


def white(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Rows whose covariance is the identity to float64 rounding."""
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x -= x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / n), x.T, upper=False).T


def unchanged(moments: ConceptMoments, before: dict[str, Tensor]) -> bool:
    after = moments.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_outlier_dimensions_with_std_ratio_300_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(2, (3000,), generator=generator)
    x = torch.randn(3000, 256, generator=generator) + 0.5 * z[:, None] * torch.randn(256, generator=generator)
    x[:, :3] *= 300
    eraser = Eraser.fit(x, z)
    assert eraser.rank == 1
    assert leak(eraser(x.double()), z, x) < F64
    assert leak(eraser(x), z, x) < F32


def test_class_with_probability_one_in_a_thousand() -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randint(2, (20_000,), generator=generator)
    z[torch.randperm(20_000, generator=generator)[:20]] = 2
    x = torch.randn(20_000, 16, generator=generator) + torch.randn(3, 16, generator=generator)[z]
    eraser = Eraser.fit(x, z)
    assert eraser.rank == 2
    assert leak(eraser(x), z, x) < F32

    def separation(erased: Tensor) -> float:
        """Distance of the rare class's mean from that of the rest, in standard deviations along their difference."""
        rare, rest = erased[z == 2].double(), erased[z != 2].double()
        direction = rare.mean(0) - rest.mean(0)
        return float(direction.norm() / (rest @ (direction / direction.norm())).std())

    assert separation(eraser(x)) < 1e-4  # rounding of 20 rows


def test_fewer_rows_than_features() -> None:
    x, z = rows(50, 100, 3)
    with pytest.warns(UserWarning, match=r"rows=50 .* x_dim=100"):
        eraser = Eraser.fit(x, z)
    assert eraser.rank == 2
    assert leak(eraser(x), z, x) < F64
    with pytest.warns(UserWarning, match="rows=50"):
        unshrunk = Eraser.fit(x.float(), z, shrinkage=None)
    assert leak(unshrunk(x.float().double()), z, x) < F64


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_scale_of_the_activations(scale: float) -> None:
    x, z = rows(2000, 16, 3, dtype=torch.float32)

    scaled = x * scale
    erased = Eraser.fit(scaled, z)(scaled)
    drift = float((Eraser.fit(x, z)(x) - erased / scale).abs().max() / x.abs().max())
    assert drift < 1e-5  # rounding of float32 inputs, a few times 6e-8, times the condition of Σ
    assert leak(erased, z, scaled) < F32


def test_white_data() -> None:
    generator = torch.Generator().manual_seed(0)
    x = white(2000, 50, generator)
    z = (x[:, 0] + torch.randn(2000, generator=generator) > 0).long()
    eraser = Eraser.fit(x, z)
    assert leak(eraser(x), z, x) < F64
    # On white data the optimal map is the orthogonal projection, whatever the shrinkage.
    assert torch.allclose(eraser.matrix, Eraser.fit(x, z, "orth").matrix, atol=1e-9)
    # Whiter than chance: a shrinkage that divides by the distance from white would divide by almost 0.
    x[:, 0] *= 1.07**0.5
    x[:, 1] *= 0.93**0.5
    assert leak(Eraser.fit(x, z)(x), z, x) < F64


def test_offset_of_a_thousand() -> None:
    x, z = rows(2000, 16, 3)
    x = (x + 1000).float()
    eraser = Eraser.fit(x, z)
    assert leak(eraser(x.double()), z, x) < F64
    # One float32 number near 1000 is rounded by up to 3e-5; over 2000 rows that averages to about 1e-6.
    assert leak(eraser(x), z, x) < 5e-6


def test_first_batch_far_from_the_mean() -> None:
    x, z = rows(4096, 8, 2)
    x[:256] += 1e4
    x = x.float()
    ours = ConceptMoments(8, 2)
    for part, ids in zip(x.split(256), z.split(256), strict=True):
        ours.update(part, ids)
    truth = torch.cov(x.double().T, correction=0)
    # Sums within a batch are float32, sums over batches float64.
    assert float((ours.covariance_x - truth).abs().max() / truth.max()) < 1e-9
    assert leak(ours.eraser()(x.double()), z, x) < F64


def test_hundred_thousand_rows_in_bfloat16() -> None:
    x, z = rows(100_000, 8, 2)
    x = (x + 3).bfloat16()
    ours = ConceptMoments(8, 2)
    for part, ids in zip(x.split(4096), z.split(4096), strict=True):
        ours.update(part, ids)
    exact = x.double()
    truth = torch.cov(exact.T, correction=0)
    assert torch.allclose(ours.mean_x, exact.mean(0), rtol=1e-13)  # float64 sums of 8-bit numbers
    assert float((ours.covariance_x - truth).abs().max() / truth.max()) < 1e-5  # float32 products
    assert leak(ours.eraser()(exact), z, exact) < F64


def test_padding_is_not_counted_nor_looked_at() -> None:
    x, z = rows(60, 8, 2, dtype=torch.float32)
    mask = torch.arange(10) < torch.tensor([10, 7, 4, 9, 1, 6])[:, None]
    padded, ids = x.view(6, 10, 8).clone(), z.view(6, 10).clone()
    padded[~mask] = math.nan
    ids[~mask] = 77
    moments = ConceptMoments(8, 2).update(padded, ids, mask=mask)
    plain = ConceptMoments(8, 2).update(x[mask.reshape(-1)], z[mask.reshape(-1)])
    assert moments.rows == int(mask.sum())
    # Float64 sums of 37 numbers near 1, which may be added in another order where they lie elsewhere in memory.
    assert torch.allclose(moments.mean_x, plain.mean_x, rtol=0, atol=1e-13)
    assert torch.allclose(moments.covariance_x, plain.covariance_x, rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_are_rejected_and_the_statistics_untouched(value: float) -> None:
    x, z = rows(40, 6, 2)
    moments = moments_of(x, z)
    before = moments.state_dict()
    bad = x.clone()
    bad[[7, 30], 4] = value
    with pytest.raises(ValueError, match=r"2 of 40 counted rows, the first at row 7 .*feature 4"):
        moments.update(bad, z)
    assert unchanged(moments, before)


def test_non_finite_concept_values_are_rejected_and_the_statistics_untouched() -> None:
    x, z = rows(40, 6, 2)
    moments = ConceptMoments(6, 2).update(x, as_values(z))
    before = moments.state_dict()
    values = as_values(z)
    values[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"z is not finite in 1 of 40 counted rows, .* row 3"):
        moments.update(x, values)
    assert unchanged(moments, before)


def test_one_class() -> None:
    x, _ = rows(40, 6, 2)
    z = torch.full((40,), 1)
    moments = ConceptMoments(6, 2).update(x, z)
    with pytest.raises(ValueError, match=r"all 40 rows have class id 1.*add rows of another class"):
        moments.eraser()
    with pytest.raises(ValueError, match="does not vary"):
        ConceptMoments(6, 2).update(x, as_values(z, 2)).eraser()


def test_constant_activations() -> None:
    _, z = rows(40, 6, 2)
    x = torch.full((40, 6), 0.1)
    with pytest.raises(ValueError, match=r"x is constant over all 40 rows"):
        moments_of(x, z).eraser()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_are_neither_read_nor_moved(dtype: torch.dtype) -> None:
    """A naive implementation divides by a variance of 0, or by the rounding of a sum of equal numbers."""
    x, z = rows(400, 6, 2, dtype=dtype)
    x[:, 2], x[:, 4] = 300.1, 0.0
    weight, others = torch.linspace(0.1, 1, 400), [0, 1, 3, 5]
    eraser = Eraser.fit(x, z, weight=weight, shrinkage=None)
    assert torch.equal(eraser(x)[:, [2, 4]], x[:, [2, 4]])
    assert not bool(eraser.right[:, [2, 4]].any())
    alone = Eraser.fit(x[:, others], z, weight=weight, shrinkage=None)
    assert torch.allclose(eraser(x)[:, others], alone(x[:, others]), atol=1e-5 if dtype == torch.float32 else F64)

    def held_out(x: Tensor) -> float:
        halves = [ConceptMoments(x.shape[1], 2).update(x[part], z[part], weight[part]) for part in (odd, ~odd)]
        return cross_validated_correlation(*halves, shrinkage=None)

    odd = torch.arange(400) % 2 == 1
    assert held_out(x) == pytest.approx(held_out(x[:, others]), abs=F32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_concept_values_add_no_direction(dtype: torch.dtype) -> None:
    """The mean of 1000 times 0.1 is not 0.1 in float64, and a naive implementation whitens the difference."""
    x, z = rows(1000, 6, 2, dtype=dtype)
    x, values = x + 5, torch.stack([torch.full((1000,), 0.1, dtype=torch.float64), z.double()], 1)
    alone, batches = ConceptMoments(6, 1).update(x, z.double()), ConceptMoments(6, 2)
    for part in torch.arange(1000).split(37):
        batches.update(x[part], values[part])
    for moments in (batches, ConceptMoments(6, 2).update(x, values)):
        # Batches of another size are added in another order; the products are those of float32 rows.
        assert torch.allclose(moments.eraser().matrix, alone.eraser().matrix, atol=F32)
        erased = OracleEraser.of(moments)(x, values)
        assert torch.allclose(erased, OracleEraser.of(alone)(x, z.double()), atol=1e-5)
        assert cross_validated_correlation(moments, moments) == pytest.approx(cross_validated_correlation(alone, alone))


def test_features_whose_squares_underflow_are_erased() -> None:
    """Trained norms switch features off with weights like 1e-33, whose squares are 0 in float32."""
    x, z = rows(2000, 16, 2, dtype=torch.float32)
    x[:, 3] *= 1e-33
    eraser = Eraser.fit(x, z)
    assert leak(eraser(x.double()), z, x) < F64


def test_wrong_width() -> None:
    x = torch.randn(6, 4)
    moments = ConceptMoments(8, 2)
    with pytest.raises(ValueError, match=r"x has shape \(6, 4\).*x_dim=8"):
        moments.update(x, torch.tensor([0, 1, 0, 1, 0, 1]))
    assert moments.rows == 0


def test_empty_batch() -> None:
    x, z = rows(40, 6, 2)
    moments = moments_of(x, z)
    before = moments.state_dict()
    with pytest.raises(ValueError, match=r"x has shape \(0, 6\).*empty"):
        moments.update(torch.empty(0, 6), torch.empty(0, dtype=torch.long))
    assert unchanged(moments, before)


def test_eraser_is_unchanged_by_later_updates() -> None:
    x, z = rows(200, 6, 2)
    moments = moments_of(x, z)
    eraser = moments.eraser()
    kept = [t.clone() for t in (eraser.left, eraser.right, eraser.bias)]
    moments.update(x + 5, z)
    assert all(torch.equal(a, b) for a, b in zip(kept, (eraser.left, eraser.right, eraser.bias), strict=True))


def test_class_ids_are_not_an_ordinal_column() -> None:
    x, z = rows(3000, 16, 4)
    eraser = Eraser.fit(x, z)
    assert eraser.rank == 3
    assert leak(eraser(x), z, x) < F64


def test_float32_rows_leave_nothing_for_float64_least_squares() -> None:
    x, z = rows(4000, 32, 2, dtype=torch.float32)
    assert ols_r2(Eraser.fit(x, z)(x.double()), z, 1e-12) < F64


def test_rows_beyond_the_range_of_float32_squares() -> None:
    """Squares of 1e25 overflow in float32, and those of 1e-25 become 0."""
    x, z = rows(500, 8, 2, dtype=torch.float32)
    for scale in (1e25, 1e-25):
        scaled = x * scale
        eraser = Eraser.fit(scaled, z)
        assert eraser.rank == 1
        assert leak(eraser(scaled.double()), z, scaled) < F64


def test_class_156_in_uint8_is_not_a_row_to_leave_out() -> None:
    """As a number of 8 bits without a sign, −100 is 156."""
    x, z = rows(300, 4, 2)
    ids = (155 + z).to(torch.uint8)
    assert ConceptMoments(4, 157).update(x, ids).rows == 300
    assert torch.equal(label_tensor({"concept_labels": ids}), ids.long())
