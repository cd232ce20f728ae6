"""Oracle-LEACE against the package concept-erasure, against least squares by hand, and against LEACE."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from concept_erasure import OracleFitter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from hf_erasure.erasers import ConceptMoments, Eraser, OracleEraser
from tests.erasers.data import as_values, leak, moments_of, rows

problems = st.builds(
    lambda n, d, k, seed: rows(n, d, k, seed=seed),
    n=st.integers(150, 400),
    d=st.integers(3, 16),
    k=st.integers(2, 5),
    seed=st.integers(0, 2**31 - 1),
)
laws = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_it_is_that_of_concept_erasure(classes: int) -> None:
    # Classes of equal size, as concept-erasure replaces variances of z below 0.01 by 0.01.
    x, z = rows(600, 9, classes)
    theirs = OracleFitter.fit(x, one_hot(z, classes).double()).eraser(x, one_hot(z, classes).double())
    assert torch.allclose(OracleEraser.fit(x, z)(x, z), theirs, atol=1e-12)  # float64 rounding


def test_a_rare_class_is_erased() -> None:
    x, _ = rows(2000, 4, 2)
    z = (torch.arange(2000) < 8).long()
    x = x + 5.0 * z[:, None]
    assert leak(OracleEraser.fit(x, z)(x, z), z, x) < 1e-12  # float64 rounding


@laws
@given(problems)
def test_it_leaves_the_residual_of_least_squares(problem: tuple[Tensor, Tensor]) -> None:
    x, z = problem
    values = as_values(z)
    design = np.column_stack([np.ones(len(x)), values.numpy()])
    residual = x.numpy() - design @ np.linalg.lstsq(design, x.numpy(), rcond=1e-10)[0]
    eraser = OracleEraser.fit(x, z)
    assert torch.allclose(eraser(x, z), torch.from_numpy(residual) + x.mean(0), atol=1e-11)  # float64 rounding
    assert torch.allclose(eraser(x, values), eraser(x, z), atol=1e-12)
    assert leak(eraser(x, z), z, x) < 1e-12


@laws
@given(problems)
def test_it_changes_no_more_than_leace(problem: tuple[Tensor, Tensor]) -> None:
    x, z = problem
    told = float((OracleEraser.fit(x, z)(x, z) - x).square().sum())
    untold = float((Eraser.fit(x, z, shrinkage=None)(x) - x).square().sum())
    assert told <= untold * (1 + 1e-12)


@laws
@given(problems)
def test_twice_takes_as_much_again(problem: tuple[Tensor, Tensor]) -> None:
    """It is not a projection: the vector that it subtracts depends on z alone."""
    x, z = problem
    eraser = OracleEraser.fit(x, z)
    once = eraser(x, z)
    assert torch.allclose(eraser(once, z) - once, once - x, atol=1e-11)


def test_moments_batches_values_dtypes_and_shapes() -> None:
    x, z = rows(400, 6, 3)
    moments = ConceptMoments(6, 3).update(x[:100], z[:100]).update(x[100:], z[100:])
    eraser = OracleEraser.of(moments)
    assert torch.allclose(eraser(x, z), OracleEraser.fit(x, z)(x, z), atol=1e-12)
    shaped = eraser(x.view(20, 20, 6).bfloat16(), z.view(20, 20))
    assert (shaped.shape, shaped.dtype) == ((20, 20, 6), torch.bfloat16)
    score = x[:, :1] * 2 + 1
    erased = OracleEraser.fit(x, score)(x, score)
    assert leak(erased, score, x) < 1e-12
    assert torch.equal(OracleEraser.fit(x, score[:, 0])(x, score[:, 0]), erased)


def test_what_cannot_be_erased_is_refused() -> None:
    x, z = rows(100, 4, 2)
    eraser = OracleEraser.of(moments_of(x, z))
    with pytest.raises(ValueError, match=r"class id -100.*label of every row"):
        eraser(x, torch.full((100,), -100))
    with pytest.raises(ValueError, match="class id 2"):
        eraser(x, z + 1)
    with pytest.raises(ValueError, match=r"z has shape \(99,\)"):
        eraser(x, z[:99])
    for values in (z.double(), torch.randn(100, 3)):
        with pytest.raises(
            ValueError, match=r"z has shape \(100,.*give z_dim=2 values per row, or one integer class id"
        ):
            eraser(x, values)
    with pytest.raises(TypeError, match="z is list"):
        eraser(x, z.tolist())
    with pytest.raises(ValueError, match="last dimension of 4"):
        eraser(x[:, :3], z)
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        eraser(x.long(), z)
    with pytest.raises(ValueError, match="Only one class"):
        OracleEraser.fit(x, torch.ones(100, dtype=torch.int64))
