"""Tables of counterpart words, and texts in which the words are exchanged for their counterparts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_erasure.fitting.counterparts import TABLES, CounterpartWords
from hf_erasure.models.word_tokens import PairError

GENDERS = ("female", "male")


@pytest.fixture(scope="module")
def english() -> CounterpartWords:
    return CounterpartWords.load("english_gender", GENDERS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("She gave them her hat.", "He gave them his hat."),
        ("We saw her.", "We saw him."),
        ("We saw her in the park with HER mother.", "We saw him in the park with HIS father."),
        ("It is his; his wife said so.", "It is hers; her husband said so."),
        ("She's late, and he'd called Mrs. Lee ma'am.", "He's late, and she'd called Mr. Lee sir."),
        ("Mary's brothers", "James's sisters"),
        ("there is a she-wolf here", None),
        ("", None),
    ],
)
def test_words_are_exchanged_as_they_are_spelled(english: CounterpartWords, text: str, wanted: str | None):
    assert english.exchanged(text, *GENDERS) == wanted


def test_exchanging_names_twice_gives_the_text_back(english: CounterpartWords):
    pairs = {word: others["male"] for word, (label, others) in english.table.items() if label == "female"}
    alone = {word: others[0] for word, others in pairs.items() if len(others) == 1}
    unique = [word for word, other in alone.items() if english.table[other][1]["female"] == [word]]
    assert len(unique) > 200

    @given(st.lists(st.sampled_from([*unique, "and", "the", "met", ".", "Berlin"]), min_size=1))
    def check(words: list[str]) -> None:
        text = " ".join(words)
        once = english.exchanged(text, *GENDERS)
        assert once is None or english.exchanged(once, *GENDERS) == text

    check()


def test_a_name_stands_once_and_has_one_counterpart():
    words = CounterpartWords.load("english_gender", GENDERS)
    names = [word for word in words.table if word[0].isupper()]
    assert len(names) == len(set(names)) > 250
    assert all(len(spelled) == 1 for name in names for spelled in words.table[name][1].values())


def test_pronouns_are_chosen_as_a_treebank_tags_them(english: CounterpartWords, assets: Path):
    """When the rule was written, it chose correctly for 113 of the 117 *her* and *his* in 4,078 sentences."""
    right = total = 0
    for path in sorted((assets / "data" / "ud-ewt").glob("*.conllu")):
        for block in path.read_text(encoding="utf-8").split("\n\n"):
            rows = [line.split("\t") for line in block.splitlines() if line[:1].isdigit()]
            rows = [row for row in rows if row[0].isdigit()]
            for place, row in enumerate(rows):
                word = row[1].lower()
                if word in ("her", "his"):
                    owns = row[4] == "PRP$" if word == "her" else row[7] == "nmod:poss"
                    wanted = {"her": "his" if owns else "him", "his": "her" if owns else "hers"}[word]
                    rest = "".join(one[1] + " " * ("SpaceAfter=No" not in one[9]) for one in rows[place:])
                    found = english.exchanged(rest, *GENDERS)
                    total += 1
                    right += found is not None and found.lower().startswith((f"{wanted} ", wanted + rest[len(word)]))
    assert total > 100
    assert right / total > 0.93


def test_longer_words_win_and_several_classes_have_a_table():
    words = CounterpartWords({"x": ["church", "church choir"], "y": ["mosque", "ahl"], "z": ["temple", "band"]}, "xyz")
    assert words.exchanged("The church choir left the church.", "x", "y") == "The ahl left the mosque."
    assert words.exchanged("The temple and the church", "x", "z") == "The church and the temple"
    assert words.exchanged("The mosque", "x", "z") is None


def test_a_file_may_be_yaml_or_json(tmp_path: Path):
    path = tmp_path / "words.yaml"
    path.write_text("a: [he, Tom]\nb: [she, Ann]\n")
    assert CounterpartWords.load(path, "ab").exchanged("Tom, he", "a", "b") == "Ann, she"
    path.write_text('{"a": ["he"], "b": ["she"]}')
    assert CounterpartWords.load(str(path), "ab").exchanged("he", "a", "b") == "she"


@pytest.mark.parametrize(
    ("content", "said"),
    [("a: [he]", "for each of"), ("- he", "for each of"), ("a: [", "not YAML"), ("", "for each of"),
     ("a: [he]\nb: [she]\na: [his]", "'a' is written twice"), ("{a: [he], A: [his], b: [she]}", "in capitals only")],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_named(tmp_path: Path, content: str, said: str):
    path = tmp_path / "words.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        CounterpartWords.load(path, "ab")


def test_an_unknown_table_is_told_which_there_are():
    with pytest.raises(ValueError, match="english_gender"):
        CounterpartWords.load("german_gender", GENDERS)
    with pytest.raises(PairError, match="for each of"):
        CounterpartWords.load("english_gender", ("f", "m"))
    with pytest.raises(PairError, match="two classes"):
        CounterpartWords({"he": "she", "she": "it"}, GENDERS)
    assert all(path.is_file() for path in TABLES.values())


def test_classes_of_a_table_may_be_written_with_capitals() -> None:
    words = CounterpartWords.load("english_gender", ["Male", "Female"])
    assert words.exchanged("She ran.", "Female", "Male") == "He ran."
    with pytest.raises(PairError, match=r"it has \['female', 'male'\]"):
        CounterpartWords.load("english_gender", ["f", "m"])
