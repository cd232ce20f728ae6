"""An erasure that is fitted again at intervals while its model is trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.callbacks import ConceptErasureCallback
from hf_erasure.fitting.heldout import measured_leakage
from tests.small_models import LABELS, paired_batches, small_batches, small_model

NAME = "no_gender"


def adapted(**fields: Any) -> PreTrainedModel:
    model = copy.deepcopy(small_model("llama"))
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=LABELS, **fields), adapter_name=NAME)
    return model


def fine_tune(
    model: PreTrainedModel | None,
    folder: Path,
    callback: ConceptErasureCallback | None,
    checkpoint: str | None = None,
    **options: Any,
) -> Trainer:
    ids = torch.randint(3, 30, (16, 6), generator=torch.Generator().manual_seed(0))
    rows = options.pop("train_dataset", [{"input_ids": row, "labels": row} for row in ids])
    model_init = options.pop("model_init", None)
    defaults: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=rows,
        model_init=model_init,
        callbacks=[callback] if callback else [],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def lefts(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([layer.eraser_state(NAME)[0].flatten() for layer in erasure_layers(model, NAME).values()])


def test_refits_on_schedule_and_logs_what_leaks(tmp_path: Path):
    model = adapted()
    model.requires_grad_(True)
    batches, held_out = small_batches("llama", seed=100), small_batches("llama", seed=100)
    callback = ConceptErasureCallback(batches, NAME, refit_steps=2, eval_batches=held_out)
    trainer = fine_tune(model, tmp_path, callback)
    assert callback.refits == 3  # before the first step, after the second and the fourth
    rows = [row for row in trainer.state.log_history if "leakage_max" in row]
    assert [row["erasure_refits"] for row in rows] == [1, 2, 2, 3]
    sites = {f"leakage/{site}" for site in erasure_layers(model, NAME)}
    assert sites <= set(rows[0])
    # The eraser equals that of a new fit on the trained model, so it is up to date.
    kept = lefts(model)
    fit_concept_erasure(model, batches, NAME, progress=False)
    torch.testing.assert_close(lefts(model), kept)


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_was_measured_stands_on_the_card_of_the_checkpoint(wrapped: bool, tmp_path: Path):
    model: Any = adapted()
    if wrapped:
        model = PeftModel(copy.deepcopy(small_model("llama")), model.peft_config[NAME], adapter_name=NAME)
    model.requires_grad_(True)
    batches = small_batches("llama", seed=100)
    callback = ConceptErasureCallback(batches, NAME, eval_batches=small_batches("llama", seed=900))
    trainer = fine_tune(model, tmp_path, callback, save_strategy="steps", save_steps=2)
    for step in (2, 4):
        card = (tmp_path / f"checkpoint-{step}" / NAME / "README.md").read_text()
        assert f"held-out examples, of every token, at step {step} of training, refitted 1 time by" in card
        logged = next(row for row in trainer.state.log_history if row["step"] == step)
        assert f"correlation with gender: the site that leaks most | – | {logged['leakage_max']:.3f} | lower" in card
    model.save_pretrained(tmp_path / "saved")
    assert "at step 4 of training" in next((tmp_path / "saved").rglob("README.md")).read_text()
    fit_concept_erasure(model, batches, NAME, progress=False)
    model.save_pretrained(tmp_path / "anew")
    assert "of training" not in next((tmp_path / "anew").rglob("README.md")).read_text()


def test_leakage_on_rows_that_are_fitted_on_is_called_that(tmp_path: Path):
    batches = small_batches("llama", seed=100)
    eval_batches = [*batches[:1], *small_batches("llama", 1, seed=900)]
    callback, model = ConceptErasureCallback(batches, NAME, eval_batches=eval_batches), adapted()
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match="16 of the 32 rows of eval_batches are rows that 'no_gender' was fitted on"):
        fine_tune(model, tmp_path, callback, save_strategy="steps", save_steps=4)
    card = (tmp_path / "checkpoint-4" / NAME / "README.md").read_text()
    assert "On fitted rows (16 of 32), of every token, at step 4 of training" in card


def test_what_is_measured_on_is_said_as_a_fit_says_it(tmp_path: Path):
    """Counterfactuals do not count as held-out texts, and environments are named."""
    batches, held_out = small_batches("llama", seed=100), paired_batches("llama", seed=900)
    callback, model = ConceptErasureCallback(batches, NAME, eval_batches=held_out), adapted()
    model.requires_grad_(True)
    fine_tune(model, tmp_path, callback, max_steps=1)
    report = fit_concept_erasure(model, batches, NAME, eval_batches=held_out, progress=False)
    assert callback.measured_on == report.measured_on == "48 held-out examples in 3 environments"


def test_an_erasure_that_is_there_while_a_lora_trains_and_not_afterwards(tmp_path: Path):
    model = adapted(sticky=True)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="lora")
    batches = small_batches("llama", seed=100)
    fine_tune(model, tmp_path, ConceptErasureCallback(batches, NAME, delete_at_end=True))
    assert list(model.peft_config) == model.active_adapters() == ["lora"]
    assert not erasure_layers(model)
    assert all("lora" in name for name, weight in model.named_parameters() if weight.requires_grad)


def test_an_erasure_that_leaks_is_refitted(tmp_path: Path):
    batches = small_batches("llama", seed=100)
    refits, leakage = {}, {}
    for threshold in (None, 0.05, 0.999):
        model = adapted()
        model.requires_grad_(True)
        fit_concept_erasure(model, batches, NAME, progress=False)
        callback = ConceptErasureCallback(batches, NAME, refit_leakage=threshold, eval_batches=batches)
        fine_tune(model, tmp_path, callback, learning_rate=0.5)
        refits[threshold] = callback.refits
        if threshold != 0.999:
            leakage[threshold] = max(measured_leakage(model, batches, NAME)[0].values())
    assert refits[None] == refits[0.999] == 0
    assert refits[0.05] >= 1
    assert leakage[0.05] < leakage[None]


def test_leakage_is_measured_at_the_end_too(tmp_path: Path):
    model, batches = adapted(), small_batches("llama", seed=100)
    model.requires_grad_(True)
    callback = ConceptErasureCallback(batches, NAME, refit_leakage=0.05, eval_batches=batches)
    fine_tune(model, tmp_path, callback, learning_rate=0.5, logging_steps=500)
    assert callback.refits == 2  # before the first step, and after the last one


def test_refits_every_epoch_before_its_last_step_is_saved(tmp_path: Path):
    options: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        model = adapted()
        model.requires_grad_(True)
        callback = ConceptErasureCallback(small_batches("llama", seed=100), NAME, refit_steps="epoch")
        trainer = fine_tune(model, tmp_path, callback, checkpoint, **options)
        assert callback.refits == 3
        loaded = type(model).from_pretrained(tmp_path / "checkpoint-8")
        loaded.load_adapter(tmp_path / "checkpoint-8" / NAME, adapter_name=NAME)
        ends += [lefts(model), lefts(loaded)]
    assert all(torch.equal(end, ends[0]) for end in ends)
    # Data without a length do not say which step is the last one of an epoch.
    callback = ConceptErasureCallback(small_batches("llama", seed=100), NAME, refit_steps="epoch")
    stream = IterableDataset.from_generator(lambda: iter(trainer.train_dataset))
    fine_tune(model, tmp_path / "stream", callback, train_dataset=stream, max_steps=6)
    assert callback.refits == 2


def test_every_trial_of_a_search_for_hyperparameters_begins_anew(tmp_path: Path):
    callback = ConceptErasureCallback(small_batches("llama", seed=100), NAME, refit_steps=1)
    options: dict[str, Any] = {"max_steps": 2, "model_init": lambda: adapted().requires_grad_(True)}
    trainer = fine_tune(None, tmp_path, callback, **options)
    first, trainer.model = trainer.state.log_history, None  # as Ray has it before a trial
    trainer.train()
    for history in (first, trainer.state.log_history):
        assert [row["erasure_refits"] for row in history if "loss" in row] == [2, 3]


@pytest.mark.parametrize("model_type", ["gpt_neox", "mixtral"])
def test_training_goes_on_where_files_have_other_names_and_shapes_than_weights(model_type: str, tmp_path: Path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(model_type, vocab_size=64, num_hidden_layers=1, num_local_experts=2, **sizes)
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.add_adapter(ConceptErasureConfig(labels=LABELS), adapter_name=NAME)
        model.requires_grad_(True)
        callback = ConceptErasureCallback(small_batches("llama", 2, seed=100), NAME)
        fine_tune(model, tmp_path, callback, checkpoint, save_strategy="steps", save_steps=2)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_lora_that_trains_rows_of_an_embedding_is_saved_as_an_adapter(tmp_path: Path):
    model = adapted(sticky=True)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]), adapter_name="lora")
    callback = ConceptErasureCallback(small_batches("llama", seed=100), NAME)
    fine_tune(model, tmp_path, callback, save_strategy="steps", save_steps=4)
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    loaded = copy.deepcopy(small_model("llama"))
    loaded.load_adapter(tmp_path / "checkpoint-4" / NAME, adapter_name=NAME)
    loaded.load_adapter(tmp_path / "checkpoint-4", adapter_name="lora")
    ids = torch.arange(3, 11)[None]
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_without_a_callback_full_fine_tuning_under_an_adapter_is_warned_of(tmp_path: Path):
    model = adapted()
    model.requires_grad_(True)
    fit_concept_erasure(model, small_batches("llama"), NAME, progress=False)
    with pytest.warns(UserWarning, match="Trainer saves only the adapter.*Give Trainer a ConceptErasureCallback"):
        fine_tune(model, tmp_path, None, max_steps=1, save_strategy="steps", save_steps=1)


def test_measuring_and_refitting_leave_the_random_numbers_of_training_alone(tmp_path: Path):
    class Shuffled(list):
        def __iter__(self):
            torch.rand(3)
            return super().__iter__()

    ends = []
    for watched in (False, True):
        model = adapted()
        model.requires_grad_(True)
        fit_concept_erasure(model, small_batches("llama", seed=100), NAME, progress=False)
        batches = Shuffled(small_batches("llama", seed=100))
        callback = ConceptErasureCallback(batches, NAME, eval_batches=batches) if watched else None
        torch.manual_seed(0)
        fine_tune(model, tmp_path, callback, neftune_noise_alpha=5.0)  # NEFTune adds random noise in every step
        ends.append(model.lm_head.weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refit_steps": 0}, "positive number of steps"),
        ({"refit_steps": 1e3}, "refit_steps=1000.0 .* as an int"),
        ({"refit_steps": "day"}, "positive number of steps"),
        ({"refit_leakage": 2.0, "eval_batches": [1]}, "is a correlation"),
        ({"refit_leakage": 0.5}, "needs eval_batches"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ConceptErasureCallback([1], NAME, **options)
    with pytest.raises(ValueError, match=r"^batches is an iterator that can be read only once"):
        ConceptErasureCallback(iter([1]), NAME)
    with pytest.raises(ValueError, match=r"^background is an iterator that can be read only once"):
        ConceptErasureCallback([1], NAME, background=iter([1]))
    with pytest.raises(ValueError, match=r"^eval_batches is an iterator that can be read only once"):
        ConceptErasureCallback([1], NAME, eval_batches=iter([1]))


def test_an_erasure_that_is_not_there_is_said_before_training(tmp_path: Path):
    model = copy.deepcopy(small_model("llama"))
    with pytest.raises(ValueError, match="is not a concept erasure of this model"):
        fine_tune(model, tmp_path, ConceptErasureCallback([1], NAME))
