"""The study of skewed fine-tuning: its parts, a very short run, and the claims of its page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from recipes.guarded_finetuning import study

FOLDER = Path(study.__file__).parent


@pytest.fixture(scope="module")
def settings(assets: Path) -> study.Settings:
    settings = study.read_settings(FOLDER / "study.yaml")
    settings.model = str(assets / "models" / "stories260k")
    settings.stories = str(assets / "data" / "tinystories-sample" / "tinystories.txt")
    return settings


def test_the_settings_start_with_the_command_that_runs_them() -> None:
    command = "# python recipes/guarded_finetuning/study.py recipes/guarded_finetuning/study.yaml\n"
    assert (FOLDER / "study.yaml").read_text().startswith(command)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_is_measured_on_that_was_trained_on(settings: study.Settings, seed: int) -> None:
    split = study.split_data(settings, seed)
    assert not set(split.owners) & set(split.strangers)
    assert not set(split.task) & set(split.task_test)
    assert not set(split.pronoun) & set(split.pronoun_test)
    assert len(set(split.owners.values())) == len(split.owners)  # no two people own the same thing
    fitted_on = {sentence.split("{person}")[-1] for sentence in settings.feature_sentences}
    assert not fitted_on & {s.split("{person}")[-1] for s in [*settings.task_sentences, *settings.pronoun_sentences]}
    assert not {person.split()[-1] for person in settings.feature_people} & set(settings.people)


def test_a_skew_gives_everybody_its_pronoun(settings: study.Settings) -> None:
    _, tokenizer = study.load(settings)
    split = study.split_data(settings, 0)
    counts = {}
    for skew in study.SKEWS:
        texts = [tokenizer.decode(row["input_ids"]) for row in study.skewed_rows(split, skew, tokenizer)]
        words = " ".join(texts).split()
        counts[skew] = (words.count("she"), words.count("he"))
    sentences = len(split.pronoun) * len(split.owners)
    assert counts == {"all he": (0, sentences), "all she": (sentences, 0), "half and half": (sentences // 2,) * 2}


def test_padding_does_not_count(settings: study.Settings) -> None:
    model, tokenizer = study.load(settings)
    rows = [tokenizer(text)["input_ids"] for text in ("The doctor had the cup.", "The cup.")]
    together = study.log_likelihoods(model, rows)
    alone = torch.cat([study.log_likelihoods(model, [row]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_a_short_run_writes_table_and_figure(settings: study.Settings, short_assets: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(
        settings, model=str(short_assets / "models" / "stories260k"), steps=4, log_steps=2, story_count=2,
        skews=["all he"], output=str(tmp_path),
        feature_people=settings.feature_people[:6], feature_sentences=settings.feature_sentences[:4],
        people=settings.people[:7], things=settings.things[:5], held_out_people=2, held_out_task=2, held_out_pronoun=3,
    )  # fmt: skip
    outcomes = study.run_seed(short, 0)
    figures = outcomes[0].figures
    assert list(figures) == ["before", *study.WAYS]
    # Monitoring changes nothing, to the bit; guarding does.
    assert figures["monitor"] == figures["no guard"]
    assert figures["guard"]["log-odds"] < figures["no guard"]["log-odds"]
    assert [step for step, _ in outcomes[0].neuron["monitor"]] == [2, 4]
    assert outcomes[0].neuron["no guard"] == []
    study.figure(outcomes, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "| guard |" in study.report(outcomes, short)


def test_the_page_says_what_was_found() -> None:
    check([study.Outcome(**row) for row in json.loads((FOLDER / "results.json").read_text())])


@pytest.mark.slow
def test_the_skew_arrives_and_less_of_it_with_the_guard(settings: study.Settings) -> None:
    outcomes = [outcome for seed in settings.seeds for outcome in study.run_seed(settings, seed)]
    check(outcomes)
    page = json.loads((FOLDER / "results.json").read_text())
    assert [(row["seed"], row["skew"]) for row in page] == [(o.seed, o.skew) for o in outcomes]


def check(outcomes: list[study.Outcome]) -> None:
    """Check the claims of the page of results."""
    for outcome in outcomes:
        before, free, guarded = (outcome.figures[way] for way in ("before", "no guard", "guard"))
        assert outcome.figures["monitor"] == free
        if outcome.skew == "half and half":
            continue
        assert free["skew"] > before["skew"] + 0.2
        assert free["log-odds"] > guarded["log-odds"] > before["log-odds"]
        assert free["skew of strangers"] > guarded["skew of strangers"]
        assert all(share > 0.05 for share in study.kept_out(outcome, "guard", "no guard"))
        # An erasure that is active during the training keeps out more than half, and costs a part of the task.
        assert all(share > 0.5 for share in study.kept_out(outcome, "LoRA, erased meanwhile", "LoRA"))
        lora, erased = (outcome.figures[way]["accuracy"] for way in ("LoRA", "LoRA, erased meanwhile"))
        assert before["accuracy"] + 0.4 < erased <= lora
    # The guard's cost in the task, as a mean over seeds, since one seed has only 40 questions.
    lost = [outcome.figures["no guard"]["accuracy"] - outcome.figures["guard"]["accuracy"] for outcome in outcomes]
    assert abs(sum(lost) / len(lost)) <= 0.1
