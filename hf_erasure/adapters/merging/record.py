"""What merging has done to a weight, kept on the module that owns it, so that all of it can be taken back.

A weight may take erasers of several sites: its own, and those of a norm in front of it. The way back for one of them is
to start from the original and write the others anew, since a projection has no inverse.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..common.layer import ordinary
from ..common.placement import add_parameter, drop_parameter, owns_offloaded, value_of, values_of, write_value
from .formulas import EraserInWeight, merged_parameters

# A plain attribute of the module: it is copied with the module, and is no part of the state dict.
_RECORD = "_concept_erasure_merge_record"


@dataclass
class MergeRecord:
    """The originals of a module's parameters (None: there was no such parameter) and what was written over them.

    Attributes:
        originals: Parameter name → its values before any eraser.
        edits: The erasers, the one next to the weight first.
        switch: What has given the module its bias; None where it has its own, or none.
        digests: Parameter name → `digest` of the values that were written last.
    """

    originals: dict[str, Tensor | None]
    edits: list[EraserInWeight] = field(default_factory=list)
    switch: BiasSwitch | None = None
    digests: dict[str, int] = field(default_factory=dict)


@dataclass
class BiasSwitch:
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
            open_record(module).switch = self
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


def open_record(module: nn.Module) -> MergeRecord:
    """The module's record; a new one takes copies of its parameters."""
    record = record_of(module)
    if record is None:
        values = {name: value_of(module, name) for name in ("weight", "bias")}
        record = MergeRecord({name: None if value is None else value.clone() for name, value in values.items()})
        put_record(module, record)
    return record


def put_record(module: nn.Module, record: MergeRecord | None) -> None:
    """Give a module this record, or none."""
    if record is None:
        module.__dict__.pop(_RECORD, None)
    else:
        setattr(module, _RECORD, record)


def originals(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's parameters as they were before any eraser, with a bias of zero where a switch has given it one."""
    record = open_record(module)
    found = dict(record.originals)
    if record.switch is not None and found["weight"] is not None:
        found["bias"] = found["weight"].new_zeros(found["weight"].shape[0])
    return found


def write(module: nn.Module, values: dict[str, Tensor], edits: list[EraserInWeight]) -> None:
    """Put merged values in place, and note all the erasers that are in them, the one next to the weight first."""
    record = open_record(module)
    record.edits = edits
    record.digests = {**record.digests, **_digests(values)}
    for name, value in values.items():
        set_parameter(module, name, value)


def withdraw(module: nn.Module, path: str) -> None:
    """Take back what the erasers of one site did to a module; without others, its parameters are as they were.

    What something else has added since, as a LoRA that PEFT has merged, stays added.
    """
    record = record_of(module)
    if record is None:
        return
    all_edits = record.edits
    record.edits = [edit for edit in all_edits if edit.path != path]
    unmerged = originals(module)
    present = {name: value for name, value in unmerged.items() if value is not None}
    values = unmerged | (merged_parameters(module, present, record.edits) if record.edits else {})
    later = _changed_since(module, record)
    record.digests = _digests(values)
    if later:
        written = unmerged | merged_parameters(module, present, all_edits)
        values |= {name: _with_change(now, written[name], values[name]) for name, now in later.items()}
    for name, value in values.items():
        set_parameter(module, name, value)
    if record.switch is not None:
        if not any(_has_edits(other) for other in record.switch.modules.values()):
            record.switch.close()
    elif not record.edits:
        put_record(module, None)


def forget(module: nn.Module) -> None:
    """Drop the record and its copies: what is merged stays merged."""
    record = record_of(module)
    put_record(module, None)
    for other in record.switch.modules.values() if record is not None and record.switch is not None else ():
        put_record(other, None)


def set_parameter(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Give a parameter a value, where it lives; None takes the parameter away."""
    present = module._parameters.get(name)
    if value is None:
        drop_parameter(module, name)
    elif present is None and owns_offloaded(module):
        add_parameter(module, name, value, requires_grad=module.get_parameter("weight").requires_grad)
    elif present is None:
        module.register_parameter(name, nn.Parameter(ordinary(value), module.get_parameter("weight").requires_grad))
    elif owns_offloaded(module):
        write_value(module, name, value)
    else:
        present.data = ordinary(value.to(present.device, present.dtype))


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


def _digests(values: dict[str, Any]) -> dict[str, int]:
    return {name: _digest(value) for name, value in values.items() if value is not None}


def _digest(value: Tensor) -> int:
    """A number that another value of a parameter is most unlikely to have: the sum of its bits, read as integers."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(value.detach().contiguous().view(integers[value.dtype.itemsize]).sum(dtype=torch.int64))


def _has_edits(module: nn.Module) -> bool:
    record = record_of(module)
    return record is not None and bool(record.edits)


def bias_switches(model: nn.Module) -> list[BiasSwitch]:
    """The entries that are off and would give biases, and nothing else, to layers of `model` that have none."""
    if not isinstance(model, PreTrainedModel):
        return []
    candidates = [(keys, name) for keys, name in _bias_entries(model.config)]
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
        if not new or any(plain[key] != shapes.get(key) for key in plain):
            continue
        modules = {key.removesuffix(".bias"): _bias_free(model, key) for key in new}
        if all(module is not None for module in modules.values()):
            part = _part(model.config, keys)
            layers = {path: module for path, module in modules.items() if module is not None}
            found.append(BiasSwitch(part, name, getattr(part, name), layers))
    return found


def _bias_entries(config: PretrainedConfig, keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str]]:
    """Entries that speak of a bias and are off, in the configuration and the configurations inside it."""
    found = []
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found += _bias_entries(value, (*keys, name))
        elif "bias" in name and (value is False or value is None):
            found.append((keys, name))
    return found


def _part(config: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        config = getattr(config, key)
    return config


def _shapes(model: nn.Module, config: PretrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(config))
    return {name: value.shape for name, value in built.state_dict().items()}


def _bias_free(model: nn.Module, key: str) -> nn.Module | None:
    path, _, name = key.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    is_free = type(module).forward is nn.Linear.forward and module._parameters.get("bias") is None
    return module if name == "bias" and is_free else None
