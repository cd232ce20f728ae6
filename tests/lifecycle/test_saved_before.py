"""Adapters that an earlier version of the code saved: `python -m tests.saved_before` compares them to the bit.

These tests read the saved folders in the repository on any processor. Stored values are compared to the bit, and
computed values up to the rounding of another order of sums.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.saved_before.__main__ import expected
from tests.saved_before.bases import BASES, base_of, digest_of
from tests.saved_before.cases import ADAPTERS, BASE_DIGESTS, CASES, FILES, HERE, Case, Seen, read_config, save, seen

# Names of weights change between releases of transformers, so the oldest supported one cannot read these adapters.
pytestmark = pytest.mark.lifecycle
# A rounding of float32 is 2^-24 relative; sums over 24 columns in another order, two blocks and their norms multiply it
# by less than 100.
TOLERANCE = 1e-5
# Fitting adds more roundings: covariances, an eigendecomposition, gradients.
FIT_TOLERANCE = 1e-3
# The command saves all cases anew. These few have every kind, a bare encoder, tied weights and an encoder-decoder.
FRESH = [case for case in CASES if case.base in ("bert", "gpt2", "t5", "vit") or case.kind == "erasure-head"]


def folder_of(case: Case) -> Path:
    return HERE / ADAPTERS / str(case)


@functools.cache
def seen_of(case: Case) -> Seen:
    return seen(case, folder_of(case))


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value, which may be zero for biases that a merge adds."""
    assert one.shape == other.shape and one.dtype == other.dtype
    return 0.0 if torch.equal(one, other) else float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", BASES)
def test_a_base_model_is_the_same_wherever_it_is_built(name: str):
    digests = json.loads((HERE / BASE_DIGESTS).read_text(encoding="utf-8"))
    assert digest_of(base_of(name)) == digests[name]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_was_saved_is_loaded_to_the_bit(case: Case):
    held, file = seen_of(case).held, load_file(folder_of(case) / FILES[1])
    assert held.keys() == file.keys()
    assert all(value.dtype == file[key].dtype and torch.equal(value, file[key]) for key, value in held.items())
    assert seen_of(case).config == read_config(folder_of(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_acts_as_it_did(case: Case):
    found, (then, _) = seen_of(case), expected(case, HERE)
    assert distance(found.tensors["output"], then["output"]) < TOLERANCE < 1e-3 < distance(found.base, then["output"])
    assert torch.equal(found.peft, found.tensors["output"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_merges_or_refuses_as_it_did(case: Case):
    found, (then, refusal) = seen_of(case), expected(case, HERE)
    assert found.refusal == refusal
    assert found.tensors.keys() == then.keys()
    assert all(distance(value, then[key]) < TOLERANCE for key, value in found.tensors.items())


@pytest.mark.parametrize("case", FRESH, ids=str)
def test_a_fresh_save_has_the_same_fields_and_tensors(case: Case, tmp_path: Path):
    save(case, tmp_path)
    fresh, file = load_file(tmp_path / FILES[1]), load_file(folder_of(case) / FILES[1])
    # The readings that a target needs are newer than the saved folders.
    fresh = {name: value for name, value in fresh.items() if not name.endswith(".concept_erasure_readings")}
    assert {k: (v.shape, v.dtype) for k, v in fresh.items()} == {k: (v.shape, v.dtype) for k, v in file.items()}
    new, old = read_config(tmp_path), read_config(folder_of(case))
    assert new.pop("readings", None) == (["female", "male"] if "erasure" in case.kind else None)
    for config in (new, old):
        config.pop("affine", None)  # where a case does not set it, it is None now; the older version saved True
        del config["provenance"]["hf_erasure_version"]
    assert_alike(new, old)


def assert_alike(new: Any, old: Any, where: str = "") -> None:
    """Check that names, types and values are the same, and that computed numbers are near each other."""
    assert type(new) is type(old), where
    if isinstance(old, dict):
        assert new.keys() == old.keys(), where
        for key in old:
            assert_alike(new[key], old[key], f"{where}.{key}")
    elif isinstance(old, list):
        assert len(new) == len(old), where
        for index, (one, other) in enumerate(zip(new, old, strict=True)):
            assert_alike(one, other, f"{where}[{index}]")
    elif isinstance(old, float):
        assert math.isclose(new, old, rel_tol=FIT_TOLERANCE, abs_tol=FIT_TOLERANCE), where
    else:
        assert new == old, where


def test_every_kind_is_among_them():
    """Each of the four kinds has at least ten architectures, and some merges are refused."""
    for kind in ("erasure-output", "erasure-input", "gradiend-dense", "gradiend-sparse"):
        assert len({case.base for case in CASES if case.kind == kind}) >= 10
    folders = {path.name for path in (HERE / ADAPTERS).iterdir()}
    assert folders == {str(case) for case in CASES}
    refused = [case for case in CASES if expected(case, HERE)[1]]
    assert {case.is_erasure for case in refused} == {True} and len(refused) < len(CASES) // 4
