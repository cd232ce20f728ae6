"""The eraser as a child of the module it acts on.

The child holds the erasers of all adapters as buffers, and hooks on the host apply them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.erasers import Eraser, apply_erasure

from ..common.layer import AdapterChild, StateDict
from ..merging.record import forget, withdraw
from . import hidden_states
from .config import SITES, ConceptErasureConfig

CHILD = "concept_erasure"

Observer = Callable[[Tensor], Tensor]


class ErasureLayer(AdapterChild):
    """The erasers of every adapter at one module.

    Attributes:
        observers: Adapter name → function that sees the activation in place of that adapter's eraser and returns what
            goes on; how fitting looks at a site.
    """

    child_name = CHILD
    noun = "erasure"
    other_param_names = (
        "concept_erasure_left",
        "concept_erasure_right",
        "concept_erasure_bias",
        "concept_erasure_site",
        "concept_erasure_sticky",
    )

    def __init__(self, host: nn.Module, path: str) -> None:
        super().__init__(host, path)
        self._handles: dict[str, Any] = {}
        # In a list, so that they do not become submodules.
        self._written: list[nn.Module] = []
        self.observers: dict[str, Observer] = {}
        self.concept_erasure_left = StateDict(persistent=True)
        self.concept_erasure_right = StateDict(persistent=True)
        self.concept_erasure_bias = StateDict(persistent=True)
        self.concept_erasure_site: dict[str, str] = {}
        self.concept_erasure_sticky: dict[str, bool] = {}

    @property
    def adapters(self) -> list[str]:
        """The adapters present here, in the order in which they were added."""
        return list(self.concept_erasure_site)

    @property
    def sticky_adapters(self) -> dict[str, bool]:
        """Adapter name → whether it stays active beside others."""
        return self.concept_erasure_sticky

    # ---- adapters come and go ---------------------------------------------------------------------------------------

    def add_adapter(self, name: str, config: ConceptErasureConfig) -> None:
        """Make room for an adapter: NaN until loaded if its config says it was fitted, the identity otherwise."""
        self.concept_erasure_site[name] = config.site
        self.concept_erasure_sticky[name] = config.sticky
        device, dtype = self._state_placement()
        if config.fitted and config.fitted_sites is not None:
            width, rank = (config.fitted_sites[self.path][key] for key in ("width", "rank"))
            self._store(name, *(torch.empty(s, device=device, dtype=dtype) for s in _shapes(width, rank)))
            self.await_values(name)
        else:
            self._store(name, *(torch.zeros(s, device=device, dtype=dtype) for s in _shapes(0, 0)))
        self._hook()

    def await_values(self, name: str) -> None:
        """Fill an eraser with NaN and not zero: values that never arrive must not pass for an erasure."""
        self._store(name, *(torch.full_like(part, torch.nan) for part in self._parts(name)))
        self._awaits_values.add(name)

    def set_eraser(self, name: str, eraser: Eraser, dtype: torch.dtype) -> None:
        """Put a fitted eraser in place; a purely linear one keeps a zero bias."""
        device, _ = self._state_placement()
        bias = eraser.left.new_zeros(eraser.x_dim) if eraser.bias is None else eraser.bias
        parts = (eraser.left, eraser.right, bias)
        # In the strides that loading will give them: others let matrix products sum in another order.
        self._store(name, *(t.to(device, dtype).clone(memory_format=torch.contiguous_format) for t in parts))
        self._awaits_values.discard(name)

    def eraser_state(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """The eraser's `left`, `right` and `bias` as they are, for `restore_eraser_state`."""
        return self._parts(name)

    def restore_eraser_state(self, name: str, state: tuple[Tensor, ...]) -> None:
        """Put back what `eraser_state` gave."""
        left, right, bias = state
        self._store(name, left, right, bias)
        if not all(bool(torch.isfinite(part).all()) for part in state):
            self._awaits_values.add(name)

    state_of = eraser_state
    restore_state = restore_eraser_state

    def settle(self, name: str) -> None:
        """Take values that were just loaded into memory of their own, in the precision of this site."""
        _, dtype = self._state_placement()
        self._store(name, *(part.to(dtype, copy=True) for part in self._parts(name)))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged."""
        super().delete_adapter(adapter_name)
        self.observers.pop(adapter_name, None)
        self._hook()

    def _unhook(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def check_values(self, name: str) -> None:
        """Raise if the eraser of `name` is missing or not finite.

        Raises:
            ValueError: Names the site and the adapter.
        """
        for part in self._parts(name):
            if part.device.type != "meta" and not bool(torch.isfinite(part).all()):
                raise ValueError(
                    f"The eraser of adapter {name!r} at {self.path!r} is missing or not finite: adapter_model."
                    "safetensors lacks its tensors or holds NaN. Load the complete folder, or fit the adapter again."
                )
        self._awaits_values.discard(name)

    def _store(self, name: str, left: Tensor, right: Tensor, bias: Tensor) -> None:
        self.concept_erasure_left[name] = left
        self.concept_erasure_right[name] = right
        self.concept_erasure_bias[name] = bias

    def _parts(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.concept_erasure_left[name], self.concept_erasure_right[name], self.concept_erasure_bias[name]

    def _state_placement(self) -> tuple[torch.device, torch.dtype]:
        """Where erasers live and how precise they are: float32, or float64 on a float64 base."""
        # A quantised layer may have no floating-point weight; where it is tells all the same.
        weights = sorted(self.host.parameters(), key=lambda p: not p.is_floating_point())
        if not weights:
            return torch.device("cpu"), torch.float32
        weight = weights[0]
        device = torch.device("cpu") if weight.device.type == "meta" else weight.device
        return device, torch.float64 if weight.dtype == torch.float64 else torch.float32

    def _hook(self) -> None:
        """Hooks exist for the sites in use, and for no others."""
        wanted = set(self.concept_erasure_site.values())
        if "output" in wanted and "output" not in self._handles:
            # First of all hooks, so that whatever else looks at the host's output (the recorder behind
            # output_hidden_states) sees the erased state.
            self._handles["output"] = self.host.register_forward_hook(self._erase_output, prepend=True)
        if "input" in wanted and "input" not in self._handles:
            self._handles["input"] = self.host.register_forward_pre_hook(self._erase_input, with_kwargs=True)
        for site in set(self._handles) - wanted:
            self._handles.pop(site).remove()

    # ---- the forward pass -------------------------------------------------------------------------------------------

    def applied_adapters(self, site: str) -> list[str]:
        """The adapters whose erasers act at `site`, in order: sticky ones that are not active, then the active."""
        acting = self.switched_on()
        acting += [name for name in self.observers if name not in acting]
        return [n for n in acting if self.concept_erasure_site[n] == site and n not in self.merged_adapters]

    def acting_adapters(self) -> list[str]:
        """The adapters whose erasers act on a forward pass."""
        return [name for site in SITES for name in self.applied_adapters(site)]

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Let an eraser not act for a while: an observer that changes nothing stands in for it."""
        self.observers[name] = _unchanged
        try:
            yield
        finally:
            self.observers.pop(name, None)

    def _erase_output(self, host: nn.Module, args: tuple, output: Any) -> Any:
        acting = self.applied_adapters("output")
        if not acting:
            return None
        hidden = hidden_states.hidden_of_output(output, self.path)
        return hidden_states.replace_hidden_of_output(output, self._erase(hidden, acting))

    def _erase_input(self, host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        acting = self.applied_adapters("input")
        if not acting:
            return None
        hidden = hidden_states.hidden_of_input(args, kwargs, self.path)
        return hidden_states.replace_hidden_of_input(args, kwargs, self._erase(hidden, acting))

    def _erase(self, hidden: Tensor, names: Iterable[str]) -> Tensor:
        for name in names:
            if self.rows is None or self.concept_erasure_sticky[name]:
                hidden = self._erase_by(name, hidden)
            else:
                rows = self.rows.of(name, hidden, self.path)
                hidden = hidden.index_copy(0, rows, self._erase_by(name, hidden.index_select(0, rows)))
        return hidden

    def _erase_by(self, name: str, hidden: Tensor) -> Tensor:
        if name in self.observers:
            return self.observers[name](hidden)
        left, right, bias = self._parts(name)
        if left.shape[-1] == 0:
            return hidden
        if left.device != hidden.device:
            left, right, bias = self.parts_on(name, hidden.device)
        if hidden.shape[-1] != left.shape[0]:
            raise ValueError(
                f"{self.path!r} has activations of width {hidden.shape[-1]}, but adapter {name!r} erases width "
                f"{left.shape[0]}: it was fitted on another model. Fit it again on this one."
            )
        # A check of values cannot be compiled; there a NaN shows in the output.
        if name in self._awaits_values and not torch.compiler.is_compiling():
            self.check_values(name)
        return apply_erasure(hidden, left, right, bias)

    def parts_on(self, name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """An eraser's `left`, `right` and `bias` on a device, where they stay: accelerate may have moved the model."""
        left, right, bias = (part.to(device) for part in self._parts(name))
        if device.type != "meta":
            self._store(name, left, right, bias)
        return left, right, bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ErasureLayer:
        """Follow `.to(device)` and `.double()`, but stay in float32 when the model goes to half precision."""
        for parts in (self.concept_erasure_left, self.concept_erasure_right, self.concept_erasure_bias):
            for name, part in list(parts.items()):
                converted = self._stay_real(fn(part))
                half = converted.dtype.itemsize < 4
                parts[name] = part.to(converted.device, torch.float32) if half else converted
        return self

    # ---- merging ----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Erasers are merged at all sites of an adapter or at none, so not from here."""
        raise ValueError(
            f"{self.path!r} cannot be merged alone: call merge_adapter() or merge_and_unload() of the model."
        )

    @property
    def written(self) -> tuple[nn.Module, ...]:
        """The modules whose weights hold erasers of this site."""
        return tuple(self._written)

    def note_written(self, module: nn.Module) -> None:
        """Remember a module whose weights hold erasers of this site."""
        if not any(module is known for known in self._written):
            self._written.append(module)

    def unmerge(self) -> None:
        """Put the original weights back, to the bit unless erasers of other sites are in them."""
        for module in self._written:
            withdraw(module, self.path)
        self._written.clear()
        self.merged_adapters.clear()

    def forget_originals(self) -> None:
        """Drop the copies that `unmerge` needs: what is merged stays merged."""
        for module in self._written:
            forget(module)
        self._written.clear()

    def extra_repr(self) -> str:
        """The adapters with their sites and ranks."""
        return ", ".join(
            f"{n}: {s}, rank {self.concept_erasure_left[n].shape[-1]}" for n, s in self.concept_erasure_site.items()
        )


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


def _shapes(width: int, rank: int) -> tuple[tuple[int, ...], ...]:
    return (width, rank), (rank, width), (width,)


def erasure_layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, ErasureLayer]:
    """The erasure layers of a model by the name of their host, in the model's order.

    Args:
        model: Any model, bare or wrapped in a `PeftModel`.
        adapter_name: Only those that hold this adapter.
    """
    layers = (module for module in model.modules() if isinstance(module, ErasureLayer))
    return {layer.path: layer for layer in layers if adapter_name is None or adapter_name in layer.concept_erasure_site}
