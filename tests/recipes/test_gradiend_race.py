"""The recipes for features of three groups, unchanged, on a small model with words and sentences of a user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from hf_erasure.recipes.gradiend import NO_EDIT, check_gradiend_output, run_gradiend_recipe
from hf_erasure.recipes.gradiend_recipe import read_gradiend_recipe
from tests.small_models import roughen

RECIPES = Path(__file__).parents[2] / "recipes"
TUPLES = {
    "race": [["black", "caucasian", "asian"], ["black", "white", "asian"], ["africa", "europe", "asia"]],
    "religion": [["jewish", "christian", "muslim"], ["torah", "bible", "quran"], ["synagogue", "church", "mosque"]],
}
# These words have two tokens in the small vocabulary: a masked model cannot take pairs with them.
LONG = {"race": "caucasian", "religion": "synagogue"}
WORDS = ["people", "the", "city", "read", "about", "an", "old", "house", "and", "some", "of", "them", "were", "late",
         "today", "it", "was", "they"]  # fmt: skip


@pytest.fixture(params=sorted(TUPLES))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, list[str]]:
    """The feature, a folder with a model and the user's files, and the overrides that name these files."""
    feature: str = request.param
    tuples = TUPLES[feature]
    spoken = sorted({word for words in tuples for word in words} - {LONG[feature]})
    pieces = [LONG[feature][:4], f"##{LONG[feature][4:]}"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS, *spoken, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    config = hf.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=24, hidden_dropout_prob=0.0,
    )  # fmt: skip
    roughen(hf.BertForMaskedLM(config), torch.Generator().manual_seed(0)).save_pretrained(tmp_path / "model")
    lines = [f"{a} {b} read about the {word} {c}" for word in [*spoken, LONG[feature]] for a, b, c in
             (("some", "people", "house"), ("they", "and", "city"), ("it", "was", "today"), ("an", "old", "people"),
              ("them", "were", "house"), ("of", "the", "city"), ("people", "late", "today"))]  # fmt: skip
    (tmp_path / "sentences.txt").write_text("\n".join(lines))
    (tmp_path / "neutral.txt").write_text("\n".join(f"the {a} and the {b} were late" for a in WORDS for b in WORDS[:3]))
    (tmp_path / "words.json").write_text(json.dumps({"gender": [["he", "she"]], feature: tuples}))
    overrides = [
        f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}", f"data.defaults.words={tmp_path / 'words.json'}",
        f"data.whole.sentences={tmp_path / 'sentences.txt'}", f"data.neutral={tmp_path / 'neutral.txt'}",
        "data.shares=[0.4,0.3,0.3]", "select.learning_rates=[0.01,0.1]", "select.feature_factors=[1,-1]",
        "select.budget=0.5", "config.density=0.1",
    ]  # fmt: skip
    return feature, tmp_path, overrides


@pytest.mark.filterwarnings("ignore:None of .* edits raises")
def test_pairs_of_three_groups_are_learned_and_an_edit_is_chosen(case: tuple[str, Path, list[str]]) -> None:
    feature, folder, overrides = case
    recipe = read_gradiend_recipe(RECIPES / f"gradiend_{feature}" / "recipe.yaml", overrides)
    outcome = run_gradiend_recipe(recipe, progress=False)
    one, two, three = recipe.classes
    assert list(outcome.encoding.index) == ["mean of pairs", f"{one}/{two}", f"{one}/{three}", f"{two}/{three}"]
    assert list(outcome.edits.index) == [NO_EDIT, "balance", *recipe.classes]
    # The long word has two tokens, its counterparts one, so that these rows are left out of every set.
    assert outcome.counts["train left out"] > 0
    # A word's gradient contains the word itself; what it shares with others of its class is enough to read the class.
    assert outcome.encoding.loc["mean of pairs", "cor"] > 0.5
    assert {"results.json", "results.csv", "grid.csv", "encoded.png", "surface.png"} <= {
        path.name for path in (folder / "out").iterdir()
    }
    if feature == "race":  # measuring again is the same for both
        _, drift = check_gradiend_output(folder / "out", progress=False)
        assert drift < 1e-5
