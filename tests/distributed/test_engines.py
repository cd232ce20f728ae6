"""A fit with DeepSpeed gives the same erasers; a model that is split by tensor parallelism is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import launch

pytestmark = pytest.mark.slow


def found(way: str, folder: Path) -> list[dict[str, Any]]:
    """The results of each of two processes."""
    status, printed = launch(2, "tests.distributed.engines", way, str(folder), folder=folder)
    assert status == 0, printed
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_fits_and_outputs_under_zero_are_those_without(stage: int, tmp_path: Path) -> None:
    first, second = found(str(stage), tmp_path)
    assert first.pop("saved")
    assert first == second == dict.fromkeys(["erasers, sequential=False", "erasers, sequential=True", "outputs"], True)


def test_a_model_that_is_split_is_refused_before_it_is_changed(tmp_path: Path) -> None:
    for each in found("tensor parallel", tmp_path):
        assert each.pop("attached") == []
        assert set(each) == {"ConceptErasureConfig", "GradiendConfig"}
        assert all("without tp_plan" in sentence for sentence in each.values())
