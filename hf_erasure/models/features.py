"""Which axis of an activation holds its features, where its shapes at several lengths leave more than one.

A module of torch's own kinds has its features where it is defined to have them: so does what it gives, and what takes
the activation as it is. Of other modules the gradient tells: an axis holds the features where each of its first entries
depends on the feature of that number alone of what a norm or a linear layer inside gave. A residual sum, other axes
that are added and another order of the axes leave that as it is; all that mixes features does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .model import is_norm

# Where modules of torch have their features, by definition. Models derive norms and convolutions of theirs that turn
# the axes around (Parakeet's head), so that these are told by their forward.
_FEATURES_LAST = (nn.Linear, nn.Embedding, Conv1D)
_NORMS_LAST = (nn.LayerNorm.forward, nn.RMSNorm.forward)
_NORMS_SECOND = (nn.BatchNorm2d.forward, nn.InstanceNorm2d.forward, nn.GroupNorm.forward)
_CONVOLUTIONS = (
    nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward,
    nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward,
)  # fmt: skip
# So many entries of an axis are looked at: of one alone, what mixes all others with it would look like a feature.
_ENTRIES = 2


def lasting(shapes: Sequence[Sequence[int]], where: str) -> list[int]:
    """The axes that are as long for any number of examples and any length.

    Raises:
        ValueError: If there are not always as many axes.
    """
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"{where!r} gives {len(shapes[0])} axes, and then others: choose another target module.")
    return [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) == 1]


def feature_axis(
    shapes: Sequence[Sequence[int]], where: str, module: nn.Module | None = None, told: Iterable[int] = ()
) -> int:
    """The axis that holds the features of what a module gave, or takes.

    It is the only one that lasts, or else the one that it is by the kind of the module, or that was told.

    Args:
        shapes: Of its activation, for other numbers of examples and other lengths.
        where: Its name, for messages.
        module: The module, where its kind may tell.
        told: What `takers_of` or `told_inside` have told of its axes.

    Raises:
        ValueError: If several axes may be that of the features; names them.
    """
    same = lasting(shapes, where)
    kind = axis_of_kind(module, len(shapes[0]))
    channels = {getattr(module, "in_channels", None), getattr(module, "out_channels", None)} - {None}
    if kind is None and channels:
        # A convolution that turns the axes around: what is neither as wide as it takes nor as it gives has no features.
        same = [axis for axis in same if shapes[0][axis] in channels]
    found = set(same)
    if len(same) > 1:
        found &= {kind} if kind in same and kind is not None else set(told)
    if len(found) == 1:
        return found.pop()
    may = " or ".join(f"axis {axis}, of size {shapes[0][axis]}," for axis in sorted(found) or same) or "none"
    raise ValueError(
        f"The activation at {where!r} has shape {tuple(shapes[0])}, and which axis holds its features cannot be told: "
        f"{may} may. Name a module with weights of its own, such as a norm or a linear layer inside it."
    )


def axis_of_kind(module: nn.Module | None, axes: int) -> int | None:
    """The axis of the features of what torch's own modules take and give; None for other modules."""
    # A layer of ours hangs below its module, and has no module inside: it is its own base layer.
    while isinstance(module, BaseTunerLayer) and module.get_base_layer() is not module:
        module = module.get_base_layer()
    forward = getattr(type(module), "forward", None)
    if isinstance(module, _FEATURES_LAST) or forward in _NORMS_LAST:
        return axes - 1
    return 1 if axes > 1 and forward in (*_CONVOLUTIONS, *_NORMS_SECOND) else None


def takers_of(run: Callable[[], Mapping[str, Tensor]], modules: Iterable[nn.Module]) -> dict[str, set[int]]:
    """Name of an activation → where modules of torch's own kinds that are given it as it is have their features.

    Args:
        run: Makes a pass; returns the activations.
        modules: Those to watch.
    """
    taken: list[tuple[int | None, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            taken.append((axis_of_kind(module, args[0].dim()), args[0]))

    with ExitStack() as hooks:
        for module in modules:
            if axis_of_kind(module, 2) is not None:
                hooks.callback(module.register_forward_pre_hook(keep).remove)
        given = run()

    def place(x: Tensor) -> tuple:
        return x.data_ptr(), x.shape, x.stride()

    return {
        name: {axis for axis, x in taken if axis is not None and place(x) == place(hidden)}
        for name, hidden in given.items()
    }


# ---- modules inside --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A call of a module that gave a tensor, to which `shift` was added: zeros that tell what depends on it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    shift: Tensor


def told_inside(run: Callable[[], Mapping[str, Tensor]], hosts: Mapping[str, nn.Module]) -> dict[str, set[int]]:
    """Name of a module → the axes that hold the features of what it gives, as modules inside and it itself tell.

    Args:
        run: Makes a pass; returns what the modules gave.
        hosts: The modules.
    """
    calls: list[_Call] = []

    def shifted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        calls.append(_Call(module, args, kwargs, output.detach(), torch.zeros_like(output, requires_grad=True)))
        return output + calls[-1].shift

    inside = {id(m): m for host in hosts.values() for m in host.modules()}
    watched = [m for m in inside.values() if is_norm(m) or any(p.dim() for p in m.parameters(recurse=False))]
    # What a host gives is looked at behind its own shift; those inside may have erasers, which mix features, in front.
    own = {id(host) for host in hosts.values()}
    with ExitStack() as hooks, torch.enable_grad():
        for m in watched:
            hooks.callback(m.register_forward_hook(shifted, with_kwargs=True, prepend=id(m) in own).remove)
        given = run()
    found = {}
    for name, host in hosts.items():
        own = {id(module) for module in host.modules()}
        found[name] = _told(given[name], [call for call in calls if id(call.module) in own]) if name in given else set()
    return found


@torch.enable_grad()
def _told(hidden: Tensor, calls: Sequence[_Call]) -> set[int]:
    if not hidden.requires_grad or not calls:
        return set()
    found = set()
    noise = torch.Generator().manual_seed(0)
    for axis in (axis for axis, size in enumerate(hidden.shape) if size >= _ENTRIES):
        entries = _largest(hidden, axis)
        # Weights that are drawn, so that no sum is zero by chance.
        parts = [hidden.select(axis, entry).float() for entry in entries]
        sums = [(part * torch.rand(part.shape, generator=noise).to(part.device)).sum() for part in parts]
        shifts = [call.shift for call in calls]
        slopes = [torch.autograd.grad(total, shifts, retain_graph=True, allow_unused=True) for total in sums]
        for call, *each in zip(calls, *slopes, strict=True):
            if axis in found or any(slope is None for slope in each):
                continue
            # The axes of what the module gave of which each entry alone reaches the entry of the same number.
            followed = [
                own
                for own, size in enumerate(call.shift.shape)
                if size == hidden.shape[axis] and all(map(_is_alone, each, [own] * len(each), entries))
            ]
            if any(_has_features(call, own) for own in followed):
                found.add(axis)
    return found


def _largest(hidden: Tensor, axis: int) -> list[int]:
    """The entries of an axis that hold most: a rectifier may leave others without a gradient."""
    sizes = hidden.detach().abs().movedim(axis, 0).flatten(1).float().sum(1)
    return [int(entry) for entry in sizes.topk(_ENTRIES).indices]


def _is_alone(slope: Tensor, axis: int, entry: int) -> bool:
    reaches = (slope != 0).movedim(axis, 0).flatten(1).any(1)
    return bool(reaches[entry]) and int(reaches.sum()) == 1


def _has_features(call: _Call, axis: int) -> bool:
    """Whether an axis holds the features of what a module gave, by its kind, its weights, or what it normalises."""
    kind = axis_of_kind(call.module, call.shift.dim())
    if kind is not None:
        return axis == kind
    weights = dict(call.module.named_parameters(recurse=False))
    with torch.no_grad():
        if not weights:
            return _normalises(call, axis)
        fits = [name for name, value in weights.items() if value.dim() and value.shape[0] == call.shift.shape[axis]]
        return any(_changes_one(call, name, axis) for name in fits)


def _changes_one(call: _Call, name: str, axis: int) -> bool:
    """Whether another entry of a weight changes the entry of that number along an axis, and no others."""
    own = call.module._parameters
    kept = own[name]
    changed = kept.detach().clone()  # type: ignore[union-attr]
    if changed.is_meta:
        return False  # accelerate brings it in for a call, and no other in its place
    entry = _largest(call.output, axis)[0]
    changed[entry] += 1
    # Past the hooks of the module: erasers and observers would mix the features.
    before = call.module.forward(*call.args, **call.kwargs)
    try:
        own[name] = nn.Parameter(changed, requires_grad=False)
        after = call.module.forward(*call.args, **call.kwargs)
    finally:
        own[name] = kept
    return _is_alone(after - before, axis, entry)


def _normalises(call: _Call, axis: int) -> bool:
    """Whether another first entry of what a norm without weights takes changes a line along an axis, and no more."""
    if not call.args or not isinstance(call.args[0], Tensor) or call.args[0].shape != call.shift.shape:
        return False
    changed = call.args[0].detach().clone(memory_format=torch.contiguous_format)
    changed.view(-1)[0] += 1
    forward = call.module.forward  # past its hooks
    differs = forward(changed, *call.args[1:], **call.kwargs) != forward(*call.args, **call.kwargs)
    return bool(differs.movedim(axis, 0).flatten(1)[:, 0].all()) and int(differs.sum()) == differs.shape[axis]
