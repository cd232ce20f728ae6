"""Copies of an adapter have the same digest, and different adapters have different ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from hf_erasure import ConceptErasureConfig, GradiendConfig
from hf_erasure.adapters.saving import digest_of

LEFT, RIGHT = "layers.0.norm.concept_erasure_left", "layers.1.norm.concept_erasure_left"
CONFIG = ConceptErasureConfig(labels=["a", "b"])


def saved(folder: Path, prefix: str = "base_model.model.", **changed: torch.Tensor) -> Path:
    folder.mkdir()
    tensors = {LEFT: torch.arange(6.0).view(2, 3), RIGHT: torch.ones(2, 3)} | changed
    save_file({f"{prefix}{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def digest(tmp_path: Path) -> str:
    found = digest_of(saved(tmp_path / "first"), CONFIG)
    assert found is not None and len(found) == 16
    return found


def test_it_is_that_of_every_copy(digest: str, tmp_path: Path) -> None:
    below_a_head = saved(tmp_path / "head", "base_model.model.bert.")
    assert digest_of(below_a_head, CONFIG) == digest
    again = tmp_path / "again"
    again.mkdir()
    tensors = load_file(below_a_head / "adapter_model.safetensors")
    other_order = {name: value.clone() for name, value in reversed(list(tensors.items()))}
    save_file(other_order, again / "adapter_model.safetensors", metadata={"format": "pt"})
    assert digest_of(again, CONFIG) == digest


def test_other_values_places_shapes_and_strengths_are_others(digest: str, tmp_path: Path) -> None:
    one, two = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    others = [
        digest_of(saved(tmp_path / "value", **{RIGHT: two + 1e-6}), CONFIG),
        digest_of(saved(tmp_path / "place", **{LEFT: two, RIGHT: one}), CONFIG),
        digest_of(saved(tmp_path / "shape", **{RIGHT: two.view(3, 2)}), CONFIG),
        digest_of(tmp_path / "first", ConceptErasureConfig(labels=["a", "b"], site="input")),
        *(digest_of(tmp_path / "first", GradiendConfig(learning_rate=rate)) for rate in (0.1, 0.2)),
        digest_of(tmp_path / "first", LoraConfig()),
    ]
    assert len({digest, *others}) == 1 + len(others)


def test_without_weights_there_is_none(tmp_path: Path) -> None:
    assert digest_of(tmp_path, CONFIG) is None
