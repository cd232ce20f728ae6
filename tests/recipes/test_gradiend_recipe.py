"""GRADIEND recipes: what they read and refuse, and that no text is in two of the sets that must be disjoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset

from hf_erasure.fitting.gradiend import PairError
from hf_erasure.fitting.gradiend.pairs import usable_rows
from hf_erasure.fitting.gradiend.sentences import pairs_from_templates
from hf_erasure.recipes.gradiend import NO_EDIT, GradiendRun
from hf_erasure.recipes.gradiend_recipe import (
    GradiendDataRecipe,
    Materials,
    load_materials,
    read_gradiend_recipe,
    word_table,
)
from hf_erasure.recipes.run import difference, table_of
from hf_erasure.recipes.schema import section_of
from tests.fitting.gradiend.language_models import tokenizer_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("gradiend_*/recipe.yaml"))
CLASSES = ["dog", "cat", "bird"]
WORDS = {"dog": ["dog"], "cat": ["cat"], "bird": ["bird"]}


def read_data(content: Any) -> GradiendDataRecipe:
    return section_of(content, GradiendDataRecipe, "data")


def everything(rows: Dataset) -> list[int]:
    return list(range(len(rows)))


def templates(*texts: str) -> dict[str, Any]:
    return {"templates": list(texts), "fillers": WORDS, "words": WORDS}


def data(**entries: Any) -> dict[str, Any]:
    return {
        "train": templates("a {name} is a [FEATURE]"),
        "choice": templates("the {name} is the [FEATURE]"),
        "test": templates("one {name} is one [FEATURE]"),
        "neutral": {"choice": ["it rained"], "test": ["the sun shone"]},
        **entries,
    }


def test_a_template_gives_a_row_for_every_filler_word_and_other_class() -> None:
    fillers = {"dog": ["pup", "hound"], "cat": ["kitten"], "bird": ["chick"]}
    words = {"dog": ["dog", "dogs"], "cat": ["cat", "cats"], "bird": ["bird", "birds"]}
    rows = pairs_from_templates(["a {name}: [FEATURE]"], fillers, words, CLASSES)
    assert len(rows) == 4 * 2 * 2
    assert rows[3] == {"text": "a pup: [FEATURE]", "factual": "dogs", "counterfactual": "birds", "label": "dog",
                       "counterfactual_label": "bird"}  # fmt: skip
    assert set(rows["text"]) == {f"a {name}: [FEATURE]" for names in fillers.values() for name in names}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"templates": ["a [FEATURE]"]}, r"'a \[FEATURE\]' needs \{name\}"),
        ({"templates": ["a {name} [FEATURE] [FEATURE]"]}, "each once"),
        ({"templates": "a {name} [FEATURE]"}, "templates are 'a {name} .*write a list of texts"),
        ({"templates": []}, r"templates are \[\]; write a list of texts"),
        ({"fillers": {"dog": ["a"]}}, "fillers must have a list for each"),
        ({"fillers": None}, "fillers must have a list for each"),
        ({"words": {**WORDS, "dog": ["dog", "dogs"]}}, "all of one length"),
        ({"words": {**WORDS, "dog": []}}, "write a list of words"),
    ],
)
def test_templates_that_cannot_be_filled_are_named(changed: dict[str, Any], said: str) -> None:
    given = {"templates": ["a {name} [FEATURE]"], "fillers": WORDS, "words": WORDS, **changed}
    with pytest.raises(PairError, match=said):
        pairs_from_templates(**given, classes=CLASSES)


def test_a_text_in_two_sets_is_refused_and_named() -> None:
    shared = data(test=templates("one {name} is one [FEATURE]", "a {name} is a [FEATURE]"))
    with pytest.raises(ValueError, match=r"data\.train and data\.test share 3 texts, such as 'a bird is"):
        load_materials(read_data(shared), CLASSES, everything)
    neutral = data(neutral={"choice": ["it rained", "so"], "test": ["it  rained", "so"]})
    with pytest.raises(ValueError, match=r"neutral\.choice and data\.neutral\.test share 1 texts, such as 'so'"):
        load_materials(read_data(neutral), CLASSES, everything)
    loaded = load_materials(read_data(data()), CLASSES, everything)
    assert loaded.counts() == {
        "train": 6, "choice": 6, "test": 6, "train texts": 3, "choice texts": 3, "test texts": 3,
        "neutral choice": 1, "neutral test": 1,
    }  # fmt: skip


def test_a_causal_model_is_not_measured_on_a_beginning_that_it_was_fitted_on() -> None:
    shared = data(test=templates("one {name} is one [FEATURE]", "a {name} is a [FEATURE] too"))
    loaded = load_materials(read_data(shared), CLASSES, everything, "causal")
    assert set(loaded.test["text"]) == {f"one {name} is one [FEATURE]" for name in CLASSES}
    assert loaded.skipped == {"test": 6} and loaded.counts()["train"] == 6
    assert load_materials(read_data(shared), CLASSES, everything, "masked").counts()["test"] == 12
    shared = data(test=templates("a {name} is a [FEATURE] too"))
    with pytest.raises(ValueError, match=r"data\.test: up to \[FEATURE\], .* earlier set, such as 'a dog is a '"):
        load_materials(read_data(shared), CLASSES, everything, "causal")


def test_sentences_are_dealt_out_so_that_no_sentence_is_in_two_sets(tmp_path: Path) -> None:
    tuples = tmp_path / "words.json"
    tuples.write_text(json.dumps({"animal": [["dog", "cat", "bird"], ["dogs", "cats", "birds"]]}))
    # Two words in a sentence make pairs with two texts. single=false keeps these pairs, in one set. Without its words,
    # the sentence is the same for all three lines: they stay together.
    lines = [f"he saw {n} {a} and the {b}" for n in range(20)
             for a, b in (("dogs", "cat"), ("cats", "bird"), ("birds", "dog"))]  # fmt: skip
    (tmp_path / "lines.txt").write_text("\n".join([*lines, "", lines[0]]))
    whole = {"sentences": str(tmp_path / "lines.txt"), "words": str(tuples), "words_key": "animal", "single": False}
    recipe = read_data({"whole": whole, "shares": [0.5, 0.25, 0.25], "neutral": ["one", "two", "three", "four"]})
    loaded = load_materials(recipe, CLASSES, everything)
    # Each line has two words with two counterparts each; a sentence that occurs twice is used once.
    assert [loaded.counts()[name] for name in ("train", "choice", "test")] == [120, 60, 60]
    assert [len(rows) for rows in loaded.neutral.values()] == [2, 2]
    again = load_materials(recipe, CLASSES, everything)
    assert again.train["text"] == loaded.train["text"]


def test_pairs_come_from_files_too(tmp_path: Path) -> None:
    rows = pairs_from_templates(
        ["a {name} [FEATURE]", "the {name} [FEATURE]", "my {name} [FEATURE]"], WORDS, WORDS, CLASSES
    )
    rows.to_csv(tmp_path / "pairs.csv", index=False)
    whole = {"file": str(tmp_path / "pairs.csv")}
    loaded = load_materials(
        read_data({"whole": whole, "shares": [0.4, 0.3, 0.3], "neutral": ["a", "b"]}), CLASSES, everything
    )
    assert len(loaded.train) + len(loaded.choice) + len(loaded.test) == len(rows)


def test_a_card_is_told_where_the_pairs_come_from(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").touch()
    filled = read_data(data()).origin()
    assert filled == {
        "datasets": [], "labels_from": "1 sentence templates of the recipe, filled with words of each class",
    }  # fmt: skip
    whole = {"sentences": "someone/stories", "words": WORDS}
    dealt = read_data(data(whole=whole, test={"sentences": str(tmp_path / "lines.txt"), "words": WORDS})).origin()
    assert dealt["datasets"] == ["someone/stories"] and dealt["labels_from"].startswith("sentences with one of")
    of_file = read_data(data(train={"file": "someone/pairs"})).origin()
    assert of_file["datasets"] == ["someone/pairs"] and of_file["labels_from"].startswith("a file of pairs")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"trian": {}}, "data.trian is not known"),
        (data(train={"template": []}), "data.train.template is not known"),
        (data(train=None), "lacks data.train"),
        (data(neutral={"choice": ["a"]}), "lacks data.neutral.test"),
        (data(neutral={"train": ["a"]}), "data.neutral.train is not known"),
        (data(neutral={"choice": {"split": "a"}, "test": ["a"]}), "data.neutral.choice lacks texts"),
        (data(neutral={"whole": {"texts": "a.txt", "rows": [3]}}), r"rows=\[3\] of texts .* write two numbers"),
        (data(neutral={"whole": {"texts": "a.txt", "separator": "("}}), r"separator='\(' is not a regular expression"),
        ([], "data of a recipe is a section"),
    ],
)
def test_what_a_data_section_lacks_is_named(section: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_data(section)


def test_one_word_of_a_class_is_a_word_and_not_its_letters() -> None:
    words = {"dog": "puppy", "cat": "kitty", "bird": "finch"}
    found = word_table(read_data(data(whole={"sentences": ["a"], "words": words})).whole, CLASSES, "data.whole")
    assert found == {"dog": ["puppy"], "cat": ["kitty"], "bird": ["finch"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "data.whole.words: .*No such file.*words.json"), ("{", "words.json cannot be read as JSON"),
     ('{"animal": {"dog": ["puppy"], "dog": ["hound"]}}', "words.json cannot be read as JSON: 'dog' is written twice"),
     ('{"animal": [["dog", "cat", "bird"]], "n": 5}', "data.whole.words has {'animal': .*, 'n': 5}: write class")],
)  # fmt: skip
def test_a_file_without_a_table_of_words_is_named(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    if content is not None:
        path.write_text(content)
    recipe = read_data(data(whole={"sentences": ["a"], "words": str(path)}))
    with pytest.raises(ValueError, match=said):
        word_table(recipe.whole, CLASSES, "data.whole")


def test_what_the_groups_of_a_separator_match_is_not_a_text(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n---\ntwo\n===\nthree\n---\nfour")
    neutral = {"whole": {"texts": str(tmp_path / "lines.txt"), "separator": r"\n(---|===)\n"}}
    loaded = load_materials(read_data(data(neutral=neutral)), CLASSES, everything)
    assert [rows["text"][:] for rows in loaded.neutral.values()] == [["one", "two"], ["three", "four"]]


def test_rows_without_a_text_or_its_column_are_left_to_the_check_that_names_them(tmp_path: Path) -> None:
    lines = {"train": "x [FEATURE]", "choice": "y [FEATURE]", "test": "z [FEATURE]"}
    for name, text in lines.items():
        (tmp_path / f"{name}.csv").write_text(f"text,factual\n{text},dog\n,dog\n")
    recipe = read_data(data(**{name: {"file": str(tmp_path / f"{name}.csv")} for name in lines}))
    assert load_materials(recipe, CLASSES, everything).counts()["train"] == 2
    (tmp_path / "train.csv").write_text("sentence,factual\na,dog\n")
    with pytest.raises(ValueError, match=r"train.csv has no column 'text'; it has sentence, factual"):
        load_materials(recipe, CLASSES, everything)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train": {"templates": ["a"], "sentences": ["a"]}}, "data.train has templates and sentences"),
        ({"train": {"sentences": ["a dog"]}}, "data.train.words is missing"),
        ({"train": {"sentences": ["a dog"], "words": [["dog", "cat"]]}}, "not a list of one word for each"),
        ({"whole": templates("a {name} is a [FEATURE]")}, "write data.train, data.choice and data.test"),
        ({"whole": {"sentences": ["a dog", "a cat"], "words": WORDS}}, "sentences for choice: .*add sentences"),
        ({"whole": {"sentences": ["a dog"], "words": WORDS}, "shares": [1, 1, 1]}, "data.shares"),
    ],
)
def test_sets_that_cannot_be_made_are_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_materials(read_data(data(**changed)), CLASSES, everything)


def test_rows_a_masked_model_cannot_use_are_found() -> None:
    words = [("he", "she"), ("grandpa", "she"), ("he", "zebra"), ("grandpa", "grandma")]
    rows = [
        {"text": "Tom said [FEATURE] was late", "factual": a, "counterfactual": b, "label": "male"} for a, b in words
    ]
    rows += [{**rows[0], "factual": "she", "counterfactual": "he", "label": "female"}]
    kept = usable_rows(Dataset.from_list(rows), ["female", "male"], tokenizer_of("bert"), "masked")
    assert kept == [0, 3, 4]
    recipe = read_data({**data(), "skip_unusable": True})
    assert load_materials(recipe, CLASSES, lambda rows: [0, 1]).skipped == {"train": 4, "choice": 4, "test": 4}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_recipes_in_the_repository_can_be_read_and_begin_with_their_command(path: Path) -> None:
    recipe = read_gradiend_recipe(path)
    assert recipe.classes
    assert f"hf-erasure gradiend fit {path.relative_to(path.parents[2])}" in path.read_text().splitlines()[0]


def test_overrides_reach_into_sections_and_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    content = {"model": "m", "feature": "animal", "classes": CLASSES, "output": "o", "data": data()}
    path.write_text(yaml.safe_dump(content))
    recipe = read_gradiend_recipe(path, ["config.density=1e-4", "select.goal=dog", "data.test.split='1e4'"])
    assert recipe.config == {"density": 1e-4}
    assert recipe.select.goals == ["dog"]
    assert recipe.data.test is not None
    assert recipe.data.test.split == "1e4"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["colour=red"], "colour is not known"),
        (["select.gaol=dog"], "select.gaol is not known"),
        (["select.budget=-1"], "select.budget=-1: give the share that language modelling may lose"),
        (["select.learning_rates=[0]"], "select.learning_rates has zeros only"),
        (["select.goal=[]"], "select.goal names no goal"),
        (["config.classes=[a, b]"], "config.classes is not known in a recipe: write classes at the top alone"),
        (["classes=dog"], "classes='dog': a feature needs at least two different classes"),
        (["select.goal=cow"], "goal='cow' is not defined"),
        (["select.goal=bpi"], "goal='bpi' is not defined"),
        (["task=speech"], "task='speech' is not known"),
        (["feature=null"], "lacks feature"),
        (["goal"], "is not key=value"),
        (["select.budget=many"], r"select.budget='many' in a recipe must be float"),
        (["select.learning_rates=0.1"], r"select.learning_rates=0.1 in a recipe must be list\[float\]"),
        (["select=5"], "select of a recipe is a section"),
        (["config=5"], "config of a recipe is a section with keys of its own, not 5"),
        (["config.densty=0.1"], "config.densty is not known in a recipe; config has density"),
        (["config.density=much"], "config.density='much' in a recipe must be float"),
        (["arguments.estimatorr=x"], "arguments.estimatorr is not known in a recipe; arguments has estimator"),
        (["arguments.seeds=many"], "arguments.seeds='many' in a recipe must be int"),
        (["data.shares=half"], r"data.shares='half' in a recipe must be list\[float\]"),
        (["data.train.single=maybe"], "data.train.single='maybe' in a recipe must be bool"),
        (["data.neutral=5"], "data.neutral=5 in a recipe must be texts"),
        (["data=5"], "data of a recipe is a section"),
        (["classes=5"], r"classes=5 in a recipe must be list\[str\]"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused_before_anything_is_loaded(
    tmp_path: Path, overrides: list[str], said: str
) -> None:
    path = tmp_path / "recipe.yaml"
    content = {"model": "m", "feature": "animal", "classes": CLASSES, "output": "o", "data": data()}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=said):
        read_gradiend_recipe(path, overrides)


@pytest.mark.parametrize(
    ("rate", "said"), [(0.0, "No edit .* better for 'she', .* no effect"), (0.1, "she 0.200 → 0.300")]
)
def test_a_summary_says_whether_an_edit_was_found(rate: float, said: str) -> None:
    edit = SimpleNamespace(learning_rate=rate)
    run = SimpleNamespace(chosen={"she": edit}, tested={
        NO_EDIT: SimpleNamespace(probabilities={"she": 0.2}),
        "she": SimpleNamespace(probabilities={"she": 0.3}, learning_rate=rate, cost=0.01),
    })  # fmt: skip
    assert re.search(said, GradiendRun.in_plain_words(run))  # type: ignore[arg-type]
    is_steered = "steered for 'she'" if rate else "not steered, since no edit was better for 'she'"
    assert GradiendRun.steered.fget(run) == is_steered  # type: ignore[attr-defined]


@pytest.mark.parametrize(("then", "now"), [(0.5, float("nan")), (float("nan"), 0.5), (0.5, 0.5), (None, float("nan"))])
def test_a_figure_that_has_become_nan_is_not_the_same(then: float | None, now: float) -> None:
    written, found = {"she": {"cor": then, "acc": 1.0}}, table_of({"she": {"cor": now, "acc": 1.0}}, "")
    same = then == now or then is None
    assert difference(found, written) == (0.0 if same else float("inf"))


@pytest.mark.parametrize("is_numbered", [False, True])
def test_a_word_of_a_text_gets_the_counterpart_that_is_spelled_as_it_is(is_numbered: bool) -> None:
    spelled = [("Dog", "Cat", "dog"), ("dog", "cat", "dog"), ("Cat", "Dog", "cat"), ("cat", "dog", "cat")]
    rows = [{"text": f"{one} [FEATURE]", "factual": one, "counterfactual": other, "label": label}
            for one, other, label in spelled]  # fmt: skip
    pairs = Dataset.from_list(rows)
    if is_numbered:  # as a Parquet file or a data set of the Hub may have it
        pairs = pairs.cast_column("label", ClassLabel(names=["dog", "cat"]))
    materials = Materials(pairs, pairs, pairs, {}, {})
    found = materials.completed(Dataset.from_list([{"text": "a [FEATURE]", "factual": word} for word in
                                                   ("cat", "Cat", "CAT")]), ["dog", "cat"])  # fmt: skip
    assert found["counterfactual"][:2] == ["dog", "Dog"] and found["label"][:] == ["cat"] * 3
    assert found["counterfactual_label"][:] == ["dog"] * 3
