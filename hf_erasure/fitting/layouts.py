"""What the axes of the activations at the sites of an adapter are, found by running its model over a few rows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_erasure.adapters import ErasureLayer
from hf_erasure.models.layout import (
    PLACES,
    Axes,
    Glimpse,
    Lengths,
    Seen,
    axes_of,
    calls_of,
    feature_axis,
    frames_of,
    mirrored,
    of_other_lengths,
    takers_of,
)
from hf_erasure.models.model import Runner, evaluating, last_hidden_state, without_drawing

logger = logging.getLogger(__name__)
Visits = dict[str, list[Glimpse]]


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
        mask, speech = batch.get("attention_mask"), self._speech(batch)
        return speech[1](mask) if speech is not None and isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _speech(self, batch: Mapping[str, Any]) -> Any:
        return None if "input_ids" in batch else self._frames

    @functools.cached_property
    def _frames(self) -> Any:
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
        hosts: dict[str, nn.Module] = {name: layer.host for name, layer in self.layers.items()}
        hosts |= {self.runner.side_of(name): module for name, module in self.runner.final_states().items()}
        if not few:
            return {}
        rows, now = (
            len(next(v for v in few.values() if isinstance(v, Tensor) and v.dim())),
            Lengths.in_batch(few, (self._speech(few) or [None])[0]),
        )
        other = now.changed()
        with evaluating(self.runner.model), without_drawing(self.runner.model):
            try:
                first = self._glimpses(few)
                passes = [first, self._glimpses(mirrored(few, rows), first, rows), self._shorter(few, now, other)]
            except Exception as error:
                # What is wrong with the batch, fitting says when it comes to it.
                reason = f"the rows that show what its axes are cannot be run: {type(error).__name__}: {error}"
                return {name: ValueError(f"The activation at {name!r} cannot be labelled, {reason}") for name in hosts}
            unclear = [hosts[name] for name in passes[0] if _is_unclear(name, passes)]
            inside = {id(module): module for host in unclear for module in host.modules()}
            takers: dict[str, list[nn.Module]] = {}

            def watch() -> None:
                takers.update(takers_of(lambda: self._first_activations(few), self.runner.model.modules()))

            calls = calls_of(watch, inside.values()) if unclear else []
            found: dict[str, Axes | ValueError] = {}
            longer: Visits | None = None
            for name in passes[0]:
                own = {id(module) for module in hosts[name].modules()}
                within = [call for call in calls if id(call.module) in own]
                modules = hosts[name], takers.get(name, [])
                try:
                    axes = _axes(name, passes, within, rows, (now, other), *modules)
                    if axes.side is None and now.are_in(passes[0][name][0].shape, passes[2][name][0].shape):
                        longer = self._longer(few, now) if longer is None else longer
                        if len(longer.get(name, ())) == len(passes[0][name]):
                            lengths = (now, now.multiplied())
                            axes = _axes(name, [*passes[:2], longer], within, rows, lengths, *modules)
                    found[name] = axes
                except ValueError as error:
                    # Its frames hold all that was seen.
                    found[name] = error.with_traceback(None)
        return found

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

    def _longer(self, few: Mapping[str, Any], now: Lengths) -> Visits:
        """The activations of rows of a multiple of their length; of none where the model does not take them."""
        try:
            return self._glimpses(of_other_lengths(few, now, now.multiplied()))
        except Exception as error:
            logger.debug("Rows of a multiple of their length cannot be run: %s", error)
            return {}

    def _first_activations(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The activations of the first visits of the sites in one pass."""
        found: dict[str, Tensor] = {}

        def keep(name: str, hidden: Tensor) -> Tensor:
            found.setdefault(name, hidden)
            return hidden

        with observed(self.layers, self.name, keep):
            self.runner(dict(batch))
        return found

    def _glimpses(self, batch: Mapping[str, Any], single: Visits | None = None, rows: int = 0) -> Visits:
        """What is kept of every visit of a site in one pass, and of the last hidden states.

        Of mirrored rows, where those of the rows alone are given.
        """
        found: Visits = {}

        def keep(name: str, hidden: Tensor) -> Tensor:
            here = found.setdefault(name, [])
            before = dict(enumerate((single or {}).get(name, ())))
            here.append(Glimpse.of(hidden.detach(), before.get(len(here)), rows))
            return hidden

        finals = {self.runner.side_of(name): module for name, module in self.runner.final_states().items()}
        with observed(self.layers, self.name, keep, finals, needs_finals=False):
            self.runner(dict(batch))
        return found


def _axes(
    name: str,
    passes: Sequence[Visits],
    calls: Sequence[Seen],
    rows: int,
    lengths: tuple[Lengths, Lengths],
    host: nn.Module,
    takers: Sequence[nn.Module],
) -> Axes:
    """The axes of a site, which are the same at all its visits."""
    visits = list(zip(*(one.get(name, ()) for one in passes), strict=False))
    found = []
    for visit in visits:
        width = feature_axis([glimpse.shape for glimpse in visit], calls, name, host, takers)
        found.append(axes_of(-1 if width == len(visit[0].shape) - 1 else width, visit, rows, *lengths, name))
    if not found or any(axes != found[0] for axes in found):
        raise ValueError(f"{name!r} is called several times, and its activations have other axes each time.")
    return found[0]


def _is_unclear(name: str, passes: Sequence[Visits]) -> bool:
    """Whether more than one axis of an activation stays the same, so that the weights must tell."""
    first = [one[name][0].shape for one in passes if one.get(name)]
    return sum(len(set(sizes)) == 1 for sizes in zip(*first, strict=False)) > 1


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
