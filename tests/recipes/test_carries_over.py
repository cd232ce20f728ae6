"""The study of how an erasure carries over to unlabelled texts: its parts, a short run, and its page's claims."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_erasure.recipes import occupation_sentences
from recipes.carries_over import study

FOLDER = Path(study.__file__).parent


@pytest.fixture(scope="module")
def settings(short_assets: Path) -> study.Settings:
    settings = study.studies.read_settings(study.Settings, FOLDER / "study.yaml", (), "")
    return dataclasses.replace(
        settings,
        encoders=[str(short_assets / "models" / "story-mlm")],
        biographies=str(short_assets / "data" / "bias-in-bios"),
        template_encoder=str(short_assets / "models" / "story-mlm"),
        max_length=16,
    )


def test_the_settings_start_with_the_command_that_runs_them() -> None:
    command = "# python recipes/carries_over/study.py recipes/carries_over/study.yaml\n"
    assert (FOLDER / "study.yaml").read_text().startswith(command)


def test_no_biography_is_fitted_on_and_measured(settings: study.Settings) -> None:
    rows = study.biographies(settings)
    fitted, held = study.split(rows, 60, seed=0)
    assert not set(fitted) & set(held)
    assert len(fitted) == 60
    assert len(held) >= 400
    assert {rows[place]["gender"] for place in fitted} == {"female", "male"}
    assert not {rows[place]["text"] for place in fitted} & {rows[place]["text"] for place in held}


def fewer_sentences(seed: int) -> dict[str, Dataset]:
    """All templates and occupations of the test split, in a quarter of its sentences."""
    data = occupation_sentences(seed)
    return {"train": data["train"], "test": data["test"].shuffle(seed=0).select(range(len(data["test"]) // 4))}


def test_a_short_run_writes_tables_and_figure(
    settings: study.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[Any, Any] = {"rows": study.biographies(settings)[::8]}
    outcome = study.run_biographies(settings, settings.encoders[0], known, 30, seed=0)
    assert list(outcome.figures) == list(study.WAYS)
    assert [outcome.figures[way]["rank"] for way in study.WAYS] == [0, 1, 1, 2, 6, 1]
    assert outcome.figures["nothing"]["moved"] == 0
    assert 0.5 < outcome.figures["LEACE"]["expected"] <= outcome.figures["nothing"]["linear"]
    few = dataclasses.replace(settings, template_rows=64, template_ranks=[2])
    monkeypatch.setattr(study, "occupation_sentences", fewer_sentences)
    found = [outcome, study.run_templates(few, seed=0)]
    outcomes = [dataclasses.replace(one, seed=seed) for one in found for seed in (0, 1)]  # an interval takes two
    text = study.report(outcomes, few, "command")
    assert "| counterfactuals, pair_rank=4 | 6 |" in text
    assert "| environment_rank=2 |" in text
    study.figure(outcomes, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_page_says_what_was_found() -> None:
    outcomes = [study.Outcome(**found) for found in json.loads((FOLDER / "results.json").read_text())]
    settings = study.studies.read_settings(study.Settings, FOLDER / "study.yaml", (), "")
    command = study.studies.command_line("carries_over", Path("recipes/carries_over/study.yaml"), ())
    assert (FOLDER / "results.md").read_text() == study.report(outcomes, settings, command)
    parts = {(o.part, o.encoder, o.fitted) for o in outcomes}
    assert {("biographies", "embedded", 60), ("biographies", "embedded", 180)} <= parts

    def mean(encoder: str, fitted: int, way: str, key: str) -> float:
        own = [o for o in outcomes if (o.part, o.encoder, o.fitted) == ("biographies", encoder, fitted)]
        return sum(study.values(own, way, key)) / len(own)

    # How much 60 and 180 labelled biographies leave, and how much their counterfactuals leave.
    for fitted, most in ((60, 0.66), (180, 0.62)):
        assert mean("embedded", fitted, "LEACE", "linear") > mean("embedded", fitted, "counterfactuals", "linear")
        assert mean("embedded", fitted, "counterfactuals", "linear") <= most
        assert mean("embedded", fitted, "counterfactuals", "moved") <= 0.07
        before, after = (mean("embedded", fitted, way, "profession") for way in ("nothing", "counterfactuals"))
        assert before - after <= 0.01
