"""The layer that holds erasers, as a child of the module on which they act.

Hooks on the host replace the hidden state that it takes or returns by the erased one. When several modules share an
eraser, the child of one of them, the *site*, holds it, and the children of the others use it from there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.erasers import Eraser, apply_erasure

from ..common.layer import AdapterChild, RowAdapters, StateDict, adapter_children
from ..merging.record import forget_record, remove_site
from .config import ConceptErasureConfig, Dial, EraserParts

CHILD = "concept_erasure"
Observer = Callable[[Tensor], Tensor]

# The names under which transformers passes a hidden state by keyword, most common first.
_INPUT_NAMES = ("hidden_states", "hidden_state", "x", "input", "inputs_embeds", "query")


class ErasureLayer(AdapterChild):
    """The erasers of every adapter at one module."""

    child_name = CHILD
    noun = "erasure"
    precisions = (torch.float32, torch.float64)
    optional = ("concept_erasure_readings",)
    entries = ("sticky_adapters", "erasures", "observers")

    def __init__(self, host: nn.Module, path: str) -> None:
        super().__init__(host, path)
        self._handles: dict[str, Any] = {}
        # The modules whose weights erasers of this site were merged into; in a list, or they would become submodules.
        self.merged_into: list[nn.Module] = []
        self.erasures: dict[str, Erasure] = {}  # by adapter name
        # Adapter name → a function that is called in place of the eraser, and returns the next activation; for fitting.
        self.observers: dict[str, Observer] = {}
        self.concept_erasure_left = StateDict(persistent=True)
        self.concept_erasure_right = StateDict(persistent=True)
        self.concept_erasure_bias = StateDict(persistent=True)
        # The eraser's readings of the mean of each class; without rows where they are not known.
        self.concept_erasure_readings = StateDict(persistent=True)

    def add_adapter(self, name: str, config: ConceptErasureConfig) -> None:
        """Create the tensors of an adapter: NaN until they are loaded if it was fitted, the identity otherwise."""
        if isinstance(self.host, nn.Embedding) and config.site == "input":
            raise ValueError(f"{self.path!r} takes token ids, which hold no activation to erase: use site='output'.")
        if not config.fitted and config.labels is None and config.concept_dim is None:
            config.z_dim  # noqa: B018  raises with the remedy
        site, size = config.fitted_modules.get(self.path, self.path), {"width": 0, "rank": 0}
        if site == self.path and config.fitted and config.fitted_sites:
            size = config.fitted_sites[site]
        axis, examples = size.get("axis", -1), size.get("examples", 0)
        self.erasures[name] = Erasure(config.site, site, self, axis, examples, config.dial)
        self.sticky_adapters[name] = config.sticky
        self._hook()
        if site != self.path:
            return
        device, dtype = self.state_placement()
        width, rank, rows = size["width"], size["rank"], len(config.readings or ())
        shapes = [(width, rank), (rank, width), (width,), (rows, rank)]
        stores: Any = self.children()
        for store, shape in zip(stores, shapes, strict=True):
            store[name] = torch.zeros(shape, device=device, dtype=dtype)
        if config.fitted:
            self.await_values(name)

    @staticmethod
    def link(model: nn.Module) -> None:
        """Set, for modules that share an eraser, the layer that holds it and the number of modules that use it."""
        layers = [child for child in adapter_children(model) if isinstance(child, ErasureLayer)]
        holders = {(name, layer.path): layer for layer in layers for name in layer.erasures}
        erasures = [(name, erasure) for layer in layers for name, erasure in layer.erasures.items()]
        for _, erasure in erasures:
            erasure.sharers = 1
        for name, erasure in erasures:
            holder = holders.get((name, erasure.site))
            if holder is not None and holder.erasures[name] is not erasure:
                erasure.holder = holder
                holder.erasures[name].sharers += 1

    def set_eraser(
        self,
        name: str,
        eraser: Eraser,
        dtype: torch.dtype,
        axis: int = -1,
        examples: int = 0,
        readings: Tensor | None = None,
    ) -> None:
        """Store a fitted eraser, with its readings of each class's mean `(classes, rank)` if they are known."""
        self.erasures[name].axis, self.erasures[name].examples = axis, examples
        device, _ = self.state_placement()
        known = eraser.right.new_zeros(0, eraser.rank) if readings is None else readings
        stores: Any = self.children()
        for store, part in zip(stores, (*eraser.parts(device, dtype), known.to(device, dtype)), strict=True):
            # Loading makes contiguous tensors. With other strides, matrix products sum in another order.
            store[name] = part.clone(memory_format=torch.contiguous_format)
        self._awaits_values.discard(name)

    def eraser_state(self, name: str) -> EraserParts:
        """The `left`, `right` and `bias` that act: as they were fitted, or as the dial changes them."""
        site = self.erasures[name].holder
        parts = site.concept_erasure_left[name], site.concept_erasure_right[name], site.concept_erasure_bias[name]
        erasure, readings = site.erasures[name], site.concept_erasure_readings[name]
        return parts if erasure.dial is None else erasure.dial.apply_to(parts, readings)

    def size_of(self, name: str) -> dict[str, int]:
        """An eraser's entry in `fitted_sites`."""
        (width, rank), erasure = self.concept_erasure_left[name].shape, self.erasures[name]
        axis = {} if erasure.axis == -1 else {"axis": erasure.axis}
        return {"width": width, "rank": rank} | axis | ({"examples": erasure.examples} if erasure.examples else {})

    def parts_on(self, name: str, device: torch.device) -> EraserParts:
        """The `left`, `right` and `bias` that act, moved to `device`: accelerate may have moved or split the model."""
        self.move_state(name, device)
        left, right, bias = (part.to(device) for part in self.eraser_state(name))
        return left, right, bias

    def _part_in_words(self, key: str, name: str) -> str:
        return f"The eraser of adapter {name!r} at {self.path!r}"

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged, and hooks that are not needed any more."""
        super().delete_adapter(adapter_name)
        self._hook()

    def _hook(self) -> None:
        """Add the hooks of the sides in use, and remove the other ones."""
        wanted = {erasure.side for erasure in self.erasures.values()}
        if "output" in wanted and "output" not in self._handles:
            # It is the first of the hooks, so that other hooks on the host's output (such as the recorder behind
            # output_hidden_states) get the erased state.
            self._handles["output"] = self.host.register_forward_hook(self._erase_output, prepend=True)
        if "input" in wanted and "input" not in self._handles:
            self._handles["input"] = self.host.register_forward_pre_hook(self._erase_input, with_kwargs=True)
        for site in set(self._handles) - wanted:
            self._handles.pop(site).remove()

    def _unhook(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def applied_adapters(self, site: str) -> list[str]:
        """The adapters whose erasers act at the side `site`, in order: sticky ones that are not active, then active."""
        acting = self.switched_on()
        observed = [name for name in self.adapters if name in self.erasures[name].holder.observers]
        acting += [name for name in observed if name not in acting]
        silent = {*self.merged_adapters, *self._suspended}
        return [name for name in acting if self.erasures[name].side == site and name not in silent]

    def _erase_output(self, host: nn.Module, args: tuple, output: Any) -> Any:
        acting = self.applied_adapters("output")
        if not acting:
            return None
        return replace_hidden_of_output(output, self._erase(hidden_of_output(output, self.path), acting))

    def _erase_input(self, host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        acting = self.applied_adapters("input")
        if not acting:
            return None
        keyword = next((name for name in _INPUT_NAMES if isinstance(kwargs.get(name), Tensor)), "")
        hidden = self._erase(_hidden_state(args[0] if args else kwargs.get(keyword), self.path, "takes"), acting)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, keyword: hidden})

    def _erase(self, hidden: Tensor, names: Iterable[str]) -> Tensor:
        for name in names:
            site, rows = self.erasures[name].holder, None if self.sticky_adapters[name] else self.rows
            erasure, observer = site.erasures[name], site.observers.get(name)
            step = functools.partial(self.apply_eraser, name) if observer is None else observer
            if rows is not None:
                step = functools.partial(self._apply_to_rows, name, rows, step)
            if erasure.sharers == 1 or torch.compiler.is_compiling():
                hidden = step(hidden)
                continue
            stores: Any = site.children()
            by = [observer] if observer is not None else [erasure.dial, *(store[name] for store in stores)]
            hidden = erasure.results.compute(hidden, step, erasure.sharers, by, rows, is_fitted=observer is not None)
        return hidden

    def _apply_to_rows(self, name: str, rows: RowAdapters, step: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """An activation in which `step` has changed only the rows of this adapter."""
        examples = self.erasures[name].holder.erasures[name].examples
        chosen = rows.positions_of(name, hidden, self.path, examples)
        return hidden.index_copy(examples, chosen, step(hidden.index_select(examples, chosen)))

    def apply_eraser(self, name: str, hidden: Tensor) -> Tensor:
        """The activation that an adapter erases; observers are not called."""
        site = self.erasures[name].holder
        left, right, bias = site.eraser_state(name)
        if left.shape[-1] == 0:
            return hidden
        if left.device != hidden.device:
            left, right, bias = self.parts_on(name, hidden.device)
        axis = site.erasures[name].axis
        if axis >= hidden.dim() or hidden.shape[axis] != left.shape[0]:
            there = f"width {hidden.shape[axis]}" if axis < hidden.dim() else f"shape {tuple(hidden.shape)}"
            raise ValueError(
                f"{self.path!r} has activations of {there}, but adapter {name!r} erases width {left.shape[0]} along "
                f"axis {axis}: it was fitted on another model. Fit it again on this one."
            )
        # A check of values cannot be compiled; in compiled code a NaN appears in the output.
        if name in site._awaits_values and not torch.compiler.is_compiling():
            site.check_values(name)
        return apply_erasure(hidden, left, right, bias, axis)

    def unmerge_weights(self) -> None:
        """Put the original weights back; they are equal bit for bit unless erasers of other sites are in them."""
        for module in self.merged_into:
            remove_site(module, self.path)
        self.merged_into.clear()
        self.merged_adapters.clear()

    def forget_originals(self) -> None:
        """Drop the copies that `unmerge_weights` needs: merged erasers stay merged."""
        for module in self.merged_into:
            forget_record(module)
        self.merged_into.clear()


erasure_layers = ErasureLayer.by_path


def site_layers(model: nn.Module, adapter_name: str) -> dict[str, ErasureLayer]:
    """The layers that hold the erasers of an adapter, by the name of their site, in the model's order."""
    found = erasure_layers(model, adapter_name).items()
    return {path: layer for path, layer in found if layer.erasures[adapter_name].site == path}


@dataclass(eq=False)
class SharedResults:
    """The results of an eraser for tensors that several modules take, so that the eraser runs once for all of them.

    The linear maps that read a hidden state (q, k, v; gate, up) are given the same tensor, or views of it. A result is
    kept while this tensor exists and a module of the group still needs it. In inference mode, where a change of the
    tensor is not visible, it is kept only at fitting. It is not kept where gradients are recorded: it would keep the
    tensor alive, and parts that run again for their gradients must do the same as before. A copy starts empty.
    """

    # Identity of a tensor, its rows and its eraser → the result, its version, how many modules still need it, and two
    # objects to keep alive as long as the entry: a reference that removes it with the tensor, and the eraser's parts.
    _results: dict[tuple[Any, ...], tuple[Tensor | None, int, int, Any]] = field(default_factory=dict)

    def __reduce__(self) -> Any:
        return SharedResults, ()

    def __len__(self) -> int:
        return len(self._results)

    def compute(
        self,
        hidden: Tensor,
        make: Callable[[Tensor], Tensor],
        modules: int,
        by: Sequence[Any],
        rows: Any = None,
        *,
        is_fitted: bool = False,
    ) -> Tensor:
        """Return `make(hidden)`, computed once for this many `modules` with the same eraser, dial (`by`) and `rows`."""
        is_kept = is_fitted if hidden.is_inference() else not (hidden.requires_grad and torch.is_grad_enabled())
        if modules < 2 or type(hidden) is not Tensor or not is_kept:
            return make(hidden)
        anchor = hidden._base if hidden._is_view() else hidden
        key = (
            *(id(anchor), hidden.storage_offset(), hidden.shape, hidden.stride(), hidden.dtype, _version(hidden)),
            *(rows, *(entry for part in by for entry in (id(part), _version(part)))),
        )
        found = self._results.pop(key, None)
        if found is not None and found[1] == _version(found[0]):
            result, version, left, references = found
        else:
            result = make(hidden)
            # If the result is the tensor itself, None is stored instead, or the entry would keep the tensor alive.
            result, left = (None if result is hidden else result), modules
            version, references = _version(result), (weakref.ref(anchor, lambda _: self._results.pop(key, None)), by)
        if left > 1:
            self._results[key] = result, version, left - 1, references
        return hidden if result is None else result


@dataclass(eq=False)
class Erasure:
    """The settings of one adapter at one module, without its tensors."""

    side: str  # where it erases, `"output"` or `"input"`
    site: str  # the name of the module whose eraser it uses: this module, or the one with which it shares the eraser
    holder: ErasureLayer  # the layer of the module `site`
    axis: int  # the axis of the features: the last, except where modules return channels first
    examples: int  # the axis of the examples: the first, except in models such as XLNet
    dial: Dial | None  # how the eraser is changed; None where it is used as it was fitted
    sharers: int = 1  # how many modules use the eraser, where this is their site
    results: SharedResults = field(default_factory=SharedResults)


def _version(part: Any) -> int:
    """How often a tensor was changed in place; 0 for an object that does not count its changes."""
    return part._version if isinstance(part, Tensor) and not part.is_inference() else 0


def hidden_of_output(output: Any, where: str) -> Tensor:
    """The hidden state in the output of the module at `where`: the tensor itself, the first of a tuple, or by name."""
    found = output
    if isinstance(output, dict):
        found = output.get("last_hidden_state", next(iter(output.values()), None))
    while isinstance(found, (tuple, list)) and found and (found is output or len(found) == 1):
        found = found[0]
    return _hidden_state(found, where, "returns")


def replace_hidden_of_output(output: Any, hidden: Tensor) -> Any:
    """A copy of `output` with `hidden` in the place that `hidden_of_output` reads."""
    if isinstance(output, dict):
        key = "last_hidden_state" if "last_hidden_state" in output else next(iter(output))
        return type(output)(**{**output, key: replace_hidden_of_output(output[key], hidden)})
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: replace_hidden_of_output(output[0], hidden)})  # type: ignore[attr-defined]
    if isinstance(output, (tuple, list)):
        return type(output)((replace_hidden_of_output(output[0], hidden), *output[1:]))
    return hidden


def _hidden_state(found: Any, where: str, verb: str) -> Tensor:
    if isinstance(found, Tensor) and found.is_floating_point():
        return found
    kind = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise TypeError(
        f"{where} {verb} {kind} where a hidden state of floating-point numbers was expected, so no concept can be "
        "erased there. Leave it out of target_modules, or choose the other site ('output' or 'input')."
    )
