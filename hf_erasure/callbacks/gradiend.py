"""Watch a feature in the gradients of a fine-tuning run, and keep it out of the weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerState
from transformers.pytorch_utils import Conv1D

from hf_erasure.adapters import GradiendConfig, features_of, targeted_parameters
from hf_erasure.adapters.common.layer import innermost
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.gradiend import FeatureDecoder, FeatureEncoder
from hf_erasure.gradiend.features import dense

from .trainer import LoggingCallback, is_sharded

MODES = ("monitor", "guard")
# A product of two matrices is not linear, so one correction is not exact; two corrections leave the square of a step.
CORRECTIONS = 2


class GradiendCallback(LoggingCallback):
    """Reads a feature from the gradient of every training step; in mode `"guard"` also keeps updates from moving it.

    *monitor*: the gradient that the optimizer is about to use is encoded. Near +1 the step teaches the first class of
    the adapter's pair, near −1 the second. The mean since the last log is logged as `<adapter>_encoded`. The adapter
    needs its encoder (`keep_encoder=True`).

    *guard*: after each step of any optimizer, the component along the decoder's direction Wd is taken out of the
    weights' change, separately for every output of every layer (a row of its weight). A single component for all
    weights together would be one direction among millions; in measurements it keeps out a fraction of what the rows
    do. A sparse adapter changes only its own entries. How much was taken out is logged as `<adapter>_guarded`: the
    mean cosine between change and direction. The model still learns what the data teach about the feature in other
    directions (recipes/guarded_finetuning measures how much).

    Both modes work for full fine-tuning and for LoRA. Under a LoRA a weight has no gradient of its own; the change of
    the weight by the LoRA's matrices takes its place. All rows share these matrices, so a guard acts on a whole weight.
    What else an adapter may train there, such as the magnitudes of DoRA, is refused.

    Args:
        adapter_name: A fitted GRADIEND adapter of the model.
        mode: `"monitor"` or `"guard"`; a guard also monitors if it has an encoder.
        log_steps: Encode once in this many optimizer steps.

    Raises:
        ValueError: If the mode is unknown.
    """

    def __init__(self, adapter_name: str = "default", *, mode: str = "monitor", log_steps: int = 1) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not known; choose one of {', '.join(map(repr, MODES))}.")
        if log_steps < 1:
            raise ValueError(f"log_steps={log_steps}: give a positive number of steps.")
        super().__init__(adapter_name, {"encoded": [], "guarded": []})
        self.mode, self.log_steps = mode, log_steps
        self._encoder: FeatureEncoder | None = None
        self._weights: list[TrainedWeight] = []
        self._guard: _Guard | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Find the adapter, and the trained weights that it knows. Raises `ValueError` if they cannot be read."""
        super().on_train_begin(args, state, control, model=model)
        if is_sharded():
            raise ValueError(
                "GradiendCallback reads whole gradients and weights, and here they are sharded (FSDP, DeepSpeed): "
                "train with DDP, or on one device."
            )
        stored = features_of(model, self.adapter_name)
        config = adapter_of(model, self.adapter_name, GradiendConfig).config
        feature = stored[config.pair_index(config.pair)]
        self._encoder = feature.encoder
        if feature.encoder is None and self.mode == "monitor":
            raise ValueError(
                f"The GRADIEND adapter {self.adapter_name!r} holds no encoder to monitor with: fit it with "
                "GradiendConfig(keep_encoder=True), or use mode='guard'."
            )
        if args.fp16 and not args.max_grad_norm and feature.encoder is not None and not feature.encoder.unit_norm:
            raise ValueError(
                f"With fp16=True and max_grad_norm={args.max_grad_norm} gradients stay multiplied by the loss scale, "
                f"and the encoder of {self.adapter_name!r} reads their size: set max_grad_norm, or bf16=True."
            )
        self._weights = trained_weights(model, self.adapter_name)
        if self.mode == "guard":
            self._guard = _Guard(self._weights, feature.decoder)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Read the gradient that the optimizer is about to use."""
        if self._encoder is not None and state.global_step % self.log_steps == 0:
            gradients = {name: torch.zeros(shape) for name, shape in self._encoder.shapes.items()} | {
                weight.name: weight.gradient() for weight in self._weights if weight.name in self._encoder.shapes
            }
            # Where a gradient overflows in float16, the step is left out, and the loss is scaled down.
            if not args.fp16 or all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
                self.memory["encoded"].append(self._encoder.encode(gradients))
        if self._guard is not None:
            self._guard.record_weights()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the feature's direction out of what the optimizer has done."""
        if self._guard is not None:
            self.memory["guarded"].append(self._guard.remove_component())

    def figures(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        """The means since the last log."""
        found = {}
        for name, values in self.memory.items():
            if values:
                found[f"{self.adapter_name}_{name}"] = sum(values) / len(values)
                values.clear()
        return found


# ---- weights that are trained, themselves or by a LoRA ---------------------------------------------------------------


# A `(rank, in)`, B `(out, rank)`, and the factor of `B A`, which a LoRA adds to the weight.
LoraMatrices = tuple[nn.Parameter, nn.Parameter, float]


@dataclass
class TrainedWeight:
    """One weight of the base model, by its full name, that training changes: the weight itself, its `lora`, or both."""

    name: str
    weight: nn.Parameter
    lora: list[LoraMatrices]
    transposed: bool = False  # kept as (in, out)

    def oriented(self, change: Tensor) -> Tensor:
        """Transpose a change from `(out, in)` to the orientation of the weight, or back, where the two differ."""
        return change.T if self.transposed else change

    def rows(self, index: Tensor | None) -> Tensor:
        """`(count,)` int64: the layer's output to which each entry, or each entry at `index`, belongs."""
        weight = self.weight
        if index is None:
            index = torch.arange(weight.numel(), device=weight.device)
        if weight.dim() < 2:
            return torch.zeros_like(index)
        return index % weight.shape[-1] if self.transposed else index // weight[0].numel()

    def value(self) -> Tensor:
        """`(shape of the weight)`: what training changes, the weight, what its LoRA adds, or their sum."""
        products = (scaling * (b.detach().float() @ a.detach().float()) for a, b, scaling in self.lora)
        own = self.weight.detach() if self.weight.requires_grad else torch.zeros(())
        return own + self.oriented(sum(products, torch.zeros(()))) if self.lora else own

    def gradient(self) -> Tensor:
        """`(shape of the weight)`: its gradient; or, to first order, its change when its LoRA moves by gradients."""
        if self.weight.requires_grad:
            return _gradient_of(self.weight)
        found = torch.zeros(())
        for a, b, scaling in self.lora:
            by_a, by_b = _gradient_of(a).float(), _gradient_of(b).float()
            found = found + scaling * (by_b @ a.detach().float() + b.detach().float() @ by_a)
        return self.oriented(found)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def trained_weights(model: nn.Module, adapter_name: str) -> list[TrainedWeight]:
    """The weights that a GRADIEND adapter targets and that are trained.

    Raises:
        ValueError: If there are none, or an adapter trains more than the two matrices of a LoRA at one of them.
    """
    found = []
    modules = dict(adapter_of(model, adapter_name, GradiendConfig).owner.named_modules())
    for name, weight in targeted_parameters(model, adapter_name).items():
        path, _, own = name.rpartition(".")
        module: Any = modules.get(path)
        lora = _trained_matrices(path, module) if isinstance(module, BaseTunerLayer) else []
        if weight.requires_grad or (lora and own == "weight"):
            # Behind a LoRA's A an embedding, which has a row for each of its inputs, is like a layer kept as (in, out).
            kinds = (Conv1D, nn.Embedding) if lora else (Conv1D,)
            is_transposed = module is not None and isinstance(innermost(module), kinds)
            found.append(TrainedWeight(name, weight, lora if own == "weight" else [], is_transposed))
    if not found:
        raise ValueError(
            f"Training changes none of the weights that the GRADIEND adapter {adapter_name!r} knows: there is nothing "
            "to watch. Train the model's own weights, or put a LoRA on linear layers that the adapter targets."
        )
    return found


def _trained_matrices(path: str, module: Any) -> list[LoraMatrices]:
    """The matrices of the LoRAs that are trained on a linear layer or an embedding."""
    found: list[LoraMatrices] = []
    if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
        layer: Any = module
        stores = ((layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B))
        for (a, b), name in itertools.product(stores, layer.active_adapters):
            if name in a and name not in layer.lora_variant:
                one, two = (getattr(store[name], "weight", store[name]) for store in (a, b))
                if one.dim() == 2 and (one.requires_grad or two.requires_grad):
                    found.append((one, two, layer.scaling[name]))
    known = {id(p) for p in innermost(module).parameters()} | {id(p) for a, b, _ in found for p in (a, b)}
    for name, parameter in module.named_parameters():
        acts = not {*name.split(".")}.isdisjoint(module.active_adapters)
        if acts and parameter.requires_grad and id(parameter) not in known:
            raise ValueError(
                "GradiendCallback can only read what the two matrices of a LoRA add to a linear layer or an embedding, "
                f"and at {path!r} an adapter trains {name!r} in another way: train a LoRA without DoRA, lora_bias and "
                f"target_parameters there, or fit the GRADIEND adapter with exclude_modules=[{path!r}]."
            )
    return found


class _Guard:
    """Takes the component along the decoder's Wd out of every change of the weights."""

    def __init__(self, weights: list[TrainedWeight], decoder: FeatureDecoder) -> None:
        self.weights = [w for w in weights if w.name in decoder.weight and decoder.weight[w.name].numel()]
        if not self.weights:
            raise ValueError("The adapter changes none of the trained weights: there is nothing to guard.")
        found = {w.name: (decoder.index[w.name], w.weight.device) for w in self.weights}
        self.index = {name: None if i is None else i.to(device, torch.long) for name, (i, device) in found.items()}
        self.direction = {w.name: decoder.weight[w.name].to(w.weight.device, torch.float32) for w in self.weights}
        self.norm = math.sqrt(sum(float(d.double().square().sum()) for d in self.direction.values()))
        self.recorded: dict[str, Tensor] = {}
        # Parameter in half precision → what rounding has left out of its changes.
        self.remainders: dict[nn.Parameter, Tensor] = {}

    def record_weights(self) -> None:
        """Keep a copy of the weights, at the entries of the direction."""
        self.recorded = {w.name: self._values(w) for w in self.weights}

    def remove_component(self) -> float:
        """Take the component out; returns the cosine between the change and the direction before that."""
        along = size = 0.0
        for weight in self.weights:
            change = self._values(weight) - self.recorded[weight.name]
            along += float((change * self.direction[weight.name]).double().sum())
            size += float(change.double().square().sum())
            if not weight.weight.requires_grad:
                for _ in range(CORRECTIONS):
                    self._correct_lora(weight)
            else:
                self._correct_rows(weight, change)
        self.recorded = {}
        return along / (self.norm * math.sqrt(size)) if size > 0 else 0.0

    def _values(self, weight: TrainedWeight) -> Tensor:
        """`(count,)` float32: the weight, or what its LoRA adds, at the entries of the direction."""
        flat, index = weight.value().reshape(-1).float(), self.index[weight.name]
        return flat.clone() if index is None else flat[index]

    def _correct_rows(self, weight: TrainedWeight, change: Tensor) -> None:
        """Take the component out of every output of the layer; a norm or a bias is one row."""
        direction, index = self.direction[weight.name], self.index[weight.name]
        rows = weight.rows(index)
        count = int(rows.max()) + 1
        along = change.new_zeros(count).index_add_(0, rows, change * direction)
        squares = change.new_zeros(count).index_add_(0, rows, direction.square())
        share = along / squares.clamp_min(torch.finfo(torch.float32).tiny)
        self._add_change(weight.weight, -share[rows] * direction, index)

    def _correct_lora(self, weight: TrainedWeight) -> None:
        """Move a LoRA's matrices in the steepest direction, until to first order no component is left."""
        direction, index = self.direction[weight.name], self.index[weight.name]
        along = float(((self._values(weight) - self.recorded[weight.name]) * direction).double().sum())
        steps: list[tuple[nn.Parameter, Tensor]] = []
        toward = weight.oriented(dense(direction, index, weight.weight.numel()).view_as(weight.weight))
        for a, b, scaling in weight.lora:
            steps.append((b, scaling * toward @ a.detach().float().T))
            steps.append((a, scaling * b.detach().float().T @ toward))
        steps = [(parameter, step) for parameter, step in steps if parameter.requires_grad]
        total = sum(float(step.double().square().sum()) for _, step in steps)
        for parameter, step in steps if total > 0 else ():
            self._add_change(parameter, -along / total * step, None)

    @torch.no_grad()
    def _add_change(self, parameter: nn.Parameter, change: Tensor, index: Tensor | None) -> None:
        """Add a change to a parameter, or to its entries at `index`.

        In half precision most of a change may be below the spacing of the weights: what is rounded away is kept, and
        added with the next change.
        """
        data = parameter.data if index is None else parameter.data.view(-1)
        old = data if index is None else data[index]
        wide = torch.promote_types(old.dtype, change.dtype)
        change = change.view_as(old).to(wide) + self.remainders.get(parameter, 0.0)
        new = (old.to(wide) + change).to(old.dtype)
        if old.dtype != wide:
            self.remainders[parameter] = change - (new.to(wide) - old.to(wide))
        data[... if index is None else index] = new
