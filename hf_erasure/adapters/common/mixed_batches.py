"""Batches whose rows have different adapters: `model(…, adapter_names=[…])` on a `PeftModel`.

PEFT leaves this to each method. An erasure acts on activations, of which every row has its own, so it is a matter of
taking each row through its own eraser. A GRADIEND adapter changes weights, which all rows share, and refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layer import AdapterChild, adapter_children

# What PEFT calls a row without an adapter.
NO_ADAPTER = "__base__"


@dataclass(frozen=True)
class Rows:
    """Which adapter each row of a batch has.

    Attributes:
        names: One for each row that the user gave.
        beams: In how many copies, one after the other, `generate` may pass a row on.
    """

    names: tuple[str, ...]
    beams: int = 1

    @property
    def adapters(self) -> list[str]:
        """The adapters that any row has, in order."""
        return [name for name in dict.fromkeys(self.names) if name != NO_ADAPTER]

    def of(self, name: str, hidden: Tensor, path: str) -> Tensor:
        """The positions of an adapter's rows in an activation  # (rows of that adapter,)

        Raises:
            ValueError: If the activation has not one row for each name.
        """
        count = len(self.names)
        if hidden.shape[0] not in (count, count * self.beams):
            raise ValueError(
                f"adapter_names has {count} names, but the activation of {path!r} has {hidden.shape[0]} rows: give one "
                "name for each row of the batch. Where a module sees rows of another kind, run the rows of each "
                "adapter as a batch of their own, with set_adapter(name)."
            )
        copies = hidden.shape[0] // count
        chosen = [i * copies + copy for i, own in enumerate(self.names) if own == name for copy in range(copies)]
        return torch.tensor(chosen, device=hidden.device)


def check_names(children: Sequence[AdapterChild], names: Any) -> None:
    """Refuse names for rows that mean nothing here.

    Raises:
        ValueError: Names the adapters in question.
    """
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapter_names={names!r} is no list of names: give one for each row of the batch.")
    known = {name for child in children for name in child.adapters}
    unknown = sorted({*names} - known - {NO_ADAPTER})
    if unknown:
        raise ValueError(
            f"adapter_names has {unknown}, but the adapters here are {sorted(known)}; a row without an adapter is "
            f"{NO_ADAPTER!r}."
        )
    merged = sorted({name for child in children for name in child.merged_adapters})
    if merged:
        raise ValueError(f"adapter_names cannot be followed while {merged} are merged: call unmerge_adapter() first.")


@contextmanager
def rows_have_adapters(children: Sequence[AdapterChild], rows: Rows) -> Iterator[None]:
    """Take each row through the eraser of its own adapter for a while."""
    for child in children:
        child.rows = rows
    try:
        yield
    finally:
        for child in children:
            child.rows = None


def keep_from_ignoring(model: Any) -> None:
    """Let a model with adapters refuse `adapter_names`, which most models of transformers take and do not read.

    A `PeftModel` reads it and does not hand it on. Without adapters, the model is as it was.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    present = [key for key, hook in base._forward_pre_hooks.items() if hook is _refuse_names]
    if adapter_children(base):
        if not present:
            base.register_forward_pre_hook(_refuse_names, with_kwargs=True)
        return
    for key in present:
        del base._forward_pre_hooks[key]
        base._forward_pre_hooks_with_kwargs.pop(key, None)


def _refuse_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            f"adapter_names={kwargs['adapter_names']!r}: {type(model).__name__} would ignore it, and run all rows with "
            "the active adapters. PeftModel.from_pretrained(model, folder) makes a model that follows it; or run the "
            "rows of each adapter as a batch of their own, with set_adapter(name)."
        )
