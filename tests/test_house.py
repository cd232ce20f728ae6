"""Imports between the folders of the package go one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_erasure"
# What each folder may import of the package, besides itself and the version.
MAY_IMPORT = {
    "erasers": set(),
    "gradiend": set(),
    "models": set(),
    "adapters": {"models", "erasers", "gradiend"},
    "fitting": {"adapters", "models", "erasers", "gradiend"},
    "metrics": {"fitting", "adapters", "models", "erasers", "gradiend"},
    "recipes": {"metrics", "fitting", "adapters", "models", "erasers", "gradiend"},
    "evaluation": {"recipes", "metrics", "fitting", "adapters", "models", "erasers", "gradiend"},
    "hub": {"fitting", "adapters", "models", "erasers", "gradiend"},
    "callbacks": {"hub", "fitting", "adapters", "models", "erasers", "gradiend"},
    "cli": {
        "recipes",
        "callbacks",
        "hub",
        "evaluation",
        "metrics",
        "fitting",
        "adapters",
        "models",
        "erasers",
        "gradiend",
    },
}
HUGGING_FACE = {"transformers", "peft", "accelerate", "datasets", "evaluate", "huggingface_hub", "safetensors"}


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports."""
    package = ("hf_erasure", *path.relative_to(PACKAGE).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            names.add(".".join([*above, *([node.module] if node.module else [])]))
    return names


def test_every_folder_has_its_place():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows_go_one_way(folder: str):
    allowed = MAY_IMPORT[folder] | {folder, "_version"}
    for path in (PACKAGE / folder).rglob("*.py"):
        for name in imported(path):
            first, _, rest = name.partition(".")
            if first == "hf_erasure" and rest:
                assert rest.split(".")[0] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("folder", ["erasers", "gradiend"])
def test_the_mathematics_knows_nothing_of_hugging_face(folder: str):
    for path in (PACKAGE / folder).rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported(path)} & HUGGING_FACE, path
