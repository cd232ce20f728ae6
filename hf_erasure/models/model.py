"""A model as it is called: the bare one inside wrappers, evaluation mode, a small input, and what it returns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

P = ParamSpec("P")
R = TypeVar("R")


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Make the function's own small tensors on the CPU, whatever default device the caller has set for the model."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout; every module's training flag is as before afterwards."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag


_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel, FullyShardedDataParallel)


def bare_model(model: Any) -> Any:
    """The model inside a `PeftModel` and other wrappers: the outermost transformers model, if there is one.

    A module that holds several transformers models beside each other, or none, is taken for the model itself.
    """
    inner = unwrapped(model)
    while inner is not model:
        model, inner = inner, unwrapped(inner)
    within = {path: module for path, module in model.named_modules() if _is_bare(module)}
    outermost = next(iter(within), "")
    is_around = all(path.startswith(f"{outermost}.") for path in within if path != outermost)
    return within[outermost] if outermost and is_around else model


def class_name(model: nn.Module) -> str:
    """The name of a model's class in transformers; FSDP2 puts its own in front."""
    name = type(model).__name__
    return name.removeprefix("FSDP") if isinstance(model, FSDPModule) else name


def callee_of(model: nn.Module, bare: nn.Module) -> Any:
    """What to call so that the bare model inside `model` is run: FSDP gathers weights at its outermost wrapper."""
    path = next(path for path, module in model.named_modules() if module is bare)
    return next((m for m in _around(model, path) if isinstance(m, (FSDPModule, FullyShardedDataParallel))), bare)


def as_attribute(path: str) -> str:
    """How to write the submodule of `model` at a path."""
    if not path:
        return "the model itself"
    if all(part.isidentifier() for part in path.split(".")):
        return f"model.{path}"
    return f"model.get_submodule({path!r})"


def _is_bare(module: nn.Module) -> bool:
    """Whether it is a model that adapters are added to, and no wrapper of one."""
    return isinstance(module, PreTrainedModel) or _configs_on(module) is not None


def _configs_on(module: nn.Module) -> dict[str, PeftConfig] | None:
    """What PEFT has noted on a bare model; a `PeftModel` and its tuner show the same, and are not asked."""
    configs = None if isinstance(module, BaseTuner) else module.__dict__.get("peft_config")
    return configs if isinstance(configs, dict) else None


def unwrapped(model: Any) -> Any:
    """What is inside of one wrapper of accelerate's, torch's or PEFT's own; other modules are given back."""
    # Older releases of accelerate fail at a module that has compiled ones inside.
    inner = model._modules.get("_orig_mod", model.__dict__.get("_orig_mod", model))
    while isinstance(inner, _PARALLEL) or type(inner).__name__ == "DeepSpeedEngine":
        inner = inner.module
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _around(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules from `model` down to the one at a path, both among them."""
    found = [model]
    for part in path.split(".") if path else ():
        found.append(found[-1]._modules[part])  # type: ignore[arg-type]
    return found


# ---- what goes in and what comes out ---------------------------------------------------------------------------------


def is_encoder_decoder(model: Any) -> bool:
    """Whether a bare model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def input_device(model: nn.Module) -> torch.device:
    """Where inputs go: to the first parameter that is anywhere; accelerate's hooks move them on to offloaded ones."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def dummy_batch(model: nn.Module) -> dict[str, Tensor]:
    """A small input the model accepts: its own `dummy_inputs`, or noise of the shape its main input has.

    Raises:
        ValueError: If it has neither.
    """
    base = bare_model(model)
    device, main = input_device(base), getattr(base, "main_input_name", "input_ids")
    if main == "pixel_values":
        config = base.config
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        noise = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(2, config.num_channels, *size, generator=noise).to(device, base.dtype)}
    dummies = getattr(base, "dummy_inputs", {})
    if main not in dummies:
        raise ValueError(f"{type(base).__name__} has no dummy input to compare outputs on: pass batch=, its inputs.")
    return {name: value.to(device) for name, value in dummies.items()}


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in what a model returns: a tensor, or tuples, lists, dicts and dataclasses of such."""
    if is_dataclass(output) and not isinstance(output, dict):
        output = {field.name: getattr(output, field.name) for field in fields(output)}
    leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
    if len(leaves) == 1 and leaves[0] is output:
        return [output] if isinstance(output, Tensor) else []
    return [tensor for leaf in leaves for tensor in tensors_of(leaf)]


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative distance, by norm, of two sets of outputs; what is not finite in `right` is left out.

    Infinite where `left` alone is not finite, or where the two are not of one shape.
    """
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if not b.is_floating_point():
            continue
        finite = torch.isfinite(b)
        a, b = a[finite].double(), b[finite].double()
        if not bool(torch.isfinite(a).all()):
            return float("inf")
        scale = float(b.norm())
        worst = max(worst, float((a - b).norm()) / scale if scale else float((a != b).any()))
    return worst
