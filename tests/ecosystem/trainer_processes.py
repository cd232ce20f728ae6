"""Train in each of several processes, and write the state and the facts that each ends with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from tests.ecosystem.trainer_runs import figures, trainer_for


class Reports(TrainerCallback):
    """Stands for a tracker of `report_to`, which writes only on the main process."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in (logs or {}):
            self.seen.append(dict(logs))


def main(folder: Path, kind: str, way: str) -> None:
    torch.set_num_threads(1)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "ddp_backend": "gloo"}
    reports = Reports()
    trainer = trainer_for(kind, way, folder / "out", (reports,), per_device_train_batch_size=2, **options)
    trainer.train()
    rank = trainer.args.process_index
    save_file(
        {name: value.clone() for name, value in trainer.model.state_dict().items()}, folder / f"{rank}.safetensors"
    )
    found = {"figures": figures(trainer), "reported": reports.seen, "processes": trainer.args.world_size}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
