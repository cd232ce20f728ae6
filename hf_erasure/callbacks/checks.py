"""What goes wrong without a word when a model with adapters is trained, said before the first step."""

from __future__ import annotations

import warnings
from typing import Any

from accelerate.state import AcceleratorState, DistributedType
from torch import nn
from transformers import TrainingArguments

from .checkpoints import is_lost, own_trained

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def check_training(model: nn.Module, args: TrainingArguments) -> None:
    """Look at how a model is about to be trained.

    Warns where a checkpoint would hold less than was trained, which it does where weights are sharded.

    Raises:
        ValueError: If nothing is trainable, or `load_best_model_at_end` cannot work.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter is trainable, so training would fail in its first backward pass: adding an adapter has "
            "frozen the model. Call model.requires_grad_(True) to fine-tune it whole, or add a LoRA: "
            "model.add_adapter(LoraConfig(…)) and model.set_adapter([…]) with both names."
        )
    # Elsewhere seams.py has all of it saved and loaded.
    if is_sharded() and is_lost(model):
        _check_what_is_lost(model, args)


def is_sharded() -> bool:
    """Whether this training keeps a part of each weight on every process."""
    # Looked at, and not built: building it sets the kind of distribution back to what it is without accelerate.
    return AcceleratorState._shared_state.get("distributed_type") in SHARDING


def _check_what_is_lost(model: Any, args: TrainingArguments) -> None:
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end cannot load back what is trained here while the weights are sharded (FSDP, "
            "DeepSpeed): leave it out, and load the checkpoint yourself."
        )
    own = own_trained(model)
    if own:
        warnings.warn(
            f"{len(own)} weights of the model itself are trained, but while weights are sharded (FSDP, DeepSpeed) "
            "Trainer saves only the adapter of a model that has one. Save the weights yourself after training: merge "
            "or delete the adapter first.",
            stacklevel=4,
        )
