"""A small dummy input is found for models of texts, images and sounds, and gives the same outputs each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate.utils import compile_regions
from peft import LoraConfig
from torch import nn

from hf_erasure import GradiendConfig, verify_adapter
from hf_erasure.adapters import set_features, steer, targeted_parameters
from hf_erasure.adapters.merging.probe import Probe
from hf_erasure.evaluation.loading import Adapter
from hf_erasure.gradiend import Feature, FeatureDecoder, FeatureEncoder
from hf_erasure.models.dummy import dummy_batch
from hf_erasure.models.model import distance, floats_of

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 60,
    "max_position_embeddings": 32,
}  # fmt: skip
TEXT, IMAGE = {**SMALL, "projection_dim": 8}, {"image_size": 8, "patch_size": 4, "projection_dim": 8}
TOWER = {name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}


def clip() -> nn.Module:
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=TOWER | IMAGE, projection_dim=8))


def clap() -> nn.Module:
    sound = {
        "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 16, "hidden_size": 16,
        "depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 8, "window_size": 4,
    }  # fmt: skip
    return hf.ClapModel(hf.ClapConfig(text_config=TEXT, audio_config=sound, projection_dim=8))


def wav2vec2() -> nn.Module:
    layers = {"conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return hf.Wav2Vec2Model(hf.Wav2Vec2Config(**TOWER, **layers, **positions))


def whisper() -> nn.Module:
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 16))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "vocab_size": 60}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    places = {"num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 16}
    return hf.WhisperModel(hf.WhisperConfig(**sides, **heads, **tokens, **places))


def qwen3_next() -> nn.Module:
    """A model whose blocks are all of the kind whose cache has no length."""
    linear = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    return hf.Qwen3NextModel(
        hf.Qwen3NextConfig(**SMALL, **linear, **heads, **experts, layer_types=["linear_attention"])
    )


def vilt() -> nn.Module:
    """A model that reads random patches of an image."""
    return hf.ViltModel(hf.ViltConfig(**SMALL, image_size=8, patch_size=4, max_image_length=2))


def xlm() -> nn.Module:
    """A model whose own dummy inputs include a None."""
    return hf.XLMModel(
        hf.XLMConfig(vocab_size=60, emb_dim=16, n_layers=1, n_heads=2, n_langs=1, max_position_embeddings=32)
    )


def t5() -> nn.Module:
    return hf.T5Model(hf.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


MODELS: list[Callable[[], nn.Module]] = [clip, clap, wav2vec2, whisper, qwen3_next, vilt, xlm, t5]


def built(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("build", MODELS)
def test_an_input_that_the_model_takes_twice_alike(build: Callable[[], nn.Module]):
    model = built(build)
    before = torch.random.get_rng_state()
    probe = Probe(model)
    assert probe.failure is None
    assert distance(probe.run(), probe.run()) == 0
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("build", [clip, wav2vec2, whisper])
def test_images_and_sounds_are_numbers_as_the_weights_are(build: Callable[[], nn.Module], dtype: torch.dtype):
    given = dummy_batch(built(build).to(dtype))
    assert {value.dtype for value in given.values() if isinstance(value, torch.Tensor)} <= {dtype, torch.int64}


@pytest.mark.parametrize("build", MODELS)
def test_an_adapter_of_another_kind_is_seen_to_act(build: Callable[[], nn.Module]):
    model = built(build)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), adapter_name="theirs")
    assert Adapter("theirs", "", model.peft_config["theirs"]).acts(model)[0]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    assert not Adapter("theirs", "", model.peft_config["theirs"]).acts(model)[0]


@pytest.mark.parametrize("build", MODELS)
def test_an_adapter_of_weights_is_verified(build: Callable[[], nn.Module]):
    model = built(build)
    model.add_adapter(GradiendConfig(classes=["a", "b"]), adapter_name="ours")
    assert "never fitted" in str(verify_adapter(model, "ours"))
    parameters = targeted_parameters(model, "ours")
    shapes, all_entries = {name: p.shape for name, p in parameters.items()}, dict.fromkeys(parameters)
    change = {name: torch.randn(p.numel()) for name, p in parameters.items()}
    decoder = FeatureDecoder(change, {name: torch.zeros_like(w) for name, w in change.items()}, all_entries, shapes)
    set_features(model, "ours", [Feature(FeatureEncoder(change, all_entries, shapes), decoder)], [("a", "b")])
    steer(model, "ours", feature_factor=1.0, learning_rate=0.1)
    verified = verify_adapter(model, "ours")
    assert verified, str(verified)


def test_compiled_regions_do_not_hide_the_reason():
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    with pytest.raises(ValueError, match="Blocks has no dummy input"):
        dummy_batch(compile_regions(Blocks(), backend="eager"))


def test_a_module_may_take_a_configuration_or_a_class():
    @dataclass
    class Taken:
        states: torch.Tensor

    class Layered(hf.BertConfig):
        def __getattribute__(self, name: str) -> Any:
            if name == "hidden_dropout_prob":
                raise AttributeError("It varies across layers.")
            return super().__getattribute__(name)

    assert list(floats_of(((Layered(), Taken), {"kind": Taken}))) == []
    (found,) = floats_of([Taken(torch.ones(2))])
    assert found.shape == (2,)
