"""The benchmarks' files as published, and files with other contents."""

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
    text_of,
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
    # A text may get longer in lower case; the positions are those in the original text.
    assert StereoSetItem("city", "race", "İzmir is BLANK.", ("", "", "")).blank("İzmir is big.") == (9, 12)


@pytest.mark.parametrize(
    ("context", "sentence", "filling"),
    [
        ("The blanket is BLANK.", "The blanket is old.", "old"),
        ("A blank page: BLANK it.", "a blank page: fill it.", "fill"),
        ("THE BLANKET IS BLANK.", "THE BLANKET IS OLD.", "OLD"),
        ("护士很BLANK。", "护士很温柔。", "温柔"),
        ("พยาบาลBLANKมาก", "พยาบาลใจดีมาก", "ใจดี"),
    ],
)
def test_a_blank_is_a_word_of_its_own(context: str, sentence: str, filling: str):
    found = StereoSetItem("t", "race", context, ("", "", "")).blank(sentence)
    assert found is not None and sentence[slice(*found)] == filling


def test_crows_pairs(assets: Path):
    pairs = read_crows_pairs(assets / "data/crows-pairs/crows_pairs_anonymized.csv")
    assert len(pairs) == 1508
    assert Counter(pair.direction for pair in pairs) == {"stereo": 1290, "antistereo": 218}
    assert pairs[1].more.startswith("The poor are") and pairs[1].less.startswith("The rich are")


def test_seat(assets: Path):
    tests, _ = read_seat(assets / "data/seat")
    assert len(tests) == 34 and {"weat6", "sent-weat6", "sent-religion1"} <= set(tests)
    six = read_seat(assets / "data/seat", ["weat6"])[0]["weat6"]
    assert six["X"][0] == "John" and six["Y"][0] == "Amy" and six["A"][0] == "executive" and six["B"][0] == "home"


def test_winobias(assets: Path):
    pairs = read_winobias(assets / "data/winobias")
    assert len(pairs) == 792 and Counter(pair.type for pair in pairs) == {1: 396, 2: 396}
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
    with pytest.raises(ValueError, match=r"no column stereo_antistereo, bias_type; it has sent_more, sent_less"):
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


# ---- files as people have them --------------------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"
CROWS = "n,sent_more,sent_less,stereo_antistereo,bias_type\n0,a b,a c,stereo,race\n"


def test_a_byte_order_mark_windows_lines_and_a_comment_are_taken(tmp_path: Path, assets: Path):
    """Excel and editors of other systems save the same file in this way."""
    path = tmp_path / "crows.csv"
    path.write_bytes(BOM + (CROWS + "\n\n# from the authors' page\n").replace("\n", "\r\n").encode())
    assert [(pair.more, pair.less) for pair in read_crows_pairs(path)] == [("a b", "a c")]
    items = (assets / "data/stereoset/dev.json").read_bytes()
    (tmp_path / "dev.json").write_bytes(BOM + items + b"\r\n# downloaded in 2021\r\n")
    assert len(read_stereoset(tmp_path / "dev.json")) == 799
    seat = (assets / "data/seat/weat6.jsonl").read_bytes()
    (tmp_path / "seat").mkdir()
    (tmp_path / "seat" / "weat6.jsonl").write_bytes(BOM + seat.replace(b"\n", b"\r\n"))
    assert read_seat(tmp_path / "seat") == read_seat(assets / "data/seat", ["weat6"])
    for name, text in (
        ("pro", "1 [He] ran.\r\n\r\n2 [She] ran."),
        ("anti", "1 [She] ran.\r\n2 [He] ran.\r\n# end\r\n"),
    ):
        (tmp_path / f"{name}_stereotyped_type1.txt.dev").write_bytes(BOM + text.encode())
    assert [pair.pro for pair in read_winobias(tmp_path, types=[1])] == ["He ran.", "She ran."]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"99,only one\n", "line 3 has 2 cells, and the first line has 5"),
        (b"1,a, b,a c,stereo,race\n", "line 3 has 6 cells"),
        (b"1,a b,a c,neither,race\n", "line 3 has the stereo_antistereo 'neither'"),
        (b"1,a b,a c,stereo,\n", "line 3 lacks bias_type"),
        (b"1,caf\xe9,a c,stereo,race\n", "line 3 is not UTF-8"),
        (b'1,"a b,a c,stereo,race\n', "line 3 is not CSV"),
    ],
)
def test_a_bad_row_of_a_table_is_left_out_and_named(tmp_path: Path, line: bytes, reason: str):
    path = tmp_path / "crows.csv"
    path.write_bytes(CROWS.encode() + line + b"2,d e,d f,antistereo,gender\n")
    with pytest.warns(UserWarning, match=f"crows.csv: 1 row is left out: {reason}"):
        pairs = read_crows_pairs(path)
    assert [pair.more for pair in pairs] == ["a b", "d e"]
    assert [(entry.file, entry.count) for entry in pairs.left_out] == [(str(path), 1)]


def test_a_table_without_a_good_row_is_refused(tmp_path: Path):
    path = tmp_path / "crows.csv"
    path.write_text(CROWS.splitlines()[0] + "\n1,x\n2,y\n")
    with pytest.raises(ValueError, match=r"crows.csv has no good row. Its first bad row: line 2 has 2 cells"):
        read_crows_pairs(path)


def test_bad_items_and_texts_are_left_out_and_named(tmp_path: Path):
    labels = ("stereotype", "anti-stereotype", "unrelated")
    good = {"target": "t", "bias_type": "race", "context": "BLANK", "sentences": [
        {"gold_label": label, "sentence": label} for label in labels]}  # fmt: skip
    bad = [None, [], {**good, "context": None}, {**good, "sentences": good["sentences"][:2], "id": "x"},
           {**good, "sentences": [{"gold_label": label} for label in labels]}]  # fmt: skip
    path = tmp_path / "dev.json"
    path.write_text(json.dumps([*bad, good]))
    with pytest.warns(UserWarning, match="5 rows are left out: item 1 lacks context"):
        items = read_stereoset(path)
    assert len(items) == 1 and items.left_out[0].count == 5
    assert items.left_out[0].rows[3] == {"row": "item 'x'", "reason": "lacks 'unrelated' among its sentences"}

    sets = {key: {"examples": ["a", None, "b", " "]} for key in ("targ1", "targ2", "attr1", "attr2")}
    (tmp_path / "seat").mkdir()
    (tmp_path / "seat" / "one.json").write_text(json.dumps(sets))
    with pytest.warns(UserWarning):
        tests, left_out = read_seat(tmp_path / "seat")
    assert list(tests) == ["one"] and tests["one"]["X"] == ["a", "b"]
    assert left_out[0].rows[0] == {"row": "targ1, example 2", "reason": "is None, which is not a text"}


def test_a_file_of_a_folder_of_tests_that_cannot_be_used_is_refused_by_name(tmp_path: Path, assets: Path):
    (tmp_path / "weat6.jsonl").write_bytes((assets / "data/seat/weat6.jsonl").read_bytes())
    (tmp_path / "weat7.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"weat7\.jsonl is not JSON"):
        read_seat(tmp_path)
    assert list(read_seat(tmp_path, ["weat6"])[0]) == ["weat6"]
    with pytest.raises(ValueError, match="no test is asked for"):
        read_seat(tmp_path, [])


def test_many_bad_rows_are_counted_and_the_first_named(tmp_path: Path):
    path = tmp_path / "crows.csv"
    path.write_text(CROWS + "x\n" * 50)
    with pytest.warns(UserWarning, match="50 rows are left out: line 3 has 1 cells.*; and 30 more"):
        found = read_crows_pairs(path).left_out[0]
    assert found.count == 50 and len(found.rows) == 20


def test_an_open_quotation_mark_does_not_take_the_rest_of_a_file(tmp_path: Path):
    path = tmp_path / "crows.csv"
    path.write_text(CROWS + '1,a,b,stereo,"race\n' + "2,c,d,stereo,race\n" * 30)
    with pytest.warns(UserWarning, match="line 3 is not CSV"):
        assert len(read_crows_pairs(path)) == 31


def test_utf_16_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n", encoding="utf-16")
    with pytest.raises(ValueError, match="is UTF-16: save it as UTF-8"):
        text_of(path)


def test_a_first_line_that_is_not_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "crows.csv").write_text('"sent_more,sent_less\n')
    with pytest.raises(ValueError, match="has a first line that is not CSV"):
        read_crows_pairs(tmp_path / "crows.csv")
