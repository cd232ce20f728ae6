"""Checks of an adapter on a wrapped or sharded model, which several processes run; each writes a file of results.

The folder that `main` is given holds a base model and adapters of both kinds. Every process compares with a plain model
of its own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import torch.distributed as dist
import transformers as hf
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_erasure.adapters.common.layer import adapter_children
from tests.adapters.gradiend.lifecycle import lora
from tests.small_models import inputs_of, small_batch

NAME, LORA = "tried", "learning"
KINDS = ("erasure", "gradiend")
WAYS = ("ddp", "ddp of a PeftModel", "accelerate ddp", "fsdp2", "accelerate fsdp2")
RATE = 0.1


class Process:
    """The checks of one process.

    Args:
        way: How the model is wrapped.
        folder: A folder that has `base`, and an adapter for each kind.
        kind: The kind of adapter.
    """

    def __init__(self, way: str, folder: Path, kind: str) -> None:
        self.way, self.folder, self.kind = way, folder, kind
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.is_sharded = "fsdp2" in way

    # ---- models ------------------------------------------------------------------------------------------------------

    def base(self) -> Any:
        return hf.AutoModelForCausalLM.from_pretrained(self.folder / "base").eval()

    def adapted(self) -> Any:
        """A plain model with the adapter."""
        model = self.base()
        if self.way == "ddp of a PeftModel":
            return peft.PeftModel.from_pretrained(model, self.folder / self.kind, adapter_name=NAME)
        model.load_adapter(self.folder / self.kind, adapter_name=NAME)
        return model

    @functools.cached_property
    def alone(self) -> Any:
        """A plain model with the adapter that is not wrapped or trained, to compare with."""
        return self.adapted()

    @functools.cached_property
    def wanted(self) -> Tensor:
        return self.outputs(self.alone)

    @functools.cached_property
    def plain(self) -> Tensor:
        return self.outputs(self.base())

    def wrapped(self, model: Any, optimizer: Any = None) -> Any:
        """The model as this way wraps it; accelerate needs its optimizer too."""
        if self.way.startswith("ddp"):
            return DistributedDataParallel(model)
        if self.way == "fsdp2":
            for block in model.model.layers:
                fully_shard(block)
            fully_shard(model)
            return model
        self.accelerator = accelerator_of(self.way)
        if optimizer is None:
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        return self.accelerator.prepare(model, optimizer)[0]

    def inner(self, wrapped: Any) -> Any:
        return wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped

    def outputs(self, model: nn.Module, rank: int | None = None) -> Tensor:
        """The logits for the batch of one process, by default this one."""
        with torch.no_grad():
            return model(**self.inputs(self.rank if rank is None else rank)).logits.float().cpu()

    def inputs(self, rank: int) -> dict[str, Tensor]:
        return inputs_of(small_batch("llama", seed=50 + rank, rows=4))

    # ---- the checks --------------------------------------------------------------------------------------------------

    def forward_and_switch(self) -> dict[str, float]:
        """The distances between wrapped and plain model, with the adapter on, off, and on again."""
        wanted, plain = self.wanted, self.plain
        model = self.wrapped(self.thawed(self.adapted()))
        found = {"on": far(self.outputs(model), wanted)}
        switch(self.inner(model), on=False)
        found["off"] = far(self.outputs(model), plain)
        switch(self.inner(model), on=True)
        found["on again"] = far(self.outputs(model), wanted)
        found["apart"] = far(wanted, plain)
        found |= {"state is whole": self.state_is_whole(model), "sharded": float(self.shares_weights(model))}
        return found

    def state_is_whole(self, model: nn.Module) -> float:
        """Whether this process has the whole state of the adapter, as it was loaded."""
        pairs = zip(adapter_children(model, NAME), adapter_children(self.alone, NAME), strict=True)
        return float(all(_equal(here.state_of(NAME), there.state_of(NAME)) for here, there in pairs))

    def shares_weights(self, model: nn.Module) -> bool:
        return any(isinstance(parameter, DTensor) for parameter in model.parameters())

    def train(self, *, with_lora: bool) -> dict[str, float]:
        """Compare one training step beside the adapter with the same step in one process on the batches of all.

        The step trains a LoRA, or all weights.
        """

        def prepared() -> Any:
            model = self.adapted()
            if with_lora:
                torch.manual_seed(0)
                model.add_adapter(lora(task_type="CAUSAL_LM"), adapter_name=LORA)
                model.set_adapter([NAME, LORA])
                return model
            return self.thawed(model)

        alone = prepared()
        before = {name: value.detach().clone() for name, value in alone.named_parameters()}
        batches = [self.inputs(rank) for rank in range(self.world)]
        step(alone, {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]})
        model = prepared()
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=RATE)
        if self.way.startswith("accelerate"):
            self.accelerator = accelerator_of(self.way)
            model, optimizer = self.accelerator.prepare(model, optimizer)
        else:
            model = self.wrapped(model)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
        step(model, self.inputs(self.rank), optimizer, getattr(self, "accelerator", None))
        found = {name: whole(value) for name, value in self.inner(model).named_parameters()}
        wanted = dict(alone.named_parameters())
        assert found.keys() == wanted.keys()
        moved = [name for name in wanted if not torch.equal(wanted[name], before[name])]
        return {
            "parameters moved": float(len(moved)),
            "moved": max(far(before[name], wanted[name]) for name in moved),
            "distance": max(far(found[name], wanted[name]) for name in wanted),
            "output": far(self.outputs(model), self.outputs(alone)),
            "state is whole": self.state_is_whole(self.inner(model)),
        }

    def save(self) -> dict[str, float]:
        """Save the adapter in the main process: from the wrapped model, and from the state dict that all gather."""
        model = self.wrapped(self.thawed(self.adapted()))
        if self.way.startswith("accelerate"):
            state = self.accelerator.get_state_dict(model)
            inner = self.accelerator.unwrap_model(model)
        else:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state, inner = get_model_state_dict(model, options=options), self.inner(model)
        if self.rank == 0:
            inner.save_pretrained(self.folder / f"saved from {self.way}, {self.kind}")
            inner.save_pretrained(self.folder / f"saved state from {self.way}, {self.kind}", state_dict=state)
        dist.barrier()
        keys = [key for key in state if f".{self.kind}" in key or "concept_erasure" in key]
        return {"keys of the state": float(len(keys)) if self.rank == 0 else -1.0}

    def merge(self) -> dict[str, Any]:
        """Merge in every process: it is right, or refused with a sentence and without a change."""
        folder = self.folder / (self.kind if self.kind == "gradiend" else "erasure at linear layers")
        model = peft.PeftModel.from_pretrained(self.base(), folder, adapter_name=NAME).requires_grad_(True)
        wanted = self.outputs(model)
        if self.is_sharded:
            base = model.get_base_model()
            if self.way == "fsdp2":
                self.wrapped(base)
            else:
                model = self.wrapped(model)
        else:
            model = self.wrapped(model)
        owner = self.inner(model)
        try:
            owner.merge_adapter()
        except ValueError as error:
            return {"message": str(error), "distance": far(self.outputs(model), wanted)}
        merged = far(self.outputs(model), wanted)
        owner.unmerge_adapter()
        return {"message": "", "distance": merged, "unmerged": far(self.outputs(model), wanted)}

    def attach_afterwards(self) -> dict[str, float]:
        """Load the adapter into a model that is wrapped or sharded already, and delete it again."""
        model = self.wrapped(self.base())
        inner = self.inner(model)
        inner.load_adapter(self.folder / self.kind, adapter_name=NAME)
        found = {"on": far(self.outputs(model), self.wanted), "state is whole": self.state_is_whole(inner)}
        inner.delete_adapter(NAME)
        return found | {"deleted": far(self.outputs(model), self.plain)}

    def broadcast(self) -> dict[str, Any]:
        """Which buffers DDP sends from the main process to the others at each forward pass."""
        model = self.thawed(self.adapted())
        inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        # A buffer of the model's own shows that DDP does send buffers.
        inner.register_buffer("own", torch.zeros(1))
        wrapped = self.wrapped(model)
        mark = float(self.rank + 1)
        inner.own.fill_(mark)
        some_state(wrapped).fill_(mark)
        wrapped(**self.inputs(self.rank))
        sent = [name for name in wrapped.named_module_buffers if "concept_erasure" in name or "gradiend" in name]
        return {
            "sent of ours": sent,
            "sent of others": sorted(wrapped.named_module_buffers.keys() - set(sent)),
            "ours": float(some_state(wrapped)),
            "own": float(inner.own),
        }

    def load_efficiently(self) -> dict[str, Any]:
        """Let accelerate shard via the meta device, with the adapter attached before, and with it loaded afterwards."""
        accelerator = accelerator_of(self.way, cpu_ram_efficient_loading=True)
        model = self.adapted()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        try:
            accelerator.prepare(model, optimizer)
            message = ""
        except ValueError as error:
            message = str(error)
        model = self.base()
        # Loaded afterwards, an adapter of either kind must act as on the plain model.
        model = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))[0]
        model.load_adapter(self.folder / self.kind, adapter_name=NAME)
        return {"message": message, "on": far(self.outputs(model), self.wanted)}

    def thawed(self, model: Any) -> Any:
        return model.requires_grad_(True)


def accelerator_of(way: str, *, cpu_ram_efficient_loading: bool = False) -> accelerate.Accelerator:
    """A new accelerator; a process can have only one kind at a time, so the old state is reset."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    if "fsdp2" in way:
        # Without GPUs accelerate ignores the plugin without a warning, although its code works there too.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=cpu_ram_efficient_loading,
        )
        accelerate.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def some_state(model: nn.Module) -> Tensor:
    """A view of one number in the adapter's state."""
    parts = (part for child in adapter_children(model, NAME) for part in child.state_of(NAME))
    return next(part for part in parts if part.is_floating_point()).view(-1)[0]


def switch(model: Any, *, on: bool) -> None:
    if isinstance(model, peft.PeftModel):
        (model.base_model.enable_adapter_layers if on else model.base_model.disable_adapter_layers)()
    else:
        (model.enable_adapters if on else model.disable_adapters)()


def step(model: Any, inputs: dict[str, Tensor], optimizer: Any = None, accelerator: Any = None) -> None:
    """One step of gradient descent on the mean square of the logits."""
    if optimizer is None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    loss = model(**inputs).logits.square().mean()
    accelerator.backward(loss) if accelerator is not None else loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(value: Tensor) -> Tensor:
    return value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()


def far(left: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((left - right).detach().abs().max() / right.detach().abs().max())


def _equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def looks(process: Process) -> dict[str, Callable[[], dict[str, Any]]]:
    """The checks that are run in this way of wrapping, by name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "forward and switch": process.forward_and_switch,
        "train all weights": lambda: process.train(with_lora=False),
        "save": process.save,
        "merge": process.merge,
    }
    if "PeftModel" not in process.way:
        found["train a LoRA"] = lambda: process.train(with_lora=True)
        found["attach afterwards"] = process.attach_afterwards
    if process.way == "accelerate fsdp2":
        found["load efficiently"] = process.load_efficiently
    if not process.is_sharded:
        found["broadcast"] = process.broadcast
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for way in WAYS:
        seen: dict[str, Any] = {"world": dist.get_world_size()}
        for kind in KINDS:
            process = Process(way, folder, kind)
            seen[kind] = {what: look() for what, look in looks(process).items()}
        (folder / f"{way}-{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
