"""Properties that hold for any rows, tested with hypothesis.

Tolerances are relative to the standard deviation of a feature. `1e-12` is float64 rounding, 2e-16, times the few
thousand operations and the condition numbers (up to about 1e3 here) that stand between rows and result.
"""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_erasure.erasers import ConceptMoments, Eraser
from tests.erasers.data import as_values, leak, moments_of, rows

EXACT = 1e-12

problems = st.builds(
    lambda n, d, k, seed: rows(n, d, k, seed=seed),
    n=st.integers(150, 400),
    d=st.integers(3, 24),
    k=st.integers(2, 6),
    seed=st.integers(0, 2**31 - 1),
)
methods = st.sampled_from(["leace", "orth"])
laws = settings(max_examples=40, deadline=None, derandomize=True)


def distance(one: Eraser, other: Eraser, x: Tensor) -> float:
    """The largest difference of two maps on rows, relative to the spread of a feature."""
    return float(((one(x) - other(x)).abs() / x.std(0)).max())


@laws
@given(problems, methods, st.booleans())
def test_no_covariance_is_left(problem: tuple[Tensor, Tensor], method: str, affine: bool) -> None:
    x, z = problem
    assert leak(Eraser.fit(x, z, method, affine=affine, keep_mean=affine)(x), z, x) < EXACT


@laws
@given(problems, methods, st.booleans())
def test_idempotent(problem: tuple[Tensor, Tensor], method: str, affine: bool) -> None:
    x, z = problem
    eraser = Eraser.fit(x, z, method, affine=affine, keep_mean=affine)
    once = eraser(x)
    assert float(((eraser(once) - once).abs() / x.std(0)).max()) < 10 * EXACT
    identity = torch.eye(eraser.rank, dtype=torch.float64)
    assert float((eraser.right @ eraser.left - identity).abs().max()) < EXACT


@laws
@given(problems, methods)
def test_rank_is_at_most_the_number_of_classes_less_one(problem: tuple[Tensor, Tensor], method: str) -> None:
    x, z = problem
    classes = int(z.max()) + 1
    assert Eraser.fit(x, z, method).rank == min(classes - 1, x.shape[1])
    assert Eraser.fit(x, as_values(z), method).rank == min(classes - 1, x.shape[1])
    if classes > 2:
        assert Eraser.fit(x, z, method, rank=1).rank == 1


@laws
@given(problems, methods)
def test_the_mean_is_kept_when_affine(problem: tuple[Tensor, Tensor], method: str) -> None:
    x, z = problem
    moved = Eraser.fit(x, z, method)(x).mean(0) - x.mean(0)
    assert float((moved.abs() / x.std(0)).max()) < EXACT
    shifted = x + 3
    linear = Eraser.fit(shifted, z, method, affine=False, keep_mean=False)
    assert linear.bias is None
    assert float(linear(torch.zeros(1, x.shape[1], dtype=torch.float64)).abs().max()) == 0


@laws
@given(problems, st.integers(0, 2**31 - 1))
def test_no_feasible_map_changes_less(problem: tuple[Tensor, Tensor], seed: int) -> None:
    """Every map that leaves no covariance differs from LEACE by a matrix that is zero on the span of A."""
    x, z = problem
    moments = moments_of(x, z)
    eraser = moments.eraser(shrinkage=None)
    centred, values = x - x.mean(0), as_values(z) - as_values(z).mean(0)
    u, s, _ = torch.linalg.svd(centred.T @ values)
    rest = u[:, (s > 1e-9 * s[0]).sum() :]  # orthogonal to every covariance with the concept
    generator = torch.Generator().manual_seed(seed)
    change = float((eraser(x) - x).square().sum())
    for size in (1e-3, 1.0):
        other = torch.randn(x.shape[1], rest.shape[1], generator=generator, dtype=torch.float64) @ rest.T
        feasible = eraser(x) + size * centred @ other.T
        assert leak(feasible, z, x) < 1e-10  # it is feasible: EXACT times the norm of a random matrix
        assert float((feasible - x).square().sum()) >= change * (1 - EXACT)


# With batches of one row there are some 300 updates, so one such example is enough.
@laws
@given(problems, st.integers(5, 90), st.integers(2, 4), st.integers(0, 2**31 - 1))
@example(rows(150, 8, 3), 1, 3, 0)
def test_batches_shards_and_order_do_not_matter(
    problem: tuple[Tensor, Tensor], size: int, shards: int, seed: int
) -> None:
    x, z = problem
    x = x + 1000
    whole = moments_of(x, z)
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))
    parts = [ConceptMoments(whole.x_dim, whole.z_dim) for _ in range(shards)]
    for i, (part, ids) in enumerate(zip(x[order].split(size), z[order].split(size), strict=True)):
        parts[i % shards].update(part, ids)
    merged = parts[0]
    for part in parts[1:]:
        merged.merge(part)
    assert merged.rows == whole.rows
    assert merged.weight == whole.weight
    assert torch.equal(merged.state_dict()["counts"], whole.state_dict()["counts"])
    scale = whole.covariance_x.diagonal().sqrt()
    for name in ("covariance_x", "cross_covariance", "covariance_z"):
        difference = (getattr(merged, name) - getattr(whole, name)).abs()
        assert float(difference.max() / scale.max() ** (name == "cross_covariance")) < 1e-11  # 1e-16 · 1000, summed
    assert torch.allclose(merged.mean_x, whole.mean_x, rtol=1e-14)
    # The least change depends on Σ, whose inverse multiplies rounding by its condition number.
    assert distance(merged.eraser(), whole.eraser(), x) < 1e-8


@laws
@given(problems, methods, st.integers(0, 2**31 - 1))
def test_label_permutation_does_not_matter(problem: tuple[Tensor, Tensor], method: str, seed: int) -> None:
    x, z = problem
    names = torch.randperm(int(z.max()) + 1, generator=torch.Generator().manual_seed(seed))
    assert distance(Eraser.fit(x, z, method), Eraser.fit(x, names[z], method), x) < 1e-10


@laws
@given(problems, methods, st.integers(0, 2**31 - 1), st.floats(-6, 6))
def test_invertible_rescaling_of_z_does_not_matter(
    problem: tuple[Tensor, Tensor], method: str, seed: int, exponent: float
) -> None:
    x, z = problem
    values = as_values(z)[:, 1:]
    k = values.shape[1]
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64)).Q
    mixing = mixing * torch.logspace(0, exponent, k, dtype=torch.float64)
    assert distance(Eraser.fit(x, values, method), Eraser.fit(x, values @ mixing + 7, method), x) < 1e-8


@laws
@given(problems, st.integers(0, 2**31 - 1))
def test_rescaling_of_x_does_not_matter(problem: tuple[Tensor, Tensor], seed: int) -> None:
    x, z = problem
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (6 * torch.rand(x.shape[1], generator=generator, dtype=torch.float64) - 3)
    difference = Eraser.fit(x, z)(x) - Eraser.fit(x * scale, z)(x * scale) / scale
    assert float((difference.abs() / x.std(0)).max()) < 1e-8


@laws
@given(problems, st.integers(0, 2**31 - 1))
def test_a_weight_is_a_number_of_copies(problem: tuple[Tensor, Tensor], seed: int) -> None:
    x, z = problem
    copies = torch.randint(0, 4, z.shape, generator=torch.Generator().manual_seed(seed))
    copies[: int(z.max()) + 1] = 1
    weighted = ConceptMoments(x.shape[1], int(z.max()) + 1).update(x, z, copies.float())
    repeated = moments_of(x.repeat_interleave(copies, 0), z.repeat_interleave(copies, 0))
    assert weighted.rows == int((copies > 0).sum())
    assert weighted.weight == repeated.weight
    for name in ("mean_x", "mean_z", "covariance_x", "cross_covariance", "covariance_z"):
        assert torch.allclose(getattr(weighted, name), getattr(repeated, name), rtol=1e-11, atol=EXACT)
    # Only shrinkage depends on the number of rows, and copies are not independent rows.
    assert distance(weighted.eraser(shrinkage=None), repeated.eraser(shrinkage=None), x) < 1e-8
