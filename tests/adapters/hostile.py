"""Ways to damage the files of an adapter, and a check that loading them changes nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.lifecycle import State
from tests.small_models import small_batch

SITE = "encoder.layer.0.output.LayerNorm"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WAYS = ("load_adapter", "from_pretrained", "PeftModel.load_adapter")


class Bomb:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def rewrite(folder: Path, **fields: Any) -> None:
    """Change fields of a saved configuration."""
    written = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(written | fields))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a folder in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def at(folder: Path, part: str) -> str:
    """The key in the folder's file of the tensor that is named `part`."""
    return next(key for key in load_file(folder / WEIGHTS) if key.endswith(part))


def set_(folder: Path, part: str, value: torch.Tensor) -> None:
    retensor(folder, lambda tensors: tensors.update({at(folder, part): value}))


def header(folder: Path, length: int, rest: bytes = b"") -> None:
    (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + rest)


def sites(folder: Path, **sizes: Any) -> None:
    fitted = json.loads((folder / CONFIG).read_text())["fitted_sites"]
    fitted[SITE] = fitted[SITE] | sizes
    rewrite(folder, fitted_sites=fitted)


def samples(folder: Path, **fields: Any) -> None:
    provenance = json.loads((folder / CONFIG).read_text())["provenance"]
    kept = provenance["fingerprint"]
    name = next(iter(kept))
    kept[name] |= fields
    rewrite(folder, provenance=provenance)


def link(folder: Path, name: str) -> None:
    target = folder.parent / f"elsewhere-{name}"
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


def sparse(folder: Path) -> None:
    """A sparse file whose header promises 4 TiB, of which nothing is on disk."""
    tensors = load_file(folder / WEIGHTS)
    described, end = {}, 0
    for key, value in tensors.items():
        shape = [2**20, 2**20] if key.endswith(f"{SITE}.concept_erasure.concept_erasure_left") else list(value.shape)
        size = 4 * torch.Size(shape).numel()
        described[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(described).encode()
    header(folder, len(text), text)
    os.truncate(folder / WEIGHTS, 8 + len(text) + end)


def fifo(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def pickled(folder: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(folder / "executed")))


# A pattern that takes practically for ever to match against a module's name, in either regex engine.
EVIL = r"(.|..)+[#%]"


def folder_with(harm: Callable[[Path], Any], source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    harm(target)
    return target


def load(way: str, model: Any, folder: Path, name: str = "newcomer") -> Any:
    if way == "from_pretrained":
        return peft.PeftModel.from_pretrained(model, str(folder), name)
    return model.load_adapter(str(folder), name)


def refused(way: str, model: Any, folder: Path, words: str, name: str = "newcomer") -> None:
    """Check that loading raises a sentence of a common type, and leaves the model and the folder as they were."""
    before, files = State(model, small_batch("bert", seed=7)), {path: path.lstat() for path in folder.rglob("*")}
    with pytest.raises((ValueError, TypeError, OSError), match=words):
        load(way, model, folder, name)
    before.assert_same(State(model, small_batch("bert", seed=7)))
    left = {path: path.lstat() for path in folder.rglob("*")}
    assert {p: (s.st_ino, s.st_size, s.st_mtime_ns) for p, s in left.items()} == {
        p: (s.st_ino, s.st_size, s.st_mtime_ns) for p, s in files.items()
    }
