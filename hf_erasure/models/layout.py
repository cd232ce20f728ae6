"""Finds out, and never assumes, what the axes of an activation are: examples, positions of tokens, or features.

Most modules return (batch, position, width). Others return (position, batch, width) (XLNet), channels first
(convolutions), windows of several images in one axis (Swin), all tokens in one list (experts), fewer positions than
there are tokens (Funnel), or more (a prompt in front). Three small forward passes tell them apart: over some rows,
over the same rows twice, and over the rows with other lengths. An axis that doubles with the rows holds examples; an
axis that is as long as a mask, and changes with it, holds the positions of the mask's tokens. The weights of the module
show which axis holds the features: see `feature_axis`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .model import axis_of_kind

# Side → how many positions its texts are made shorter; an axis of tokens is recognised by the change of its length.
SHORTER = {"": 1, "decoder_": 2}
# The side of frames; a speech encoder makes one frame from many samples.
FRAMES = "frames"
# The places at which positions may be cut out of texts.
PLACES = ("second", "last")
# Tokens of a text that are changed to see where its tokens are: the first, the last, and one between them.
_TOKENS = 3
# Texts with fewer positions are made longer instead of shorter.
_SHORTEST = 4
# Shares of an activation's size. Rows of one example that are computed beside other examples differ by rounding alone;
# if one example is mistaken for another, they differ by about their own size.
_ROUNDING, _DIFFERENT = 1e-2, 0.5


class Visit(NamedTuple):
    """One call of a module in a forward pass, or a last hidden state."""

    site: str  # The name of the module, or of the state.
    number: int = 1  # Which call of the module it is.
    of_pairs: bool = False  # Whether the differences within pairs there are meant.

    def __str__(self) -> str:
        later = f", visit {self.number}" if self.number > 1 else ""
        return f"{self.site}{later}{', pairs' if self.of_pairs else ''}"

    def __repr__(self) -> str:
        return repr(str(self))

    @classmethod
    def named(cls, text: str) -> Visit:
        """The visit that `str` writes so."""
        site, _, number = text.removesuffix(", pairs").partition(", visit ")
        return cls(site, int(number or 1), text.endswith(", pairs"))


@dataclass(frozen=True)
class Axes:
    """What the axes of an activation are."""

    width: int  # The axis of the features; the others are counted without it.
    example: int  # The axis of the examples.
    # How many entries of that axis belong to one example: more than 1 for windows, and for tokens that lie in one list.
    per_example: int = 1
    is_major: bool = True  # Whether they lie side by side; otherwise the first entries of all examples come first.
    # The axis of the positions of tokens; None if there is none, or if they lie in one list with the examples
    # (`is_flat`).
    position: int | None = None
    # The side whose mask tells which positions are padding: `""`, `"decoder_"` or `FRAMES`; None if the rows of an
    # example are not the positions of its tokens.
    side: str | None = None
    is_flat: bool = False  # Whether the entries of an example along its axis are its positions.
    # Whether there is one entry that all examples share, as for learned positions.
    is_shared: bool = False
    # Whether texts of the batch have unequal numbers of images, so that it is not known whose entries are whose.
    is_unequal: bool = False
    start: int = 0  # The position of the first token.
    # For positions without a token: True if they hold content, such as a prompt or an image, False if they are padding;
    # None if there are none.
    beside: bool | None = None

    def arranged(self, activation: Tensor, rows: int, where: object = "") -> Tensor:
        """The activation as `(rows, positions, …, width)`; without positions of tokens `(rows, all other axes, width)`.

        Raises a `ValueError` if the number of rows for each example is not the number when the axes were found.
        """
        found = activation.movedim(self.width, -1)
        count = found.shape[self.example] * (rows if self.is_shared else 1)
        if count % rows or not (self.is_flat or count == rows * self.per_example):
            raise ValueError(
                f"The activation at {where!r} has shape {tuple(activation.shape)}: axis {self.example} holds {count} "
                f"rows of {rows} examples, but {self.per_example} for each example in another batch. Their number "
                "depends on the content of an example there, so they cannot be labelled: choose another target module."
            )
        found = found.expand(rows, *found.shape[1:]) if self.is_shared else found
        per_example = count // rows
        owners, entries, position = self.example, self.example + 1, self.position
        if self.is_flat or per_example > 1:
            found = found.unflatten(self.example, (rows, per_example) if self.is_major else (per_example, rows))
            owners, entries = (owners, entries) if self.is_major else (entries, owners)
            position = position + 1 if position is not None and position > self.example else position
        if self.is_flat:
            return found.movedim((owners, entries), (0, 1))
        if position is None:
            found = found.movedim(owners, 0)
            return found.flatten(1, -2) if found.dim() > 2 else found.unsqueeze(1)
        return found.movedim((owners, position), (0, 1))


@dataclass(frozen=True)
class Lengths:
    """The number of positions that the tokens of a batch take, by side: `""` and `"decoder_"`.

    If `""` is the side of samples, `frames` returns how many frames an encoder makes of a number of samples.
    """

    by_side: Mapping[str, int]
    frames: Callable[[int], int] | None = None

    @classmethod
    def in_batch(cls, batch: Mapping[str, Any], frames: Callable[[int], int] | None = None) -> Lengths:
        """Read the lengths from the masks and the token ids of a batch."""
        found = {}
        for side in SHORTER:
            names = [f"{side}attention_mask", f"{side}input_ids", *(["labels"] if side else [])]
            known = next((batch[name] for name in names if isinstance(batch.get(name), Tensor)), None)
            if known is not None and known.dim() == 2:
                found[side] = known.shape[1]
        return cls(found, frames if "" in found else None)

    def altered(self) -> Lengths:
        """Other lengths, which make the axes of positions change."""
        found = {side: n + (-1 if n >= _SHORTEST else 1) * SHORTER[side] for side, n in self.by_side.items()}
        if self.frames is not None:
            now = self.by_side[""]
            found[""] = next((n for n in range(now - 1, 0, -1) if self.frames(n) < self.frames(now)), found[""])
        return Lengths(found, self.frames)

    def side_of(self, size: int, changed: Lengths, size_changed: int) -> str | None:
        """The side whose positions an axis has, by its size at both lengths; None if it has those of no side."""
        fits = [side for side, n in self.by_side.items() if (size, size_changed) == (n, changed.by_side[side])]
        if not fits and self.frames is not None:
            both = self.frames(self.by_side[""]), self.frames(changed.by_side[""])
            return FRAMES if (size, size_changed) == both and both[0] != both[1] else None
        return fits[0] if fits else None


@dataclass(frozen=True)
class Frames:
    """The frames that a speech encoder makes of samples."""

    count: Callable[[int], int]  # The number of samples → the number of frames.
    mask_of: Callable[[Tensor], Tensor]  # A mask of samples → the mask of frames, `(batch, frames)` bool.


def frames_of(model: nn.Module) -> Frames | None:
    """The frames of a speech encoder; None for other models."""
    encoder: Any = next((m for m in model.modules() if hasattr(m, "_get_feature_vector_attention_mask")), None)
    if encoder is None:
        return None
    takes = inspect.signature(encoder._get_feature_vector_attention_mask).parameters
    # The encoder's own adapter behind the blocks makes fewer frames; these are the frames before it.
    options = {"add_adapter": False} if "add_adapter" in takes else {}

    def count(samples: int) -> int:
        return int(encoder._get_feat_extract_output_lengths(torch.tensor(samples, device="cpu"), **options))

    def mask_of(mask: Tensor) -> Tensor:
        given, frames = mask.detach().cpu().long(), count(mask.shape[1])
        found: Tensor = encoder._get_feature_vector_attention_mask(frames, given, **options)
        return found.bool()

    return Frames(count, mask_of)


def rows_of(batch: Mapping[str, Any], rows: int, chosen: Sequence[int]) -> dict[str, Any]:
    """Some of the rows of a batch, in any order."""
    found = dict(batch)
    for name, value in batch.items():
        if isinstance(value, list) and len(value) == rows:
            found[name] = [value[row] for row in chosen]
        elif isinstance(value, Tensor) and value.dim():
            if len(value) % rows:  # it cannot be told which entries belong to a row
                found[name] = torch.cat([value] * max(1, len(chosen) // rows))
            else:
                found[name] = value.unflatten(0, (rows, len(value) // rows))[list(chosen)].flatten(0, 1)
    return found


def with_lengths(batch: Mapping[str, Any], lengths: Lengths, wanted: Lengths, place: str = "second") -> dict[str, Any]:
    """The rows of a batch with fewer positions, or with some of them repeated, so that they have the lengths `wanted`.

    Positions are cut out at `place`, one of `PLACES`: some models need the first and the last token, others need the
    tokens in front, which stand for an image.
    """
    found = dict(batch)
    for name, value in batch.items():
        side = "decoder_" if name.startswith("decoder_") or (name == "labels" and "decoder_" in lengths.by_side) else ""
        is_of_tokens = isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == lengths.by_side.get(side)
        # Images and sounds are floats, and their channels or samples are not cut.
        floats = ("mask", "embeds", "_values", *([] if "input_ids" in batch else ["_features"]))
        if is_of_tokens and (not value.is_floating_point() or name.endswith(floats)):
            now, size = lengths.by_side[side], wanted.by_side[side]
            from_second = place == "second" and size < now
            kept = [0, *range(1 + now - size, now)] if from_second else [position % now for position in range(size)]
            found[name] = value[:, kept]
    return found


# ---- examples and positions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What is kept of an activation, so that the activation itself can be freed."""

    shape: tuple[int, ...]  # Its shape.
    # The differences between mirrored examples, as shares of their size: assuming that the entries of an example lie
    # side by side, and assuming that the first entries of all examples come first; None if they were not compared.
    differences: tuple[float, float] | None = None

    @classmethod
    def of(cls, activation: Tensor, single: Summary | None = None, rows: int = 0) -> Summary:
        """Keep the shape of an activation; given `single`, the summary of the rows alone, compare mirrored rows too."""
        shape = tuple(activation.shape)
        if single is None or len(single.shape) != len(shape):
            return cls(shape)
        owners = _example_axes(single.shape, shape, rows)
        if len(owners) != 1:
            return cls(shape)
        twice = activation.movedim(owners[0], 0)
        entries = len(twice) // (2 * rows)
        by_example, by_entry = twice.unflatten(0, (2 * rows, entries)), twice.unflatten(0, (entries, 2 * rows))
        pairs = (by_example[:rows], by_example[rows:].flip(0)), (by_entry[:, :rows], by_entry[:, rows:].flip(1))
        scale = float(twice.float().std().nan_to_num()) + torch.finfo(torch.float32).tiny
        first, second = (float((one - other).float().abs().mean()) / scale for one, other in pairs)
        if entries == 1 and first > _DIFFERENT:
            # Patches that are drawn at random (ViLT) have another order, but the same values within an example.
            values = twice.flatten(1).float().sort(1).values
            own, others = (float((values[:rows] - found).norm()) for found in (values[rows:].flip(0), values[rows:]))
            first = second = own / others if others else 1.0
        return cls(shape, (first, second))


def _example_axes(single: Sequence[int], twice: Sequence[int], rows: int) -> list[int]:
    """The axes that become twice as long with twice the examples."""
    pairs = zip(single, twice, strict=True)
    return [axis for axis, (a, b) in enumerate(pairs) if a and b == 2 * a and a % rows == 0]


# ---- features -------------------------------------------------------------------------------------------------------


def feature_axis(
    shapes: Sequence[Sequence[int]],
    where: object,
    module: nn.Module | None = None,
    graph_axes: Callable[[], Iterable[int]] = tuple,
) -> int:
    """The axis that holds the features of the output or input of a module.

    It is the only axis whose length is the same for any number of examples and any length of text. If there are
    several, it is the axis that follows from the kind of the module, or that `graph_axes` returns.

    Args:
        shapes: The shapes of the activation, for different numbers of examples and different lengths.
        where: The name of the module, for messages.
        module: The module, if its kind may tell the axis.
        graph_axes: Returns the axes that a graph has found; called only if it is needed.

    Raises:
        ValueError: If the number of axes varies, or several may hold the features; the message names them.
    """
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"{where!r} gives {len(shapes[0])} axes, then another number: choose another target module.")
    same = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) == 1]
    kind = axis_of_kind(module, len(shapes[0]))
    found = set(same)
    if len(same) > 1:
        found &= {kind} if kind in same and kind is not None else set(graph_axes())
    if len(found) == 1:
        return found.pop()
    may = " or ".join(f"axis {axis}, of size {shapes[0][axis]}," for axis in sorted(found) or same) or "none"
    raise ValueError(
        f"The activation at {where!r} has shape {tuple(shapes[0])}, and which axis holds its features cannot be told: "
        f"{may} may. Name a module with weights of its own, such as a norm or a linear layer inside it."
    )


# ---- passes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """The shapes of activations in small passes: visit → what was kept of its activation."""

    rows: int  # The number of examples in the first pass.
    now: Lengths  # Their lengths in the first pass.
    other: Lengths  # Their lengths in the third pass.
    first: dict[Visit, Summary]  # The first pass, over some rows.
    twice: dict[Visit, Summary]  # The second pass, over these rows and, behind them, the same in the opposite order.
    changed: dict[Visit, Summary]  # The third pass, over the first rows with other lengths.
    # The passes over the first rows with longer texts, by their length.
    longer: dict[int, dict[Visit, Summary]] = field(default_factory=dict)

    def axes_of(self, key: Visit, host: nn.Module, graph_axes: Callable[[], Iterable[int]] = tuple) -> Axes:
        """The axes of an activation of a module; `graph_axes` is as for `feature_axis`.

        Raises:
            ValueError: If some rows do not reach it, if the axis of the features cannot be told, if no axis, or more
                than one, holds the examples, or its entries do not follow the examples.
        """
        if key not in self.twice or key not in self.changed:
            raise ValueError(f"{key!r} is reached by some rows and not by others: choose another target module.")
        seen = (self.first, self.twice, self.changed, *self.longer.values())
        width = feature_axis([one[key].shape for one in seen if key in one], key, host, graph_axes)
        rows, shape, twice = self.rows, self.first[key].shape, self.twice[key]
        width = -1 if width == len(shape) - 1 else width
        owners = _example_axes(shape, twice.shape, rows)
        is_shared = not owners and len(shape) == 3 and shape[0] == twice.shape[0] == 1 and width % len(shape) > 0
        owners = [0] if is_shared else owners
        if len(owners) != 1 or owners[0] == width % len(shape):
            raise ValueError(
                f"The activation at {key!r} has shape {shape} for {rows} examples and {twice.shape} for {2 * rows}: "
                f"{'more than one axis' if len(owners) > 1 else 'no axis'} grows with the examples, so its rows cannot "
                f"be labelled. Choose another target module, or leave it out with exclude_modules=[{key.site!r}]."
            )
        others = [axis for axis in range(len(shape)) if axis != width % len(shape)]
        base, changed = ([sizes[axis] for axis in others] for sizes in (shape, self.changed[key].shape))
        example = owners[0] - (owners[0] > width % len(shape))
        if is_shared:
            side = self.now.side_of(base[1], self.other, changed[1])
            return Axes(width, 0, position=None if side is None else 1, side=side, is_shared=True)
        per_example, per_changed = base[example] // rows, changed[example] / rows
        differences = twice.differences or (0.0, 0.0)
        # The rows of an example may depend a little on the examples beside it (experts with a capacity). With one entry
        # for each example there is still no doubt about their order.
        if min(differences) > (_DIFFERENT if base[example] == rows else _ROUNDING):
            raise ValueError(
                f"The activation at {key!r} has {base[example]} rows for {rows} examples, and the rows of an example "
                "are others when other examples stand beside it, as where experts take some tokens each: they cannot "
                f"be labelled. Choose another target module, or leave it out with exclude_modules=[{key.site!r}]."
            )
        is_major = differences[0] <= differences[1]
        side = self.now.side_of(per_example, self.other, int(per_changed)) if per_changed == int(per_changed) else None
        if side is not None:
            return Axes(width, example, per_example, is_major, None, side, is_flat=True)
        for axis, (size, size_changed) in enumerate(zip(base, changed, strict=True)):
            side = self.now.side_of(size, self.other, size_changed) if axis != example else None
            if side is not None:
                return Axes(width, example, per_example, is_major, axis, side)
        return Axes(width, example, per_example, is_major)

    def sizes(self, key: Visit, axes: Axes | None, one: dict[Visit, Summary]) -> list[int]:
        """The sizes of the axes of an activation in a pass, without the axis of its features if that is known."""
        shape = list(one[key].shape) if key in one else []
        return [size for axis, size in enumerate(shape) if axes is None or axis != axes.width % len(shape)]

    def padded_sizes(self, key: Visit, axes: Axes | ValueError) -> set[int]:
        """The sizes of the axes that may hold the positions of texts that are padded to a multiple of a length."""
        known = axes if isinstance(axes, Axes) else None
        if "" not in self.now.by_side or (known is not None and known.side is not None):
            return set()
        n, other = self.now.by_side[""], self.other.by_side[""]
        both = zip(self.sizes(key, known, self.first), self.sizes(key, known, self.changed), strict=False)
        return {
            size
            for axis, (size, changed) in enumerate(both)
            if size >= n and changed >= other and size - n != changed - other
            if known is None or axis != known.example
        }

    def placed(self, key: Visit, axes: Axes, places: dict[int, list[int]], tokens: Sequence[int]) -> Axes | ValueError:
        """The axes of an activation, with its axis of positions where it has more positions than there are tokens."""
        n, other = self.now.by_side[""], self.other.by_side[""]
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
                    f"The model pads the {n} tokens of a text to {size} positions at {key!r}, and which of them hold "
                    "the tokens cannot be told: pad the batches to a multiple of that size (pad_to_multiple_of)."
                )
        return axes


# ---- tokens ----------------------------------------------------------------------------------------------------------


def with_other_tokens(batch: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], dict[str, Any], list[int]] | None:
    """One text several times, in each row another token masked from all others; and the same with that token changed.

    The activations of the two batches differ only at the place of that token, wherever a model puts its tokens.

    Returns:
        Both batches, and the positions of the tokens; None if the batch has no text with a mask.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or not ids.dim() == 2 == mask.dim():
        return None
    longest = int(mask.sum(1).argmax())
    own, real = ids[longest], mask[longest].nonzero().flatten().tolist()
    positions = sorted({real[0], real[len(real) // 2], real[-1]}) if real else []
    others = [next((int(own[r]) for r in real if own[r] != own[at]), None) for at in positions]
    if len(positions) < _TOKENS or None in others:
        return None
    hidden = rows_of(batch, rows, [longest] * len(positions))
    altered = {**hidden, "input_ids": hidden["input_ids"].clone()}
    for row, (at, other) in enumerate(zip(positions, others, strict=True)):
        hidden["attention_mask"][row, at] = 0
        altered["input_ids"][row, at] = other
    return hidden, altered, positions


def differs_at(axes: Axes, one: Tensor, other: Tensor) -> dict[int, list[int]]:
    """Axis of positions, counted as in `Axes` → for each row the only place on it where two activations differ."""
    if one.shape != other.shape or axes.per_example != 1:
        return {}
    differs = (one != other).any(axes.width).movedim(axes.example, 0)
    found = {}
    for axis in range(1, differs.dim()):
        along = differs.movedim(axis, 1).flatten(2).any(-1) if differs.dim() > 2 else differs
        if bool((along.sum(1) == 1).all()):
            found[axis if axis > axes.example else axis - 1] = along.int().argmax(1).tolist()
    return found
