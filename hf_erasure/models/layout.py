"""What the axes of an activation are: examples, positions of tokens, features; found out, and never assumed.

Most modules return (batch, position, width). Others return (position, batch, width) (XLNet), channels first
(convolutions), windows of several images in one axis (Swin), all tokens in one list (experts), fewer positions than
there are tokens (Funnel), or more (a prompt in front). Three small forward passes tell them apart: over some rows,
over the same rows twice, and over the rows with other lengths. An axis that doubles with the rows holds examples; one
that is as long as a mask, and changes with it, holds the positions of its tokens. Which axis holds the features, the
weights of the module tell: see `feature_axis`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# An axis of tokens is told by its length, which is made shorter by so many positions on the side of that name.
SHORTER = {"": 1, "decoder_": 2}
# The side of frames, of which a speech encoder makes one from many samples.
FRAMES = "frames"
# Where positions may be cut out of texts.
PLACES = ("second", "last")
# So many tokens of a text show where its tokens are: the first, the last, and one between them.
_TOKENS = 3
# Shorter texts than this are made longer instead.
_SHORTEST = 4
# Rows of one example that are computed beside other examples differ by rounding alone; an example that is taken for
# another differs by about its own size.
_ROUNDING, _APART = 1e-2, 0.5


@dataclass(frozen=True)
class Axes:
    """What the axes of an activation are.

    Attributes:
        width: The axis of the features; the others are counted without it.
        example: The axis of the examples.
        per_example: How many entries of that axis belong to one example: more than 1 for windows, and for tokens that
            lie in one list.
        is_major: Whether these lie side by side; otherwise the first entries of all examples come first.
        position: The axis of the positions of tokens; None where there is none, or where they lie in one list with the
            examples (`is_flat`).
        side: Whose mask tells which of the positions are padding: `""`, `"decoder_"` or `FRAMES`; None where the rows
            of an example are not the positions of its tokens.
        is_flat: Whether the entries of an example along its axis are its positions.
        is_shared: Whether there is one entry for all examples, which have the same, as of learned positions.
        start: The position of the first token.
        beside: Whether positions that are those of no token hold content, such as a prompt or an image, or are padding;
            None where there are none.
    """

    width: int
    example: int
    per_example: int = 1
    is_major: bool = True
    position: int | None = None
    side: str | None = None
    is_flat: bool = False
    is_shared: bool = False
    start: int = 0
    beside: bool | None = None

    def arranged(self, activation: Tensor, rows: int) -> Tensor:
        """The activation as `(rows, positions, …, width)`; without positions of tokens all else that there is."""
        found = activation.movedim(self.width, -1)
        found = found.expand(rows, *found.shape[1:]) if self.is_shared else found
        per_example = found.shape[self.example] // rows
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

    def check(self, shape: Sequence[int], rows: int, where: str) -> None:
        """Raise a `ValueError` where an activation does not hold as many rows of an example as when this was found."""
        sizes = [size for axis, size in enumerate(shape) if axis != self.width % len(shape)]
        entries = sizes[self.example] * (rows if self.is_shared else 1)
        if entries % rows == 0 and (self.is_flat or entries == rows * self.per_example):
            return
        raise ValueError(
            f"The activation at {where!r} has shape {tuple(shape)}: axis {self.example} holds {entries} rows of {rows} "
            f"examples, and held {self.per_example} of each in another batch. How many rows an example has depends on "
            "its content there, so they cannot be labelled: choose another target module."
        )


@dataclass(frozen=True)
class Lengths:
    """How many positions the tokens of a batch take, by side: `""`, and `"decoder_"`.

    `frames` tells how many frames an encoder makes of so many samples, where `""` is that of samples.
    """

    of: Mapping[str, int]
    frames: Callable[[int], int] | None = None

    @classmethod
    def in_batch(cls, batch: Mapping[str, Any], frames: Callable[[int], int] | None = None) -> Lengths:
        """As the masks and the token ids of a batch say."""
        found = {}
        for side in SHORTER:
            names = [f"{side}attention_mask", f"{side}input_ids", *(["labels"] if side else [])]
            known = next((batch[name] for name in names if isinstance(batch.get(name), Tensor)), None)
            if known is not None and known.dim() == 2:
                found[side] = known.shape[1]
        return cls(found, frames if "" in found else None)

    def changed(self) -> Lengths:
        """Others, by which the axes of positions are told."""
        found = {side: n + (-1 if n >= _SHORTEST else 1) * SHORTER[side] for side, n in self.of.items()}
        if self.frames is not None:
            now = self.of[""]
            found[""] = next((n for n in range(now - 1, 0, -1) if self.frames(n) < self.frames(now)), found[""])
        return Lengths(found, self.frames)

    def made(self, size: int) -> Lengths:
        """Others, of which that of texts is `size`."""
        return Lengths(dict(self.of) | {"": size}, self.frames)

    def side_of(self, size: int, changed: Lengths, size_changed: int) -> str | None:
        """The side whose positions an axis has, by its size at both lengths; None where it has those of neither."""
        fits = [side for side, n in self.of.items() if (size, size_changed) == (n, changed.of[side])]
        if not fits and self.frames is not None:
            both = self.frames(self.of[""]), self.frames(changed.of[""])
            return FRAMES if (size, size_changed) == both and both[0] != both[1] else None
        return fits[0] if fits else None


@dataclass(frozen=True)
class Frames:
    """What a speech encoder makes of samples.

    Attributes:
        count: How many frames of so many samples.
        mask_of: `(batch, frames)` bool, from a mask of samples.
    """

    count: Callable[[int], int]
    mask_of: Callable[[Tensor], Tensor]


def frames_of(model: nn.Module) -> Frames | None:
    """The frames of a speech encoder; None of other models."""
    encoder: Any = next((m for m in model.modules() if hasattr(m, "_get_feature_vector_attention_mask")), None)
    if encoder is None:
        return None
    takes = inspect.signature(encoder._get_feature_vector_attention_mask).parameters
    # Those that are made shorter once more behind the blocks are told apart from these by their number.
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
            if len(value) % rows:  # what belongs to a row cannot be told
                found[name] = torch.cat([value] * max(1, len(chosen) // rows))
            else:
                found[name] = value.unflatten(0, (rows, len(value) // rows))[list(chosen)].flatten(0, 1)
    return found


def mirrored(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The rows of a batch, and the same in the opposite order behind them."""
    return rows_of(batch, rows, [*range(rows), *reversed(range(rows))])


def of_other_lengths(batch: Mapping[str, Any], now: Lengths, wanted: Lengths, place: str = "second") -> dict[str, Any]:
    """The rows of a batch with fewer positions, or with some of them repeated.

    Args:
        batch: Inputs of the model.
        now: Their lengths.
        wanted: The other lengths.
        place: Where positions are cut out, one of `PLACES`: some models need the first and the last token, others the
            tokens in front that stand for an image.
    """
    found = dict(batch)
    for name, value in batch.items():
        side = "decoder_" if name.startswith("decoder_") or (name == "labels" and "decoder_" in now.of) else ""
        is_of_tokens = isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == now.of.get(side)
        # Images and sounds are floats, and have as many channels or samples as they have.
        floats = ("mask", "embeds", "_values", *([] if "input_ids" in batch else ["_features"]))
        if is_of_tokens and (not value.is_floating_point() or name.endswith(floats)):
            missing = wanted.of[side] - now.of[side]
            kept = value[:, :1] if place == "second" else value[:, :0]
            rest = value[:, 1 - missing :] if place == "second" else value[:, :missing]
            longer = torch.cat([value] * (1 + -(-missing // value.shape[1])), 1)[:, : wanted.of[side]]
            found[name] = longer if missing > 0 else torch.cat([kept, rest], 1)
    return found


# ---- examples and positions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Glimpse:
    """What is kept of an activation, so that it can be let go.

    Attributes:
        shape: Its sizes.
        apart: How far the rows of mirrored examples are from lying side by side, and from coming by their entries, as
            shares of their size; None where they were not looked at.
    """

    shape: tuple[int, ...]
    apart: tuple[float, float] | None = None

    @classmethod
    def of(cls, activation: Tensor, single: Glimpse | None = None, rows: int = 0) -> Glimpse:
        """Of an activation; of mirrored rows, where the one of the rows alone is given."""
        shape = tuple(activation.shape)
        if single is None or len(single.shape) != len(shape):
            return cls(shape)
        owners = _owners(single.shape, shape, rows)
        if len(owners) != 1:
            return cls(shape)
        twice = activation.movedim(owners[0], 0)
        entries = len(twice) // (2 * rows)
        by_example, by_entry = twice.unflatten(0, (2 * rows, entries)), twice.unflatten(0, (entries, 2 * rows))
        pairs = (by_example[:rows], by_example[rows:].flip(0)), (by_entry[:, :rows], by_entry[:, rows:].flip(1))
        scale = float(twice.float().std().nan_to_num()) + torch.finfo(torch.float32).tiny
        first, second = (float((one - other).float().abs().mean()) / scale for one, other in pairs)
        if entries == 1 and first > _APART:
            # Patches that are drawn at random (ViLT) leave the values of an example those of that example.
            values = twice.flatten(1).float().sort(1).values
            own, others = (float((values[:rows] - found).norm()) for found in (values[rows:].flip(0), values[rows:]))
            first = second = own / others if others else 1.0
        return cls(shape, (first, second))


def _owners(single: Sequence[int], twice: Sequence[int], rows: int) -> list[int]:
    """The axes that double with the examples."""
    pairs = zip(single, twice, strict=True)
    return [axis for axis, (a, b) in enumerate(pairs) if a and b == 2 * a and a % rows == 0]


def axes_of(width: int, passes: Sequence[Glimpse], rows: int, now: Lengths, other: Lengths, where: str) -> Axes:
    """What the axes of an activation are.

    Args:
        width: The axis of its features.
        passes: What was kept of the activation of some rows, of these and of the same in the opposite order behind
            them, and of these with other lengths.
        rows: Their number.
        now: The lengths of the rows.
        other: The other lengths.
        where: The module, for messages.

    Raises:
        ValueError: If no axis, or more than one, holds the examples, or its entries do not follow the examples.
    """
    shape = passes[0].shape
    owners = _owners(shape, passes[1].shape, rows)
    is_shared = not owners and len(shape) == 3 and shape[0] == passes[1].shape[0] == 1 and width % len(shape) > 0
    owners = [0] if is_shared else owners
    if len(owners) != 1 or owners[0] == width % len(shape):
        raise ValueError(
            f"The activation at {where!r} has shape {shape} for {rows} examples and {passes[1].shape} for {2 * rows}: "
            f"{'more than one axis' if len(owners) > 1 else 'no axis'} grows with the examples, so its rows cannot be "
            f"labelled. Choose another target module, or leave it out with exclude_modules=[{where!r}]."
        )
    others = [axis for axis in range(len(shape)) if axis != width % len(shape)]
    base, changed = ([glimpse.shape[axis] for axis in others] for glimpse in (passes[0], passes[2]))
    example = owners[0] - (owners[0] > width % len(shape))
    if is_shared:
        side = now.side_of(base[1], other, changed[1])
        return Axes(width, 0, position=None if side is None else 1, side=side, is_shared=True)
    per_example, per_changed = base[example] // rows, changed[example] / rows
    apart = passes[1].apart or (0.0, 0.0)
    # What an example gives may depend a little on those beside it (experts with a capacity), which one entry for each
    # example can bear.
    if min(apart) > (_APART if base[example] == rows else _ROUNDING):
        raise ValueError(
            f"The activation at {where!r} has {base[example]} rows for {rows} examples, and the rows of an example are "
            "others when other examples stand beside it, as where experts take some tokens each: its rows cannot be "
            f"labelled. Choose another target module, or leave it out with exclude_modules=[{where!r}]."
        )
    is_major = apart[0] <= apart[1]
    side = now.side_of(per_example, other, int(per_changed)) if per_changed == int(per_changed) else None
    if side is not None:
        return Axes(width, example, per_example, is_major, None, side, is_flat=True)
    for axis, (size, size_changed) in enumerate(zip(base, changed, strict=True)):
        side = now.side_of(size, other, size_changed) if axis != example else None
        if side is not None:
            return Axes(width, example, per_example, is_major, axis, side)
    return Axes(width, example, per_example, is_major)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def with_other_tokens(batch: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], dict[str, Any], list[int]] | None:
    """One text several times, each with another of its tokens hidden from all others; and the same with this altered.

    What differs between the two is at the place of that token alone, wherever a model puts its tokens.

    Returns:
        Both, and the positions of the tokens; None where the batch has no text with a mask.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or not ids.dim() == 2 == mask.dim():
        return None
    longest = int(mask.sum(1).argmax())
    real = mask[longest].nonzero().flatten().tolist()
    positions = sorted({real[0], real[len(real) // 2], real[-1]}) if real else []
    others = [
        next((int(ids[longest, r]) for r in real if ids[longest, r] != ids[longest, at]), None) for at in positions
    ]
    if len(positions) < _TOKENS or None in others:
        return None
    hidden = rows_of(batch, rows, [longest] * len(positions))
    altered = {**hidden, "input_ids": hidden["input_ids"].clone()}
    for row, (at, other) in enumerate(zip(positions, others, strict=True)):
        hidden["attention_mask"][row, at] = 0
        altered["input_ids"][row, at] = other
    return hidden, altered, positions


def places_of(axes: Axes, one: Tensor, other: Tensor) -> dict[int, list[int]]:
    """Axis of positions, as `Axes` counts → the single place there, by row, where two activations differ."""
    if one.shape != other.shape or axes.per_example != 1:
        return {}
    differs = (one != other).any(axes.width).movedim(axes.example, 0)
    found = {}
    for axis in range(1, differs.dim()):
        along = differs.movedim(axis, 1).flatten(2).any(-1) if differs.dim() > 2 else differs
        if bool((along.sum(1) == 1).all()):
            found[axis if axis > axes.example else axis - 1] = along.int().argmax(1).tolist()
    return found
