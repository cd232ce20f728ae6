"""Erasers in the weights of linear layers and embeddings: the formulas, and a record by which all is taken back.

A weight may take erasers of several sites: its own, and those of a norm in front of it. The way back for one of them is
to start from the original and write the others anew, since a projection does not have an inverse. The record is kept on
the module that owns the weight. A linear layer without a bias may get one from an entry of the model's configuration,
which gives biases to several layers at once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..common.placement import (
    FLOAT_FIRST,
    has_quantised,
    is_sharded,
    set_parameter,
    value_of,
    values_of,
    why_not_reachable,
)

# These store the transpose of what they multiply by.
_TRANSPOSED = (Conv1D, nn.Embedding)
# A plain attribute of the module: it is copied with the module, and is not part of the state dict.
_RECORD = "_concept_erasure_merge_record"
# An integer of as many bytes as a number has.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class EraserInWeight:
    """One eraser on its way into one weight.

    Attributes:
        path: The site it was fitted at: the weight's own module, or one whose output that module takes.
        adapter: The adapter it belongs to.
        side: The side of the weight it acts on, `"output"` or `"input"`.
        left: `(width, rank)`.
        right: `(rank, width)`.
        bias: `(width,)`, the mean that is kept; zero for a purely linear eraser.
    """

    path: str
    adapter: str
    side: str
    left: Tensor
    right: Tensor
    bias: Tensor


@dataclass(frozen=True)
class WeightChange:
    """What erasers make of a layer `W x + c`, in float64 and as a map of column vectors: `W + B A` and `offset`.

    Attributes:
        linear: `(out, in)`, the changed weight.
        offset: `(out,)`, the changed bias; zero where there is none and none is needed.
        b: `(out, rank)`.
        a: `(rank, in)`.
    """

    linear: Tensor
    offset: Tensor
    b: Tensor
    a: Tensor


def weight_change(host: nn.Module, parameters: dict[str, Tensor], edits: Iterable[EraserInWeight]) -> WeightChange:
    """The layer that computes alone what `host` computes with erasers.

    With `P = L R`, an erased output of `W x + c` is `(I − P) W x + c − P (c − μ)`, and an erased input gives
    `W (I − P) x + c + W P μ`. An embedding's output is its rows, erased one by one.

    The host is a `Linear`, a `Conv1D`, or (output only) an `Embedding`; the eraser next to the weight comes first.
    """
    weight = parameters["weight"]
    linear = weight.double().T if isinstance(host, _TRANSPOSED) else weight.double()
    bias = parameters.get("bias")
    offset = linear.new_zeros(linear.shape[0]) if bias is None else bias.double()
    b_parts, a_parts = [linear.new_zeros(linear.shape[0], 0)], [linear.new_zeros(0, linear.shape[1])]
    for edit in edits:
        left, right, mean = (part.to(weight.device, torch.float64) for part in (edit.left, edit.right, edit.bias))
        if edit.side == "input":
            b, a = -linear @ left, right
            offset = offset - b @ (right @ mean)
        elif isinstance(host, nn.Embedding):
            b, a = -left, right @ (linear - mean[:, None])
        else:
            b, a = -left, right @ linear
            offset = offset + b @ (right @ (offset - mean))
        linear = linear + b @ a
        b_parts.append(b)
        a_parts.append(a)
    return WeightChange(linear, offset, torch.cat(b_parts, dim=1), torch.cat(a_parts, dim=0))


def merged_parameters(
    host: nn.Module, parameters: dict[str, Tensor], edits: Iterable[EraserInWeight]
) -> dict[str, Tensor]:
    """The changed parameters of `host` by name, in its dtype; with a `"bias"` if one is there or needed."""
    change = weight_change(host, parameters, edits)
    weight, bias = parameters["weight"], parameters.get("bias")
    linear = change.linear.T if isinstance(host, _TRANSPOSED) else change.linear
    changed = {"weight": linear.to(weight.dtype).contiguous()}
    if bias is not None or bool(change.offset.any()):
        changed["bias"] = change.offset.to(weight.dtype if bias is None else bias.dtype)
    return changed


def is_weight_layer(host: nn.Module) -> bool:
    """Whether `host` computes what `weight_change` supposes; subclasses with a forward of their own do not."""
    return type(host).forward in (nn.Linear.forward, Conv1D.forward, nn.Embedding.forward)


def why_not_mergeable(host: nn.Module, site: str) -> str | None:
    """The reason why an eraser at `host` has no place in its weights, or None if it has."""
    kind = type(host).__name__
    if getattr(host, "parametrizations", None):
        return f"the weight of this {kind} is parametrized; remove the parametrization first."
    if has_quantised(host):
        return f"its weight is quantised, and would not be exact after it. Use the adapter unmerged, or {FLOAT_FIRST}."
    # Subclasses with a forward of their own (scaled, wrapped layers) compute something else.
    if type(host).forward is nn.Embedding.forward:
        if site == "input":
            return "an embedding takes token ids. Use site='output'."
        if getattr(host, "max_norm", None) is not None:
            return "this embedding renormalises its rows (max_norm) after the erasure. Use the adapter unmerged."
    elif type(host).forward not in (nn.Linear.forward, Conv1D.forward):
        return (
            f"a {kind} has no weight matrix that could take the projection; only Linear, Conv1D and Embedding do. Use "
            "the adapter unmerged, or target linear layers, e.g. target_modules='all-linear'."
        )
    weight = host.get_parameter("weight")
    unreachable = why_not_reachable(host)
    if unreachable is not None:
        return f"its weight {unreachable} to merge."
    if type(weight.data) is not Tensor or is_sharded(weight):
        return "its weight is sharded. Load the model whole to merge."
    return None


# ---- what was written into a module ----------------------------------------------------------------------------------


@dataclass
class MergeRecord:
    """What was written over a module's parameters.

    Attributes:
        originals: Parameter name → its values before any eraser.
        erasers: The erasers, the one next to the weight first.
        bias_entry: What has given the module its bias; None where it has its own, or none.
        digests: Parameter name → `_digest` of the values that were written last.
    """

    originals: dict[str, Tensor]
    erasers: list[EraserInWeight] = field(default_factory=list)
    bias_entry: BiasEntry | None = None
    digests: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class BiasEntry:
    """An entry of the model's configuration that gives biases to layers that have none.

    Attributes:
        config: The configuration, or the part of it, that has the entry.
        name: The entry, such as `"attention_bias"`.
        off: Its value as it was.
        modules: All the layers to which it gives a bias.
    """

    config: Any
    name: str
    off: Any
    modules: dict[str, nn.Module]

    def open(self) -> None:
        """Set the entry, and give the layers biases of zero."""
        setattr(self.config, self.name, True)
        for module in self.modules.values():
            _opened(module).bias_entry = self
            weight = values_of(module)["weight"]
            set_parameter(module, "bias", weight.new_zeros(weight.shape[0]))

    def close(self) -> None:
        """Take the biases away again, and put the entry back."""
        setattr(self.config, self.name, self.off)
        for module in self.modules.values():
            set_parameter(module, "bias", None)
            put_record(module, None)


def record_of(module: nn.Module) -> MergeRecord | None:
    """What was written into a module's weights; None where nothing was."""
    found: MergeRecord | None = module.__dict__.get(_RECORD)
    return found


def put_record(module: nn.Module, record: MergeRecord | None) -> None:
    """Give a module this record, or none."""
    if record is None:
        module.__dict__.pop(_RECORD, None)
    else:
        setattr(module, _RECORD, record)


def _opened(module: nn.Module) -> MergeRecord:
    """The module's record; a new one takes copies of its parameters."""
    record = record_of(module)
    if record is None:
        record = MergeRecord({name: value.clone() for name, value in originals(module).items()})
        put_record(module, record)
    return record


def originals(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters as they were before any eraser, with a bias of zero where an entry has given it one."""
    record = record_of(module)
    if record is None or record.bias_entry is None:
        return values_of(module) if record is None else record.originals
    weight = record.originals["weight"]
    return record.originals | {"bias": weight.new_zeros(weight.shape[0])}


def written_anew(module: nn.Module, erasers: list[EraserInWeight]) -> dict[str, Tensor]:
    """What the parameters of a module are, from the originals, with these erasers and no others in them."""
    plain = originals(module)
    return plain | merged_parameters(module, plain, erasers) if erasers else plain


def write(module: nn.Module, values: dict[str, Tensor], erasers: list[EraserInWeight]) -> None:
    """Put merged values in place, and note all the erasers that are in them, the one next to the weight first."""
    record = _opened(module)
    record.erasers = erasers
    record.digests = record.digests | {name: _digest(value) for name, value in values.items()}
    for name, value in values.items():
        set_parameter(module, name, value)


def withdraw(module: nn.Module, path: str) -> None:
    """Take back what the erasers of one site did to a module; without others, its parameters are as they were.

    What something else has added since, as a LoRA that PEFT has merged, stays added.
    """
    record = record_of(module)
    if record is None:
        return
    left = [eraser for eraser in record.erasers if eraser.path != path]
    values, later = dict(written_anew(module, left)), changed_since(module)
    written = written_anew(module, record.erasers) if later else {}
    record.erasers, record.digests = left, {name: _digest(value) for name, value in values.items()}
    for name, now in later.items():
        before, value = (parts[name].to(now.device, now.dtype) for parts in (written, values))
        changed = (now.double() - before.double() + value.double()).to(now.dtype)
        values[name] = torch.where(now == before, value, changed)  # what nothing was added to is there to the bit
    for name, value in values.items():
        set_parameter(module, name, value)
    if record.bias_entry is not None:
        records = map(record_of, record.bias_entry.modules.values())
        if not any(other is not None and other.erasers for other in records):
            record.bias_entry.close()
    elif not left:
        put_record(module, None)


def forget(module: nn.Module) -> None:
    """Drop the record and its copies: what is merged stays merged."""
    record = record_of(module)
    put_record(module, None)
    for other in record.bias_entry.modules.values() if record is not None and record.bias_entry is not None else ():
        put_record(other, None)


def changed_since(module: nn.Module) -> dict[str, Tensor]:
    """The parameters into which something else has written since erasers were, with their values now."""
    record = record_of(module)
    digests = record.digests if record is not None else {}
    present = {name: value_of(module, name) for name in digests}
    return {name: v for name, v in present.items() if v is not None and _digest(v) != digests[name]}


def _digest(value: Tensor) -> int:
    """A number that another value of a parameter is most unlikely to have: the sum of its bits, read as integers."""
    return int(value.detach().contiguous().view(_INTEGERS[value.dtype.itemsize]).sum(dtype=torch.int64))


class Snapshot:
    """Weights, their records and the layers' notes as they are now, by reference: writing puts new tensors in place."""

    def __init__(self, layers: Iterable[Any], modules: Sequence[nn.Module], entries: Sequence[BiasEntry] = ()) -> None:
        notes = ("merged_adapters", "written", "_active_adapter", "_disable_adapters", "sticky_adapters")
        self.notes = [(layer, {name: copy.copy(getattr(layer, name)) for name in notes}) for layer in layers]
        self.values = [(m, {name: value_of(m, name) for name in m._parameters}) for m in modules]
        self.records = [(module, copy.copy(record_of(module))) for module in modules]
        self.entries = entries

    def restore(self) -> None:
        """Put everything back."""
        for layer, notes in self.notes:
            for name, value in notes.items():
                setattr(layer, name, value)
        for module, values in self.values:
            for name, value in values.items():
                set_parameter(module, name, value)
        for module, record in self.records:
            put_record(module, record)
        for entry in self.entries:
            setattr(entry.config, entry.name, entry.off)


# ---- entries of the configuration that give biases -------------------------------------------------------------------


def bias_entries(model: nn.Module) -> list[BiasEntry]:
    """The entries that are off and would give biases, and nothing else, to layers of `model` that have none."""
    candidates = list(_entries_that_are_off(model.config)) if isinstance(model, PreTrainedModel) else []
    plain = _shapes(model, model.config) if candidates else {}
    modules = dict(model.named_modules(remove_duplicate=False))
    linear = {path: module for path, module in modules.items() if type(module).forward is nn.Linear.forward}
    free = {f"{path}.bias": path for path, module in linear.items() if module._parameters.get("bias") is None}
    found = []
    for keys, name in candidates:
        config = copy.deepcopy(model.config)
        setattr(functools.reduce(getattr, keys, config), name, True)
        try:
            shapes = _shapes(model, config)
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            continue  # the architecture does not support what its configuration can say
        new = [key for key in shapes if key not in plain]
        if new and all(key in free for key in new) and all(plain[key] == shapes.get(key) for key in plain):
            part: Any = functools.reduce(getattr, keys, model.config)
            found.append(BiasEntry(part, name, getattr(part, name), {free[key]: linear[free[key]] for key in new}))
    return found


def _entries_that_are_off(
    config: PretrainedConfig, keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Entries that speak of a bias and are off, in the configuration and the configurations inside it."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _entries_that_are_off(value, (*keys, name))
        elif "bias" in name and (value is False or value is None):
            yield keys, name


def _shapes(model: nn.Module, config: PretrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(config))
    return {name: value.shape for name, value in built.state_dict().items()}
