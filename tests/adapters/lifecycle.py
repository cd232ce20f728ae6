"""Fitted adapters for the tests of their lifecycle, made once, and the state that a failed call must not change."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from tests.small_models import (
    ARCHITECTURES,
    LABELS,
    SITES,
    TARGETS,
    Architecture,
    outputs_of,
    same,
    small_batch,
    small_model,
)

NAME = "no_gender"
# The tolerance for outputs after two blocks. In float32 a merged weight is rounded once (2^-24 relative); sums over 64
# columns and the norms multiply that by less than 100. In float64 the same sums leave 1e-12.
MERGE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Cell:
    """The place of an erasure in one test: an architecture, the modules, and their input or output."""

    architecture: str
    target: str
    site: str
    affine: bool = True

    def __str__(self) -> str:
        return f"{self.architecture}-{self.target}-{self.site}" + ("" if self.affine else "-linear")

    @property
    def parts(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    @property
    def refused(self) -> bool:
        """Whether it is refused: token ids are not an activation, but the pixels that go into ViT's embeddings are."""
        return self.target == "embeddings" and self.site == "input" and self.parts.is_text

    @property
    def next_to_weight(self) -> str:
        """Which of two adapters is next to the weight they are merged into: the one that acts `"first"`, or `"last"`.

        At the output of a layer with a weight it is the first one; elsewhere the weight comes after both.
        """
        has_weight = self.target == "all-linear" or (self.target == "embeddings" and self.architecture != "vit")
        return "first" if self.site == "output" and has_weight else "last"

    @property
    def merge_refusal(self) -> str | None:
        """A pattern for the message that refuses a merge; None where merging is exact."""
        needs_bias = self.parts.bias_free and self.affine
        if self.target == "all-linear":
            return "would need a bias" if needs_bias else None
        if (self.target, self.site) == ("norms", "output"):
            # No decoder has a bias in its head.
            return _NORM_REFUSALS[self.architecture] or ("would need a bias" if self.affine else None)
        if (self.target, self.site) == ("attention", "input"):
            if self.architecture in ("bert", "roberta"):  # their attention has its residual connection inside
                return "goes into `add`"
            return "would need a bias" if needs_bias else None
        if self.target == "norms":
            return r"goes into `\w*Norm\w*`"
        if self.target == "attention":
            return "goes into `add`"
        if self.target == "embeddings" and self.architecture != "vit":
            return "is shared by" if self.parts.tied else None
        return "goes into `"


# Why erasures at the output of all norms cannot be merged, affine or not; None where they can.
_NORM_REFUSALS = {
    "bert": "goes into `add`",
    "distilbert": "goes into `add`",
    "roberta": "goes into `add`",
    "gpt2": "the weight of 'lm_head' is shared by",
    "gpt_neox": None,
    "llama": None,
    "qwen3": None,
    "gemma": "the weight of 'lm_head' is shared by",
    "t5": "'encoder.final_layer_norm' .* is part of what T5ForConditionalGeneration returns",
    "vit": "'layernorm' .* is part of what ViTModel returns",
}

ALL_CELLS = [Cell(a, t, s) for a in ARCHITECTURES for t in TARGETS for s in SITES]
CELLS = [cell for cell in ALL_CELLS if not cell.refused]
REFUSED = [cell for cell in ALL_CELLS if cell.refused]
# The places where an erasure without its affine part can be merged into layers without biases.
_MERGEABLE = [("all-linear", "output"), ("all-linear", "input"), ("norms", "output"), ("attention", "input")]
LINEAR_CELLS = [Cell(a, t, s, affine=False) for a in ARCHITECTURES for t, s in _MERGEABLE]


def _cell(architecture: str, target: str, site: str) -> Cell:
    """The cell; with the output instead of the input where the input is refused."""
    cell = Cell(architecture, target, site)
    return Cell(architecture, target, "output") if cell.refused else cell


def _pairwise() -> list[Cell]:
    """Each architecture with each target, and the sites in turn: every pair of two of the three occurs."""
    return [
        _cell(architecture, target, SITES[(row + column) % 2])
        for row, architecture in enumerate(ARCHITECTURES)
        for column, target in enumerate(TARGETS)
    ]


def _every_place() -> list[Cell]:
    """Each architecture with two targets, one at each site: every pair of target and site occurs."""
    return [
        _cell(architecture, TARGETS[(row + 2 * at) % len(TARGETS)], SITES[(row // len(TARGETS) + at) % 2])
        for row, architecture in enumerate(ARCHITECTURES)
        for at in (0, 1)
    ]


PAIRWISE = _pairwise()
# For verbs that act on each layer alone, in whichever model it is: layers differ only in the kind of their host module
# and the side of it. Forward passes, saves, loads and merges run on every cell.
EVERY_PLACE = _every_place()


class Lifecycle:
    """Small models and adapters fitted to them. Every model is a copy, which a test may change.

    Args:
        root: Where models and adapters are saved.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fitted = functools.cache(self._fit)
        self._loaded = functools.cache(self._load)
        self._folders: dict[Any, Path] = {}

    def base_folder(self, architecture: str) -> Path:
        """A folder with the architecture's small model."""
        folder = self.root / architecture
        if not folder.exists():
            small_model(architecture).save_pretrained(folder)
        return folder

    def base(self, architecture: str) -> PreTrainedModel:
        """The small model, loaded from its folder."""
        return copy.deepcopy(self._loaded(architecture))

    def fitted(self, cell: Cell, name: str = NAME, seed: int = 100) -> PreTrainedModel:
        """The small model with a fitted adapter; another `seed` gives another eraser."""
        return copy.deepcopy(self._fitted(cell, name, seed))

    def folder(self, cell: Cell, name: str = NAME, seed: int = 100) -> Path:
        """The folder that `save_pretrained` wrote for `fitted`; tests must not change it."""
        key = (cell, name, seed)
        if key not in self._folders:
            self._folders[key] = self.root / f"{cell}-{name}-{seed}"
            self._fitted(*key).save_pretrained(self._folders[key])
        return self._folders[key]

    def _load(self, architecture: str) -> PreTrainedModel:
        return ARCHITECTURES[architecture].auto.from_pretrained(self.base_folder(architecture))

    def _fit(self, cell: Cell, name: str, seed: int) -> PreTrainedModel:
        model = self.base(cell.architecture)
        model.add_adapter(config_of(cell), adapter_name=name)
        fit(model, cell.architecture, name, seed)
        return model


def config_of(cell: Cell, **fields: Any) -> ConceptErasureConfig:
    """An unfitted configuration."""
    where = {"target_modules": cell.parts.target(cell.target), "site": cell.site, "affine": cell.affine}
    kind = {"concept": "gender", "labels": LABELS, "task_type": cell.parts.task_type}
    return ConceptErasureConfig(**{**where, **kind, **fields})


def fit(model: nn.Module, architecture: str, name: str = NAME, seed: int = 100) -> None:
    """Fit the adapter on one batch; fits on several batches have tests of their own."""
    batches = [small_batch(architecture, seed=seed, rows=48)]
    fit_concept_erasure(model, batches, name, sequential=False, progress=False)


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
            "hooks": {
                name: (len(module._forward_hooks), len(module._forward_pre_hooks))
                for name, module in model.named_modules()
            },
            "peft_config": {
                name: config.to_dict() for name, config in (getattr(model, "peft_config", None) or {}).items()
            },
            "config": model.config.to_dict(),
            "has peft_config": hasattr(model, "peft_config"),
            "_hf_peft_config_loaded": getattr(model, "_hf_peft_config_loaded", None),
            "erasures": {
                path: (layer.adapters, layer.active_adapters, layer.merged_adapters[:], layer.disable_adapters)
                for path, layer in erasure_layers(model).items()
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


def state_of(model: nn.Module, architecture: str) -> State:
    return State(model, small_batch(architecture, seed=7))
