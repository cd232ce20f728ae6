"""The names of an adapter's files, and of what a save puts beside them for a moment."""

from __future__ import annotations

from pathlib import Path

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CARD = "README.md"
COMMIT = ".hf-erasure-commit"
STAGING = ".hf-erasure-saving-"


def target_of(folder: str | Path) -> Path:
    """Where a staged folder, or something in it, will lie; the folder itself where it is not staged."""
    parts = Path(folder).parts
    for index, part in enumerate(parts):
        if part.startswith(STAGING):
            return Path(*parts[:index], *parts[index + 2 :])
    return Path(folder)


def root_of(folder: str | Path) -> Path:
    """The staged form of the folder that is saved to, of which an adapter's staged folder may be a part."""
    parts = Path(folder).parts
    for index, part in enumerate(parts):
        if part.startswith(STAGING):
            return Path(*parts[: index + 2])
    return Path(folder)
