"""Search across two sources: what is counted as found, the catalogue, and the run on a small model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

import hf_erasure  # noqa: F401  registers the adapter type

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "two_sources"


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("search")


def test_places_and_recall(search: Any) -> None:
    # The second pair's texts are nearer to those of the first than to each other.
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
