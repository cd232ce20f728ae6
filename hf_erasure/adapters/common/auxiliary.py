"""Modules that are trained with an adapter: `modules_to_save`, and embeddings with `trainable_token_indices`.

PEFT wraps such a module. The wrapper holds a copy for each adapter, of which one acts, or else the module of the base
model. PEFT switches the layers of one method at a time, but the wrappers of all methods: whichever adapter comes last,
every wrapper without a copy for it goes back to the module of the base model, and an untrained head answers.
transformers fails there instead. With an adapter of this package, a wrapper keeps the copy that acts in it when an
adapter of another method comes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .layer import adapter_children


def auxiliary_wrappers(model: nn.Module) -> dict[str, AuxiliaryTrainingWrapper]:
    """The wrappers of a model, by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}


def active_copies(model: nn.Module) -> dict[str, str]:
    """Name of a wrapper → the adapter whose copy acts there; without those where the base model's module does."""
    found = {}
    for name, wrapper in auxiliary_wrappers(model).items():
        active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper._adapters]
        if active and not wrapper.disable_adapters:
            found[name] = active[0]
    return found


@dataclass
class _Kept:
    wrapper: AuxiliaryTrainingWrapper
    active: dict[Any, Any]
    trained: list[tuple[nn.Parameter, bool]]


class ActiveCopies:
    """Which copies act in the wrappers of a model, to be put back.

    Args:
        model: The model.

    Attributes:
        on: As `active_copies` gives them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.on = active_copies(model)
        self._kept = {}
        for name, wrapper in auxiliary_wrappers(model).items():
            parts: list[Any] = [
                wrapper,
                *(part for part in [wrapper._modules.get("token_adapter")] if part is not None),
            ]
            trained = [(parameter, parameter.requires_grad) for parameter in wrapper.parameters()]
            self._kept[name] = _Kept(wrapper, {part: part._active_adapter for part in parts}, trained)

    def restore(
        self, *, trained: bool = True, where: Callable[[str, AuxiliaryTrainingWrapper], bool] | None = None
    ) -> None:
        """Let the copies act again that did.

        Args:
            trained: Also put back which of their parameters are trained.
            where: Of the adapter whose copy acted ("" for none) and the wrapper: whether to; everywhere when None.
        """
        for name, kept in self._kept.items():
            if where is not None and not where(self.on.get(name, ""), kept.wrapper):
                continue
            for part, active in kept.active.items():
                part._active_adapter = active
            for parameter, required in kept.trained if trained else ():
                parameter.requires_grad_(required)

    def hand_on(self, newcomer: str, but: Collection[str]) -> None:
        """Let the copies of a newcomer start from those that acted; PEFT takes them from the base model, untrained.

        Args:
            newcomer: An adapter.
            but: Not from the copies of these, of the same method: they go off with all that is theirs.
        """
        for name, acted in self.on.items():
            copies: Any = self._kept[name].wrapper._modules.get("modules_to_save")
            if copies is not None and newcomer in copies and acted not in but:
                copies[newcomer].load_state_dict(copies[acted].state_dict())


def check_one_copy(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to switch on adapters that have copies of one module.

    Raises:
        ValueError: Names the module and the adapters.
    """
    names = list(dict.fromkeys(names))
    for place, wrapper in auxiliary_wrappers(model).items():
        rivals = [name for name in names if name in wrapper._adapters]
        if len(rivals) > 1:
            left = [name for name in names if name not in rivals[1:]]
            raise ValueError(
                f"{rivals} cannot all be active: each has a trained copy of {place!r}, and one module can act. Switch "
                f"on one of them, as in set_adapter({left}), or add the others without that module in their "
                "modules_to_save."
            )


def set_copies(model: nn.Module, names: Iterable[str]) -> None:
    """Let each wrapper have the adapter of `names` that it has a copy of, or none."""
    for wrapper in auxiliary_wrappers(model).values():
        wrapper.set_adapter([name for name in names if name in wrapper._adapters])


def enable_copies(model: nn.Module) -> None:
    """Let the wrappers take part again, which `enable_adapters` of transformers forgets."""
    for wrapper in auxiliary_wrappers(model).values():
        wrapper.enable_adapters(True)


@contextmanager
def copies_of_others_kept(model: nn.Module) -> Iterator[None]:
    """While an adapter is deleted from a model that has one of ours, let the copies of those that stay act on."""
    copies, concerned = ActiveCopies(model), bool(adapter_children(model))
    yield
    if concerned:
        copies.restore(where=lambda on, wrapper: on in wrapper._adapters)


@contextmanager
def set_by_hand(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """While transformers switches adapters on, let each wrapper have the one of `names` that it has a copy of, or none.

    It would tell every wrapper all of the names, and fail at those that a wrapper does not know.
    """
    wrappers = list(auxiliary_wrappers(model).values())
    for wrapper in wrappers:
        wrapper.__dict__["set_adapter"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.__dict__["set_adapter"]
    set_copies(model, names)


@contextmanager
def keys_of_own_copies(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """While PEFT loads an adapter, let only the wrappers that it has a copy in look for keys in its file.

    A wrapper of trained tokens would look for those of any adapter, and fail.
    """
    others = [wrapper for wrapper in auxiliary_wrappers(model).values() if adapter_name not in wrapper._adapters]
    for wrapper in others:
        wrapper.__dict__["adapter_state_dict_load_map"] = lambda name: {}
    try:
        yield
    finally:
        for wrapper in others:
            del wrapper.__dict__["adapter_state_dict_load_map"]
