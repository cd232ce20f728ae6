"""Pools the states of a sequence's tokens into one vector, and finds out which way of pooling a model's head uses.

One backward pass from the head's output shows what it reads: the positions of the last hidden state with a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from .flow import blocks_of
from .model import Runner, evaluating, floats_of, last_hidden_state, on_cpu, unwrapped

POOLS = ("tokens", "mean", "cls", "last")
IN_WORDS = {
    "tokens": "every token",
    "mean": "the mean of the tokens",
    "cls": "the first token",
    "last": "the last real token",
}
# Units of rounding: the gradients of two positions that differ by no more are equal.
_ROUNDING = 8
# A position is read if the norm of its gradient is above this share of the largest in its row.
_READ_SHARE = 1e-6
# The name of a way of pooling in sentence-transformers → its name here.
SENTENCE_POOLS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


def counted(real: Tensor, pool: str) -> Tensor:
    """`(batch, seq)` bool: the positions that a pool reads, among the `real` positions, which are not padding.

    The pool reads all real positions, the first (`"cls"`), or the last.
    """
    if pool in ("tokens", "mean"):
        return real
    order = real.cumsum(1)
    return real & (order == (1 if pool == "cls" else order[:, -1:]))


def pooled(states: Tensor, real: Tensor, pool: str) -> Tensor:
    """Pool states `(batch, seq, width)` into one vector for each sequence, `(batch, width)`, by `"mean"`, `"cls"` or
    `"last"`.

    Positions that are not `real`, `(batch, seq)` bool, are padding and may hold anything.
    """
    positions = counted(real, pool)
    kept = torch.where(positions[..., None], states, 0.0)
    weight = positions / positions.sum(1, keepdim=True).clamp_min(1)
    return torch.einsum("bsw,bs->bw", kept, weight.to(states.dtype))


# ---- what a head reads -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What a head reads of the last hidden state."""

    pool: str | None  # One of `POOLS`; None if there is no head, or the head reads none of them.
    text: str  # What is read, in words: a sentence without its full stop.
    clear: bool = True  # False if there is a head, and it is not known to read one of `POOLS`.
    is_other: bool = False  # Whether the head is known to read positions that are not one of `POOLS`.


@on_cpu()
def reading_of(
    model: nn.Module, runner: Runner, rows: dict[str, Any], real_of: Callable[[Tensor, str], Tensor]
) -> Reading:
    """Find out what is read: by the pooling module of a SentenceTransformer, by a head, or by what pools each tower.

    `model` is the caller's, since a module of the caller around a bare model may be the head. `rows` are two rows of
    different lengths, the shorter one padded; `real_of` returns, for a last hidden state `(batch, seq, width)` and its
    name, the positions that are not padding, `(batch, seq)`. If the model fails on the rows, the reading is not clear.
    """
    for module in model.modules():
        if type(module).__module__.startswith("sentence_transformers.") and hasattr(module, "pooling_mode"):
            mode: Any = module.pooling_mode
            pool = SENTENCE_POOLS.get(mode) if isinstance(mode, str) else None
            words = IN_WORDS[pool] if pool else repr(mode)
            return Reading(pool, f"its pooling module reads {words}", clear=pool is not None, is_other=pool is None)
    while (inner := unwrapped(model)) is not model:
        model = inner
    is_bare = runner.backbone is runner.model
    finals = runner.final_states()
    final = finals.get("last_hidden_state", runner.backbone) if is_bare else runner.backbone
    if is_bare and model is not runner.model and not runner.is_sharded:
        is_bare = False
    else:
        model = runner.model
        rows = {**rows, "output_hidden_states": True} if is_bare else rows
    name = type(model).__name__
    poolers = runner.poolers(rows) if is_bare and not runner.is_sharded else {}
    if poolers:
        each = [
            _reading(f"{name}.{pool.__name__}", model, finals[at], partial(_features, runner, pool, rows), real_of, at)
            for at, pool in poolers.items()
        ]
        text = ", and ".join(reading.text for reading in each)
        agree = len({(reading.pool, reading.clear) for reading in each}) == 1
        return replace(each[0], text=text) if agree else Reading(None, text, clear=False)
    if is_bare and type(model).__module__.startswith("transformers.") and name.endswith("Model"):
        return Reading(None, f"{name} has no head that reads")
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
        return Reading("tokens", f"{name} reads {IN_WORDS['tokens']}")  # a language model, whose logits are large
    callee = runner.callee if runner.is_sharded else model
    return _reading(name, model, final, lambda: runner(rows, callee), real_of, "last_hidden_state", is_bare)


def _reading(
    name: str,
    model: nn.Module,
    final: nn.Module,
    forward: Callable[[], Any],
    real_of: Callable[[Tensor, str], Tensor],
    at: str,
    is_bare: bool = False,
) -> Reading:
    """What the output of `forward` reads of the last hidden state with the name `at`, which `final` returns."""
    try:
        with torch.inference_mode(False), evaluating(model), torch.compiler.set_stance("force_eager"):
            found = _gradient(model, final, forward, is_bare)
            if found is None:
                return Reading(None, f"{name} has no head that reads")
            gradient, hidden = found
            pool, words, is_other = _pool_of(gradient, real_of(hidden, at).to(gradient.device))
    except Exception as error:  # any error of a model: fitting itself may not need the part that fails
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Reading(None, f"what {name} reads could not be found out ({reason})", clear=False)
    return Reading(pool, f"{name} reads {words}", clear=pool is not None, is_other=is_other)


# ---- the backward ----------------------------------------------------------------------------------------------------


def _gradient(
    model: nn.Module, backbone: nn.Module, forward: Callable[[], Any], is_bare: bool
) -> tuple[Tensor, Tensor] | None:
    """The gradient of the output with respect to the last hidden state, and that state; None for a bare model."""
    returned: list[Any] = []

    def start(module: nn.Module, *given: Any) -> Any:
        """Turn gradients on in the last block, so that no activations of the blocks before it are kept."""
        if torch.is_grad_enabled() or next(floats_of(given), None) is None:
            return None
        torch.set_grad_enabled(True)  # until the surrounding no_grad ends
        return tree_map_only(Tensor, _with_gradient, given)

    # Reformer turns gradients off around its blocks: then they are turned on at the model's first activation.
    for part in (*blocks_of(backbone)[-1:], model):
        with torch.no_grad(), ExitStack() as hooks:
            for module in part.modules():
                hooks.callback(module.register_forward_pre_hook(start, with_kwargs=True).remove)
            hooks.callback(backbone.register_forward_hook(lambda module, args, out: returned.append(out)).remove)
            output = forward()
        if is_bare and not _logits(output):
            return None
        found = returned[-1]
        states = found.get("hidden_states") if isinstance(found, Mapping) else None
        hidden = states[-1] if states and found.get("last_hidden_state") is None else last_hidden_state(found)
        if hidden.dim() != 3:
            raise ValueError(f"its last hidden state is {tuple(hidden.shape)}, not (batch, seq, width)")
        if hidden.requires_grad:
            break
    read = [tensor for tensor in _logits(output) or list(floats_of(output))[:1] if tensor.requires_grad]
    if not hidden.requires_grad or not read:
        raise ValueError("its output does not depend on the last hidden state")
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.enable_grad():
        # Random weights, since plain sums of normalised numbers have no gradient.
        weights = [torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor) for tensor in read]
        total = sum((tensor * weight).float().sum() for tensor, weight in zip(read, weights, strict=True))
        return torch.autograd.grad(total, hidden)[0], hidden.detach()  # type: ignore[arg-type]


def _with_gradient(tensor: Tensor) -> Tensor:
    """A copy of a tensor; it is not a leaf, since layers cannot change a leaf in place."""
    copied = tensor.detach().clone()
    return copied.requires_grad_().clone() if copied.is_floating_point() else copied


def _features(runner: Runner, pool: Callable[..., Any], batch: dict[str, Any]) -> dict[str, Tensor]:
    """What a method pools from the inputs that it takes, in the form of a head's output."""
    takes = inspect.signature(pool).parameters
    # The mask of texts is not that of the sounds beside them.
    left_out = {"attention_mask"} if "input_ids" in batch and "input_ids" not in takes else set()
    features = runner({name: batch[name] for name in batch if name in takes and name not in left_out}, pool)
    return {"logits": features if isinstance(features, Tensor) else features.pooler_output}  # it was a tensor before


def _logits(output: Any) -> list[Tensor]:
    named = output.items() if isinstance(output, Mapping) else ()
    return [tensor for name, tensor in named if "logits" in str(name) and isinstance(tensor, Tensor)]


# ---- what it shows ---------------------------------------------------------------------------------------------------


def _pool_of(gradient: Tensor, real: Tensor) -> tuple[str | None, str, bool]:
    """Return the pool, what is read in words, and whether it is known not to be one of `POOLS`."""
    size = gradient.float().norm(dim=-1)
    read = size > _READ_SHARE * size.amax(1, keepdim=True)
    several = (real.sum(1) > 1) & read.any(1)  # a row of one token does not show which position is read
    if not several.any():
        return None, "rows that are too short to tell which position it reads", False
    gradient, real, read = gradient[several], real[several], read[several]
    for pool in ("cls", "last"):
        if torch.equal(read, counted(real, pool)):
            return pool, IN_WORDS[pool], False
    rest = real & ~counted(real, "cls")
    if torch.equal(read, rest):
        pool = "mean" if _equal_gradients(gradient, read) else "tokens"
        return pool, f"{IN_WORDS[pool]} behind the first", False
    if bool((read | ~real).all()):
        if not _equal_gradients(gradient, read):
            if bool((rest.sum(1) > 1).any()) and _equal_gradients(gradient, rest):
                return None, f"{IN_WORDS['cls']}, and {IN_WORDS['mean']} behind it", True
            return "tokens", IN_WORDS["tokens"], False
        return "mean", IN_WORDS["mean"] + (", padding included" if bool((read & ~real).any()) else ""), False
    columns = read.any(0).nonzero().flatten().tolist()
    padding = ", padding among them" if bool((read & ~real).any()) else ""
    return None, f"positions {columns} of {read.shape[1]}{padding}", True


def _equal_gradients(gradient: Tensor, read: Tensor) -> bool:
    """Whether all positions that are read have the same gradient, within each row."""
    tolerance = _ROUNDING * torch.finfo(gradient.dtype).eps
    rows = [row[chosen] for row, chosen in zip(gradient.float(), read, strict=True)]
    return not any(bool((row - row[0]).abs().max() > tolerance * row.abs().max()) for row in rows)
