"""Several concepts, each labelled on its own rows, erased together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_erasure.erasers import ConceptMoments, joint_moments

WIDTH = 12


def rows(seed: int, count: int, classes: int, mixing: Tensor) -> tuple[Tensor, Tensor]:
    """Correlated rows whose mean depends on the class."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.arange(count) % classes
    means = torch.randn(classes, WIDTH, generator=generator, dtype=torch.float64)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) @ mixing + means[z] + 3
    return x, z


def mixing(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) + torch.eye(WIDTH, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    classes=st.lists(st.integers(2, 4), min_size=1, max_size=3),
    counts=st.lists(st.integers(40, 90), min_size=3, max_size=3),
    method=st.sampled_from(["leace", "orth"]),
)
def test_the_joint_eraser_leaves_no_covariance_with_any_concept(
    seed: int, classes: list[int], counts: list[int], method: str
) -> None:
    shape = mixing(seed)
    data = [rows(seed + i, count, k, shape) for i, (k, count) in enumerate(zip(classes, counts, strict=False))]
    parts = [ConceptMoments(WIDTH, k).update(x, z) for k, (x, z) in zip(classes, data, strict=True)]
    eraser = joint_moments(parts).eraser(method)
    assert eraser.rank == sum(classes) - len(classes)
    for k, (x, z) in zip(classes, data, strict=True):
        before, after = (ConceptMoments(WIDTH, k).update(y, z).cross_covariance.abs().max() for y in (x, eraser(x)))
        # The bound is float64 rounding times the condition number of the covariance, which is below 1e4 here.
        assert after <= 1e-11 * before


def test_on_the_same_rows_it_is_the_eraser_of_the_concepts_side_by_side() -> None:
    x, gender = rows(0, 400, 2, mixing(0))
    _, pos = rows(1, 400, 3, mixing(0))
    pos = pos[torch.randperm(400, generator=torch.Generator().manual_seed(2))]
    x = x + torch.nn.functional.one_hot(pos, 3).double() @ torch.randn(3, WIDTH, dtype=torch.float64)
    both = torch.cat([torch.nn.functional.one_hot(z).double() for z in (gender, pos)], dim=1)
    joint = joint_moments([ConceptMoments(WIDTH, 2).update(x, gender), ConceptMoments(WIDTH, 3).update(x, pos)])
    # Rows with two concepts count twice, which shrinkage would treat as more evidence.
    ours = joint.eraser(shrinkage=None)
    theirs = ConceptMoments(WIDTH, 5).update(x, both).eraser(shrinkage=None)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)


def test_mean_and_covariance_are_those_of_all_rows() -> None:
    one, other = rows(0, 50, 2, mixing(1)), rows(1, 80, 3, mixing(2))
    joint = joint_moments([ConceptMoments(WIDTH, 2).update(*one), ConceptMoments(WIDTH, 3).update(*other)])
    everything = torch.cat([one[0], other[0]])
    torch.testing.assert_close(joint.mean_x, everything.mean(0))
    torch.testing.assert_close(joint.covariance_x, torch.cov(everything.T, correction=0))


def test_one_concept_stays_as_it_is_and_none_is_refused() -> None:
    part = ConceptMoments(WIDTH, 2).update(*rows(0, 50, 2, mixing(1)))
    assert joint_moments([part]) is part
    with pytest.raises(ValueError, match="parts is empty"):
        joint_moments([])


def test_a_concept_that_does_not_vary_is_refused() -> None:
    x, z = rows(0, 50, 2, mixing(1))
    parts = [ConceptMoments(WIDTH, 2).update(x, z), ConceptMoments(WIDTH, 3).update(x, torch.zeros_like(z))]
    with pytest.raises(ValueError, match="Only one class is present"):
        joint_moments(parts)
