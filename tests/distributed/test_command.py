"""`hf-erasure fit` in several processes; one of the tests starts them as a user does, with torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_erasure.recipes.occupations import occupation_sentences
from tests.distributed.launching import launch
from tests.prepared import command, run_command, together

# Activations are float32: two batches of 20 rows round differently from one of 40, and the solve multiplies that by the
# condition number of the covariance. test_fits compares float64 statistics to 1e-12.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def recipe(short_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    data = occupation_sentences()
    for split, rows in (("train", 201), ("test", 81)):  # shares of different length
        data[split].shuffle(seed=0).select(range(rows)).to_json(folder / "data" / f"{split}.jsonl")
    content = {
        "model": str(short_assets / "models" / "story-mlm"),
        "concept": "gender",
        "labels": ["female", "male"],
        "output": str(folder / "out"),
        "data": {"source": str(folder / "data"), "label_column": "gender", "keep_column": "field"},
        "fit": {"sequential": True, "pool": "mean", "batch_size": 40},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def expected(recipe: Path) -> dict[str, torch.Tensor]:
    """The eraser maps that one process writes."""
    run = command("fit", recipe, "--no-progress", folder=recipe.parent)
    assert run.returncode == 0, run.stderr
    return maps(recipe.parent / "out")


def maps(folder: Path) -> dict[str, torch.Tensor]:
    """`left @ right` of every site."""
    tensors = load_file(folder / "adapter_model.safetensors")
    lefts = {key: value for key, value in tensors.items() if "_left" in key}
    return {key: value @ tensors[key.replace("_left", "_right")] for key, value in lefts.items()}


@pytest.mark.parametrize("streaming", [False, True])
def test_torchrun_fits_what_one_process_fits_and_the_first_process_writes(
    streaming: bool, recipe: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    overrides = [f"output={tmp_path / 'out'}", f"data.streaming={str(streaming).lower()}"]
    words = ["fit", str(recipe), *overrides, "--processes", "2", "--no-progress"]
    if streaming:
        status, printed = together(2, run_command, words, folder=tmp_path)
    else:
        # The only test that starts torchrun itself, since torchrun does the same for any program.
        status, printed = launch(2, "hf_erasure.cli", *words, folder=tmp_path)
    assert status == 0, printed
    assert printed.count("Probe accuracy") == 1
    found = maps(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= TOLERANCE * float(value.abs().max()), name


def test_fewer_processes_than_asked_for_are_an_error(recipe: Path, tmp_path: Path) -> None:
    run = command("fit", recipe, "--processes", 2, folder=tmp_path)
    assert run.returncode == 2
    assert "--processes 2: only 1 of them run. Start them with torchrun" in run.stderr
