"""Erasers in weights: the formulas, and a record by which all is taken back.

A weight may take erasers of several sites: its own, and those of a norm in front of it. The way back for one of them is
to start from the original and write the others anew, since a projection does not have an inverse. The record is kept on
the module that owns the weight.

A weight is a tensor of any shape with an axis along which the features of the hidden state lie: a matrix, a stack of
matrices of experts, the kernel of a convolution. A linear map commutes with whatever is done along the other axes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..common import placement
from ..common.layer import innermost

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# By the forward of a module: the axes of its weight along which the features that it takes and gives lie.
_AXES: dict[Any, dict[str, int]] = {
    nn.Linear.forward: {"input": 1, "output": 0},
    Conv1D.forward: {"input": 0, "output": 1},
    nn.Embedding.forward: {"output": 1},
    **{kind.forward: {"input": 1, "output": 0} for kind in CONVOLUTIONS},
}
# A plain attribute of the module: it is copied with the module, and is not part of the state dict.
_RECORD = "_concept_erasure_merge_record"
# The entry of a configuration that ties the embedding and the head, and all other weights that are shared.
_ENTRY = "tie_word_embeddings"
# An integer of as many bytes as a number has.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class EraserInWeight:
    """One eraser on its way into one weight."""

    path: str  # the site: the weight's own module, or one whose output that module takes
    adapter: str  # the adapter it belongs to
    side: str  # the side of the weight it acts on, `"output"` or `"input"`
    left: Tensor  # (width, rank)
    right: Tensor  # (rank, width)
    bias: Tensor  # (width,), the mean that is kept; zero for a purely linear eraser
    parameter: str = "weight"  # the name of the weight in its module
    axis: int = 1  # the axis of the weight along which the features of the hidden state lie


@dataclass(frozen=True)
class WeightChange:
    """What erasers make of a weight and its bias, in float64.

    The weight has changed by `b @ a`, where it is a matrix `(out, in)`, or is one when its other axes are one.
    """

    weight: Tensor  # the changed weight, in its own shape
    offset: Tensor  # (out,), the changed bias; zero where there is none and none is needed
    b: Tensor  # (out, rank)
    a: Tensor  # (rank, in)


def weight_change(
    weight: Tensor, bias: Tensor | None, edits: Iterable[EraserInWeight], scale: float | None = None
) -> WeightChange:
    """The weight and the bias `(out,)` that compute alone what they compute with erasers, the next to the weight first.

    With `P = L R`, an erased output of `W x + c` is `(I − P) W x + c − P (c − μ)`, and an erased input gives
    `W (I − P) x + c + W P μ`. An embedding's output is its rows, erased one by one; `scale` is what the rows of a table
    are multiplied with, None for a weight that is multiplied by.
    """
    changed = weight.double()
    offset = None if bias is None else bias.double()
    b_parts, a_parts = [], []
    for edit in edits:
        left, right, mean = (part.to(weight.device, torch.float64) for part in (edit.left, edit.right, edit.bias))
        place = -1 if edit.side == "input" else 0
        moved = changed.movedim(edit.axis, place)
        if edit.side == "input":
            matrix = moved.reshape(-1, len(left))
            b, a = -matrix @ left, right
            shift = -(b @ (right @ mean)).reshape(len(moved), -1).sum(1)
            offset = shift if offset is None else offset + shift
        else:
            matrix = moved.reshape(len(left), -1)
            b, a = -left, right @ (matrix if scale is None else matrix - mean[:, None] / scale)
            if scale is None:
                offset = matrix.new_zeros(len(left)) if offset is None else offset
                offset = offset + b @ (right @ (offset - mean))
        changed = (matrix + b @ a).reshape(moved.shape).movedim(place, edit.axis)
        b_parts.append(b)
        a_parts.append(a)
    offset = changed.new_zeros(()) if offset is None else offset
    return WeightChange(changed, offset, torch.cat(b_parts, dim=1), torch.cat(a_parts, dim=0))


def merged_parameters(
    host: nn.Module, parameters: dict[str, Tensor], edits: Iterable[EraserInWeight]
) -> dict[str, Tensor]:
    """The changed parameters of `host` by name, each in its dtype."""
    by_parameter: dict[str, list[EraserInWeight]] = {}
    for edit in edits:
        by_parameter.setdefault(edit.parameter, []).append(edit)
    changed: dict[str, Tensor] = {}
    for name, here in by_parameter.items():
        weight, bias_name, scale = parameters[name], bias_of(host, name), scale_of(host)
        bias = None if bias_name is None else parameters[bias_name]
        if is_stack(host, name, here):
            ones = [weight_change(*of_one, scale) for of_one in one_by_one(weight, bias, here)]
            changed[name] = torch.stack([one.weight.to(weight.dtype) for one in ones])
            offset = torch.stack([one.offset for one in ones])
        else:
            one = weight_change(weight, bias, here, scale)
            changed[name], offset = one.weight.to(weight.dtype).contiguous(), one.offset
        if bias_name is not None and bias is not None:
            changed[bias_name] = offset.to(bias.dtype)
    return changed


def is_stack(host: nn.Module, parameter: str, edits: Iterable[EraserInWeight]) -> bool:
    """Whether a weight is a stack of matrices of experts, which are changed one after the other: float64 takes room."""
    is_cube = host._parameters[parameter].dim() == 3  # type: ignore[union-attr]
    return is_cube and not isinstance(host, CONVOLUTIONS) and all(edit.axis > 0 for edit in edits)


def one_by_one(
    weight: Tensor, bias: Tensor | None, edits: Iterable[EraserInWeight]
) -> Iterator[tuple[Tensor, Tensor | None, list[EraserInWeight]]]:
    """The weight, the bias and the erasers of each expert of a stack."""
    inner = [replace(edit, axis=edit.axis - 1) for edit in edits]
    for index, matrix in enumerate(weight):
        yield matrix, None if bias is None else bias[index], inner


# ---- what a module does with a weight --------------------------------------------------------------------------------


def axis_of(host: nn.Module, site: str) -> int | None:
    """The axis of a module's weight along which the features at one of its sides lie; None where it is not known."""
    if isinstance(host, CONVOLUTIONS) and host.groups != 1:
        return None
    if scale_of(host) is not None:
        return 1 if site == "output" else None
    return _AXES.get(type(host).forward, {}).get(site)


def is_weight_layer(host: nn.Module) -> bool:
    """Whether `host` is known to compute what `weight_change` supposes; those with a forward of their own are not."""
    return axis_of(host, "output") is not None


def bias_of(host: nn.Module, parameter: str) -> str | None:
    """The name of the parameter that a module adds to what it makes with a weight; None where it is not known."""
    name = "bias" if type(host).forward in _AXES else f"{parameter}_bias"  # of experts
    return name if host._parameters.get(name) is not None else None


def takes_mean(host: nn.Module, parameter: str, side: str) -> bool:
    """Whether the part of an affine eraser that keeps the mean has a place in a module: its bias, or a table's rows."""
    if scale_of(host) is not None:
        return True
    if bias_of(host, parameter) is None:
        return False
    if isinstance(host, CONVOLUTIONS) and side == "input":  # what is put around an input was not erased
        return not any(host.padding) if isinstance(host.padding, tuple) else host.padding == "valid"
    # What experts give is weighted and summed, and the weights need not sum to one.
    return side == "input" or type(host).forward in _AXES


def scale_of(host: nn.Module) -> float | None:
    """What a table's rows are multiplied with when they are looked up; None where a module does something else."""
    if type(host).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(host, "embed_scale", None)
    if not isinstance(host, nn.Embedding) or scale is None or getattr(scale, "is_meta", False):
        return None
    factor, tried = float(scale), copy.copy(host)
    rows = torch.arange(1.0, 7.0).view(3, 2).to(scale.device if isinstance(scale, Tensor) else "cpu")
    tried.__dict__ = {**host.__dict__, "_parameters": {"weight": rows}, "padding_idx": None}
    try:
        found = type(host).forward(tried, torch.arange(3, device=rows.device))
    except Exception:  # whatever a stranger's module may raise that is not called with ids alone
        return None
    return factor if torch.equal(found, rows * factor) else None


def why_not_mergeable(host: nn.Module, site: str, parameter: str = "weight") -> str | None:
    """The reason why an eraser at one side of `host` has no place in its weight, or None if it has."""
    kind = type(host).__name__
    if getattr(host, "parametrizations", None):
        return f"the weight of this {kind} is parametrized; remove the parametrization first."
    if placement.has_quantised(host):
        told = "its weight is quantised, and would not be exact after it"
        return f"{told}. Use the adapter unmerged, or {placement.FLOAT_FIRST}."
    if isinstance(host, nn.Embedding):
        if site == "input":
            return "an embedding takes token ids. Use site='output'."
        if getattr(host, "max_norm", None) is not None:
            return "this embedding renormalises its rows (max_norm) after the erasure. Use the adapter unmerged."
    weight = host._parameters.get(parameter)
    if weight is None:
        return f"this {kind} has no parameter {parameter!r}: the adapter was fitted on another model."
    if placement.is_out_of_reach(host):
        return f"its weight {placement.OUT_OF_REACH} to merge."
    if type(weight.data) is not Tensor or placement.is_sharded(weight):
        return "its weight is sharded. Load the model whole to merge."
    return None


# ---- tied tables, which a merge must give values of their own --------------------------------------------------------


class Untied:
    """All tied weights of a model, each with values of its own; the configuration says so, and reloading does too."""

    def __init__(self, model: nn.Module) -> None:
        self.owners = _tied_by_configuration(model)  # each tied weight: the modules that own it, and its names there
        self.modules = [module for places in self.owners.values() for module, _ in places]
        self._shared = {weight: places[0][0].get_parameter(places[0][1]) for weight, places in self.owners.items()}
        models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        configs: list[Any] = [module.config for module in models]
        for config in configs:  # and those inside them, each once
            inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
            configs += [value for value in inner if not any(value is known for known in configs)]
        ties = {id(config): config for config in configs if getattr(config, _ENTRY, False)}
        self._configs = [(config, getattr(config, _ENTRY)) for config in ties.values()]
        self._keys: list[tuple[Any, dict[str, str]]] = [
            (m, m.all_tied_weights_keys) for m in models if getattr(m, "all_tied_weights_keys", None)
        ]
        self.is_open = False

    @property
    def bytes(self) -> int:
        """How many bytes the model has more."""
        return sum((len(self.owners[weight]) - 1) * p.numel() * p.element_size() for weight, p in self._shared.items())

    def untie(self) -> None:
        """Give all but the first owner of each weight a copy; the configuration says that nothing is tied."""
        self.is_open = True
        for config, _ in self._configs:
            setattr(config, _ENTRY, False)
        for model, _ in self._keys:
            model.all_tied_weights_keys = {}
        for places in self.owners.values():
            for module, name in places[1:]:
                shared = module.get_parameter(name)
                module._parameters[name] = nn.Parameter(shared.detach().clone(), shared.requires_grad)
        for module in self.modules:
            setattr(module, _RECORD, replace(record_of(module) or MergeRecord(), untied=self))

    def tie_again(self) -> None:
        """Put the shared weights back, with the values that their first owners have now."""
        for config, value in self._configs:
            setattr(config, _ENTRY, value)
        for model, keys in self._keys:
            model.all_tied_weights_keys = keys
        for weight, places in self.owners.items() if self.is_open else ():
            for module, name in places:
                module._parameters[name] = self._shared[weight]
        self.is_open = False


def why_not_untied(model: nn.Module, path: str) -> str | None:
    """The reason why a module cannot get a weight of its own, in words that follow its name; None where it can."""
    if placement.is_offloaded(model):
        return "weights of this model are offloaded: load it on one device to untie them"
    module = model.get_submodule(path)
    for places in _tied_by_configuration(model).values():
        if any(owner is module for owner, _ in places):
            return None
    return f"{type(model).__name__} has no {_ENTRY} in its configuration that ties it"


def _tied_by_configuration(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """The weights that an entry of the configuration ties, with their owners, each once."""
    keys: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    by_configuration = {*keys, *keys.values()}
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for names in placement.shared_weights(model).values():
        plain = [name.replace(".base_layer.", ".") for name in names]
        if not by_configuration & {*plain} or names[0] in found:
            continue
        owners: dict[int, tuple[nn.Module, str]] = {}
        for name in names:
            path, _, own = name.rpartition(".")
            module = innermost(model.get_submodule(path))
            owners.setdefault(id(module), (module, own))
        if len(owners) > 1:
            found[names[0]] = list(owners.values())
    return found


# ---- what was written into a module ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeRecord:
    """What was written over a module's parameters."""

    # Parameter name → its values before any eraser; of those that were written.
    originals: dict[str, Tensor] = field(default_factory=dict)
    erasers: list[EraserInWeight] = field(default_factory=list)  # the one next to the weight first
    untied: Untied | None = None  # what has given the module a weight of its own, where it shared that of another
    digests: dict[str, int] = field(default_factory=dict)  # parameter name → `_digest` of what was written last


def record_of(module: nn.Module) -> MergeRecord | None:
    """What was written into a module's weights; None where nothing was."""
    found: MergeRecord | None = module.__dict__.get(_RECORD)
    return found


def erasers_in(module: nn.Module) -> list[EraserInWeight]:
    """The erasers in a module's weights, the one next to the weight first."""
    return (record_of(module) or MergeRecord()).erasers


def written_anew(module: nn.Module, erasers: list[EraserInWeight]) -> dict[str, Tensor]:
    """What erasers, or those before them, change in a module, from the originals, with these and no others in it."""
    record = record_of(module) or MergeRecord()
    values = placement.values_of(module) | record.originals
    return record.originals | (merged_parameters(module, values, erasers) if erasers else {})


def rewrite(module: nn.Module, erasers: list[EraserInWeight]) -> dict[str, Tensor]:
    """Let these erasers be in a module's weights, and no others; what else was added since, as a LoRA, stays.

    They are in order, the one next to the weight first. Returned are the values of the parameters that have changed.
    """
    record, present = record_of(module) or MergeRecord(), placement.values_of(module)
    values, later = dict(written_anew(module, erasers)), changed_since(module)
    before = written_anew(module, record.erasers) if later else {}
    originals = {name: present[name].clone() for name in values if name not in record.originals} | record.originals
    digests = {name: _digest(value) for name, value in values.items()}
    setattr(module, _RECORD, MergeRecord(originals, erasers, record.untied, digests))
    for name, now in later.items():
        old, new = (parts[name].to(now.device, now.dtype) for parts in (before, values))
        changed = (now.double() - old.double() + new.double()).to(now.dtype)
        values[name] = torch.where(now == old, new, changed)  # what nothing was added to is there to the bit
    for name, value in values.items():
        placement.set_parameter(module, name, value)
    return values


def withdraw(module: nn.Module, path: str) -> None:
    """Take back what the erasers of one site did to a module."""
    record = record_of(module)
    if record is None:
        return
    left = [eraser for eraser in record.erasers if eraser.path != path]
    rewrite(module, left)
    if record.untied is not None:
        if not any(map(erasers_in, record.untied.modules)):
            record.untied.tie_again()
            forget(module)
    elif not left:
        forget(module)


def forget(module: nn.Module) -> None:
    """Drop the record and its copies: what is merged stays merged."""
    untied = (record_of(module) or MergeRecord()).untied
    for other in [module, *(untied.modules if untied is not None else [])]:
        other.__dict__.pop(_RECORD, None)


def changed_since(module: nn.Module) -> dict[str, Tensor]:
    """The parameters into which something else has written since erasers were, with their values now."""
    digests = (record_of(module) or MergeRecord()).digests
    present = {name: placement.value_of(module, name) for name in digests}
    return {name: v for name, v in present.items() if v is not None and _digest(v) != digests[name]}


def _digest(value: Tensor) -> int:
    """A number that another value of a parameter is most unlikely to have: the sum of its bits, read as integers."""
    return int(value.detach().contiguous().view(_INTEGERS[value.dtype.itemsize]).sum(dtype=torch.int64))


class Snapshot:
    """Weights, their records and the layers' notes as they are now, by reference: writing puts new tensors in place."""

    def __init__(self, layers: Iterable[Any], modules: Collection[nn.Module], untied: Untied | None = None) -> None:
        notes = ("merged_adapters", "written", "_active_adapter", "_disable_adapters", "sticky_adapters")
        self.notes = [(layer, {name: copy.copy(getattr(layer, name)) for name in notes}) for layer in layers]
        self.values = [(m, {name: placement.value_of(m, name) for name in m._parameters}) for m in modules]
        self.records = [(module, record_of(module)) for module in modules]
        self.untied = untied

    def restore(self) -> None:
        """Put everything back."""
        for layer, notes in self.notes:
            for name, value in notes.items():
                setattr(layer, name, value)
        for module, values in self.values:
            for name, value in values.items():
                placement.set_parameter(module, name, value)
        for module, record in self.records:
            vars(module).pop(_RECORD, None)
            vars(module).update({} if record is None else {_RECORD: record})
        if self.untied is not None:
            self.untied.tie_again()
