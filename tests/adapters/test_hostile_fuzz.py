"""A randomly changed adapter folder loads and can be deleted again, or one sentence says why it does not load."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hf_erasure.adapters.common.layer import adapter_children
from tests.adapters.gradiend.lifecycle import Gradiends
from tests.adapters.hostile import CONFIG, WAYS, WEIGHTS, load
from tests.adapters.lifecycle import Cell, Lifecycle
from tests.small_models import outputs_of, same, small_batch

CELL = Cell("bert", "norms", "output")
KINDS = ("erasure", "gradiend")
# The fields that the outputs depend on beside the tensors; names and the place of the fit do not matter.
DECIDES = {
    "erasure": ("peft_type", "fitted", "fitted_sites", "site", "sticky", "modules_to_save"),
    "gradiend": (
        *("peft_type", "fitted", "fitted_parameters", "pairs", "pair", "feature_factor", "learning_rate", "sticky"),
        "modules_to_save",
    ),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
# Values of the types that configurations have, so that not all examples fail at the check of types.
LIKELY = st.sampled_from(
    [-1, 0, 1, 2, 33, 10**9, 0.5, 1e300, "", "..", "x", "input", "query", ".*", "(", [], {}, [1], ["x"]]
)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {
        "erasure": Lifecycle(root / "lifecycle").folder(CELL),
        "gradiend": Gradiends(root / "gradiends").folder("bert", target_modules=r".*(query|LayerNorm)"),
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models that all examples share, so each example must leave them as they were."""
    root = tmp_path_factory.mktemp("bases")
    return {
        "erasure": Lifecycle(root / "lifecycle").base("bert"),
        "gradiend": Gradiends(root / "gradiends").base("bert"),
    }


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def change_config(folder: Path, draw: Callable[[st.SearchStrategy], Any]) -> None:
    """Replace, remove or add a value somewhere in the configuration."""
    content = json.loads((folder / CONFIG).read_text())
    *parents, last = draw(st.sampled_from([*places(content)]) | st.sampled_from([(key,) for key in content]))
    inside = content
    for key in parents:
        inside = inside[key]
    how = draw(st.sampled_from(["replace", "likely", "remove", "add"]))
    if how == "remove":
        del inside[last]
    elif how == "add" and isinstance(inside, dict):
        inside[draw(st.text(max_size=8))] = draw(JSON)
    elif not (last == "peft_type" and how == "likely"):
        inside[last] = draw(LIKELY if how == "likely" else JSON)
    (folder / CONFIG).write_text(json.dumps(content))


def change_tensors(folder: Path, draw: Callable[[st.SearchStrategy], Any]) -> None:
    """Remove a tensor, give it another name, type, shape or value, or add a new one."""
    tensors = load_file(folder / WEIGHTS)
    key = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.sampled_from(["remove", "rename", "type", "shape", "value", "add"]))
    value = tensors[key]
    if how == "remove":
        del tensors[key]
    elif how == "rename":
        tensors[draw(st.text(min_size=1, max_size=8)) + key] = tensors.pop(key)
    elif how == "type":
        tensors[key] = value.to(draw(st.sampled_from(DTYPES)))
    elif how == "shape":
        tensors[key] = torch.zeros(draw(st.lists(st.integers(0, 40), max_size=3)), dtype=value.dtype)
    elif how == "value" and value.numel():
        at = draw(st.integers(0, value.numel() - 1))
        number = draw(
            st.sampled_from([-1, 0, 2**31 - 1] if not value.is_floating_point() else [torch.nan, -torch.inf, 1e38])
        )
        value.view(-1)[at] = number
    else:
        tensors[draw(st.text(min_size=1, max_size=8))] = torch.ones(draw(st.integers(0, 3)))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_bytes(folder: Path, draw: Callable[[st.SearchStrategy], Any]) -> None:
    """Cut a file, or change, insert or remove bytes, more often in its header than in the rest."""
    file = folder / draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray(file.read_bytes())
    at = draw(st.integers(0, 64) | st.integers(0, len(content) - 1)) % len(content)
    how = draw(st.sampled_from(["cut", "change", "insert", "remove"]))
    if how == "cut":
        del content[at:]
    elif how == "change":
        content[at] = draw(st.integers(0, 255))
    elif how == "insert":
        content[at:at] = draw(st.binary(min_size=1, max_size=9))
    else:
        del content[at : at + draw(st.integers(1, 9))]
    file.write_bytes(bytes(content))


CHANGES = {"config": change_config, "tensors": change_tensors, "bytes": change_bytes}


def decides(folder: Path, kind: str) -> Any:
    """All fields and tensors in the folder that the outputs depend on."""
    content = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    return {key: content.get(key) for key in DECIDES[kind]}, {k: v.tolist() for k, v in tensors.items()}


def seen_of(model: Any) -> Any:
    """The state that a failed load must not change."""
    flags = {name: (p.requires_grad, p._version) for name, p in model.named_parameters()}
    modules = [
        (name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
    return flags, modules, sorted(getattr(model, "peft_config", {})), model._hf_peft_config_loaded


@pytest.mark.parametrize("examples", [40, pytest.param(800, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_adapter_loads_or_is_refused_in_a_sentence(
    kind: str, what: str, examples: int, originals: dict[str, Path], bases: dict[str, Any], tmp_path: Path
):
    base, original, batch = bases[kind], originals[kind], small_batch("bert")
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    plain, before = outputs_of(base, batch), seen_of(base)
    base.load_adapter(str(original), "x")
    wanted = outputs_of(base, batch)
    base.delete_adapter("x")
    assert not same(wanted, plain) and seen_of(base)[1:] == before[1:]
    known, outcomes = decides(original, kind), []

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(st.data(), st.sampled_from(WAYS[:2]))
    def holds(data: st.DataObject, way: str) -> None:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        CHANGES[what](folder, data.draw)
        before = seen_of(base)
        try:
            loaded = load(way, base, folder, "x")
        except (ValueError, TypeError, OSError) as error:
            assert len(str(error)) > 20 and not adapter_children(base)
            assert seen_of(base) == before
            outcomes.append("refused")
            return
        model = loaded if way == "from_pretrained" else base
        found = outputs_of(model, batch)
        if decides(folder, kind) == known:
            assert same(found, wanted)
        if way == "from_pretrained":
            model.unload()
        else:
            base.delete_adapter("x")
        assert seen_of(base)[1:] == before[1:]
        outcomes.append("loaded")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holds()
    assert set(outcomes) == {"refused", "loaded"} and outcomes.count("refused") > 10
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in weights.items())
    assert same(outputs_of(base, batch), plain)
