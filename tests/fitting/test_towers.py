"""Models with a tower for images or sounds beside one for text: what is fitted, on which data, and what is left out."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hf_erasure import ConceptErasureConfig, ErasureReport, GradiendConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers, targeted_parameters
from hf_erasure.fitting.heldout import measured_leakage
from tests.small_models import LABELS, outputs_of, roughen, same

ROWS, PATCHES, IMAGE = 16, 16, 40
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {**_SIZES, "vocab_size": 64, "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 1}
_SIDES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 1, "attention_heads": 4, "ffn_dim": 64}.items()
}
_IMAGES = {**_SIZES, "image_size": 16, "patch_size": 4}
TEXT, VISION = r"text_model\..*layer_norm\d", r"vision_model\..*layer_norm\d"


def built(model: Any) -> Any:
    return roughen(model, torch.Generator().manual_seed(0)).eval()


@functools.cache
def clip() -> hf.PreTrainedModel:
    text = {**_TEXT, "eos_token_id": 2}
    config = hf.CLIPConfig(text_config=text, vision_config=_IMAGES, projection_dim=16)
    return built(hf.CLIPModel(config))


@functools.cache
def llava() -> hf.PreTrainedModel:
    text = {"model_type": "llama", **_TEXT, "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", **_IMAGES}
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return built(hf.LlavaModel(config))


def batch(seed: int, length: int = 8, images: bool = False) -> dict[str, Tensor]:
    """Texts of several lengths, and images; both show the concept."""
    noise, labels = torch.Generator().manual_seed(seed), torch.arange(ROWS) % 2
    lengths = torch.randint(length // 2, length + 1, (ROWS,), generator=noise).clamp_min(4)
    mask = (torch.arange(length) < lengths[:, None]).long()
    mask[0] = 1
    ids = (torch.randint(3, 20, (ROWS, length), generator=noise) + 20 * (labels[:, None] > 0)).clamp_max(39) * mask
    pixels = torch.randn(ROWS, 3, 16, 16, generator=noise) + labels.view(-1, 1, 1, 1)
    if images:
        ids = torch.cat([torch.full((ROWS, PATCHES), IMAGE), ids], 1)
        mask = torch.cat([torch.ones(ROWS, PATCHES, dtype=torch.long), mask], 1)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "concept_labels": labels}


def without(given: list[dict[str, Tensor]], *names: str) -> list[dict[str, Tensor]]:
    return [{name: value for name, value in one.items() if name not in names} for one in given]


def by_token(given: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        {**one, "concept_labels": (one["input_ids"] > 20).long().masked_fill(one["attention_mask"] == 0, -100)}
        for one in given
    ]


def with_adapter(base: nn.Module, **config: Any) -> Any:
    model = copy.deepcopy(base)
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=LABELS, **config), adapter_name="e")
    return model


def fit(model: nn.Module, batches: list[dict[str, Tensor]], **options: Any) -> ErasureReport:
    return fit_concept_erasure(model, batches, "e", progress=False, **options)


def rows(report: ErasureReport) -> dict[str, int | None]:
    return {line.site: line.rows for line in report.sites}


def alike(left: nn.Module, right: nn.Module) -> bool:
    return same(outputs_of(left, BATCHES[0]), outputs_of(right, BATCHES[0]))


BATCHES = [batch(seed) for seed in (1, 2)]


# ---- both towers encode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, PATCHES + 1])
def test_each_tower_has_its_own_mask(length: int) -> None:
    batches = [batch(seed, length) for seed in (1, 2)]
    found = rows(fit(with_adapter(clip()), batches))
    assert found["vision_model.encoder.layers.0.layer_norm1"] == 2 * ROWS * (PATCHES + 1)
    assert found["text_model.encoder.layers.0.layer_norm1"] == sum(int(one["attention_mask"].sum()) for one in batches)


@pytest.mark.parametrize("sequential", [True, False])
def test_labels_of_tokens_leave_the_images_out(sequential: bool, tmp_path: Path) -> None:
    model, batches = with_adapter(clip()), by_token(BATCHES)
    with pytest.warns(UserWarning, match="leaves out 5 sites that were not named.*label tokens.*'vision_model"):
        report = fit(model, batches, sequential=sequential)
    sites = set(erasure_layers(model, "e"))
    assert all(site.startswith("text_model") for site in sites)
    assert sites == set(rows(report)) == set(model.peft_config["e"].fitted_sites)
    assert not [name for name in model.state_dict() if "vision_model" in name and "concept_erasure" in name]
    model.save_pretrained(str(tmp_path))
    loaded = copy.deepcopy(clip())
    loaded.load_adapter(str(tmp_path), adapter_name="e")
    assert set(erasure_layers(loaded, "e")) == sites
    assert alike(model, loaded)
    assert set(measured_leakage(model, batches, "e")[0]) >= sites


def test_named_sites_are_refused_where_the_labels_are_of_tokens() -> None:
    with pytest.raises(ValueError, match="tokens cannot be matched"):
        fit(with_adapter(clip(), target_modules=r".*layer_norm\d"), by_token(BATCHES))


# ---- a language model with a tower -----------------------------------------------------------------------------------


def test_the_default_is_the_language_side_with_images_and_without() -> None:
    with_images = [batch(seed, images=True) for seed in (1, 2)]
    for batches in (with_images, without(BATCHES, "pixel_values")):
        found = rows(fit(with_adapter(llava()), batches))
        assert all(site.startswith("language_model") or "hidden_state" in site for site in found)
        assert set(found.values()) == {sum(int(one["attention_mask"].sum()) for one in batches)}


def test_a_gradiend_changes_the_language_side_by_default_and_both_towers_where_both_encode() -> None:
    model = copy.deepcopy(llava())
    with pytest.warns(UserWarning, match="leaves out .*vision_tower'.*the language side is the default"):
        model.add_adapter(GradiendConfig(classes=LABELS), adapter_name="e")
    assert all(".language_model." in f".{name}" for name in targeted_parameters(model, "e"))
    model = copy.deepcopy(clip())
    model.add_adapter(GradiendConfig(classes=LABELS), adapter_name="e")
    assert {name.split(".")[0] for name in targeted_parameters(model, "e")} >= {"text_model", "vision_model"}


@pytest.mark.parametrize("sequential", [True, False])
def test_sites_that_no_batch_reaches(sequential: bool) -> None:
    texts = without(BATCHES, "pixel_values")
    named = with_adapter(llava(), target_modules=r".*norm\d?")
    with pytest.raises(ValueError, match=r"never reached.*exclude_modules=\['vision_tower"):
        fit(named, texts, sequential=sequential)
    model = with_adapter(llava(), target_modules="all-linear")
    with pytest.warns(UserWarning, match="do not reach.*'vision_tower"):
        fit(model, texts, sequential=sequential)
    assert all(site.startswith("language_model") for site in erasure_layers(model, "e"))


def test_a_fit_that_fails_leaves_no_site_out() -> None:
    model = with_adapter(clip())
    before, sites = outputs_of(model, BATCHES[0]), set(erasure_layers(model, "e"))
    with pytest.raises(ValueError, match="eval_batches is empty"):
        fit(model, by_token(BATCHES), eval_batches=[])
    assert set(erasure_layers(model, "e")) == sites
    assert not model.peft_config["e"].fitted
    assert same(before, outputs_of(model, BATCHES[0]))


def test_a_warning_that_is_an_error_leaves_a_whole_adapter() -> None:
    model = with_adapter(clip())
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="leaves out 5"):
        warnings.filterwarnings("error", message=".*leaves out")
        fit(model, by_token(BATCHES))
    assert set(erasure_layers(model, "e")) == set(model.peft_config["e"].fitted_sites)
    assert model.peft_config["e"].fitted


@pytest.mark.parametrize("sequential", [True, False])
def test_a_checkpoint_goes_on_without_the_sites_that_were_left_out(sequential: bool, tmp_path: Path) -> None:
    batches, models = by_token(BATCHES), [with_adapter(clip()) for _ in range(2)]
    for model in models:
        with pytest.warns(UserWarning, match="leaves out 5"):
            fit(model, batches, sequential=sequential, checkpoint_dir=tmp_path)
    assert alike(*models)
    fit(models[0], batches, sequential=sequential, checkpoint_dir=tmp_path)
    assert alike(*models)


# ---- one tower alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("targets", "lacks"), [(VISION, ("input_ids", "attention_mask")), (TEXT, ("pixel_values",))])
@pytest.mark.parametrize("sequential", [True, False])
def test_one_tower_is_fitted_on_what_it_reads(targets: str, lacks: tuple[str, ...], sequential: bool) -> None:
    whole, alone = with_adapter(clip(), target_modules=targets), with_adapter(clip(), target_modules=targets)
    fit(whole, BATCHES, sequential=sequential)
    report = fit(alone, without(BATCHES, *lacks), sequential=sequential, eval_batches=without(BATCHES, *lacks))
    assert alike(whole, alone)
    assert sum("last_hidden_state" in line.site for line in report.sites) == 1


def test_both_towers_are_measured_where_each_gives_its_states() -> None:
    report = fit(with_adapter(clip()), BATCHES, eval_batches=[batch(seed) for seed in (3, 4)])
    assert {"text_model.last_hidden_state", "vision_model.last_hidden_state"} <= set(rows(report))


def test_the_tower_of_a_language_model_is_fitted_on_images_alone() -> None:
    model = with_adapter(llava(), target_modules=r"vision_tower\..*layer_norm\d")
    found = rows(fit(model, without(BATCHES, "input_ids", "attention_mask")))
    assert found["vision_tower.encoder.layers.0.layer_norm1"] == 2 * ROWS * (PATCHES + 1)


# ---- speech ----------------------------------------------------------------------------------------------------------


@functools.cache
def wav2vec2() -> hf.PreTrainedModel:
    convolutions = {"conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2]}
    config = hf.Wav2Vec2Config(
        **_SIZES, **convolutions, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm="layer"
    )
    return built(hf.Wav2Vec2Model(config))


def sounds(seed: int, samples: int) -> dict[str, Tensor]:
    noise, labels = torch.Generator().manual_seed(seed), torch.arange(ROWS) % 2
    lengths = torch.randint(samples // 2, samples + 1, (ROWS,), generator=noise)
    lengths[0] = samples
    mask = (torch.arange(samples) < lengths[:, None]).long()
    values = torch.randn(ROWS, samples, generator=noise) * (0.2 + labels[:, None]) + labels[:, None]
    return {"input_values": values * mask, "attention_mask": mask, "concept_labels": labels}


@pytest.mark.parametrize("sequential", [True, False])
def test_frames_of_padding_do_not_count(sequential: bool) -> None:
    batches, model = [sounds(1, 800), sounds(2, 610)], with_adapter(wav2vec2())
    found = rows(fit(model, batches, sequential=sequential))
    frames = [(one["attention_mask"].sum(1) - 10) // 5 + 1 for one in batches]
    for _ in range(2):
        frames = [(number - 3) // 2 + 1 for number in frames]
    assert set(found.values()) == {int(sum(number.sum() for number in frames))}
    with_garbage = [{**one, "input_values": one["input_values"] + 3 * (one["attention_mask"] == 0)} for one in batches]
    assert set(rows(fit(with_adapter(wav2vec2()), with_garbage)).values()) == set(found.values())


# ---- towers that are joined ------------------------------------------------------------------------------------------


def test_the_default_is_all_towers_where_a_text_alone_would_run() -> None:
    vision, text = {**_SIZES, "image_size": 16, "patch_size": 4}, {**_TEXT, "eos_token_id": 2}
    config = hf.FlavaConfig(image_config=vision, text_config=text, multimodal_config=_SIZES, projection_dim=16)
    sites = erasure_layers(with_adapter(built(hf.FlavaModel(config))), "e")
    assert {"text_model.layernorm", "image_model.layernorm", "multimodal_model.layernorm"} <= set(sites)


def test_patches_that_are_drawn_in_any_order_have_the_label_of_their_image() -> None:
    config = hf.ViltConfig(**_TEXT, image_size=16, patch_size=4, modality_type_vocab_size=2)
    report = fit(with_adapter(built(hf.ViltModel(config))), BATCHES)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in BATCHES)
    assert rows(report)["encoder.layer.0.layernorm_before"] == tokens + 2 * ROWS * (PATCHES + 1)


# ---- which rows of images count, and whose they are ------------------------------------------------------------------


def test_images_may_stand_before_the_texts_of_a_batch() -> None:
    """The images of all texts may lie in one list, and its length is not the number of texts."""
    given = [batch(seed, images=True) for seed in (1, 2)]
    for one in given:  # two images for each text
        one["input_ids"] = torch.cat([torch.full((ROWS, PATCHES), IMAGE), one["input_ids"]], 1)
        one["attention_mask"] = torch.cat([torch.ones(ROWS, PATCHES, dtype=torch.long), one["attention_mask"]], 1)
        one["pixel_values"] = one["pixel_values"].repeat_interleave(2, 0)
    turned = [{name: one[name] for name in ("pixel_values", *one)} for one in given]
    found = [rows(fit(with_adapter(llava()), batches)) for batches in (given, turned)]
    assert found[0] == found[1]


@pytest.mark.parametrize("sequential", [True, False])
def test_images_of_texts_with_unequal_numbers_of_them_are_not_labelled(sequential: bool) -> None:
    """Two images of the first text and none of the second are as many as one of each."""
    given = [batch(seed, images=True) for seed in (1, 2)]
    ids = torch.cat([torch.full((ROWS, PATCHES), IMAGE), given[1]["input_ids"]], 1)
    ids[0, 2 * PATCHES :], ids[1, : 2 * PATCHES] = 3, 3
    ids[2:, :PATCHES] = 3
    mask = torch.cat([torch.ones(ROWS, PATCHES, dtype=torch.long), given[1]["attention_mask"]], 1)
    given[1] |= {"input_ids": ids, "attention_mask": mask}
    with pytest.raises(ValueError, match=r"different numbers of tokens for images.*vision_tower"):
        fit(with_adapter(llava(), target_modules=VISION.replace("model", "tower")), given, sequential=sequential)
    assert set(rows(fit(with_adapter(llava()), given, sequential=sequential)).values()) == {
        sum(int(one["attention_mask"].sum()) for one in given)
    }


@pytest.mark.parametrize("pool", ["tokens", "mean", "last"])
def test_patches_of_padding_do_not_count(pool: str) -> None:
    base = built(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**_SIZES, num_patches=PATCHES, patch_size=4)))
    noise, labels = torch.Generator().manual_seed(0), torch.arange(ROWS) % 2
    shapes = torch.tensor([[4, 4], [2, 5], [3, 4], [2, 2]])[torch.arange(ROWS) // 2 % 4]
    mask = (torch.arange(PATCHES) < shapes.prod(1, keepdim=True)).long()
    values = torch.randn(ROWS, PATCHES, 48, generator=noise) + labels.view(-1, 1, 1) * torch.linspace(-1, 1, 48)
    given = {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    model = with_adapter(base, target_modules=r".*layer_norm\d|post_layernorm")
    fit(model, [{**given, "concept_labels": labels}], pool=pool)
    with torch.no_grad():
        states = [net(**given).last_hidden_state.double() for net in (base, model)]
    gaps = []
    for one in states:
        real = [row[kept.bool()] for row, kept in zip(one, mask, strict=True)]
        vectors = real if pool == "tokens" else [(row.mean(0) if pool == "mean" else row[-1])[None] for row in real]
        means = [torch.cat(vectors[own::2]).mean(0) for own in (0, 1)]
        gaps.append(float((means[0] - means[1]).norm() / torch.cat(vectors).std(0).norm()))
    assert gaps[1] < 1e-5 < 0.1 < gaps[0]


def test_padding_of_images_that_counts_is_said() -> None:
    network = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], layer_type="basic"
    )
    base = built(hf.DetrModel(hf.DetrConfig(backbone_config=network, d_model=32, num_queries=5, **_SIDES)))
    noise, labels = torch.Generator().manual_seed(0), torch.arange(ROWS) % 2
    mask = torch.ones(ROWS, 64, 64, dtype=torch.long)
    given = {"pixel_values": torch.randn(ROWS, 3, 64, 64, generator=noise), "concept_labels": labels}
    # What a detector learns are boxes, and no text of its decoder.
    given["labels"] = [{"class_labels": torch.zeros(1)}] * ROWS
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pixel_mask")
        fit(with_adapter(base), [{**given, "pixel_mask": mask}])
    mask[1::2, 40:] = 0
    with pytest.warns(UserWarning, match="pixel_mask.*all of them count"):
        fit(with_adapter(base), [{**given, "pixel_mask": mask}])


def test_a_model_that_makes_the_inputs_of_its_backbone_is_run_whole() -> None:
    sizes = {"head_dim": 8, "patch_length": 8, "context_length": 32, "horizon_length": 8}
    base = built(hf.TimesFmModelForPrediction(hf.TimesFmConfig(**_SIZES, **sizes)))
    noise, labels = torch.Generator().manual_seed(0), torch.arange(ROWS) % 2
    values = torch.randn(ROWS, 32, generator=noise) + labels[:, None] * torch.linspace(-1, 1, 32)
    given = {"past_values": values, "freq": torch.zeros(ROWS, dtype=torch.long), "concept_labels": labels}
    report = fit(with_adapter(base, target_modules=["down_proj"]), [given])
    assert {line.rank for line in report.sites} == {1}


# ---- what a decoder reads --------------------------------------------------------------------------------------------


def test_labels_become_what_the_decoder_reads_as_the_model_itself_makes_it() -> None:
    """Whisper and M2M100 (NLLB) have no method of transformers for it."""
    tokens = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    sound = {"num_mel_bins": 16, "max_source_positions": 20}
    whisper = built(hf.WhisperForConditionalGeneration(hf.WhisperConfig(**_SIDES, **tokens, **sound)))
    m2m100 = built(hf.M2M100ForConditionalGeneration(hf.M2M100Config(**_SIDES, **tokens)))
    noise, concept = torch.Generator().manual_seed(0), torch.arange(ROWS) % 2
    labels = torch.randint(3, 20, (ROWS, 6), generator=noise) + 20 * concept[:, None]
    labels[::3, 4:] = -100
    mask = (labels != -100).long()
    texts = {"input_ids": labels * mask, "attention_mask": mask}
    features = torch.randn(ROWS, 16, 40, generator=noise) + concept.view(-1, 1, 1)
    for base, given in ((whisper, {"input_features": features}), (m2m100, texts)):
        ids = torch.cat([torch.full((ROWS, 1), 1), labels[:, :-1] * mask[:, :-1]], 1)
        ids[labels.roll(1, 1) == -100] = 0
        ids[:, 0] = 1
        with torch.no_grad():
            assert torch.equal(base(**given, labels=labels).logits, base(**given, decoder_input_ids=ids).logits)
        models = [with_adapter(base) for _ in range(2)]
        fit(models[0], [{**given, "labels": labels, "concept_labels": concept}])
        by_hand = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        fit(models[1], [{**given, **by_hand, "concept_labels": concept}])
        states = [{k: v for k, v in one.state_dict().items() if "concept_erasure" in k} for one in models]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
