"""The callbacks in every kind of training: the content of checkpoints, and the end of a resumed training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from hf_erasure import fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from tests.callbacks.test_gradiend_callback import TEXTS, effective
from tests.ecosystem import trainer_processes
from tests.ecosystem.trainer_runs import (
    KINDS,
    LORA,
    NAME,
    WAYS,
    assert_same_state,
    callback_for,
    cosine_with_feature,
    figures,
    fitted,
    labelled_batches,
    logits,
    model_for,
    moved,
    options_for,
    state_of,
    trainer_for,
)
from tests.fitting.gradiend.language_models import model_of, tokenizer_of
from tests.prepared import together

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(second time|Already found a `peft_config`|has been trained further|switched the)"
)
USUAL = ("full fine-tuning", "LoRA beside a sticky adapter")


def every_cell(first: str) -> pytest.MarkDecorator:
    """Parametrise over every kind and way; only one usual way for each kind runs outside of the slow tests.

    Args:
        first: The usual way for the first kind; the next kind has the other usual way. Several of these tests cover
        each way and each kind, so a fault of one combination shows in at least one of them.
    """
    usual = {(kind, USUAL[(number + USUAL.index(first)) % 2]) for number, kind in enumerate(KINDS)}
    cells = [pytest.param(k, w, marks=[] if (k, w) in usual else [pytest.mark.slow]) for k in KINDS for w in WAYS]
    return pytest.mark.parametrize(("kind", "way"), cells)


FULL, LORA_BESIDE = USUAL
TABLE = "Trainer"
Enter = Callable[[str, str, str, str], None]


def row(kind: str, way: str) -> str:
    return f"{KINDS[kind]}: {way}"


def base_of(model: Any) -> nn.Module:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def erasers(model: nn.Module) -> torch.Tensor:
    """The products `left @ right` of all erasers, since the factors themselves may differ by a sign."""
    states = [layer.eraser_state(NAME) for layer in erasure_layers(model, NAME).values()]
    return torch.stack([left @ right for left, right, _ in states])


def assert_acts(kind: str, trainer: Any, before: dict[str, torch.Tensor], tolerance: float) -> None:
    """Check that the callback has worked in this training."""
    rows = figures(trainer)
    assert len(rows) == trainer.state.global_step // 2
    if kind == "erasure":
        assert [found["erasure_refits"] for found in rows] == list(range(1, len(rows) + 1))
        sites = {f"leakage/{site}" for site in erasure_layers(trainer.model, NAME)}
        assert sites and all(sites <= found.keys() for found in rows)
        # The last step refits, so the erasers must equal a fit on the model in its final state and precision.
        kept = erasers(trainer.model)
        fit_concept_erasure(trainer.model, labelled_batches(), NAME, progress=False)
        torch.testing.assert_close(erasers(trainer.model), kept)
    else:
        # Every sentence ends in "she", the class that is encoded as +1.
        assert all(0 < found[f"{NAME}_encoded"] <= 1 for found in rows)
    if kind == "guard":
        assert any(abs(found[f"{NAME}_guarded"]) > 1e-3 for found in rows)
        assert abs(cosine_with_feature(trainer.model, before)) < tolerance


# Steps are about 5e-3, and each rounds a float32 weight by 2^-24 of it. With a LoRA the square of a step is left.
def tolerance_of(way: str) -> float:
    return 1e-3 if way.startswith("LoRA") else 1e-4


@every_cell(FULL)
def test_gradient_accumulation(kind: str, way: str, tmp_path: Path, matrix: Enter):
    # Two batches of four must count as one step, as a batch of eight does.
    ends = []
    for size, steps in ((4, 2), (8, 1)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 4}
        trainer = trainer_for(kind, way, tmp_path, **options)
        before = effective(base_of(trainer.model))
        trainer.train()
        assert_acts(kind, trainer, before, tolerance_of(way))
        ends.append((figures(trainer), trainer.model))
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        # float32 gradients in another order, through Adam, which divides by their size
        assert one == pytest.approx(other, rel=2e-2, abs=2e-3)
    matrix(TABLE, row(kind, way), "gradient accumulation", "same")


@every_cell(LORA_BESIDE)
def test_mixed_precision(kind: str, way: str, tmp_path: Path, matrix: Enter):
    found = {}
    for bf16 in (False, True):
        trainer = trainer_for(kind, way, tmp_path, bf16=bf16, max_steps=4)
        before = effective(base_of(trainer.model))
        trainer.train()
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        assert_acts(kind, trainer, before, tolerance_of(way))
        found[bf16] = figures(trainer)
    # bf16 has 8 bits: a hundredth of the gradient is noise, which also moves the leakage of 36 sequences.
    for one, other in zip(found[True], found[False], strict=True):
        assert one == pytest.approx(other, abs=0.15)
    matrix(TABLE, row(kind, way), "bf16", "same")


@every_cell(FULL)
def test_sft_trainer(kind: str, way: str, tmp_path: Path, matrix: Enter):
    trl = pytest.importorskip("trl")
    model: Any = model_for(kind, way)
    before = effective(base_of(model))
    arguments = trl.SFTConfig(**options_for(tmp_path, bf16=False, max_steps=4, save_strategy="steps", save_steps=4))
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=sft_data(), processing_class=sft_tokenizer(), callbacks=[callback_for(kind)]
    )
    trainer.train()
    assert_acts(kind, trainer, before, tolerance_of(way))
    assert_reloads(trainer.model, tmp_path / "checkpoint-4", kind, way)
    matrix(TABLE, row(kind, way), "SFTTrainer", "same")


def test_sft_trainer_wraps_a_model_that_has_an_adapter(tmp_path: Path):
    trl = pytest.importorskip("trl")
    trainer = trl.SFTTrainer(
        fitted("erasure", sticky=True),
        trl.SFTConfig(**options_for(tmp_path, bf16=False, max_steps=4)),
        train_dataset=sft_data(),
        processing_class=sft_tokenizer(),
        callbacks=[callback_for("erasure")],
        peft_config=peft.LoraConfig(r=4, target_modules=LORA),
    )
    trainer.train()
    assert isinstance(trainer.model, peft.PeftModel)
    assert_acts("erasure", trainer, {}, 0.0)


def sft_data() -> Dataset:
    return Dataset.from_dict({"prompt": TEXTS * 4, "completion": [" she"] * 4 * len(TEXTS)})


def sft_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, with the end and padding tokens that SFTTrainer needs."""
    backend = tokenizer_of("llama").backend_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<unk>", eos_token="<unk>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def assert_reloads(model: Any, folder: Path, kind: str, way: str, tolerance: float = 0.0) -> None:
    """Check that a checkpoint, loaded in the usual way, gives the trained model."""
    if way.startswith("full"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
        loaded.load_adapter(str(folder / NAME), adapter_name=NAME)
    elif way == "LoRA by get_peft_model":
        loaded = model_of("llama").eval()
        loaded.load_adapter(str(folder / NAME), adapter_name=NAME)
        loaded = peft.PeftModel.from_pretrained(loaded, folder)
    else:
        loaded = model_of("llama").eval()
        loaded.load_adapter(str(folder / NAME), adapter_name=NAME)
        loaded.load_adapter(str(folder), adapter_name="lora")
        if way == "LoRA, both active":
            loaded.set_adapter([NAME, "lora"])
    torch.testing.assert_close(logits(loaded), logits(model), rtol=tolerance, atol=tolerance)


@every_cell(LORA_BESIDE)
def test_save(kind: str, way: str, tmp_path: Path, matrix: Enter):
    trainer = trainer_for(kind, way, tmp_path, save_strategy="steps", save_steps=6)
    before = logits(trainer.model)
    trainer.train()
    assert not torch.allclose(logits(trainer.model), before)
    assert_reloads(trainer.model, tmp_path / "checkpoint-6", kind, way)
    trainer.save_model(str(tmp_path / "own"))
    assert_reloads(trainer.model, tmp_path / "own", kind, way)
    matrix(TABLE, row(kind, way), "save", "same")


@pytest.mark.parametrize("way", ["full fine-tuning", "LoRA, both active"])
def test_a_trainer_that_did_not_train_saves_all_too(way: str, tmp_path: Path):
    trainer = trainer_for("erasure", way, tmp_path)
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).add_(0.5)
    trainer.save_model(str(tmp_path / "own"))
    assert_reloads(trainer.model, tmp_path / "own", "erasure", way)


@every_cell(FULL)
def test_resume_from_checkpoint(kind: str, way: str, tmp_path: Path, matrix: Enter):
    # The save is between two logs, so the values that the callback has gathered since the first log must be saved too.
    whole = trainer_for(kind, way, tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer_for(kind, way, tmp_path)
    started = state_of(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert moved(started, state_of(resumed.model))
    assert_same_state(state_of(whole.model), state_of(resumed.model))
    assert figures(whole) == figures(resumed)
    if kind == "erasure":
        assert_acts(kind, resumed, {}, 0.0)
    matrix(TABLE, row(kind, way), "resume", "same")


class Snapshots(TrainerCallback):
    """Records the state at every checkpoint, and gives the second step the best evaluation."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_liked"] = float(state.global_step == 2)

    def on_save(self, args, state, control, model=None, **kwargs):
        self.states[state.global_step] = state_of(model)


@every_cell(LORA_BESIDE)
def test_load_best_model_at_end(kind: str, way: str, tmp_path: Path, matrix: Enter):
    steps = {f"{what}_{of}": value for what in ("save", "eval") for of, value in (("strategy", "steps"), ("steps", 2))}
    snapshots = Snapshots()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "liked", "greater_is_better": True}
    trainer = trainer_for(kind, way, tmp_path, (snapshots,), **steps, **best)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert moved(snapshots.states[6], snapshots.states[2])
    assert_same_state(snapshots.states[2], state_of(trainer.model))
    matrix(TABLE, row(kind, way), "load_best_model_at_end", "same")


@every_cell(FULL)
def test_push(kind: str, way: str, tmp_path: Path, matrix: Enter, monkeypatch: pytest.MonkeyPatch):
    pushed: list[Path] = []

    def upload_folder(self: HfApi, *, folder_path: str, ignore_patterns: Any = None, **kwargs: Any) -> Any:
        """Copy the files that the Hub would get, in the place of the upload."""
        target = tmp_path / f"pushed-{len(pushed)}"
        names = [p.relative_to(folder_path) for p in Path(folder_path).rglob("*") if p.is_file()]
        for name in names:
            if not str(name).startswith(("_", "checkpoint-")):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes((Path(folder_path) / name).read_bytes())
        pushed.append(target)
        return None if not kwargs.get("run_as_future") else _Done()

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **kwargs: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    options = {"push_to_hub": True, "hub_model_id": "someone/model", "save_strategy": "steps", "save_steps": 6}
    trainer = trainer_for(kind, way, tmp_path / "out", **options)
    trainer.train()
    assert len(pushed) == 1  # the checkpoint
    trainer.push_to_hub()
    assert len(pushed) == 2
    for folder in pushed:
        assert_reloads(trainer.model, folder, kind, way)
    matrix(TABLE, row(kind, way), "push", "same")


class _Done:
    def done(self) -> bool:
        return True

    def is_done(self) -> bool:
        return True

    def result(self) -> None:
        return None


def trained_by_two(folder: Path, kind: str, way: str) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """The tensors and facts that each of two processes ended with."""
    folder.mkdir()
    status, printed = together(2, trainer_processes.main, folder, kind, way, folder=folder, ACCELERATE_USE_CPU="true")
    assert status == 0, printed[-3000:]
    files = sorted(folder.glob("*.json"))
    return [(load_file(file.with_suffix(".safetensors")), json.loads(file.read_text())) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("way", USUAL)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(kind: str, way: str, tmp_path: Path, matrix: Enter):
    (one, facts), (other, others) = trained_by_two(tmp_path / "two", kind, way)
    assert facts["processes"] == others["processes"] == 2
    # Both processes end with the same bits; only the main one reports.
    assert_same_state(one, other)
    assert facts["figures"] == others["figures"]
    assert (len(facts["reported"]), len(others["reported"])) == (2, 0)
    # One process with the whole batches ends with the same.
    trainer = trainer_for(kind, way, tmp_path, max_steps=4, per_device_train_batch_size=4)
    before = effective(base_of(trainer.model))
    trainer.train()
    assert_acts(kind, trainer, before, tolerance_of(way))
    for here, there in zip(figures(trainer), facts["figures"], strict=True):
        assert here.keys() == there.keys()
        # Leakage is cross-validated on random halves. Two processes draw others, which matters with few sequences.
        compared = [key for key in here if not key.startswith("leakage")]
        # The gradients of half batches are averaged: float32 sums in another order, through Adam
        assert [here[key] for key in compared] == pytest.approx([there[key] for key in compared], rel=2e-2, abs=5e-3)
    # The checkpoint of two processes, erasers included, computes the same as the model of one process.
    assert_reloads(trainer.model, tmp_path / "two" / "out" / "checkpoint-4", kind, way, tolerance=2e-2)
    matrix(TABLE, row(kind, way), "two processes (DDP)", "same")
