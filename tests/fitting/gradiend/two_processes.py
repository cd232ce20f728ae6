"""Fits in one process or in several; each process writes its result."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_erasure.adapters import features_of
from tests.fitting.gradiend.test_trainer import NAME, adapted, trainer_of


def main(folder: Path, estimator: str, batch_size: int, save_strategy: str = "no") -> None:
    torch.set_num_threads(1)
    options = {} if estimator == "closed_form" else {"learning_rate": 1e-2, "max_steps": 8, "eval_steps": 4}
    options |= {"per_device_train_batch_size": batch_size, "save_strategy": save_strategy, "save_steps": 2}
    model = adapted("llama")
    trainer = trainer_of(model, "llama", folder, estimator=estimator, **options)
    output = trainer.train()
    decoder = features_of(model, NAME)[0].decoder
    processes = trainer._processes
    save_file(
        {f"{kind}.{name}": value.contiguous() for kind in ("weight", "bias")
         for name, value in getattr(decoder, kind).items()},
        folder / f"{estimator}-{processes.rank}.safetensors",
        metadata={"processes": str(processes.count), "steps": str(output.global_step)},
    )  # fmt: skip
