"""`target_modules="readers"` and `"writers"`: what a configuration says of them, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest

from hf_erasure import ConceptErasureConfig

LABELS = ["female", "male"]
WEIGHTS: dict[str, list[list]] = {
    "h.0.q": [["h.0.q", "weight", 1], ["h.0.k", "weight", 1]],
    "h.0.up": [["h.0.up", "weight", 1]],
}
SITES = {"h.0.q": {"width": 4, "rank": 1}, "h.0.up": {"width": 4, "rank": 1}}


def config(**fields: Any) -> ConceptErasureConfig:
    return ConceptErasureConfig(**{"labels": LABELS, **fields})


@pytest.mark.parametrize(("target", "site"), [("readers", "input"), ("Writers", "output"), (None, "output")])
def test_a_word_says_at_which_side_of_the_modules_is_erased(target: Any, site: str) -> None:
    assert config(target_modules=target).site == site
    assert config(target_modules=target, site=site).site == site


@pytest.mark.parametrize(
    ("target", "site", "other"), [("readers", "output", "writers"), ("writers", "input", "readers")]
)
def test_the_other_side_is_refused_with_the_word_for_it(target: str, site: str, other: str) -> None:
    with pytest.raises(ValueError, match=rf"leave site out, or choose target_modules='{other}'"):
        config(target_modules=target, site=site)


def test_layers_go_with_a_word() -> None:
    assert config(target_modules="readers", layers_to_transform=[0], layers_pattern="h").word == "readers"


def test_weights_are_written_and_read(tmp_path: Any) -> None:
    made = config(site="input", target_modules=["h.0.q"], weights=WEIGHTS, fitted=True, fitted_sites=SITES)
    made.save_pretrained(tmp_path)
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert read.weights == WEIGHTS
    assert read.groups == {"h.0.q": "h.0.q", "h.0.k": "h.0.q", "h.0.up": "h.0.up"}
    assert list(read.fitted_modules) == ["h.0.q", "h.0.k", "h.0.up"]
    assert list(read.tensors()) == [
        f"{s}.concept_erasure.concept_erasure_{p}" for s in SITES for p in ("left", "right", "bias")
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["weights"] == WEIGHTS


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({}, "has the sites"),
        ({"a": []}, "which does not name the weights"),
        ({"a": [["b", "weight", 1]]}, "which does not name the weights"),
        ({"a": [["a", "weight"]]}, "which does not name the weights"),
        ({"a": [["a", "weight", -1]]}, "which does not name the weights"),
        ({"a": [["a", "weight", 64]]}, "which does not name the weights"),
        ({"a": [["a", "weight", True]]}, "which does not name the weights"),
        ({"a": [["a", "", 1]]}, "which does not name the weights"),
        ({"a": [["a", "weight", 1], ["a", "weight", 1]]}, "which does not name the weights"),
        ({"a": [["a", "weight", 1]], "b": [["b", "weight", 1], ["a", "weight", 1]]}, "'a' at two sites, 'a' and 'b'"),
    ],
)
def test_weights_that_adding_never_writes_are_refused(weights: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(site="input", weights=weights)


def test_weights_are_of_the_fitted_sites() -> None:
    with pytest.raises(ValueError, match=r"weights has the sites .*, and fitted_sites \['h.0.q'\]"):
        config(site="input", weights=WEIGHTS, fitted=True, fitted_sites={"h.0.q": SITES["h.0.q"]})
    with pytest.raises(ValueError, match="of a fitted adapter needs weights"):
        config(target_modules="readers", fitted=True, fitted_sites=SITES)


def test_what_is_not_weights_is_refused() -> None:
    for weights in ([], {"a": "a"}, {"a": {"a": 1}}, {1: [["a", "weight", 1]]}):
        with pytest.raises(TypeError, match="weights="):
            config(site="input", weights=weights)
