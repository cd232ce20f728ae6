"""The linear map that erases a concept and keeps the mean: properties for any rows, and rows without such a map.

Tolerances are relative to the spread of a feature. `1e-12` is float64 rounding, 2e-16, times the few thousand
operations between rows and result. Keeping the mean makes the readings longer by
one over the sine between the mean and the covariances with the concept, at most 30 here.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_erasure.erasers import ConceptMoments, Eraser, combine_erasers, fit_inlp, fit_rlace
from tests.erasers.data import leak, moments_of, rows

EXACT = 1e-12


def rows_at(far: float, n: int, d: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows with a mean of `far` in every feature, in addition to that of `rows`."""
    x, z = rows(n, d, k, seed=seed)
    return x + far, z


problems = st.builds(
    rows_at,
    far=st.sampled_from([0.0, 1.0, 30.0]),
    n=st.integers(150, 300),
    d=st.integers(8, 20),
    k=st.integers(2, 4),
    seed=st.integers(0, 2**31 - 1),
)
methods = st.sampled_from(["leace", "orth", "mean_projection", "inlp"])
laws = settings(max_examples=40, deadline=None, derandomize=True)


def linear(x: Tensor, z: Tensor, method: str = "leace", **options: object) -> Eraser:
    return moments_of(x, z).eraser(method, affine=False, **options)


def metric(x: Tensor, method: str) -> Tensor:
    """Σ without shrinkage; for the orthogonal methods the identity."""
    return torch.cov(x.T, correction=0) if method == "leace" else torch.eye(x.shape[1], dtype=torch.float64)


# ---- laws ------------------------------------------------------------------------------------------------------------


@laws
@given(problems, methods, st.sampled_from([None, 1]))
def test_it_is_a_projection_that_keeps_the_mean(problem: tuple[Tensor, Tensor], method: str, rank: int | None) -> None:
    x, z = problem
    options = {"rank": rank} | ({"rounds": 2} if method == "inlp" else {})  # more would fill the space
    eraser, plain = linear(x, z, method, **options), moments_of(x, z).eraser(method, **options)
    size = float(eraser.matrix.norm())
    assert eraser.bias is None
    assert eraser.rank == plain.rank
    assert torch.equal(eraser.left, plain.left)  # so a linear probe finds the same
    moved = eraser.matrix @ x.mean(0) - x.mean(0)
    assert float(moved.abs().max()) < EXACT * size * float(x.mean(0).norm())
    identity = torch.eye(eraser.rank, dtype=torch.float64)
    assert float((eraser.right @ eraser.left - identity).abs().max()) < EXACT * size
    assert float((eraser.matrix @ eraser.matrix - eraser.matrix).norm()) < EXACT * size**2
    if method != "inlp" and rank is None:  # INLP's rounds leave covariance in other directions
        assert leak(eraser(x), z, x) < EXACT * size


@laws
@given(problems, methods)
def test_it_solves_the_conditions_of_the_least_change(problem: tuple[Tensor, Tensor], method: str) -> None:
    """The least `tr N Σ Nᵀ` with `N [left, μ] = [left, 0]`, from one system of its (Karush-Kuhn-Tucker) conditions."""
    x, z = problem
    options = {"leace": {"shrinkage": None}, "inlp": {"rounds": 2}}.get(method, {})
    eraser, sigma = linear(x, z, method, **options), metric(x, method)
    mean = x.mean(0)[:, None]
    fixed = torch.cat([eraser.left, mean / mean.norm()], dim=1)
    rank, width = eraser.rank, x.shape[1]
    system = torch.cat(
        [
            torch.cat([sigma, fixed], dim=1),
            torch.cat([fixed.T, torch.zeros(rank + 1, rank + 1, dtype=torch.float64)], dim=1),
        ]
    )
    wanted = torch.cat([eraser.left, torch.zeros_like(mean)], dim=1)
    given_ = torch.cat([torch.zeros(width, width, dtype=torch.float64), wanted.T])
    best = torch.linalg.solve(system, given_)[:width].T
    found = eraser.left @ eraser.right
    # The factorisation adds a jitter of 1e-13, and rounding is multiplied by the condition of Σ, at most 1e5 here.
    assert float((found - best).norm()) < 1e-7 * float(best.norm())
    change, least = (float(((m @ sigma) * m).sum()) for m in (found, best))
    assert change == pytest.approx(least, rel=1e-9)


@laws
@given(problems, st.integers(0, 2**31 - 1))
def test_no_feasible_map_changes_less(problem: tuple[Tensor, Tensor], seed: int) -> None:
    x, z = problem
    eraser = linear(x, z, shrinkage=None)
    fixed = torch.cat([eraser.left, x.mean(0)[:, None]], dim=1)
    rest = torch.linalg.svd(fixed)[0][:, fixed.shape[1] :]  # orthogonal to all fixed columns
    change = float((eraser(x) - x).square().sum())
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1.0):
        other = size * torch.randn(x.shape[1], rest.shape[1], generator=generator, dtype=torch.float64) @ rest.T
        assert float((eraser(x) + x @ other.T - x).square().sum()) >= change * (1 - 1e-9)
    # The affine map has one condition less than the one that keeps the mean, hence changes no more.
    assert float((moments_of(x, z).eraser(shrinkage=None)(x) - x).square().sum()) <= change * (1 + 1e-9)


@laws
@given(problems, st.integers(0, 2**31 - 1))
def test_the_scale_of_features_does_not_matter(problem: tuple[Tensor, Tensor], seed: int) -> None:
    x, z = problem
    scale = 10 ** (6 * torch.rand(x.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 3)
    difference = linear(x, z)(x) - linear(x * scale, z)(x * scale) / scale
    assert float((difference.abs() / x.std(0)).max()) < 1e-8


@laws
@given(problems, st.integers(0, 2**31 - 1))
def test_an_invertible_map_of_x_goes_through(problem: tuple[Tensor, Tensor], seed: int) -> None:
    x, z = problem
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=torch.float64)).Q
    mixing = mixing * torch.logspace(-1, 1, x.shape[1], dtype=torch.float64)
    mapped = linear(x @ mixing, z, shrinkage=None)(x @ mixing)
    # Only shrinkage depends on the coordinates; 1e-6 is rounding times the condition of the factored matrix, about 1e7.
    difference = mapped - linear(x, z, shrinkage=None)(x) @ mixing
    assert float((difference.abs() / (x @ mixing).std(0)).max()) < 1e-6


@laws
@given(problems, st.floats(0, 1))
def test_with_a_background_it_is_the_mean_of_both_that_stays(problem: tuple[Tensor, Tensor], share: float) -> None:
    x, z = problem
    background = ConceptMoments(x.shape[1], 0).update(rows(300, x.shape[1], 2, seed=5)[0] - 4)
    eraser = linear(x, z, background=background, background_weight=share)
    mean = torch.lerp(x.mean(0), background.mean_x, share)
    size = float(eraser.matrix.norm())
    assert float((eraser(mean[None]) - mean).abs().max()) < EXACT * size * float(mean.norm())
    assert leak(eraser(x), z, x) < EXACT * size


@laws
@given(problems)
def test_erasers_that_keep_one_mean_keep_it_together(problem: tuple[Tensor, Tensor]) -> None:
    x, z = problem
    other = (x[:, :1] + x[:, 1:2]).roll(7, 0)
    erasers = [linear(x, z), ConceptMoments(x.shape[1], 1).update(x, other).eraser(affine=False)]
    joint = combine_erasers(erasers)
    together = moments_of(x, z).eraser(affine=False)
    assert joint.rank == together.rank + 1
    moved = joint(x.mean(0)[None]) - x.mean(0)
    # Rounding is multiplied by one over the cosine that is divided by.
    assert float(moved.abs().max()) < 1e-9 * float(joint.matrix.norm()) * float(x.mean(0).norm())


# ---- methods on rows, and numbers that are hard to compute with ------------------------------------------------------


@pytest.mark.parametrize("fit", [fit_inlp, lambda *args, **options: fit_rlace(*args, steps=20, **options)])
def test_methods_on_rows_keep_it_too(fit: object) -> None:
    x, z = rows(300, 9, 3)
    x = x + 2
    eraser, plain = fit(x, z, affine=False), fit(x, z, affine=False, keep_mean=False)
    assert torch.equal(eraser.left, plain.left)
    assert torch.equal(plain.right, plain.left.T)
    assert eraser.bias is plain.bias is None
    assert torch.allclose(eraser(x).mean(0), x.mean(0), atol=1e-11)  # float64 rounding, times the length of readings
    assert not torch.allclose(plain(x).mean(0), x.mean(0), atol=1e-2)
    # Both maps remove the same directions, so a probe finds the same after either.
    assert torch.allclose(plain.matrix @ eraser.matrix, plain.matrix, atol=1e-12)


@pytest.mark.parametrize("method", ["leace", "orth", "inlp"])
def test_about_a_mean_of_zero_it_is_the_affine_map(method: str) -> None:
    x, z = rows(300, 9, 3)
    centred = x - x.mean(0)
    affine, without = (moments_of(centred, z).eraser(method, affine=affine, rank=2) for affine in (True, False))
    assert torch.equal(affine.right, without.right)
    assert torch.allclose(affine(centred), without(centred), atol=1e-13)
    # This also holds for float32 rows, whose mean is their rounding.
    rounded = centred.float()
    affine, without = (moments_of(rounded, z).eraser(method, affine=affine, rank=2) for affine in (True, False))
    assert torch.equal(affine.right, without.right)


def test_a_mean_of_zero_in_one_dimension_is_none_to_keep() -> None:
    x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    assert linear(x, torch.tensor([0, 1, 0, 1])).rank == 1


@pytest.mark.parametrize("distance", [1e3, 1e6])
def test_a_mean_far_from_zero(distance: float) -> None:
    x, z = rows(400, 12, 3)
    far = x + distance
    eraser = linear(far, z)
    # Readings of such large numbers round by 2e-16 of them.
    assert leak(eraser(far), z, far) < 1e-15 * distance + EXACT
    assert float((eraser(far).mean(0) - far.mean(0)).abs().max()) < 1e-14 * distance
    # The farther the mean, the less the activations vary along it, so that keeping it changes hardly more.
    moments = moments_of(far, z)
    change, least = (moments.spread().change(e) for e in (eraser, moments.eraser()))
    assert least <= change < 1.2 * least


def test_float32_rows_and_an_eraser_that_is_stored_in_it() -> None:
    x, z = rows(400, 12, 3)
    x = (x + 5).float()
    eraser = linear(x, z).to(dtype=torch.float32)
    erased = eraser(x)
    assert erased.dtype == torch.float32
    # float32 rounds by 6e-8 the readings of a mean that is five times as large as the spread.
    assert leak(erased, z, x) < 2e-6
    assert float((erased.double().mean(0) - x.double().mean(0)).abs().max()) < 1e-5


@pytest.mark.parametrize("method", ["leace", "orth", "mean_projection", "inlp"])
def test_features_that_never_vary(method: str) -> None:
    x, z = rows(300, 9, 2)
    x[:, 3], x[:, 5] = 7.0, 1e-33 * x[:, 5]  # like features that a norm has switched off
    eraser = linear(x, z, method, rank=1)
    assert float(eraser.left[3].abs().max()) == 0
    assert float(eraser.right.abs().max()) < 1e36
    assert torch.equal(eraser(x)[:, 3], x[:, 3])
    assert torch.allclose(eraser(x).mean(0), x.mean(0), atol=1e-12)
    varies = [0, 1, 2, 4, 6, 7, 8]
    if method != "inlp":
        assert leak(eraser(x)[:, varies], z, x[:, varies]) < EXACT * 10


# ---- rows without such a map -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["leace", "orth", "mean_projection"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_covariance_along_the_mean_is_refused(method: str, dtype: torch.dtype) -> None:
    z = torch.arange(400) % 2
    x = rows(400, 6, 1)[0]
    difference = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64)
    for label in (0, 1):  # the classes differ only in their distance from the origin
        own = z == label
        x[own] += (label + 3) * difference - x[own].mean(0)
    with pytest.raises(ValueError, match=r"the mean of x lies in the span .* give affine=True"):
        linear(x.to(dtype), z, method)
    assert linear(x.to(dtype), z, method, keep_mean=False).rank == 1
    assert moments_of(x.to(dtype), z).eraser(method).rank == 1
    # If the mean lies a little aside of this direction, the map exists.
    x[:, 0] += 0.1
    eraser = linear(x.to(dtype), z, method)
    assert leak(eraser(x), z, x) < (1e-5 if dtype == torch.float32 else 1e-10)


def test_one_dimension_and_a_concept_that_fills_the_space_are_refused() -> None:
    x, z = rows(200, 1, 2)
    with pytest.raises(ValueError, match="the mean of x lies in the span"):
        linear(x + 1, z)
    x, z = rows(200, 3, 4)
    with pytest.raises(ValueError, match="the mean of x lies in the span"):
        Eraser.fit(x, z, affine=False)


def test_an_affine_map_that_lets_the_mean_go_is_refused() -> None:
    x, z = rows(200, 5, 2)
    for fit in (Eraser.fit, fit_inlp, fit_rlace):
        with pytest.raises(ValueError, match="keep_mean is False and affine is True"):
            fit(x, z, keep_mean=False)
