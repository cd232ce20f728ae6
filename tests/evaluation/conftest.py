from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.material import erasure_folder, gradiend_folder, small_data


@pytest.fixture(scope="session")
def adapters(assets: Path, story: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of an erasure and of a GRADIEND adapter that is steered."""
    folder = tmp_path_factory.mktemp("adapters")
    return erasure_folder(assets, story, folder / "erasure"), gradiend_folder(story, folder / "steered")


@pytest.fixture(scope="session")
def story(short_assets: Path) -> str:
    """A small masked model."""
    return str(short_assets / "models" / "story-mlm")


@pytest.fixture
def few(assets: Path, tmp_path: Path) -> Path:
    return small_data(assets, tmp_path / "data", ("bias-in-bios", "seat", "winobias"))
