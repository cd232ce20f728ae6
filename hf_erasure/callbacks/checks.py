"""What goes wrong without a word when a model with adapters is trained, said before the first step."""

from __future__ import annotations

import warnings
from typing import Any

from accelerate.state import AcceleratorState, DistributedType
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hf_erasure.adapters.common.acting import adapters_now, users_level
from hf_erasure.adapters.common.layer import child_configs

from .checkpoints import is_lost, left_out, own_trained, several_active

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
    # Elsewhere `trainer_saves` has all of it saved and loaded.
    if is_sharded() and is_lost(model):
        _check_what_is_lost(model, args)


def warn_of_what_is_left_out(model: nn.Module) -> None:
    """Say before training which adapters of this package its checkpoints will lack, or that there will be none.

    Args:
        model: What Trainer trains by itself, without a callback of this package.
    """
    holder = _saved_by_trainer(model)
    if holder is None:
        return
    if several_active(holder):  # of a model that Trainer saves itself, all are saved
        active = holder.active_adapters()
        ours = [name for name in active if name in child_configs(holder)]
        others = [name for name in active if name not in ours]
        warnings.warn(
            f"Several adapters are active, {active}, and Trainer cannot save them here: its first save would fail. "
            f"Write sticky=True in the configuration of {ours}, so that they act without being active, switch on "
            f"{others or ours[:1]} alone, and save {ours} yourself.",
            stacklevel=users_level(),
        )
        return
    own = own_trained(holder) if holder is not model and child_configs(holder) else []
    if own:
        warnings.warn(
            f"{len(own)} weights of the model itself are trained, but Trainer saves only the adapter of a model that "
            f"has one, {holder.active_adapters()}. After training save the adapter, delete it, and save the model.",
            stacklevel=users_level(),
        )
    names = left_out(holder)
    now = adapters_now(holder)
    if names:
        told = ", ".join(f"the {now.loaded[name]} {name!r}, which {_acts(name in now.acting)}" for name in names)
        saved = holder.active_adapters()
        if holder is model:
            together = (
                f"Call model.set_adapter({[*names, *saved]}) before training to train with them on; checkpoints then "
                "hold every adapter, each in a folder of its name. Or save"
            )
        else:
            together = "To train with them on, write sticky=True in their configuration. Save"
        warnings.warn(
            f"Trainer will save {saved} without {told}. {together} {names} yourself: model.set_adapter({names[0]!r}) "
            "and model.save_pretrained(folder).",
            stacklevel=users_level(),
        )


def _saved_by_trainer(model: nn.Module) -> Any:
    """The model whose adapter is saved in the place of its weights when Trainer saves `model`; None where all is saved.

    That is the model inside of another library's, such as a SentenceTransformer. Of a module of one's own Trainer
    writes all tensors.
    """
    if isinstance(model, (PreTrainedModel, PeftModel)):
        return model
    inside = (module for module in model.modules() if isinstance(module, PreTrainedModel) and child_configs(module))
    return next(inside, None) if hasattr(model, "save_pretrained") else None


def _acts(on: bool) -> str:
    return "acts while it is trained" if on else "does not act"


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
