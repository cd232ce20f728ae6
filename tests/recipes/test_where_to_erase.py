"""The study of places to erase: each is erased, merged and reported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hf_erasure.adapters import erasure_layers
from recipes.gender_scrubbing import study as stories
from recipes.where_to_erase import study

FOLDER = Path(study.__file__).parent


@pytest.fixture
def settings(short_assets: Path, monkeypatch: pytest.MonkeyPatch) -> study.Settings:
    read = stories.read_settings

    def few(path: str | Path) -> stories.Settings:
        """The settings of the study of stories, cut so that a run takes a second."""
        whole = read(Path(stories.__file__).parent / "study.yaml")
        report = whole.materials["report"]
        cut = stories.Material(report.male[:6], report.female[:6], report.prompts[:4])
        return dataclasses.replace(
            whole, materials={"report": cut}, fit_only=[], background_stories=4, story_tokens=32, batch_size=32
        )

    monkeypatch.setattr(stories, "read_settings", few)
    found = study.read_settings(FOLDER / "study.yaml")
    return dataclasses.replace(found, seeds=[0], strengths=[0.5, 1.0], places=["norms", "readers", "blocks"])


def test_readers_do_what_norms_do_and_merge(settings: study.Settings) -> None:
    found = study.gender_in_stories(settings, 0, "last")
    assert list(found) == ["none", "norms", "readers", "blocks"]
    # In this model all norms feed readers and nothing else; the maps differ only in how they keep the mean.
    assert found["readers"]["gap P(she) fell"] == pytest.approx(found["norms"]["gap P(she) fell"], abs=0.05)
    assert [found[place]["merges"] for place in settings.places] == ["no", "untied", "no"]
    strengths = [strength for strength, *_ in found["readers"]["dial"]]
    assert strengths == settings.strengths
    assert found["readers"]["dial"][1][1] == pytest.approx(1 - found["readers"]["gap P(she) fell"])


def test_a_place_that_a_model_does_not_have_is_left_out_and_said(
    settings: study.Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    few = dataclasses.replace(settings, places=["writers", "readers"])
    found = study.gender_in_masked_stories(few, 0)
    assert list(found) == ["none", "readers"]
    assert "BertForMaskedLM, writers: target_modules='writers' does not guard" in capsys.readouterr().err
    assert found["readers"]["merges"] == "yes"


def test_two_adapters_act_together(short_assets: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(short_assets / "models" / "stories260k")
    active: list[list[str]] = []
    model = study.erased(
        plain, "readers and writers", "gender", stories.GENDERS, lambda m, _: active.append(m.active_adapters())
    )
    assert active == [["gender_0"], ["gender_0", "gender_1"]]
    assert not hasattr(plain, "peft_config")
    assert len(erasure_layers(model, "gender_0")) == 5  # the embedding, and two maps of each of two blocks


def test_the_settings_start_with_the_command_that_runs_them() -> None:
    first = (FOLDER / "study.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == "# python recipes/where_to_erase/study.py recipes/where_to_erase/study.yaml"
