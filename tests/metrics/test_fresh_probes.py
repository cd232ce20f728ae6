"""The accuracy of fresh probes, by group and by row, and the accuracy that is expected of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_erasure.erasers import ConceptMoments, expected_accuracy
from hf_erasure.metrics import fresh_probes


def grouped(seed: int, own_way: float, concept: float) -> tuple[np.ndarray, list[str], list[int]]:
    """Rows of 20 distant groups; the label shows in a direction of each group (`own_way`) and in a common one."""
    draw = np.random.default_rng(seed)
    groups = np.repeat(np.arange(20), 40)
    labels = draw.integers(0, 2, len(groups))
    own = draw.normal(size=(20, 64))
    x = draw.normal(size=(len(groups), 64)) + 3 * own[groups]
    x += own_way * (2 * labels[:, None] - 1) * np.roll(own, 7, axis=1)[groups]
    x[:, 0] += concept * (2 * labels - 1)
    return x, ["female" if label else "male" for label in labels], groups.tolist()


def test_what_a_probe_reads_of_groups_it_knows_is_told_apart() -> None:
    x, labels, groups = grouped(0, own_way=3.0, concept=0.0)
    found = fresh_probes.score(x, labels, groups, resamples=50)
    assert found["groups"] == 20
    # A split by rows shows the groups' own directions to the probe; a common direction does not exist.
    assert found["by_row"]["linear"]["accuracy"] > 0.8
    assert found["control"] > 0.8
    assert abs(found["by_group"]["linear"]["accuracy"] - 0.5) < 0.15
    low, high = found["by_group"]["linear"]["interval"]
    assert low <= found["by_group"]["linear"]["accuracy"] <= high
    x, labels, groups = grouped(0, own_way=0.0, concept=8.0)
    assert fresh_probes.score(x, labels, groups, resamples=50)["by_group"]["linear"]["accuracy"] > 0.9


def test_the_control_label_has_a_majority_of_its_own() -> None:
    x, _, groups = grouped(0, own_way=0.0, concept=0.0)
    labels = ["male" if row % 5 else "female" for row in range(len(x))]  # 32 and 8 rows in each group
    found = fresh_probes.score(x, labels, groups, resamples=2)
    assert (found["majority"], found["control_majority"]) == (0.8, 0.5)
    assert 0.7 < found["control"] < 0.8  # groups are recognised, although the accuracy is below the label's majority


def test_readers_that_are_not_linear() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(400, 8))
    labels = (x[:, 0] * x[:, 1] > 0).tolist()
    found = fresh_probes.score(x, labels, readers=("linear", "rbf", "mlp"), folds=5, resamples=2)["by_group"]
    assert found["linear"]["accuracy"] < 0.6 < 0.7 < min(found["rbf"]["accuracy"], found["mlp"]["accuracy"])
    with pytest.raises(ValueError, match="probe='tree': write one of"):
        fresh_probes.score(x, labels, readers=("tree",))


def test_control_labels_are_exchanged_in_half_of_the_groups() -> None:
    labels, groups = ["a", "b", "c"] * 10, np.repeat(np.arange(10), 3).tolist()
    control = fresh_probes.control_labels(labels, groups)
    changed = {g for g, was, now in zip(groups, labels, control, strict=True) if was != now}
    assert len(changed) == 5
    assert all((was != now) == (g in changed) for g, was, now in zip(groups, labels, control, strict=True))


@pytest.mark.parametrize(("width", "fitted", "distance"), [(32, 200, 2.0), (64, 100, 4.0), (64, 400, 3.0)])
def test_the_expected_accuracy_is_what_the_best_probe_reaches(width: int, fitted: int, distance: float) -> None:
    """The best linear probe of two Gaussians, after an erasure that was fitted on other rows of them."""
    draw = torch.Generator().manual_seed(0)
    mean = torch.zeros(width, dtype=torch.float64)
    mean[0] = distance / 2
    normal = torch.distributions.Normal(0.0, 1.0)
    reached = []
    for _ in range(40):
        z = torch.arange(fitted) % 2
        x = torch.randn(fitted, width, generator=draw, dtype=torch.float64) + (2 * z[:, None] - 1) * mean
        eraser = ConceptMoments(width, 2).update(x, z).eraser(shrinkage=1.0)
        # The classes of erased rows are still Gaussians, so that the best probe is known.
        erase = eraser.matrix
        apart, spread = erase @ (2 * mean), erase @ erase.T
        reached.append(float(normal.cdf(torch.sqrt(apart @ torch.linalg.pinv(spread) @ apart) / 2)))
    before = float(normal.cdf(torch.tensor(distance / 2)))
    # Three standard errors of the mean of 40 fits.
    error = 3 * float(torch.tensor(reached).std()) / 40**0.5
    assert abs(float(np.mean(reached)) - expected_accuracy(before, width, fitted)) < error + 0.005


def test_expected_accuracy_at_its_ends() -> None:
    assert expected_accuracy(0.5, 384, 60) == 0.5
    assert expected_accuracy(0.9, 384, 1) == pytest.approx(0.9, abs=0.01)
    assert expected_accuracy(0.9, 384, 10**9) == pytest.approx(0.5, abs=0.001)
    with pytest.raises(ValueError, match="fitted=0"):
        expected_accuracy(0.9, 384, 0)
