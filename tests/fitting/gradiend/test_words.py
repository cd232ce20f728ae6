"""Pairs from plain sentences and a table of counterpart words; tokens of words in running text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_erasure.fitting.gradiend import PairError, PairSet, pairs_from_sentences, word_tokens
from hf_erasure.models.word_tokens import occurrences, whole_words, word_forms
from tests.fitting.gradiend.language_models import LETTERS, tokenizer_of

CLASSES = ["male", "female"]
SENTENCES = ["He said that she ate.", "There the she-wolf ate.", "SHE and he's late"]


def test_every_occurrence_at_a_word_boundary_makes_a_row() -> None:
    made = [tuple(row.values()) for row in pairs_from_sentences(SENTENCES, {"he": "she"}, CLASSES)]
    assert made == [
        ("[FEATURE] said that she ate.", "He", "She", "male", "female"),
        ("He said that [FEATURE] ate.", "she", "he", "female", "male"),
        ("[FEATURE] and he's late", "SHE", "HE", "female", "male"),
        ("SHE and [FEATURE]'s late", "he", "she", "male", "female"),
    ]


def test_the_result_is_a_data_set_of_pairs() -> None:
    made = pairs_from_sentences(["Tom said that he ate", "Lily said that she ate"], {"he": "she"}, CLASSES)
    PairSet(made, tokenizer_of("bert"), "masked", CLASSES)
    PairSet(made, tokenizer_of("gpt2"), "causal", CLASSES)


def test_sentences_with_several_words_can_be_left_out() -> None:
    made = pairs_from_sentences([*SENTENCES, "he ate", "she ate"], {"he": "she"}, CLASSES, single=True)
    assert made["text"] == ["[FEATURE] ate", "[FEATURE] ate"]


def test_names_keep_their_capitals() -> None:
    made = pairs_from_sentences(["Tom ate", "Lily ate", "a tom cat"], {"Tom": "Lily"}, CLASSES)
    assert made["counterfactual"] == ["Lily", "Tom"], "tom is not Tom"


def test_longer_words_win_and_may_have_several_tokens() -> None:
    table = {"male": ["king", "old king"], "female": ["queen", "old queen"]}
    made = pairs_from_sentences(["the old king", "the queen"], table, CLASSES)
    assert made["text"] == ["the [FEATURE]", "the [FEATURE]"]
    assert made["factual"] == ["old king", "queen"]


def test_three_classes_make_two_rows_an_occurrence() -> None:
    classes = ["animal", "colour", "place"]
    table = {"animal": ["dog"], "colour": ["green"], "place": ["hill"]}
    made = pairs_from_sentences(["a dog", "the hill"], table, classes)
    assert list(zip(made["factual"], made["counterfactual"], made["counterfactual_label"], strict=True)) == [
        ("dog", "green", "colour"),
        ("dog", "hill", "place"),
        ("hill", "dog", "animal"),
        ("hill", "green", "colour"),
    ]


def test_a_word_with_several_counterparts_is_left_out_in_that_direction() -> None:
    table = {"male": ["him", "his", "he"], "female": ["her", "her", "she"]}
    made = pairs_from_sentences(["his hat", "saw him", "her hat", "she ate"], table, CLASSES)
    assert list(zip(made["factual"], made["counterfactual"], strict=True)) == [
        ("his", "her"),
        ("him", "her"),
        ("she", "he"),
    ]


def test_faults() -> None:
    with pytest.raises(TypeError, match="one string"):
        pairs_from_sentences("he ate", {"he": "she"}, CLASSES)
    with pytest.raises(PairError, match="pairs of no class only; add sentences with words of 'male' that have one"):
        pairs_from_sentences(["a dog"], {"he": "she"}, CLASSES)
    with pytest.raises(PairError, match=r"\['male'\] only; add sentences with words of 'female' that have one"):
        pairs_from_sentences(["he ate"], {"he": "she"}, CLASSES)
    with pytest.raises(PairError, match=r"sentence 1 .* has a slot already"):
        pairs_from_sentences(["he ate", "[FEATURE] ate"], {"he": "she"}, CLASSES)
    with pytest.raises(PairError, match="table of counterparts is empty"):
        pairs_from_sentences(["he ate"], {}, CLASSES)
    with pytest.raises(PairError, match="'he' in two classes, 'male' and 'female'"):
        pairs_from_sentences(["he ate"], {"he": "she", "it": "he"}, CLASSES)
    with pytest.raises(PairError, match=r"for 3 write \{class: \[words\]\}"):
        pairs_from_sentences(["he ate"], {"he": "she"}, ["a", "b", "c"])
    with pytest.raises(PairError, match="one list for each of"):
        pairs_from_sentences(["he ate"], {"male": ["he", "him"], "female": ["she"]}, CLASSES)
    with pytest.raises(PairError, match="without spaces around it"):
        pairs_from_sentences(["he ate"], {"he": " she"}, CLASSES)


@pytest.mark.parametrize(("name", "space"), [("bert", ""), ("llama", "▁"), ("gpt2", "Ġ"), ("t5", "▁")])
def test_tokens_of_words_in_running_text(name: str, space: str) -> None:
    tokenizer = tokenizer_of(name)
    he, she = word_tokens(tokenizer, ["he", "she"])
    assert tokenizer.convert_ids_to_tokens([*he, *she]) == [f"{space}he", f"{space}she"]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_occurrences_of_words_are_found_in_tokens(name: str) -> None:
    tokenizer = tokenizer_of(name)
    forms = word_forms(tokenizer, ["he", "grandpa"])
    text = "a king said he ate, grandpa too"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = sorted(occurrences(tokens, forms))
    assert tokenizer.decode([tokens[i] for i in found]).replace(" ", "") == "hegrandpa"
    assert set("hegrandpa") <= set(LETTERS)


# ---- scripts that put no space between words ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentences", "table", "texts"),
    [
        (["因为他很累。", "她在家。"], {"他": "她"}, ["因为[FEATURE]很累。", "[FEATURE]在家。"]),
        (["だから彼は家にいる", "彼女はここ"], {"彼": "彼女"}, ["だから[FEATURE]は家にいる", "[FEATURE]はここ"]),
        (["วันนี้เขาไปบ้าน", "หล่อนไปบ้าน"], {"เขา": "หล่อน"}, ["วันนี้[FEATURE]ไปบ้าน", "[FEATURE]ไปบ้าน"]),
    ],
)
def test_words_are_found_where_no_space_parts_them(
    sentences: list[str], table: dict[str, str], texts: list[str]
) -> None:
    with pytest.warns(UserWarning, match="puts no space between words"):
        found = pairs_from_sentences(sentences, table, ["m", "f"])
    assert found["text"] == texts
    (one, other), *_ = table.items()
    assert [(row["factual"], row["counterfactual"]) for row in found] == [(one, other), (other, one)]


def test_words_of_letters_keep_their_boundaries_beside_such_scripts() -> None:
    found = pairs_from_sentences(["2024年he来了。", "She来了, there"], {"he": "she"}, ["m", "f"])
    assert found["text"] == ["2024年[FEATURE]来了。", "[FEATURE]来了, there"]


def test_a_vowel_sign_belongs_to_its_letter() -> None:
    assert not whole_words(["ก"]).search("กิน") and whole_words(["กิน"]).search("เขากินข้าว")


def test_tokens_of_a_word_without_a_space_before_it() -> None:
    """After a space, a tokenizer gives other tokens for the word, or one more."""
    tokenizer = unspaced_tokenizer()
    assert tokenizer.convert_ids_to_tokens(word_tokens(tokenizer, ["他"])[0]) == ["他"]
    ids = tokenizer("因为他很累", add_special_tokens=False)["input_ids"]
    assert occurrences(ids, word_forms(tokenizer, ["他"])) == {tokenizer.convert_ids_to_tokens(ids).index("他")}


def unspaced_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like that of XLM-R or Llama: a mark stands for each space, and before a text."""
    pieces = ["<unk>", "<pad>", "▁", "a", "▁a", *"因为他她很累"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")


@pytest.mark.parametrize("sentence", [None, float("nan")])
def test_a_sentence_that_is_not_a_text_is_named(sentence: object) -> None:
    with pytest.raises(PairError, match=r"sentence 2 is .*, which is not a text"):
        pairs_from_sentences(["he ran", "she ran", sentence], {"he": "she"}, ["m", "f"])  # type: ignore[list-item]
