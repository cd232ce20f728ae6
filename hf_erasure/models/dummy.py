"""A small input that a model accepts, made from its configuration: texts, images, sounds, or several of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .model import bare_model, callee_of, evaluating, forked_rng, input_device, is_encoder_decoder, on_cpu

ROWS = 2
# Tokens of a text; an odd number, unlike widths, counts of heads and windows.
LENGTH = 7
# Samples of a sound: enough for several frames after the convolutions of any speech encoder here.
_SAMPLES = 4000
_FRAMES = 128
_PART_CONFIGS = (
    "vision_config", "image_config", "audio_config", "encoder_config", "text_config", "thinker_config", "encoder",
    "vision",
)  # fmt: skip


@on_cpu()
def dummy_batch(model: nn.Module, watch: Callable[[Callable[[], Any]], object] | None = None) -> dict[str, Any]:
    """Return a small input that the model, bare or wrapped, has accepted in a run; it turns the cache off.

    The model's own `dummy_inputs` are tried first, then inputs that follow from its main input and its configuration,
    with as few others as it needs: a language model with a tower for images gets text alone. `watch` is passed the call
    of the model, and must make it; what it sees for an input that the model refuses does not count. Raises a
    `ValueError` if the model accepts none of these inputs.
    """
    base, reasons = bare_model(model), []
    callee = base if base is model else callee_of(model, base)  # FSDP gathers weights at its outermost wrapper
    takes = inspect.signature(base.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    # The cache of a model that mixes kinds of layers may not accept a short text.
    cache = {"use_cache": False} if "use_cache" in takes else {}
    dtype = next((value.dtype for value in base.parameters() if value.is_floating_point()), torch.float32)
    for inputs in _candidate_inputs(base):
        # A model's own inputs may hold None for an input that is not given. Images and sounds get the weights' dtype.
        given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        batch = {name: value.to(input_device(base)) for name, value in given.items() if takes_any or name in takes}
        batch |= {name: value.to(dtype) for name, value in batch.items() if value.is_floating_point()}
        call = partial(callee, **batch, **cache)
        try:
            with evaluating(base), forked_rng(base):
                call() if watch is None else watch(call)
        except Exception as error:
            reasons.append(f"{'+'.join(inputs)}: {type(error).__name__}: {error}")
            continue
        return batch | cache
    raise ValueError(
        f"{type(base).__name__} has no dummy input to compare outputs on: pass batch=, its inputs. "
        f"Tried: {'; '.join(' '.join(reason.split())[:120] for reason in reasons) or 'nothing'}."
    )


def _candidate_inputs(base: Any) -> Iterator[dict[str, Tensor]]:
    main, config = getattr(base, "main_input_name", "input_ids"), getattr(base, "config", None)
    own = getattr(base, "dummy_inputs", None)
    # Where each tower encodes by itself, all of them must run, and a text alone runs only one.
    encodes_all = hasattr(base, "get_text_features")
    if isinstance(own, dict) and main in own and not encodes_all:
        yield own
    if config is None:
        return
    takes = inspect.signature(base.forward).parameters
    noise = torch.Generator().manual_seed(0)
    text = text_inputs(base, noise) if "input_ids" in takes or main == "input_ids" else {}
    media = [*_image_inputs(config, noise), *_sound_inputs(config, noise)]
    if main == "input_ids":
        both = [{**text, **more} for more in media]
        yield from [*both, text] if encodes_all else [text, *both]
        if "decoder_input_ids" in text:  # some heads make these themselves (BART, T5)
            yield {name: value for name, value in text.items() if name != "decoder_input_ids"}
        return
    for more in media:
        if main in more:
            yield more
            yield _decoder_inputs(base, takes, noise) | more
            yield text | more


def _get(config: Any, *names: str) -> Any:
    """The first value with one of these names in a configuration, or in the configurations of its parts."""
    parts = [config, *(getattr(config, part, None) for part in _PART_CONFIGS)]
    found = (getattr(part, name, None) for part in parts if part is not None for name in names)
    return next((value for value in found if value is not None), None)


@on_cpu()
def text_inputs(base: Any, noise: torch.Generator) -> dict[str, Tensor]:
    """Texts of `LENGTH` tokens without padding, for a bare model that reads texts."""
    config, takes = base.config, inspect.signature(base.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = _get(text, "vocab_size") or _get(config, "vocab_size", "src_vocab_size") or 100
    # Tokens that stand for images or sounds have a meaning of their own; usually they have the largest ids.
    most = max(2, min(words if isinstance(words, int) else min(words), 60))
    ids = torch.randint(most // 6, most, (ROWS, LENGTH), generator=noise)
    end = _get(text, "eos_token_id")
    if is_encoder_decoder(base) and isinstance(end, int) and end < most:
        # Heads that classify read the states at end tokens, and need the same number of them in each text (BART, T5).
        ids = ids.masked_fill(ids == end, most - 1 if end < most - 1 else most - 2)
        ids[:, -1] = end
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "bbox" in takes:
        found["bbox"] = torch.tensor([1, 1, 5, 5]).expand(ROWS, LENGTH, 4).clone()
    return found | _decoder_inputs(base, takes, noise)


def _decoder_inputs(base: Any, takes: Any, noise: torch.Generator) -> dict[str, Tensor]:
    if is_encoder_decoder(base) and "decoder_input_values" in takes:  # a decoder of sounds that lacks its first layers
        return {
            "decoder_input_values": torch.randn(ROWS, LENGTH, _get(base.config, "hidden_size") or 1, generator=noise)
        }
    if not is_encoder_decoder(base) or "decoder_input_ids" not in takes:
        return {}
    words = _get(base.config, "decoder_vocab_size", "tgt_vocab_size", "vocab_size") or 100
    return {"decoder_input_ids": torch.randint(2, max(3, min(words, 60)), (ROWS, LENGTH - 2), generator=noise)}


def _image_inputs(config: Any, noise: torch.Generator) -> Iterator[dict[str, Tensor]]:
    size = _get(config, "image_size", "input_size") or 224
    size = (size["height"], size["width"]) if isinstance(size, dict) else size
    height, width = tuple(size)[-2:] if isinstance(size, (list, tuple)) else (size, size)
    image = torch.randn(ROWS, _get(config, "num_channels", "in_channels") or 3, height, width, generator=noise)
    yield {"pixel_values": image}
    frames = _get(config, "num_frames")
    if frames:
        yield {"pixel_values": image[:, None].repeat(1, frames, 1, 1, 1)}


def _sound_inputs(config: Any, noise: torch.Generator) -> Iterator[dict[str, Tensor]]:
    yield {"input_values": torch.randn(ROWS, _SAMPLES, generator=noise)}
    bands = _get(config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size") or 80
    long = _get(config, "max_length") or _FRAMES
    yield {"input_values": torch.randn(ROWS, long if isinstance(long, int) else _FRAMES, bands, generator=noise)}
    positions = _get(config, "max_source_positions")
    for frames in (_FRAMES, *([2 * positions] if positions else [])):
        yield {"input_features": torch.randn(ROWS, bands, frames, generator=noise)}
        yield {"input_features": torch.randn(ROWS, frames, bands, generator=noise)}
    yield {"input_features": torch.randn(ROWS, 1, _FRAMES, bands, generator=noise)}  # one channel, as an image
    width = _get(config, "hidden_size") or 1
    yield {"input_values": torch.randn(ROWS, _FRAMES // 8, width, generator=noise)}
