"""The files of an adapter: their names, writing them whole or not at all, and whether what they hold is of its type."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# What PEFT puts before the names of a model's modules in its files.
PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CARD = "README.md"
COMMIT = ".hf-erasure-commit"
STAGING = ".hf-erasure-saving-"
# Why the files of the adapter that is being loaded could not be looked at; the adapter is refused then.
UNSEEN: ContextVar[str | None] = ContextVar("unseen", default=None)


def target_of(folder: str | Path) -> Path:
    """Where a staged folder, or something in it, will lie; the folder itself where it is not staged."""
    parts, at = Path(folder).parts, _staged_at(folder)
    return Path(folder) if at is None else Path(*parts[:at], *parts[at + 2 :])


def root_of(folder: str | Path) -> Path:
    """The staged form of the folder that is saved to, of which an adapter's staged folder may be a part."""
    at = _staged_at(folder)
    return Path(folder) if at is None else Path(*Path(folder).parts[: at + 2])


def _staged_at(folder: str | Path) -> int | None:
    return next((at for at, part in enumerate(Path(folder).parts) if part.startswith(STAGING)), None)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors, and facts that JSON knows, into one safetensors file."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_whole(path, lambda temporary: save_file(plain, temporary, metadata={"facts": json.dumps(facts)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118


def write_whole(path: Path, write: Callable[[str], Any]) -> None:
    """Write beside the file and rename, so that a kill leaves the old one or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    # Nobody else may read a temporary file; one that `write` makes anew has the rights that files have here.
    os.unlink(temporary)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8.") from error


def write_text(path: Path, text: str) -> None:
    """The same with text, whose line ends stay as they are."""
    write_whole(path, lambda temporary: Path(temporary).write_bytes(text.encode("utf-8")))


# ---- values that any file may hold -----------------------------------------------------------------------------------


def check_types(config: Any) -> None:
    """Compare the values of a configuration's fields with the types that it declares.

    A text where a list of texts is declared passes: what is wrong with it, the configuration can say better.

    Raises:
        TypeError: Names the field, its value and the type.
    """
    kind: Any = type(config)
    declared = hints(kind)
    for entry in fields(config):
        value, hint = getattr(config, entry.name), declared[entry.name]
        if not fits(value, hint):
            raise TypeError(f"{entry.name}={short(value)} of a {type(config).__name__} must be {in_words(hint)}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that could come from JSON is of a declared type; a list, tuple or set of a list's,
    and a list or tuple of its length of a tuple's.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is list:
        if isinstance(value, str):
            return parts == (str,)
        return isinstance(value, (list, tuple, set, frozenset, range)) and all(fits(item, parts[0]) for item in value)
    if origin is tuple:
        is_list = isinstance(value, (list, tuple)) and len(value) == len(parts)
        return is_list and all(map(fits, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if hint is Any or not isinstance(hint, type):
        return True
    if hint in (int, float):  # True is not a number here
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, str) if issubclass(hint, str) else isinstance(value, hint)


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def in_words(hint: Any) -> str:
    """A declared type as a message shows it."""
    text = str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))
    return re.sub(r"\b(typing|peft\.utils\.peft_types)\.|<enum '|<class '|'>", "", text)


@functools.cache
def hints(kind: Any) -> dict[str, Any]:
    """The declared types of a dataclass's fields."""
    return typing.get_type_hints(kind)
