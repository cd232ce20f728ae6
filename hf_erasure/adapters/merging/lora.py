"""An adapter as a stock LoRA, for programs that have PEFT and not this package.

Erasing a linear layer's input or output subtracts a product of two thin matrices from its weight, which is what a LoRA
adds: `B A` with `A = R, B = −W L` at the input and `A = R W, B = −L` at the output. What the affine part adds to the
bias is the bias of `B`. The change of a GRADIEND adapter has no low rank; of it the largest singular values are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..common.config import ChildConfig
from ..common.layer import innermost
from ..common.lookup import adapter_of
from ..common.tuner import exactly
from ..erasure.config import ConceptErasureConfig
from ..erasure.layer import erasure_layers
from ..gradiend.config import GradiendConfig
from ..gradiend.model import base_modules
from ..gradiend.state import changes_of
from .check import Probe
from .formulas import WeightChange, is_weight_layer, shared_weights, weight_change
from .plan import MergePlan, plan_merge, refuse_sharded

# Where `PeftModel` holds the base model, as in the files that PEFT writes.
_PREFIX = "base_model.model."
# Of a GRADIEND adapter's export, unless the caller says otherwise.
DEFAULT_RANK = 16


@dataclass(frozen=True)
class LoraExport:
    """What `export_to_lora` wrote.

    Attributes:
        folder: Where.
        modules: The modules that the LoRA acts on.
        unmergeable: Module → why PEFT's `merge_and_unload` cannot, or must not, merge the LoRA there.
        text: The same in a few sentences.
        kept: The share of the squared norm of all changes of weights that is in the LoRA.
        left_out: Parameters that the adapter changes and a LoRA cannot.
    """

    folder: Path
    modules: list[str]
    unmergeable: dict[str, str]
    text: str
    kept: float = 1.0
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.text


def export_to_lora(model: nn.Module, adapter_name: str, folder: str | Path, *, rank: int | None = None) -> LoraExport:
    """Write an adapter as a stock LoRA, which `PeftModel.from_pretrained(base, folder)` loads without us.

    An erasure is exported exactly. A GRADIEND adapter becomes its nearest LoRA of a rank, at its present strength;
    what it changes in norms, biases and other parameters that are no matrices is left out, and the text says how much
    that is.

    Args:
        model: The model with the fitted adapter, or whatever it is inside of. It is not changed.
        adapter_name: The adapter; it is exported as it acts alone.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` are written.
        rank: Of the LoRA, for a GRADIEND adapter; 16 when left out. An erasure has its own.

    Returns:
        What was written, what could not be, and where PEFT can use it but not merge it.

    Raises:
        ValueError: If the adapter is not fitted, is merged, or has a site that is no linear layer and whose activation
            does not go into linear layers only; names the site and what stands in the way.
    """
    found = adapter_of(model, adapter_name, ChildConfig)
    base = found.owner
    if isinstance(found.config, GradiendConfig):
        return _export_gradiend(base, found.config, adapter_name, Path(folder), DEFAULT_RANK if rank is None else rank)
    if rank is not None:
        raise ValueError(f"rank={rank} is for GRADIEND adapters; an erasure is exported exactly, with its own rank.")
    config: Any = found.config
    _check_exportable(base, config, adapter_name)
    refuse_sharded(base)
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
    factors = {name: (change.a, change.b) for name, change in changes.items()}
    modules = {name: plan.modules[name] for name in changes}
    lora = _write(base, config, Path(folder), modules, factors, shifts if lora_bias else {})
    unmergeable = _unmergeable(base, modules, lora_bias=lora_bias)
    return LoraExport(Path(folder), list(changes), unmergeable, _text(Path(folder), lora, list(changes), unmergeable))


def _export_gradiend(base: nn.Module, config: GradiendConfig, name: str, folder: Path, rank: int) -> LoraExport:
    if rank < 1:
        raise ValueError(f"rank={rank} is no rank: write a positive number.")
    if not config.fitted or config.learning_rate == 0:
        raise ValueError(
            f"The GRADIEND adapter {name!r} changes nothing: {config.remedy} Then choose a learning rate, by steer(…)."
        )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    modules: dict[str, nn.Module] = {}
    kept = lost = 0.0
    left_out: dict[str, float] = {}
    names = {id(innermost(module)): path for path, module in base_modules(base)}
    for layer, parameter, delta in changes_of(base, name):
        energy = float(delta.double().square().sum())
        carriers = layer.owners[parameter]
        if not energy:
            continue
        if delta.dim() != 2 or not all(own == "weight" and is_weight_layer(m) for m, own in carriers):
            left_out[f"{layer.path}.{parameter}"] = energy
            continue
        # A tied weight is changed at each of its modules; Conv1D and Embedding store the transpose.
        stored_by_output = isinstance(carriers[0][0], nn.Linear)
        thin = low_rank(delta if stored_by_output else delta.T, min(rank, *delta.shape))
        kept, lost = kept + thin.kept * energy, lost + (1 - thin.kept) * energy
        for module, _ in carriers:
            transposed = isinstance(module, nn.Linear) != stored_by_output
            modules[names[id(module)]] = module
            factors[names[id(module)]] = (thin.b.T, thin.a.T) if transposed else (thin.a, thin.b)
    if not factors:
        raise ValueError(
            f"The GRADIEND adapter {name!r} changes no linear layer and no embedding, and nothing else fits into a "
            "LoRA. Merge it instead."
        )
    total = kept + lost + sum(left_out.values())
    lora = _write(base, config, folder, modules, factors, {})
    unmergeable = _unmergeable(base, modules, lora_bias=False)
    text = _text(folder, lora, list(factors), unmergeable)
    text += f" It holds {kept / total:.1%} of the squared norm of the edit"
    text += f"; {lost / total:.1%} would need a higher rank" if lost / total > 5e-4 else ""
    if left_out:
        text += (
            f"; {sum(left_out.values()) / total:.1%} is in {len(left_out)} parameters that a LoRA cannot carry (norm "
            f"weights, biases and the like; the first is {next(iter(left_out))!r})"
        )
    return LoraExport(folder, list(factors), unmergeable, f"{text}.", kept / total, list(left_out))


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


def _check_exportable(base: nn.Module, config: ConceptErasureConfig, name: str) -> None:
    if not config.fitted:
        raise ValueError(f"The erasure {name!r} was never fitted: call fit_concept_erasure(model, batches, {name!r}).")
    if any(layer.merged for layer in erasure_layers(base).values()):
        raise ValueError("Erasures are merged into the weights: call unmerge_adapter() before exporting one.")


@contextmanager
def _alone(base: nn.Module, name: str) -> Iterator[None]:
    """Let one erasure act and no other."""
    layers = list(erasure_layers(base).values())
    before = [(layer._active_adapter, layer._disable_adapters, layer.sticky_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [name], False
            layer.sticky_adapters = dict.fromkeys(layer.adapters, False)
        yield
    finally:
        for layer, (active, disabled, sticky) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters, layer.sticky_adapters = active, disabled, sticky


def _changes(plan: MergePlan) -> dict[str, WeightChange]:
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


def _write(
    base: nn.Module,
    config: ChildConfig,
    folder: Path,
    modules: dict[str, nn.Module],
    factors: dict[str, tuple[Tensor, Tensor]],
    shifts: dict[str, Tensor],
) -> LoraConfig:
    """Write a LoRA from its thin matrices, and what it adds to biases."""
    lora = _lora_config(base, config, modules, factors, lora_bias=bool(shifts))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(modules, factors, shifts)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    lora.save_pretrained(str(folder))
    return lora


def _lora_config(
    base: nn.Module,
    config: ChildConfig,
    modules: dict[str, nn.Module],
    factors: dict[str, tuple[Tensor, Tensor]],
    *,
    lora_bias: bool,
) -> LoraConfig:
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT reads these as expressions for the end of a name; the anchor keeps them to the whole of it.
    other = {f"^{name.replace('.', chr(92) + '.')}": rank for name, rank in ranks.items() if rank != usual}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,  # equal to the rank everywhere: the scaling is 1
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=exactly(list(factors), base),
        lora_bias=lora_bias,
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in modules.values()),
        task_type=config.task_type,
        # Without a task, AutoPeftModel finds the class of the base here.
        auto_mapping={"base_model_class": type(base).__name__, "parent_library": type(base).__module__},
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )


def _tensors(
    modules: dict[str, nn.Module], factors: dict[str, tuple[Tensor, Tensor]], shifts: dict[str, Tensor]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        weight = modules[name].get_parameter("weight")
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if isinstance(modules[name], nn.Embedding):
            parts = {"lora_embedding_A": a, "lora_embedding_B": b}
        else:
            parts = {"lora_A.weight": a, "lora_B.weight": b}
        if name in shifts:
            parts["lora_B.bias"] = shifts[name]
        tensors |= {f"{_PREFIX}{name}.{part}": t.to("cpu", dtype).contiguous() for part, t in parts.items()}
    return tensors


def _unmergeable(base: nn.Module, modules: dict[str, nn.Module], *, lora_bias: bool) -> dict[str, str]:
    tied = {name.rpartition(".")[0] for name in shared_weights(base)}
    reasons = {}
    for name, module in modules.items():
        if lora_bias and module._parameters.get("bias") is None:
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
