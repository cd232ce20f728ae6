"""An erasure as a stock LoRA, for programs that have PEFT and not this package.

Erasing a linear layer's input or output subtracts a product of two thin matrices from its weight, which is what a LoRA
adds: `B A` with `A = R, B = −W L` at the input and `A = R W, B = −L` at the output. What the affine part adds to the
bias is the bias of `B`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import ConceptErasureConfig
from .folding import Plan, plan_merge
from .layer import erasure_layers
from .merging import WeightChange, shared_weights, weight_change
from .probing import Probe
from .tuner import exactly

# Where `PeftModel` holds the base model, as in the files that PEFT writes.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraExport:
    """What `export_to_lora` wrote.

    Attributes:
        folder: Where.
        modules: The modules that the LoRA acts on.
        unmergeable: Module → why PEFT's `merge_and_unload` cannot, or must not, merge the LoRA there.
        text: The same in a few sentences.
    """

    folder: Path
    modules: list[str]
    unmergeable: dict[str, str]
    text: str

    def __str__(self) -> str:
        return self.text


def export_to_lora(model: nn.Module, adapter_name: str, folder: str | Path) -> LoraExport:
    """Write an erasure as a stock LoRA adapter, which `PeftModel.from_pretrained(base, folder)` loads without us.

    Args:
        model: The model with the fitted adapter, bare or wrapped in a `PeftModel`. It is not changed.
        adapter_name: The erasure; it is exported as it acts alone.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` are written.

    Returns:
        What was written, and where PEFT can use it but not merge it.

    Raises:
        ValueError: If the erasure is not fitted, is merged, or has a site that is no linear layer and whose activation
            does not go into linear layers only; names the site and what stands in the way.
    """
    wrapper: Any = model
    base: nn.Module = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    config = _fitted_config(wrapper, base, adapter_name)
    with _alone(base, adapter_name):
        plan = plan_merge(base, [adapter_name], Probe(base), allow_tied=True)
    changes = _changes(plan)
    if not changes:
        raise ValueError(f"The erasure {adapter_name!r} has rank 0 at every site: there is nothing to export.")
    shifts = {name: _shift(plan.modules[name], change) for name, change in changes.items()}
    lora_bias = any(bool(shift.any()) for shift in shifts.values())
    embeddings = [name for name in changes if isinstance(plan.modules[name], nn.Embedding)]
    if lora_bias and embeddings:
        raise ValueError(
            f"The erasure {adapter_name!r} cannot be exported: its affine part needs lora_bias=True, which PEFT does "
            f"not support for the embedding {embeddings[0]!r}. Fit a purely linear erasure with "
            "ConceptErasureConfig(affine=False), or two adapters."
        )
    lora = _lora_config(base, config, plan, changes, lora_bias=lora_bias)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(plan, changes, shifts if lora_bias else {})
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora.save_pretrained(str(folder))
    unmergeable = _unmergeable(base, plan, list(changes), lora_bias=lora_bias)
    return LoraExport(folder, list(changes), unmergeable, _text(folder, lora, list(changes), unmergeable))


@dataclass(frozen=True)
class LowRank:
    """The nearest product of thin matrices to a change of a weight.

    Attributes:
        a: `(rank, in)`.
        b: `(out, rank)`.
        kept: The share of the change's squared norm that is in `b @ a`.
    """

    a: Tensor
    b: Tensor
    kept: float


def low_rank(delta: Tensor, rank: int) -> LowRank:
    """Truncate the singular value decomposition of a weight's change, for changes that are not of low rank themselves.

    Args:
        delta: `(out, in)`.
        rank: How many singular values to keep.

    Raises:
        ValueError: If there are not so many.
    """
    if not 1 <= rank <= min(delta.shape):
        raise ValueError(f"rank={rank} is not between 1 and {min(delta.shape)}, the smaller side of the change.")
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    energy = s.square()
    total = float(energy.sum())
    kept = float(energy[:rank].sum()) / total if total else 1.0
    return LowRank(v[:rank].to(delta.dtype), (u[:, :rank] * s[:rank]).to(delta.dtype), kept)


def _fitted_config(model: Any, base: nn.Module, name: str) -> ConceptErasureConfig:
    layers = erasure_layers(base, name)
    if not layers:
        known = sorted({other for layer in erasure_layers(base).values() for other in layer.adapters})
        raise ValueError(f"adapter_name={name!r} is no erasure of this model; the erasures here are {known or 'none'}.")
    config: ConceptErasureConfig = model.peft_config[name]
    if not config.fitted:
        raise ValueError(f"The erasure {name!r} was never fitted: call fit_concept_erasure(model, batches, {name!r}).")
    if any(layer.merged for layer in erasure_layers(base).values()):
        raise ValueError("Erasures are merged into the weights: call unmerge_adapter() before exporting one.")
    return config


@contextmanager
def _alone(base: nn.Module, name: str) -> Iterator[None]:
    """Let one erasure act and no other."""
    layers = list(erasure_layers(base).values())
    before = [(layer._active_adapter, layer._disable_adapters, layer.concept_erasure_sticky) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [name], False
            layer.concept_erasure_sticky = dict.fromkeys(layer.adapters, False)
        yield
    finally:
        for layer, (active, disabled, sticky) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters, layer.concept_erasure_sticky = active, disabled, sticky


def _changes(plan: Plan) -> dict[str, WeightChange]:
    changes = {}
    for name, module in plan.modules.items():
        parameters = {key: p.detach() for key, p in module.named_parameters(recurse=False)}
        change = weight_change(module, parameters, plan.edits[name])
        if change.a.shape[0]:
            changes[name] = change
    return changes


def _shift(module: nn.Module, change: WeightChange) -> Tensor:
    bias = module._parameters.get("bias")
    return change.offset if bias is None else change.offset - bias.detach().double()


def _lora_config(
    base: nn.Module, config: ConceptErasureConfig, plan: Plan, changes: dict[str, WeightChange], *, lora_bias: bool
) -> LoraConfig:
    ranks = {name: change.a.shape[0] for name, change in changes.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT reads these as expressions for the end of a name; the anchor keeps them to the whole of it.
    other = {f"^{name.replace('.', chr(92) + '.')}": rank for name, rank in ranks.items() if rank != usual}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,  # equal to the rank everywhere: the scaling is 1
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=exactly(list(changes), base),
        lora_bias=lora_bias,
        fan_in_fan_out=all(isinstance(plan.modules[name], Conv1D) for name in changes),
        task_type=config.task_type,
        # Without a task, AutoPeftModel finds the class of the base here.
        auto_mapping={"base_model_class": type(base).__name__, "parent_library": type(base).__module__},
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )


def _tensors(plan: Plan, changes: dict[str, WeightChange], shifts: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        weight = plan.modules[name].get_parameter("weight")
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if isinstance(plan.modules[name], nn.Embedding):
            parts = {"lora_embedding_A": change.a, "lora_embedding_B": change.b}
        else:
            parts = {"lora_A.weight": change.a, "lora_B.weight": change.b}
        if name in shifts:
            parts["lora_B.bias"] = shifts[name]
        tensors |= {f"{_PREFIX}{name}.{part}": t.to("cpu", dtype).contiguous() for part, t in parts.items()}
    return tensors


def _unmergeable(base: nn.Module, plan: Plan, names: list[str], *, lora_bias: bool) -> dict[str, str]:
    tied = {name.rpartition(".")[0] for name in shared_weights(base)}
    reasons = {}
    for name in names:
        if lora_bias and plan.modules[name]._parameters.get("bias") is None:
            reasons[name] = "the affine part is a lora_bias, and the layer has no bias to merge it into"
        elif name in tied:
            reasons[name] = "its weight is shared with another module, which would change too"
    return reasons


def _text(folder: Path, lora: LoraConfig, names: list[str], unmergeable: dict[str, str]) -> str:
    bias = ", with lora_bias" if lora.lora_bias else ""
    text = f"Wrote a LoRA of rank {lora.r} on {len(names)} modules{bias} to {folder}."
    for reason in dict.fromkeys(unmergeable.values()):
        at = [name for name, why in unmergeable.items() if why == reason]
        rest = f" and {len(at) - 1} others" if len(at) > 1 else ""
        text += f" PEFT applies it but cannot merge it at {at[0]!r}{rest}: {reason}."
    return text
