"""What the axes of the activations at the sites of an adapter are, found by running its model over a few rows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

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
)
from hf_erasure.models.model import Runner, evaluating, last_hidden_state, without_drawing

logger = logging.getLogger(__name__)
Visits = dict[str, list[Glimpse]]


@dataclass(frozen=True)
class _Passes:
    """What three passes showed of the activations at every visit of a site.

    Attributes:
        rows: The number of examples in the first.
        now: The lengths of these.
        other: The lengths of those in the third.
        first: Of some rows.
        twice: Of these, and of the same in the opposite order behind them.
        changed: Of these, with other lengths.
    """

    rows: int
    now: Lengths
    other: Lengths
    first: Visits
    twice: Visits
    changed: Visits

    def visits(self, name: str) -> list[tuple[Glimpse, Glimpse, Glimpse]]:
        """What each visit of a site showed in the three."""
        return list(zip(self.first.get(name, ()), self.twice.get(name, ()), self.changed.get(name, ()), strict=False))

    def is_unclear(self, name: str, host: nn.Module) -> bool:
        """Whether several axes of an activation may be that of its features, by their sizes and the module's kind."""
        for visit in self.visits(name)[:1]:
            shapes = [glimpse.shape for glimpse in visit]
            if len({len(shape) for shape in shapes}) == 1:
                same = lasting(shapes, name)
                return len(same) > 1 and axis_of_kind(host, len(shapes[0])) not in same
        return False

    def may_align(self, name: str, axes: Axes) -> bool:
        """Whether rows that do not follow the lengths may do so at multiples of them."""
        visits = self.visits(name)
        return axes.side is None and bool(visits) and self.now.are_in(visits[0][0].shape, visits[0][2].shape)


@dataclass
class Layouts:
    """The axes of the activations of a model, by the form of its batches.

    Attributes:
        runner: Calls the model.
        layers: The sites.
        name: The adapter.
    """

    runner: Runner
    layers: dict[str, ErasureLayer]
    name: str
    _known: dict[Any, dict[str, Axes | ValueError]] = field(default_factory=dict, init=False)

    def of(self, batch: Mapping[str, Any]) -> dict[str, Axes | ValueError]:
        """Site, or last hidden state, → its axes, or why these cannot be told."""
        form = _form_of(batch)
        if form not in self._known:
            self._known[form] = self._found(batch)
        return self._known[form]

    def frames_of(self, batch: Mapping[str, Any]) -> Tensor | None:
        """`(batch, frames)` bool, those that are not padding; None where the mask of a batch is not one of samples."""
        mask, frames = batch.get("attention_mask"), self._frames_for(batch)
        return frames.mask_of(mask) if frames is not None and isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _frames_for(self, batch: Mapping[str, Any]) -> Frames | None:
        return None if "input_ids" in batch else self._frames

    @functools.cached_property
    def _frames(self) -> Frames | None:
        return frames_of(self.runner.model)

    def along(self, site: str) -> tuple[int, int]:
        """The axes of the features and of the examples of a site, which are the same for batches of any form."""
        seen = [axes for known in self._known.values() if isinstance(axes := known.get(site), Axes)]
        found = {(axes.width, axes.example + (0 <= axes.width <= axes.example)) for axes in seen}
        if len(found) > 1:
            raise ValueError(
                f"The features and examples of {site!r} lie along axes {sorted(found)}, by the batch: name another "
                "site."
            )
        return found.pop() if found else (-1, 0)

    def _found(self, batch: Mapping[str, Any]) -> dict[str, Axes | ValueError]:
        few = _inputs_of(few_rows(batch) or {})
        if not few:
            return {}
        with evaluating(self.runner.model), without_drawing(self.runner.model):
            try:
                passes = self._passes(few)
            except Exception as error:
                # What is wrong with the batch, fitting says when it comes to it.
                reason = f"the rows that show what its axes are cannot be run: {type(error).__name__}: {error}"
                return {
                    name: ValueError(f"The activation at {name!r} cannot be labelled, {reason}")
                    for name in (*self.layers, *self._finals)
                }
            told = self._told(few, passes)
            found = {
                name: _axes_or_reason(name, self._hosts[name], told.get(name, set()), passes) for name in passes.first
            }
            unaligned = [
                name for name, axes in found.items() if isinstance(axes, Axes) and passes.may_align(name, axes)
            ]
            if unaligned and (longer := self._longer(few, passes)) is not None:
                for name in unaligned:
                    again = _axes_or_reason(name, self._hosts[name], told.get(name, set()), longer)
                    found[name] = again if isinstance(again, Axes) else found[name]
        return found

    @functools.cached_property
    def _finals(self) -> dict[str, nn.Module]:
        """The modules that return a last hidden state, by the name that tells its side."""
        return {self.runner.side_of(name): module for name, module in self.runner.final_states().items()}

    @functools.cached_property
    def _hosts(self) -> dict[str, nn.Module]:
        return {name: layer.host for name, layer in self.layers.items()} | self._finals

    def _passes(self, few: dict[str, Any]) -> _Passes:
        """The three passes that show which axes change with the rows and the lengths."""
        rows = len(next(v for v in few.values() if isinstance(v, Tensor) and v.dim()))
        frames = self._frames_for(few)
        now = Lengths.in_batch(few, None if frames is None else frames.count)
        first, other = self._glimpses(few), now.changed()
        twice = self._glimpses(mirrored(few, rows), first, rows)
        return _Passes(rows, now, other, first, twice, self._shorter(few, now, other))

    def _told(self, few: dict[str, Any], passes: _Passes) -> dict[str, set[int]]:
        """What other modules tell of the features of sites that their own shapes and kinds leave unclear."""
        unclear = {name for name in passes.first if passes.is_unclear(name, self._hosts[name])}
        if not unclear:
            return {}

        def run() -> dict[str, Tensor]:
            given = self._first_activations(few)
            return {name: given[name] for name in unclear if name in given}

        told = takers_of(run, self.runner.model.modules())
        # What a module takes, those inside have not given; and FSDP's modules are not called backwards here.
        left = {
            name: self._hosts[name]
            for name in unclear
            if not told.get(name) and not self._is_taken(name) and not self.runner.is_sharded
        }
        try:
            return told | (told_inside(run, left) if left else {})
        except Exception as error:
            logger.debug("What the features depend on cannot be told: %s", error)
            return told

    def _is_taken(self, name: str) -> bool:
        return name in self.layers and self.layers[name].concept_erasure_site[self.name] == "input"

    def _shorter(self, few: Mapping[str, Any], now: Lengths, other: Lengths) -> Visits:
        """The activations of rows with other lengths: cut where the model can do without."""
        if not now.of:
            return self._glimpses(few)
        *places, last = PLACES
        for place in places:
            try:
                return self._glimpses(of_other_lengths(few, now, other, place))
            except Exception as error:
                logger.debug("Rows that are cut at their %s cannot be run: %s", place, error)
        return self._glimpses(of_other_lengths(few, now, other, last))

    def _longer(self, few: Mapping[str, Any], passes: _Passes) -> _Passes | None:
        """The passes with rows of a multiple of their length; None where the model does not take them."""
        lengths = passes.now.multiplied()
        try:
            return replace(passes, other=lengths, changed=self._glimpses(of_other_lengths(few, passes.now, lengths)))
        except Exception as error:
            logger.debug("Rows of a multiple of their length cannot be run: %s", error)
            return None

    def _first_activations(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The activations of the first visits of the sites in one pass, and the last hidden states."""
        found: dict[str, Tensor] = {}

        def keep(name: str, hidden: Tensor) -> Tensor:
            found.setdefault(name, hidden)
            return hidden

        with observed(self.layers, self.name, keep, self._finals, needs_finals=False):
            self.runner(dict(batch))
        return found

    def _glimpses(self, batch: Mapping[str, Any], single: Visits | None = None, rows: int = 0) -> Visits:
        """What is kept of every visit of a site in one pass, and of the last hidden states.

        Of mirrored rows, where those of the rows alone are given.
        """
        found: Visits = {}

        def keep(name: str, hidden: Tensor) -> Tensor:
            if not hidden.numel():
                return hidden  # without rows nothing can be told, and nothing is labelled
            here = found.setdefault(name, [])
            before = dict(enumerate((single or {}).get(name, ())))
            here.append(Glimpse.of(hidden.detach(), before.get(len(here)), rows))
            return hidden

        with observed(self.layers, self.name, keep, self._finals, needs_finals=False):
            self.runner(dict(batch))
        return found


def _axes_or_reason(name: str, host: nn.Module, told: set[int], passes: _Passes) -> Axes | ValueError:
    """The axes of a site, which are the same at all its visits, or why they cannot be told."""
    try:
        found = []
        for visit in passes.visits(name):
            width = feature_axis([glimpse.shape for glimpse in visit], name, host, told)
            width = -1 if width == len(visit[0].shape) - 1 else width
            found.append(axes_of(width, visit, passes.rows, passes.now, passes.other, name))
        if not found or any(axes != found[0] for axes in found):
            raise ValueError(f"{name!r} is called several times, and its activations have other axes each time.")
        return found[0]
    except ValueError as error:
        return error.with_traceback(None)  # its frames hold all that was seen


def few_rows(batch: Any) -> dict[str, Any] | None:
    """The longest and the shortest row of a batch, or all where what belongs to a row cannot be told.

    None where it is not a batch.
    """
    if not isinstance(batch, Mapping) or any(map(is_of_numbers, _inputs_of(batch).values())):
        return None  # reading says what is wrong with it
    tensors = {name: value.cpu() for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    inputs = [value for name, value in tensors.items() if name != "concept_labels"]
    if not inputs or not len(inputs[0]):
        return None
    rows = len(inputs[0])
    if any(len(value) != rows for value in inputs):
        return dict(batch)
    mask = tensors.get("attention_mask", torch.ones(rows, 1, device="cpu"))
    lengths = mask.flatten(1).sum(1)
    order = sorted(range(rows), key=lambda row: -int(lengths[row]))
    chosen = sorted({order[0], order[-1]})
    few = {name: tensors[name][chosen].clone() if name in tensors else value for name, value in batch.items()}
    lists = {name: value for name, value in _inputs_of(batch).items() if isinstance(value, list) and len(value) == rows}
    return few | {name: [value[row] for row in chosen] for name, value in lists.items()}


def is_of_numbers(value: Any) -> bool:
    """Whether an input should have been a tensor."""
    is_list = isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (int, float, list))
    return isinstance(value, np.ndarray) or is_list


def _inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "concept_labels"}


def _form_of(batch: Mapping[str, Any]) -> Any:
    """What two batches have in common whose activations have the same axes: all but rows and lengths."""
    lengths = Lengths.in_batch(batch).of.values()
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "concept_labels"}
    return tuple(
        (name, value.dtype, tuple(size for size in value.shape[1:] if size not in lengths))
        for name, value in sorted(tensors.items())
    )


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
