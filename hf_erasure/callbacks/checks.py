"""What goes wrong without a word when a model with adapters is trained, said before the first step."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from hf_erasure.adapters import erasure_layers, gradiend_layers


def check_training(model: nn.Module, args: TrainingArguments) -> None:
    """Look at how a model is about to be trained.

    Warns where Trainer would save less than was trained, or fail when it saves.

    Raises:
        ValueError: If nothing is trainable, or `load_best_model_at_end` cannot work.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            "No parameter is trainable, so training would fail in its first backward pass: adding an adapter has "
            "frozen the model. Call model.requires_grad_(True) to fine-tune it whole, or add a LoRA: "
            "model.add_adapter(LoraConfig(…)) and model.set_adapter([…]) with both names."
        )
    if isinstance(model, PeftModel):
        return
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end works for adapters of a PeftModel only: Trainer cannot load them back into a "
            f"{type(model).__name__}. Wrap the model, get_peft_model(model, config), or leave it out."
        )
    _warn_of_what_is_not_saved(model, trainable)


def _warn_of_what_is_not_saved(model: Any, trainable: list[str]) -> None:
    if not getattr(model, "_hf_peft_config_loaded", False):
        return
    own = [name for name in trainable if "lora_" not in name and "modules_to_save" not in name]
    if own and len(own) == len(trainable):
        warnings.warn(
            f"{len(own)} parameters of the model itself are trained, but Trainer saves only the adapter of a model "
            "that has one. Save the weights yourself after training: merge or delete the adapter first.",
            stacklevel=4,
        )
    active = model.active_adapters()
    if len(active) > 1:
        ours = {name for layers in (erasure_layers(model), gradiend_layers(model)) for layer in layers.values()
                for name in layer.adapters}  # fmt: skip
        others = [name for name in active if name not in ours]
        warnings.warn(
            f"Several adapters are active ({', '.join(active)}), and save_pretrained takes one: Trainer will fail when "
            "it saves. Write sticky=True in the config of the one that is not trained and activate "
            f"{others or active[-1:]} alone, or set save_strategy='no'.",
            stacklevel=4,
        )
