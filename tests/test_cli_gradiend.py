"""`hf-erasure gradiend`, as a user types it: fit a recipe, measure again in another process, steer, encode."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM
from typer.testing import CliRunner

from hf_erasure import GradiendAdapter, verify_adapter
from hf_erasure.cli import app
from tests.fitting.gradiend.language_models import model_of, tokenizer_of
from tests.prepared import command, run_command, together

FILLERS = {"female": ["the queen", "the nurse"], "male": ["the king", "the doctor"]}
FILES = {
    "adapter_config.json", "adapter_model.safetensors", "encoded.png", "grid.csv", "recipe.yaml", "results.csv",
    "results.json", "surface.png",
}  # fmt: skip


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["gradiend", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradiend")
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    # The model is right at some masked tokens of neutral texts: otherwise every goal is 0, with any edit.
    model.cls.predictions.bias.data[tokenizer.convert_tokens_to_ids("a")] += 2
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    content = {
        "model": str(folder / "model"),
        "feature": "gender",
        "classes": ["female", "male"],
        "output": str(folder / "out"),
        "config": {"density": 0.1},
        "arguments": {"per_device_train_batch_size": 2},
        "select": {
            "goal": ["fpi", "bpi"], "budget": 0.5, "feature_factors": [1, -1], "learning_rates": [0.1, 0.01, -0.01],
        },
        "data": {
            "defaults": {"fillers": FILLERS, "words": {"female": ["she"], "male": ["he"]}},
            "train": {"templates": ["{name} went home because [FEATURE] was late", "{name} ate and [FEATURE] ran"]},
            "choice": {"templates": ["{name} said [FEATURE] was happy"]},
            "test": {"templates": ["here {name} ran to the hill because [FEATURE] was fast"]},
            "neutral": [f"a dog {verb} over the {place} it was {how}" for verb in ("ran", "went") for place in
                        ("hill", "bread") for how in ("late", "fast")],
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def fitted(recipe: Path) -> tuple[Path, str]:
    folder = recipe.parent / "fitted"
    code, printed, errors = invoke("fit", recipe, f"output={folder}", "--no-progress")
    assert code == 0, errors
    return folder, printed


@pytest.fixture
def copied(fitted: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted[0], tmp_path / "out"))


def test_fit_prints_both_tables_and_writes_adapter_figures_and_results(fitted: tuple[Path, str]) -> None:
    folder, printed = fitted
    assert {path.name for path in folder.iterdir()} >= FILES
    for expected in (
        "cor_enc",
        "acc_enc",
        "female/male",
        "P(female)",
        "none",
        "fpi",
        "bpi",
        "cost",
        "steered for 'fpi'",
    ):
        assert expected in printed
    results = json.loads((folder / "results.json").read_text())
    assert list(results["edits"]) == ["none", "fpi", "bpi"]
    assert results["rows"]["train texts"] == 8
    card = (folder / "README.md").read_text()
    assert "On the recipe's test split:" in card and "FPI, which the edit was chosen for" in card
    assert "| labels | 2 sentence templates of the recipe, filled with words of each class |" in card
    assert "](encoded.png)" in card and "](surface.png)" in card


def test_two_processes_share_the_gradients_and_the_first_writes(
    recipe: Path, fitted: tuple[Path, str], tmp_path: Path
) -> None:
    overrides = [f"output={tmp_path / 'out'}", "config.density=1.0"]
    words = ["gradiend", "fit", str(recipe), *overrides, "--processes", "2", "--no-progress"]
    status, printed = together(2, run_command, words, folder=tmp_path)
    assert status == 0, printed
    assert printed.count("On the test data:") == 1
    code, _, errors = invoke("fit", recipe, f"output={tmp_path / 'alone'}", "config.density=1.0", "--no-progress")
    assert code == 0, errors
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "out"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        # The same float32 gradients, added in another order.
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6 * max(float(value.abs().max()), 1e-30))


def test_the_folder_is_an_adapter_that_is_steered_and_can_encode(fitted: tuple[Path, str]) -> None:
    folder, _ = fitted
    model = AutoModelForMaskedLM.from_pretrained(folder.parent / "model")
    model.load_adapter(str(folder), adapter_name="gender")
    chosen = json.loads((folder / "results.json").read_text())["chosen"]["fpi"]
    config = GradiendAdapter.of(model, "gender").config
    assert (config.feature_factor, config.learning_rate) == (chosen["feature_factor"], chosen["learning_rate"])
    assert config.keep_encoder
    if chosen["learning_rate"]:
        assert verify_adapter(model, "gender")


def test_evaluate_reproduces_the_results_in_a_second_process(fitted: tuple[Path, str], tmp_path: Path) -> None:
    result = command("gradiend", "evaluate", fitted[0], "--no-progress", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith(": same")
    # The tables are the same; above them, the output of the fit also has the numbers of rows.
    tables = fitted[1].partition("On the test data:\n\n")[2].partition("\n\nadapter:")[0]
    assert result.stdout.startswith(tables)


def test_evaluate_fails_where_the_folder_says_something_else(copied: Path) -> None:
    results = json.loads((copied / "results.json").read_text())
    results["edits"]["bpi"]["P(male)"] += 0.01
    (copied / "results.json").write_text(json.dumps(results))
    code, printed, _ = invoke("evaluate", copied, "--no-progress")
    assert code == 1
    assert "1.0e-02: NOT THE SAME" in printed


def test_select_steers_to_another_goal_and_saves_it(copied: Path) -> None:
    code, printed, errors = invoke("select", copied, "male", "--budget", "0.9", "--no-progress")
    assert code == 0, errors
    assert "steered for 'male'" in printed
    results = json.loads((copied / "results.json").read_text())
    assert results["saved"] == "male"
    assert set(results["edits"]) == {"none", "male", "fpi", "bpi"}
    config = json.loads((copied / "adapter_config.json").read_text())
    assert config["learning_rate"] == results["chosen"]["male"]["learning_rate"]
    assert results["edits"]["male"]["P(male)"] >= results["edits"]["none"]["P(male)"]
    assert invoke("evaluate", copied, "--no-progress")[0] == 0


def test_select_says_that_no_edit_was_better(copied: Path) -> None:
    recipe = yaml.safe_load((copied / "recipe.yaml").read_text())
    recipe["select"]["learning_rates"] = [100.0]  # too strong for any goal
    (copied / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, printed, errors = invoke("select", copied, "male", "--no-progress")
    assert code == 0, errors
    assert "not steered, since no edit was better for 'male'" in printed
    assert json.loads((copied / "adapter_config.json").read_text())["learning_rate"] == 0


def test_encode_writes_a_value_a_text(fitted: tuple[Path, str], tmp_path: Path) -> None:
    texts = pd.DataFrame(
        {
            "text": [
                "the queen ran because [FEATURE] was late",
                "the king ran because [FEATURE] was late",
                "it ate bread",
            ],
            "factual": ["she", "he", None],
        }
    )
    texts.to_csv(tmp_path / "texts.csv", index=False)
    code, printed, errors = invoke(
        "encode", fitted[0], tmp_path / "texts.csv", "--output", tmp_path / "values.csv", "--no-progress"
    )
    assert code == 0, errors
    assert "each read at one of its tokens: 1" in errors
    assert printed.startswith("3 texts: ")
    values = pd.read_csv(tmp_path / "values.csv")
    assert list(values.columns) == ["text", "factual", "female/male"]
    assert values["female/male"][0] > 0.5 > -0.5 > values["female/male"][1]
    # Without --output the table is printed, and nothing else.
    assert (
        invoke("encode", fitted[0], tmp_path / "texts.csv", "--no-progress")[1] == (tmp_path / "values.csv").read_text()
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("output", "holds no finished run: run `hf-erasure gradiend fit"),
        ("factual", "'queen' is not a word of the recipe (he, she"),
        ("column", "has no column 'text'"),
        ("goal", "goal='mother' is not defined for the classes"),
        ("colour=red", "colour is not known"),
        ("config.colour=red", "config.colour is not known in a recipe; config has "),
        ("arguments.colour=red", "arguments.colour is not known in a recipe; arguments has "),
        ("model=nowhere", "model nowhere cannot be loaded"),
        ("task=causal data.test.templates=['[FEATURE] {name}']", "do not predict the next one"),
        ("data.test.templates=['{name} said [FEATURE] was happy']", "data.choice and data.test share 4 texts"),
    ],
)
def test_errors_are_one_sentence(
    fitted: tuple[Path, str], recipe: Path, tmp_path: Path, change: str, said: str
) -> None:
    pd.DataFrame({"text": ["the [FEATURE]"], "factual": ["queen"]}).to_csv(tmp_path / "factual.csv", index=False)
    pd.DataFrame({"words": ["the"]}).to_csv(tmp_path / "column.csv", index=False)
    (tmp_path / "output").mkdir()
    commands = {
        "output": ("evaluate", tmp_path / "output"),
        "factual": ("encode", fitted[0], tmp_path / "factual.csv"),
        "column": ("encode", fitted[0], tmp_path / "column.csv"),
        "goal": ("select", fitted[0], "mother"),
    }
    entries = [change] if " data" not in change else ["task=causal", change.partition(" ")[2]]
    command = commands.get(change, ("fit", recipe, f"output={tmp_path / 'new'}", *entries))
    code, _, errors = invoke(*command, "--no-progress")
    assert code == 2
    assert said in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "new" / "adapter_config.json").exists()


def test_without_matplotlib_the_extra_is_named_before_anything_is_fitted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, errors = invoke("fit", recipe, f"output={tmp_path / 'new'}", "--no-progress")
    assert code == 2
    assert "pip install 'hf-erasure[plot]'" in errors


def test_an_adapter_without_its_encoder_steers_but_does_not_encode(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code, printed, errors = invoke("fit", recipe, f"output={folder}", "config.keep_encoder=false", "--no-progress")
    assert code == 0, errors
    assert "cor_enc" not in printed
    assert not (folder / "encoded.png").exists()
    assert invoke("evaluate", folder, "--no-progress")[0] == 0
    pd.DataFrame({"text": ["it ate bread"]}).to_csv(tmp_path / "texts.csv", index=False)
    code, _, errors = invoke("encode", folder, tmp_path / "texts.csv", "--no-progress")
    assert code == 2
    assert "holds no encoder" in errors
