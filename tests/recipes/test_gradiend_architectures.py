"""The models that the architecture study trains, a small run of it, and the recipes for models on the Hub."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from recipes.gradiend_architectures import study
from recipes.gradiend_gender import study as gender

FOLDER = Path(study.__file__).parent
HUB = sorted((FOLDER / "hub").glob("*.yaml"))
IDS = {
    "bert-base-cased", "bert-large-cased", "distilbert-base-cased", "roberta-large", "gpt2", "meta-llama/Llama-3.2-3B"
}  # fmt: skip
RUN = ("bert-base-cased", "llama-3.2-3b")
TINY = [
    "train_rows=16", "eval_rows=8", "choice_stories=3", "letters=200", "feature_factors=[1, -1]",
    "learning_rates=[1.0e-3]", "seeds=[0]",
]  # fmt: skip


@pytest.fixture
def stories(short_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_ERASURE_TEST_ASSETS", str(short_assets))
    told = (short_assets / "data" / "tinystories-sample" / "tinystories.txt").read_text(encoding="utf-8")
    path = tmp_path / "stories.txt"
    path.write_text(told[:12_000], encoding="utf-8")
    return path


@pytest.fixture
def tiny(stories: Path, tmp_path: Path) -> study.Settings:
    lessons = ["lessons.steps=3", "lessons.rows=2", "lessons.sentences=40", "lessons.sampled=0"]
    paths = [f"stories={stories}", f"output={tmp_path}", f"folder={tmp_path / 'models'}"]
    return gender.read_settings(FOLDER / "study.yaml", [*TINY, *lessons, *paths], study.Settings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:None of")
def test_every_architecture_has_a_line(tiny: study.Settings) -> None:
    rows = study.run(tiny)
    lines = study.table(rows, tiny).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| Llama", "| BERT", "| GPT-2", "| GPT-NeoX", "| DistilBERT", "| RoBERTa", "| T5"
    ]  # fmt: skip
    assert {row.kind for row in rows.values()} == {
        "LlamaForCausalLM", "BertForMaskedLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "DistilBertForMaskedLM",
        "RobertaForMaskedLM", "T5ForConditionalGeneration",
    }  # fmt: skip


def test_a_trained_model_is_kept(tiny: study.Settings) -> None:
    tiny.build = {"GPT-2": tiny.build["GPT-2"]}
    (path, seconds) = study.models(tiny)["GPT-2"]
    weights = Path(path, "model.safetensors")
    written = weights.stat().st_mtime_ns
    assert study.models(tiny)["GPT-2"] == (path, seconds)
    assert weights.stat().st_mtime_ns == written


def test_models_learn_from_nothing_that_is_reported_on(tiny: study.Settings) -> None:
    split = gender.split_data(gender.read_stories(tiny.stories), tiny, 0)
    texts = study.taught_texts(tiny, split)
    beginnings = [prompt.split("[FEATURE]")[0].split("{name}")[1] for prompt in tiny.materials["report"].prompts]
    lessons = [text for text in texts if len(text) < 80]
    assert not [text for text in lessons if any(begin in text for begin in beginnings)]
    assert not [
        story for story in split.test.stories["text"] if any(text and text in story for text in texts if len(text) > 60)
    ]


def test_labels_of_a_lesson_are_what_was_taken_out(short_assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(short_assets / "models" / "stories260k")
    tokenizer.add_tokens(study.SENTINELS, special_tokens=True)
    rows = torch.arange(5, 45).view(2, 20)
    batch = study.lesson(rows, tokenizer, "seq2seq", 0.2, random.Random(0))
    holes = tokenizer.convert_tokens_to_ids(study.SENTINELS)
    back = batch["input_ids"].clone()
    for row in range(2):
        taken = batch["labels"][row][batch["labels"][row] != study.IGNORED]
        back[row, torch.isin(back[row], torch.tensor(holes))] = taken
    assert torch.equal(back, rows)
    # The label at a position is the next token of the decoder's input.
    shifted, labels = batch["decoder_input_ids"][:, 1:], batch["labels"][:, :-1]
    labelled = labels != study.IGNORED
    assert labelled.sum() > 4
    assert torch.equal(shifted[labelled], labels[labelled])
    tokenizer = AutoTokenizer.from_pretrained(short_assets / "models" / "story-mlm")
    batch = study.lesson(rows, tokenizer, "masked", 0.2, random.Random(0))
    masked = batch["input_ids"] == tokenizer.mask_token_id
    assert torch.equal(batch["labels"][masked], rows[masked])
    assert torch.equal(masked, batch["labels"] != study.IGNORED)


def test_there_is_a_recipe_for_every_model_of_the_papers() -> None:
    found = [gender.read_settings(path) for path in HUB]
    assert {path for settings in found for path in settings.models.values()} == IDS


def test_the_hub_recipes_differ_in_the_model_alone() -> None:
    first, *others = [yaml.safe_load(path.read_text()) for path in HUB]
    for other in others:
        assert {key for key in first | other if first.get(key) != other.get(key)} <= {"models", "output", "dtype"}


# One recipe for each kind and each precision; the others have the same settings, as the test above checks.
@pytest.mark.filterwarnings("ignore:None of")
@pytest.mark.parametrize("path", [path for path in HUB if path.stem in RUN], ids=lambda path: path.stem)
def test_a_hub_recipe_runs_on_a_stand_in(path: Path, short_assets: Path, stories: Path, tmp_path: Path) -> None:
    settings = gender.read_settings(path, [*TINY, f"stories={stories}", f"output={tmp_path}"])
    (name,) = settings.models
    causal = name.startswith(("gpt2", "llama"))
    settings.models = {name: str(short_assets / "models" / ("stories260k" if causal else "story-mlm"))}
    text = gender.report(gender.run(settings), settings, "the command")
    assert f"| {name} | closed form, factual |" in text


@pytest.mark.parametrize("path", HUB, ids=lambda path: path.stem)
def test_a_hub_recipe_starts_with_the_command_that_runs_it(path: Path) -> None:
    command = f"# python recipes/gradiend_gender/study.py recipes/gradiend_architectures/hub/{path.name}\n"
    assert path.read_text().startswith(command)


def test_the_settings_start_with_the_command_that_runs_them() -> None:
    command = "# python recipes/gradiend_architectures/study.py recipes/gradiend_architectures/study.yaml\n"
    assert (FOLDER / "study.yaml").read_text().startswith(command)


@pytest.mark.slow
def test_every_architecture_is_read_and_written(assets: Path, tmp_path: Path) -> None:
    settings = gender.read_settings(FOLDER / "study.yaml", [f"folder={tmp_path}"], study.Settings)
    for name, row in study.run(settings).items():
        fit = row.outcomes[0].fits[row.outcomes[0].written]
        assert fit.encoding["cor"] >= 0.8, name
        for goal in settings.goals:
            assert fit.edits[goal].times(goal) > 1.2, name
