"""Two processes that share the data end with the same erasers as one process with all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.distributed import fits
from tests.prepared import together as run_together

# Statistics and solve are float64 on float64 activations. Sums in another order change the moments by a few times 1e-16
# relative, which the solve multiplies by the condition number of the covariance, about 1e3 on these models.
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def alone() -> dict[fits.Fit, tuple[dict[str, Tensor], int]]:
    """A cache for the results of one process, which all shares are compared with."""
    return {}


@pytest.fixture(scope="module")
def ran() -> dict[tuple[str, tuple[int, ...]], Path]:
    """A cache: (shares, numbers of fits) → the folder that two processes wrote."""
    return {}


@pytest.fixture
def together(
    shares: str,
    numbers: tuple[int, ...],
    ran: dict[tuple[str, tuple[int, ...]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder that two processes wrote these fits to; all tests of one way of sharing use the same folder."""
    if (shares, numbers) not in ran:
        folder = tmp_path_factory.mktemp("fits")
        status, printed = run_together(2, fits.main, folder, shares, numbers, folder=folder)
        assert status == 0, printed
        ran[shares, numbers] = folder
    return ran[shares, numbers]


CELLS = [
    pytest.param(shares, numbers, number, id=f"{shares}-{fits.FITS[number]}", marks=marks)
    for done, marks in ((fits.DONE, ()), (fits.LEFT, pytest.mark.slow))
    for shares, numbers in done.items()
    for number in numbers
]


@pytest.mark.parametrize(("shares", "numbers", "number"), CELLS)
def test_two_processes_end_as_one(
    shares: str,
    number: int,
    together: Path,
    alone: dict[fits.Fit, tuple[dict[str, Tensor], int]],
    matrix: Callable[[str, str, str, str], None],
) -> None:
    fit = fits.FITS[number]
    if fit not in alone:
        model, report = fits.fitted(fit)
        alone[fit] = fits.erasers(model), report.examples
    expected, examples = alone[fit]
    written = [read(together / f"{number}-{rank}") for rank in (0, 1)]
    assert [facts["world"] for _, facts in written] == ["2", "2"]
    assert [int(facts["examples"]) for _, facts in written] == [examples, examples]
    (first, _), (second, _) = written
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"the processes differ in {name}"
    for name, value in expected.items():
        assert float((first[name] - value).abs().max()) <= TOLERANCE * float(value.abs().max()), name
    four, one = fits.SHARES[shares]
    matrix("Fitting on two processes", str(fit), f"{four} + {one} batches", "same")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
