"""Fitted GRADIEND adapters for the tests of their lifecycle, and an oracle that edits weights by hand."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_erasure.adapters import GradiendConfig, gradiend_layers, set_features, steer, targeted_parameters
from hf_erasure.gradiend import Feature, FeatureDecoder, FeatureEncoder
from tests.small_models import ARCHITECTURES, outputs_of, roughen, same, small_batch, small_model

NAME = "gender"
CLASSES = ["female", "male"]
PAIR = ("female", "male")
# Llama with its own head and with a head tied to the embedding, GPT-2 with Conv1D and a tied head, an encoder, an
# encoder-decoder in which four modules own one weight, and a model without tokens.
MODELS = ("llama", "tied_llama", "gpt2", "bert", "t5", "vit")
DENSITIES = (1.0, 1e-2, 1e-6)
# Large enough to move outputs by several per cent with features of unit variance.
RATE = 0.05
# The tolerance for outputs after two blocks: an edit in another order of float32 operations differs by one rounding in
# each weight (2^-24 relative), which sums over 64 columns and norms multiply by less than 200.
ORACLE_TOLERANCE = 2e-5
# The weights that are not a part of the base model: heads and poolers.
LEFT_OUT = {"llama": {"lm_head.weight"}, "bert": {"pooler.dense.weight", "pooler.dense.bias"}}
LEFT_OUT["vit"] = LEFT_OUT["bert"]


@functools.cache
def _tied_llama() -> PreTrainedModel:
    config = copy.deepcopy(small_model("llama").config)
    config.tie_word_embeddings = True
    return roughen(hf.LlamaForCausalLM(config), torch.Generator().manual_seed(5)).eval()


def batch_of(model: str, **kwargs: Any) -> dict[str, Tensor]:
    return small_batch("llama" if model == "tied_llama" else model, **kwargs)


def auto_class(model: str) -> Any:
    return ARCHITECTURES["llama" if model == "tied_llama" else model].auto


def feature_of(parameters: dict[str, nn.Parameter], seed: int = 0, density: float = 1.0) -> Feature:
    """A feature drawn at random, of unit variance in every part."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}

    def draw() -> dict[str, Tensor]:
        return {name: torch.randn(shape.numel(), generator=generator) for name, shape in shapes.items()}

    everywhere: dict[str, Tensor | None] = dict.fromkeys(shapes)
    encoder = FeatureEncoder(draw(), everywhere, shapes, scale=0.5, bias=0.25, unit_norm=True)
    decoder = FeatureDecoder(draw(), draw(), everywhere, shapes)
    return Feature(encoder.prune(density), decoder.prune(density))


class Gradiends:
    """Small models and adapters fitted to them. Every model is a copy, which a test may change.

    Args:
        root: Where models and adapters are saved.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fitted = functools.cache(self._fit)
        self._loaded = functools.cache(self._load)
        self._folders: dict[Any, Path] = {}

    def base_folder(self, model: str) -> Path:
        folder = self.root / model
        if not folder.exists():
            (_tied_llama() if model == "tied_llama" else small_model(model)).save_pretrained(folder)
        return folder

    def base(self, model: str) -> PreTrainedModel:
        """The small model, loaded from its folder."""
        return copy.deepcopy(self._loaded(model))

    def fitted(
        self, model: str, density: float = 1e-2, *, name: str = NAME, seed: int = 0, rate: float = RATE, **fields: Any
    ) -> PreTrainedModel:
        """The small model with a fitted adapter that acts; another `seed` gives another feature."""
        return copy.deepcopy(self._fitted(model, density, name, seed, rate, tuple(sorted(fields.items()))))

    def folder(self, model: str, density: float = 1e-2, **kwargs: Any) -> Path:
        """The folder that `save_pretrained` wrote for `fitted`; tests must not change it."""
        key = (model, density, *sorted(kwargs.items()))
        if key not in self._folders:
            self._folders[key] = self.root / f"adapter-{len(self._folders)}"
            self.fitted(model, density, **kwargs).save_pretrained(self._folders[key])
        return self._folders[key]

    def _load(self, model: str) -> PreTrainedModel:
        return auto_class(model).from_pretrained(self.base_folder(model))

    def _fit(self, model: str, density: float, name: str, seed: int, rate: float, fields: tuple) -> PreTrainedModel:
        base = self.base(model)
        base.add_adapter(config_of(density, **dict(fields)), adapter_name=name)
        fit(base, name, seed, rate)
        return base


def config_of(density: float = 1e-2, **fields: Any) -> GradiendConfig:
    return GradiendConfig(**{"feature": "gender", "classes": CLASSES, "density": density, **fields})


def fit(model: nn.Module, name: str = NAME, seed: int = 0, rate: float = RATE) -> Feature:
    """Give an adapter a feature, and a learning rate with which it acts."""
    feature = feature_of(targeted_parameters(model, name), seed)
    set_features(model, name, [feature], [PAIR])
    steer(model, name, learning_rate=rate)
    return feature


def edit_by_hand(model: nn.Module, feature: Feature, density: float, factor: float, rate: float) -> nn.Module:
    """The model with `W + rate * (factor * Wd + bd)` written into its weights, by the formula and in float64.

    The entries to change are found by sorting all of them.
    """
    weight, bias, shapes = feature.decoder.weight, feature.decoder.bias, feature.decoder.shapes
    scores = torch.cat([w.abs() for w in weight.values()])
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.argsort(descending=True, stable=True)[: -int(-density * len(scores) // 1)]] = True
    parameters = dict(model.named_parameters())
    start = 0
    for name, shape in shapes.items():
        count = shape.numel()
        delta = rate * (factor * weight[name].double() + bias[name].double()) * keep[start : start + count]
        start += count
        with torch.no_grad():
            parameters[name].copy_((parameters[name].double() + delta.view(shape)).to(parameters[name].dtype))
    return model


def lora(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "init_lora_weights": False, "target_modules": "all-linear", **fields})


class State:
    """The visible state of a model, to compare before and after a call that must not change it."""

    def __init__(self, model: Any, batch: dict[str, Tensor]) -> None:
        self.values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.random.fork_rng():
            torch.manual_seed(0)  # parts of the model may be in training mode, with dropout
            self.outputs = outputs_of(model, batch)
        self.flags = {
            "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
            "training": {name: module.training for name, module in model.named_modules()},
            "modules": {name: type(module).__name__ for name, module in model.named_modules()},
            "hidden": {
                name: sorted(module.__dict__.keys() & {"forward", "_old_forward", *module._parameters})
                for name, module in model.named_modules()
            },
            "hooks": {
                name: (len(module._forward_hooks), len(module._forward_pre_hooks))
                for name, module in model.named_modules()
            },
            "peft_config": {n: c.to_dict() for n, c in (getattr(model, "peft_config", None) or {}).items()},
            "config": model.config.to_dict(),
            "_hf_peft_config_loaded": getattr(model, "_hf_peft_config_loaded", None),
            "layers": {
                path: (layer.adapters, layer.active_adapters, [*layer.merged_adapters], layer.disable_adapters)
                for path, layer in gradiend_layers(model).items()
            },
        }

    def assert_same(self, other: State) -> None:
        """Fail with the first difference."""
        for what, value in self.flags.items():
            assert other.flags[what] == value, what
        assert list(other.values) == list(self.values)
        for name, value in self.values.items():
            assert torch.equal(other.values[name], value), name
        assert same(other.outputs, self.outputs)


def state_of(model: nn.Module, name: str) -> State:
    return State(model, batch_of(name, seed=7))
