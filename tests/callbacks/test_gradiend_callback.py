"""A feature is monitored and guarded while a small language model is fine-tuned on skewed text."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_erasure.adapters import GradiendConfig, features_of, steer, targeted_parameters
from hf_erasure.callbacks import GradiendCallback
from hf_erasure.callbacks.gradiend import trained_weights
from tests.fitting.gradiend.language_models import CLASSES, model_of, tokenizer_of
from tests.fitting.gradiend.test_trainer import NAME, adapted, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:.*switched the GRADIEND adapter")

TEXTS = ["Tom went home to a dog and", "the king said that", "because the doctor was late", "a dog ran and"]


def skewed(word: str) -> list[dict[str, list[int]]]:
    """Sentences that end in one word, which is the only label."""
    tokenizer = tokenizer_of("llama")
    rows = []
    for text in TEXTS * 4:
        ids = tokenizer(f"{text} {word}")["input_ids"]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    pad = {"input_ids": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows]) for key, value in pad.items()
    }


@functools.cache
def _fitted(density: float, keep_encoder: bool) -> PreTrainedModel:
    model = adapted("llama", density=density, keep_encoder=keep_encoder)
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(model, "llama", Path(folder)).train()
    return model


def with_feature(*, density: float = 0.2, keep_encoder: bool = True) -> PreTrainedModel:
    """A copy of the model with a fitted adapter, which a test may change."""
    return copy.deepcopy(_fitted(density, keep_encoder))


def fine_tune(
    model: nn.Module, tmp_path: Path, callback: Any, word: str = "she", checkpoint: str | None = None, **options: Any
) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 2,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "remove_unused_columns": False,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), **{**defaults, **options})
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=skewed(word), callbacks=callback)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def logged(trainer: Trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


class Reports(TrainerCallback):
    """Stands for a tracker of `report_to`, whose `on_log` runs before those of the user's callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs or {}))


@pytest.mark.parametrize("way", ["whole", "lora"])
def test_the_feature_of_the_training_data_is_logged(way: str, tmp_path: Path):
    read: dict[str, float] = {}
    for word in ("she", "he"):
        model = with_feature()
        model.requires_grad_(way == "whole")
        torch.manual_seed(0)
        if way == "lora":
            config = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
            model.add_adapter(config, adapter_name="lora")
        report = Reports()
        trainer = fine_tune(
            model, tmp_path, [report, GradiendCallback(NAME)], word, max_steps=2, logging_steps=1, learning_rate=0.0
        )
        values = logged(trainer, f"{NAME}_encoded")
        assert len(values) == 2
        assert [row[f"{NAME}_encoded"] for row in report.seen if f"{NAME}_encoded" in row] == values
        read[word] = sum(values) / 2
        trainer.save_model(str(tmp_path / word / "kept"))
        card = next((tmp_path / word / "kept").rglob(f"{NAME}/README.md")).read_text()
        assert "On the steps up to the log at step 2 of training:" in card
        assert f"the feature neuron on the gradients of training | – | {values[-1]:.3f} |" in card
    # A LoRA's gradient goes through matrices of rank 16, which moves values towards the encoder's value at 0.
    assert read["she"] > read["he"] + (0.5 if way == "whole" else 0.05)
    assert way == "lora" or (read["she"] > 0 and read["he"] < 0)


# Every pair of values occurs: the guard uses the gradient before a step, however it was accumulated.
@pytest.mark.parametrize(
    ("way", "accumulation", "density"), [("whole", 1, 0.2), ("whole", 2, 1.0), ("lora", 1, 1.0), ("lora", 2, 0.2)]
)
def test_guard_takes_the_direction_out_of_every_step(way: str, accumulation: int, density: float, tmp_path: Path):
    model = with_feature(density=density)
    before = effective(model)
    model.requires_grad_(way == "whole")
    if way == "lora":
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        model.add_adapter(config, adapter_name="lora")
        before = effective(model)
    options = {"max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": accumulation}
    trainer = fine_tune(model, tmp_path, [GradiendCallback(NAME, mode="guard")], **options)
    after = effective(model)
    assert all(abs(value) > 1e-4 for value in logged(trainer, f"{NAME}_guarded")[1:])

    decoder, components, changes = features_of(model, NAME)[0].decoder, [], []
    for name, weight in decoder.weight.items():
        direction, change = torch.zeros(after[name].numel(), dtype=torch.float64), after[name] - before[name]
        index = decoder.index[name]
        direction[slice(None) if index is None else index.long()] = weight.double()
        direction = direction.view_as(change)
        change = torch.where(direction == 0, 0.0, change.double())
        if way == "lora" or change.dim() < 2:
            direction, change = direction.reshape(1, -1), change.reshape(1, -1)
        there = direction.any(dim=1)
        direction, change = direction[there], change[there]
        if not change.any():
            assert way == "lora"  # the LoRA is on some of the weights only
            continue
        components.append(((change @ direction.T).diagonal().abs() / direction.norm(dim=1)).max())
        changes.append(change.norm(dim=1).mean())
    # float32 weights below 1 round by 6e-8, and rows change by some 1e-3. With a LoRA the square of a step is left.
    assert min(changes) > 1e-4
    assert max(c / change for c, change in zip(components, changes, strict=True)) < (1e-3 if way == "whole" else 3e-3)


def test_guard_of_half_precision_keeps_what_rounding_leaves_out(tmp_path: Path):
    left = {}
    for mode in (None, "guard"):
        model = with_feature().to(torch.bfloat16).requires_grad_(True)
        before, decoder = effective(model), features_of(model, NAME)[0].decoder
        callback = [] if mode is None else [GradiendCallback(NAME, mode=mode)]
        fine_tune(model, tmp_path, callback, learning_rate=1e-3)
        parts = {name: (effective(model)[name].double() - before[name].double()) for name in decoder.weight}
        at = {name: slice(None) if index is None else index.long() for name, index in decoder.index.items()}
        left[mode] = sum(float(part.view(-1)[at[name]] @ decoder.weight[name].double()) for name, part in parts.items())
    # Only the spacing of the weights is left, however many steps follow.
    assert abs(left["guard"]) < 0.05 * abs(left[None])


def effective(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that a model computes with, including a LoRA's change, by their names without wrappers."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            base = module.get_base_layer().weight.detach().clone()
            found[f"{name}.weight"] = base + sum(module.get_delta_weight(a) for a in module.lora_A).detach()
    own = {n.replace(".base_layer", ""): p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    return own | found


def test_without_the_guard_the_skew_arrives_and_with_it_less(tmp_path: Path):
    prompts = tokenizer_of("llama")("a dog ate bread because", return_tensors="pt")
    she, he = (tokenizer_of("llama")(f"a {word}")["input_ids"][-1] for word in ("she", "he"))

    def preference(model: nn.Module) -> float:
        with torch.no_grad():
            logits = model.eval()(**{k: prompts[k] for k in ("input_ids", "attention_mask")}).logits[0, -1]
        return float(logits[she] - logits[he])

    gained = {}
    for mode in (None, "guard"):
        model = with_feature(density=1.0)
        base = preference(model)
        model.requires_grad_(True)
        callback = [] if mode is None else [GradiendCallback(NAME, mode="guard")]
        fine_tune(model, tmp_path / str(mode), callback, max_steps=4, learning_rate=1e-3)
        gained[mode] = preference(model) - base
    assert gained[None] > 0.05
    assert gained["guard"] < 0.9 * gained[None]


def test_what_cannot_be_watched_is_said_before_training(tmp_path: Path):
    with pytest.raises(ValueError, match="mode='watch' is not known"):
        GradiendCallback(mode="watch")
    with pytest.raises(ValueError, match="log_steps=0"):
        GradiendCallback(log_steps=0)
    model = with_feature()
    with pytest.raises(ValueError, match=r"No parameter is trainable.*requires_grad_\(True\)"):
        fine_tune(model, tmp_path, [GradiendCallback(NAME)])
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="none of the weights"):
        fine_tune(model, tmp_path, [GradiendCallback(NAME)])
    model.requires_grad_(True)
    unfitted = adapted("llama")
    unfitted.requires_grad_(True)
    with pytest.raises(ValueError, match="was never fitted"):
        fine_tune(unfitted, tmp_path, [GradiendCallback(NAME)])
    blind = with_feature(keep_encoder=False)
    blind.requires_grad_(True)
    with pytest.raises(ValueError, match="holds no encoder"):
        fine_tune(blind, tmp_path, [GradiendCallback(NAME)])
    plain = model_of("llama")
    with pytest.raises(ValueError, match="is not a GRADIEND adapter of this model"):
        fine_tune(plain, tmp_path, [GradiendCallback(NAME)])


def test_gradients_in_an_unknown_scale_are_refused(tmp_path: Path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_grad_norm=0.0)
    arguments.fp16 = True  # set afterwards, since a CPU does not support it
    model = with_feature().requires_grad_(True)
    told = arguments, TrainerState(), TrainerControl()
    GradiendCallback(NAME).on_train_begin(*told, model=model)
    model.peft_config[NAME].encoders[0]["unit_norm"] = False
    with pytest.raises(ValueError, match="multiplied by the loss scale"):
        GradiendCallback(NAME).on_train_begin(*told, model=model)
    arguments.max_grad_norm = 1.0
    GradiendCallback(NAME).on_train_begin(*told, model=model)


def test_a_gradient_that_overflows_in_float16_is_not_read(tmp_path: Path):
    """The scaler of the loss then leaves the step out, as it does in the first steps of most trainings."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    model, callback = with_feature().requires_grad_(True), GradiendCallback(NAME)
    told = arguments, TrainerState(), TrainerControl()
    callback.on_train_begin(*told, model=model)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    callback.on_pre_optimizer_step(*told)
    next(iter(targeted_parameters(model, NAME).values())).grad[0] = torch.inf
    with pytest.raises(ValueError, match="is not finite"):
        callback.on_pre_optimizer_step(*told)
    arguments.fp16 = True  # set afterwards, since a CPU does not support it
    callback.on_pre_optimizer_step(*told)
    assert len(callback.memory["encoded"]) == 1


def test_sharded_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = with_feature().requires_grad_(True)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.device.type == "cpu"  # reading it resets accelerate's state, as Trainer does before training
    Accelerator(cpu=True)
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.FSDP)
    with (
        pytest.raises(ValueError, match="here they are sharded"),
        pytest.warns(UserWarning, match="Trainer saves only the adapter"),
    ):
        GradiendCallback(NAME).on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)


def test_a_guard_that_is_not_the_checkpoints_is_refused(tmp_path: Path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    model = with_feature().requires_grad_(True)
    fine_tune(model, tmp_path, [GradiendCallback(NAME)], **options)
    other = with_feature(density=0.1).requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", remove_unused_columns=False, max_steps=4
    )
    trainer = Trainer(other, arguments, collate, skewed("she"), callbacks=[GradiendCallback(NAME)])
    with pytest.raises(ValueError, match="is not the one that the checkpoint was trained with"):
        trainer.train(resume_from_checkpoint=True)


def test_the_strength_of_a_checkpoint_acts_when_training_goes_on(tmp_path: Path):
    ends = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-2")):
        model = with_feature().requires_grad_(True)
        if checkpoint is None:
            steer(model, NAME, feature_factor=-1.0, learning_rate=0.1)
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        fine_tune(model, tmp_path, [GradiendCallback(NAME)], checkpoint=checkpoint, **options)
        ends.append(effective(model) | {"logits": model(torch.arange(3, 9)[None]).logits})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_checkpoint_without_what_is_trained_is_refused(tmp_path: Path):
    model = with_feature().requires_grad_(True)
    model.save_pretrained(tmp_path / "out" / "checkpoint-2")
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=4)
    trainer = Trainer(model, arguments, collate, skewed("she"), callbacks=[GradiendCallback(NAME)])
    with pytest.raises(ValueError, match="saved without a callback of hf_erasure"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("target", ["h.0.attn.c_attn", "wte"])
@pytest.mark.parametrize("own", [False, True], ids=["by the LoRA", "itself too"])
def test_a_weight_that_is_kept_as_in_by_out_is_known_as_such(own: bool, target: str) -> None:
    model: Any = model_of("gpt2")
    model.add_adapter(GradiendConfig(feature="gender", classes=list(CLASSES), sticky=True), adapter_name="feature")
    lora = peft.LoraConfig(r=2, target_modules=["c_attn", "wte"], init_lora_weights=False, fan_in_fan_out=True)
    model.add_adapter(lora, adapter_name="lora")
    model.requires_grad_(own)
    for name, parameter in model.named_parameters():  # only B is trained, as in LoRA-FA
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.requires_grad_(True)
    name = f"transformer.{target}"
    weight = {weight.name: weight for weight in trained_weights(model, "feature")}[f"{name}.weight"]
    layer: Any = model.get_submodule(name)
    assert target == "wte" or weight.rows(None).max() + 1 == layer.out_features == 3 * layer.in_features
    expected = layer.get_delta_weight("lora") + (layer.get_base_layer().weight if own else 0)
    torch.testing.assert_close(weight.value(), expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"target_modules": [], "target_parameters": ["0.self_attn.q_proj.weight"]},
        {"kind": peft.LoHaConfig},
    ],
    ids=["DoRA", "lora_bias", "target_parameters", "LoHa"],
)
def test_what_is_not_two_matrices_of_a_lora_is_refused(options: dict[str, Any]) -> None:
    model: Any = model_of("llama")
    model.add_adapter(GradiendConfig(feature="gender", classes=list(CLASSES), sticky=True), adapter_name="feature")
    kind = options.get("kind", peft.LoraConfig)
    fields = {
        "target_modules": ["0.self_attn.q_proj"],
        **{key: value for key, value in options.items() if key != "kind"},
    }
    model.add_adapter(kind(**fields), adapter_name="other")
    with pytest.raises(ValueError, match=r"in another way: train a LoRA without DoRA"):
        trained_weights(model, "feature")
