"""A small model of every type in transformers' `CONFIG_MAPPING`, so types of new releases are included."""

from __future__ import annotations

import functools
import inspect
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import transformers as hf
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.breadth.sizes import OF_TYPE, SIZES, VOCABULARY

TYPES = sorted(name for name in modeling_auto.MODEL_MAPPING_NAMES if name in CONFIG_MAPPING)
# The most parameters of a small model; the sizes did not apply to a larger one.
_MOST = 25_000_000
# Fields that stay None where None is the configuration's default.
_MAY_BE_NONE = {"sliding_window", "n_inner", "mlp_dim", "num_key_value_heads", "head_dim", "q_lora_rank"}
# Types that cannot be saved without the name of their class.
_NEED_THEIR_CLASS = {"funnel", "zamba2"}
# The greatest depth of configurations inside others.
_DEEPEST = 4


class NotBuiltError(Exception):
    """The sizes here do not give a small working model of this type; the message has the reason."""


class TooLongError(BaseException):
    """A block in `at_most` took longer than its limit."""


def build(model_type: str, auto: Any = AutoModel) -> PreTrainedModel:
    """A small model, whose weights are all away from 0 and 1.

    Raises:
        NotBuiltError: If the configuration or the model does not accept these sizes.
    """
    try:
        config = config_of(model_type)
        if model_type in _NEED_THEIR_CLASS and auto is AutoModel:
            name = modeling_auto.MODEL_MAPPING_NAMES[model_type]
            config.architectures = [name if isinstance(name, str) else name[0]]
        if auto is hf.AutoModelForMaskedLM and hasattr(config, "is_decoder"):
            config.is_decoder = False  # the same configuration has a causal head
        count = 0
        with suppress(Exception), torch.device("meta"):  # some models cannot be made on the meta device
            count = auto.from_config(config).num_parameters()
        if count <= _MOST:
            torch.manual_seed(0)
            model = auto.from_config(config)
            count = model.num_parameters()
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error
    if count > _MOST:
        raise NotBuiltError(f"it has {count:.2g} parameters")
    return roughened(model.float()).eval()


def config_of(model_type: str) -> Any:
    """A configuration of small sizes; parts inside it that it does not accept are left out."""
    kind = CONFIG_MAPPING[model_type]
    fields = small(kind, model_type)
    inner = [name for name, value in fields.items() if isinstance(value, dict) and "model_type" in value]
    with suppress(Exception):
        return kind(**fields)
    for name in inner:
        fields[name].pop("model_type")
    with suppress(Exception):
        return kind(**fields)
    return kind(**{name: value for name, value in fields.items() if name not in inner})


def small(kind: Any, model_type: str, depth: int = 0) -> dict[str, Any]:
    """Fields that make a configuration small."""
    defaults = {name: field.default for name, field in inspect.signature(kind.__init__).parameters.items()}
    found: dict[str, Any] = {}
    for name, default in defaults.items():
        if name in SIZES and not isinstance(default, (list, tuple, dict, str)):
            if default is not None or name not in _MAY_BE_NONE:
                found[name] = SIZES[name]
        elif name == "depths" and isinstance(default, (list, tuple)):
            found[name] = [1] * len(default)
        elif name.endswith(("_token_id", "_token_index")) and type(default) is int and default >= VOCABULARY:
            found[name] = 140 + sum(map(ord, name)) % 19
    if "num_channels" in defaults and "num_key_value_heads" in found:
        found["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, inner in (getattr(kind, "sub_configs", None) or {}).items():
        # A part that may have any type gets the type that it has by default.
        inner = type(getattr(_default(kind), name, None)) if inner is hf.AutoConfig else inner
        is_known = inspect.isclass(inner) and inner is not kind and hasattr(inner, "model_type")
        if is_known and depth < _DEEPEST:
            found[name] = {"model_type": inner.model_type, **small(inner, inner.model_type, depth + 1)}
    return found | OF_TYPE.get(model_type, {})


@functools.cache
def _default(kind: Any) -> Any:
    """The configuration with its default sizes; None if it cannot be made without arguments."""
    with suppress(Exception):
        return kind()
    return None


def roughened(model: PreTrainedModel) -> PreTrainedModel:
    """The model with random values in every matrix, and noise added to every vector."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.is_floating_point():
                drawn = torch.randn(value.shape, generator=noise).to(value.dtype)
                if value.dim() > 1:
                    value.copy_(drawn * min(0.2, 1.2 / value.shape[-1] ** 0.5))
                else:
                    value.add_(0.1 * drawn)
    return model


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise `TooLongError` in a block that takes longer, in processor time, which other programs do not change."""

    def ring(*_: Any) -> None:
        raise TooLongError(f"it took more than {seconds} s of the processor")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@functools.cache
def head_of(model_type: str) -> Any:
    """The Auto class for this type with a head that predicts words; None if there is no such class."""
    heads = (
        ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", hf.AutoModelForSeq2SeqLM),
        ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", hf.AutoModelForMaskedLM),
        ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", hf.AutoModelForCausalLM),
    )
    return next((auto for names, auto in heads if model_type in getattr(modeling_auto, names)), None)
