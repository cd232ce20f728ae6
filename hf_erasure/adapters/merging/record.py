"""What merging has done to a weight, kept on the module that owns it, so that all of it can be taken back.

A weight may take erasers of several sites: its own, and those of a norm in front of it. The way back for one of them is
to start from the original and write the others anew, since a projection does not have an inverse. A linear layer
without a bias may get one from an entry of the model's configuration, which gives biases to several layers at once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..common.placement import set_parameter, value_of, values_of
from .formulas import EraserInWeight, merged_parameters

# A plain attribute of the module: it is copied with the module, and is not part of the state dict.
_RECORD = "_concept_erasure_merge_record"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class MergeRecord:
    """What was written over a module's parameters.

    Attributes:
        originals: Parameter name → its values before any eraser; None where there was no such parameter.
        erasers: The erasers, the one next to the weight first.
        bias_entry: What has given the module its bias; None where it has its own, or none.
        digests: Parameter name → `_digest` of the values that were written last.
    """

    originals: dict[str, Tensor | None]
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
        values = {name: value_of(module, name) for name in ("weight", "bias")}
        record = MergeRecord({name: None if value is None else value.clone() for name, value in values.items()})
        put_record(module, record)
    return record


def originals(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's parameters as they were before any eraser, with a bias of zero where an entry has given it one."""
    record = _opened(module)
    found = dict(record.originals)
    if record.bias_entry is not None and found["weight"] is not None:
        found["bias"] = found["weight"].new_zeros(found["weight"].shape[0])
    return found


def _written_anew(module: nn.Module, erasers: list[EraserInWeight]) -> dict[str, Tensor | None]:
    """What the parameters of a module are, from the originals, with these erasers and no others in them."""
    plain = originals(module)
    present = {name: value for name, value in plain.items() if value is not None}
    return plain | (merged_parameters(module, present, erasers) if erasers else {})


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
    values, later = _written_anew(module, left), _changed_since(module, record)
    if later:
        written = _written_anew(module, record.erasers)
    record.erasers, record.digests = left, {name: _digest(v) for name, v in values.items() if v is not None}
    for name, now in later.items():
        values[name] = _with_change(now, written[name], values[name])
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


def was_changed(module: nn.Module) -> bool:
    """Whether something else has written into a module's weights since erasers were."""
    record = record_of(module)
    return record is not None and bool(_changed_since(module, record))


def _changed_since(module: nn.Module, record: MergeRecord) -> dict[str, Tensor]:
    """The parameters that are not what was written, with their values now."""
    present = {name: value_of(module, name) for name in record.digests}
    return {name: v for name, v in present.items() if v is not None and _digest(v) != record.digests[name]}


def _with_change(now: Tensor, written: Tensor | None, value: Tensor | None) -> Tensor | None:
    """`value`, and on top of it what `now` differs by from `written`; where they agree, `value` to the bit."""
    if value is None or written is None:
        return value
    written, value = written.to(now.device, now.dtype), value.to(now.device, now.dtype)
    return torch.where(now == written, value, (now.double() - written.double() + value.double()).to(now.dtype))


def _digest(value: Tensor) -> int:
    """A number that another value of a parameter is most unlikely to have: the sum of its bits, read as integers."""
    return int(value.detach().contiguous().view(_INTEGERS[value.dtype.itemsize]).sum(dtype=torch.int64))


class Snapshot:
    """Weights, their records and the layers' notes as they are now, by reference: writing puts new tensors in place.

    Args:
        layers: The erasure layers.
        modules: The modules that own the weights.
        entries: Entries of the configuration that may be set.
    """

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
    found = []
    for keys, name in candidates:
        config = copy.deepcopy(model.config)
        setattr(_part(config, keys), name, True)
        try:
            shapes = _shapes(model, config)
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            continue  # the architecture does not support what its configuration can say
        new = [key for key in shapes if key not in plain]
        modules = {key.removesuffix(".bias"): _bias_free(model, key) for key in new}
        layers = {path: module for path, module in modules.items() if module is not None}
        if new and len(layers) == len(new) and all(plain[key] == shapes.get(key) for key in plain):
            part = _part(model.config, keys)
            found.append(BiasEntry(part, name, getattr(part, name), layers))
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


def _part(config: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        config = getattr(config, key)
    return config


def _shapes(model: nn.Module, config: PretrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(config))
    return {name: value.shape for name, value in built.state_dict().items()}


def _bias_free(model: nn.Module, key: str) -> nn.Module | None:
    """The linear layer without a bias that a tensor's name would be the bias of; None where there is none."""
    path, _, name = key.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    is_free = type(module).forward is nn.Linear.forward and module._parameters.get("bias") is None
    return module if name == "bias" and is_free else None
