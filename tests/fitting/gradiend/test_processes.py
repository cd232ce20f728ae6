"""Several processes estimate the same as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.fitting.gradiend import two_processes
from tests.prepared import together


def fitted(folder: Path, processes: int, estimator: str, *given: Any) -> list[tuple[dict[str, torch.Tensor], dict]]:
    """The tensors that each process ended with, and its metadata, such as the number of processes."""
    folder.mkdir()
    asked = (two_processes.main, folder, estimator, *given)
    status, printed = together(processes, *asked, folder=folder, ACCELERATE_USE_CPU="true")
    assert status == 0, printed
    found = []
    for path in sorted(folder.glob(f"{estimator}-*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            found.append((tensors, file.metadata()))
    return found


# Six rows, three of each class: with two processes and batches of one, only one process has a row in the last step of a
# class. With batches of three, a class is one batch, and the second process gets none.
@pytest.mark.parametrize(
    ("estimator", "alone", "together"),
    [("closed_form", 1, 1), ("closed_form", 3, 3), ("trained", 2, 1)],
)
def test_two_processes_end_as_one(estimator: str, alone: int, together: int, tmp_path: Path):
    ((one, facts),) = fitted(tmp_path / "one", 1, estimator, alone)
    two = fitted(tmp_path / "two", 2, estimator, together)
    assert facts["processes"] == "1"
    assert [other["processes"] for _, other in two] == ["2", "2"]
    for name, value in one.items():
        assert torch.equal(two[0][0][name], two[1][0][name]), name
        block = name.partition(".")[2]
        # A bias is half the sum of two class means and may cancel; a weight is half their difference.
        scale = max(float(one[f"{kind}.{block}"].abs().max()) for kind in ("weight", "bias"))
        difference = float((two[0][0][name] - value).abs().max())
        # The same float32 gradients, added in another order, differ by a few units of 2^-24. A trained neuron makes 8
        # steps with them, each of which divides by the root of a mean of squares.
        assert difference <= scale * (8 * 2**-24 if estimator == "closed_form" else 1e-3), name


@pytest.mark.parametrize("estimator", ["closed_form", "trained"])
def test_two_processes_stay_in_step_when_a_checkpoint_is_written_now_and_then(estimator: str, tmp_path: Path):
    plain = fitted(tmp_path / "plain", 2, estimator, 1)
    saving = fitted(tmp_path / "saving", 2, estimator, 1, "steps")
    assert list((tmp_path / "saving").glob("checkpoint-*"))
    for (one, _), (other, _) in zip(plain, saving, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)
