"""A process that fails ends the others with an error instead of a hang; finished work is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import failing
from tests.prepared import together

PROCEDURES = pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "one-pass"])
# Seconds; far less than the half hour for which a process waits for another before it raises an error.
DEADLINE = 120


@PROCEDURES
def test_a_process_that_dies_ends_the_others_and_a_new_start_goes_on_from_there(
    sequential: bool, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert together(2, failing.main, whole, "nothing", sequential, folder=whole)[0] == 0
    status, _ = together(2, failing.main, broken, "dies", sequential, folder=broken, timeout=DEADLINE)
    assert status != 0
    assert not list(broken.glob("done-*"))
    kept = "site-*" if sequential else "moments-labelled-*"
    assert list((broken / "fit").glob(kept)), "nothing was kept"
    status, printed = together(2, failing.main, broken, "nothing", sequential, folder=broken)
    assert status == 0, printed
    expected, continued = load_file(whole / "done-0"), load_file(broken / "done-1")
    assert all(torch.equal(value, continued[name]) for name, value in expected.items())


@PROCEDURES
def test_what_one_process_raises_is_told_in_all(sequential: bool, tmp_path: Path) -> None:
    status, printed = together(2, failing.main, tmp_path, "raises", sequential, folder=tmp_path, timeout=DEADLINE)
    assert status == 0, printed  # the script catches it
    other, own = ((tmp_path / f"error-{rank}").read_text() for rank in (0, 1))
    assert own.startswith("ValueError: ") and "7" in own
    assert other.startswith("AnotherProcessFailed: Process 1 failed while ") and "7" in other
    assert own.endswith("unfitted=True") and other.endswith("unfitted=True")


def test_shares_of_another_number_of_processes_are_refused(tmp_path: Path) -> None:
    assert together(2, failing.main, tmp_path, "nothing", False, folder=tmp_path)[0] == 0
    assert together(3, failing.main, tmp_path, "nothing", False, folder=tmp_path)[0] == 0
    assert "holds a fit with processes=2, this one has 3" in (tmp_path / "error-0").read_text()
