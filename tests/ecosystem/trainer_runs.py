"""Small models with an adapter of ours and a callback, trained in all usual ways, without a network."""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_erasure import ConceptErasureCallback, ConceptErasureConfig, GradiendCallback, fit_concept_erasure
from hf_erasure.adapters import features_of
from tests.callbacks.test_gradiend_callback import collate, effective, skewed
from tests.fitting.gradiend.language_models import CLASSES, model_of, tokenizer_of
from tests.fitting.gradiend.test_trainer import adapted, trainer_of

NAME = "gender"
KINDS = {
    "erasure": "ConceptErasureCallback",
    "monitor": "GradiendCallback, monitor",
    "guard": "GradiendCallback, guard",
}
WAYS = (
    "full fine-tuning",
    "full fine-tuning of a PeftModel",
    "LoRA beside a sticky adapter",
    "LoRA, both active",
    "LoRA by get_peft_model",
)
LORA = ["q_proj", "v_proj", "down_proj"]


def labelled_batches(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches whose token ids tell the class; each of several processes gets its own share."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(4):
        labels = torch.arange(12) % 2
        ids = torch.randint(3, 40, (12, 6), generator=generator) + 30 * labels[:, None]
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": labels})
    return batches[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]


@functools.cache
def _fitted(kind: str, sticky: bool) -> PreTrainedModel:
    if kind == "erasure":
        model = model_of("llama").eval()
        config = ConceptErasureConfig(concept="gender", labels=CLASSES, sticky=sticky)
        model.add_adapter(config, adapter_name=NAME)
        fit_concept_erasure(model, labelled_batches(), NAME, progress=False)
        return model
    model = adapted("llama", density=0.2, keep_encoder=True, sticky=sticky)
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(model, "llama", Path(folder)).train()
    return model


def fitted(kind: str, *, sticky: bool) -> Any:
    """A copy of the model with its fitted adapter, which a test may change."""
    return copy.deepcopy(_fitted(kind, sticky))


def model_for(kind: str, way: str) -> nn.Module:
    """The model ready for training, with the same values at every call."""
    model = fitted(kind, sticky=way in ("LoRA beside a sticky adapter", "LoRA by get_peft_model"))
    torch.manual_seed(0)  # for the LoRA; only the first, cached fit draws random numbers
    if way == "full fine-tuning of a PeftModel":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = peft.PeftModel.from_pretrained(model_of("llama"), folder, adapter_name=NAME)
    if way.startswith("full"):
        return model.requires_grad_(True)
    config = peft.LoraConfig(r=4, target_modules=LORA)
    if way == "LoRA by get_peft_model":
        return peft.get_peft_model(model, config)
    model.add_adapter(config, adapter_name="lora")
    if way == "LoRA, both active":
        model.set_adapter([NAME, "lora"])
    return model


def callback_for(kind: str) -> TrainerCallback:
    if kind == "erasure":
        return ConceptErasureCallback(labelled_batches(), NAME, refit_steps=2, eval_batches=labelled_batches(1))
    return GradiendCallback(NAME, mode=kind)


def options_for(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 5e-3,
        "logging_steps": 2, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        **options,
    }  # fmt: skip


def trainer_for(
    kind: str, way: str, folder: Path, callbacks: tuple[TrainerCallback, ...] = (), **options: Any
) -> Trainer:
    arguments = TrainingArguments(**options_for(folder, remove_unused_columns=False, **options))
    every = [callback_for(kind), *callbacks]
    return Trainer(model_for(kind, way), arguments, collate, skewed("she"), skewed("he"), callbacks=every)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_state(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


def logits(model: nn.Module) -> torch.Tensor:
    ids = tokenizer_of("llama")("because the doctor was late", return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def figures(trainer: Trainer) -> list[dict[str, float]]:
    """The values that our callbacks have put into each log of a training."""
    ours = ("leakage", "erasure_refits", f"{NAME}_")
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{key: value for key, value in row.items() if key.startswith(ours)} for row in rows]


def cosine_with_feature(model: nn.Module, before: dict[str, torch.Tensor]) -> float:
    """The cosine between the feature's direction and the change of the effective weights at its entries."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    after, decoder = effective(base), features_of(model, NAME)[0].decoder
    along = size = norm = 0.0
    for name, direction in decoder.weight.items():
        index = decoder.index[name]
        change = (after[name] - before[name]).reshape(-1).double()
        change = change if index is None else change[index.long()]
        along += float(change @ direction.double())
        size += float(change.square().sum())
        norm += float(direction.double().square().sum())
    assert size > 0
    return along / (size * norm) ** 0.5
