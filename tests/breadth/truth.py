"""Measure what is left of a concept at a site with hooks that assign rows to examples without the package's code.

Each example is run alone, so all rows belong to it, on whatever axis they are. The features are on the last axis, or
on that of the channels for modules of convolutions. Padding is found by making the texts longer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves
from transformers.utils import ModelOutput

from tests.breadth.examples import Batch, alone, call

Visit = tuple[str, int]  # A site, and the number of its call in one forward pass.
# Side → how many positions texts are made longer by; multiples of the windows to which some models pad texts.
_LONGER = {"": 8, "decoder_": 16}
# The id of a word that is not in any text here.
_ANOTHER = 9
# Types whose blocks return (batch, height, width, features); other image models have the channels first.
_CHANNELS_LAST = ("dinat", "nat", "sam", "edgetam", "efficienttam")
_CHANNELS_FIRST = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.Conv1d, nn.Conv2d)


def residuals(
    model: nn.Module, sites: Sequence[str], batches: Iterable[Batch], axes: dict[str, int], pool: str = "tokens"
) -> dict[Visit, float]:
    """Visit → `|Σ x z| / (|x| |z|)` of the features x and the labels z, both without their means.

    Args:
        model: A model, with an adapter or without.
        sites: Names of modules.
        batches: Batches with a label for each sequence or each token.
        axes: Site → the axis of the features; see `feature_axes`.
        pool: Which rows count: all, their `"mean"`, the first (`"cls"`) or the last (`"last"`), as the head reads them.
    """
    sums: dict[Visit, _Sums] = {}
    for batch in batches:
        places = _positions(model, sites, batch, axes)
        for row in range(len(batch["concept_labels"])):
            example = alone(batch, row)
            for visit, given in activations(model, sites, example).items():
                rows = given.movedim(axes[visit[0]], -1)
                keep, labels = _of_rows(rows, places.get(visit), example, pool)
                kept, own = rows[keep].double(), labels[keep].double()
                kept, own = (kept.mean(0, keepdim=True), own[:1]) if pool == "mean" and len(kept) else (kept, own)
                sums.setdefault(visit, _Sums()).add(kept, own)
    return {visit: found.share() for visit, found in sums.items()}


def worst(found: dict[Visit, float]) -> tuple[str, float]:
    """The place where most of the concept is left, in words, and how much is left."""
    (site, number), most = max(found.items(), key=lambda item: item[1])
    return f"{site}, visit {number + 1}" if number else site, most


def feature_axes(model: Any, sites: Iterable[str], batch: Batch) -> dict[str, int]:
    """Site → the axis of the features, by the class of its module in a model without adapters."""
    found, takes_images = {}, model.main_input_name == "pixel_values" or "pixel_values" in batch
    for (site, _), given in activations(model, sites, alone(batch, 0)).items():
        module = model.get_submodule(site)
        told = getattr(module, "data_format", None)
        if told is not None or is_norm(module):
            own = told == "channels_first" or isinstance(module, _CHANNELS_FIRST)
            is_first = own or re.search("BatchNorm|SqueezeBertLayerNorm", repr(module)) is not None
        else:
            is_image = given.dim() == 4 and takes_images and not model.config.model_type.startswith(_CHANNELS_LAST)
            is_list = given.dim() == 3 and takes_images  # a list of patches
            is_first = is_image or isinstance(module, _CHANNELS_FIRST) or (_is_convolution(module) and not is_list)
        found[site] = 1 if is_first and given.dim() > 2 else -1
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module's class is named a norm, and no part of it mixes features."""
    return "norm" in type(module).__name__.lower() and all(value.dim() < 2 for value in module.parameters())


def _is_convolution(module: nn.Module) -> bool:
    """Whether only convolutions mix features in a module, as in the layers before a speech encoder."""
    mixing = [part for part in module.modules() if any(value.dim() > 1 for value in part.parameters(recurse=False))]
    return bool(mixing) and all(isinstance(part, _ConvNd) for part in mixing)


def activations(model: nn.Module, sites: Iterable[str], batch: Batch) -> dict[Visit, Tensor]:
    """The output of every call of the sites."""
    found: dict[Visit, Tensor] = {}
    with _watched(model, sites, found):
        call(model, batch)
    return found


@contextmanager
def _watched(model: nn.Module, sites: Iterable[str], found: dict[Visit, Tensor]) -> Iterator[None]:
    calls: dict[str, int] = {}

    def keep(site: str, output: Any) -> None:
        number = calls.get(site, 0)
        calls[site] = number + 1
        found[site, number] = _hidden(output).detach().clone()  # a copy, since some models change it in place

    handles = [
        model.get_submodule(site).register_forward_hook(lambda *given, site=site: keep(site, given[-1]))
        for site in sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Any) -> Tensor:
    """The hidden state in a module's output."""
    if isinstance(output, ModelOutput) and "last_hidden_state" in output:
        return output["last_hidden_state"]
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where the tokens of one example are in activations with the features last.

    Attributes:
        axis: The axis of the positions.
        side: The side of the tokens: `""` or `"decoder_"`.
        start: The position of the first token if other positions hold an image or a prompt; None if all hold tokens.
    """

    axis: int
    side: str
    start: int | None = None


def _positions(model: nn.Module, sites: Sequence[str], batch: Batch, axes: dict[str, int]) -> dict[Visit, _Place]:
    """Visit → the place of the tokens: the axis that grows with the texts of a side."""
    example = alone(batch, 0)
    lengths = {side: ids.shape[1] for side in _LONGER if (ids := example.get(f"{side}input_ids")) is not None}
    if not lengths:
        return {}
    try:
        longer = activations(model, sites, _longer(example, lengths))
    except Exception:
        return {}  # a type whose texts have a fixed length
    now, found = activations(model, sites, example), {}
    # All texts end in padding, so a change there does not reach the tokens.
    ends = {"input_ids": _with_another_end(example["input_ids"])} if "input_ids" in example else {}
    other = activations(model, sites, example | ends)
    for visit, given in now.items():
        states = [value.movedim(axes[visit[0]], -1) for value in (given, longer[visit], other[visit])]
        for axis, change in enumerate(zip(*(value.shape[:-1] for value in states[:2]), strict=True)):
            for side, length in lengths.items():
                if change == (length, length + _LONGER[side]):
                    found[visit] = _Place(axis, side)
                elif not side and change[0] > length and change[1] == change[0] + _LONGER[side]:
                    moved = (states[0] != states[2]).movedim(axis, 0).flatten(1).any(1).nonzero().flatten().tolist()
                    if len(moved) == 1 and "attention_mask" in example:
                        found[visit] = _Place(axis, side, moved[0] - length + 1)
    return found


def _with_another_end(ids: Tensor) -> Tensor:
    found = ids.clone()
    found[:, -1] = _ANOTHER
    return found


def _longer(example: Batch, lengths: dict[str, int]) -> Batch:
    """The example with more padding."""
    found = dict(example)
    for name, value in example.items():
        side = "decoder_" if name.startswith("decoder_") else ""
        if side in lengths and not value.is_floating_point() and value.shape[1:2] == (lengths[side],):
            found[name] = pad(value, (*[0] * (2 * (value.dim() - 2)), 0, _LONGER[side]))
    return found


def _of_rows(rows: Tensor, place: _Place | None, example: Batch, pool: str) -> tuple[Tensor, Tensor]:
    """A mask of the rows of one example that count, and the labels of all rows."""
    shape, label = rows.shape[:-1], example["concept_labels"]
    first = label.reshape(-1)[0]
    texts = None if place is None else example[f"{place.side}input_ids"]
    if place is None or (place.start is None and shape[place.axis] != texts.shape[1]):  # rows depend on the content
        return _pooled(torch.ones(shape, dtype=torch.bool).view(-1), pool).view(shape), first.expand(shape)
    size, tokens = shape[place.axis], slice(place.start or 0, (place.start or 0) + texts.shape[1])
    along = [size if axis == place.axis else 1 for axis in range(len(shape))]
    keep, values = torch.full((size,), label.dim() == 1 or bool(place.side)), first.repeat(size)
    keep[tokens] = example.get(f"{place.side}attention_mask", torch.ones_like(texts))[0].bool()
    if label.dim() > 1 and not place.side:
        values[tokens] = label[0]
    keep &= values >= 0
    return _pooled(keep, pool).view(along).expand(shape), values.view(along).expand(shape)


def _pooled(keep: Tensor, pool: str) -> Tensor:
    """Of the rows that may count, those that a pool reads: all, the first or the last."""
    at = keep.nonzero()[:1] if pool == "cls" else keep.nonzero()[-1:] if pool == "last" else keep.nonzero()
    return torch.zeros_like(keep).index_fill_(0, at.flatten(), True)


@dataclass
class _Sums:
    """The rows of one visit and their labels, gathered over examples."""

    rows: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor, labels: Tensor) -> None:
        self.rows.append(rows)
        self.labels.append(labels)

    def share(self) -> float:
        x, z = torch.cat(self.rows), torch.cat(self.labels)
        x, z = x - x.mean(0), z - z.mean()
        return float((x.T @ z).norm() / (x.norm() * z.norm()).clamp_min(torch.finfo(x.dtype).tiny))
