"""The type hints of all public classes and functions can be resolved, as documentation tools and validators do."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.prepared import TRANSFORMERS, run, run_code

ROOT = Path(__file__).resolve().parents[1] / "hf_erasure"
PLACES = sorted(".".join(path.parent.relative_to(ROOT.parent).parts) for path in ROOT.rglob("__init__.py"))


def public(place: str) -> Iterator[tuple[str, Any]]:
    """The public classes and functions of a package, and the public methods that its classes define."""
    module = importlib.import_module(place)
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            yield name, thing
        for key, value in vars(thing).items() if inspect.isclass(thing) else ():
            # An `__init__` that a dataclass generates is left out: a base's annotations may not resolve in its module.
            if key.startswith("_") and (key != "__init__" or is_dataclass(thing)):
                continue
            value = inspect.unwrap(value.fget if isinstance(value, property) else getattr(value, "__func__", value))
            if inspect.isfunction(value):
                yield f"{name}.{key}", value


@pytest.mark.parametrize("place", PLACES)
def test_hints_of_all_that_is_public(place: str) -> None:
    for name, thing in public(place):
        hints = typing.get_type_hints(thing)
        assert set(hints) >= set(vars(thing).get("__annotations__", {})), name


def test_there_is_much_that_is_public() -> None:
    assert sum(len(list(public(place))) for place in PLACES) > 200


def test_they_are_of_the_real_classes_and_import_nothing_before(tmp_path: Path) -> None:
    code = (
        "import sys, typing, hf_erasure\n"
        "assert 'datasets' not in sys.modules\n"
        "hints = typing.get_type_hints(hf_erasure.concept_dataloader)\n"
        "import datasets\n"
        "assert hints['dataset'] == datasets.Dataset | datasets.IterableDataset, hints\n"
    )
    done = run(run_code, code, folder=tmp_path, kind=TRANSFORMERS)
    assert done.returncode == 0, done.stderr
