"""Find what the axes of the activations at an adapter's sites are, by running its model over a few rows."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_erasure.adapters import ErasureLayer
from hf_erasure.models.graph import Graph
from hf_erasure.models.layout import (
    PLACES,
    Axes,
    Frames,
    Lengths,
    Passes,
    Summary,
    Visit,
    differs_at,
    frames_of,
    rows_of,
    with_lengths,
    with_other_tokens,
)
from hf_erasure.models.model import MEDIA, Runner, evaluating, forked_rng, inputs_of, last_hidden_state

logger = logging.getLogger(__name__)

# The names in configurations of the tokens that stand for images or sounds in a text.
_MEDIA_TOKENS = [f"{kind}_token_{ending}" for kind in ("image", "video", "audio") for ending in ("id", "index")]


@dataclass
class Layouts:
    """The axes of the activations of a model, by the form of its batches."""

    runner: Runner  # Calls the model.
    layers: dict[str, ErasureLayer]  # The sites.
    name: str  # The adapter.
    # How many features there are at each visit of a site that the passes over a few rows reached.
    widths: dict[Visit, int] = field(default_factory=dict, init=False)
    _known: dict[Any, dict[Visit, Axes | ValueError]] = field(default_factory=dict, init=False)

    def of(self, batch: Mapping[str, Any]) -> dict[Visit, Axes | ValueError]:
        """Visit of a site, or last hidden state, → its axes, or the error that says why they are not known.

        Batches that differ only in their rows and lengths have the same axes.
        """
        lengths, inputs = Lengths.in_batch(batch).by_side.values(), sorted(inputs_of(batch).items())
        form = tuple(
            (name, value.dtype, tuple(size for size in value.shape[1:] if size not in lengths))
            for name, value in inputs
            if isinstance(value, Tensor)
        )
        if form not in self._known:
            few = inputs_of(few_rows(batch) or {})
            if few and not self._known:
                self.runner.follow_head(few)
            with evaluating(self.runner.model), forked_rng(self.runner.model):
                self._known[form] = self._find_axes(few) if few else {}
        found, ids, config = self._known[form], batch.get("input_ids"), getattr(self.runner.model, "config", None)
        if not isinstance(ids, Tensor) or not any(name in batch for name in MEDIA):
            return found
        tokens = (getattr(config, name, None) for name in _MEDIA_TOKENS)
        counts = ((ids == token).flatten(1).sum(1) for token in tokens if token is not None)
        if not any(bool((count != count[0]).any()) for count in counts):
            return found
        beside = {key: axes for key, axes in found.items() if isinstance(axes, Axes) and axes.side is None}
        return found | {key: replace(axes, is_unequal=not axes.is_shared) for key, axes in beside.items()}

    def frames_of(self, batch: Mapping[str, Any]) -> Tensor | None:
        """`(batch, frames)` bool, which frames are not padding; None where a batch has no mask of audio samples."""
        mask, frames = batch.get("attention_mask"), None if "input_ids" in batch else self._frames
        return frames.mask_of(mask) if frames is not None and isinstance(mask, Tensor) and mask.dim() == 2 else None

    @functools.cached_property
    def _frames(self) -> Frames | None:
        return frames_of(self.runner.model)

    def site_axes(self, site: str) -> dict[str, Any]:
        """The `axis` of the features and that of the `examples` of a site, the same for batches of any form."""
        every = (item for known in self._known.values() for item in known.items())
        seen = [axes for visit, axes in every if isinstance(axes, Axes) and visit.site == site]
        found = {(axes.width, axes.example + (0 <= axes.width <= axes.example)) for axes in seen}
        if len(found) > 1:
            raise ValueError(
                f"The features and examples of {site!r} lie along axes {sorted(found)}, by the batch or the visit: "
                "name another site."
            )
        return dict(zip(("axis", "examples"), found.pop() if found else (-1, 0), strict=True))

    def _find_axes(self, few: dict[str, Any]) -> dict[Visit, Axes | ValueError]:
        """Find the axes that `of` returns, from runs over a few rows, over these rows twice, and with other lengths."""
        rows = len(next(v for v in few.values() if isinstance(v, Tensor) and v.dim()))
        try:
            frames = None if "input_ids" in few else self._frames
            lengths = Lengths.in_batch(few, None if frames is None else frames.count)
            first, other = self._run_pass(few), lengths.altered()
            mirrored = rows_of(few, rows, [*range(rows), *reversed(range(rows))])
            twice = self._run_pass(mirrored, lambda key, hidden: Summary.of(hidden, first.get(key), rows))
            # Texts are cut at the first place where the model still runs.
            second, last = (with_lengths(few, lengths, other, place) for place in PLACES)
            changed = self._try_pass(second) if lengths.by_side else None
            changed = self._run_pass(last) if changed is None else changed
            passes = Passes(rows, lengths, other, first, twice, changed)
        except Exception as error:
            # If the batch itself is wrong, fitting raises an error when it reads it.
            reason = f"since the rows that show its axes cannot be run: {type(error).__name__}: {error}"
            return {
                Visit(name): ValueError(f"The activation at {name!r} cannot be labelled, {reason}")
                for name in (*self.layers, *self.runner.final_states())
            }
        modules = {name: layer.host for name, layer in self.layers.items()} | self.runner.final_states()

        @functools.cache
        def features_at() -> Callable[[nn.Module, str], set[int]]:
            """Tells the axes of features by other modules, from a record of a pass without the adapters."""
            try:
                return Graph(self.runner.model, lambda: self.runner(dict(few))).features_at
            except Exception as error:
                logger.debug("What the features depend on cannot be told: %s", error)
                return lambda module, side: set()

        def axes_at(key: Visit) -> Axes | ValueError:
            layer, module = self.layers.get(key.site), modules[key.site]
            side = "output" if layer is None else layer.erasures[self.name].side
            try:
                return passes.axes_of(key, module, lambda: features_at()(module, side))
            except ValueError as error:
                return error.with_traceback(None)  # its stack frames would keep all activations alive

        found = {key: axes_at(key) for key in first}
        axes_of_sites = ((key, axes) for key, axes in found.items() if key.site in self.layers)
        self.widths |= {key: first[key].shape[axes.width] for key, axes in axes_of_sites if isinstance(axes, Axes)}
        if all(isinstance(axes, Axes) and axes.side is not None for axes in found.values()):
            return found
        # A model may pad texts to multiples of a length; longer texts show this.
        for size in sorted({size for key, axes in found.items() for size in passes.padded_sizes(key, axes)}):
            longer = with_lengths(few, lengths, replace(lengths, by_side={**lengths.by_side, "": 2 * size}))
            if (seen := self._try_pass(longer)) is not None:
                passes.longer[2 * size] = seen
        if passes.longer:
            found |= {key: axes_at(key) for key, axes in found.items() if isinstance(axes, ValueError)}
        found |= self._token_axes(few, passes, _loose(found))
        return found | self._uneven_errors(few, passes, _loose(found))

    def _token_axes(
        self, few: dict[str, Any], passes: Passes, loose: dict[Visit, Axes]
    ) -> dict[Visit, Axes | ValueError]:
        """The axes of activations in which only some of the rows belong to tokens."""
        given = with_other_tokens(few, passes.rows) if loose and "" in passes.now.by_side else None
        if given is None:
            return {key: passes.placed(key, axes, {}, ()) for key, axes in loose.items() if "" in passes.now.by_side}
        *batches, tokens = given
        places: dict[Visit, dict[int, list[int]]] = {}
        try:
            seen = []
            for one in batches:
                torch.manual_seed(0)  # for models that draw the order of their patches
                seen.append(self._run_pass(one, lambda key, hidden: hidden if key in loose else None))
            places = {key: differs_at(loose[key], one, seen[1][key]) for key, one in seen[0].items() if key in seen[1]}
        except Exception as error:
            logger.debug("Texts with other tokens cannot be run: %s", error)
        return {key: passes.placed(key, axes, places.get(key, {}), tokens) for key, axes in loose.items()}

    def _uneven_errors(self, few: dict[str, Any], passes: Passes, loose: dict[Visit, Axes]) -> dict[Visit, ValueError]:
        """The errors for activations that cannot be labelled: how many rows an example has depends on its content."""
        sizes = {key: passes.sizes(key, axes, passes.first) for key, axes in loose.items()}
        changing = [key for key, axes in loose.items() if passes.sizes(key, axes, passes.changed) != sizes[key]]
        errors = {}
        for row in range(passes.rows) if changing else ():
            if (alone := self._try_pass(rows_of(few, passes.rows, [row]))) is None:
                break
            for key in changing:
                now = passes.sizes(key, loose[key], alone)
                both = enumerate(zip(now, sizes[key], strict=False))
                if any(a != b for axis, (a, b) in both if axis != loose[key].example):
                    errors[key] = ValueError(
                        f"How many rows an example has at {key!r} depends on its content, and which of them are "
                        "padding is not known: they cannot be labelled. Choose another target module."
                    )
        return errors

    def _try_pass(self, batch: Mapping[str, Any]) -> dict[Visit, Summary] | None:
        """The summaries of one pass, or None where the model cannot be run on the batch."""
        try:
            return self._run_pass(batch)
        except Exception as error:
            logger.debug("Rows that would show what the axes are cannot be run: %s", error)
            return None

    def _run_pass(
        self, batch: Mapping[str, Any], keep: Callable[[Visit, Tensor], Any] = lambda key, hidden: Summary.of(hidden)
    ) -> dict[Visit, Any]:
        """Run one pass; return what `keep` gives for every visit of a site and every last hidden state."""
        kept, visits = dict[Visit, Any](), Counter[str]()

        def observe(name: str, hidden: Tensor) -> Tensor:
            visits[name] += 1
            key = Visit(name, visits[name])
            # An activation without rows shows nothing, and nothing in it is labelled.
            if hidden.numel() and (found := keep(key, hidden.detach())) is not None:
                kept[key] = found
            return hidden

        with observed(self.layers, self.name, observe, self.runner.final_states(), needs_finals=False):
            self.runner(dict(batch))
        return kept


def _loose(found: Mapping[Visit, Axes | ValueError]) -> dict[Visit, Axes]:
    """The axes of the activations whose rows are not known to belong to tokens."""
    known = {key: axes for key, axes in found.items() if isinstance(axes, Axes)}
    return {key: axes for key, axes in known.items() if axes.side is None and not axes.is_shared}


def few_rows(batch: Any) -> dict[str, Any] | None:
    """The longest and the shortest row of a batch, or all rows where it is not known what belongs to a row.

    None where it is not a batch.
    """
    if not isinstance(batch, Mapping) or any(map(is_of_numbers, inputs_of(batch).values())):
        return None  # `Source.read` raises an error about it
    labelled = inputs_of(batch) | {name: value for name, value in batch.items() if name == "concept_labels"}
    found = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in labelled.items()}
    inputs = [value for value in inputs_of(found).values() if isinstance(value, Tensor) and value.dim()]
    if not inputs or not len(inputs[0]):
        return None
    rows = len(inputs[0])
    if any(len(value) != rows for value in inputs):
        return found
    mask = found.get("attention_mask")
    lengths = (mask if isinstance(mask, Tensor) else torch.ones(rows, 1, device="cpu")).flatten(1).sum(1)
    order = sorted(range(rows), key=lambda row: -int(lengths[row]))
    return rows_of(found, rows, sorted({order[0], order[-1]}))


def is_of_numbers(value: Any) -> bool:
    """Whether an input is an array or a list of numbers, which should have been a tensor."""
    is_list = isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (int, float, list))
    return isinstance(value, np.ndarray) or is_list


@contextmanager
def observed(
    layers: dict[str, ErasureLayer],
    adapter_name: str,
    observer: Callable[[str, Tensor], Tensor],
    finals: Mapping[str, nn.Module] | None = None,
    *,
    needs_finals: bool = True,
) -> Iterator[None]:
    """While open, `observer(site, activation)` is called instead of the adapter's eraser at every site.

    It is passed the activation after all erasers that act before this one, and its result goes on. It is also passed
    the last hidden states that the modules in `finals` return; its result for these is not used. A module that returns
    none raises an error if `needs_finals`.
    """

    def hook(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        try:
            state = last_hidden_state(output)
        except ValueError:
            if needs_finals:
                raise
            return
        observer(name, state)

    before = {path: layer.observers.get(adapter_name) for path, layer in layers.items()}
    handles = [module.register_forward_hook(functools.partial(hook, name)) for name, module in (finals or {}).items()]
    try:
        for path, layer in layers.items():
            layer.observers[adapter_name] = functools.partial(observer, path)
        yield
    finally:
        for path, layer in layers.items():
            layer.observers.pop(adapter_name, None)
            if (earlier := before[path]) is not None:
                layer.observers[adapter_name] = earlier
        for handle in handles:
            handle.remove()
