"""A GRADIEND adapter as a stock LoRA: exact where the rank suffices, and what is left out is named."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

from hf_erasure import export_to_lora
from hf_erasure.adapters import edited, gradiend_layers, steer, targeted_parameters
from tests.adapters.gradiend.lifecycle import MODELS, NAME, RATE, Gradiends, batch_of, config_of, feature_of, fit
from tests.gradiend.data import decode
from tests.small_models import distance, outputs_of, same

# The LoRA's matrices are rounded to float32 and multiplied in another order than the edited weight: 2^-24 relative in
# each of 32 terms, which two blocks and their norms multiply.
TOLERANCE = 5e-5


@pytest.mark.parametrize("name", MODELS)
def test_with_full_rank_the_matrices_are_carried_exactly(name: str, gradiends: Gradiends, tmp_path: Path):
    batch, model = batch_of(name), gradiends.fitted(name, 1.0)
    export = export_to_lora(model, NAME, tmp_path, rank=64)
    # Changes that a LoRA cannot carry are removed from the oracle, by the names that the export states.
    oracle = gradiends.base(name)
    parameters = dict(oracle.named_parameters())
    feature = feature_of(targeted_parameters(model, NAME))
    total = left = 0.0
    for key, delta in decode(feature.decoder, 1.0).items():
        energy = float((RATE * delta).double().square().sum())
        total += energy
        if key in export.left_out:
            left += energy
            continue
        with torch.no_grad():
            parameters[key].add_(RATE * delta)
    assert export.left_out and all(p.dim() != 2 or "cls" in n for n, p in parameters.items() if n in export.left_out)
    loaded = peft.PeftModel.from_pretrained(gradiends.base(name), tmp_path)
    assert distance(outputs_of(loaded, batch), outputs_of(oracle, batch)) < TOLERANCE
    assert export.kept == pytest.approx(1 - left / total, rel=1e-6)
    assert f"{export.kept:.1%} of the squared norm of the edit" in str(export)
    assert f"{left / total:.1%} is in {len(export.left_out)} parameters that a LoRA cannot carry" in str(export)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_what_a_low_rank_leaves_out_is_stated(gradiends: Gradiends, tmp_path: Path):
    model = gradiends.fitted("bert", 1.0, target_modules="all-linear")
    decoder = decode(feature_of(targeted_parameters(model, NAME)).decoder, 1.0)
    matrices = [delta.double() for delta in decoder.values() if delta.dim() == 2]
    total = sum(float(delta.square().sum()) for delta in decoder.values())
    for rank in (1, 8, 32):
        export = export_to_lora(model, NAME, tmp_path / str(rank), rank=rank)
        best = sum(float(torch.linalg.svdvals(delta)[:rank].square().sum()) for delta in matrices)
        assert export.kept == pytest.approx(best / total, rel=1e-6)
        assert ("would need a higher rank" in str(export)) == (rank < 32)


def test_the_strength_of_the_moment_is_exported_and_the_model_stays(gradiends: Gradiends, tmp_path: Path):
    batch, model = batch_of("bert"), gradiends.fitted("bert", 1.0, target_modules=r".*embeddings\.word_embeddings")
    steer(model, NAME, feature_factor=-2.0, learning_rate=0.1)
    expected = outputs_of(model, batch)
    export_to_lora(model, NAME, tmp_path, rank=32)
    assert same(outputs_of(model, batch), expected)
    loaded = peft.PeftModel.from_pretrained(gradiends.base("bert"), tmp_path)
    assert distance(outputs_of(loaded, batch), expected) < TOLERANCE
    assert distance(outputs_of(loaded.merge_and_unload(), batch), expected) < TOLERANCE


def test_a_tied_weight_is_carried_at_each_of_its_modules(gradiends: Gradiends, tmp_path: Path):
    batch, model = batch_of("gpt2"), gradiends.fitted("gpt2", 1.0, target_modules=("wte",))
    export = export_to_lora(model, NAME, tmp_path, rank=32)
    assert (
        sorted(export.modules) == ["lm_head", "transformer.wte"] and sorted(export.unmergeable) == export.modules[::-1]
    )
    assert "its weight is shared with another module" in str(export)
    loaded = peft.PeftModel.from_pretrained(gradiends.base("gpt2"), tmp_path)
    with edited(model, NAME):
        assert distance(outputs_of(loaded, batch), outputs_of(model, batch)) < TOLERANCE


def test_export_beside_a_lora_uses_the_names_of_the_base(gradiends: Gradiends, tmp_path: Path):
    model = gradiends.fitted("bert", 1.0)
    plain = export_to_lora(model, NAME, tmp_path / "plain", rank=4)
    model.add_adapter(peft.LoraConfig(target_modules="all-linear", r=2), adapter_name="tuned")
    beside = export_to_lora(model, NAME, tmp_path / "beside", rank=4)
    assert beside.modules == plain.modules and beside.left_out == plain.left_out


def test_what_cannot_be_exported_says_why(gradiends: Gradiends, tmp_path: Path):
    model = gradiends.base("bert")
    model.add_adapter(config_of(), adapter_name=NAME)
    with pytest.raises(ValueError, match=r"changes nothing: it was never fitted. Call GradiendTrainer"):
        export_to_lora(model, NAME, tmp_path)
    fit(model, rate=0.0)
    with pytest.raises(ValueError, match="changes nothing: its learning_rate is 0"):
        export_to_lora(model, NAME, tmp_path)
    steer(model, NAME, learning_rate=0.1)
    with pytest.raises(ValueError, match="rank=0"):
        export_to_lora(model, NAME, tmp_path, rank=0)
    for layer in gradiend_layers(model).values():
        layer.merge_weights()
    with pytest.raises(ValueError, match="is merged into the weights"):
        export_to_lora(model, NAME, tmp_path)
    norms = gradiends.fitted("bert", 1.0, target_modules=("LayerNorm",))
    with pytest.raises(ValueError, match=r"no linear layer and no embedding.*Merge it instead"):
        export_to_lora(norms, NAME, tmp_path)
    assert not any(tmp_path.iterdir())
