"""The files of an adapter: their names, and functions that read a file, or write it completely or not at all."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# The prefix of the names of modules in PEFT's files.
PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CARD = "README.md"
COMMIT = ".hf-erasure-commit"
STAGING = ".hf-erasure-saving-"
# True while PEFT or transformers load files that were not checked here; an adapter of this package is refused then.
UNCHECKED: ContextVar[bool] = ContextVar("unchecked", default=False)


def target_of(folder: str | Path) -> Path:
    """The final path of a staged folder, or of a path in one; the path itself where it is not staged."""
    parts = Path(folder).parts
    at = next((at for at, part in enumerate(parts) if part.startswith(STAGING)), None)
    return Path(folder) if at is None else Path(*parts[:at], *parts[at + 2 :])


def root_of(folder: str | Path) -> Path:
    """The staged form of the folder that the user saves to, which may contain an adapter's staged folder."""
    places = (*reversed(Path(folder).parents), Path(folder))
    return next((place for place in places if place.parent.name.startswith(STAGING)), Path(folder))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors, and facts that are JSON values, into one safetensors file."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_whole(path, lambda temporary: save_file(plain, temporary, metadata={"facts": json.dumps(facts)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and facts that `write_tensors` wrote."""
    with torch.device("cpu"), safe_open(path, framework="pt") as file:  # older releases read onto the default device
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118


def write_whole(path: Path, write: Callable[[str], Any]) -> None:
    """Write a temporary file and rename it, so that a killed process leaves the old file or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    # Only its owner may read a temporary file; the file that `write` creates has the usual permissions.
    os.unlink(temporary)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8.") from error


class YamlLoader(yaml.SafeLoader):
    """Reads numbers such as 1e-4 as numbers, which YAML 1.1 reads as text, and refuses a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raise a `ConstructorError` for a second key of the same name, which would replace the first one."""
        seen = set[str]()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is written twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class YamlDumper(yaml.SafeDumper):
    """Writes text that `YamlLoader` would read as a number in quotes."""


for _own in (YamlLoader, YamlDumper):
    _own.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_yaml(text: str, subject: str) -> Any:
    """The value of a text in YAML. Raises `ValueError`, which begins with `subject`, if it cannot be read."""
    try:
        return yaml.load(text, YamlLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{subject} not YAML: {' '.join(str(error).split())}") from error


def read_table(path: Path) -> Any:
    """What a file in YAML or JSON holds. Raises `ValueError` if it cannot be read, or has a key twice."""
    if path.suffix != ".json":
        return parse_yaml(read_text(path), f"{path} is")
    try:
        return json.loads(read_text(path), object_pairs_hook=_with_keys_once)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def _with_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is written twice")
    return dict(pairs)


def write_text(path: Path, text: str) -> None:
    """Write a text as `write_whole` does; its line ends stay as they are."""
    write_whole(path, lambda temporary: Path(temporary).write_bytes(text.encode("utf-8")))
