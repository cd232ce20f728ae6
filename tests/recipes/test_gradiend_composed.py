"""The study of GRADIEND with an erasure: its parts, a small run, and the form of its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from hf_erasure.models.scorer import LanguageScorer
from recipes.gradiend_composed import study
from recipes.gradiend_gender import study as gender

FOLDER = Path(study.__file__).parent


@pytest.fixture(scope="module")
def settings(short_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> study.Settings:
    folder = tmp_path_factory.mktemp("composed")
    told = (short_assets / "data" / "tinystories-sample" / "tinystories.txt").read_text(encoding="utf-8")
    (folder / "stories.txt").write_text(told[:16_000], encoding="utf-8")
    return replace(
        study.read_settings(FOLDER / "study.yaml"),
        models={name: str(short_assets / "models" / name) for name in ("stories260k", "story-mlm")},
        stories=str(folder / "stories.txt"), seat=str(few_sentences(short_assets, folder)),
        stereoset=str(few_items(short_assets, folder)), output=str(folder),
        train_rows=32, eval_rows=12, choice_stories=4, background_stories=4, letters=120, feature_factors=[0.0],
        learning_rates=[1e-3],
    )  # fmt: skip


def few_sentences(short_assets: Path, folder: Path) -> Path:
    """SEAT's gender tests with a few sentences in each set; those of the study have hundreds, and are run six times."""
    for name in study.GENDER_TESTS:
        test = json.loads((short_assets / "data" / "seat" / f"{name}.jsonl").read_text(encoding="utf-8"))
        short = {key: {**part, "examples": part["examples"][:6]} for key, part in test.items()}
        (folder / f"{name}.jsonl").write_text(json.dumps(short), encoding="utf-8")
    return folder


def few_items(short_assets: Path, folder: Path) -> Path:
    """StereoSet's first items about gender."""
    whole = json.loads((short_assets / "data" / "stereoset" / "dev.json").read_text(encoding="utf-8"))
    items = [item for item in whole if item["bias_type"] == "gender"]
    (folder / "dev.json").write_text(json.dumps(items[:12]), encoding="utf-8")
    return folder / "dev.json"


def test_the_settings_start_with_the_command_that_runs_them() -> None:
    command = "# python recipes/gradiend_composed/study.py recipes/gradiend_composed/study.yaml\n"
    assert (FOLDER / "study.yaml").read_text().startswith(command)


@pytest.mark.parametrize("name", ["stories260k", "story-mlm"])
def test_the_token_that_predicts_the_pronoun_is_labelled(settings: study.Settings, name: str) -> None:
    _, tokenizer = gender.load(settings.models[name])
    pairs = Dataset.from_dict({"text": ["Lily was happy because [FEATURE] ran."], "label": ["female"]})
    (row,) = study.labelled_rows(pairs, tokenizer)
    (at,) = [place for place, label in enumerate(row["gender"]) if label is not None]
    if tokenizer.mask_token:
        assert row["input_ids"][at] == tokenizer.mask_token_id
    else:
        assert at == len(row["input_ids"]) - 1
        assert tokenizer.decode(row["input_ids"]).endswith("because")


@pytest.mark.parametrize("name", ["stories260k", "story-mlm"])
def test_pronouns_are_scored_as_the_model_itself_scores_them(settings: study.Settings, name: str) -> None:
    model, tokenizer = gender.load(settings.models[name])
    pairs = Dataset.from_dict({"text": ["Lily was happy because [FEATURE] ran."]})
    found = study.pronouns(LanguageScorer(model, tokenizer), pairs, settings)
    masked = tokenizer.mask_token is not None
    text = pairs["text"][0].replace("[FEATURE]", tokenizer.mask_token) if masked else "Lily was happy because"
    inputs = tokenizer(text, return_tensors="pt")
    at = int((inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()) if masked else -1
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0, at].detach()
    space = "" if masked else "so "
    words = [tokenizer(space + word, add_special_tokens=False)["input_ids"][-1] for word in settings.words.values()]
    np.testing.assert_allclose(found[0], logits.log_softmax(-1)[words], atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_both_adapters_act_together(settings: study.Settings) -> None:
    found = study.run_seed("stories260k", settings, 0)
    assert list(found.figures) == list(study.WAYS)
    assert found.active["GRADIEND + LEACE"] == [study.GRADIEND, study.ERASURE]
    losses = [found.figures[way]["loss"] for way in study.WAYS]
    # The budget may refuse the edit; erasures always act, and each differently.
    assert len({round(loss, 6) for loss in losses}) >= 3
    if found.chosen["learning_rate"]:
        assert len({round(loss, 6) for loss in losses}) == len(study.WAYS)


def test_the_page_in_the_folder_is_of_at_least_three_seeds() -> None:
    text = (FOLDER / "results.md").read_text()
    assert "python recipes/gradiend_composed/study.py recipes/gradiend_composed/study.yaml\n" in text
    assert "Differs from the paper" in text
    made = [study.Outcome(**entry) for entry in json.loads((FOLDER / "results.json").read_text())]
    for name, outcomes in study.by_model(made).items():
        assert len(outcomes) >= 3
        assert f"## {name}" in text
        assert study.table(outcomes) in text
    assert study.chosen_table(made) in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_erasure_narrows_the_gap_with_and_without_the_edit(settings: study.Settings, assets: Path) -> None:
    whole = study.read_settings(FOLDER / "study.yaml")
    models = {"stories260k": str(assets / "models" / "stories260k")}
    found = study.run_seed("stories260k", replace(whole, models=models, output=settings.output), 0)
    base = found.figures["base"]["gap P(she)"]
    for way in ("LEACE", "INLP", "GRADIEND + LEACE", "GRADIEND + INLP"):
        assert abs(found.figures[way]["gap P(she)"]) < base / 2
