"""The three-class study: conditions on its data, and, marked slow, conditions on its results."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from hf_erasure.fitting.gradiend import SlotReader, word_tokens
from hf_erasure.fitting.gradiend.pairs import PairSet
from hf_erasure.recipes.gradiend import (
    NO_EDIT,
    check_gradiend_output,
    load_model,
    run_gradiend_recipe,
)
from hf_erasure.recipes.gradiend_recipe import PARTS, GradiendRecipe, PairsRecipe, load_materials, read_gradiend_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "gradiend_three_classes" / "recipe.yaml"


@pytest.fixture
def recipe(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GradiendRecipe:
    monkeypatch.setenv("HF_ERASURE_TEST_ASSETS", str(assets))
    return read_gradiend_recipe(RECIPE, [f"output={tmp_path / 'out'}"])


def test_no_template_and_no_adjective_is_in_two_sets(recipe: GradiendRecipe) -> None:
    parts: list[PairsRecipe] = [getattr(recipe.data, name) for name in PARTS]
    fillers = [[filler for entries in (p.fillers or {}).values() for filler in entries] for p in parts]
    for lists in ([p.templates or [] for p in parts], fillers):
        together = [item for items in lists for item in items if item not in recipe.classes]
        assert len(set(together)) == len(together)


def test_the_model_predicts_the_animal_of_the_prompt(recipe: GradiendRecipe) -> None:
    model, tokenizer, task = load_model(recipe)
    data = load_materials(recipe.data, recipe.classes, lambda rows: list(range(len(rows))))
    reader, words = SlotReader(model), word_tokens(tokenizer, recipe.classes)
    assert {len(tokens) for tokens in words} == {2, 3}
    for label, name in enumerate(recipe.classes):
        rows = data.test.filter(lambda row, name=name: row["label"] == name)
        other = data.test.filter(lambda row, name=name: row["label"] != name).select(range(1))
        slots = PairSet(_joined(rows, other), tokenizer, task, recipe.classes, model.config).slots(64)
        found = reader.word_log_probabilities(slots[0], words).exp()[:-1].mean(0)
        assert found[label] > 0.2
        assert found[label] > 5 * max(float(p) for i, p in enumerate(found) if i != label)


def _joined(rows, other):
    from datasets import concatenate_datasets

    return concatenate_datasets([rows, other])


@pytest.mark.slow
def test_three_animals_are_read_strengthened_and_reproduced(recipe: GradiendRecipe) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="None of .* edits raises")
        outcome = run_gradiend_recipe(recipe, progress=False)
    encoding, edits = outcome.encoding, outcome.edits
    assert (encoding["cor"] > 0.97).all()
    assert (encoding["cor_enc"] > 0.93).all()
    base = edits.loc[NO_EDIT]
    for name in recipe.classes:
        assert edits.loc[name, name] > 1.8 * base[name]
        assert edits.loc[name, f"P({name})"] > 1.8 * base[f"P({name})"]
    assert edits.loc["balance", "balance"] > 2 * base["balance"]
    assert (edits["cost"] <= recipe.select.budget + 0.005).all()
    _, drift = check_gradiend_output(recipe.output, progress=False)
    assert drift < 1e-5
