"""Mean projection against a computation by hand, and its equality with SAL (`orth`) for classes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_erasure import ConceptErasureConfig, fit_concept_erasure, verify_adapter
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import ConceptMoments, Eraser
from tests.erasers.data import as_values, leak, moments_of, rows
from tests.small_models import LABELS, small_batches, small_model

problems = st.builds(
    lambda n, d, k, seed: rows(n, d, k, seed=seed),
    n=st.integers(150, 400),
    d=st.integers(3, 16),
    k=st.integers(2, 5),
    seed=st.integers(0, 2**31 - 1),
)
laws = settings(max_examples=40, deadline=None, derandomize=True)


def class_means(x: Tensor, z: Tensor) -> Tensor:
    return torch.stack([x[z == label].mean(0) for label in z.unique()])


def test_two_classes_by_hand() -> None:
    x, z = rows(300, 7, 2)
    mean = class_means(x, z)
    line = (mean[1] - mean[0]) / (mean[1] - mean[0]).norm()
    expected = x - torch.outer((x - x.mean(0)) @ line, line)
    assert torch.allclose(Eraser.fit(x, z, "mean_projection")(x), expected, atol=1e-12)  # float64 rounding
    linear = Eraser.fit(x, z, "mean_projection", affine=False, keep_mean=False)
    assert torch.allclose(linear(x), x - torch.outer(x @ line, line), atol=1e-12)


@laws
@given(problems)
def test_it_projects_the_class_means_onto_one_point(problem: tuple[Tensor, Tensor]) -> None:
    x, z = problem
    eraser = Eraser.fit(x, z, "mean_projection")
    means = class_means(eraser(x), z)
    assert torch.allclose(means, x.mean(0).expand_as(means), atol=1e-11)  # float64 rounding
    assert torch.allclose(eraser.matrix @ eraser.matrix, eraser.matrix, atol=1e-12)
    assert torch.equal(eraser.right, eraser.left.T)
    assert eraser.rank == min(int(z.max()), x.shape[1])
    assert leak(eraser(x), z, x) < 1e-12


@laws
@given(problems)
def test_for_classes_it_is_orth(problem: tuple[Tensor, Tensor]) -> None:
    x, z = problem
    assert torch.allclose(Eraser.fit(x, z, "mean_projection").matrix, Eraser.fit(x, z, "orth").matrix, atol=1e-10)


def test_a_capped_rank_counts_classes_alike_where_orth_counts_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.repeat_interleave(torch.arange(3), torch.tensor([1000, 1000, 20]))
    means = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    x = means[z] + 0.01 * torch.randn(2020, 3, generator=generator, dtype=torch.float64)
    first = Eraser.fit(x, z, "mean_projection", rank=1).left[:, 0].abs()
    differences = class_means(x, z) - x.mean(0)
    expected = np.linalg.svd(differences.numpy())[2][0]
    assert torch.allclose(first, torch.from_numpy(np.abs(expected)), atol=1e-10)
    assert float(first[1]) > 0.99  # the rare class is farthest from the others
    assert float(Eraser.fit(x, z, "orth", rank=1).left[0, 0].abs()) > 0.99  # the two common classes vary most


def test_weights_are_repeated_rows_and_absent_classes_do_not_count() -> None:
    x, z = rows(200, 5, 3)
    times = torch.randint(1, 4, (200,), generator=torch.Generator().manual_seed(1))
    weighted = ConceptMoments(5, 6).update(x, z, times.double()).eraser("mean_projection", rank=1)
    repeated = moments_of(x.repeat_interleave(times, 0), z.repeat_interleave(times)).eraser("mean_projection", rank=1)
    assert torch.allclose(weighted.matrix, repeated.matrix, atol=1e-12)  # float64 rounding


def test_values_have_no_class_means() -> None:
    x, z = rows(100, 5, 3)
    with pytest.raises(ValueError, match=r"no class means: give integer ids, or take 'orth'"):
        Eraser.fit(x, as_values(z), "mean_projection")
    with pytest.raises(ValueError, match=r"concept_dim=2 has no classes: give labels, or take method='orth'"):
        ConceptErasureConfig(concept="score", concept_dim=2, method="mean_projection")


def test_an_adapter_of_mean_projection_is_that_of_orth() -> None:
    batches, states = small_batches("bert", 4), {}
    for method in ("orth", "mean_projection"):
        model = copy.deepcopy(small_model("bert"))
        model.add_adapter(ConceptErasureConfig(concept="gender", labels=LABELS, method=method), adapter_name="e")
        fit_concept_erasure(model, batches, "e", progress=False)
        assert verify_adapter(model, "e")
        states[method] = {site: layer.eraser_state("e") for site, layer in erasure_layers(model, "e").items()}
    for site, (left, right, bias) in states["orth"].items():
        other = states["mean_projection"][site]
        # Deeper sites are fitted on float32 activations that were erased with maps that differ by rounding.
        assert torch.allclose(other[0] @ other[1], left @ right, atol=1e-4)
        assert torch.allclose(other[2], bias, atol=1e-4)
