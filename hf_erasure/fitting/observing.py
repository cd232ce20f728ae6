"""Look at the sites of an adapter while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_erasure.adapters import ErasureLayer

from .running import last_hidden_state

SiteObserver = Callable[[str, Tensor], Tensor]


@contextmanager
def observed(layers: dict[str, ErasureLayer], adapter_name: str, observer: SiteObserver) -> Iterator[None]:
    """While open, `observer(site, activation)` stands in for the adapter's eraser at every site.

    It sees the activation after all erasers that act before this one, and what it returns goes on.
    """

    def at(path: str) -> Callable[[Tensor], Tensor]:
        return lambda hidden: observer(path, hidden)

    try:
        for path, layer in layers.items():
            layer.observers[adapter_name] = at(path)
        yield
    finally:
        for layer in layers.values():
            layer.observers.pop(adapter_name, None)


@contextmanager
def observed_final(finals: dict[str, nn.Module], observer: SiteObserver) -> Iterator[None]:
    """While open, `observer(name, state)` sees every last hidden state; what it returns is not used."""

    def at(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            observer(name, last_hidden_state(output))

        return hook

    handles = [module.register_forward_hook(at(name)) for name, module in finals.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
