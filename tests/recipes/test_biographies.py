"""The study of biographies: its parts, a small run with a small encoder, and the form of its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recipes.biographies import study

FOLDER = Path(study.__file__).parent
HEAD = (
    "| erased at | classifier | profession accuracy | gender accuracy | gender, fresh probe | TPR gap, RMS | "
    "RMS by chance | correlation |"
)


@pytest.fixture(scope="module")
def settings(assets: Path) -> study.Settings:
    settings = study.read_settings(FOLDER / "study.yaml")
    settings.data = str(assets / "data" / "bias-in-bios")
    return settings


@pytest.fixture(scope="module")
def rows(settings: study.Settings) -> dict[str, list[study.Biography]]:
    return study.read_biographies(settings)


@pytest.fixture(scope="module")
def small(settings: study.Settings, short_assets: Path) -> study.Settings:
    """The study with a small BERT and only the beginnings of biographies."""
    return replace(
        settings, model=str(short_assets / "models" / "story-mlm"), last="encoder.layer.1.output.LayerNorm",
        max_length=24, train_rows=0.25, test_rows=0.25, shuffles=5, seeds=[0, 1],
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(small: study.Settings, rows: dict[str, list[study.Biography]]) -> list[study.Outcome]:
    known: dict[str, np.ndarray] = {}
    return [study.run_seed(small, rows, seed, known) for seed in small.seeds]


def test_the_settings_start_with_the_command_that_runs_them() -> None:
    command = "# python recipes/biographies/study.py recipes/biographies/study.yaml\n"
    assert (FOLDER / "study.yaml").read_text().startswith(command)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_biography_is_fitted_on_and_measured_on(settings: study.Settings, rows: dict, seed: int) -> None:
    train, test = study.split_rows(rows, settings, seed)
    assert not {row.text for row in train} & {row.text for row in test}
    for part, shares in ((train, settings.train_shares), (test, settings.test_shares)):
        for profession, share in shares.items():
            genders = [row.gender for row in part if row.profession == profession]
            assert genders.count("Female") / len(genders) == pytest.approx(share, abs=0.02)


def test_splits_of_a_data_set_are_used_as_they_come(settings: study.Settings) -> None:
    def some(split: str) -> list[study.Biography]:
        return [study.Biography(f"{split} {i}", str(i % 3), str(i % 2)) for i in range(50)]

    rows = {name: some(name) for name in ("train", "dev", "test")}
    given = replace(
        settings, splits=["train", "test"], train_rows=20, test_rows=10, train_shares=None, test_shares=None
    )
    train, test = study.split_rows(rows, given, 0)
    assert (len(train), len(test)) == (20, 10)
    assert {row.text.split()[0] for row in train} == {"train"}
    assert {row.text.split()[0] for row in test} == {"test"}


def test_an_erasure_of_the_last_state_commutes_with_pooling(small: study.Settings, rows: dict) -> None:
    train, test = study.split_rows(rows, small, 0)
    model, tokenizer = study.load(small)
    before = study.embeddings(model, tokenizer, test[:20], small)
    study.erase(model, tokenizer, train[:80], "last norm", small)
    after = study.embeddings(model, tokenizer, test[:20], small)
    assert np.abs(after - before).max() > 1e-2
    # The model computes in float32, on states of size 1 to 10.
    np.testing.assert_allclose(study.at_the_end(model, before), after, atol=1e-4)


def test_chance_is_what_answers_without_a_gap_give(settings: study.Settings) -> None:
    professions, genders = ["a", "b"] * 200, (["m"] * 2 + ["f"] * 2) * 100
    draw = np.random.default_rng(0)
    answers = [p if draw.random() < 0.8 else "c" for p in professions]
    small = replace(settings, positive="f", shuffles=100)
    found = study.chance(answers, professions, genders, small, 0)
    # Gaps of two rates of 100 rows each have a standard deviation of sqrt(2 · 0.16 / 100) = 0.057, which is their RMS.
    assert found == pytest.approx(0.057, abs=0.015)


def test_what_was_fitted_on_is_guarded_and_classifiers_trained_on_it_learn_the_majority(outcomes: list) -> None:
    for outcome in outcomes:
        for erasure in ("last norm", "every norm"):
            assert outcome.figures[erasure]["refitted"]["gender"] == pytest.approx(0.5, abs=0.02)
        assert outcome.figures["none"]["same"]["gender"] > 0.7  # there was a concept to erase


def test_the_page_has_a_line_for_every_way(outcomes: list, small: study.Settings, tmp_path: Path) -> None:
    text = study.report(outcomes, small, "python …")
    assert HEAD in text
    assert len([line for line in text.splitlines() if line.startswith(("| none", "| last norm", "| every norm"))]) == 5
    study.figure(outcomes, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_page_in_the_folder_is_of_at_least_three_seeds() -> None:
    text = (FOLDER / "results.md").read_text()
    assert "python recipes/biographies/study.py recipes/biographies/study.yaml\n" in text
    assert HEAD in text
    assert "Differs from the paper" in text
    made = [study.Outcome(**entry) for entry in json.loads((FOLDER / "results.json").read_text())]
    assert len(made) >= 3
    assert study.table(made) in text and study.gap_table(made) in text


@pytest.mark.slow
def test_the_study_agrees_in_kind_with_the_paper(settings: study.Settings, rows: dict) -> None:
    known: dict[str, np.ndarray] = {}
    found = [study.run_seed(settings, rows, seed, known) for seed in (0, 1, 2)]

    def mean(erasure: str, classifier: str, figure: str) -> float:
        return float(np.mean([o.figures[erasure][classifier][figure] for o in found]))

    assert mean("none", "same", "rms") > 1.5 * mean("last norm", "refitted", "rms")
    assert mean("none", "same", "correlation") > 0.7 > mean("last norm", "refitted", "correlation")
    assert mean("last norm", "refitted", "profession") > mean("none", "same", "profession") - 0.05
    assert mean("none", "same", "gender") > 0.85
