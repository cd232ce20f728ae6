"""The same verbs for both kinds of adapter, and for a stock LoRA to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_erasure import fit_concept_erasure
from hf_erasure.adapters.common.layer import adapter_children
from tests.adapters import lifecycle as erasures
from tests.adapters.gradiend import lifecycle as gradiends
from tests.small_models import ARCHITECTURES, outputs_of, same, small_batch, small_batches, small_model

MODELS = ("bert", "gpt2", "llama", "t5", "vit")
KINDS = ("erasure", "GRADIEND", "LoRA")
OURS = KINDS[:2]
TABLE = "PEFT's verbs"
# Older releases of transformers do not load the copies of `modules_to_save`.
LOADS_COPIES = Version(hf.__version__) >= Version("5.15")


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        name: Its name in the tables of the documentation.
        config: Makes a configuration from its fields.
        fit: Fits a new adapter, so that it acts; another seed gives another adapter.
    """

    name: str
    config: Callable[..., peft.PeftConfig]
    fit: Callable[[nn.Module, str, str, int], None]

    def add(self, model: Any, architecture: str, name: str, seed: int = 0, **fields: Any) -> None:
        """Add a fitted adapter to a transformers model or a `PeftModel`."""
        config = self.config(**fields)
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model.add_adapter(config, name)
        self.fit(model, architecture, name, seed)

    def added(self, architecture: str, *names: str, **fields: Any) -> PreTrainedModel:
        """The small model with a different fitted adapter for each name; the last one is active."""
        model = base(architecture)
        for seed, name in enumerate(names):
            self.add(model, architecture, name, seed, **fields)
        return model

    def wrapped(self, architecture: str, *names: str, **fields: Any) -> peft.PeftModel:
        """The same as a `PeftModel`; the first one is active."""
        fields.setdefault("task_type", ARCHITECTURES[architecture].task_type)
        model = peft.get_peft_model(base(architecture), self.config(**fields), names[0])
        for seed, name in enumerate(names):
            if seed:
                model.add_adapter(name, self.config(**fields))
            self._fit_active(model, architecture, name, seed)
        model.set_adapter(names[0])
        return model.eval()

    def _fit_active(self, model: peft.PeftModel, architecture: str, name: str, seed: int) -> None:
        model.set_adapter(name)
        self.fit(model, architecture, name, seed)


def _erasure(**fields: Any) -> peft.PeftConfig:
    return erasures.config_of(erasures.Cell("bert", "all-linear", "output"), **{"task_type": None, **fields})


def _gradiend(**fields: Any) -> peft.PeftConfig:
    return gradiends.config_of(1.0, **{"target_modules": "all-linear", **fields})


def _lora(**fields: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**{"r": 2, "init_lora_weights": False, "target_modules": "all-linear", **fields})


def _fit_erasure(model: nn.Module, architecture: str, name: str, seed: int) -> None:
    batches = small_batches(architecture, count=1, seed=100 + seed)
    fit_concept_erasure(model, batches, name, sequential=False, progress=False)


def _fit_gradiend(model: nn.Module, architecture: str, name: str, seed: int) -> None:
    gradiends.fit(model, name, seed)


def _fit_lora(model: nn.Module, architecture: str, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith((f"lora_A.{name}.weight", f"lora_B.{name}.weight")):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


OF = {
    "erasure": Kind("erasure", _erasure, _fit_erasure),
    "GRADIEND": Kind("GRADIEND", _gradiend, _fit_gradiend),
    "LoRA": Kind("LoRA", _lora, _fit_lora),
}


def base(architecture: str) -> PreTrainedModel:
    """A copy of the small model, which a test may change."""
    return copy.deepcopy(small_model(architecture))


def outputs(model: nn.Module, architecture: str) -> dict[str, Tensor]:
    return outputs_of(model, small_batch(architecture, seed=7))


def as_base(model: nn.Module, architecture: str) -> bool:
    """Whether a model's outputs are those of the model without adapters, to the bit."""
    return same(outputs(model, architecture), outputs(small_model(architecture), architecture))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def children(model: nn.Module, name: str | None = None) -> list[str]:
    """The paths of the modules that have an adapter of ours."""
    return [child.path for child in adapter_children(model, name)]


def files_in(folder: Path) -> list[str]:
    """The files of adapters in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("adapter_*"))
