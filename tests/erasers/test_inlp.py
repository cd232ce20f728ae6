"""INLP against loops of scikit-learn probes, and its guarantees and their limits."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from torch import Tensor

from hf_erasure import ConceptErasureConfig, fit_concept_erasure, verify_adapter
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import ConceptMoments, Eraser, fit_inlp
from hf_erasure.erasers.eraser import concept_columns
from tests.erasers.data import as_values, leak, moments_of, ols_r2, rows
from tests.small_models import LABELS, inputs_of, outputs_of, same, small_batches, small_model

problems = st.builds(
    lambda n, d, k, seed: rows(n, d, k, seed=seed),
    n=st.integers(150, 400),
    d=st.integers(3, 16),
    k=st.integers(2, 4),
    seed=st.integers(0, 2**31 - 1),
)
laws = settings(max_examples=25, deadline=None, derandomize=True)


def added(basis: np.ndarray, weights: np.ndarray, cutoff: float = 1e-7) -> np.ndarray:
    """An orthonormal basis of the span of `basis` and of the row space of a probe's `(outputs, d)` weights."""
    rest = weights.T - basis @ (basis.T @ weights.T)
    u, s, _ = np.linalg.svd(rest, full_matrices=False)
    return np.concatenate([basis, u[:, s > cutoff * np.linalg.norm(weights)]], axis=1)


def by_least_squares(x: np.ndarray, z: np.ndarray, rounds: int, probe: Any = None) -> np.ndarray:
    """The loop as the paper writes it: train a probe, project its directions away, and repeat."""
    basis = np.zeros((x.shape[1], 0))
    for _ in range(rounds):
        probe = (probe or LinearRegression()).fit(x - x @ basis @ basis.T, z)
        if np.linalg.norm(probe.coef_) < 1e-9 or basis.shape[1] == x.shape[1]:
            break
        basis = added(basis, probe.coef_)
    return basis @ basis.T


def by_logistic(x: np.ndarray, ids: np.ndarray, rounds: int) -> np.ndarray:
    basis = np.zeros((x.shape[1], 0))
    scaled = (x - x.mean(0)) / math.sqrt(x.var(0).mean())
    for _ in range(rounds):
        probe = LogisticRegression(C=1.0, tol=1e-10, max_iter=20_000).fit(scaled - scaled @ basis @ basis.T, ids)
        basis = added(basis, probe.coef_)
    return basis @ basis.T


def removed(eraser: Eraser) -> Tensor:
    return eraser.left @ eraser.right


@laws
@given(problems, st.integers(1, 4))
def test_rounds_from_moments_are_those_of_a_loop_over_rows(problem: tuple[Tensor, Tensor], rounds: int) -> None:
    x, z = problem
    eraser = moments_of(x, z).eraser("inlp", rounds=rounds, shrinkage=None)
    expected = by_least_squares(x.numpy(), as_values(z).numpy(), rounds)
    # In each round both sides solve with matrices of condition numbers up to 1e4, exact to 1e-16.
    assert torch.allclose(removed(eraser), torch.from_numpy(expected), atol=1e-7)


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_shrinkage_is_the_ridge_of_scikit_learn(share: float) -> None:
    x, z = rows(300, 10, 3)
    x = x * torch.logspace(-3, 2, 10, dtype=torch.float64)  # so that units matter
    eraser = moments_of(x, z).eraser("inlp", rounds=3, shrinkage=share)
    ridge = Ridge(alpha=len(x) * float(x.var(0, correction=0).mean()) * share / (1 - share))
    expected = by_least_squares(x.numpy(), as_values(z).numpy(), 3, ridge)
    assert torch.allclose(removed(eraser), torch.from_numpy(expected), atol=1e-7)  # variances from 1e-6 to 1e4


def test_a_feature_that_hardly_varies_does_not_use_up_the_rounds() -> None:
    x, z = rows(300, 6, 2)
    x[:, 2] *= 1e-6
    moments = moments_of(x, z)
    without = moments.eraser("inlp", rounds=1, shrinkage=None)
    assert float(without.left[2].abs()) > 0.999  # plain least squares removes that feature only
    assert float(moments.eraser("inlp", rounds=1).left[2].abs()) < 1e-3
    # The rounds nevertheless go on.
    assert moments.eraser("inlp", rounds=4, shrinkage=None).rank == 4


@pytest.mark.parametrize(("classes", "rounds"), [(2, 1), (2, 4), (3, 3)])
def test_rounds_from_rows_are_those_of_a_loop_of_logistic_regressions(classes: int, rounds: int) -> None:
    x, z = rows(400, 8, classes, seed=3)
    eraser = Eraser.fit(5 * x + 2, z, "inlp", rounds=rounds)
    assert eraser.rank == rounds * (classes - 1)
    expected = by_logistic(x.numpy(), z.numpy(), rounds)
    # scikit-learn's lbfgs stops at a slope of 1e-10 over a ridge of 1/400; each round adds to the earlier ones' error.
    assert torch.allclose(removed(eraser), torch.from_numpy(expected), atol=1e-4)


@laws
@given(problems, st.integers(1, 4), st.booleans())
def test_it_is_an_orthogonal_projection_whose_rank_grows_by_rounds(
    problem: tuple[Tensor, Tensor], rounds: int, affine: bool
) -> None:
    x, z = problem
    eraser = moments_of(x, z).eraser("inlp", rounds=rounds, affine=affine, keep_mean=affine)
    matrix = eraser.matrix
    assert torch.allclose(matrix @ matrix, matrix, atol=1e-12)  # float64 rounding
    assert torch.equal(eraser.right, eraser.left.T)
    assert eraser.rank == min(rounds * int(z.max()), x.shape[1])
    if affine:
        assert torch.allclose(eraser(x).mean(0), x.mean(0), atol=1e-12)
    else:
        assert eraser.bias is None


@laws
@given(problems)
def test_more_rounds_leave_a_least_squares_probe_no_more(problem: tuple[Tensor, Tensor]) -> None:
    x, z = problem
    moments = moments_of(x, z)
    before, smaller = ols_r2(x, z, 1e-10), moments.eraser("inlp", rounds=1, shrinkage=None)
    for rounds in range(1, 5):
        eraser = moments.eraser("inlp", rounds=rounds, shrinkage=None)
        if eraser.rank == x.shape[1]:
            return  # nothing is left to read
        # Measured in the remaining coordinates, as the removed ones hold only rounding, which has no scale. A probe of
        # fewer features explains no more, except for the rounding of its R².
        rest = torch.linalg.qr(eraser.left, mode="complete")[0][:, eraser.rank :]
        after = ols_r2(eraser(x) @ rest, z, 1e-10)
        assert after <= before + 1e-12
        # A later round does not bring back what an earlier one has removed.
        assert torch.allclose(eraser.matrix @ smaller.left, torch.zeros_like(smaller.left), atol=1e-10)
        before = after


@laws
@given(problems)
def test_all_rounds_together_leave_no_covariance(problem: tuple[Tensor, Tensor]) -> None:
    x, z = problem
    eraser = moments_of(x, z).eraser("inlp", rounds=x.shape[1])
    assert leak(eraser(x), z, x) < 1e-6  # where the rounds stop: rounding, by `precision.significance`, or nothing left
    assert eraser.rank <= x.shape[1]


def test_few_rounds_do_not_give_the_guarantee_of_leace() -> None:
    x, z = rows(2000, 12, 2, seed=1)
    moments = moments_of(x, z)
    left = {rounds: ols_r2(moments.eraser("inlp", rounds=rounds)(x), z, 1e-10) for rounds in (1, 2)}
    assert ols_r2(moments.eraser()(x), z, 1e-10) < 1e-20
    assert left[1] > 0.01  # another direction still shows the concept
    assert left[2] < left[1]


def test_white_features_need_one_round_which_is_that_of_orth() -> None:
    x, z = rows(500, 8, 3)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x))).T
    eraser = moments_of(white, z).eraser("inlp", shrinkage=None)
    assert eraser.rank == 2
    assert torch.allclose(removed(eraser), removed(Eraser.fit(white, z, "orth")), atol=1e-10)  # float64 rounding


def test_the_space_is_that_of_krylov() -> None:
    x, z = rows(400, 9, 3)
    moments = moments_of(x, z)
    columns = concept_columns(moments.spread())
    parts = [columns]
    for _ in range(3):
        parts.append(torch.linalg.solve(moments.covariance_x, parts[-1]))
    basis = torch.linalg.qr(torch.cat([part / part.norm(dim=0) for part in parts[1:]], dim=1))[0]
    eraser = moments.eraser("inlp", rounds=3, shrinkage=None)
    assert torch.allclose(removed(eraser), basis @ basis.T, atol=1e-7)  # powers of a matrix of condition about 100


@pytest.mark.parametrize("method", ["moments", "rows"])
def test_a_rank_takes_the_first_rounds_and_as_many_as_it_needs(method: str) -> None:
    x, z = rows(400, 14, 3)

    def solved(**options: int) -> Eraser:
        return moments_of(x, z).eraser("inlp", **options) if method == "moments" else fit_inlp(x, z, **options)

    capped, whole = solved(rank=3), solved(rounds=2)
    assert (capped.rank, whole.rank) == (3, 4)
    assert torch.allclose(whole.matrix @ capped.left, torch.zeros_like(capped.left), atol=1e-10)
    assert solved(rank=12).rank == 12
    assert solved(rank=3, rounds=1).rank == 2


def test_without_a_number_there_are_ten_rounds() -> None:
    x, z = rows(800, 24, 2)
    assert moments_of(x, z).eraser("inlp").rank == 10
    assert Eraser.fit(x, z, "inlp").rank == 10


def test_a_background_gives_the_mean_and_not_the_probe() -> None:
    x, z = rows(500, 8, 2)
    other = rows(600, 8, 2, seed=9)[0] * 4 + 3
    moments = moments_of(x, z)
    plain = moments.eraser("inlp", rounds=2)
    guarded = moments.eraser("inlp", rounds=2, background=ConceptMoments(8, 0).update(other))
    assert torch.equal(guarded.left, plain.left)
    assert torch.allclose(guarded.bias, other.mean(0))


def test_values_have_the_least_squares_form_alone() -> None:
    x, z = rows(300, 6, 2)
    score = (x[:, 0] + 0.1 * x[:, 1])[:, None]
    with pytest.raises(ValueError, match=r"'inlp' trains a classifier: give one integer class id"):
        Eraser.fit(x, score, "inlp")
    eraser = Eraser.fit(x, score, "inlp", probe="least_squares", rounds=1, shrinkage=None)
    probe = torch.tensor([1.0, 0.1, 0, 0, 0, 0], dtype=torch.float64)
    assert float((eraser.left.T @ probe / probe.norm()).abs()) == pytest.approx(1, abs=1e-10)
    same_form = Eraser.fit(x, z, "inlp", probe="least_squares")
    assert torch.equal(same_form.left, moments_of(x, z).eraser("inlp").left)


def test_rounds_end_where_the_probe_knows_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    z = torch.randint(2, (4000,), generator=generator)
    # By chance the probe gains about d / 2n nats, 4e-4 here, below the thousandth at which rounds end.
    assert fit_inlp(x, z).rank == 0
    x[:, 1] += 2.0 * z
    assert 1 <= fit_inlp(x, z).rank <= 2


def test_weights_are_repeated_rows_and_masked_rows_are_not_seen() -> None:
    x, z = rows(200, 5, 2)
    times = torch.randint(1, 4, (200,), generator=torch.Generator().manual_seed(1))
    repeated = fit_inlp(x.repeat_interleave(times, 0), z.repeat_interleave(times), rounds=2, penalty=0.01)
    weighted = fit_inlp(x, z, weight=times.double(), rounds=2, penalty=0.01)
    assert torch.allclose(removed(weighted), removed(repeated), atol=1e-7)  # a slope of 1e-9 over a ridge of 0.01
    padded = torch.cat([x, torch.full((3, 5), torch.nan, dtype=torch.float64)])
    ids = torch.cat([z, torch.tensor([0, 1, 1])])
    masked = fit_inlp(padded, ids, rounds=2, mask=torch.arange(203) < 200)
    assert torch.allclose(removed(masked), removed(fit_inlp(x, z, rounds=2)), atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounds": 0}, ValueError, "rounds is 0"),
        ({"rounds": 1.0}, TypeError, "rounds is 1.0"),
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"penalty": 0.0}, ValueError, "penalty is 0.0"),
        ({"probe": "svm"}, ValueError, "probe is 'svm'.*'logistic', 'least_squares'"),
    ],
)
def test_bad_options_are_refused(options: dict, error: type[Exception], message: str) -> None:
    x, z = rows(60, 4, 2)
    with pytest.raises(error, match=message):
        Eraser.fit(x, z, "inlp", **options)
    with pytest.raises(ValueError, match="Only one class"):
        fit_inlp(x, torch.zeros(60, dtype=torch.int64))
    with pytest.raises(ValueError, match="x is constant"):
        fit_inlp(torch.ones(60, 4), z)


def test_an_adapter_of_inlp_is_fitted_saved_and_loaded_as_any_other(tmp_path: Path) -> None:
    batches = small_batches("bert", 4)
    model = copy.deepcopy(small_model("bert"))
    config = ConceptErasureConfig(concept="gender", labels=LABELS, method="inlp", rank=3)
    model.add_adapter(config, adapter_name="no_gender")
    fit_concept_erasure(model, batches, "no_gender", progress=False)
    layers = erasure_layers(model, "no_gender")
    assert {layer.eraser_state("no_gender")[0].shape[1] for layer in layers.values()} == {3}
    assert verify_adapter(model, "no_gender")
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(small_model("bert"))
    again.load_adapter(str(tmp_path), adapter_name="no_gender")
    inputs = inputs_of(batches[0])
    assert same(outputs_of(again, inputs), outputs_of(model, inputs))


def test_a_configuration_without_a_rank_means_ten_rounds_and_rlace_is_refused() -> None:
    assert ConceptErasureConfig(labels=["a", "b", "c"], method="inlp").max_rank == 20
    assert ConceptErasureConfig(labels=["a", "b", "c"], method="inlp", rank=7).max_rank == 7
    with pytest.raises(ValueError, match=r"method='rlace' is not known; choose one of 'leace', "):
        ConceptErasureConfig(labels=["a", "b"], method="rlace")
