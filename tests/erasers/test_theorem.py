"""The theorem, by loss (arXiv 2306.03819, Theorem 3.1): no linear predictor beats the best constant on erased rows.

Predictors are trained to convergence on the erased training rows, in standardised coordinates. Singular values of the
rows below 1e-12 (float64) or 1e-6 (float32) of the largest are left out: an erased direction is rounding, which would
become a random feature if it were scaled to unit variance.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.svm import LinearSVC
from torch import Tensor

from hf_erasure.erasers import ConceptMoments, Eraser
from tests.erasers.data import ols_r2, rows

CUTOFF = {torch.float64: 1e-12, torch.float32: 1e-6}
# A loss that is flat at its minimum is found to the square of the optimiser's tolerance on the gradient, 1e-6. Rounding
# gives float32 rows correlations up to 1e-6, and a loss can gain their square.
SLACK = 1e-8


def standardised(x: Tensor, cutoff: float) -> np.ndarray:
    """Rows in standardised coordinates, without the directions that are rounding."""
    x = x.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    return (u[:, s > cutoff * s[0]] * x.shape[0] ** 0.5).numpy()


def logistic_gain(features: np.ndarray, z: Tensor) -> float:
    """By how many nats the best logistic regression beats a prediction of the class shares."""
    model = LogisticRegression(C=np.inf, tol=1e-9, max_iter=2000).fit(features, z.numpy())
    shares = np.bincount(z.numpy()) / len(z)
    constant = float(-(shares * np.log(shares)).sum())
    return constant - log_loss(z.numpy(), model.predict_proba(features))


def hinge_gain(features: np.ndarray, z: Tensor) -> float:
    """By how much the support vector machine beats the best constant in mean squared hinge loss."""
    signs = np.where(z.numpy() == 1, 1.0, -1.0)

    def loss(scores: np.ndarray | float) -> float:
        return float(np.mean(np.maximum(0, 1 - signs * scores) ** 2))

    # C = 100 for each row makes the penalty on the weights negligible, which the theorem does not have. The intercept
    # is a feature of size 100, so that it is hardly penalised either.
    model = LinearSVC(C=100, dual=False, tol=1e-10, max_iter=20_000, intercept_scaling=100).fit(features, z.numpy())
    constant = minimize(lambda c: loss(c[0]), [0.0], tol=1e-14).fun
    return constant - loss(model.decision_function(features))


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("method", ["leace", "orth"])
@pytest.mark.parametrize("k", [2, 4])
def test_logistic_regression_learns_nothing(dtype: torch.dtype, method: str, k: int) -> None:
    x, z = rows(1500, 12, k, dtype=dtype)
    assert logistic_gain(standardised(x, CUTOFF[dtype]), z) > 0.1
    erased = Eraser.fit(x, z, method)(x)
    assert erased.dtype == dtype
    assert logistic_gain(standardised(erased, CUTOFF[dtype]), z) < SLACK


@pytest.mark.parametrize("method", ["leace", "orth"])
def test_support_vector_machine_learns_nothing(dtype: torch.dtype, method: str) -> None:
    x, z = rows(1500, 12, 2, dtype=dtype)
    assert hinge_gain(standardised(x, CUTOFF[dtype]), z) > 0.1
    assert hinge_gain(standardised(Eraser.fit(x, z, method)(x), CUTOFF[dtype]), z) < SLACK


@pytest.mark.parametrize("method", ["leace", "orth"])
@pytest.mark.parametrize("k", [2, 5])
def test_least_squares_learns_nothing(dtype: torch.dtype, method: str, k: int) -> None:
    x, z = rows(1500, 12, k, dtype=dtype)
    assert ols_r2(x, z, CUTOFF[dtype]) > 0.1
    assert ols_r2(Eraser.fit(x, z, method)(x), z, CUTOFF[dtype]) < SLACK


def test_least_squares_learns_nothing_of_a_continuous_concept(dtype: torch.dtype) -> None:
    x, _ = rows(1500, 12, 2, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    z = x[:, :3].double() @ torch.randn(3, 2, generator=generator, dtype=torch.float64)
    z += torch.randn(1500, 2, generator=generator, dtype=torch.float64)
    assert ols_r2(x, z, CUTOFF[dtype]) > 0.1
    eraser = Eraser.fit(x, z)
    assert eraser.rank == 2
    assert ols_r2(eraser(x), z, CUTOFF[dtype]) < SLACK


def test_a_background_and_shrinkage_leave_the_guarantee_alone() -> None:
    x, z = rows(1500, 12, 3)
    background = ConceptMoments(12, 0).update(5 * rows(400, 12, 2, seed=9)[0] + 3)
    moments = ConceptMoments(12, 3).update(x, z)
    for options in (
        {"background": background},
        {"background": background, "background_weight": 0.5},
        {"shrinkage": 0.7},
    ):
        assert ols_r2(moments.eraser(**options)(x), z, CUTOFF[torch.float64]) < SLACK


def test_a_leace_eraser_equals_the_papers_formula() -> None:
    """`I − W⁺ P W` with `W = Σ^{-½}` and P the orthogonal projection on the span of `W A`, by eigenvectors."""
    x, z = rows(1500, 12, 4)
    moments = ConceptMoments(12, 4).update(x, z)
    values, vectors = torch.linalg.eigh(moments.covariance_x)
    whitener = vectors * values.rsqrt() @ vectors.T
    u, s, _ = torch.linalg.svd(whitener @ moments.cross_covariance, full_matrices=False)
    u = u[:, s > 1e-9]
    paper = torch.eye(12, dtype=torch.float64) - torch.linalg.inv(whitener) @ u @ u.T @ whitener
    ours = moments.eraser(shrinkage=None)
    # The bound is the jitter of 1e-13 times the condition number of Σ, a few hundred.
    assert torch.allclose(ours.matrix, paper, atol=1e-10)
    assert torch.equal(ours.bias, moments.mean_x)
