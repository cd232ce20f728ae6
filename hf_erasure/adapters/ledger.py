"""What merging has done to a weight, kept on the module that owns it, so that all of it can be taken back.

A weight may take erasers of several sites: its own, and those of a norm in front of it. The way back for one of them is
to start from the original and write the others anew, since a projection has no inverse.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .merging import Edit, merged_parameters

# A plain attribute of the module: it is copied with the module, and is no part of the state dict.
_LEDGER = "_concept_erasure_ledger"


@dataclass
class Ledger:
    """The originals of a module's parameters (None: there was no such parameter) and what was written over them."""

    originals: dict[str, Tensor | None]
    edits: list[Edit] = field(default_factory=list)
    switch: BiasSwitch | None = None


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
            open_ledger(module).switch = self
            weight = module.get_parameter("weight")
            set_parameter(module, "bias", weight.new_zeros(weight.shape[0]))

    def close(self) -> None:
        """Take the biases away again, and put the entry back."""
        setattr(self.config, self.name, self.off)
        for module in self.modules.values():
            set_parameter(module, "bias", None)
            put_ledger(module, None)


def ledger_of(module: nn.Module) -> Ledger | None:
    """What was written into a module's weights; None where nothing was."""
    found: Ledger | None = module.__dict__.get(_LEDGER)
    return found


def open_ledger(module: nn.Module) -> Ledger:
    """The module's ledger; a new one takes copies of its parameters."""
    ledger = ledger_of(module)
    if ledger is None:
        parameters = {name: module._parameters.get(name) for name in ("weight", "bias")}
        ledger = Ledger({name: None if p is None else p.detach().clone() for name, p in parameters.items()})
        put_ledger(module, ledger)
    return ledger


def put_ledger(module: nn.Module, ledger: Ledger | None) -> None:
    """Give a module this ledger, or none."""
    if ledger is None:
        module.__dict__.pop(_LEDGER, None)
    else:
        setattr(module, _LEDGER, ledger)


def write(module: nn.Module, values: dict[str, Tensor], edits: list[Edit]) -> None:
    """Put merged values in place, and note whose they are."""
    open_ledger(module).edits.extend(edits)
    for name, value in values.items():
        set_parameter(module, name, value)


def withdraw(module: nn.Module, path: str) -> None:
    """Take back what the erasers of one site did to a module; without others, its parameters are as they were."""
    ledger = ledger_of(module)
    if ledger is None:
        return
    ledger.edits = [edit for edit in ledger.edits if edit.path != path]
    originals: dict[str, Any] = dict(ledger.originals)
    if ledger.switch is not None:
        originals["bias"] = originals["weight"].new_zeros(originals["weight"].shape[0])
    if ledger.edits:
        present = {name: value for name, value in originals.items() if value is not None}
        originals |= merged_parameters(module, present, ledger.edits)
    for name, value in originals.items():
        set_parameter(module, name, value)
    if ledger.switch is not None:
        if not any(_has_edits(other) for other in ledger.switch.modules.values()):
            ledger.switch.close()
    elif not ledger.edits:
        put_ledger(module, None)


def forget(module: nn.Module) -> None:
    """Drop the ledger and its copies: what is merged stays merged."""
    ledger = ledger_of(module)
    put_ledger(module, None)
    for other in ledger.switch.modules.values() if ledger is not None and ledger.switch is not None else ():
        put_ledger(other, None)


def set_parameter(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Give a parameter a value, where it lives; None takes the parameter away."""
    present = module._parameters.get(name)
    if value is None:
        module._parameters[name] = None
    elif present is None:
        module.register_parameter(name, nn.Parameter(value, module.get_parameter("weight").requires_grad))
    else:
        present.data = value.to(present.device, present.dtype)


def _has_edits(module: nn.Module) -> bool:
    ledger = ledger_of(module)
    return ledger is not None and bool(ledger.edits)
