"""The study of amnesic probing: its parts, a small run, and the form of its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.amnesic_probing import study

FOLDER = Path(study.__file__).parent


def of_assets(assets: Path) -> study.Settings:
    ewt = assets / "data" / "ud-ewt"
    return replace(
        study.read_settings(FOLDER / "study.yaml"), model=str(assets / "models" / "stories260k"),
        fit=str(ewt / "en_ewt-ud-dev.conllu"), test=str(ewt / "en_ewt-ud-test.conllu"),
        stories=str(assets / "data" / "tinystories-sample" / "tinystories.txt"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def settings(short_assets: Path) -> study.Settings:
    return replace(
        of_assets(short_assets), fit_sentences=80, test_sentences=30, test_stories=3, max_tokens=64, probe_tokens=300,
        random_draws=1, seeds=[0, 1],
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(settings: study.Settings):
    found = AutoTokenizer.from_pretrained(settings.model)
    found.pad_token = found.pad_token or found.eos_token
    return found


def test_the_settings_start_with_the_command_that_runs_them() -> None:
    command = "# python recipes/amnesic_probing/study.py recipes/amnesic_probing/study.yaml\n"
    assert (FOLDER / "study.yaml").read_text().startswith(command)


def test_what_is_measured_on_was_not_fitted_on(settings: study.Settings, tokenizer) -> None:
    data = study.draw_data(settings, tokenizer, 0)
    fitted = {tuple(row.tolist()) for batch in data.fit for row in batch["input_ids"]}
    measured = {tuple(row.tolist()) for batch in data.test for row in batch["input_ids"]}
    assert fitted and measured and not fitted & measured
    assert len(data.texts[1]) == settings.test_stories
    other = study.draw_data(settings, tokenizer, 1)
    assert other.texts != data.texts


@pytest.mark.filterwarnings("ignore")
def test_one_block_is_erased_and_the_model_left_as_it_was(settings: study.Settings, tokenizer) -> None:
    data = study.draw_data(settings, tokenizer, 0)
    model = AutoModelForCausalLM.from_pretrained(settings.model).eval()
    before = study.bits(model, tokenizer, data)
    found = study.run_layer(model, tokenizer, data, settings, 1, torch.Generator().manual_seed(0))
    assert study.bits(model, tokenizer, data) == before
    assert found.bits["erased"] != before
    assert found.bits["random"] != found.bits["erased"]
    chance = study.majority(data.tags[1])
    # On 300 tokens, an accuracy has a standard deviation of 0.03.
    assert found.probe["after"] < chance + 0.09
    assert found.probe["before"] > found.probe["after"]


@pytest.mark.filterwarnings("ignore")
def test_the_page_has_a_line_for_every_block(settings: study.Settings, tmp_path: Path) -> None:
    layer = study.Layer(
        {"erased": (4.5, 2.0), "random": (4.25, 1.75)}, {"before": 0.5, "after": 0.25, "random": 0.4, "at the end": 0.3}
    )
    made = [study.Outcome(seed, (4.0, 1.5), [layer] * 2, 0.5, 0.25, 16, 64, (900, 300)) for seed in (0, 1)]
    text = study.report(made, settings, "python …")
    rise = "+0.500 [+0.500, +0.500] | +0.250 [+0.250, +0.250]"
    assert f"| 1 | {rise} | {rise} | +0.250 [+0.250, +0.250] | 0.500 [0.500, 0.500] |" in text
    study.figure(made, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_page_in_the_folder_is_of_at_least_three_seeds() -> None:
    text = (FOLDER / "results.md").read_text()
    assert "python recipes/amnesic_probing/study.py recipes/amnesic_probing/study.yaml\n" in text
    assert "Differs from the paper" in text
    entries = json.loads((FOLDER / "results.json").read_text())
    made = [
        study.Outcome(**entry | {"layers": [study.Layer(**layer) for layer in entry["layers"]]}) for entry in entries
    ]
    assert len(made) >= 3
    assert study.table(made) in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_probe_reads_nothing_where_it_was_erased(assets: Path) -> None:
    settings = replace(of_assets(assets), random_draws=1)
    found = study.run_seed(settings, 0)
    assert len(found.layers) == 5
    for layer in found.layers:
        assert layer.probe["after"] < found.majority + 0.03
        assert layer.probe["random"] > found.majority + 0.05
        assert layer.bits["erased"][1] > found.base[1]
