"""The study of a model that was made biased: its split, a very short run, and the possible claims of its page."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest

from recipes import studies
from recipes.gradiend_balance import study

FOLDER = Path(study.__file__).parent


@pytest.fixture(scope="module")
def settings(assets: Path) -> study.Settings:
    """The settings of the file, with a model and stories of the test material."""
    settings = studies.read_settings(study.Settings, FOLDER / "study.yaml", [], "model")
    settings.model = str(assets / "models" / "stories260k")
    settings.stories = str(assets / "data" / "tinystories-sample" / "tinystories.txt")
    return settings


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_is_measured_on_that_was_fitted_or_chosen_on(settings: study.Settings, seed: int) -> None:
    split = study.split_data(settings, seed)
    people = [split.known, split.choice, split.test]
    assert all(people) and sum(map(len, people)) == len(set().union(*people)) == len(settings.occupations)
    parts = [*split.sentences.values(), settings.feature_sentences]
    assert all(parts) and sum(map(len, parts)) == len(set().union(*parts))
    assert not set(split.stories["choice"]["text"]) & set(split.stories["test"]["text"])
    learned = {person.split()[-1] for people in settings.feature_people.values() for person in people}
    assert not learned & set(settings.occupations)


def test_a_short_run_writes_tables_and_figure(
    settings: study.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_seed, made = study.run_seed, []

    def run(given: study.Settings, skew: str, seed: int) -> study.Outcome:
        """An interval takes two seeds, so the first seed's outcome is used for the second, too."""
        made.extend([] if made else [run_seed(given, skew, seed)])
        return dataclasses.replace(made[0], seed=seed)

    monkeypatch.setattr(study, "run_seed", run)
    overrides = [
        f"output={tmp_path}", f"model={settings.model}", f"stories={settings.stories}", "skews=[all he]", "seeds=[0,1]",
        "steps=16", "batch_size=8", "choice_stories=6", "test_stories=6", "feature_factors=[-1]",
        "learning_rates=[1.0e-3]", "difference_rates=[1.0]", "budget=1.0",
        f"feature_sentences={json.dumps(settings.feature_sentences[:2])}",
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*6 neutral texts")
        study.main(FOLDER / "study.yaml", overrides)
    outcome, _ = json.loads((tmp_path / "results.json").read_text())
    figures = outcome["figures"]
    assert list(figures) == list(study.ROWS)
    assert figures["biased"]["strangers he"] > figures["original"]["strangers he"] + 0.3
    for way in study.WAYS:
        assert figures[way]["strangers bpi"] > figures["biased"]["strangers bpi"]
    assert "## all he" in (tmp_path / "results.md").read_text() and (tmp_path / "figure.png").stat().st_size > 1000


def test_the_page_is_of_the_outcomes_beside_it() -> None:
    outcomes = [study.Outcome(**outcome) for outcome in json.loads((FOLDER / "results.json").read_text())]
    settings = studies.read_settings(study.Settings, FOLDER / "study.yaml", [], "model")
    command = studies.command_line("gradiend_balance", Path("recipes/gradiend_balance/study.yaml"), [])
    assert study.report(outcomes, settings, command) == (FOLDER / "results.md").read_text()
