"""Features and the state of an unfinished training as files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_erasure.gradiend import Feature, FeatureDecoder, FeatureEncoder

from ..files import read_tensors, write_tensors

# Between the keys of nested dictionaries in the name of a tensor; no key has it.
_WITHIN = "::"
FEATURES = "features"


def save_feature(path: Path, feature: Feature, facts: Mapping[str, Any]) -> None:
    """Write a dense feature, and facts about it."""
    encoder, decoder = feature.encoder, feature.decoder
    if any(position is not None for position in (*encoder.index.values(), *decoder.index.values())):
        raise ValueError("Only features that were not pruned are kept while training.")
    tensors = {f"encoder.{name}": value for name, value in encoder.weight.items()}
    tensors |= {f"weight.{name}": value for name, value in decoder.weight.items()}
    tensors |= {f"bias.{name}": value for name, value in decoder.bias.items()}
    reading = {key: getattr(encoder, key) for key in ("scale", "bias", "activation", "unit_norm")}
    shapes = {name: list(shape) for name, shape in decoder.shapes.items()}
    write_tensors(path, tensors, {**facts, "encoder": reading, "shapes": shapes})


def load_feature(path: Path) -> tuple[Feature, dict[str, Any]]:
    """What `save_feature` wrote."""
    tensors, facts = read_tensors(path)
    shapes = {name: torch.Size(shape) for name, shape in facts.pop("shapes").items()}
    index: dict[str, Tensor | None] = dict.fromkeys(shapes)
    encoder = FeatureEncoder(
        weight={name: tensors[f"encoder.{name}"] for name in shapes}, index=index, shapes=shapes, **facts.pop("encoder")
    )
    decoder = FeatureDecoder(
        weight={name: tensors[f"weight.{name}"] for name in shapes},
        bias={name: tensors[f"bias.{name}"] for name in shapes},
        index=dict(index),
        shapes=shapes,
    )
    return Feature(encoder, decoder), facts


def save_state(path: Path, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write an estimator's state, nested dictionaries of tensors and plain numbers."""
    tensors, plain = _split(state)
    write_tensors(path, tensors, {"facts": dict(facts), "plain": plain})


def load_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `save_state` wrote."""
    tensors, kept = read_tensors(path)
    return _join(tensors, kept["plain"]), kept["facts"]


def _split(state: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by their path, and the same tree without them."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in state.items():
        path = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[path] = value
        elif isinstance(value, Mapping):
            inner, rest = _split(value, f"{path}{_WITHIN}")
            tensors |= inner
            plain[key] = rest
        else:
            plain[key] = value
    return tensors, plain


def _join(tensors: Mapping[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = plain
    for path, value in tensors.items():
        *parents, name = path.split(_WITHIN)
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return state


def _link(path: Path, other: Path) -> None:
    """The same bytes under another name; files here are replaced as a whole and never written into."""
    try:
        os.link(path, other)
    except OSError:  # a file system without links
        shutil.copyfile(path, other)


class KeptFeatures:
    """The best feature of every start so far: files in a folder, or in memory where nothing may be written.

    Args:
        folder: Made when first needed; `None` keeps them in memory, three vectors of the size of the model each.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[int, tuple[Feature, dict[str, Any]]] = {}

    def keep(self, start: int, feature: Feature, facts: Mapping[str, Any]) -> None:
        """Keep a start's feature in the place of the one before."""
        if self.folder is None:
            self._held[start] = feature, dict(facts)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_feature(self._path(start), feature, facts)

    def get(self, start: int) -> tuple[Feature, dict[str, Any]]:
        """A start's feature and the facts about it."""
        return self._held[start] if self.folder is None else load_feature(self._path(start))

    def clear(self) -> None:
        """Forget what another training has left here."""
        self._held.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def put_into(self, checkpoint: Path) -> None:
        """Make a checkpoint complete: add what is kept to it."""
        if self.folder is not None and self.folder.is_dir():
            (checkpoint / FEATURES).mkdir()
            for path in self.folder.glob("start-*.safetensors"):
                _link(path, checkpoint / FEATURES / path.name)

    def take_from(self, checkpoint: Path) -> None:
        """Keep what a checkpoint holds, and nothing else."""
        self.clear()
        if self.folder is None:
            for path in sorted((checkpoint / FEATURES).glob("start-*.safetensors")):
                self._held[int(path.stem.removeprefix("start-"))] = load_feature(path)
        elif (checkpoint / FEATURES).is_dir():
            self.folder.mkdir(parents=True)
            for path in (checkpoint / FEATURES).glob("start-*.safetensors"):
                _link(path, self.folder / path.name)

    def _path(self, start: int) -> Path:
        return Path(str(self.folder)) / f"start-{start:03d}.safetensors"
