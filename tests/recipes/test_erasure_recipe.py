"""A recipe of an erasure is checked before anything is loaded, and a message names what the run cannot use."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from datasets import Dataset
from datasets.distributed import split_dataset_by_node

from hf_erasure.recipes import erasure, occupation_sentences, run
from hf_erasure.recipes.erasure import DataRecipe, Recipe, check_output, pooled_states, read_recipe, run_recipe
from hf_erasure.recipes.run import load_source

CONTENT = {"model": "m", "concept": "gender", "labels": ["female", "male"], "output": "o"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "recipe.yaml"
    found.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(CONTENT).encode())  # as editors on Windows save it
    return found


def test_values_are_those_of_the_file_and_the_overrides(path: Path) -> None:
    recipe = read_recipe(path, ["fit.batch_size=8", "adapter.rank=2", "data.probe_rows=50", "fit.max_length=null"])
    assert (recipe.model, recipe.fit.batch_size, recipe.fit.max_length) == ("m", 8, None)
    assert recipe.adapter == {"rank": 2} and recipe.data.probe_rows == 50


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("fit.pool=average", "fit.pool='average' is not known; choose one of"),
        ("fit.pool=5", "fit.pool=5 in a recipe must be"),
        ("fit.batch_size=many", "fit.batch_size='many' in a recipe must be int"),
        ("fit.batch_size=0", "fit.batch_size=0 in a recipe must be 1 or more"),
        ("fit.sequential=maybe", "fit.sequential='maybe' in a recipe must be bool"),
        ("fit.max_length=1e2", r"fit.max_length=100.0 in a recipe must be int \| None"),
        ("fit=5", "fit of a recipe is a section with keys of its own, not 5"),
        ("data=5", "data of a recipe is a section with keys of its own, not 5"),
        ("data.probe_rows=-1", "data.probe_rows=-1 in a recipe must be 1 or more"),
        ("data.text_column=[a]", "data.text_column=.* in a recipe must be str"),
        ("data.keep_column=gender", "data.keep_column in a recipe is 'gender', the column that is erased"),
        ("adapter.methodd=leace", "adapter.methodd is not known in a recipe; adapter has method"),
        ("adapter.method=laece", "'laece'"),
        ("adapter.method=5", "adapter.method=5 in a recipe must be str"),
        ("adapter=leace", "adapter of a recipe is a section"),
        ("adapter.labels=[a, b]", "adapter.labels is not known in a recipe: write labels at the top alone"),
        ("fit.pool={a", "'fit.pool={a' has a value that is not YAML"),
        ("labels=[no, yes]", r"labels=\[False, True\] in a recipe must be list\[str\]"),
        ("labels=[1e5, b]", r"labels=\[100000.0, 'b'\] in a recipe .* such as 1e5 or no, in quotes"),
        ("labels=[female]", "at least two classes"),
        ("output=5", "output=5 in a recipe must be str"),
        ("concept=null", "lacks concept"),
    ],
)
def test_what_a_run_could_not_use_is_refused_before_anything_is_loaded(path: Path, override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_recipe(path, [override])


def test_a_label_that_looks_like_a_number_stays_a_label_in_the_recipe_that_is_written(path: Path) -> None:
    recipe = read_recipe(path, ["labels=['1e5', '2e5', '1', 'yes']", "adapter.strength=1e-5"])
    model = SimpleNamespace(save_pretrained=lambda folder: None)
    run.write_run(path.parent, model, asdict(recipe), Recipe, {})
    assert read_recipe(path) == recipe and recipe.adapter["strength"] == 1e-5


def test_what_is_not_installed_is_said_before_the_model_is_loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this check, a run would find only after its fit that matplotlib is missing."""
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs matplotlib and sklearn: pip install 'hf-erasure\[plot,metrics\]'"):
        run_recipe(read_recipe(path))


def test_a_card_is_told_where_the_data_come_from(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    of_hub = DataRecipe("someone/people", background="someone/more", label_column="sex").origin()
    assert of_hub["datasets"] == ["someone/people", "someone/more"]
    assert of_hub["labels_from"] == "the column 'sex' of someone/people, split 'train'"
    of_file = DataRecipe(str(tmp_path / "a.csv"), background="someone/more").origin()
    assert of_file["datasets"] == ["someone/more"]
    assert of_file["labels_from"] == "the column 'gender' of a local file, split 'train'"
    own = DataRecipe().origin()
    assert own["datasets"] == [] and own["labels_from"].startswith("sentences about people at work")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "text,label\r\na dog,x\r\n"), ("a.jsonl", '{"text": "a dog"}\r\n'), ("a.txt", "a dog\r\na cat\r\n")],
)
def test_data_files_may_begin_with_a_byte_order_mark(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert load_source(str(tmp_path / name))["train"][0]["text"] == "a dog"


def test_held_out_rows_are_read_once_and_short_texts_together(
    tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors that the fit kept, with and without the erasure, are those of a pass over the rows, in order."""
    rows = occupation_sentences()["test"].shuffle(seed=0).select(range(80))
    rows.map(lambda row: {"template": row["template"] / 2}).to_csv(tmp_path / "people.csv")  # numbers with a point
    content = CONTENT | {
        "model": str(assets / "models" / "story-mlm"), "output": str(tmp_path / "out"),
        "data": {"source": str(tmp_path / "people.csv"), "test_share": 0.5, "group_column": "template"},
        "fit": {"pool": "mean", "batch_size": 16},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    recipe, passes = read_recipe(tmp_path / "recipe.yaml"), []

    def reading(*given: Any, **options: Any) -> Any:
        passes.append(given[1])
        return pooled_states(*given, **options)

    monkeypatch.setattr(erasure, "pooled_states", reading)
    found = run_recipe(recipe, progress=False)
    assert found is not None and found[0].eval_environments == 10  # of the twenty templates
    assert len(passes) == 2  # the fitted rows, with and without the erasure
    lengths = [len(row["text"]) for row in passes[0].dataset]
    assert lengths == sorted(lengths) and len(set(lengths)) > 2
    again, _ = check_output(tmp_path / "out", progress=False)  # reads the rows again
    assert len(passes) == 6
    pd.testing.assert_frame_equal(again, found[1])
    assert found[1]["gender before"].max() > 0.7  # labels and vectors belong to the same rows


def test_rows_without_a_label_of_what_is_kept_are_not_probed_for_it(tmp_path: Path, assets: Path) -> None:
    rows = occupation_sentences()["test"].shuffle(seed=0).select(range(60))
    rows.add_column("kind", ["a", "a", "b", None, None, None] * 10).to_csv(tmp_path / "people.csv")
    content = CONTENT | {
        "model": str(assets / "models" / "story-mlm"), "output": str(tmp_path / "out"),
        "data": {"source": str(tmp_path / "people.csv"), "test_share": 0.5, "keep_column": "kind"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    known = [kind for kind in erasure.load_data(recipe.data)["test"]["kind"] if kind is not None]
    assert 0 < len(known) < 30 and set(known) == {"a", "b"}
    found = run_recipe(recipe, progress=False)
    assert found is not None
    assert set(found[1]["kind majority"]) == {max(map(known.count, "ab")) / len(known)}


def test_probes_are_not_judged_on_texts_that_they_were_fitted_on(tmp_path: Path, assets: Path) -> None:
    """Labels by chance: only a probe that has seen a text can know its label."""
    texts = occupation_sentences()["test"].shuffle(seed=0)["text"][:80]
    rows = {"text": texts, "gender": random.Random(0).choices(["female", "male"], k=80)}
    Dataset.from_dict({name: values[:40] for name, values in rows.items()}).to_csv(tmp_path / "train.csv")
    Dataset.from_dict({name: values[40:] * 4 for name, values in rows.items()}).to_csv(tmp_path / "test.csv")
    content = CONTENT | {
        "model": str(assets / "models" / "story-mlm"), "output": str(tmp_path / "out"),
        "data": {"source": str(tmp_path)}, "adapter": {"target_modules": ["encoder.layer.0.output.LayerNorm"]},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    found = run_recipe(read_recipe(tmp_path / "recipe.yaml"), progress=False)
    assert found is not None and found[1]["gender refitted"].max() < 0.7, found


def test_a_key_that_is_written_twice_is_refused(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "data: {train: a}\nfit: {batch_size: 8, batch_size: 9}\n")
    with pytest.raises(ValueError, match=r"not YAML: 'batch_size' is written twice .* line 8"):
        read_recipe(path)
    path.write_text("a: &a {model: m, concept: c}\n<<: *a\n<<: {labels: [x, y]}\noutput: o")
    with pytest.raises(ValueError, match="a is not known"):
        read_recipe(path)


@pytest.mark.parametrize("count", [7, 8, 9])
def test_each_of_several_processes_gets_short_and_long_texts(count: int) -> None:
    rows = Dataset.from_dict({"length": list(range(count))})
    order = erasure._length_order(["." * length for length in range(count)], shares=2)
    shares = [split_dataset_by_node(rows.select(order), rank, 2)["length"] for rank in (0, 1)]
    assert [list(share) for share in shares] == [list(range(count))[rank::2] for rank in (0, 1)]
