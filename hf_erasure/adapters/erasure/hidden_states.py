"""Find the hidden state among what a module takes or returns, and put another in its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# The names under which transformers passes a hidden state by keyword, most common first.
_INPUT_NAMES = ("hidden_states", "hidden_state", "x", "input", "inputs_embeds", "query")


def hidden_of_output(output: Any, where: str) -> Tensor:
    """The hidden state a module returned: the tensor itself, the first of a tuple, or `last_hidden_state`.

    Raises:
        TypeError: If there is no floating-point tensor at that place; `where` names the module.
    """
    found = output
    if isinstance(output, dict):
        found = output.get("last_hidden_state", next(iter(output.values()), None))
    elif isinstance(output, (tuple, list)):
        found = output[0] if output else None
    return _floating(found, where, "returns")


def replace_hidden_of_output(output: Any, hidden: Tensor) -> Any:
    """A copy of `output` with `hidden` in the place `hidden_of_output` reads."""
    if isinstance(output, dict):
        key = "last_hidden_state" if "last_hidden_state" in output else next(iter(output))
        return type(output)(**{**output, key: hidden})
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: hidden})  # type: ignore[attr-defined]
    if isinstance(output, (tuple, list)):
        return type(output)((hidden, *output[1:]))
    return hidden


def hidden_of_input(args: tuple, kwargs: dict[str, Any], where: str) -> Tensor:
    """The hidden state a module was called with: its first argument, or a keyword of a known name.

    Raises:
        TypeError: If there is no floating-point tensor at that place; `where` names the module.
    """
    found = args[0] if args else kwargs.get(_keyword(kwargs) or "")
    return _floating(found, where, "takes")


def replace_hidden_of_input(args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The same call with `hidden` in the place `hidden_of_input` reads."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, str(_keyword(kwargs)): hidden}


def _keyword(kwargs: dict[str, Any]) -> str | None:
    return next((name for name in _INPUT_NAMES if isinstance(kwargs.get(name), Tensor)), None)


def _floating(found: Any, where: str, verb: str) -> Tensor:
    if isinstance(found, Tensor) and found.is_floating_point():
        return found
    kind = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise TypeError(
        f"{where} {verb} {kind} where a hidden state of floating-point numbers was expected, so no concept can be "
        "erased there. Leave it out of target_modules, or choose the other site ('output' or 'input')."
    )
