"""Maps that read or write the hidden state, on a model of any type: erasers act there by hooks and in their weights.

The hooks, the changes of weights and the random erasers are made in this file. From the package it takes only the list
of maps. Each eraser is `P = I − Q Qᵀ` for two random directions Q.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hf_erasure.models.flow import norms_of_hidden_state
from hf_erasure.models.streams import Weight, readers_of, writers_of
from tests.breadth import kinds, zoo
from tests.breadth import sites as default_sites
from tests.breadth.examples import Batch, call
from tests.breadth.outcomes import WrongError, different, same, tensors
from tests.breadth.sites import collapsed

# For sums in another order: float32 rounds by 6e-8, which deep models with experts and recurrences multiply by 1e3.
ROUNDING = 2e-4
_RANK = 2
# Norms between two parts of a branch, or of what follows the last block, that have no residual sum around them, so they
# do not read the stream.
_WITHOUT_SUM = re.compile(r"shared_transf(ormer)?\.pre_ff_layernorm|bottleneck\.attention\.LayerNorm|connector\.ln_out")
# Models whose stream passes gated sums ("hyper-connections") or convolutions in place of norms.
_WITHOUT_NORMS = {"Qwen4ExpTextModel", "UnivNetModel"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def check_readers(model: Any, batch: Batch, groups: Sequence[Sequence[Weight]]) -> None:
    """Raise a `WrongError` unless erasers at the inputs of all groups act as the same erasers in the weights."""
    noise = torch.Generator().manual_seed(3)
    sites = {group[0].module: [*dict.fromkeys(weight.module for weight in group)] for group in groups}
    if sum(map(len, sites.values())) != len({name for names in sites.values() for name in names}):
        raise WrongError("a module is in two groups")
    folded = copy.deepcopy(model)
    erasers = {}
    for group in groups:
        sizes = {_parameter(model, weight).shape[weight.axis] for weight in group}
        if len(sizes) != 1:
            raise WrongError(f"{group} have other widths: {sizes}")
        eraser = _eraser(sizes.pop(), noise).to(model.dtype)
        erasers |= {weight.module: eraser for weight in group}
        for weight in dict.fromkeys(group):
            _fold(folded, weight, eraser)
    with _hooked(model, erasers, "input"):
        hooked = tensors(call(model, batch))
    same(tensors(call(folded, batch)), hooked, "readers, folded", ROUNDING)
    different(hooked, tensors(call(model, batch)), "readers")
    _check_complete(model, batch, erasers)


def check_writers(model: Any, batch: Batch, writers: Sequence[Weight]) -> None:
    """Raise a `WrongError` unless erasers at all outputs act as those in the weights, and clean all states."""
    noise = torch.Generator().manual_seed(4)
    widths = {weight: _parameter(model, weight).shape[weight.axis] for weight in writers}
    by_width = {width: _eraser(width, noise).to(model.dtype) for width in sorted(set(widths.values()))}
    folded = copy.deepcopy(model)
    for weight, width in widths.items():
        _fold(folded, weight, by_width[width])
        bias = model.get_submodule(weight.module)._parameters.get("bias")
        if weight.parameter == "weight" and bias is not None:
            _fold(folded, Weight(weight.module, "bias", 0), by_width[width])
    erasers = {weight.module: by_width[width] for weight, width in widths.items()}
    states: list[tuple[str, Tensor]] = []
    with _hooked(model, erasers, "output"), _states(model, set(by_width), states):
        hooked = tensors(call(model, batch))
    same(tensors(call(folded, batch)), hooked, "writers, folded", ROUNDING)
    different(hooked, tensors(call(model, batch)), "writers")
    for name, state in states:
        axis = next(a for a in (-1, 1) if state.shape[a] in by_width)
        rows = state.movedim(axis, -1)
        left = rows - rows @ by_width[rows.shape[-1]]
        share = float(left.norm() / rows.norm().clamp_min(1e-9))
        if share > ROUNDING:
            raise WrongError(f"what {name} takes still has {share:.2g} along what was erased")


def _parameter(model: nn.Module, weight: Weight) -> Tensor:
    return getattr(model.get_submodule(weight.module), weight.parameter)


def _eraser(width: int, noise: torch.Generator) -> Tensor:
    directions = torch.linalg.qr(torch.randn(width, min(_RANK, width - 1), generator=noise))[0]
    return torch.eye(width) - directions @ directions.T


def _fold(model: nn.Module, weight: Weight, eraser: Tensor) -> None:
    """Multiply a parameter by a symmetric eraser along an axis; a tied parameter is untied."""
    value = _parameter(model, weight).detach()
    changed = (value.movedim(weight.axis, -1) @ eraser).movedim(-1, weight.axis)
    model.get_submodule(weight.module)._parameters[weight.parameter] = nn.Parameter(changed, requires_grad=False)


def _axis(module: nn.Module, tensor: Tensor, width: int) -> int:
    # A class with a forward of its own, as Parakeet's head, may turn the axes round.
    is_first = type(module).forward in {kind.forward for kind in _CONVOLUTIONS} and tensor.dim() > 2
    axis = 1 if is_first else -1
    if tensor.shape[axis] != width:
        raise WrongError(f"{type(module).__name__} has activations of {tuple(tensor.shape)}, and the eraser {width}")
    return axis


def _erased(module: nn.Module, eraser: Tensor, tree: Any) -> Any:
    """The tree of inputs or outputs, with its first floating-point tensor erased."""
    leaves, form = tree_flatten(tree)
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            axis = _axis(module, leaf, len(eraser))
            leaves[place] = (leaf.movedim(axis, -1) @ eraser).movedim(-1, axis)
            break
    return tree_unflatten(leaves, form)


@contextmanager
def _hooked(model: nn.Module, erasers: dict[str, Tensor], site: str) -> Iterator[None]:
    def before(eraser: Tensor, module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        return _erased(module, eraser, (args, kwargs))

    def after(eraser: Tensor, module: nn.Module, args: tuple, output: Any) -> Any:
        return _erased(module, eraser, output)

    handles = []
    for name, eraser in erasers.items():
        module = model.get_submodule(name)
        if site == "input":
            handles.append(module.register_forward_pre_hook(partial(before, eraser), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(partial(after, eraser)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shows(given: Tensor, tensor: Tensor) -> bool:
    is_whole = given.numel() == tensor.numel() and given.shape[-1] == tensor.shape[-1]
    return is_whole and given.data_ptr() == tensor.data_ptr()


def _norms(model: nn.Module) -> list[str]:
    if type(model).__name__ in _WITHOUT_NORMS:
        return []
    return [name for name in norms_of_hidden_state(model) if not _WITHOUT_SUM.search(name)]


# ---- states of the residual stream -----------------------------------------------------------------------------------


@contextmanager
def _states(model: nn.Module, widths: set[int], found: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Collect the inputs of the norms that are default sites: the residual stream at every depth."""

    def keep(name: str, module: nn.Module, args: tuple) -> None:
        taken = next((t for t in tree_leaves(args) if isinstance(t, Tensor)), None)
        if taken is not None and {taken.shape[-1], taken.shape[1]} & widths:
            found.append((name, taken.detach().clone()))

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in _norms(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_complete(model: nn.Module, batch: Batch, readers: Iterable[str]) -> None:
    """Check that every linear layer whose input is the output of a norm of the hidden state is among the readers."""
    kept: list[Tensor] = []
    missed: list[str] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        kept.extend(t for t in tree_leaves(output) if isinstance(t, Tensor))

    def taken(name: str, module: nn.Module, args: tuple) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) and name not in readers else None
        # Only whole rows with the features last count, not parts of heads or transposed positions.
        if given is not None and given.stride(-1) == 1 and any(_shows(given, tensor) for tensor in kept):
            missed.append(name)

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in _norms(model)]
    handles += [
        module.register_forward_pre_hook(partial(taken, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    call(model, batch)
    for handle in handles:
        handle.remove()
    if missed:
        raise WrongError(f"{missed} take what a norm gives, and are not among the readers")


# ---- the list --------------------------------------------------------------------------------------------------------

LISTED = Path(__file__).parent / "streams.txt"


def told(model: nn.Module) -> list[str]:
    """Lines with the readers and writers, or the reason why they are refused; the axis follows `@`."""
    lines: list[str] = []
    try:
        lines += collapsed(map(_in_words, readers_of(model)))
    except ValueError as error:
        lines.append(f"readers: {error}")
    try:
        lines += collapsed([f"< {_named(weight)}" for weight in writers_of(model)])
    except ValueError as error:
        lines.append(f"< not: {str(error).split(': ', 1)[-1].split('. Use target')[0]}")
    return lines


def _named(weight: Weight) -> str:
    return f"{weight.module}{'' if weight.parameter == 'weight' else '.' + weight.parameter}@{weight.axis}"


def _in_words(group: Sequence[Weight]) -> str:
    """The maps of a group; the common start of their names is written once, in front."""
    names = [_named(weight).split(".") for weight in group]
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))))
    shared = min(shared, *(len(name) - 1 for name in names))
    return f"> {'.'.join([*names[0][:shared], ''])} {', '.join('.'.join(name[shared:]) for name in names)}"


def listed() -> dict[str, list[str]]:
    """Type → its lines in the list."""
    return default_sites.listed(LISTED)


def write(names: Iterable[str]) -> None:
    """Write the list again for these types."""
    lines = [
        "# What reads (>) and writes (<) the hidden state of small models; {0,1} stands for both, and @ for the axis",
        "# of the weight. What is in a line that reads shares an eraser. `python -m tests.breadth.streams` writes it.",
    ]
    for name in sorted(names):
        lines += ["", name, *(f"    {line}" for line in told(zoo.build(name)))]
    LISTED.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(kinds.chosen(kinds.STREAMS))
