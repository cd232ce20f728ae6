"""Pairs and neutral texts as batches, and the refusal of data sets that are wrong in any way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset

from hf_erasure.fitting.gradiend import PairError, PairSet, neutral_batches, pair_batches, word_tokens
from hf_erasure.fitting.gradiend.pairs import usable_rows
from tests.fitting.gradiend.language_models import (
    CLASSES,
    FEMALE,
    MALE,
    NAMES,
    TEXTS,
    model_of,
    neutral,
    pairs,
    task_name,
    tokenizer_of,
)

ROW = {"text": "Tom went home and [FEATURE] ate", "factual": "he", "counterfactual": "she", "label": MALE}
OTHER = {"text": "the queen said [FEATURE] was late", "factual": "she", "counterfactual": "he", "label": FEMALE}


def check(name: str, *rows: dict[str, Any], classes: list[str] = CLASSES) -> None:
    PairSet(Dataset.from_list(list(rows)), tokenizer_of(name), task_name(name), classes, model_of(name).config)


# ---- what a batch is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_batches_have_one_class_and_fit_the_model(name: str) -> None:
    model = model_of(name)
    batches = pair_batches(pairs(name), tokenizer_of(name), task_name(name), CLASSES, batch_size=2, config=model.config)
    assert [len(batch) for batch in batches] == [2, 2, 1, 1]
    assert [(batch.label, batch.other) for batch in batches] == [(0, 1), (1, 0), (0, 1), (1, 0)]
    for batch in batches:
        assert batch.factual.shape == batch.counterfactual.shape == batch.rows.shape == batch.positions.shape
        assert model(**batch.inputs).logits.shape[0] == len(batch)


def test_a_masked_word_has_as_many_masks_as_tokens() -> None:
    tokenizer = tokenizer_of("bert")
    batch = pair_batches(pairs("bert", "grandpa", "grandma"), tokenizer, "masked", CLASSES, batch_size=3)[1]
    assert batch.label == CLASSES.index(MALE)
    texts = tokenizer.batch_decode(batch.inputs["input_ids"], clean_up_tokenization_spaces=False)
    assert texts[1] == "[CLS] the king said [MASK] [MASK] was late [SEP]" + " [PAD]" * texts[1].count("[PAD]")
    assert (batch.inputs["input_ids"][batch.rows, batch.positions] == tokenizer.mask_token_id).all()
    assert tokenizer.convert_ids_to_tokens(batch.factual[:2]) == ["grand", "##pa"]
    assert tokenizer.convert_ids_to_tokens(batch.counterfactual[:2]) == ["grand", "##ma"]
    assert torch.equal(batch.weights, torch.full((6,), 1 / 6))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "space"), [("llama", "▁"), ("gpt2", "Ġ")])
def test_a_causal_word_keeps_its_space_and_is_read_off_the_token_before_it(name: str, space: str, side: str) -> None:
    tokenizer = tokenizer_of(name, side)
    for batch in pair_batches(pairs(name), tokenizer, "causal", CLASSES, batch_size=3):
        assert set(tokenizer.convert_ids_to_tokens(batch.factual)) == {space + ("she" if batch.label == 0 else "he")}
        mask = batch.inputs["attention_mask"]
        real = torch.arange(mask.shape[1]) * mask
        assert torch.equal(batch.positions, real.argmax(1)), "the last real token"
        assert batch.apart is None
        for ids, row, text in zip(batch.inputs["input_ids"], mask, TEXTS, strict=True):
            assert tokenizer.decode(ids[row.bool()], skip_special_tokens=True).strip() == text.split(" [FEATURE]")[0]


def test_rows_are_padded_at_the_right_whichever_side_the_tokenizer_names() -> None:
    for name in ("bert", "roberta", "t5", "llama"):
        config = model_of(name).config
        batch = pair_batches(pairs(name), tokenizer_of(name, "left"), task_name(name), CLASSES, batch_size=3,
                             config=config)[0]  # fmt: skip
        assert batch.inputs["attention_mask"][:, 0].all() and not batch.inputs["attention_mask"].all()


def test_forced_tokens_need_a_forward_each_only_where_they_differ() -> None:
    shared = pair_batches(pairs("llama", "grandpa", "grandma"), tokenizer_of("llama"), "causal", CLASSES, batch_size=3)
    assert all(batch.apart is None for batch in shared), "both words begin with the token grand"
    apart = pair_batches(pairs("llama", "grandpa", "she"), tokenizer_of("llama"), "causal", CLASSES, batch_size=3)
    assert all(batch.apart is not None for batch in apart)
    assert {len(batch.counterfactual) for batch in apart} == {3, 6}


def test_rows_with_words_of_different_lengths_count_alike() -> None:
    rows = [ROW, {**ROW, "factual": "grandpa", "counterfactual": "grandma"}, OTHER]
    batch = pair_batches(Dataset.from_list(rows), tokenizer_of("bert"), "masked", CLASSES, batch_size=3)[1]
    assert batch.weights.tolist() == [0.5, 0.25, 0.25]


def test_t5_and_bart_decoders() -> None:
    for name in ("t5", "bart"):
        tokenizer = tokenizer_of(name)
        config = model_of(name).config
        batch = pair_batches(pairs(name), tokenizer, "seq2seq", CLASSES, batch_size=1, config=config)[0]
        given = tokenizer.decode(batch.inputs["decoder_input_ids"][0])
        assert given == ("<pad><extra_id_0>" if name == "t5" else "</s><s>Tom went home to a dog, and")
        assert int(batch.positions) == batch.inputs["decoder_input_ids"].shape[1] - 1
        source = tokenizer.decode(batch.inputs["input_ids"][0])
        assert source.count("<extra_id_0>" if name == "t5" else "<mask>") == 1 and "she" not in source


def test_the_tokenizers_mask_may_stand_for_the_slot() -> None:
    masked = [{**row, "text": row["text"].replace("[FEATURE]", "[MASK]")} for row in (ROW, OTHER)]
    got, goal = (
        pair_batches(Dataset.from_list(rows), tokenizer_of("bert"), "masked", CLASSES, batch_size=1)
        for rows in (masked, [ROW, OTHER])
    )
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(got, goal, strict=True))


def test_class_labels_of_the_data_set_are_read_by_name() -> None:
    data = pairs("bert")
    names = ClassLabel(names=[MALE, FEMALE])  # The order differs from that of CLASSES.
    data = data.cast_column("label", names)
    batches = pair_batches(data, tokenizer_of("bert"), "masked", CLASSES, batch_size=3)
    assert tokenizer_of("bert").convert_ids_to_tokens(batches[0].factual) == ["she"] * 3 and batches[0].label == 0


def test_shuffling_is_by_seed() -> None:
    data = PairSet(pairs("bert"), tokenizer_of("bert"), "masked", CLASSES)
    orders = [
        [batch.inputs["input_ids"].tolist() for batch in data.batches(1, seed=s, shuffle=True)] for s in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    plain = [batch.inputs["input_ids"].tolist() for batch in data.batches(1)]
    assert sorted(orders[0]) == sorted(plain) != orders[0]
    assert [batch.inputs["input_ids"].tolist() for batch in data.batches(1)] == plain, "shuffling leaves the set alone"


def test_slots_has_every_text_once() -> None:
    data = PairSet(pairs("bert"), tokenizer_of("bert"), "masked", CLASSES)
    batches = data.slots(2)
    assert [len(batch) for batch in batches] == [2, 1] and all(batch.label is None for batch in batches)
    tokenizer = tokenizer_of("bert")
    decoded = [
        text for b in batches for text in tokenizer.batch_decode(b.inputs["input_ids"], skip_special_tokens=True)
    ]
    assert len(set(decoded)) == len(TEXTS)


THREE = ["animal", "colour", "place"]
WORDS = {"animal": "dog", "colour": "green", "place": "hill"}


def three() -> Dataset:
    rows = [(a, b) for a in THREE for b in THREE if a != b]
    return Dataset.from_list(
        [
            {"text": "it was a [FEATURE]", "factual": WORDS[a], "counterfactual": WORDS[b], "label": a,
             "counterfactual_label": b}
            for a, b in rows
        ]
    )  # fmt: skip


def test_more_than_two_classes() -> None:
    data = PairSet(three(), tokenizer_of("gpt2"), "causal", THREE)
    assert {(batch.label, batch.other) for batch in data.batches(8)} == {(a, b) for a in range(3) for b in range(3)} - {
        (0, 0), (1, 1), (2, 2),
    }  # fmt: skip
    assert [(batch.label, batch.other) for batch in data.batches(8, pair=("place", "animal"))] == [(2, 0), (0, 2)]
    with pytest.raises(PairError, match=r"pair is \['place', 'sea'\]"):
        data.batches(8, pair=("place", "sea"))
    with pytest.raises(PairError, match="no column 'counterfactual_label'; more than two classes need it"):
        PairSet(three().remove_columns("counterfactual_label"), tokenizer_of("gpt2"), "causal", THREE)
    some = PairSet(three().select([0, 2]), tokenizer_of("gpt2"), "causal", THREE)
    with pytest.raises(PairError, match="no row has the label 'animal' and the counterfactual label 'place'"):
        some.batches(8, pair=("animal", "place"))


# ---- what is refused -------------------------------------------------------------------------------------------------

FAULTS = {
    "two slots": ("bert", {"text": "[FEATURE] said [FEATURE] ate"}, "the text has 2 slots"),
    "no slot": (
        "bert",
        {"text": "Tom said he ate"},
        r"the text has no slot; write \[FEATURE\] exactly once, where 'he'",
    ),
    "same word": ("bert", {"counterfactual": "he"}, "factual and counterfactual are both 'he'"),
    "no text": ("bert", {"text": " "}, "text is ' '; write text there"),
    "no word": ("bert", {"counterfactual": ""}, "counterfactual is ''; write text there"),
    "unknown label": ("bert", {"label": "boy"}, r"label is 'boy'; write one of \['female', 'male'\]"),
    "unknown word": ("bert", {"factual": "zebra"}, "'zebra' is not in the tokenizer's vocabulary"),
    "unknown word, bpe": ("llama", {"factual": "xyz"}, "'xyz' is not in the tokenizer's vocabulary"),
    "token counts": ("bert", {"factual": "grandpa"}, "'grandpa' has 2 tokens and 'she' 1; a masked model"),
    "empty prefix": ("llama", {"text": "[FEATURE] ate"}, r"nothing stands before \[FEATURE\], but a causal model"),
    "word end": ("bert", {"text": "Tom went home and [FEATURE]re ate"}, "a token reaches over an end of 'he'"),
    "too long": ("llama", {"text": "Tom went " * 40 + "[FEATURE]"}, "the model takes 64; shorten its text"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_of_a_row_are_named(fault: str) -> None:
    name, change, message = FAULTS[fault]
    check(name, OTHER, ROW)
    with pytest.raises(PairError, match=message) as caught:
        check(name, OTHER, {**ROW, **change})
    assert str(caught.value).startswith("row 1 "), "the row is named"
    if fault not in ("too long", "no text"):
        assert change.get("text", ROW["text"]) in str(caught.value), "and its text is shown"


# Faults of the text, the words or their length. The other faults, of a cell, are refused by both functions.
UNUSABLE = [name for name in FAULTS if name not in ("same word", "no text", "no word", "unknown label")]


@pytest.mark.parametrize("fault", UNUSABLE)
def test_what_is_refused_is_what_is_left_out(fault: str) -> None:
    name, change, message = FAULTS[fault]
    data = Dataset.from_list([{**ROW, **change}, OTHER, ROW])

    def usable(rows: list[int]) -> list[int]:
        config = model_of(name).config
        return usable_rows(data.select(rows), CLASSES, tokenizer_of(name), task_name(name), config)

    assert usable([0, 1, 2]) == [1, 2]
    check(name, *data.select([1, 2]))
    assert usable([0, 1]) == [1]
    with pytest.raises(PairError, match=f"none of the 1 rows can be used with this model; the first: .*{message}"):
        usable([0])


def test_a_token_that_reaches_over_the_start_of_a_word() -> None:
    """The text would have one token for "gre" and "en", so that "en" has no token of its own."""
    with pytest.raises(PairError, match="a token reaches over an end of 'en'"):
        check("gpt2", OTHER, {**ROW, "text": "the hill was gre[FEATURE]", "factual": "en", "counterfactual": "at"})


def test_words_that_the_tokenizer_does_not_tell_apart() -> None:
    tokenizer = tokenizer_of("bert")
    before = tokenizer.backend_tokenizer.normalizer
    try:
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        with pytest.raises(PairError, match="same tokens of 'he' and 'He'"):
            check("bert", OTHER, {**ROW, "counterfactual": "He"})
    finally:
        if before is not None:
            tokenizer.backend_tokenizer.normalizer = before
        else:
            tokenizer_of.cache_clear()


def test_faults_of_the_whole_data_set() -> None:
    tokenizer = tokenizer_of("bert")
    with pytest.raises(PairError, match="the pairs are empty"):
        PairSet(pairs("bert").select([]), tokenizer, "masked", CLASSES)
    with pytest.raises(PairError, match="all 2 rows have the label 'male'; add rows of 'female'"):
        check("bert", ROW, ROW)
    with pytest.raises(PairError, match="no column 'factual'; they have"):
        PairSet(pairs("bert").remove_columns("factual"), tokenizer, "masked", CLASSES)
    for classes in (["female"], ["male", "male"]):
        with pytest.raises(PairError, match="classes must name two classes or more, each once"):
            check("bert", ROW, OTHER, classes=classes)
    with pytest.raises(PairError, match="label and counterfactual_label are both 'male'"):
        check("bert", {**OTHER, "counterfactual_label": MALE}, {**ROW, "counterfactual_label": MALE})
    with pytest.raises(PairError, match="the task is 'mlm'; write one of masked, causal, seq2seq, classification"):
        PairSet(pairs("bert"), tokenizer, "mlm", CLASSES)
    with pytest.raises(PairError, match="no mask token"):
        PairSet(pairs("gpt2"), tokenizer_of("gpt2"), "masked", CLASSES)
    with pytest.raises(PairError, match=r"config with its decoder_start_token_id; pass config=model\.config"):
        PairSet(pairs("t5"), tokenizer_of("t5"), "seq2seq", CLASSES)
    with pytest.raises(PairError, match="neither <extra_id_0> nor a mask token"):
        PairSet(pairs("gpt2"), tokenizer_of("gpt2"), "seq2seq", CLASSES, model_of("t5").config)


def test_faults_of_a_classifiers_rows() -> None:
    good = list(pairs("bert_classifier"))
    check("bert_classifier", *good)
    with pytest.raises(PairError, match=r"row 6 .*a classifier has no slot"):
        check("bert_classifier", *good, {**good[0], "text": TEXTS[0]})
    with pytest.raises(PairError, match=r"row 6 .*'boy' is not a label of the model; write one of \['woman', 'man'\]"):
        check("bert_classifier", *good, {**good[0], "factual": "boy"})
    with pytest.raises(PairError, match=r"label2id; pass config=model\.config"):
        PairSet(pairs("bert_classifier"), tokenizer_of("bert"), "classification", CLASSES)


# ---- neutral texts ---------------------------------------------------------------------------------------------------

FEATURE_WORDS = ["he", "she", "dog", "grandpa"]


@pytest.mark.parametrize("name", NAMES)
def test_neutral_batches(name: str) -> None:
    model, tokenizer = model_of(name), tokenizer_of(name)
    made = [
        neutral_batches(neutral(), tokenizer, task_name(name), FEATURE_WORDS, batch_size=2, seed=seed,
                        config=model.config)
        for seed in (0, 0, *range(1, 20))
    ]  # fmt: skip
    tokens = [[(b.factual.tolist(), b.counterfactual.tolist()) for b in batches] for batches in made]
    assert tokens[0] == tokens[1] and any(other != tokens[0] for other in tokens)
    barred = {token for words in word_tokens(tokenizer, ["he", "she", "dog"]) for token in words}
    for batch in (batch for batches in made for batch in batches):
        assert batch.label is None and batch.other is None and batch.apart is None
        assert not (batch.factual == batch.counterfactual).any()
        model(**batch.inputs)
        if task_name(name) == "classification":
            continue
        for token in (*batch.factual.tolist(), *batch.counterfactual.tolist()):
            assert token not in barred and token not in tokenizer.all_special_ids
            assert any(letter.isalnum() for letter in tokenizer.decode([token])), "no punctuation"
    assert [len(batch) for batch in made[0]] == [2, 1]


def test_a_neutral_token_is_the_one_that_stands_there() -> None:
    tokenizer = tokenizer_of("gpt2", "left")
    for seed in range(10):
        for batch in neutral_batches(neutral(), tokenizer, "causal", FEATURE_WORDS, batch_size=3, seed=seed):
            for row, text in enumerate(neutral()["text"]):
                ids = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()]
                given = tokenizer.decode(ids)
                assert given and text.startswith(given)
                assert text[len(given) :].startswith(tokenizer.decode([int(batch.factual[row])]))


def test_neutral_texts_may_be_cut() -> None:
    long = Dataset.from_dict({"text": ["a dog ran home " * 100, "bread was late"]})
    config = model_of("bert").config
    batch = neutral_batches(long, tokenizer_of("bert"), "masked", ["dog"], batch_size=2, config=config)[0]
    assert batch.inputs["input_ids"].shape[1] == 64
    tokenizer = copy.deepcopy(tokenizer_of("bert"))  # other tests have the same tokenizer
    tokenizer.model_max_length = 9
    cut = neutral_batches(long, tokenizer, "masked", ["dog"], batch_size=2, config=config)[0]
    assert cut.inputs["input_ids"].shape[1] == 9
    assert cut.inputs["input_ids"][0, -1] == tokenizer.sep_token_id


def test_neutral_faults() -> None:
    tokenizer = tokenizer_of("bert")

    def make(texts: list[str], words: list[str] = FEATURE_WORDS) -> None:
        neutral_batches(Dataset.from_dict({"text": texts}), tokenizer, "masked", words, batch_size=2)

    with pytest.raises(PairError, match="there are no neutral texts"):
        make([])
    with pytest.raises(PairError, match="neutral row 1 is ''"):
        make(["bread was late", ""])
    with pytest.raises(PairError, match=r"neutral row 0 .* has a slot"):
        make(["[FEATURE] ate"])
    with pytest.raises(PairError, match="neutral row 1 has no token that could be predicted"):
        make(["bread was late", "he"])
    with pytest.raises(PairError, match="fewer than two words"):
        make(["bread", "he bread"])
    with pytest.raises(PairError, match="no column 'text'"):
        neutral_batches(Dataset.from_dict({"t": ["a"]}), tokenizer, "masked", [], batch_size=2)
