"""The places where accelerate can keep a model's weights, and the kinds of adapter that are tested there."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.adapters.gradiend import lifecycle as gradiend
from tests.adapters.lifecycle import Cell, Lifecycle
from tests.small_models import ARCHITECTURES, inputs_of, small_batch

NAME = "tried"
MODELS = ("bert", "llama", "t5")
_AUTO_PEFT = {
    "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
}
# The block that is put on disk.
_ON_DISK = {"bert": "encoder.layer.1", "llama": "model.layers.1", "t5": "decoder.block.1"}


def device_map(name: str) -> dict[str, str]:
    """One block on disk, everything else in main memory."""
    block = _ON_DISK[name]
    with torch.device("meta"):
        model = ARCHITECTURES[name].build()
    owners = [n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    # Modules inside an owner go where it goes.
    inside = tuple(f"{owner}." for owner in owners)
    buffers = [n for n, m in model.named_modules() if any(True for _ in m.buffers(recurse=False))]
    kept = [n for n in dict.fromkeys([*owners, *buffers]) if not n.startswith((f"{block}.", *inside))]
    return dict.fromkeys(kept, "cpu") | {block: "disk"}


@dataclass(frozen=True)
class Placement:
    """A way of distributing a model's weights.

    Attributes:
        title: Its name in the tables of the documentation.
        place: Takes a model, the name of its architecture and a folder for weights, and returns the placed model. None
        where weights are distributed while they are loaded.
    """

    title: str
    place: Callable[[Any, str, Path], Any] | None = None

    def __str__(self) -> str:
        return self.title.strip("`").partition("(")[0].partition("`")[0]


def _dispatch(model: Any, name: str, folder: Path) -> Any:
    spread = device_map(name)
    return accelerate.dispatch_model(model, spread, main_device="cpu", offload_dir=folder, force_hooks=True)


def _to_cpu(model: Any, name: str, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def _to_disk(model: Any, name: str, folder: Path) -> Any:
    accelerate.disk_offload(model, folder, execution_device="cpu")
    return model


LOADED = Placement("`from_pretrained(device_map=…)`, cpu and disk")
DISPATCHED = Placement("`dispatch_model`, cpu and disk", _dispatch)
CPU = Placement("`cpu_offload`", _to_cpu)
DISK = Placement("`disk_offload`", _to_disk)
PLACEMENTS = (LOADED, DISPATCHED, CPU, DISK)
ORDERS = ("before", "after")


class Kind:
    """A kind of adapter: plain models, the same models with a fitted adapter, and the adapter's folder.

    Args:
        root: Where models and adapters are saved.
    """

    table: str

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root = root
        self._fitted = functools.cache(self._fit)
        self.outputs = functools.cache(self._outputs)

    def base_folder(self, name: str) -> Path:
        raise NotImplementedError

    def _fit(self, name: str) -> PreTrainedModel:
        raise NotImplementedError

    def base(self, name: str, **kwargs: Any) -> PreTrainedModel:
        return ARCHITECTURES[name].auto.from_pretrained(self.base_folder(name), **kwargs)

    def fitted(self, name: str) -> PreTrainedModel:
        """A new copy of the plain model with the adapter."""
        return copy.deepcopy(self._fitted(name))

    def _outputs(self, name: str, adapted: bool) -> dict[str, Tensor]:
        """The model's outputs on one device, with the adapter or without."""
        return outputs(self.fitted(name) if adapted else self.base(name), name)

    def folder(self, name: str) -> Path:
        """The folder of the adapter; its configuration names the base."""
        folder = self.root / f"{name}-adapter"
        if not folder.exists():
            self.fitted(name).save_pretrained(folder)
        return folder


class Erasure(Kind):
    table = "Offloaded: concept erasure"

    def __init__(self, root: Path, target: str = "norms") -> None:
        super().__init__(root)
        self.lifecycle = Lifecycle(root)
        self.target = target

    def cell(self, name: str) -> Cell:
        # T5 and Llama have linear layers without biases, where only the linear part of an erasure can be merged.
        return Cell(name, self.target, "output", affine=name not in ("t5", "llama") or self.target == "norms")

    def base_folder(self, name: str) -> Path:
        return self.lifecycle.base_folder(name)

    def _fit(self, name: str) -> PreTrainedModel:
        return self.lifecycle.fitted(self.cell(name), NAME)


class Gradiend(Kind):
    table = "Offloaded: GRADIEND"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gradiends = gradiend.Gradiends(root)

    def base_folder(self, name: str) -> Path:
        return self.gradiends.base_folder(name)

    def _fit(self, name: str) -> PreTrainedModel:
        return self.gradiends.fitted(name, name=NAME, task_type=ARCHITECTURES[name].task_type)


class Lora(Gradiend):
    table = "Offloaded: LoRA, for comparison"

    def _fit(self, name: str) -> PreTrainedModel:
        torch.manual_seed(0)
        model = self.base(name)
        model.add_adapter(gradiend.lora(task_type=ARCHITECTURES[name].task_type), adapter_name=NAME)
        return model.eval()


@dataclass(frozen=True)
class Case:
    """One adapter on one placed model.

    Attributes:
        kind: The adapter.
        name: The architecture.
        placement: Where the weights are.
        order: Whether the adapter is attached `"before"` or `"after"` the weights are placed.
        folder: An empty folder.
    """

    kind: Kind
    name: str
    placement: Placement
    order: str
    folder: Path

    @property
    def wanted(self) -> dict[str, Tensor]:
        """The outputs of the plain model with the adapter."""
        return self.kind.outputs(self.name, True)

    @property
    def plain(self) -> dict[str, Tensor]:
        return self.kind.outputs(self.name, False)

    @property
    def adapter(self) -> str:
        """The adapter's name, which the caller cannot choose where the adapter is loaded together with its base."""
        return "default" if self.placement is LOADED and self.order == "before" else NAME

    def new_folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        return folder

    def placed_base(self, model: Any = None, folder: str = "offloaded") -> Any:
        """The base model, or `model` where it is given, with its weights placed."""
        if self.placement.place is None:
            return self.kind.base(self.name, **self._spread(folder))
        base = self.kind.base(self.name) if model is None else model
        return self.placement.place(base, self.name, self.new_folder(folder))

    def model(self) -> Any:
        """The placed model with the adapter."""
        if self.order == "after":
            model = self.placed_base()
            model.load_adapter(self.kind.folder(self.name), adapter_name=NAME)
        elif self.placement is LOADED:
            auto = ARCHITECTURES[self.name].auto
            model = auto.from_pretrained(self.kind.folder(self.name), **self._spread("offloaded"))
        else:
            model = self.placed_base(self.kind.fitted(self.name))
        return model

    def peft_model(self) -> peft.PeftModel:
        """The same as a `PeftModel`, which can merge."""
        folder = self.kind.folder(self.name)
        if self.order == "after":
            return peft.PeftModel.from_pretrained(self.placed_base(), folder, adapter_name=NAME)
        if self.placement is LOADED:
            auto = _AUTO_PEFT[ARCHITECTURES[self.name].task_type or ""]
            return auto.from_pretrained(folder, adapter_name=NAME, **self._spread("offloaded"))
        model = peft.PeftModel.from_pretrained(self.kind.base(self.name), folder, adapter_name=NAME)
        self.placed_base(model.get_base_model())
        return model

    def _spread(self, folder: str) -> dict[str, Any]:
        return {"device_map": device_map(self.name), "offload_folder": self.new_folder(folder)}


def outputs(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Every floating-point tensor that a model returns; its weights may be offloaded."""
    with torch.no_grad():
        output = model(**inputs_of(small_batch(name, seed=5)))
    return {k: v for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()}


def has_placeholders(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())
