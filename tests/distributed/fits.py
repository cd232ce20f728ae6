"""Fits that one process does alone and several do together, and the program that does them in each process."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.fitting.processes import Processes
from tests.small_models import (
    ARCHITECTURES,
    LABELS,
    inputs_of,
    paired_batches,
    shared_layers_model,
    small_batches,
    small_model,
)

NAME = "no_gender"
BATCHES = 5
# Share → how many of the batches go to each of the two processes.
SHARES = {"ragged": (4, 1), "empty": (5, 0), "first empty": (0, 5)}


@dataclass(frozen=True)
class Fit:
    """One way of fitting.

    Attributes:
        model: An architecture, or "albert" for a model whose blocks are one module.
        sequential: Whether sites are fitted one after another, or all in one pass.
        background: Whether mean and covariance come from unlabelled batches.
        sharded: Whether FSDP2 keeps a part of every weight in each process.
        options: Further arguments of `fit_concept_erasure`.
        paired: Whether batches have counterfactuals and environments.
        target: The `target_modules` of the erasure, a word such as "readers".
    """

    model: str
    sequential: bool
    background: bool = False
    sharded: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    paired: bool = False
    target: str | None = None

    def __str__(self) -> str:
        words = [self.model, "sequential" if self.sequential else "one pass"]
        words += [self.target] if self.target else []
        words += ["background"] * self.background + ["FSDP2"] * self.sharded + [f"{k}={v}" for k, v in self.options]
        return " ".join(words)


FITS = [
    *(Fit(model, sequential) for model in ("bert", "llama", "t5") for sequential in (True, False)),
    Fit("bert", True, background=True),
    Fit("bert", False, background=True),
    *(Fit("bert", way, options=(("pair_rank", 1), ("environment_rank", 2)), paired=True) for way in (True, False)),
    Fit("vit", True),
    Fit("albert", True),
    Fit("llama", True, options=(("pool", "mean"), ("resident_batches", 1))),
    *(Fit(model, sequential, target="readers") for model, sequential in (("t5", True), ("llama", False))),
    Fit("llama", True, sharded=True, target="readers"),
    *(Fit(model, sequential, sharded=True) for model in ("bert", "llama") for sequential in (True, False)),
]


# The numbers of the fits for each share. Where a process has no batches, each way of fitting is done with at least one
# of the two shares; other models with the same way run only in the slow tests and `make matrix`.
EVERY = tuple(range(len(FITS)))
DONE = {"ragged": EVERY, "empty": (0, 7, 8, 11, 12, 14, 17, 18), "first empty": (1, 4, 6, 9, 11, 13, 16, 19)}
LEFT = {shares: tuple(sorted({*EVERY} - {*numbers})) for shares, numbers in DONE.items() if shares != "ragged"}


def fitted(fit: Fit, share: slice = slice(None), **options: Any) -> tuple[nn.Module, Any]:
    """Fit on a share of the batches, and return the model and the report."""
    name = "bert" if fit.model == "albert" else fit.model
    model: Any = shared_layers_model() if fit.model == "albert" else copy.deepcopy(small_model(name))
    model = model.double()
    # `affine` is set, since no process with a part of a sharded model can find out whether a merge can write the mean.
    config = ConceptErasureConfig(labels=LABELS, target_modules=fit.target, affine=True)
    config.environments = ["a", "b", "c"] if fit.paired else None
    model.add_adapter(config, adapter_name=NAME)
    if fit.sharded and torch.distributed.is_initialized():
        shard(model, fit.model)
    extra: dict[str, Any] = dict(fit.options) | options
    if fit.background:
        extra["background"] = [_double(inputs_of(b)) for b in small_batches(name, BATCHES, seed=800)][share]
    made = paired_batches(name, BATCHES) if fit.paired else small_batches(name, BATCHES)
    batches = [_double(batch) for batch in made][share]
    held_out = [_double(batch) for batch in small_batches(name, BATCHES, seed=300)][share]
    report = fit_concept_erasure(
        model, batches, NAME, sequential=fit.sequential, eval_batches=held_out, progress=False, **extra
    )
    return model, report


def shard(model: nn.Module, name: str) -> None:
    """Shard with FSDP2: each block is a group, and the rest of the model is another."""
    for path, module in model.named_modules():
        if re.fullmatch(ARCHITECTURES[name].blocks, path):
            fully_shard(module)
    fully_shard(model)


def erasers(model: nn.Module) -> dict[str, Tensor]:
    """`left @ right` and the mean of every site: the products, since the factors may differ by signs."""
    found = {}
    for site, layer in erasure_layers(model, NAME).items():
        left, right, bias = layer.eraser_state(NAME)
        found |= {f"{site}.map": left @ right, f"{site}.mean": bias.clone()}
    return found


def _double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def main(folder: Path, shares: str, numbers: tuple[int, ...]) -> None:
    """Do the fits of these numbers on this process's share, and write the erasers."""
    torch.set_num_threads(1)
    processes = Processes()
    first = sum(SHARES[shares][: processes.rank])
    share = slice(first, first + SHARES[shares][processes.rank])
    for number in numbers:
        model, report = fitted(FITS[number], share)
        held_out = [line.correlation_after or 0.0 for line in report.sites]
        tensors = erasers(model) | {"held_out": torch.tensor(held_out, dtype=torch.float64)}
        facts = {"world": str(torch.distributed.get_world_size()), "examples": str(report.examples)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{number}-{processes.rank}", facts)
