"""A fit during which one process raises an error or exits; every process runs this program."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_erasure import ConceptErasureConfig
from hf_erasure.adapters import erasure_layers
from hf_erasure.fitting import fit_concept_erasure
from hf_erasure.fitting.processes import Processes
from tests.distributed.fits import NAME, erasers
from tests.small_models import LABELS, small_batches, small_model

# Before the first batch, three passes through two layers find the axes of the activations.
CALLS_BEFORE_THE_END = 3 * 2 + 4


def main(folder: Path, what: str, sequential: bool) -> None:
    """Fit with `what` happening in the second process: "nothing", "dies" or "raises"."""
    torch.set_num_threads(1)
    processes = Processes()
    model = small_model("bert").double()
    model.add_adapter(ConceptErasureConfig(labels=LABELS), adapter_name=NAME)
    share = small_batches("bert", 4)[2 * processes.rank : 2 * processes.rank + 2]
    if processes.rank == 1 and what == "raises":
        share[1]["concept_labels"][0] = 7
    if processes.rank == 1 and what == "dies":
        calls: list[int] = []

        def end(*_: object) -> None:
            calls.append(1)
            if len(calls) == CALLS_BEFORE_THE_END:
                os._exit(3)

        for layer in model.encoder.layer:
            layer.register_forward_hook(end)
    try:
        fit_concept_erasure(model, share, NAME, sequential=sequential, checkpoint_dir=folder / "fit", progress=False)
    except Exception as error:
        unfitted = all(part.numel() == 0 for layer in erasure_layers(model).values() for part in layer.state_of(NAME))
        (folder / f"error-{processes.rank}").write_text(f"{type(error).__name__}: {error} unfitted={unfitted}")
        return
    save_file({k: v.contiguous() for k, v in erasers(model).items()}, folder / f"done-{processes.rank}")
