"""`target_modules="readers"` and `"writers"`: what a configuration accepts with them, and what it refuses."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest

from hf_erasure import ConceptErasureConfig
from hf_erasure.adapters import erasure_layers, site_layers
from tests import small_models

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
    assert read.fitted_modules == {"h.0.q": "h.0.q", "h.0.k": "h.0.q", "h.0.up": "h.0.up"}
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


def llama(**fields: Any) -> Any:
    model = copy.deepcopy(small_models.small_model("llama"))
    model.add_adapter(config(**fields), adapter_name="erasure")
    return model


def test_the_modules_that_read_one_tensor_share_an_eraser() -> None:
    model = llama(target_modules="readers")
    added = model.peft_config["erasure"]
    block = "model.layers.1"
    assert added.site == "input"
    assert [module for module, site in added.fitted_modules.items() if site == f"{block}.self_attn.q_proj"] == [
        f"{block}.self_attn.{name}_proj" for name in "qkv"
    ]
    layers = erasure_layers(model, "erasure")
    assert layers.keys() == set(added.fitted_modules)
    assert list(site_layers(model, "erasure")) == list(added.weights)
    for module, site in added.fitted_modules.items():
        assert layers[module].erasures["erasure"].holder is layers[site]
    assert all(
        "concept_erasure_left" not in key or key.split(".concept_erasure")[0] in added.weights
        for key in model.state_dict()
    )


def test_writers_are_sites_of_their_own() -> None:
    added = llama(target_modules="writers").peft_config["erasure"]
    assert (added.site, list(added.fitted_modules)) == ("output", list(added.weights))
    assert "model.embed_tokens" in added.weights


@pytest.mark.parametrize(
    ("fields", "gone"),
    [
        ({"exclude_modules": ["q_proj"]}, "q_proj"),
        ({"exclude_modules": r".*\.(gate|up)_proj"}, "up_proj"),
        ({"layers_to_transform": [1]}, "layers.0"),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, "lm_head"),
    ],
)
def test_other_fields_narrow_a_word(fields: Any, gone: str) -> None:
    added = llama(target_modules="readers", **fields).peft_config["erasure"]
    assert added.weights
    assert not any(gone in name for name in added.fitted_modules)
    assert all(group[0][0] == site for site, group in added.weights.items())


def test_nothing_left_is_refused() -> None:
    with pytest.raises(ValueError, match="leave none of the readers of LlamaForCausalLM"):
        llama(target_modules="readers", exclude_modules=r".*")
