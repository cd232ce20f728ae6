"""The eraser as a child of the module it acts on.

Hooks on the host put the erased hidden state in the place of the one that it takes or returns. Of modules that share an
eraser the child of one, the *site*, holds it, and the children of the others look there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.erasers import Eraser, apply_erasure

from ..common.layer import AdapterChild, Rows, StateDict, adapter_children, outside_inference_mode
from ..merging.record import forget, withdraw
from .config import ConceptErasureConfig, Dial, Parts

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
    entries = (
        "sticky_adapters",
        "concept_erasure_site",
        "concept_erasure_axis",
        "concept_erasure_examples",
        "observers",
        "site_paths",
        "site_layers",
        "sharers",
        "dials",
        "_dialled",
        "_made",
    )

    def __init__(self, host: nn.Module, path: str) -> None:
        super().__init__(host, path)
        self._handles: dict[str, Any] = {}
        # The modules whose weights hold erasers of this site; in a list, so that they do not become submodules.
        self.written: list[nn.Module] = []
        # By adapters' names: what sees the activation in the place of an eraser, and returns what goes on; for fitting.
        self.observers: dict[str, Observer] = {}
        # The name of the site, where the eraser is that of another module, and its layer, not as a submodule.
        self.site_paths: dict[str, str] = {}
        self.site_layers: dict[str, ErasureLayer] = {}
        # How many modules have the eraser, where this is the site of several.
        self.sharers: dict[str, int] = {}
        self._made: dict[str, MadeOnce] = {}
        self.concept_erasure_left = StateDict(persistent=True)
        self.concept_erasure_right = StateDict(persistent=True)
        self.concept_erasure_bias = StateDict(persistent=True)
        # What the eraser reads in the mean of each class; without rows where that is not known.
        self.concept_erasure_readings = StateDict(persistent=True)
        # What becomes of an eraser, where it is not used as it was fitted.
        self.dials: dict[str, Dial] = {}
        # The parts that a dial makes, and the tensors that it has made them of, with their versions.
        self._dialled: dict[str, tuple[tuple[Tensor, ...], tuple[int, ...], Parts]] = {}
        self.concept_erasure_site: dict[str, str] = {}
        # The axis of the features; the last but for modules that give channels first.
        self.concept_erasure_axis: dict[str, int] = {}
        # The axis of the examples; the first but for XLNet and its like.
        self.concept_erasure_examples: dict[str, int] = {}

    def add_adapter(self, name: str, config: ConceptErasureConfig) -> None:
        """Make room for an adapter: values that are missing until loaded if it was fitted, the identity otherwise."""
        if isinstance(self.host, nn.Embedding) and config.site == "input":
            raise ValueError(f"{self.path!r} takes token ids, which hold no activation to erase: use site='output'.")
        if not config.fitted and config.labels is None and config.concept_dim is None:
            config.z_dim  # noqa: B018  raises with the remedy
        self.concept_erasure_site[name] = config.site
        self.sticky_adapters[name] = config.sticky
        self._hook()
        site = config.groups.get(self.path, self.path)
        if site != self.path:
            self.site_paths[name] = site
            return
        device, dtype = self.state_placement()
        size = config.fitted_sites[self.path] if config.fitted and config.fitted_sites else {"width": 0, "rank": 0}
        self.concept_erasure_axis[name] = size.get("axis", -1)
        self.concept_erasure_examples[name] = size.get("examples", 0)
        width, rank, rows = size["width"], size["rank"], len(config.readings or ())
        shapes = [(width, rank), (rank, width), (width,), (rows, rank)]
        stores: Any = self.children()
        for store, shape in zip(stores, shapes, strict=True):
            store[name] = torch.zeros(shape, device=device, dtype=dtype)
        if config.dial is not None:
            self.dials[name] = config.dial
        if config.fitted:
            self.await_values(name)

    @staticmethod
    def link(model: nn.Module) -> None:
        """Tell the layers of modules that share erasers where these are."""
        by_adapter: dict[str, dict[str, ErasureLayer]] = {}
        for layer in (child for child in adapter_children(model) if isinstance(child, ErasureLayer)):
            layer.sharers.clear()
            for name in layer.sticky_adapters:
                by_adapter.setdefault(name, {})[layer.path] = layer
        for name, layers in by_adapter.items():
            for layer in layers.values():
                site = layers.get(layer.site_paths.get(name, ""))
                if site is not None:
                    layer.site_layers[name] = site
                    site.sharers[name] = site.sharers.get(name, 1) + 1

    def site_of(self, name: str) -> ErasureLayer:
        """The layer that holds an adapter's eraser."""
        return self.site_layers.get(name, self)

    def set_eraser(
        self,
        name: str,
        eraser: Eraser,
        dtype: torch.dtype,
        axis: int = -1,
        examples: int = 0,
        readings: Tensor | None = None,
    ) -> None:
        """Put a fitted eraser in place, with what it reads in each class's mean `(classes, rank)`, if known."""
        self.concept_erasure_axis[name], self.concept_erasure_examples[name] = axis, examples
        device, _ = self.state_placement()
        known = eraser.right.new_zeros(0, eraser.rank) if readings is None else readings
        stores: Any = self.children()
        for store, part in zip(stores, (*eraser.parts(device, dtype), known.to(device, dtype)), strict=True):
            # In the strides that loading will give it: others let matrix products sum in another order.
            store[name] = part.clone(memory_format=torch.contiguous_format)
        self._awaits_values.discard(name)

    def set_dial(self, name: str, dial: Dial | None) -> None:
        """Say what becomes of an eraser; None where it acts as it was fitted."""
        self._dialled.pop(name, None)
        self.dials.pop(name, None)
        if dial is not None:
            self.dials[name] = dial

    def eraser_state(self, name: str) -> Parts:
        """The `left`, `right` and `bias` that act: as they were fitted, or what the dial makes of them."""
        site = self.site_of(name)
        parts = site.concept_erasure_left[name], site.concept_erasure_right[name], site.concept_erasure_bias[name]
        return parts if name not in site.dials else site._at_dial(name, parts)

    def _at_dial(self, name: str, parts: Parts) -> Parts:
        """What a dial makes of an eraser, the same tensors as long as it and the eraser are the same."""
        readings = self.concept_erasure_readings[name]
        if torch.compiler.is_compiling():
            return self.dials[name].of(parts, readings)
        made_of = (*parts, readings)
        versions = tuple(part._version for part in made_of)
        known = self._dialled.get(name)
        if known is None or known[1] != versions or any(a is not b for a, b in zip(known[0], made_of, strict=True)):
            with outside_inference_mode(), torch.no_grad():
                known = self._dialled[name] = made_of, versions, self.dials[name].of(parts, readings)
        return known[2]

    def size_of(self, name: str) -> dict[str, int]:
        """An eraser's entry of `fitted_sites`."""
        (width, rank), axis = self.concept_erasure_left[name].shape, self.concept_erasure_axis[name]
        examples = self.concept_erasure_examples[name]
        return (
            {"width": width, "rank": rank}
            | ({} if axis == -1 else {"axis": axis})
            | ({} if examples == 0 else {"examples": examples})
        )

    def erased(self, name: str, hidden: Tensor) -> Tensor:
        """An activation as an adapter erases it."""
        return apply_erasure(hidden, *self.parts_on(name, hidden.device), self.site_of(name).concept_erasure_axis[name])

    def parts_on(self, name: str, device: torch.device) -> Parts:
        """The `left`, `right` and `bias` that act, on a device: accelerate may have moved or spread the modules."""
        self.move_state(name, device)
        left, right, bias = (part.to(device) for part in self.eraser_state(name))
        return left, right, bias

    def _part_in_words(self, key: str, name: str) -> str:
        return f"The eraser of adapter {name!r} at {self.path!r}"

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged."""
        super().delete_adapter(adapter_name)
        self._hook()

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

    def _unhook(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def applied_adapters(self, site: str) -> list[str]:
        """The adapters whose erasers act at `site`, in order: sticky ones that are not active, then the active."""
        acting = self.switched_on()
        observed = [name for name in self.adapters if name in self.site_of(name).observers]
        acting += [name for name in observed if name not in acting]
        silent = {*self.merged_adapters, *self._held}
        return [name for name in acting if self.concept_erasure_site[name] == site and name not in silent]

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
        hidden = self._erase(_floating(args[0] if args else kwargs.get(keyword), self.path, "takes"), acting)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, keyword: hidden})

    def _erase(self, hidden: Tensor, names: Iterable[str]) -> Tensor:
        for name in names:
            site, rows = self.site_of(name), None if self.sticky_adapters[name] else self.rows
            modules = site.sharers.get(name, 1)
            step = functools.partial(self._erase_by, name, rows)
            if modules == 1 or torch.compiler.is_compiling():
                hidden = step(hidden)
                continue
            observer = site.observers.get(name)
            by = site.eraser_state(name) if observer is None else (observer,)
            made = site._made.setdefault(name, MadeOnce())
            hidden = made.of(hidden, step, modules, by, rows, is_fitted=observer is not None)
        return hidden

    def _erase_by(self, name: str, rows: Rows | None, hidden: Tensor) -> Tensor:
        site = self.site_of(name)
        if rows is not None:
            examples = site.concept_erasure_examples[name]
            chosen = rows.of(name, hidden, self.path, examples)
            erased = self._erase_by(name, None, hidden.index_select(examples, chosen))
            return hidden.index_copy(examples, chosen, erased)
        if name in site.observers:
            return site.observers[name](hidden)
        left, right, bias = site.eraser_state(name)
        if left.shape[-1] == 0:
            return hidden
        if left.device != hidden.device:
            left, right, bias = self.parts_on(name, hidden.device)
        axis = site.concept_erasure_axis[name]
        if axis >= hidden.dim() or hidden.shape[axis] != left.shape[0]:
            there = f"width {hidden.shape[axis]}" if axis < hidden.dim() else f"shape {tuple(hidden.shape)}"
            raise ValueError(
                f"{self.path!r} has activations of {there}, but adapter {name!r} erases width {left.shape[0]} along "
                f"axis {axis}: it was fitted on another model. Fit it again on this one."
            )
        # A check of values cannot be compiled; there a NaN shows in the output.
        if name in site._awaits_values and not torch.compiler.is_compiling():
            site.check_values(name)
        return apply_erasure(hidden, left, right, bias, axis)

    def unmerge(self) -> None:
        """Put the original weights back, to the bit unless erasers of other sites are in them."""
        for module in self.written:
            withdraw(module, self.path)
        self.written.clear()
        self.merged_adapters.clear()

    def forget_originals(self) -> None:
        """Drop the copies that `unmerge` needs: what is merged stays merged."""
        for module in self.written:
            forget(module)
        self.written.clear()


erasure_layers = ErasureLayer.by_path


def site_layers(model: nn.Module, adapter_name: str) -> dict[str, ErasureLayer]:
    """The layers that hold the erasers of an adapter, by the name of their site, in the model's order."""
    return {
        p: layer for p, layer in erasure_layers(model, adapter_name).items() if adapter_name not in layer.site_paths
    }


class MadeOnce:
    """What an eraser made of a tensor that several modules take, so that it runs once for all of them.

    The linear maps that read a hidden state (q, k, v; gate, up) are given the same tensor, or views of it. What was
    made of it is kept as long as it is there and a module of the group has not come for it yet; but not where a change
    of the tensor would not show (in inference mode), nor where gradients are recorded: it would hold the tensor for
    ever, and parts of a pass that run again for their gradients must do what they did before. A copy begins without.
    """

    def __init__(self) -> None:
        # What identifies a tensor and how it was taken → the result and its version, how many modules may still come,
        # and what must not go before the entry does: a reference that removes it with the tensor, and what has made it.
        self._kept: dict[tuple[Any, ...], tuple[Tensor | None, int, int, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> MadeOnce:
        return MadeOnce()

    def __reduce__(self) -> Any:
        return MadeOnce, ()

    def __len__(self) -> int:
        return len(self._kept)

    def of(
        self,
        hidden: Tensor,
        make: Callable[[Tensor], Tensor],
        modules: int,
        by: Sequence[Any],
        rows: Any = None,
        *,
        is_fitted: bool = False,
    ) -> Tensor:
        """What an eraser makes of a tensor for the first of so many modules, `by` the same and for the same rows."""
        is_kept = is_fitted if hidden.is_inference() else not (hidden.requires_grad and torch.is_grad_enabled())
        if modules < 2 or type(hidden) is not Tensor or not is_kept:
            return make(hidden)
        anchor = hidden._base if hidden._is_view() else hidden
        key = (
            *(id(anchor), hidden.storage_offset(), hidden.shape, hidden.stride(), hidden.dtype, _version(hidden)),
            *(rows, *(entry for part in by for entry in (id(part), _version(part)))),
        )
        found = self._kept.pop(key, None)
        if found is not None and found[1] == _version(found[0]):
            result, version, left, held = found
        else:
            made = make(hidden)
            # A result that is the tensor itself would keep it alive.
            result, left = (None if made is hidden else made), modules
            version, held = _version(result), (weakref.ref(anchor, lambda _: self._kept.pop(key, None)), by)
        if left > 1:
            self._kept[key] = result, version, left - 1, held
        return hidden if result is None else result


def _version(part: Any) -> int:
    """How often a tensor was changed in place, as far as is known."""
    return part._version if isinstance(part, Tensor) and not part.is_inference() else 0


def hidden_of_output(output: Any, where: str) -> Tensor:
    """The hidden state that the module at `where` returned: a tensor, the first of a tuple, or by its name."""
    found = output
    if isinstance(output, dict):
        found = output.get("last_hidden_state", next(iter(output.values()), None))
    while isinstance(found, (tuple, list)) and found and (found is output or len(found) == 1):
        found = found[0]
    return _floating(found, where, "returns")


def replace_hidden_of_output(output: Any, hidden: Tensor) -> Any:
    """A copy of `output` with `hidden` in the place `hidden_of_output` reads."""
    if isinstance(output, dict):
        key = "last_hidden_state" if "last_hidden_state" in output else next(iter(output))
        return type(output)(**{**output, key: replace_hidden_of_output(output[key], hidden)})
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: replace_hidden_of_output(output[0], hidden)})  # type: ignore[attr-defined]
    if isinstance(output, (tuple, list)):
        return type(output)((replace_hidden_of_output(output[0], hidden), *output[1:]))
    return hidden


def _floating(found: Any, where: str, verb: str) -> Tensor:
    if isinstance(found, Tensor) and found.is_floating_point():
        return found
    kind = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise TypeError(
        f"{where} {verb} {kind} where a hidden state of floating-point numbers was expected, so no concept can be "
        "erased there. Leave it out of target_modules, or choose the other site ('output' or 'input')."
    )
