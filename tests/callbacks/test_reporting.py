"""Logged values arrive at the trackers of `report_to`: in TensorBoard's event files and W&B's offline records."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_erasure import (
    ConceptErasureCallback,
    ConceptErasureConfig,
    GradiendConfig,
    GradiendTrainer,
    GradiendTrainingArguments,
)
from tests.fitting.gradiend.language_models import CLASSES, model_of, pairs, tokenizer_of
from tests.small_models import LABELS, small_batches, small_model

ERASURE, GRADIEND = {"train/loss", "train/leakage_max", "train/erasure_refits"}, {"train/loss", "train/cor", "eval/cor"}


@pytest.fixture(params=["tensorboard", "wandb"])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    return str(request.param)


def written(tracker: str, folder: Path) -> set[str]:
    """The names of the values that a tracker has recorded."""
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        return set(EventAccumulator(str(folder / "board")).Reload().Tags()["scalars"])
    import wandb

    (path,) = Path(wandb.run.dir).parent.glob("run-*.wandb")
    wandb.finish()
    # W&B has no reader for its records, but they contain the names as plain bytes.
    return {name for name in ERASURE | GRADIEND if name.encode() in path.read_bytes()}


def test_figures_of_an_erasure_in_a_training(tracker: str, tmp_path: Path):
    model = copy.deepcopy(small_model("llama"))
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=LABELS), adapter_name="no_gender")
    model.requires_grad_(True)
    batches = small_batches("llama", seed=100)
    callback = ConceptErasureCallback(batches, "no_gender", eval_batches=small_batches("llama", seed=900))
    ids = torch.randint(3, 30, (16, 6), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        report_to=tracker, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert written(tracker, tmp_path) >= ERASURE


def test_figures_of_a_gradiend(tracker: str, tmp_path: Path):
    model = model_of("bert")
    model.add_adapter(GradiendConfig(feature="gender", classes=CLASSES, density=1.0), adapter_name="gender")
    options: dict[str, Any] = {"report_to": tracker, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    arguments = GradiendTrainingArguments(
        output_dir=str(tmp_path / "out"),
        disable_tqdm=True,
        per_device_train_batch_size=1,
        max_steps=4,
        estimator="trained",
        **options,
    )
    GradiendTrainer(
        model, args=arguments, train_dataset=pairs("bert"), eval_dataset=pairs("bert"), tokenizer=tokenizer_of("bert")
    ).train()
    assert written(tracker, tmp_path) >= GRADIEND
