"""The benchmarks' files as they are, and files that are something else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from hf_erasure.metrics.readers import (
    StereoSetItem,
    read_crows_pairs,
    read_seat,
    read_stereoset,
    read_winobias,
    spread,
)


def test_stereoset(assets: Path):
    items = read_stereoset(assets / "data/stereoset/dev.json")
    assert len(items) == 799
    assert Counter(item.bias_type for item in items) == {"race": 371, "profession": 333, "gender": 83, "religion": 12}
    assert items[0].sentences == ("The poet can rhyme", "The poet can rap", "The poet can hip")
    assert [s[slice(*items[0].blank(s))] for s in items[0].sentences] == ["rhyme", "rap", "hip"]
    unfitting = [item for item in items if any(item.blank(sentence) is None for sentence in item.sentences)]
    assert [item.context.count("BLANK") for item in unfitting] == [2]


def test_stereoset_in_its_original_form(assets: Path, tmp_path: Path):
    plain = json.loads((assets / "data/stereoset/dev.json").read_text(encoding="utf-8"))
    original = tmp_path / "dev.json"
    original.write_text(json.dumps({"version": "1.1", "data": {"intrasentence": plain, "intersentence": []}}))
    assert read_stereoset(original) == read_stereoset(assets / "data/stereoset/dev.json")


def test_blanks_that_do_not_fit():
    item = StereoSetItem("nurse", "gender", "The nurse is BLANK.", ("", "", ""))
    assert item.blank("the NURSE is kind.") == (13, 17)
    for sentence in ("The nurse was kind.", "The nurse is kind", "The nurse is ."):
        assert item.blank(sentence) is None
    # Lower case may be longer than the sentence, and then positions in one are none in the other.
    assert StereoSetItem("city", "race", "İzmir is BLANK.", ("", "", "")).blank("İzmir is big.") is None


def test_crows_pairs(assets: Path):
    pairs = read_crows_pairs(assets / "data/crows-pairs/crows_pairs_anonymized.csv")
    assert len(pairs) == 1508
    assert Counter(pair.direction for pair in pairs) == {"stereo": 1290, "antistereo": 218}
    assert pairs[1].more.startswith("The poor are") and pairs[1].less.startswith("The rich are")


def test_seat(assets: Path):
    tests = read_seat(assets / "data/seat")
    assert len(tests) == 34 and {"weat6", "sent-weat6", "sent-religion1"} <= set(tests)
    six = read_seat(assets / "data/seat", ["weat6"])["weat6"]
    assert six["X"][0] == "John" and six["Y"][0] == "Amy" and six["A"][0] == "executive" and six["B"][0] == "home"


def test_winobias(assets: Path):
    pairs = read_winobias(assets / "data/winobias")
    assert len(pairs) == 792 and Counter(pair.kind for pair in pairs) == {1: 396, 2: 396}
    whole = [pair for pair in pairs if pair.stereotype]
    assert Counter(pair.stereotype for pair in whole) == {"male": 392, "female": 391}
    first = pairs[0]
    assert first.pro == "The developer argued with the designer because he did not like the design."
    assert first.stereotype == "male" and [first.anti[slice(*slot)] for slot in first.slots[1]] == ["she"]
    double = next(pair for pair in pairs if len(pair.slots[0]) == 2)
    assert [double.pro[slice(*slot)] for slot in double.slots[0]] == ["he", "his"]
    assert [double.anti[slice(*slot)] for slot in double.slots[1]] == ["she", "her"]
    assert not any("[" in pair.pro + pair.anti for pair in pairs)


def test_spread_takes_items_from_everywhere():
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread(range(10), None) == spread(range(10), 99) == list(range(10))
    with pytest.raises(ValueError, match="limit=0"):
        spread(range(10), 0)


def test_other_files_are_refused(tmp_path: Path, assets: Path):
    absent = tmp_path / "absent"
    for read in (read_stereoset, read_crows_pairs):
        with pytest.raises(ValueError, match="There is no file"):
            read(absent)
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match="no intrasentence items"):
        read_stereoset(other)
    other.write_text(json.dumps([{"id": "x1", "target": "a", "bias_type": "b", "context": "c", "sentences": []}]))
    with pytest.raises(ValueError, match=r"item 'x1' lacks 'stereotype'"):
        read_stereoset(other)
    table = tmp_path / "other.csv"
    table.write_text("sent_more,sent_less\na,b\n")
    with pytest.raises(ValueError, match=r"no pairs with stereo_antistereo, bias_type"):
        read_crows_pairs(table)
    with pytest.raises(ValueError, match="holds no tests"):
        read_seat(absent)
    with pytest.raises(ValueError, match="lacks targ1"):
        read_seat(tmp_path)
    with pytest.raises(ValueError, match="has no test 'weat99'"):
        read_seat(assets / "data/seat", ["weat99"])
    with pytest.raises(ValueError, match="There is no file"):
        read_winobias(absent)


def test_winobias_files_of_different_length_are_refused(tmp_path: Path):
    for name, lines in (("pro", "1 [He] ran.\n2 [She] ran.\n"), ("anti", "1 [She] ran.\n")):
        (tmp_path / f"{name}_stereotyped_type1.txt.dev").write_text(lines)
    with pytest.raises(ValueError, match="2 pro and 1 anti"):
        read_winobias(tmp_path, types=[1])
