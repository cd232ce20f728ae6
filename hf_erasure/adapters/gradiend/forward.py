"""A module's forward pass in which changed values hide its parameters.

While `forward` runs, an attribute of the changed value hides the parameter; the parameter itself stays where it is, for
the optimizer, `state_dict` and other threads. Where another module reads a parameter without calling its owner, the
value is in place while that other module's `forward` runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..common.placement import value_where_it_runs
from .edit import WeightEdit, with_gradient

if TYPE_CHECKING:
    from .layer import GradiendLayer


# Held while a forward pass puts its values in place or takes them away, never while a module runs.
_LOCK = threading.RLock()
# A thread, and whether it runs with gradients.
_Pass = tuple[int, bool]


class ForwardWithEdits:
    """Stands in for a module's `forward`, and hides parameters behind their changed values while that runs.

    It is put inside of accelerate's own wrapper, which brings the weights of an offloaded module. Several threads may
    be inside at once: the values stay until the last one leaves.

    Attributes:
        module: The module.
        edits: What hides its own parameters: a layer, the parameter's name there, and its name here.
        read: Those of other modules whose parameters this one reads without calling them, with the layer they are for.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.edits: list[tuple[GradiendLayer, str, str]] = []
        self.read: list[tuple[GradiendLayer, ForwardWithEdits]] = []
        self._all: list[ForwardWithEdits] = []
        self._inside: dict[_Pass, int] = {}
        self._wrapped: Callable[..., Any] | None = None

    def add(self, layer: GradiendLayer, parameter: str, own_name: str) -> None:
        """Hide `own_name` behind what `layer` makes of its `parameter`."""
        self._enter_module()
        self.edits.append((layer, parameter, own_name))
        self._list_all()

    def add_read(self, layer: GradiendLayer, other: ForwardWithEdits) -> None:
        """Hide the parameters of another module, too, while this one runs."""
        self._enter_module()
        self.read.append((layer, other))
        self._list_all()

    def remove(self, layer: GradiendLayer) -> None:
        """Take back what was added for a layer; without others, the module is as it was."""
        self.edits = [edit for edit in self.edits if edit[0] is not layer]
        self.read = [read for read in self.read if read[0] is not layer]
        self._list_all()
        place = _place_of_forward(self.module)
        if self._all or self.module.__dict__.get(place) is not self:
            return
        if self._wrapped is not None:
            self.module.__dict__[place] = self._wrapped
        elif place == "forward":
            del self.module.__dict__[place]
        else:  # accelerate came later, and took this for the module's own
            self.module.__dict__[place] = type(self.module).forward.__get__(self.module)

    def _enter_module(self) -> None:
        if not self._all:
            place = _place_of_forward(self.module)
            self._wrapped = self.module.__dict__.get(place)
            self.module.__dict__[place] = self

    def _list_all(self) -> None:
        own = [self] if self.edits else []
        self._all = own + list({id(other): other for _, other in self.read}.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's `forward` returns with the changed values in place."""
        if args and args[0] is self.module:  # accelerate binds what it unwraps to the module
            args = args[1:]
        if torch.compiler.is_compiling():
            return self._compiled(*args, **kwargs)
        here = (threading.get_ident(), torch.is_grad_enabled())
        entered: list[ForwardWithEdits] = []
        try:
            for edits in self._all:
                if edits._enter(here):
                    entered.append(edits)
            return self._run(*args, **kwargs)
        finally:
            for edits in entered:
                edits._leave(here)

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        shown = []
        for edits in self._all:
            place = edits.module.__dict__
            # Those of a module around this one are in place already.
            values = {name: value for name, value in edits._values().items() if name not in place}
            place.update(values)
            shown.append((edits.module, values))
            _list_weights(edits.module)
        try:
            return self._run(*args, **kwargs)
        finally:
            for module, values in shown:
                for name in values:
                    del module.__dict__[name]
                _list_weights(module)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self._wrapped is not None:
            return self._wrapped(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _enter(self, here: _Pass) -> bool:
        """Put the changed values in place; false where there are none."""
        with _LOCK:
            # The module that reads them has put them in place, and calls this one as well.
            if here not in self._inside:
                values = self._values()
                if not values:
                    return False
                self._show(values)
                _list_weights(self.module)
            self._inside[here] = self._inside.get(here, 0) + 1
            return True

    def _leave(self, here: _Pass) -> None:
        with _LOCK:
            self._inside[here] -= 1
            if not self._inside[here]:
                del self._inside[here]
            if not self._inside:
                for _, _, name in self.edits:
                    self.module.__dict__.pop(name, None)
                _list_weights(self.module)

    def _values(self) -> dict[str, Tensor]:
        """What the acting adapters make of the parameters; those that none changes are left out."""
        weights: dict[str, Tensor] = {}
        edits: dict[str, list[WeightEdit]] = {}
        for layer, parameter, name in self.edits:
            weight: Tensor | None = self.module._parameters.get(name)
            if weight is not None and weight.device.type == "meta":
                weight = value_where_it_runs(self.module, name)
            if weight is not None:
                weights[name] = weight
                edits.setdefault(name, []).extend(layer.acting_edits(parameter, weight.device))
        return {name: with_gradient(weights[name], found) for name, found in edits.items() if found}

    def _show(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            shown = self.module.__dict__.get(name)
            # Another thread that runs without gradients must not take the graph away from one that runs with them.
            if shown is None or value.requires_grad or not shown.requires_grad:
                self.module.__dict__[name] = value

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What `inspect.signature` is to look at."""
        return self._wrapped or type(self.module).forward.__get__(self.module)


def forward_of(module: nn.Module) -> ForwardWithEdits:
    """What stands in for the forward of a module, a new one where nothing does."""
    present = module.__dict__.get(_place_of_forward(module))
    return present if isinstance(present, ForwardWithEdits) else ForwardWithEdits(module)


def _place_of_forward(module: nn.Module) -> str:
    """Where the forward of a module is to be replaced: what accelerate calls, where it has put its own in front."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def _list_weights(module: nn.Module) -> None:
    """A recurrent network reads a list of its weights that was made in advance."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
