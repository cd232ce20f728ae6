"""Functions of other libraries, wrapped by several parts of this one, each of them once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

# On a function that is wrapped: mark → wrapper, the innermost first.
_WRAPPERS = "_hf_erasure_wrappers"


def wrap(owner: Any, name: str, wrapper: Callable[..., Any], mark: str) -> None:
    """Let calls of `owner.name` go to `wrapper(original, *args, **kwargs)`.

    Of a method or class method `original` is bound already, and the instance or the class comes first among the
    arguments. Wrapped again under the same mark, as after a reload, the wrapper of now takes the place of the former,
    and those of other marks stay where they are. `inspect.signature(original)` is that of the wrapped function.

    Args:
        owner: A class or a module.
        name: Of a method or a function in it.
        wrapper: Called in its place.
        mark: Whose wrapper it is; that of a new mark is called before those that are there.
    """
    present = owner.__dict__[name]
    is_classmethod = isinstance(present, classmethod)
    function = present.__func__ if is_classmethod else present
    wrappers: dict[str, Callable[..., Any]] | None = getattr(function, _WRAPPERS, None)
    if wrappers is not None:
        wrappers[mark] = wrapper
        return
    seam = _seam(function, {mark: wrapper}, is_method=isinstance(owner, type))
    setattr(owner, name, classmethod(seam) if is_classmethod else seam)


def is_wrapped(function: Any, mark: str) -> bool:
    """Whether a function is wrapped under a mark."""
    return mark in getattr(function, _WRAPPERS, {})


def _seam(function: Any, wrappers: dict[str, Callable[..., Any]], *, is_method: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def seam(*args: Any, **kwargs: Any) -> Any:
        bound = args[:1] if is_method else ()
        called: Any = functools.partial(function, *bound)
        for wrapper in wrappers.values():
            within, called = called, functools.partial(wrapper, called, *bound)
            called.__wrapped__ = within  # whose signature it has
        return called(*args[len(bound) :], **kwargs)

    setattr(seam, _WRAPPERS, wrappers)
    return seam
