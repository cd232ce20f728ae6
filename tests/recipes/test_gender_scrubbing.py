"""The parts of the gender study, and the study itself on one split."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_erasure import fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import ConceptMoments
from recipes import studies
from recipes.gender_scrubbing import study

FOLDER = Path(study.__file__).parent


@pytest.fixture(scope="module")
def settings(assets: Path) -> study.Settings:
    settings = study.read_settings(FOLDER / "study.yaml")
    settings.model = str(assets / "models" / "stories260k")
    settings.stories = str(assets / "data" / "tinystories-sample" / "tinystories.txt")
    return settings


@pytest.fixture(scope="module")
def tokenizer(settings: study.Settings):
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_a_study_without_its_models_and_data_says_where_they_should_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(studies.VARIABLE, "nowhere")
    monkeypatch.setattr("sys.argv", ["study.py", str(FOLDER / "study.yaml"), "model=other"])
    with pytest.raises(SystemExit, match="2"):
        studies.start(study.main)
    said = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "there is no folder nowhere with the models and data of stories, which are not in the" in said
    assert f"Set {studies.VARIABLE} to such a folder, or set stories=… after the file." in said


def test_a_setting_that_is_not_known_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], assets: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["study.py", str(FOLDER / "study.yaml"), "sed=1"])
    with pytest.raises(SystemExit, match="2"):
        studies.start(study.main)
    said = capsys.readouterr().err
    assert said.startswith("Error: sed is not known in a recipe; it has ") and said.count("\n") == 1, said


def test_no_name_and_no_prompt_is_in_two_sets() -> None:
    materials = study.read_settings(FOLDER / "study.yaml").materials.values()
    for lists in ([m.male + m.female for m in materials], [m.prompts for m in materials]):
        together = [item for items in lists for item in items]
        assert len(set(together)) == len(together)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_measured_on_was_not_fitted_on(settings: study.Settings, seed: int) -> None:
    stories = study.read_stories(settings.stories)
    split = study.split_data(settings.materials["report"], stories, settings, seed)
    assert not set(split.fit.male + split.fit.female) & set(split.test.male + split.test.female)
    assert not set(split.fit.prompts) & set(split.test.prompts)
    assert not set(split.background) & set(split.test_stories)
    assert len(split.test.male) == len(split.test.female)
    chosen_on = settings.materials["choice"]
    assert not set(chosen_on.male + chosen_on.female) & set(split.test.male + split.test.female)


def test_stories_are_whole_and_single_spaced(settings: study.Settings) -> None:
    stories = study.read_stories(settings.stories)
    assert len(stories) > 180
    assert not any("\n\n" in story for story in stories)
    assert sum(story.startswith(("Once ", "One day, a")) for story in stories) >= len(stories) - 2


@pytest.mark.parametrize(("positions", "labelled"), [("all", "<s>Mom saw Tim run"), ("last", "run")])
def test_labels_stand_where_the_setting_says(tokenizer, positions: str, labelled: str) -> None:
    material = study.Material(["Tim"], ["Sue"], ["Mom saw {name} run"])
    row = study.labelled_rows(material, tokenizer, positions)[0]
    kept = [i for i, label in zip(row["input_ids"], row["gender"], strict=True) if label == 0]
    text = tokenizer.decode(kept).replace("<s> ", "<s>").strip()
    assert text.endswith("n") if positions == "last" else text == labelled
    assert set(row["gender"]) <= {0, study.IGNORED}


def test_labels_from_the_name_on_begin_where_it_ends(tokenizer) -> None:
    material = study.Material(["Tim"], ["Sue"], ["Mom saw {name} run"])
    row = study.labelled_rows(material, tokenizer, "name")[0]
    before = [i for i, label in zip(row["input_ids"], row["gender"], strict=True) if label == study.IGNORED]
    assert tokenizer.decode(before).replace("<s> ", "<s>") in ("<s>Mom saw", "<s>Mom saw T", "<s>Mom saw Ti")


def test_fitting_site_after_site_is_what_the_library_does_in_one_pass(settings: study.Settings, tokenizer) -> None:
    material = study.Material(
        ["Tim", "Tom"], ["Sue", "Mia"], ["{name} ran home because", "One day, mom saw {name} and"] * 2
    )
    batches = list(study.labelled_batches(material, tokenizer, dataclasses.replace(settings, positions="all")))
    ours, by_hand = study.fresh_model(settings), study.fresh_model(settings)
    fit_concept_erasure(ours, batches, study.ADAPTER, progress=False)
    study.fit_in_order(by_hand, batches, lambda x, z: ConceptMoments(x.shape[1], 2).update(x, z).eraser())
    probe = torch.randn(5, 64)
    for path, layer in erasure_layers(ours).items():
        left, right, bias = layer.eraser_state(study.ADAPTER)
        other_left, other_right, other_bias = erasure_layers(by_hand)[path].eraser_state(study.ADAPTER)
        torch.testing.assert_close(probe @ right.T @ left.T, probe @ other_right.T @ other_left.T, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(bias, other_bias, rtol=1e-4, atol=1e-5)


def test_the_references_eraser_is_the_same_map_in_our_form() -> None:
    from concept_erasure import LeaceFitter

    x, z = torch.randn(200, 6), torch.randint(0, 2, (200,))
    theirs = LeaceFitter.fit(x, torch.nn.functional.one_hot(z, 2).float()).eraser
    torch.testing.assert_close(study.solve_by_reference(x, z)(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_probabilities_do_not_depend_on_padding(settings: study.Settings, tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(settings.model).eval()
    material = study.Material(["Tim", "Michael"], ["Sue", "Jessica"], ["{name} was happy because"])
    found = study.pronoun_probabilities(model, tokenizer, material, settings.pronouns)
    assert found.shape == (1, 2, 2, 2)
    ids = tokenizer("Jessica was happy because", return_tensors="pt").input_ids
    with torch.no_grad():
        alone = model(ids).logits[0, -1].softmax(-1)[[281, 358]]
    torch.testing.assert_close(found[0, 1, 1], alone, rtol=1e-4, atol=1e-6)


def test_a_pronoun_of_several_tokens_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="give pronouns of one token"):
        study.pronoun_token(tokenizer, " themselves")


def test_the_settings_start_with_the_command_that_runs_them() -> None:
    command = "# python recipes/gender_scrubbing/study.py recipes/gender_scrubbing/study.yaml\n"
    assert (FOLDER / "study.yaml").read_text().startswith(command)


@pytest.mark.slow
def test_a_background_erases_and_lets_the_model_go_on_speaking(settings: study.Settings, tmp_path: Path) -> None:
    outcomes = [study.run_seed(settings, seed) for seed in settings.seeds]
    for pronoun in settings.pronouns:
        falls = [outcome.figures["background, shrinkage"][f"gap P({pronoun}) fell"] for outcome in outcomes]
        assert sum(falls) / len(falls) >= 0.7
    for outcome in outcomes:
        rise = {fit: figures["loss rose"] for fit, figures in outcome.figures.items()}
        assert rise["background, shrinkage"] <= 0.06
        assert rise["background, shrinkage"] < min(rise["shrinkage only"], rise["neither"], rise["reference's fit"])
    study.figure(outcomes, settings.pronouns, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "| background, shrinkage |" in study.report(outcomes, settings)
