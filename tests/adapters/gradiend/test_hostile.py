"""Malicious GRADIEND adapters; see `tests/adapters/test_hostile.py`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.gradiend.lifecycle import Gradiends
from tests.adapters.hostile import CONFIG, WAYS, WEIGHTS, at, folder_with, refused, retensor, rewrite


def first_index(folder: Path) -> str:
    return next(key for key, value in load_file(folder / WEIGHTS).items() if "index" in key and value.numel() > 2)


def reindex(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    key = first_index(folder)
    retensor(folder, lambda tensors: tensors.update({key: change(tensors[key])}))


def parameters(folder: Path, **sizes: Any) -> None:
    fitted = json.loads((folder / CONFIG).read_text())["fitted_parameters"]
    name = next(name for name, size in fitted.items() if size["count"])
    fitted[name] |= sizes
    rewrite(folder, fitted_parameters=fitted)


def moved(index: torch.Tensor, **entries: int) -> torch.Tensor:
    index = index.clone()
    for position, value in entries.items():
        index[int(position[1:])] = value
    return index


GRADIENDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a position outside": (lambda f: reindex(f, lambda i: moved(i, _1=2**31 - 1).sort().values), "not finite|points"),
    "a negative position": (lambda f: reindex(f, lambda i: moved(i, _0=-1)), "not finite|points"),
    "positions twice": (lambda f: reindex(f, lambda i: moved(i, _1=int(i[0]))), "not finite|points"),
    "positions in no order": (lambda f: reindex(f, lambda i: i.flip(0).contiguous()), "not finite|points"),
    "positions of 8 bytes": (lambda f: reindex(f, lambda i: i.long() + 2**32), "type I64"),
    "positions of floats": (lambda f: reindex(f, lambda i: i.float()), "type F32, where"),
    "NaN": (lambda f: retensor(f, lambda t: t[at(f, "gradiend_feature_weight")].fill_(torch.nan)), "not finite"),
    "a count beyond the weight": (lambda f: parameters(f, count=10**12), "fitted_parameters has"),
    "a count of text": (lambda f: parameters(f, count="1"), "fitted_parameters has"),
    "a huge shape": (
        lambda f: parameters(f, shape=[10**6, 10**6], count=None),
        "the two are not of the same adapter|missing|do not belong to",
    ),
    "a negative shape": (lambda f: parameters(f, shape=[-2, -3]), "fitted_parameters has"),
    "a shape of floats": (lambda f: parameters(f, shape=[1.5]), "fitted_parameters has"),
    "a field more": (lambda f: parameters(f, more=1), "fitted_parameters has"),
    "a parameter that is a path": (
        lambda f: rewrite(f, fitted_parameters={"../x": {"shape": [1], "count": None, "encoder_count": 0}}),
        "are missing in",
    ),
    "10^4 pairs": (
        lambda f: rewrite(f, pairs=[["female", "male"]] * 10**4, encoders=_encoders(f) * 10**4),
        "the two are not of the same adapter",
    ),
    "pairs without encoders": (lambda f: rewrite(f, pairs=[["female", "male"]] * 2), "There are 1 encoders for pairs"),
    "an encoder of code": (
        lambda f: rewrite(f, encoders=[_encoders(f)[0] | {"activation": "__import__"}]),
        "not an encoder",
    ),
    "an encoder of text": (lambda f: rewrite(f, encoders=[_encoders(f)[0] | {"scale": "1"}]), "not an encoder"),
    "an endless learning rate": (lambda f: rewrite(f, learning_rate=1e300), "beyond what float32 can hold"),
    "a strength of text": (lambda f: rewrite(f, feature_factor="1"), "feature_factor='1' .* must be float"),
    "an unknown pair": (lambda f: rewrite(f, pair=["male", "female"]), "was not fitted"),
    "no parameters": (lambda f: rewrite(f, fitted_parameters={}), "needs pairs, encoders and fitted_parameters"),
}


def _encoders(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / CONFIG).read_text())["encoders"]
    return found


@pytest.fixture(scope="module")
def present(gradiends: Gradiends) -> peft.PeftModel:
    """A `PeftModel` with an adapter; tests must not change it."""
    return peft.PeftModel.from_pretrained(gradiends.base("bert"), gradiends.folder("bert", seed=1))


@pytest.mark.parametrize("harm", GRADIENDS)
def test_gradiends(harm: str, present: peft.PeftModel, gradiends: Gradiends, tmp_path: Path):
    make, words = GRADIENDS[harm]
    folder = folder_with(make, gradiends.folder("bert"), tmp_path / "evil")
    model = gradiends.base("bert")
    for way in WAYS[:2]:  # on one model in turn, since each way leaves it as it was
        refused(way, model, folder, words)
    refused(WAYS[2], copy.deepcopy(present), folder, words)
