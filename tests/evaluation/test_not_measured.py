"""A run reports what it cannot measure, and only one cell is missing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
)

from hf_erasure.evaluation import (
    DataFolder,
    Evaluation,
    MissingData,
    evaluate,
    measures,
    report,
    running,
)
from hf_erasure.evaluation.loading import Entry, Loader
from hf_erasure.evaluation.measures import measures_of
from hf_erasure.evaluation.subject import Subject
from hf_erasure.metrics.readers import UnusableFile
from tests.evaluation.material import run, saved, small_data

# ---- of a model, or of a folder --------------------------------------------------------------------------------------


def test_an_encoder_without_a_head_says_what_it_cannot_do(assets: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    AutoModel.from_pretrained(assets / "models" / "story-mlm").save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets / "models" / "story-mlm").save_pretrained(folder)
    data = small_data(assets, tmp_path / "data", ("bias-in-bios", "crows-pairs", "winobias"))
    results = evaluate(Evaluation(str(folder), data, limit=18, resamples=10))
    reasons = {note["measure"]: note["reason"] for note in results.not_measured}
    head = "BertModel has no head that predicts words"
    assert reasons["CrowS-Pairs (gender), % stereotype"] == reasons["Probability shifts"] == head
    assert "no seat/" in reasons["SEAT gender, mean |d|, the mean of the tokens"]
    assert "no text" in reasons["Distortion of the last hidden state"]
    assert all(note["entry"] is None for note in results.not_measured)
    taken = {measure["key"] for measure in results.measures}
    assert taken == {"gender_linear", "gender_mlp", "gender_rbf", "gender_mdl", "tpr_gap", "profession"}
    # Every measure is either taken, or listed as not measured.
    known = {m.key: m.title for m in measures_of("gender", DataFolder(data))}
    assert {known[key] for key in taken} | set(reasons) >= set(known.values())


def test_a_folder_with_nothing_for_the_suite(story: str, assets: Path, tmp_path: Path) -> None:
    data = small_data(assets, tmp_path / "data", ("wikitext-2",))
    with pytest.raises(MissingData, match=r"Nothing of the suite 'pos' .* no ud-ewt/\*\.conllu"):
        evaluate(Evaluation(story, data, suite="pos", limit=2, resamples=10))


def test_a_folder_with_other_tests_of_seat_names_one_that_is_missing(assets: Path, tmp_path: Path) -> None:
    (tmp_path / "seat").mkdir()
    shutil.copy(assets / "data" / "seat" / "sent-weat1.jsonl", tmp_path / "seat")
    subject: Any = SimpleNamespace(data=DataFolder(tmp_path), model=None, tokenizer=None, pool="mean", statistics={})
    seat = next(m for m in measures_of("gender", subject.data) if m.key == "seat_gender")
    with pytest.raises(UnusableFile, match="has no test 'sent-weat6': write some of sent-weat1"):
        seat.compute(subject)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "there is no such folder"),
        (["--suite", "everything"], "write one of gender, pos, stereotypes, all"),
        (["--limit", "0"], "write at least 1"),
        (["--resamples", "0"], "write at least 2"),
        (["--output", __file__], "is a file: write the name of a folder"),
        (["--stereoset", "theirs"], "--stereoset theirs: write sentence or authors"),
        (["--strengths", "much"], "numbers separated by commas"),
    ],
)
def test_a_mistake_is_one_sentence(story: str, assets: Path, arguments: list[str], message: str) -> None:
    result = run(story, *([] if "--data" in arguments else ["--data", assets / "data"]), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr


# ---- one bad cell ---------------------------------------------------------------------------------------------------


def only(data: Path, *keys: str) -> Any:
    """A replacement of `measures_of` with only these measures of gender, since the others take long."""
    return lambda *_: [measure for measure in measures_of("gender", DataFolder(data)) if measure.key in keys]


def _raising(error: BaseException) -> Any:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    return raises


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), TypeError("boom"), torch.linalg.LinAlgError("boom"), torch.OutOfMemoryError("boom")]
)
def test_whatever_a_measure_or_a_picture_raises_the_others_go_on(
    story: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    others = "gender_linear", "tpr_gap", "winobias"
    monkeypatch.setattr(running, "measures_of", only(few, *others, "seat_gender"))
    monkeypatch.setattr(measures.benchmarks, "seat", _raising(error))
    monkeypatch.setattr(running, "plane_of", _raising(error))
    monkeypatch.setattr(report, "interval_bars", _raising(error))
    result = run(story, "--data", few, "--output", tmp_path / "out", "--limit", 18, "--resamples", 10)
    assert result.exit_code == 0, result.output
    results = saved(tmp_path / "out")
    assert results.about["finished"]
    assert set(results.values["base"]) == set(others)
    reasons = {note["measure"]: note["reason"] for note in results.not_measured}
    for what in ("SEAT gender, mean |d|, the mean of the tokens", "Embeddings in two dimensions"):
        assert re.fullmatch(rf"{type(error).__name__}: boom \(test_not_measured.py, line \d+\)", reasons[what])
        assert f"Not measured: {what}: {reasons[what]}" in result.stdout
    assert "This could not be drawn" in (tmp_path / "out" / "report.html").read_text()


def test_a_model_that_cannot_be_loaded_costs_its_own_column(
    story: str, few: Path, adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = Loader.load

    def second_time(self: Loader, entry: Entry) -> Any:
        loads.append(entry.name)
        if loads.count("erasure") == 2:  # the first load is for the verification
            raise torch.OutOfMemoryError("no room")
        return load(self, entry)

    monkeypatch.setattr(Loader, "load", second_time)
    monkeypatch.setattr(running, "measures_of", only(few, "gender_linear"))
    results = evaluate(Evaluation(story, few, [str(adapters[0])], limit=18, resamples=10))
    assert list(results.values["base"]) == ["gender_linear"] and not results.values["erasure"]
    note = {"measure": "Every measure", "entry": "erasure"}
    assert any(note.items() <= found.items() and "no room" in found["reason"] for found in results.not_measured)


def test_a_killed_run_leaves_what_it_measured(
    story: str, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures.benchmarks, "winobias", _raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        evaluate(Evaluation(story, few, limit=18, resamples=10), output=tmp_path / "out")
    left = saved(tmp_path / "out")
    assert not left.about["finished"]
    probes = ["gender_linear", "gender_mlp", "gender_rbf", "gender_mdl"]
    assert list(left.values["base"]) == [*probes, "tpr_gap", "seat_gender"]
    assert [measure["key"] for measure in left.measures] == list(left.values["base"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


def test_without_the_bases_states_nothing_is_relative_to_an_adapters(
    story: str, assets: Path, adapters: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter, as the first entry that can be read, must not be taken for the base with a distortion of 0."""
    data = small_data(assets, tmp_path / "data", ("tinystories-sample", "winobias"))
    monkeypatch.setattr(running, "measures_of", only(data, "winobias", "distortion"))
    calls: list[int] = []
    final = Subject.final_states

    def fails_first(self: Subject, texts: Any) -> Any:
        calls.append(1)
        return final(self, texts) if len(calls) > 1 else _raising(RuntimeError("boom"))()

    monkeypatch.setattr(Subject, "final_states", fails_first)
    results = evaluate(Evaluation(story, data, [str(adapters[0])], limit=8, resamples=10))
    assert [list(values) for values in results.values.values()] == [["winobias"]] * 2
    reasons = [note["reason"] for note in results.not_measured if note["entry"] == "erasure"]
    assert any("relative to the base's states" in reason for reason in reasons)


@pytest.mark.parametrize("suite", ["all", "pos"])
def test_one_item_of_each_is_enough_for_a_first_look(story: str, assets: Path, tmp_path: Path, suite: str) -> None:
    parts = ("bias-in-bios", "crows-pairs", "stereoset", "ud-ewt", "winobias", "wikitext-2")
    data = small_data(assets, tmp_path / "data", parts)
    (data / "seat").mkdir()
    (data / "seat" / "sent-weat6.jsonl").symlink_to(assets / "data/seat/sent-weat6.jsonl")
    results = evaluate(Evaluation(story, data, suite=suite, limit=1, resamples=10))
    taken = set(results.values["base"])
    assert {"perplexity_wikitext-2", "distortion"} <= taken
    reasons = {note["measure"]: note["reason"] for note in results.not_measured}
    known = {measure.key: measure.title for measure in measures_of(suite, DataFolder(data))}
    assert {known[key] for key in known if key not in taken} <= set(reasons)
    assert "raise --limit" in reasons["Part of speech, linear probe − majority"]
    if suite == "all":
        assert "With --limit 1 there may be too few items" in reasons["WinoBias pronoun gap"]
        assert {"seat_all", "crows_pairs"} <= taken and "raise --limit" in reasons["Embeddings in two dimensions"]


def test_more_items_are_not_advised_where_a_file_is_at_fault(story: str, assets: Path, tmp_path: Path) -> None:
    data = small_data(assets, tmp_path / "data", ("wikitext-2", "winobias"))
    (data / "crows-pairs").mkdir()
    (data / "crows-pairs" / "crows_pairs_anonymized.csv").write_bytes(b"")
    (data / "seat").mkdir()
    (data / "seat" / "sent-weat6.jsonl").write_text("[]", encoding="utf-16")
    (data / "stereoset" / "dev.json").mkdir(parents=True)
    found = evaluate(Evaluation(story, data, suite="gender", limit=2, resamples=10)).not_measured
    reasons = {note["measure"]: note["reason"] for note in found}
    for title, said in (("CrowS-Pairs", "has no column"), ("SEAT", "is UTF-16"), ("StereoSet SS", "There is no file")):
        reason = next(reason for measure, reason in reasons.items() if measure.startswith(title))
        assert said in reason and "--limit" not in reason
    with pytest.raises(MissingData, match="Nothing of the suite 'stereotypes'"):
        evaluate(Evaluation(story, data, suite="stereotypes", limit=2, resamples=10))


def test_a_bad_row_is_named_in_the_results_and_where_they_are_printed(
    story: str, few: Path, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "measures_of", only(few, "gender_linear", "crows_pairs_gender"))
    shutil.rmtree(few / "bias-in-bios")
    (few / "bias-in-bios").mkdir()
    lines = (assets / "data/bias-in-bios/Nurse_balanced_200.csv").read_bytes().splitlines(keepends=True)
    lines = [lines[0], *lines[1:20], *lines[-20:]]
    (few / "bias-in-bios" / "x.csv").write_bytes(b"\xef\xbb\xbf" + b"".join([*lines, b"She is one.,nurse\n"]))
    (few / "crows-pairs").mkdir()
    lines = (assets / "data/crows-pairs/crows_pairs_anonymized.csv").read_bytes().splitlines(keepends=True)[:50]
    (few / "crows-pairs" / "crows_pairs_anonymized.csv").write_bytes(b"".join([*lines, b"99,only one\n"]))
    with pytest.warns(UserWarning, match="1 row is left out"):
        result = run(story, "--data", few, "--output", tmp_path / "out", "--limit", 18, "--resamples", 10)
    assert result.exit_code == 0, result.output
    results = saved(tmp_path / "out")
    assert {"gender_linear", "crows_pairs_gender"} <= set(results.values["base"])
    found = {Path(entry["file"]).name: (entry["count"], entry["rows"][0]) for entry in results.left_out}
    assert found == {
        "x.csv": (1, {"row": "line 41", "reason": "has 2 cells, and the first line has 3"}),
        "crows_pairs_anonymized.csv": (1, {"row": "line 51", "reason": "has 2 cells, and the first line has 8"}),
    }
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (result.stdout, page):
        assert "line 41 has 2 cells" in text and "line 51 has 2 cells" in text
