"""A Trainer without our callbacks: it warns about what it will not save, and saves all if one follows the advice."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_erasure import ConceptErasureConfig, GradiendConfig, fit_concept_erasure
from hf_erasure.adapters import steer
from tests.callbacks.test_gradiend_callback import collate, skewed
from tests.ecosystem.test_trainer import sft_data, sft_tokenizer
from tests.ecosystem.trainer_runs import (
    LORA,
    NAME,
    assert_same_state,
    fitted,
    labelled_batches,
    logits,
    options_for,
    state_of,
)
from tests.fitting.gradiend.language_models import CLASSES, model_of
from tests.fitting.gradiend.test_trainer import trainer_of as pair_trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:(Already found a `peft_config`|.*second time)")
KINDS = {"erasure": "the erasure", "monitor": "the GRADIEND adapter"}
both_kinds = pytest.mark.parametrize("kind", KINDS)


def trainer_of(kind: str, model: Any, folder: Path, **options: Any) -> Trainer:
    options = options_for(folder, **{"save_strategy": "steps", "save_steps": 2, "max_steps": 2, **options})
    if kind == "SFTTrainer":
        trl = pytest.importorskip("trl")
        arguments = trl.SFTConfig(**options, bf16=False)
        return trl.SFTTrainer(model, arguments, train_dataset=sft_data(), processing_class=sft_tokenizer())
    return Trainer(model, TrainingArguments(**options, remove_unused_columns=False), collate, skewed("she"))


def with_lora(kind: str, *, sticky: bool = False, name: str = "lora") -> tuple[Any, list[str]]:
    """The model with a fitted adapter and a new LoRA, and the warnings when the LoRA was added."""
    model = fitted(kind, sticky=sticky)
    if kind == "monitor":
        steer(model, NAME, learning_rate=1e-2)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.add_adapter(peft.LoraConfig(r=4, target_modules=LORA), adapter_name=name)
    return model, [str(w.message) for w in caught if "switched" in str(w.message)]


def said_at_start(trainer: Trainer) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in caught if "could not be written" in str(w.message)]
    found = [w for w in caught if "Trainer " in str(w.message)]
    assert all(w.filename == __file__ for w in found)
    return [str(w.message) for w in found]


@both_kinds
@pytest.mark.parametrize("trainer", ["Trainer", "SFTTrainer"])
def test_what_the_warning_advises_is_saved_and_goes_on(trainer: str, kind: str, tmp_path: Path):
    model, (said,) = with_lora(kind)
    advice = re.search(r"model\.set_adapter\(\[.*?\]\)", said)
    eval(advice[0], {"model": model})
    whole = trainer_of(trainer, model, tmp_path, max_steps=4)
    assert said_at_start(whole) == []
    loaded = model_of("llama").eval()
    loaded.load_adapter(tmp_path / "checkpoint-4" / NAME, adapter_name=NAME)
    loaded.load_adapter(tmp_path / "checkpoint-4", adapter_name="lora")
    loaded.set_adapter([NAME, "lora"])
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    if kind == "monitor":  # resuming is the same for both
        return
    again, _ = with_lora(kind)
    again.set_adapter([NAME, "lora"])
    resumed = trainer_of(trainer, again, tmp_path / "again", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(state_of(model), state_of(again))


@pytest.mark.parametrize(
    ("kind", "trainer", "sticky"),
    [("erasure", "Trainer", True), ("erasure", "SFTTrainer", True), ("erasure", "Trainer", False),
     ("monitor", "Trainer", True)],
)  # fmt: skip
def test_a_trainer_that_saves_without_it_says_so_when_it_starts(kind: str, trainer: str, sticky: bool, tmp_path: Path):
    model, _ = with_lora(kind, sticky=sticky)
    (said,) = said_at_start(trainer_of(trainer, model, tmp_path))
    acts = "acts while it is trained" if sticky else "does not act"
    assert f"Trainer will save ['lora'] without {KINDS[kind]} '{NAME}', which {acts}" in said
    assert not (tmp_path / "checkpoint-2" / NAME).exists()
    assert f"model.set_adapter(['{NAME}', 'lora'])" in said
    model.set_adapter([NAME, "lora"])
    assert said_at_start(trainer_of(trainer, model, tmp_path / "both")) == []
    assert (tmp_path / "both" / "checkpoint-2" / NAME / "adapter_model.safetensors").is_file()


def test_a_lora_that_is_trained_beside_a_loaded_adapter_is_saved(tmp_path: Path):
    """transformers saves the adapter that is active in the first layer, here the erasure's."""
    model = model_of("llama").eval()
    model.add_adapter(ConceptErasureConfig(labels=CLASSES, target_modules=["embed_tokens"]), adapter_name=NAME)
    fit_concept_erasure(model, labelled_batches(), NAME, progress=False)
    model.save_pretrained(tmp_path / "erasure")
    other = model_of("llama")
    other.add_adapter(peft.LoraConfig(r=4, target_modules=LORA))
    other.save_pretrained(tmp_path / "lora")
    model = model_of("llama").eval()
    model.load_adapter(tmp_path / "erasure", adapter_name=NAME)
    model.load_adapter(tmp_path / "lora", adapter_name="lora", is_trainable=True)
    assert model.active_adapters() == [NAME]
    assert said_at_start(trainer_of("Trainer", model, tmp_path)) == []
    loaded = model_of("llama").eval()
    loaded.load_adapter(tmp_path / "checkpoint-2" / NAME, adapter_name=NAME)
    loaded.load_adapter(tmp_path / "checkpoint-2", adapter_name="lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path):
    wrapped = peft.get_peft_model(fitted("erasure", sticky=True), peft.LoraConfig(r=4, target_modules=LORA))
    assert said_at_start(trainer_of("Trainer", wrapped, tmp_path)) == []
    assert (tmp_path / "checkpoint-2" / NAME / "adapter_model.safetensors").is_file()
    plain = model_of("llama")
    plain.add_adapter(peft.LoraConfig(r=4, target_modules=LORA))
    assert said_at_start(trainer_of("Trainer", plain, tmp_path / "plain")) == []


@pytest.mark.parametrize("kind", ["erasure", "tied"])
def test_a_loss_that_does_not_call_the_head_is_refused_where_an_adapter_acts_on_the_head(kind: str, tmp_path: Path):
    model = model_of("llama").eval()
    if kind == "erasure":
        model.add_adapter(ConceptErasureConfig(labels=CLASSES, target_modules="readers"), adapter_name=NAME)
        fit_concept_erasure(model, labelled_batches(), NAME, progress=False)
    else:
        model.config.tie_word_embeddings = True
        model.tie_weights()
        config = GradiendConfig(classes=CLASSES, target_modules=["embed_tokens"])
        model.add_adapter(config, adapter_name=NAME)
        pair_trainer_of(model, "llama", tmp_path).train()
    model.requires_grad_(True)
    trainer = trainer_of("SFTTrainer", model, tmp_path, save_strategy="no")
    if kind == "tied":
        trainer.train()  # the feature does not act yet
        steer(model, NAME, learning_rate=1e-2)
    with pytest.raises(ValueError, match=r"SFTTrainer multiplies by the weight of .* Merge the adapter first"):
        trainer.train()


def test_a_reference_model_in_which_an_erasure_does_not_act_is_warned_of(tmp_path: Path):
    trl = pytest.importorskip("trl")
    rows = Dataset.from_dict({"prompt": ["the king said that"] * 4, "chosen": [" she"] * 4, "rejected": [" he"] * 4})
    config = peft.LoraConfig(r=4, target_modules=LORA)
    said = {}
    for way in ("peft_config", "get_peft_model"):
        model, options = fitted("erasure", sticky=True), {"peft_config": config} if way == "peft_config" else {}
        model = model if options else peft.get_peft_model(model, config)
        arguments = trl.DPOConfig(**options_for(tmp_path, max_steps=1, logging_steps=1, bf16=False))
        trainer = trl.DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=sft_tokenizer(), **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        warned = [w for w in caught if "compares with a reference model in which ['gender']" in str(w.message)]
        # The LoRA adds nothing yet, so the model is its own reference where the erasure acts in both.
        said[way] = len(warned), trainer.state.log_history[0]["rewards/margins"] == 0
    assert said == {"peft_config": (1, False), "get_peft_model": (0, True)}


class Around(torch.nn.Module):
    """A module of the user's own, for which Trainer saves all tensors."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, **inputs: Any) -> Any:
        return self.inside(**inputs)


class Library(Around):
    """A model that saves the model inside it, like a SentenceTransformer."""

    def save_pretrained(self, folder: Path) -> None:
        self.inside.save_pretrained(folder)


def test_a_model_inside_another_librarys_says_what_to_do(tmp_path: Path):
    model, _ = with_lora("erasure")
    (said,) = said_at_start(trainer_of("Trainer", Library(model), tmp_path, save_strategy="no"))
    assert "without the erasure" in said and "set_adapter([" not in said and "sticky=True" in said
    sticky, _ = with_lora("erasure", sticky=True)
    (said,) = said_at_start(trainer_of("Trainer", Library(sticky), tmp_path, save_strategy="no"))
    assert f"'{NAME}', which acts while it is trained. Save ['{NAME}'] yourself" in said
    model.set_adapter([NAME, "lora"])
    (said,) = said_at_start(trainer_of("Trainer", Library(model), tmp_path, save_strategy="no"))
    assert (
        rf"Several adapters are active, ['{NAME}', 'lora']" in said
        and f"sticky=True in the configuration of ['{NAME}']" in said
    )
    model = fitted("erasure", sticky=False).requires_grad_(True)
    (said,) = said_at_start(trainer_of("Trainer", Library(model), tmp_path, save_strategy="no"))
    assert "weights of the model itself are trained, but Trainer saves only the adapter" in said and NAME in said


def test_a_module_of_ones_own_is_saved_whole(tmp_path: Path):
    model, _ = with_lora("erasure")
    model.set_adapter([NAME, "lora"])
    assert said_at_start(trainer_of("Trainer", Around(model), tmp_path)) == []
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == Around(model).state_dict().keys()
