"""Erasers in weights: the formulas, and a record from which a merge is undone.

A weight may take erasers of several sites: its own, and those of a norm in front of it. A projection does not have an
inverse, so to remove one eraser the others are written anew into the original weight. The record is kept on the module
that owns the weight.

A weight is a tensor of any shape with an axis along which the features of the hidden state lie: a matrix, a stack of
matrices of experts, the kernel of a convolution. A linear map commutes with any operation along the other axes.
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
# Forward of a module → the axes of its weight along which the features of its input and of its output lie.
_AXES: dict[Any, dict[str, int]] = {
    nn.Linear.forward: {"input": 1, "output": 0},
    Conv1D.forward: {"input": 0, "output": 1},
    nn.Embedding.forward: {"output": 1},
    **{kind.forward: {"input": 1, "output": 0} for kind in CONVOLUTIONS},
}
# The record is a plain attribute of the module: it is copied with the module, and is not part of the state dict.
_RECORD = "_concept_erasure_merge_record"
# The entry of a configuration that ties the embedding and the head, and all other weights that are shared.
_TIE_FIELD = "tie_word_embeddings"
# Bytes of a number → the integer type of the same size.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class EraserInWeight:
    """One eraser that is merged into one weight."""

    path: str  # the site: the weight's own module, or a module whose output the weight's module takes
    adapter: str  # the adapter it belongs to
    side: str  # the side of the weight it acts on, `"output"` or `"input"`
    left: Tensor  # (width, rank)
    right: Tensor  # (rank, width)
    bias: Tensor  # (width,), the mean that is kept; zero for a purely linear eraser
    parameter: str = "weight"  # the name of the weight in its module
    axis: int = 1  # the axis of the weight along which the features of the hidden state lie


@dataclass(frozen=True)
class WeightChange:
    """A weight and its bias as erasers change them, in float64.

    If the weight is a matrix `(out, in)`, or its other axes have length one, it has changed by `b @ a`.
    """

    weight: Tensor  # the changed weight, in its own shape
    offset: Tensor  # (out,), the changed bias; zero where the weight has no bias and needs none
    b: Tensor  # (out, rank)
    a: Tensor  # (rank, in)


def weight_change(
    weight: Tensor, bias: Tensor | None, edits: Iterable[EraserInWeight], scale: float | None = None
) -> WeightChange:
    """Make the weight and the bias `(out,)` that act like these with erasers, the one next to the weight first.

    With `P = L R`, an erased output of `W x + c` is `(I − P) W x + c − P (c − μ)`, and an erased input gives
    `W (I − P) x + c + W P μ`. An embedding's output is its rows, erased one by one; `scale` is the factor by which an
    embedding's rows are multiplied, and None for a weight of another module.
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
    """The changed parameters of `host` by name, each in its own dtype."""
    by_parameter: dict[str, list[EraserInWeight]] = {}
    for edit in edits:
        by_parameter.setdefault(edit.parameter, []).append(edit)
    changed: dict[str, Tensor] = {}
    for name, here in by_parameter.items():
        weight, bias_name, scale = parameters[name], bias_of(host, name), scale_of(host)
        bias = None if bias_name is None else parameters[bias_name]
        if is_expert_stack(host, name, here):
            changes = [weight_change(*expert, scale) for expert in by_expert(weight, bias, here)]
            changed[name] = torch.stack([change.weight.to(weight.dtype) for change in changes])
            offset = torch.stack([change.offset for change in changes])
        else:
            change = weight_change(weight, bias, here, scale)
            changed[name], offset = change.weight.to(weight.dtype).contiguous(), change.offset
        if bias_name is not None and bias is not None:
            changed[bias_name] = offset.to(bias.dtype)
    return changed


def is_expert_stack(host: nn.Module, parameter: str, edits: Iterable[EraserInWeight]) -> bool:
    """Whether a weight is a stack of experts' matrices; they are changed one by one, since float64 takes memory."""
    is_cube = host._parameters[parameter].dim() == 3  # type: ignore[union-attr]
    return is_cube and not isinstance(host, CONVOLUTIONS) and all(edit.axis > 0 for edit in edits)


def by_expert(
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
    """Whether `host` is known to compute what `weight_change` assumes; a module with another forward is not."""
    return axis_of(host, "output") is not None


def bias_of(host: nn.Module, parameter: str) -> str | None:
    """The name of the bias that a module adds to the product with a weight; None where it is not known."""
    name = "bias" if type(host).forward in _AXES else f"{parameter}_bias"  # experts name it so
    return name if host._parameters.get(name) is not None else None


def takes_mean(host: nn.Module, parameter: str, side: str) -> bool:
    """Whether a module has a place for the mean that an affine eraser keeps: its bias, or the rows of an embedding."""
    if scale_of(host) is not None:
        return True
    if bias_of(host, parameter) is None:
        return False
    if isinstance(host, CONVOLUTIONS) and side == "input":  # the padding around an input is not erased
        return not any(host.padding) if isinstance(host.padding, tuple) else host.padding == "valid"
    # The outputs of experts are weighted and summed, and the weights need not sum to one.
    return side == "input" or type(host).forward in _AXES


def scale_of(host: nn.Module) -> float | None:
    """The factor of an embedding's rows when they are looked up; None where a module does not only scale rows."""
    if type(host).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(host, "embed_scale", None)
    if not isinstance(host, nn.Embedding) or scale is None or getattr(scale, "is_meta", False):
        return None
    factor, trial = float(scale), copy.copy(host)
    rows = torch.arange(1.0, 7.0).view(3, 2).to(scale.device if isinstance(scale, Tensor) else "cpu")
    trial.__dict__ = {**host.__dict__, "_parameters": {"weight": rows}, "padding_idx": None}
    try:
        found = type(host).forward(trial, torch.arange(3, device=rows.device))
    except Exception:  # an unknown module may raise any error when it is called with ids alone
        return None
    return factor if torch.equal(found, rows * factor) else None


def why_not_mergeable(host: nn.Module, site: str, parameter: str = "weight") -> str | None:
    """The reason why an eraser at one side of `host` cannot be merged into its weight; None if it can."""
    kind = type(host).__name__
    if getattr(host, "parametrizations", None):
        return f"the weight of this {kind} is parametrized; remove the parametrization first."
    if placement.has_quantised(host):
        reason = "its weight is quantised, and would not be exact after a merge"
        return f"{reason}. Use the adapter unmerged, or {placement.FLOAT_FIRST}."
    if isinstance(host, nn.Embedding):
        if site == "input":
            return "an embedding takes token ids. Use site='output'."
        if getattr(host, "max_norm", None) is not None:
            return "this embedding renormalises its rows (max_norm) after the erasure. Use the adapter unmerged."
    weight = host._parameters.get(parameter)
    if weight is None:
        return f"this {kind} has no parameter {parameter!r}: the adapter was fitted on another model."
    if weight.device.type == "meta" and placement.hook_of(host) is None:
        return f"its weight {placement.OUT_OF_REACH} to merge."
    if type(weight.data) is not Tensor or placement.is_sharded(weight):
        return "its weight is sharded. Load the model whole to merge."
    return None


# ---- tied weights, which a merge must separate -----------------------------------------------------------------------


class TiedWeights:
    """The tied weights of a model, to be given separate values; the configuration is changed for reloading, too."""

    def __init__(self, model: nn.Module) -> None:
        self.owners = _tied_by_configuration(model)  # tied weight → the modules that own it, and its names there
        self.modules = [module for places in self.owners.values() for module, _ in places]
        self._shared = {weight: places[0][0].get_parameter(places[0][1]) for weight, places in self.owners.items()}
        models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        configs: list[Any] = [module.config for module in models]
        for config in configs:  # the loop also appends the configurations inside them, each once
            inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
            configs += [value for value in inner if not any(value is known for known in configs)]
        ties = {id(config): config for config in configs if getattr(config, _TIE_FIELD, False)}
        self._configs = [(config, getattr(config, _TIE_FIELD)) for config in ties.values()]
        self._keys: list[tuple[Any, dict[str, str]]] = [
            (m, m.all_tied_weights_keys) for m in models if getattr(m, "all_tied_weights_keys", None)
        ]
        self.is_untied = False

    @property
    def bytes(self) -> int:
        """How many bytes larger the model is once its weights are untied."""
        return sum((len(self.owners[weight]) - 1) * p.numel() * p.element_size() for weight, p in self._shared.items())

    def untie(self) -> None:
        """Give each owner of a weight but the first a copy; the configuration then ties nothing."""
        self.is_untied = True
        for config, _ in self._configs:
            setattr(config, _TIE_FIELD, False)
        for model, _ in self._keys:
            model.all_tied_weights_keys = {}
        for places in self.owners.values():
            for module, name in places[1:]:
                shared = module.get_parameter(name)
                module._parameters[name] = nn.Parameter(shared.detach().clone(), shared.requires_grad)
        for module in self.modules:
            setattr(module, _RECORD, replace(record_of(module) or MergeRecord(), untied=self))

    def tie(self) -> None:
        """Put the shared weights back, with the values that their first owners have now."""
        for config, value in self._configs:
            setattr(config, _TIE_FIELD, value)
        for model, keys in self._keys:
            model.all_tied_weights_keys = keys
        for weight, places in self.owners.items() if self.is_untied else ():
            for module, name in places:
                module._parameters[name] = self._shared[weight]
        self.is_untied = False


def why_not_untied(model: nn.Module, path: str) -> str | None:
    """The reason why a module cannot get its own weight, in words that follow its name; None where it can."""
    if placement.is_offloaded(model):
        return "weights of this model are offloaded: load it on one device to untie them"
    module = model.get_submodule(path)
    for places in _tied_by_configuration(model).values():
        if any(owner is module for owner, _ in places):
            return None
    return f"{type(model).__name__} has no {_TIE_FIELD} in its configuration that ties it"


def _tied_by_configuration(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Name of each weight that the configuration ties → its owners, each once."""
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


# ---- the record of what was written into a module --------------------------------------------------------------------


@dataclass(frozen=True)
class MergeRecord:
    """What a merge has changed in a module's parameters."""

    # Name of a parameter that was changed → its values before any eraser.
    originals: dict[str, Tensor] = field(default_factory=dict)
    erasers: list[EraserInWeight] = field(default_factory=list)  # the one next to the weight first
    untied: TiedWeights | None = None  # the object that has untied the module's weight, if it was tied
    digests: dict[str, int] = field(default_factory=dict)  # parameter name → `_digest` of the values written last


def record_of(module: nn.Module) -> MergeRecord | None:
    """The record of what was merged into a module's weights; None where nothing was."""
    found: MergeRecord | None = module.__dict__.get(_RECORD)
    return found


def erasers_in(module: nn.Module) -> list[EraserInWeight]:
    """The erasers in a module's weights, the one next to the weight first."""
    return (record_of(module) or MergeRecord()).erasers


def values_with_erasers(module: nn.Module, erasers: list[EraserInWeight]) -> dict[str, Tensor]:
    """The values, made from the originals, of all parameters that former erasers or these change, with only these."""
    record = record_of(module) or MergeRecord()
    values = placement.values_of(module) | record.originals
    return record.originals | (merged_parameters(module, values, erasers) if erasers else {})


def rewrite(module: nn.Module, erasers: list[EraserInWeight]) -> dict[str, Tensor]:
    """Write a module's weights with only these erasers; other changes since, such as a merged LoRA, stay.

    The erasers are in order, the one next to the weight first. Returns the values of the parameters that have changed.
    """
    record, present = record_of(module) or MergeRecord(), placement.values_of(module)
    values, later = dict(values_with_erasers(module, erasers)), changed_since(module)
    before = values_with_erasers(module, record.erasers) if later else {}
    originals = {name: present[name].clone() for name in values if name not in record.originals} | record.originals
    digests = {name: _digest(value) for name, value in values.items()}
    setattr(module, _RECORD, MergeRecord(originals, erasers, record.untied, digests))
    for name, now in later.items():
        old, new = (parts[name].to(now.device, now.dtype) for parts in (before, values))
        changed = (now.double() - old.double() + new.double()).to(now.dtype)
        values[name] = torch.where(now == old, new, changed)  # entries without a later change are exact bit for bit
    for name, value in values.items():
        placement.set_parameter(module, name, value)
    return values


def remove_site(module: nn.Module, path: str) -> None:
    """Remove the erasers of one site from a module's weights."""
    record = record_of(module)
    if record is None:
        return
    left = [eraser for eraser in record.erasers if eraser.path != path]
    rewrite(module, left)
    if record.untied is not None:
        if not any(map(erasers_in, record.untied.modules)):
            record.untied.tie()
            forget_record(module)
    elif not left:
        forget_record(module)


def forget_record(module: nn.Module) -> None:
    """Drop the record and its copies: merged erasers stay merged."""
    untied = (record_of(module) or MergeRecord()).untied
    for other in [module, *(untied.modules if untied is not None else [])]:
        other.__dict__.pop(_RECORD, None)


def changed_since(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that other code has changed after erasers were merged, with their present values."""
    digests = (record_of(module) or MergeRecord()).digests
    present = {name: placement.value_of(module, name) for name in digests}
    return {name: v for name, v in present.items() if v is not None and _digest(v) != digests[name]}


def _digest(value: Tensor) -> int:
    """The sum of a parameter's numbers, their bits read as integers; it almost always changes with the values."""
    return int(value.detach().contiguous().view(_INTEGERS[value.dtype.itemsize]).sum(dtype=torch.int64))


class Snapshot:
    """Present weights, records and attributes of layers; references are enough, since a merge makes new tensors."""

    def __init__(self, layers: Iterable[Any], modules: Collection[nn.Module], tied: TiedWeights | None = None) -> None:
        attributes = ("merged_adapters", "merged_into", "_active_adapter", "_disable_adapters", "sticky_adapters")
        self.attributes = [(layer, {name: copy.copy(getattr(layer, name)) for name in attributes}) for layer in layers]
        self.values = [(m, {name: placement.value_of(m, name) for name in m._parameters}) for m in modules]
        self.records = [(module, record_of(module)) for module in modules]
        self.tied = tied

    def restore(self) -> None:
        """Restore everything."""
        for layer, attributes in self.attributes:
            for name, value in attributes.items():
                setattr(layer, name, value)
        for module, values in self.values:
            for name, value in values.items():
                placement.set_parameter(module, name, value)
        for module, record in self.records:
            vars(module).pop(_RECORD, None)
            vars(module).update({} if record is None else {_RECORD: record})
        if self.tied is not None:
            self.tied.tie()
