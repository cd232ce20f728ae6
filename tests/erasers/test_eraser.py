"""The frozen eraser, and the map it applies."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor

from hf_erasure.erasers import ConceptMoments, Eraser, apply_erasure
from tests.erasers.data import as_values, leak, moments_of, rows


def parts(d: int, rank: int, *, affine: bool = True, dtype: torch.dtype = torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(d, rank, generator=generator, dtype=dtype)
    right = torch.randn(rank, d, generator=generator, dtype=dtype)
    return left, right, torch.randn(d, generator=generator, dtype=dtype) if affine else None


def formula(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    x = x.double()
    return x - (x if bias is None else x - bias.double()) @ right.double().T @ left.double().T


@pytest.mark.parametrize("shape", [(7, 6), (6,), (2, 3, 6), (0, 6), (1, 1, 1, 6)])
@pytest.mark.parametrize("rank", [1, 2, 6])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("dtype", "unit"),  # relative to the result's dtype; sums of a dozen products round a few times
    [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_it_is_the_formula(shape: tuple, rank: int, affine: bool, dtype: torch.dtype, unit: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    erased = apply_erasure(x, *parts(6, rank, affine=affine))
    assert erased.dtype == dtype
    assert erased.shape == x.shape
    assert torch.allclose(erased.double(), formula(x, *parts(6, rank, affine=affine)), rtol=unit, atol=10 * unit)


def test_half_precision_rounds_once_only() -> None:
    """The arithmetic is in float32, so that the result is the exact one, rounded once."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = formula(x, *parts(64, 2))
    off = (apply_erasure(x, *parts(64, 2)).double() - exact).abs()
    # Half a unit in the last of 8 bits, and float32 rounding at numbers that cancel.
    assert bool((off <= exact.abs() * 2**-8 + 1e-4).all())


def test_rank_zero_returns_the_very_tensor() -> None:
    x = torch.randn(3, 6)
    assert apply_erasure(x, *parts(6, 0)) is x


def test_views_are_read_right() -> None:
    x = torch.randn(6, 5, 4).permute(1, 2, 0)
    assert torch.allclose(apply_erasure(x, *parts(6, 1)), apply_erasure(x.contiguous(), *parts(6, 1)), atol=1e-5)
    kept = x.clone()
    apply_erasure(x, *parts(6, 2))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("rank", [1, 3])
def test_autocast_does_not_lower_the_precision(rank: int) -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = apply_erasure(x, *parts(6, rank))
    assert torch.equal(inside, apply_erasure(x, *parts(6, rank)))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_gradients(rank: int, affine: bool) -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    factors = [None if t is None else t.requires_grad_() for t in parts(6, rank, affine=affine)]
    assert torch.autograd.gradcheck(apply_erasure, (x, *factors))


@pytest.mark.parametrize("rank", [1, 3])
def test_it_compiles_into_one_graph(rank: int) -> None:
    compiled = torch.compile(apply_erasure, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 6)
    assert torch.allclose(compiled(x, *parts(6, rank)), apply_erasure(x, *parts(6, rank)), atol=1e-5)  # as below


@pytest.mark.parametrize("rank", [1, 3])
def test_it_vectorises(rank: int) -> None:
    x, factors = torch.randn(5, 3, 6), parts(6, rank)
    mapped = torch.vmap(lambda row: apply_erasure(row, *factors))(x)
    assert torch.allclose(mapped, apply_erasure(x, *factors), atol=1e-5)  # sums of 6 float32 products, in another order


def test_it_runs_on_the_meta_device() -> None:
    factors = [t.to("meta") for t in parts(6, 2)]
    assert apply_erasure(torch.empty(3, 6, device="meta"), *factors).shape == (3, 6)


def test_what_cannot_be_erased_is_refused() -> None:
    with pytest.raises(TypeError, match=r"x has dtype torch.int64.*x.float\(\)"):
        apply_erasure(torch.ones(3, 6, dtype=torch.long), *parts(6, 1))
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\).*6"):
        apply_erasure(torch.ones(3, 5), *parts(6, 1))
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        apply_erasure(torch.tensor(1.0), *parts(6, 1))


def test_an_eraser_is_frozen_and_holds_copies() -> None:
    left, right, bias = parts(6, 2)
    eraser = Eraser(left, right, bias)
    before = eraser.left.clone()
    left.zero_()
    assert torch.equal(eraser.left, before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        eraser.left = right  # type: ignore[misc]


@pytest.mark.parametrize(
    ("left", "right", "bias", "message"),
    [
        (torch.ones(6), torch.ones(1, 6), None, "left has shape"),
        (torch.ones(6, 2), torch.ones(1, 6), None, r"right \(1, 6\)"),
        (torch.ones(6, 1), torch.ones(1, 6), torch.ones(5), r"bias has shape \(5,\)"),
    ],
)
def test_factors_that_do_not_fit_are_refused(left, right, bias, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Eraser(left, right, bias)


def test_properties_and_moves() -> None:
    x, z = rows(200, 6, 3)
    eraser = Eraser.fit(x, z)
    assert (eraser.x_dim, eraser.rank) == (6, 2)
    assert (eraser.left.dtype, eraser.right.dtype, eraser.bias.dtype) == (torch.float64,) * 3
    assert torch.allclose((x - eraser.bias) @ eraser.matrix.T + eraser.bias, eraser(x))
    single = eraser.to(dtype=torch.float32)
    assert (single.left.dtype, eraser.left.dtype) == (torch.float32, torch.float64)
    assert single.to("meta").bias.device.type == "meta"
    for other in (pickle.loads(pickle.dumps(eraser)), copy.deepcopy(eraser)):
        assert torch.equal(other(x), eraser(x))


def test_fit_is_the_short_form() -> None:
    x, z = rows(200, 6, 3)
    mask, weight = torch.arange(200) < 150, torch.rand(200)
    longhand = ConceptMoments(6, 3).update(x, z, weight, mask=mask).eraser("orth", rank=1, affine=False)
    short = Eraser.fit(x, z, "orth", weight=weight, mask=mask, rank=1, affine=False)
    assert torch.equal(short.left, longhand.left)
    assert short.bias is None
    continuous = as_values(z)[:, 0] + 0.5
    assert Eraser.fit(x, continuous).rank == 1
    assert Eraser.fit(x.view(20, 10, 6), z.view(20, 10)).rank == 2
    gone = torch.where(torch.arange(200) < 190, z, -100)
    assert leak(Eraser.fit(x, gone)(x[:190]), z[:190], x) < 1e-12  # float64 rounding
    with pytest.raises(TypeError, match="z is list"):
        Eraser.fit(x, z.tolist())
    with pytest.raises(TypeError, match="x is list"):
        Eraser.fit(x.tolist(), z)


def test_what_is_erased_is_not_erased_again() -> None:
    x, z = rows(2000, 12, 3)
    eraser = moments_of(x, z).eraser()
    again = moments_of(eraser(x), z).eraser()
    assert (eraser.rank, again.rank) == (2, 0)
    assert torch.equal(again(x), x)
