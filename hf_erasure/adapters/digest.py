"""A digest by which copies of an adapter are known: of the values of its tensors and of how it is steered."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# What decides on the effect of an adapter beside its tensors.
_SETTINGS = (
    "peft_type",
    "site",
    "feature_factor",
    "learning_rate",
    "pair",
    "lora_alpha",
    "alpha_pattern",
    "use_rslora",
)


def digest_of(folder: str | Path, config: Any) -> str | None:
    """Identify what an adapter does.

    The digest is the same for every copy, whether it was saved from a bare encoder or from a model with a head.

    Args:
        folder: The adapter's, or its name on the Hub.
        config: Its configuration.

    Returns:
        16 hexadecimal digits; None where the folder holds no weights.
    """
    found = [path for name in WEIGHTS if (path := _file(folder, name)) is not None]
    if not found:
        return None
    hashed = hashlib.sha256()
    settings = {name: getattr(config, name, None) for name in _SETTINGS}
    hashed.update(json.dumps(settings, sort_keys=True, default=str).encode())
    if found[0].suffix == ".bin":  # a pickle is not opened
        hashed.update(found[0].read_bytes())
        return hashed.hexdigest()[:16]
    with safe_open(found[0], framework="pt") as content:
        names = sorted(content.keys())
        for name in names:
            value = content.get_tensor(name)
            value = value.float() if value.is_floating_point() else value
            hashed.update(f"{_relative(name, names)} {list(value.shape)} {value.dtype}".encode())
            hashed.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


def digest_of_data(value: Any) -> str | None:
    """16 hexadecimal digits for plain data; None for nothing."""
    if not value:
        return None
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _relative(name: str, names: list[str]) -> str:
    """A tensor's name below what all names begin with: a head on top of the encoder prefixes them all."""
    first, last = names[0].split("."), names[-1].split(".")
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first) - 1)
    return ".".join(name.split(".")[shared:])


def _file(folder: str | Path, name: str) -> Path | None:
    if (path := Path(folder, name)).is_file():
        return path
    if Path(folder).is_dir():
        return None
    cached = cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False)
    return None if cached is None else Path(cached)
