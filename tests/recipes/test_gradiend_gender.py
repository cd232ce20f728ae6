"""The parts of the GRADIEND gender study, a small run of it, and the study itself."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hf_erasure.gradiend import FeatureDecoder
from recipes.gradiend_gender import study

FOLDER = Path(study.__file__).parent
TINY = [
    "seeds=[0]", "train_rows=8", "eval_rows=4", "choice_stories=2", "letters=120", "feature_factors=[1, -1]",
    "learning_rates=[1.0e-3]", "trained.steps=2", "trained.learning_rates=[1.0e-3]", "mask_draws=1",
    "other_sources=[difference]",
]  # fmt: skip


@pytest.fixture
def tiny(short_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> study.Settings:
    monkeypatch.setenv("HF_ERASURE_TEST_ASSETS", str(short_assets))
    told = (short_assets / "data" / "tinystories-sample" / "tinystories.txt").read_text(encoding="utf-8")
    stories = tmp_path / "stories.txt"
    stories.write_text(told[:12_000], encoding="utf-8")
    return study.read_settings(FOLDER / "study.yaml", [*TINY, f"stories={stories}", f"output={tmp_path}"])


def test_no_name_and_no_prompt_is_in_two_sets() -> None:
    materials = study.read_settings(FOLDER / "study.yaml").materials.values()
    for lists in ([m.male + m.female for m in materials], [m.prompts for m in materials]):
        together = [item for items in lists for item in items]
        assert len(set(together)) == len(together)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_three_parts_share_nothing(seed: int) -> None:
    settings = study.read_settings(FOLDER / "study.yaml")
    stories = [f"Once there was story {number}. The sky was very blue on day {number}." for number in range(60)]
    split = study.split_data(stories, settings, seed)
    parts = [split.train, split.choice, split.test]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        a, b = parts[one], parts[other]
        assert not set(a.material.female + a.material.male) & set(b.material.female + b.material.male)
        assert not set(a.material.prompts) & set(b.material.prompts)
        assert not set(a.pairs["text"]) & set(b.pairs["text"])
        for column in ("stories", "neutral"):
            assert not set(getattr(a, column)["text"]) & set(getattr(b, column)["text"])
    for part in parts:
        assert part.pairs["label"].count("female") == part.pairs["label"].count("male") > 0
    assert len(split.test.stories) == 30
    assert max(map(len, split.choice.stories["text"])) <= settings.letters


def test_pairs_have_the_pronoun_of_the_name() -> None:
    material = study.Material(["Sue"], ["Tom"], ["{name} ran when [FEATURE] saw it."])
    rows = study.pairs(material, {"female": "she", "male": "he"}, 10, random.Random(0)).to_list()
    text = "ran when [FEATURE] saw it."
    assert rows == [
        {"text": f"Sue {text}", "factual": "she", "counterfactual": "he", "label": "female"},
        {"text": f"Tom {text}", "factual": "he", "counterfactual": "she", "label": "male"},
    ]


def test_neutral_sentences_have_neither_pronoun_nor_name() -> None:
    story = (
        "Once upon a time there was a big red ball in a park. Tom was a boy who liked to play with the ball. "
        "He kicked the ball all day until it was flat. The dog of the old man Bob barked at the ball. "
        "All the children were very happy about the ball. Short one."
    )
    assert study.neutral_sentences([story], ["Tom"]) == [
        "Once upon a time there was a big red ball in a park.",
        "All the children were very happy about the ball.",
    ]


@pytest.mark.parametrize(
    ("parameter", "found"),
    [
        ("model.layers.4.self_attn.v_proj.weight", ("4", "self_attn.v_proj")),
        ("bert.encoder.layer.3.attention.self.query.bias", ("encoder 3", "attention.query")),
        ("bert.encoder.layer.0.attention.output.dense.weight", ("encoder 0", "attention.output.dense")),
        ("decoder.block.1.layer.0.SelfAttention.q.weight", ("decoder 1", "SelfAttention.q")),
        ("model.embed_tokens.weight", ("", "embed_tokens")),
    ],
)
def test_a_parameter_has_a_layer_and_a_kind(parameter: str, found: tuple[str, str]) -> None:
    assert study.place(parameter) == found


def test_shares_of_the_weights_table_add_up() -> None:
    names = ["a.layers.0.mlp.up.weight", "a.layers.0.mlp.up.bias", "a.embed.weight"]
    weight = {names[0]: torch.tensor([3.0, 0.0]), names[1]: torch.tensor([4.0]), names[2]: torch.zeros(1)}
    shapes = {name: torch.Size([len(values)]) for name, values in weight.items()}
    none = dict.fromkeys(names)
    decoder = FeatureDecoder(weight, {n: torch.zeros_like(v) for n, v in weight.items()}, none, shapes)
    table = study.weight_table(decoder, 0.5).set_index(["layer", "module"])
    assert table.loc[("0", "mlp.up"), "change"] == pytest.approx(1.0)
    assert table.loc[("0", "mlp.up"), "entries"] == pytest.approx(0.75)
    assert table.loc[("0", "mlp.up"), "kept"] == pytest.approx(1.0)


def test_special_tokens_around_a_text_are_found(short_assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(short_assets / "models" / "story-mlm")
    assert study.ends(tokenizer) == ([tokenizer.cls_token_id], [tokenizer.sep_token_id])


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match="sed is not known in a recipe; it has seeds"):
        study.read_settings(FOLDER / "study.yaml", ["sed=1"])


def test_the_settings_start_with_the_command_that_runs_them() -> None:
    command = "# python recipes/gradiend_gender/study.py recipes/gradiend_gender/study.yaml\n"
    assert (FOLDER / "study.yaml").read_text().startswith(command)


@pytest.mark.filterwarnings("ignore:None of")
def test_a_small_study_writes_every_table_and_figure(tiny: study.Settings, tmp_path: Path) -> None:
    text = study.write(study.run(tiny), tiny, "the command")
    assert (tmp_path / "results.md").read_text() == text
    for model in ("stories260k", "story-mlm"):
        for fit in ("closed form, factual", "closed form, difference", "trained, factual"):
            assert f"| {model} | {fit} |" in text
    assert text.count("| story-mlm | closed form, factual, without token_type_embeddings |") == 7
    assert "| stories260k | closed form, factual, without" not in text
    kept = {(row["model"], row["seed"]): row["fits"] for row in json.loads((tmp_path / "results.json").read_text())}
    assert list(kept) == [("stories260k", 0), ("story-mlm", 0)]
    assert f"{kept['stories260k', 0]['trained, factual']['encoding']['cor_enc']:.3f}" in text
    for name in ("encoded", "surface", "weights"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_gender_is_read_and_written_on_unseen_names_and_prompts(assets: Path, tmp_path: Path) -> None:
    settings = study.read_settings(FOLDER / "study.yaml", [f"output={tmp_path}", "trained.splits=0"])
    for outcomes in study.run(settings).values():
        fits = [outcome.fits[outcome.written] for outcome in outcomes]
        assert mean([fit.encoding["cor"] for fit in fits]) >= 0.97
        assert mean([fit.encoding["cor_enc"] for fit in fits]) >= 0.93
        for goal in ("fpi", "mpi"):
            assert mean([fit.edits[goal].times(goal) for fit in fits]) >= 3
            assert mean([fit.edits[goal].after.cost for fit in fits]) <= 0.02


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
