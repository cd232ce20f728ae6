"""Quadratic erasure: quadratic probes fail after it and succeed after LEACE; its maps are optimal transport."""

from __future__ import annotations

import pytest
import torch
from concept_erasure import QuadraticFitter
from concept_erasure.optimal_transport import ot_barycenter, ot_distance, ot_map
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import Tensor

from hf_erasure.erasers import Eraser, OracleEraser, QuadraticEraser
from hf_erasure.erasers.analysis import barycentre


def shaped(n: int, d: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows whose classes differ in mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.arange(n) % k
    shapes = torch.eye(d, dtype=torch.float64) + 0.4 * torch.randn(k, d, d, generator=generator, dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x = torch.einsum("nd,nde->ne", x, shapes[z])
    return x + torch.randn(k, d, generator=generator, dtype=torch.float64)[z], z


def covariances(x: Tensor, z: Tensor) -> Tensor:
    return torch.stack([torch.cov(x[z == label].T, correction=0) for label in z.unique()])


problems = st.builds(
    lambda n, d, k, seed: shaped(n, d, k, seed=seed),
    n=st.integers(200, 400),
    d=st.integers(2, 10),
    k=st.integers(2, 4),
    seed=st.integers(0, 2**31 - 1),
)
laws = settings(max_examples=25, deadline=None, derandomize=True)


@laws
@given(problems)
def test_means_and_covariances_are_the_same_in_every_class(problem: tuple[Tensor, Tensor]) -> None:
    x, z = problem
    erased = QuadraticEraser.fit(x, z)(x, z)
    means = torch.stack([erased[z == label].mean(0) for label in z.unique()])
    assert torch.allclose(means, x.mean(0).expand_as(means), atol=1e-11)
    matched = covariances(erased, z)
    # Two inverse roots of matrices of condition numbers up to 1e4, exact to 1e-16.
    assert torch.allclose(matched, matched[:1].expand_as(matched), atol=1e-9, rtol=1e-9)


@laws
@given(problems)
def test_maps_and_centre_are_those_of_optimal_transport(problem: tuple[Tensor, Tensor]) -> None:
    x, z = problem
    own = covariances(x, z)
    shares = torch.bincount(z).double() / len(z)
    centre = barycentre(own, shares)
    # The other package stops when the loss falls by less than 2e-16, so its result is exact to about the root of that.
    assert torch.allclose(centre, ot_barycenter(own, shares), atol=1e-6)
    assert torch.allclose(QuadraticEraser.fit(x, z).maps, ot_map(own, centre), atol=1e-8)
    # Any other covariance is farther from those of the classes.
    nearest = float((shares * ot_distance(own, centre).square()).sum())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        bend = 0.05 * torch.randn(centre.shape, generator=generator, dtype=torch.float64)
        other = (torch.eye(len(centre)) + bend) @ centre @ (torch.eye(len(centre)) + bend).T
        assert float((shares * ot_distance(own, other).square()).sum()) >= nearest - 1e-12


def test_of_two_classes_it_is_that_of_concept_erasure() -> None:
    # Both classes have equally many rows: concept-erasure weighs class means equally, and divides by the rows less one.
    x, z = shaped(600, 8, 2)
    theirs = QuadraticFitter.fit(x, z, shrinkage=False).eraser(x, z)
    # The barycentre has a closed form for two classes there, and is found by iteration here.
    assert torch.allclose(QuadraticEraser.fit(x, z)(x, z), theirs, atol=1e-8)


def quadratic_probe(x: Tensor, z: Tensor) -> Pipeline:
    """An almost unpenalised logistic regression on all monomials of degree 2."""
    probe = LogisticRegression(C=1e6, tol=1e-9, max_iter=5000)
    return make_pipeline(PolynomialFeatures(2, include_bias=False), StandardScaler(), probe).fit(x.numpy(), z.numpy())


def gain(probe: Pipeline, x: Tensor, z: Tensor) -> float:
    """By how many nats a probe beats the best constant prediction."""
    shares = torch.bincount(z).double() / len(z)
    chances = torch.from_numpy(probe.predict_proba(x.numpy()))
    return float(-(shares * shares.log()).sum() + chances[torch.arange(len(z)), z].log().mean())


@pytest.mark.parametrize("classes", [2, 3])
def test_a_quadratic_probe_succeeds_after_leace_and_fails_after_this(classes: int) -> None:
    x, z = shaped(6000, 5, classes, seed=4)
    seen, unseen = (x[:3000], z[:3000]), (x[3000:], z[3000:])
    linear, told, quadratic = Eraser.fit(*seen), OracleEraser.fit(*seen), QuadraticEraser.fit(*seen)
    for name, erase in {"leace": lambda x, z: linear(x), "oracle": told, "quadratic": quadratic}.items():
        probe = quadratic_probe(erase(*seen), seen[1])
        found, right = gain(probe, erase(*seen), seen[1]), probe.score(erase(*unseen).numpy(), unseen[1].numpy())
        if name == "quadratic":
            # Such a probe sees the same in every class, and its fit ends at a slope of 1e-9.
            assert abs(found) < 1e-6, name
            assert right < 1 / classes + 5 * (0.25 / 3000) ** 0.5, name  # chance, and five standard errors
        else:
            assert found > 0.1, name
            assert right > 1 / classes + 0.2, name


def test_a_probe_of_third_order_may_still_succeed() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.arange(4000) % 2
    skewed = torch.empty(4000, 1, dtype=torch.float64).exponential_(generator=generator) - 1
    x = torch.where(z[:, None] == 0, skewed, -skewed)
    erased = QuadraticEraser.fit(x, z)(x, z)
    probe = LogisticRegression(C=1e6, max_iter=1000)
    cubic = PolynomialFeatures(3).fit_transform(erased.numpy())
    assert probe.fit(cubic, z.numpy()).score(cubic, z.numpy()) > 0.6


def test_weights_are_repeated_rows() -> None:
    x, z = shaped(300, 4, 3)
    times = torch.randint(1, 4, (300,), generator=torch.Generator().manual_seed(1))
    repeated = QuadraticEraser.fit(x.repeat_interleave(times, 0), z.repeat_interleave(times))
    weighted = QuadraticEraser.fit(x, z, weight=times.double())
    assert torch.allclose(weighted(x, z), repeated(x, z), atol=1e-10)
    cube, ids = x.view(3, 100, 4).float(), z.view(3, 100)
    assert QuadraticEraser.fit(x, z)(cube, ids).shape == cube.shape
    assert QuadraticEraser.fit(x, z)(cube, ids).dtype == torch.float32


def test_fewer_rows_than_features_are_refused_and_shrinkage_matches_about() -> None:
    x, z = shaped(30, 20, 2)
    with pytest.raises(ValueError, match=r"15 rows of width 20.*shrinkage='oas', which matches them approximately"):
        QuadraticEraser.fit(x, z)
    erased = QuadraticEraser.fit(x, z, shrinkage="oas")(x, z)
    assert bool(erased.isfinite().all())
    means = torch.stack([erased[z == label].mean(0) for label in (0, 1)])
    assert torch.allclose(means[0], means[1], atol=1e-11)


def test_features_that_never_vary_stay() -> None:
    x, z = shaped(200, 4, 2)
    x = torch.cat([x, torch.full((200, 1), 7.0, dtype=torch.float64)], dim=1)
    assert torch.allclose(QuadraticEraser.fit(x, z)(x, z)[:, 4], x[:, 4])


def test_what_cannot_be_erased_is_refused() -> None:
    x, z = shaped(100, 3, 2)
    eraser = QuadraticEraser.fit(x, z)
    with pytest.raises(ValueError, match="one integer class id per row"):
        QuadraticEraser.fit(x, z.double())
    with pytest.raises(ValueError, match=r"\[50, 0, 50\] rows.*number those that occur from 0"):
        QuadraticEraser.fit(x, 2 * z)
    with pytest.raises(ValueError, match="at least two"):
        QuadraticEraser.fit(x, 0 * z)
    with pytest.raises(ValueError, match="class id -1"):
        eraser(x, z - 1)
    with pytest.raises(ValueError, match=r"z has shape \(99,\)"):
        eraser(x, z[:99])
    with pytest.raises(TypeError, match=r"z has dtype torch\.float64"):
        eraser(x, z.double())


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-20])
def test_a_small_feature_is_erased_too(scale: float) -> None:
    x, z = shaped(400, 6, 2)
    x[:, 0] *= scale
    first, second = covariances(QuadraticEraser.fit(x, z)(x, z), z) / torch.outer(x.std(0), x.std(0))
    assert torch.allclose(first, second, rtol=0, atol=1e-6)


def test_scales_that_the_roots_do_not_resolve_are_refused() -> None:
    x, z = shaped(400, 6, 2)
    x[:, 0] *= 1e-9
    with pytest.raises(ValueError, match="scales that differ too much"):
        QuadraticEraser.fit(x, z)
