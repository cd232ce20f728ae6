"""Search across two sources: how hits are counted, the catalogue, and a run on a small model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel

from hf_erasure.adapters import erasure_layers

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "two_sources"


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("search")


def test_places_and_recall(search: Any) -> None:
    # The second pair's texts are each nearer to those of the first pair than to each other.
    states = torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.0, 0.3], [0.0, 1.0]])
    pairs = ["a", "a", "b", "b"]
    assert search.found_at(states, pairs).tolist() == [1, 1, 3, 1]
    value, low, high = search.recall(search.found_at(states, pairs), pairs, 1)
    assert value == 0.75 and low <= value <= high
    assert search.recall(search.found_at(states, pairs), pairs, 3)[0] == 1.0


def test_every_article_is_described_once_by_either_house(search: Any) -> None:
    rows = search.catalogue()
    assert len(rows) == 480 and rows == search.catalogue()
    by_pair: dict[str, set[str]] = {}
    for row in rows:
        by_pair.setdefault(row["pair"], set()).add(row["source"])
    assert all(sources == {"shop", "warehouse"} for sources in by_pair.values())
    assert len({row["text"] for row in rows}) == 480


def test_a_run_judges_pairs_that_were_not_fitted_on(
    search: Any, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = search.catalogue()[:160]
    monkeypatch.setattr(search, "catalogue", lambda: rows)
    model, out = assets / "models" / "story-mlm", tmp_path / "out"
    words = ["search.py", "--model", str(model), "--target", "encoder.layer.3.output.LayerNorm", "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    search.main()
    said = capsys.readouterr().out
    assert "40 pairs fitted on, 40 others judged" in said and "In plain words" in said
    AutoModel.from_pretrained(model).load_adapter(str(out))


@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_judged_is_the_adapter(search: Any, assets: Path, tmp_path: Path, rank: int) -> None:
    """The eraser from the states that one pass has stored is the same as the fitted adapter's."""
    rows, base = Dataset.from_list(search.catalogue()[:160]), str(assets / "models" / "story-mlm")
    found = search.Search(rows, base, "encoder.layer.3.output.LayerNorm", tmp_path)
    found.write_adapter(rank)
    model = AutoModel.from_pretrained(base)
    model.load_adapter(str(tmp_path))
    (layer,) = erasure_layers(model, "default").values()
    erased = layer.apply_eraser("default", found.states[None])[0]
    expected = found.eraser(0, ("fit", "choose"), rank)(found.states.double())
    torch.testing.assert_close(erased.double(), expected, atol=1e-3, rtol=1e-3)
    assert len(list(tmp_path.glob("read-*.pt"))) == 1


def test_a_rank_is_chosen_on_pairs_that_are_not_judged(search: Any, assets: Path, tmp_path: Path) -> None:
    rows, base = Dataset.from_list(search.catalogue()[:160]), str(assets / "models" / "story-mlm")
    found = search.Search(rows, base, "encoder.layer.3.output.LayerNorm", tmp_path, splits=2)
    for seed in (0, 1):
        parts = [set(found.pairs(seed, part)) for part in ("fit", "choose", "judge")]
        assert list(map(len, parts)) == [30, 10, 40] and len(set.union(*parts)) == 80
    text = search.report([found.split(seed, [0, 1, 2], True) for seed in (0, 1)], found.sources)
    assert "recall@10  before" in text and "recall@1   source erased, unit vectors" in text
