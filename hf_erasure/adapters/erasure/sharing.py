"""What an eraser made of a tensor that several modules take, so that it runs once for all of them.

The linear maps that read a hidden state (q, k, v; gate, up) are given the same tensor, or views of it, and have one
eraser. What it made is kept as long as the tensor is there and a module of the group has not come for it yet. It is not
kept where a change of the tensor would not show (in inference mode), nor where gradients are recorded: what was made
would hold the tensor, and neither would ever go; and parts of a pass that run again for their gradients must do what
they did before. Code that is being compiled does without: the compiler sees that the same is computed twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class MadeOnce:
    """The results of one eraser. A copy of the model begins without any."""

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
        """What an eraser makes of a tensor, or has made of it when another of so many modules took it.

        Another result is due where it is made `by` other tensors or for other rows. Where a site is being fitted, an
        observer must see a tensor once, also in inference mode.
        """
        if modules < 2 or not _can_be_kept(hidden, is_fitted):
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


def _can_be_kept(hidden: Tensor, is_fitted: bool) -> bool:
    if type(hidden) is not Tensor:
        return False
    if hidden.is_inference():
        return is_fitted
    return not (hidden.requires_grad and torch.is_grad_enabled())
