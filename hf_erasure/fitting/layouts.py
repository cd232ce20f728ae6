"""What the axes of the activations at the sites of an adapter are, found by running its model over a few rows."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hf_erasure.adapters import ErasureLayer
from hf_erasure.models.features import axis_of_kind, feature_axis, lasting, takers_of, told_inside
from hf_erasure.models.layout import (
    PLACES,
    Axes,
    Frames,
    Glimpse,
    Lengths,
    axes_of,
    frames_of,
    mirrored,
    of_other_lengths,
    places_of,
    rows_of,
    with_other_tokens,
)
from hf_erasure.models.model import Runner, evaluating, inputs_of, last_hidden_state, without_drawing

T = TypeVar("T")
logger = logging.getLogger(__name__)
# By visit of a site, and by last hidden state.
Glimpses = dict[str, Glimpse]
_VISIT = ", visit "
_PAIRS = ", pairs"


def visit_of(site: str, number: int) -> str:
    """The key of the moments of one visit of a site, from 1."""
    return site if number == 1 else f"{site}{_VISIT}{number}"


def site_of(key: str) -> str:
    """The site whose visit it is the key of."""
    return visit_itself(key).partition(_VISIT)[0]


def pairs_of(key: str) -> str:
    """The key of the differences within pairs at a visit of a site."""
    return f"{key}{_PAIRS}"


def visit_itself(key: str) -> str:
    """The key of the visit, where it may be that of the differences there."""
    return key.removesuffix(_PAIRS)


def is_of_pairs(key: str) -> bool:
    """Whether it is the key of differences within pairs."""
    return key.endswith(_PAIRS)


@dataclass(frozen=True)
class _Passes:
    """What small passes showed of the activations."""

    rows: int  # The number of examples in the first.
    now: Lengths  # The lengths of these.
    other: Lengths  # The lengths of those in the third.
    first: Glimpses  # Of some rows.
    twice: Glimpses  # Of these, and of the same in the opposite order behind them.
    changed: Glimpses  # Of these, with other lengths.
    longer: dict[int, Glimpses] = field(default_factory=dict)  # Of these, by the length of the texts, which are longer.

    def shapes(self, key: str) -> list[tuple[int, ...]]:
        """Those of an activation in all passes that reached it."""
        passes = (self.first, self.twice, self.changed, *self.longer.values())
        return [one[key].shape for one in passes if key in one]

    def axes_of(self, key: str, host: nn.Module, told: set[int]) -> Axes | ValueError:
        """The axes of an activation, or why they cannot be told."""
        try:
            if key not in self.twice or key not in self.changed:
                raise ValueError(f"{key!r} is reached by some rows and not by others: choose another target module.")
            width = feature_axis(shapes := self.shapes(key), key, host, told)
            width = -1 if width == len(shapes[0]) - 1 else width
            visit = self.first[key], self.twice[key], self.changed[key]
            return axes_of(width, visit, self.rows, self.now, self.other, key)
        except ValueError as error:
            return error.with_traceback(None)  # its frames hold all that was seen

    def sizes(self, key: str, axes: Axes | None, one: Glimpses) -> list[int]:
        """Those of an activation in a pass, without that of its features where this is known."""
        shape = list(one[key].shape) if key in one else []
        return [size for axis, size in enumerate(shape) if axes is None or axis != axes.width % len(shape)]

    def padded(self, key: str, axes: Axes | ValueError) -> set[int]:
        """The sizes of the axes that may be those of texts that are padded to a multiple of a length."""
        known = axes if isinstance(axes, Axes) else None
        if "" not in self.now.of or (known is not None and known.side is not None):
            return set()
        n, other = self.now.of[""], self.other.of[""]
        both = zip(self.sizes(key, known, self.first), self.sizes(key, known, self.changed), strict=False)
        return {
            size
            for axis, (size, changed) in enumerate(both)
            if size >= n and changed >= other and size - n != changed - other
            if known is None or axis != known.example
        }

    def placed(self, key: str, axes: Axes, places: dict[int, list[int]], tokens: Sequence[int]) -> Axes | ValueError:
        """The axes of an activation where more positions than there are tokens hold the tokens, if that is so."""
        n, other = self.now.of[""], self.other.of[""]
        now, changed = self.sizes(key, axes, self.first), self.sizes(key, axes, self.changed)
        for axis, (size, size_changed) in enumerate(zip(now, changed, strict=True)):
            is_beside = size - n == size_changed - other > 0
            longer = self.sizes(key, axes, self.longer.get(2 * size, {}))
            is_padded = size >= n and bool(longer) and longer[axis] == 2 * size
            if axis == axes.example or not (is_beside or is_padded):
                continue
            starts = {place - token for place, token in zip(places.get(axis, ()), tokens, strict=False)}
            if len(starts) == 1 and 0 <= (start := starts.pop()) <= size - n:
                return replace(axes, position=axis, side="", start=start, beside=is_beside)
            if is_padded and size == n:
                return replace(axes, position=axis, side="")
            if is_padded:
                return ValueError(
                    f"The model pads the {n} tokens of a text to {size} positions at {key!r}, and which of these are "
                    "those of the tokens cannot be told: pad the batches to a multiple of it (pad_to_multiple_of)."
                )
        return axes


@dataclass
class Layouts:
    """The axes of the activations of a model, by the form of its batches."""

    runner: Runner  # Calls the model.
    layers: dict[str, ErasureLayer]  # The sites.
    name: str  # The adapter.
    # How many features each visit of a site has, as far as the small passes reached it.
    widths: dict[str, int] = field(default_factory=dict, init=False)
    _known: dict[Any, dict[str, Axes | ValueError]] = field(default_factory=dict, init=False)

    def of(self, batch: Mapping[str, Any]) -> dict[str, Axes | ValueError]:
        """Visit of a site, or last hidden state, → its axes, or why these cannot be told.

        They are the same for batches that have all in common but rows and lengths.
        """
        lengths, inputs = Lengths.in_batch(batch).of.values(), sorted(inputs_of(batch).items())
        form = tuple(
            (name, value.dtype, tuple(size for size in value.shape[1:] if size not in lengths))
            for name, value in inputs
            if isinstance(value, Tensor)
        )
        if form not in self._known:
            few = inputs_of(few_rows(batch) or {})
            with evaluating(self.runner.model), without_drawing(self.runner.model):
                self._known[form] = self._found(few) if few else {}
        return self._known[form]

    def frames_of(self, batch: Mapping[str, Any]) -> Tensor | None:
        """`(batch, frames)` bool, those that are not padding; None where the mask of a batch is not one of samples."""
        mask, frames = batch.get("attention_mask"), None if "input_ids" in batch else self._frames
        return frames.mask_of(mask) if frames is not None and isinstance(mask, Tensor) and mask.dim() == 2 else None

    @functools.cached_property
    def _frames(self) -> Frames | None:
        return frames_of(self.runner.model)

    @functools.cached_property
    def _finals(self) -> dict[str, nn.Module]:
        """The modules that return a last hidden state, by the name that tells its side."""
        return {self.runner.side_of(name): module for name, module in self.runner.final_states().items()}

    def along(self, site: str) -> tuple[int, int]:
        """The axes of the features and of the examples of a site, which are the same for batches of any form."""
        every = (item for known in self._known.values() for item in known.items())
        seen = [axes for key, axes in every if isinstance(axes, Axes) and site_of(key) == site]
        found = {(axes.width, axes.example + (0 <= axes.width <= axes.example)) for axes in seen}
        if len(found) > 1:
            raise ValueError(
                f"The features and examples of {site!r} lie along axes {sorted(found)}, by the batch or the visit: "
                "name another site."
            )
        return found.pop() if found else (-1, 0)

    def _found(self, few: dict[str, Any]) -> dict[str, Axes | ValueError]:
        """The same, by running the model over some rows, over these twice, and over these with other lengths."""
        rows = len(next(v for v in few.values() if isinstance(v, Tensor) and v.dim()))
        try:
            frames = None if "input_ids" in few else self._frames
            now = Lengths.in_batch(few, None if frames is None else frames.count)
            first, other = self._glimpses(few), now.changed()
            twice = self._glimpses(mirrored(few, rows), first, rows)
            passes = _Passes(rows, now, other, first, twice, self._shorter(few, now, other))
        except Exception as error:
            # What is wrong with the batch, fitting says when it comes to it.
            reason = f"the rows that show what its axes are cannot be run: {type(error).__name__}: {error}"
            return {
                name: ValueError(f"The activation at {name!r} cannot be labelled, {reason}")
                for name in (*self.layers, *self._finals)
            }
        modules = {name: layer.host for name, layer in self.layers.items()} | self._finals
        hosts = {key: modules[site_of(key)] for key in first}
        # Sites whose own shapes and kinds leave unclear which axis is that of the features.
        unclear = {}
        for key, host in hosts.items():
            shapes = passes.shapes(key)
            same = lasting(shapes, key) if len({len(shape) for shape in shapes}) == 1 else []
            if len(same) > 1 and axis_of_kind(host, len(shapes[0])) not in same:
                unclear[site_of(key)] = host
        told = self._told(few, passes, unclear) if unclear else {}
        found = {key: passes.axes_of(key, host, told.get(site_of(key), set())) for key, host in hosts.items()}
        axes_of_sites = ((key, axes) for key, axes in found.items() if site_of(key) in self.layers)
        self.widths |= {key: first[key].shape[axes.width] for key, axes in axes_of_sites if isinstance(axes, Axes)}
        if all(isinstance(axes, Axes) and axes.side is not None for axes in found.values()):
            return found
        # A model may pad texts to multiples of a length, which longer texts show.
        for size in sorted({size for key, axes in found.items() for size in passes.padded(key, axes)}):
            try:
                passes.longer[2 * size] = self._glimpses(of_other_lengths(few, now, now.made(2 * size)))
            except Exception as error:
                logger.debug("Texts of %d tokens cannot be run: %s", 2 * size, error)
        for key in [key for key, axes in found.items() if isinstance(axes, ValueError)] if passes.longer else ():
            found[key] = passes.axes_of(key, hosts[key], told.get(site_of(key), set()))
        found |= self._placed(few, passes, _loose(found))
        return found | self._uneven(few, passes, _loose(found))

    def _shorter(self, few: Mapping[str, Any], now: Lengths, other: Lengths) -> Glimpses:
        """The activations of rows with other lengths: cut where the model can do without."""
        *places, last = PLACES
        for place in places if now.of else ():
            try:
                return self._glimpses(of_other_lengths(few, now, other, place))
            except Exception as error:
                logger.debug("Rows that are cut at their %s cannot be run: %s", place, error)
        return self._glimpses(of_other_lengths(few, now, other, last))

    def _told(self, few: dict[str, Any], passes: _Passes, unclear: Mapping[str, nn.Module]) -> dict[str, set[int]]:
        """What other modules tell of the features of sites."""

        def run() -> dict[str, Tensor]:
            return self._activations(few, unclear)

        told = takers_of(run, self.runner.model.modules())
        for name in unclear.keys() & self.layers.keys():
            # The axes along which adapters that were fitted before erase what this one does, and mix the features.
            layer, dims = self.layers[name], len(passes.first[name].shape)
            sides, axes = layer.concept_erasure_site, layer.concept_erasure_axis
            fitted = (other for other in layer.concept_erasure_left if layer.eraser_state(other)[0].numel())
            beside = {axes[other] % dims for other in fitted if sides[other] == sides[self.name]}
            told[name] = told.get(name) or beside
        # What a module takes, those inside have not given; and FSDP's modules are not called backwards here.
        taken = {name for name, layer in self.layers.items() if layer.concept_erasure_site[self.name] == "input"}
        left = {name: host for name, host in unclear.items() if name not in taken and not told.get(name)}
        try:
            return told | (told_inside(run, left) if left and not self.runner.is_sharded else {})
        except Exception as error:
            logger.debug("What the features depend on cannot be told: %s", error)
            return told

    def _placed(self, few: dict[str, Any], passes: _Passes, loose: dict[str, Axes]) -> dict[str, Axes | ValueError]:
        """The axes of activations of which some of the rows are those of tokens."""
        given = with_other_tokens(few, passes.rows) if loose and "" in passes.now.of else None
        if given is None:
            return {key: passes.placed(key, axes, {}, ()) for key, axes in loose.items() if "" in passes.now.of}
        *batches, tokens = given
        places: dict[str, dict[int, list[int]]] = {}
        try:
            seen = []
            for one in batches:
                torch.manual_seed(0)  # for those that draw the order of their patches
                seen.append(self._activations(one, loose))
            places = {key: places_of(loose[key], one, seen[1][key]) for key, one in seen[0].items() if key in seen[1]}
        except Exception as error:
            logger.debug("Texts with other tokens cannot be run: %s", error)
        return {key: passes.placed(key, axes, places.get(key, {}), tokens) for key, axes in loose.items()}

    def _uneven(self, few: dict[str, Any], passes: _Passes, loose: dict[str, Axes]) -> dict[str, ValueError]:
        """Why activations cannot be labelled of which an example has as many rows as its content has it."""
        sizes = {key: passes.sizes(key, axes, passes.first) for key, axes in loose.items()}
        changing = [key for key, axes in loose.items() if passes.sizes(key, axes, passes.changed) != sizes[key]]
        found = {}
        for row in range(passes.rows) if changing else ():
            try:
                alone = self._glimpses(rows_of(few, passes.rows, [row]))
            except Exception as error:
                logger.debug("Single rows cannot be run: %s", error)
                break
            for key in changing:
                now = passes.sizes(key, loose[key], alone)
                both = enumerate(zip(now, sizes[key], strict=False))
                if any(a != b for axis, (a, b) in both if axis != loose[key].example):
                    found[key] = ValueError(
                        f"How many rows an example has at {key!r} depends on its content, and which of them are "
                        "padding is not known: they cannot be labelled. Choose another target module."
                    )
        return found

    def _activations(self, batch: Mapping[str, Any], keys: Container[str]) -> dict[str, Tensor]:
        """The activations in one pass, by visit."""
        return self._seen(batch, lambda key, hidden: hidden if key in keys else None)

    def _glimpses(self, batch: Mapping[str, Any], single: Glimpses | None = None, rows: int = 0) -> Glimpses:
        """What is kept of every activation in one pass; of mirrored rows, where those of the rows alone are given."""
        return self._seen(batch, lambda key, hidden: Glimpse.of(hidden.detach(), (single or {}).get(key), rows))

    def _seen(self, batch: Mapping[str, Any], kept_of: Callable[[str, Tensor], T | None]) -> dict[str, T]:
        """What is kept of every visit of a site and of every last hidden state, in one pass."""
        found, visits = dict[str, T](), Counter[str]()

        def see(name: str, hidden: Tensor) -> Tensor:
            visits[name] += 1
            key = visit_of(name, visits[name])
            # Without rows nothing can be told, and nothing is labelled.
            if hidden.numel() and (kept := kept_of(key, hidden)) is not None:
                found[key] = kept
            return hidden

        with observed(self.layers, self.name, see, self._finals, needs_finals=False):
            self.runner(dict(batch))
        return found


def _loose(found: Mapping[str, Axes | ValueError]) -> dict[str, Axes]:
    """Those whose rows are not known to be those of tokens."""
    known = {key: axes for key, axes in found.items() if isinstance(axes, Axes)}
    return {key: axes for key, axes in known.items() if axes.side is None and not axes.is_shared}


def few_rows(batch: Any) -> dict[str, Any] | None:
    """The longest and the shortest row of a batch, or all where what belongs to a row cannot be told.

    None where it is not a batch.
    """
    if not isinstance(batch, Mapping) or any(map(is_of_numbers, inputs_of(batch).values())):
        return None  # reading says what is wrong with it
    tensors = {name: value.cpu() for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    inputs = list(inputs_of(tensors).values())
    if not inputs or not len(inputs[0]):
        return None
    rows = len(inputs[0])
    told = inputs_of(batch) | {name: value for name, value in batch.items() if name == "concept_labels"}
    if any(len(value) != rows for value in inputs):
        return told
    mask = tensors.get("attention_mask", torch.ones(rows, 1, device="cpu"))
    lengths = mask.flatten(1).sum(1)
    order = sorted(range(rows), key=lambda row: -int(lengths[row]))
    chosen = sorted({order[0], order[-1]})
    few = {name: tensors[name][chosen].clone() if name in tensors else value for name, value in told.items()}
    lists = {name: value for name, value in inputs_of(batch).items() if isinstance(value, list) and len(value) == rows}
    return few | {name: [value[row] for row in chosen] for name, value in lists.items()}


def is_of_numbers(value: Any) -> bool:
    """Whether an input should have been a tensor."""
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
    """While open, `observer(site, activation)` stands in for the adapter's eraser at every site.

    It sees the activation after all erasers that act before this one, and what it returns goes on. Of the modules that
    `finals` names it sees the last hidden states, too; what it returns for these is not used. A model that returns none
    is refused where they are needed.
    """

    def at(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        try:
            state = last_hidden_state(output)
        except ValueError:
            if needs_finals:
                raise
            return
        observer(name, state)

    before = {path: layer.observers.get(adapter_name) for path, layer in layers.items()}
    handles = [module.register_forward_hook(functools.partial(at, name)) for name, module in (finals or {}).items()]
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
