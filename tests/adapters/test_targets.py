"""An adapter without `target_modules` erases at the norms of the blocks and at the final norm."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LNTuningConfig, PeftConfig, get_peft_model
from torch import nn

from hf_erasure import ConceptErasureConfig, GradiendConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.models.flow import norms_of_hidden_state
from tests.lifecycle.verbs import OF, OURS
from tests.small_models import ARCHITECTURES, LABELS, small_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64, "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {
    f"{side}_{what}": number
    for side in ("encoder", "decoder")
    for what, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}


def per_layer(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}.{layer}.{name}" for layer in range(2) for name in names]


def wav2vec2(stable: bool) -> hf.PreTrainedModel:
    return hf.Wav2Vec2Model(
        hf.Wav2Vec2Config(
            **SIZES,
            intermediate_size=64,
            conv_dim=(16, 16),
            conv_kernel=(4, 4),
            conv_stride=(2, 2),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
            do_stable_layer_norm=stable,
        )
    )


OTHERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=2)),
        [*per_layer("model.layers", "input_layernorm", "post_attention_layernorm"), "model.norm"],
    ),
    # The norms of its embeddings come after its layers in the module, but before them in the forward pass.
    "bart": (
        lambda: hf.BartModel(hf.BartConfig(vocab_size=64, d_model=32, **SEQ2SEQ)),
        [
            *per_layer("encoder.layers", "self_attn_layer_norm", "final_layer_norm"),
            *per_layer("decoder.layers", "self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        ],
    ),
    # Its final norm comes before its layers in the module, but after them in the forward pass.
    "opt": (
        lambda: hf.OPTModel(
            hf.OPTConfig(**SIZES, vocab_size=64, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32)
        ),
        ["decoder.final_layer_norm", *per_layer("decoder.layers", "self_attn_layer_norm", "final_layer_norm")],
    ),
    # One layer is used at all depths.
    "albert": (
        lambda: hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16)),
        [
            f"encoder.albert_layer_groups.0.albert_layers.0.{name}"
            for name in ("full_layer_layer_norm", "attention.LayerNorm")
        ],
    ),
    "clip_text": (
        lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT)),
        [*per_layer("encoder.layers", "layer_norm1", "layer_norm2"), "final_layer_norm"],
    ),
    "gemma2": (
        lambda: hf.Gemma2Model(hf.Gemma2Config(**GROUPED)),
        [
            *per_layer(
                "layers",
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
            "norm",
        ],
    ),
    # The norms of its convolutions belong to no block, and the norm before its layers belongs to the embedding.
    "wav2vec2": (lambda: wav2vec2(stable=False), per_layer("encoder.layers", "layer_norm", "final_layer_norm")),
    # If it were matched as a suffix, the final `layernorm` would also match `embeddings.layernorm`.
    "convnext": (
        lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)),
        [
            "encoder.stages.0.layers.0.layernorm",
            "encoder.stages.1.layers.0.layernorm",
            "layernorm",
        ],
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_of_the_ten_architectures(name: str):
    assert norms_of_hidden_state(small_model(name)) == ARCHITECTURES[name].norms


@pytest.mark.parametrize("name", OTHERS)
def test_default_of_other_architectures(name: str):
    build, expected = OTHERS[name]
    model = build()
    assert norms_of_hidden_state(model) == expected
    # PEFT attaches the adapter to exactly these modules.
    model.add_adapter(ConceptErasureConfig(labels=LABELS))
    assert list(erasure_layers(model)) == expected


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_no_norm_of_a_head_or_an_embedding_is_chosen(name: str):
    model = OTHERS[name][0]() if name in OTHERS else small_model(name)
    for path in norms_of_hidden_state(model):
        last = path.rpartition(".")[2]
        assert last not in ("q_norm", "k_norm") and "embed" not in path and "head" not in path
        assert not list(model.get_submodule(path).children())


def test_layers_to_transform_and_exclude_modules():
    def chosen(**fields) -> list[str]:
        model = OTHERS["gemma2"][0]()
        model.add_adapter(ConceptErasureConfig(labels=LABELS, **fields))
        return list(erasure_layers(model))

    assert chosen(layers_to_transform=1) == [n for n in OTHERS["gemma2"][1] if n.startswith("layers.1.")]
    assert chosen(layers_to_transform=[0], layers_pattern="layers") == [
        n for n in OTHERS["gemma2"][1] if n.startswith("layers.0.")
    ]
    assert chosen(exclude_modules=["norm"]) == OTHERS["gemma2"][1][:-1]
    named = {"target_modules": ["input_layernorm"], "layers_pattern": "layers"}
    assert chosen(**named, layers_to_transform=[1]) == ["layers.1.input_layernorm"]


UNIVNET = {
    "model_in_channels": 8, "model_hidden_channels": 8, "num_mel_bins": 6, "kernel_predictor_hidden_channels": 8,
    "resblock_kernel_sizes": [3], "resblock_stride_sizes": [2], "resblock_dilation_sizes": [[1, 3]],
}  # fmt: skip
WITHOUT_NORMS = [
    (hf.MobileNetV1Model, hf.MobileNetV1Config(depth_multiplier=0.25, image_size=32), {"pixel_values": (8, 3, 32, 32)}),
    (hf.UnivNetModel, hf.UnivNetConfig(**UNIVNET), {"input_features": (8, 32, 6), "noise_sequence": (8, 32, 8)}),
]


@pytest.mark.parametrize("kind, config, sizes", WITHOUT_NORMS)
def test_names_in_the_error_can_be_fitted_where_no_norm_is_of_the_hidden_state(kind: Any, config: Any, sizes: Any):
    model = kind(config).eval()
    with pytest.raises(ValueError, match="No normalization layer") as refused:
        norms_of_hidden_state(model)
    names = re.findall(r"'([^']+)'", str(refused.value))
    model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=names))
    given = {name: torch.randn(size) for name, size in sizes.items()}
    fit_concept_erasure(model, [{**given, "concept_labels": torch.arange(8) % 2}], progress=False)
    assert set(model.peft_config["default"].fitted_sites) == set(names)


def test_a_model_without_blocks_says_what_to_write():
    with pytest.raises(ValueError, match=r"no default for target_modules.*target_modules=\["):
        norms_of_hidden_state(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


@pytest.mark.parametrize("config", [ConceptErasureConfig(labels=LABELS), GradiendConfig(classes=LABELS)])
def test_the_word_for_linear_layers_where_there_are_none(config: PeftConfig):
    model = hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"))
    config.target_modules = "all-linear"
    with pytest.raises(ValueError, match=r"target_modules='all-linear' .* stands for no module of ResNetModel"):
        model.add_adapter(config)


def test_an_adapter_with_ambiguous_names_survives_saving(tmp_path):
    model = OTHERS["convnext"][0]()
    model.add_adapter(ConceptErasureConfig(labels=LABELS, layers_to_transform=[1]))
    expected = list(erasure_layers(model))
    with pytest.warns(UserWarning, match="was never fitted"):
        model.save_pretrained(tmp_path)
    other = OTHERS["convnext"][0]()
    other.load_adapter(tmp_path)
    assert list(erasure_layers(other)) == expected


def test_a_norm_that_another_adapter_has_replaced_is_named_by_its_place() -> None:
    model = copy.deepcopy(small_model("bert"))
    expected = norms_of_hidden_state(model)
    get_peft_model(model, LNTuningConfig(target_modules=["LayerNorm"], task_type=None))
    assert norms_of_hidden_state(model) == expected


@pytest.mark.parametrize("kind", OURS)
def test_what_an_earlier_fit_wrote_down_does_not_choose_the_modules_of_an_adapter_to_be_fitted(kind: str):
    config = copy.copy(OF[kind].added("bert", "ours", target_modules=["key"]).peft_config["ours"])
    assert {name.rpartition(".")[2] for name in config.fitted_modules} == {"key"}
    config.fitted, config.target_modules = False, ["query"]
    assert not config.fitted_modules
    if kind == "erasure":
        model = get_peft_model(copy.deepcopy(small_model("bert")), config, "another")
        assert {path.rpartition(".")[2] for path in erasure_layers(model, "another")} == {"query"}
