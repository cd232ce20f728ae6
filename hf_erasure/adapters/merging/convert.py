"""An adapter's folder and a model's, turned into a plain checkpoint or a stock LoRA: what the command line calls."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModel, AutoProcessor

from ..common.config import ChildConfig
from ..erasure.layer import erasure_layers
from ..gradiend.config import GradiendConfig
from ..gradiend.state import targeted_parameters
from ..loading.key_renaming import renaming

_NAME = "default"


def load_with_erasure(model: str, adapter: str | Path) -> PeftModel:
    """Load a model in the class of its checkpoint, or that of the adapter where only that has the adapter's sites.

    Raises:
        ValueError: If the folder holds another kind of adapter.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, ChildConfig):
        raise ValueError(f"{str(adapter)!r} holds a {config.peft_type} adapter, and no erasure.")
    base = _model_class(model, config).from_pretrained(model)
    wrapped: PeftModel = PeftModel.from_pretrained(base, str(adapter), adapter_name=_NAME)
    return wrapped


def save_merged(model: str, adapter: str | Path, folder: str | Path, *, max_shard_size: str | None = None) -> str:
    """Merge an adapter and save the model with its tokenizer or processor; returns what was merged, in a sentence.

    `max_shard_size` is that of `save_pretrained`; transformers' own when None.
    """
    wrapped = load_with_erasure(model, adapter)
    config: Any = wrapped.peft_config[_NAME]
    layers = erasure_layers(wrapped, _NAME)
    base: Any = wrapped.get_base_model()
    kept = base.config.to_dict()
    wrapped.merge_adapter()
    written = len({id(module) for layer in layers.values() for module in layer.written})
    if isinstance(config, GradiendConfig):
        where = f"into {len(targeted_parameters(wrapped, _NAME))} weights"
    else:
        where = f"at {len(layers)} sites into the weights of {written} layers"
    plain = wrapped.merge_and_unload()
    changed = [name for name, value in plain.config.to_dict().items() if kept.get(name) != value]
    plain.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    _copy_processor(model, folder)
    switched = f", with {', '.join(f'{name}=True' for name in changed)} in its configuration" if changed else ""
    checked = "" if isinstance(config, GradiendConfig) else " Outputs on a small input are the same up to rounding."
    return f"Merged the {config.described} {where} of {type(plain).__name__}{switched}.{checked}"


def model_class(name: str) -> type[transformers.PreTrainedModel] | None:
    """The class of a model that transformers has under a name; None where it has none."""
    found = getattr(transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def _model_class(model: str, config: ChildConfig) -> Any:
    plain = AutoConfig.from_pretrained(model)
    names = [*(plain.architectures or []), config.provenance.get("base_class", "")]
    # The names are out of files: of all that transformers has, only a model may be made.
    classes = [found for name in names if (found := model_class(name)) is not None]
    for candidate in classes:
        with torch.device("meta"):
            has_sites = renaming(candidate(plain), config.fitted_modules) is not None
        if has_sites:
            return candidate
    return AutoModel


def _copy_processor(model: str, folder: str | Path) -> None:
    """Save the tokenizer or processor beside the model; warns where none can be loaded, as of a model alone."""
    try:
        processor = AutoProcessor.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"{folder} holds the model alone, without tokenizer or processor: {reason}", stacklevel=3)
        return
    processor.save_pretrained(folder)
