"""The command, as a user types it: fit a recipe, check the folder in another process, and get clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModel
from typer.testing import CliRunner

import hf_erasure  # noqa: F401  registers the adapter type
from hf_erasure import verify_adapter
from hf_erasure.cli import app
from hf_erasure.recipes.erasure import read_recipe
from hf_erasure.recipes.gradiend_recipe import read_gradiend_recipe
from hf_erasure.recipes.occupations import occupation_sentences
from tests.prepared import command

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*/recipe.yaml"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small part of the demo's sentences, as a folder that `datasets` reads."""
    folder = tmp_path_factory.mktemp("sentences")
    data = occupation_sentences()
    for split, rows in (("train", 200), ("test", 80)):
        data[split].shuffle(seed=0).select(range(rows)).to_json(folder / f"{split}.jsonl")
    return folder


@pytest.fixture(scope="module")
def recipe(short_assets: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    content = {
        "model": str(short_assets / "models" / "story-mlm"),
        "concept": "gender",
        "labels": ["female", "male"],
        "output": str(path.parent / "out"),
        "data": {"source": str(sentences), "label_column": "gender", "keep_column": "field"},
        "fit": {"sequential": False, "pool": "mean", "batch_size": 80},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def fitted(recipe: Path) -> tuple[Path, str]:
    folder = recipe.parent / "fitted"
    result = command("fit", recipe, f"output={folder}", "--no-progress", folder=recipe.parent)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_fit_prints_the_table_and_writes_adapter_figure_and_results(fitted: tuple[Path, str]) -> None:
    folder, printed = fitted
    assert {"adapter_config.json", "adapter_model.safetensors", "leakage.png", "recipe.yaml", "results.json"} <= {
        path.name for path in folder.iterdir()
    }
    for expected in ("gender before", "gender after", "gender majority", "field after", "cosine", "last_hidden_state"):
        assert expected in printed
    table = json.loads((folder / "results.json").read_text())
    first = next(iter(table.values()))
    # The first site is erased exactly in one pass; half of the 80 test rows are of either gender.
    assert first["gender before"] > first["gender after"]
    assert first["gender majority"] == pytest.approx(0.5, abs=0.1)
    # The card says what the probes of the last layer read, and who labelled the data.
    card, last = (folder / "README.md").read_text(), table["last_hidden_state"]
    for column, better in (("gender", "lower"), ("field", "higher")):
        row = f"{last[f'{column} before']:.3f} | {last[f'{column} after']:.3f} | {better} | –"
        assert f"(always the majority: {last[f'{column} majority']:.3f}) | {row} |" in card
    assert f"judged on the rest | – | {last['gender refitted']:.3f} | lower |" in card
    assert "On the recipe's test split, the mean of the tokens:" in card
    assert "| labels | the column 'gender' of a local file, split 'train' |" in card


def test_check_reproduces_the_results_in_a_second_process(fitted: tuple[Path, str], tmp_path: Path) -> None:
    result = command("check", fitted[0], "--no-progress", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.rstrip().endswith("same")


@pytest.mark.slow
def test_check_notices_other_weights(fitted: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "changed"
    shutil.copytree(fitted[0], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: value * 0.5 for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    result = command("check", folder, "--no-progress", folder=tmp_path)
    assert result.returncode == 1
    assert "NOT THE SAME" in result.stdout


def test_the_folder_loads_in_code_that_knows_only_peft(fitted: tuple[Path, str], short_assets: Path) -> None:
    model = AutoModel.from_pretrained(short_assets / "models" / "story-mlm")
    model.load_adapter(str(fitted[0]))
    assert verify_adapter(model)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle=x", "modle is not known in a recipe; it has model, …"),
        ("fit.pol=cls", "fit.pol is not known"),
        ("fit.pool", "is not key=value"),
        ("model.name=x", "'model' is a value"),
        ("labels=[female]", "at least two classes"),
        ("data.train=nowhere", "no split 'nowhere'"),
        ("data.label_column=nowhere", "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_traceback(recipe: Path, override: str, message: str) -> None:
    result = CliRunner().invoke(app, ["fit", str(recipe), override, "--no-progress"])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_help_says_what_to_type() -> None:
    result = CliRunner().invoke(app, ["fit", "--help"])
    assert result.exit_code == 0
    assert "KEY=VALUE" in result.stdout and "recipes/minilm-gender/recipe.yaml" in result.stdout


def test_check_of_a_folder_without_a_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 2
    assert "hf-erasure fit" in result.stderr


def test_check_of_a_gradiend_names_the_command_for_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("feature: gender")
    (tmp_path / "results.json").write_text('{"chosen": {}}')
    result = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 2 and "`gradiend evaluate` a GRADIEND" in result.stderr


def test_merge_fits_writes_an_adapter_that_acts(recipe: Path, short_assets: Path, tmp_path: Path) -> None:
    for name, split in (("a", "train"), ("b", "test")):
        overrides = [f"output={tmp_path / name}", f"data.train={split}", "fit.sequential=false", "fit.checkpoint=true"]
        result = CliRunner().invoke(app, ["fit", str(recipe), *overrides, "--no-progress"])
        assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["merge-fits", *(str(tmp_path / name) for name in ("a", "b", "sum"))])
    assert result.exit_code == 0, result.output
    assert "280 examples" in result.stdout
    model = AutoModel.from_pretrained(short_assets / "models" / "story-mlm")
    model.load_adapter(str(tmp_path / "sum"))
    assert verify_adapter(model)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_reads_and_starts_with_its_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    if path.parent.name.startswith("gradiend"):
        assert first.startswith("# ")
        assert f"hf-erasure gradiend fit recipes/{path.parent.name}/{path.name}" in first
        assert len(read_gradiend_recipe(path).classes) >= 2
    else:
        assert first.startswith(f"# hf-erasure fit recipes/{path.parent.name}/{path.name}")
        assert read_recipe(path).labels


@pytest.mark.slow
def test_a_pre_ln_model_goes_through_the_same_table(assets: Path, recipe: Path, tmp_path: Path) -> None:
    """A post-LN encoder hides the leak of the residual stream; on a pre-LN model the final norm has to be a site."""
    leaks = {}
    for name, targets in (("blocks", r"layers\.\d+\..*layernorm"), ("final", "norm")):
        overrides = [
            f"model={assets / 'models' / 'stories260k'}",
            f"output={tmp_path / name}",
            f"adapter.target_modules={targets}",
            # The rows that were fitted on, so that a leak is one of the method and does not come from new cues.
            "data.test=train",
        ]
        result = CliRunner().invoke(app, ["fit", str(recipe), *overrides, "--no-progress"])
        assert result.exit_code == 0, result.output
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        leaks[name] = config["provenance"]["leakage"]["last_hidden_state"]
    assert leaks["blocks"][1] > 0.5 * leaks["blocks"][0]
    # On fitted rows the covariances of the two halves are opposite, so the leakage is at most 0.
    assert leaks["final"][1] < 0.05 < leaks["final"][0]
