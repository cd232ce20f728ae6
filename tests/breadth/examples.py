"""Batches for a model of any type; the inputs show a concept of two classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from tests.breadth.outcomes import apart, tensors
from tests.breadth.sizes import VOCABULARY
from tests.breadth.zoo import NotBuiltError

Batch = dict[str, Tensor]
ROWS, LENGTH, DECODER_LENGTH = 8, 8, 6
# (first, end) of the ids of the first class; those of the second class are higher by `end`.
_WORDS = 10, 60
IMAGE_TOKEN = 150
_PARTS = ("vision_config", "audio_config", "text_config", "thinker_config", "image_config", "encoder", "vision")
# Types whose main input is the text, although a row holds a text and an image.
_PAIRS = {
    "clip", "siglip", "blip", "chinese_clip", "altclip", "flava", "bridgetower", "vilt", "groupvit", "clipseg",
    "metaclip_2", "owlvit", "owlv2", "vision-text-dual-encoder", "git", "kosmos-2", "tipsv2", "align",
}  # fmt: skip
_VIDEOS = {"timesformer", "videomae", "vivit"}
# Types that take (bands, frames); all others take the bands last.
_BANDS_FIRST = {"whisper", "moonshine", "qwen2_audio_encoder", "audioflamingo3_encoder", "voxtral_encoder"}
_WITHOUT_MASK = {"mamba", "rwkv", "falcon_mamba"}


def batch_of(model: Any, seed: int = 0, rows: int = ROWS) -> Batch:
    """Inputs of a model and `concept_labels`, which alternate between the two classes."""
    noise = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2
    kind, main = model.config.model_type, getattr(model, "main_input_name", "input_ids")
    takes = inspect.signature(model.forward).parameters
    found: Batch = {}
    if "input_ids" in takes and (main == "input_ids" or main not in takes or "pixel_values" in takes):
        found |= _texts(takes, labels, noise)
    wants_image = "pixel_values" in takes and takes["pixel_values"].default is inspect.Parameter.empty
    if main == "pixel_values" or wants_image or (main == "input_ids" and kind in _PAIRS):
        found |= _images(model.config, labels, noise)
    if main == "input_values":
        found |= _sounds(model.config, labels, noise)
    if main == "input_features":
        found |= _spectra(model.config, labels, noise)
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        ids, mask = _words(labels, DECODER_LENGTH, noise)
        found["decoder_input_ids"] = ids
        if "decoder_attention_mask" in takes and kind != "fsmt":
            found["decoder_attention_mask"] = mask
    found = _OF_TYPE.get(kind, lambda batch, *_: batch)(found, model.config, labels, noise)
    return {**found, "concept_labels": labels}


def by_token(batch: Batch) -> Batch:
    """The batch with a label for each token: whether its id is odd."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    return {**batch, "concept_labels": (ids % 2).masked_fill(mask == 0, -100)}


def call(model: Any, batch: Mapping[str, Tensor]) -> Any:
    """The model's output for a batch; the random seed is the same each time."""
    given: dict[str, Any] = {name: value for name, value in batch.items() if name != "concept_labels"}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**given)


def checked(model: Any, batch: Batch) -> dict[str, Tensor]:
    """The model's output, after a check that it is finite and the same at every call.

    Raises:
        NotBuiltError: If it is not, or the model takes other inputs.
    """
    try:
        _settle(model, batch)
        model.requires_grad_(False)  # as adapters do; some operations use other kernels then
        first, second = (tensors(call(model, batch)) for _ in range(2))
    except Exception as error:
        raise NotBuiltError(f"it does not take {'+'.join(batch)}: {type(error).__name__}: {error}") from error
    if not first or not all(bool(value.isfinite().all()) for value in first.values()):
        raise NotBuiltError("it gives no finite numbers")
    third = tensors(call(model, batch))  # some models keep values that the first call computes
    if apart(second, third) > 0:
        raise NotBuiltError("it gives other numbers at every call")
    return third


def _settle(model: Any, batch: Batch) -> None:
    """Give batch norms the statistics of the batch: with a mean of 0 and a variance of 1, signals would fade."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = None  # the average over batches
    if norms:
        call(model, batch)
    model.eval()


def alone(batch: Mapping[str, Tensor], row: int) -> Batch:
    """One example of a batch; tensors with several entries for an example have them next to each other."""
    rows = len(batch["concept_labels"])
    return {
        name: value.unflatten(0, (rows, len(value) // rows))[row] if len(value) != rows else value[row : row + 1]
        for name, value in batch.items()
    }


# ---- inputs by kind --------------------------------------------------------------------------------------------------


def _words(labels: Tensor, length: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    first, behind = _WORDS
    ids = torch.randint(first, behind, (len(labels), length), generator=noise) + behind * labels[:, None]
    # Every row is padded, also if it is run alone, since some models run other code without padding.
    lengths = torch.randint(length // 2, length, (len(labels),), generator=noise)
    lengths[0] = length - 1
    mask = (torch.arange(length) < lengths[:, None]).long()
    return ids * mask, mask


def _texts(takes: Mapping[str, Any], labels: Tensor, noise: torch.Generator) -> Batch:
    ids, mask = _words(labels, LENGTH, noise)
    found = {"input_ids": ids}
    if "attention_mask" in takes or any(field.kind is field.VAR_KEYWORD for field in takes.values()):
        found["attention_mask"] = mask
    if "bbox" in takes:
        corner = torch.randint(0, 30, (*ids.shape, 2), generator=noise)
        found["bbox"] = torch.cat([corner, corner + 5], -1)
    return found


def _value(config: Any, *names: str) -> Any:
    """The value of the first of these fields that a configuration, or one of its parts, has."""
    for part in (config, *(getattr(config, name, None) for name in _PARTS)):
        for name in names:
            if part is not None and getattr(part, name, None) is not None:
                return getattr(part, name)
    return None


def _images(config: Any, labels: Tensor, noise: torch.Generator) -> Batch:
    size = _value(config, "image_size") or 16
    size = (size["height"], size["width"]) if isinstance(size, dict) else size
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    images = torch.randn(len(labels), _value(config, "num_channels") or 3, height, width, generator=noise)
    images = images + labels.view(-1, 1, 1, 1) * torch.linspace(-1, 1, width)
    if config.model_type in _VIDEOS:
        images = images[:, None].repeat(1, config.num_frames, 1, 1, 1)
    return {"pixel_values": images}


def _sounds(config: Any, labels: Tensor, noise: torch.Generator) -> Batch:
    loud = labels.view(-1, 1).float()
    if config.model_type == "audio-spectrogram-transformer":
        drawn = torch.randn(len(labels), config.max_length, config.num_mel_bins, generator=noise)
        return {"input_values": drawn + loud[..., None]}
    return {"input_values": torch.randn(len(labels), 800, generator=noise) * (0.2 + loud) + loud}


def _spectra(config: Any, labels: Tensor, noise: torch.Generator) -> Batch:
    bands = _value(config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel") or 16
    size = (bands, 128) if config.model_type in _BANDS_FIRST else (32, bands)
    drawn = torch.randn(len(labels), *size, generator=noise)
    return {"input_features": drawn + labels.view(-1, 1, 1) * torch.linspace(-1, 1, size[-1])}


# ---- inputs of single types ------------------------------------------------------------------------------------------


def _states(batch: Batch, config: Any, labels: Tensor, noise: torch.Generator) -> Batch:
    """SpeechT5 without its networks for text and speech takes hidden states."""
    rows, width = len(labels), config.hidden_size
    heard = torch.randn(rows, 10, width, generator=noise) + labels.view(-1, 1, 1)
    return {"input_values": heard, "decoder_input_values": torch.randn(rows, 6, width, generator=noise)}


def _text_and_sound(batch: Batch, config: Any, labels: Tensor, noise: torch.Generator) -> Batch:
    ids, mask = _words(labels, LENGTH, noise)
    heard = torch.randn(len(labels), 1, 64, 16, generator=noise) + labels.view(-1, 1, 1, 1)
    return {"input_ids": ids, "attention_mask": mask, "input_features": heard}


def _image_in_text(count: int, *size: int) -> Callable[[Batch, Any, Tensor, torch.Generator], Batch]:
    """Put an image and its `count` placeholder tokens in front of each text."""

    def made(batch: Batch, config: Any, labels: Tensor, noise: torch.Generator) -> Batch:
        rows = len(labels)
        ids = torch.cat([torch.full((rows, count), IMAGE_TOKEN), batch["input_ids"]], 1)
        mask = torch.cat([torch.ones(rows, count, dtype=torch.long), batch["attention_mask"]], 1)
        image = torch.randn(rows, *size, generator=noise) + labels.view(-1, *[1] * len(size))
        return {**batch, "input_ids": ids, "attention_mask": mask, "pixel_values": image}

    return made


def _patches_in_text(batch: Batch, config: Any, labels: Tensor, noise: torch.Generator) -> Batch:
    """Qwen-VL takes the patches of all images in one list: 4 × 4 for each image, merged 2 × 2 into one token."""
    patches, pixels = 16, 3 * 2 * 4 * 4
    found = _image_in_text(patches // 4, 1)(batch, config, labels, noise)
    drawn = torch.randn(len(labels) * patches, pixels, generator=noise)
    found["pixel_values"] = drawn + labels.repeat_interleave(patches)[:, None]
    found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(labels))
    return {**found, "mm_token_type_ids": (found["input_ids"] == IMAGE_TOKEN).long()}


def _masked_patches(batch: Batch, config: Any, labels: Tensor, noise: torch.Generator) -> Batch:
    return {**batch, "noise": torch.rand(len(labels), 16, generator=noise)}


def _with_noise(batch: Batch, config: Any, labels: Tensor, noise: torch.Generator) -> Batch:
    """Pass the noise to UnivNet, which would otherwise draw new noise at each call."""
    size = *batch["input_features"].shape[:2], config.model_in_channels
    return {**batch, "noise_sequence": torch.randn(*size, generator=noise)}


def _without_mask(batch: Batch, *_: Any) -> Batch:
    return {name: value for name, value in batch.items() if name != "attention_mask"}


_OF_TYPE: dict[str, Callable[[Batch, Any, Tensor, torch.Generator], Batch]] = {
    "vit_mae": _masked_patches,
    "univnet": _with_noise,
    **dict.fromkeys(("llava", "vipllava", "paligemma"), _image_in_text(16, 3, 16, 16)),
    **dict.fromkeys(("idefics3", "smolvlm"), _image_in_text(4, 1, 3, 16, 16)),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _patches_in_text),
    "speecht5": _states,
    "clap": _text_and_sound,
    **dict.fromkeys(_WITHOUT_MASK, _without_mask),
}
assert max(_WORDS[1] * 2, IMAGE_TOKEN) < VOCABULARY
