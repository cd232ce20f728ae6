"""Keep the state of adapters out of what `DistributedDataParallel` does to buffers.

It broadcasts every buffer of rank 0 at every forward. Erasers are the same everywhere, and large; and an adapter that
one process alone has changed is its own affair.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from .child import AdapterChild, adapter_children

# Where DDP looks when it wraps a module, for names relative to that module.
_IGNORED = "_ddp_params_and_buffers_to_ignore"
# DDP may wrap a `PeftModel`, which hands on the attribute of the model inside, whose names have this in front there.
_INSIDE = "base_model.model."


class AdapterBuffers(Collection[str]):
    """The names of the buffers of all adapters of a model at present, and what was there before.

    Names are looked up anew each time: fitting, loading and deleting change them.

    Args:
        model: The base model.
        others: Names that someone else wants ignored.
    """

    def __init__(self, model: nn.Module, others: Collection[str]) -> None:
        self._model = (model,)
        self.others = others

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        for path, module in self._model[0].named_modules():
            if isinstance(module, AdapterChild):
                for name, _ in module.named_buffers(prefix=path):
                    yield name
                    yield _INSIDE + name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)


def keep_from_broadcast(model: Any) -> None:
    """Tell DDP of a model's adapters; without any, the model is as it was."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    present = base.__dict__.get(_IGNORED)
    if adapter_children(base):
        if not isinstance(present, AdapterBuffers):
            setattr(base, _IGNORED, AdapterBuffers(base, present or ()))
    elif isinstance(present, AdapterBuffers):
        delattr(base, _IGNORED)
        if present.others:
            setattr(base, _IGNORED, present.others)
