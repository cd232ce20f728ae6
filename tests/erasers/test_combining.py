"""One eraser for several concepts: properties that hold for any erasers, tested with hypothesis.

A covariance that is left is measured relative to its length in units of the features' spread. `EXACT` is float64
rounding, 2e-16, over the smallest cosine that is divided by, 1e-5, with room for condition numbers.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_erasure.erasers import ConceptMoments, Eraser, combine_erasers
from tests.erasers.data import as_values, leak, rows

EXACT = 1e-10
laws = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
widths = st.integers(8, 24)
classes = st.lists(st.integers(2, 4), min_size=2, max_size=3)


def problem(width: int, classes: list[int], seed: int, n: int = 300) -> tuple[Tensor, list[Tensor]]:
    """Rows whose mean depends on several concepts, and the values of each concept."""
    x, first = rows(n, width, classes[0], seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    concepts = [as_values(first, classes[0])]
    for k in classes[1:]:
        z = torch.randint(k, (n,), generator=generator)
        z[:k] = torch.arange(k)
        # Half of the rows take the class of the first concept, so that the concepts are correlated.
        z = torch.where(torch.rand(n, generator=generator) < 0.5, first % k, z)
        x = x + torch.randn(k, width, generator=generator, dtype=torch.float64)[z]
        concepts.append(as_values(z, k))
    return x, concepts


def moments(x: Tensor, z: Tensor) -> ConceptMoments:
    return ConceptMoments(x.shape[1], z.shape[1]).update(x, z)


def fitted(x: Tensor, concepts: list[Tensor], method: str = "leace", **options: object) -> list[Eraser]:
    return [moments(x, z).eraser(method, **options) for z in concepts]


def unrelated(x: Tensor, concepts: list[Tensor], seed: int) -> list[Eraser]:
    """Erasers of the concepts, each with another, unrelated covariance of x."""
    found = []
    for number, z in enumerate(concepts):
        other = rows(300, x.shape[1], 2, seed=seed + 17 + number)[0]
        background = ConceptMoments(x.shape[1], 0).update(other)
        found.append(moments(x, z).eraser(background=background))
    return found


def away(one: Eraser, other: Eraser, x: Tensor) -> float:
    """The largest difference of two maps on rows, relative to the spread of a feature."""
    return float(((one(x) - other(x)).abs() / x.std(0)).max())


# ---- laws ------------------------------------------------------------------------------------------------------------


@laws
@given(widths, classes, seeds, st.sampled_from(["leace", "orth", "unrelated"]), st.booleans())
def test_every_covariance_is_removed(width: int, classes: list[int], seed: int, kind: str, affine: bool) -> None:
    x, concepts = problem(width, classes, seed)
    erasers = unrelated(x, concepts, seed) if kind == "unrelated" else fitted(x, concepts, kind, affine=affine)
    joint = combine_erasers(erasers)
    for z, eraser in zip(concepts, erasers, strict=True):
        assert leak(joint(x), z, x) < EXACT
        cross = eraser.left / eraser.left.norm(dim=0)
        assert float((joint.matrix @ cross).abs().max()) < EXACT


@laws
@given(widths, classes, seeds, st.booleans())
def test_idempotent(width: int, classes: list[int], seed: int, shared: bool) -> None:
    x, concepts = problem(width, classes, seed)
    joint = combine_erasers(fitted(x, concepts) if shared else unrelated(x, concepts, seed))
    identity = torch.eye(joint.rank, dtype=torch.float64)
    assert float((joint.right @ joint.left - identity).abs().max()) < EXACT
    once = joint(x)
    assert float(((joint(once) - once).abs() / x.std(0)).max()) < EXACT


@laws
@given(widths, classes, seeds, st.booleans())
def test_the_order_does_not_matter(width: int, classes: list[int], seed: int, shared: bool) -> None:
    x, concepts = problem(width, classes, seed)
    erasers = fitted(x, concepts) if shared else unrelated(x, concepts, seed)
    assert away(combine_erasers(erasers), combine_erasers(erasers[::-1]), x) < EXACT


@laws
@given(widths, classes, seeds, st.sampled_from(["leace", "orth"]))
def test_combining_with_itself_changes_nothing(width: int, classes: list[int], seed: int, method: str) -> None:
    x, concepts = problem(width, classes, seed)
    (eraser, *_) = fitted(x, concepts, method)
    twice = combine_erasers([eraser, eraser])
    assert twice.rank == eraser.rank
    assert away(twice, eraser, x) < EXACT
    # The same holds if the eraser is written in other vectors of the same spans.
    mixing = torch.eye(eraser.rank, dtype=torch.float64) + 0.5 * torch.ones(eraser.rank, eraser.rank).triu(1)
    other = Eraser(eraser.left @ mixing, torch.linalg.solve(mixing, eraser.right), eraser.bias)
    assert combine_erasers([eraser, other]).rank == eraser.rank
    assert away(combine_erasers([eraser, other]), eraser, x) < EXACT


@laws
@given(st.integers(12, 24), st.lists(st.integers(2, 4), min_size=3, max_size=3), seeds)
def test_the_rank_is_the_dimension_of_the_span(width: int, classes: list[int], seed: int) -> None:
    x, (one, two, three) = problem(width, classes, seed)
    pairs = [torch.cat(pair, dim=1) for pair in ((one, two), (two, three), (three, one))]
    erasers = fitted(x, pairs)
    expected = sum(k - 1 for k in classes)
    assert combine_erasers(erasers[:1]).rank == classes[0] + classes[1] - 2
    assert combine_erasers(erasers[:2]).rank == expected
    assert combine_erasers(erasers).rank == expected
    spread = x.std(0)[:, None]
    assert torch.linalg.matrix_rank(torch.cat([e.left for e in erasers], dim=1) / spread, rtol=1e-9) == expected


@laws
@given(widths, classes, seeds, st.sampled_from(["leace", "orth"]), st.booleans(), st.booleans())
def test_equals_the_eraser_of_the_joint_concept(
    width: int, classes: list[int], seed: int, method: str, affine: bool, overlap: bool
) -> None:
    """The erasers have the same rows and the same background; with overlap, one concept contains two others."""
    x, concepts = problem(width, classes, seed)
    together = torch.cat(concepts, dim=1)
    background = ConceptMoments(width, 0).update(rows(300, width, 2, seed=seed + 1)[0] + 1)
    parts = [*concepts, torch.cat(concepts[:2], dim=1)] if overlap else concepts
    for options in ({"affine": affine}, {"affine": affine, "background": background}):
        erasers = fitted(x, parts, method, **options)
        joint = moments(x, together).eraser(method, **options)
        combined = combine_erasers(erasers, [300.0] * len(erasers))
        assert combined.rank == joint.rank
        assert away(combined, joint, x) < EXACT
        assert (combined.bias is None) == (not affine)
        if affine:
            torch.testing.assert_close(combined.bias, joint.bias, rtol=1e-13, atol=1e-13)


@laws
@given(widths, classes, seeds, st.sampled_from([1, 4, 8]))
def test_the_scale_of_the_features_does_not_matter(width: int, classes: list[int], seed: int, decades: int) -> None:
    """Language models have features of very large scale, and features that a trained norm has switched off."""
    x, concepts = problem(width, classes, seed)
    scale = 10 ** torch.linspace(-decades, decades, width, dtype=torch.float64)
    erasers = unrelated(x, concepts, seed)
    scaled = [Eraser(e.left * scale[:, None], e.right / scale, e.bias * scale) for e in erasers]
    found, expected = combine_erasers(scaled), combine_erasers(erasers)
    assert found.rank == expected.rank
    assert float(((found(x * scale) / scale - expected(x)).abs() / x.std(0)).max()) < EXACT


@laws
@given(widths, seeds)
def test_combining_is_associative_where_the_covariance_is_shared(width: int, seed: int) -> None:
    x, concepts = problem(width, [2, 3, 2], seed)
    one, two, three = fitted(x, concepts)
    step = combine_erasers([combine_erasers([one, two], [1, 1]), three], [2, 1])
    assert away(step, combine_erasers([one, two, three]), x) < EXACT


@laws
@given(widths, classes, seeds)
def test_erasers_as_an_adapter_keeps_them(width: int, classes: list[int], seed: int) -> None:
    """In float32, two erasers of the same concept differ in the last digits."""
    x, concepts = problem(width, classes, seed)
    (first, *_), doubles = (kept := [e.to(dtype=torch.float32) for e in fitted(x, concepts)]), fitted(x, concepts)
    generator = torch.Generator().manual_seed(seed)
    noise = 1 + 6e-8 * torch.randn(first.left.shape, generator=generator)
    nearly = Eraser(first.left * noise, first.right * noise.T, first.bias)
    assert combine_erasers([first, nearly]).rank == first.rank
    joint = combine_erasers([*kept, nearly])
    assert joint.rank == combine_erasers(doubles).rank
    # float32 rounds the left factors by 6e-8.
    assert max(leak(joint(x), z, x) for z in concepts) < 1e-5


# ---- one after the other ---------------------------------------------------------------------------------------------


def test_one_eraser_after_another_leaves_a_part_of_the_second_concept():
    x, (one, two) = problem(16, [2, 3], seed=3)
    first, second = fitted(x, [one, two])
    for (a, z), (b, w) in (((first, one), (second, two)), ((second, two), (first, one))):
        in_turn = b(a(x))
        assert leak(in_turn, z, x) < EXACT
        assert leak(in_turn, w, x) > 1e-2
    joint = combine_erasers([first, second])
    assert max(leak(joint(x), z, x) for z in (one, two)) < EXACT
    # The single eraser may come before or after: a covariance of zero stays zero under any linear map.
    for sequence in (lambda x: joint(first(x)), lambda x: first(joint(x))):
        assert max(leak(sequence(x), z, x) for z in (one, two)) < EXACT


def test_an_eraser_fitted_behind_another_removes_both_with_it():
    x, (one, two) = problem(16, [2, 3], seed=3)
    first = moments(x, one).eraser()
    behind = moments(first(x), two).eraser()
    assert max(leak(behind(first(x)), z, x) for z in (one, two)) < EXACT
    joint = combine_erasers([first, behind])
    assert max(leak(joint(x), z, x) for z in (one, two)) < EXACT


# ---- where the readings cannot tell the directions apart -------------------------------------------------------------


def blind(angle: float) -> list[Eraser]:
    """Two erasers whose readings are nearly the same on the joint span: `R L` has a singular value of about `angle`."""
    left = torch.eye(5, dtype=torch.float64)[:, :2]
    rights = torch.tensor([[1.0, 1.0, 0, 0, 0], [1.0, 1.0 + angle, 0.5, 0, 0]], dtype=torch.float64)
    rights = torch.stack([rights[0], rights[1] / rights[1, 1]])
    return [Eraser(left[:, i : i + 1], rights[i : i + 1], None) for i in range(2)]


@pytest.mark.parametrize("angle", [0.0, 1e-14, 1e-9, 1e-3, 1.0])
def test_a_direction_that_no_right_tells_apart_is_read_by_itself(angle: float):
    erasers = blind(angle)
    joint = combine_erasers(erasers)
    assert joint.rank == 2
    for eraser in erasers:
        assert float((joint.matrix @ eraser.left).abs().max()) < EXACT
    # If it divided by that singular value, the projection would have a norm of 1 / angle.
    norm = float(torch.linalg.matrix_norm(torch.eye(5, dtype=torch.float64) - joint.matrix, 2))
    assert norm < (10 if angle < 1e-5 else 10 / angle)


def test_the_same_left_with_other_rights_is_read_where_it_shows_best():
    x, concepts = problem(12, [2, 2], seed=9)
    one, other = unrelated(x, [concepts[0]] * 2, seed=9)
    joint = combine_erasers([one, other])
    assert joint.rank == 1 and leak(joint(x), concepts[0], x) < EXACT
    assert away(joint, combine_erasers([other, one]), x) < EXACT


# ---- means, ranks, refusals ------------------------------------------------------------------------------------------


def test_means_are_weighted():
    x, concepts = problem(8, [2, 2], seed=0)
    one, two = fitted(x, concepts)
    two = Eraser(two.left, two.right, two.bias + 4)
    torch.testing.assert_close(combine_erasers([one, two]).bias, one.bias + 2)
    torch.testing.assert_close(combine_erasers([one, two], [3, 1]).bias, one.bias + 1)
    assert combine_erasers(fitted(x, concepts, affine=False)).bias is None


def test_an_eraser_of_rank_zero_counts_for_nothing():
    x, concepts = problem(8, [2, 2], seed=0)
    one, two = fitted(x, concepts)
    empty = Eraser(one.left[:, :0], one.right[:0], one.bias + 100)
    assert away(combine_erasers([one, empty]), one, x) == 0
    assert away(combine_erasers([one, empty, two], [1, 5, 1]), combine_erasers([one, two]), x) == 0
    assert combine_erasers([empty, empty]).rank == 0
    assert torch.equal(combine_erasers([one, empty, two], [0, 1, 0]).bias, (one.bias + two.bias) / 2)


def test_the_whole_space():
    """There are as many concepts as features, so everything is erased."""
    x, concepts = problem(4, [3, 3, 2], seed=2)
    joint = combine_erasers(fitted(x, concepts))
    assert joint.rank == 4
    assert float((joint(x) - joint.bias).abs().max()) < EXACT


def test_refusals():
    x, concepts = problem(8, [2, 2], seed=0)
    one, two = fitted(x, concepts)
    with pytest.raises(ValueError, match="erasers is empty"):
        combine_erasers([])
    narrow = Eraser(one.left[:4], one.right[:, :4], one.bias[:4])
    with pytest.raises(ValueError, match=r"different widths \[4, 8\]"):
        combine_erasers([one, narrow])
    with pytest.raises(ValueError, match="fit all of them with the same affine"):
        combine_erasers([one, Eraser(two.left, two.right, None)])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(ValueError, match="give one for each of the 2 erasers, none negative"):
            combine_erasers([one, two], weights)
