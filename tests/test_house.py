"""The build of the package: which folder may import which, where constants are defined, and how long it is."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import release
from tests.house import (
    NAME,
    PACKAGE,
    files,
    imported,
    imports_in_functions,
    lines_of,
    literals,
    tree_of,
)

MATHEMATICS = {"erasers", "gradiend"}
BELOW_FITTING = {"adapters", "models", *MATHEMATICS}
BELOW_METRICS = {"fitting", *BELOW_FITTING}
BELOW_RECIPES = {"metrics", *BELOW_METRICS}
# The folders of the package that each folder may import, besides itself and the version.
MAY_IMPORT = {
    "erasers": set(),
    "gradiend": set(),
    "models": set(),
    "adapters": {"models", *MATHEMATICS},
    "fitting": BELOW_FITTING,
    "metrics": BELOW_METRICS,
    "recipes": BELOW_RECIPES,
    "evaluation": {"recipes", *BELOW_RECIPES},
    "hub": BELOW_METRICS,
    "callbacks": {"hub", *BELOW_METRICS},
    "cli": {"recipes", "callbacks", "hub", "evaluation", *BELOW_RECIPES},
}
# Modules beside the folders. Only `__init__` imports the table of patches, which may import all but the command line.
BESIDE = {"__init__", "_version", "moved", "patches"}
IN_DISTRIBUTION = {"yaml": "pyyaml"}  # Module → the name of its distribution, where that differs.
HUGGING_FACE = {"transformers", "peft", "accelerate", "datasets", "evaluate", "huggingface_hub", "safetensors"}

PUBLIC = {
    "ConceptErasureCallback",
    "ConceptErasureConfig",
    "ErasureReport",
    "GradiendAdapter",
    "GradiendCallback",
    "GradiendConfig",
    "GradiendTrainer",
    "GradiendTrainingArguments",
    "LoraExport",
    "Verification",
    "__version__",
    "combine_adapters",
    "concept_dataloader",
    "export_to_lora",
    "export_to_sentence_transformers",
    "fit_concept_erasure",
    "set_strength",
    "set_target",
    "verify_adapter",
}


def _is(text: str) -> Callable[[str | int], bool]:
    return lambda value: value == text


def _has(pattern: str) -> Callable[[str | int], bool]:
    return lambda value: isinstance(value, str) and re.search(pattern, value) is not None


# Strings and numbers that are written only once, as a constant of a module that others import.
WRITTEN_ONCE: dict[str, Callable[[str | int], bool]] = {
    "the configuration's file": _is("adapter_config.json"),
    "the tensors' file": _is("adapter_model.safetensors"),
    "the pickled tensors' file": _is("adapter_model.bin"),
    "the card's file": _is("README.md"),
    "what PEFT puts before a name": _has(r"base_model\\?\.model\\?\."),
    "the names of an erasure's tensors": _has(r"concept_erasure_(left|right|bias)?$"),
    "the names of a GRADIEND's tensors": _is("gradiend_"),
    "the id of no label": lambda value: value == -100,
}
# How often one is written, where that is more than once or in a function. To be emptied.
WRITTEN_OFTEN = {
    "the names of an erasure's tensors": 2,
    "the names of a GRADIEND's tensors": 3,
    "the id of no label": 2,
}

# Not more than today; every step of the redesign lowers them, down to the goals in `tests.house`.
MOST_LINES, MOST_FILES = 31_265, 138


# ---- arrows ----------------------------------------------------------------------------------------------------------


def test_every_folder_has_its_place():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)
    assert {path.stem for path in PACKAGE.glob("*.py")} <= BESIDE


def test_the_map_of_the_code_names_every_room_and_files_that_are_there():
    text = (PACKAGE.parent / "docs" / "code.md").read_text(encoding="utf-8")
    rooms, calls = text.partition("## Map of the code")[2].partition("\n## ")[0].split("Where a call starts")
    order = re.findall(r"^\| `(\w+)/`", rooms, re.MULTILINE)
    assert set(order) == set(MAY_IMPORT)
    for place, room in enumerate(order):
        assert MAY_IMPORT[room] <= set(order[:place]), room
    missing = [name for name in re.findall(r"`([\w/]+/\w+\.py)`", calls) if not (PACKAGE / name).is_file()]
    assert not missing


def test_the_ten_files_of_a_fit_hold_what_is_said_of_them():
    text = (PACKAGE.parent / "docs" / "code.md").read_text(encoding="utf-8").partition("## A fit in ten files")[2]
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 10
    for name, said in rows:
        held = (PACKAGE / name).read_text(encoding="utf-8")
        named = [word for word in re.findall(r"`(?:\w+\.)?(\w+)(?:\(\))?`", said) if word != "fit_concept_erasure"]
        assert all(re.search(rf"(def|class) {word}\b", held) for word in named), name


def test_a_release_is_checked_for_all_that_the_wheel_is_told_to_hold():
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8").partition("wheel.force-include]\n")[2]
    told = re.findall(r'^".+" = "(.+)"$', text.partition("\n[")[0], re.MULTILINE)
    assert {name for name in told if "/" not in name} == {release.COMMAND}
    assert {name for name in told if "/" in name} == {f"hf_erasure/model_cards/{name}" for name in release.cards()}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_arrows_go_one_way(folder: str):
    allowed = MAY_IMPORT[folder] | {folder, "_version"}
    for path in (PACKAGE / folder).rglob("*.py"):
        for name in imported(path):
            first, _, rest = name.partition(".")
            if first == NAME:
                assert rest.split(".")[0] in allowed, f"{path} imports {name}"


def test_nobody_imports_the_command_line():
    for path in PACKAGE.glob("*.py"):
        assert not any(name.startswith(f"{NAME}.cli") for name in imported(path)), path


@pytest.mark.parametrize("folder", sorted(MATHEMATICS))
def test_the_mathematics_knows_nothing_of_hugging_face(folder: str):
    for path in (PACKAGE / folder).rglob("*.py"):
        assert not {name.partition(".")[0] for name in imported(path)} & HUGGING_FACE, path


def test_the_package_is_imported_at_the_top_of_a_file():
    found = imports_in_functions()
    assert not found, "\n".join(map(str, found))


def test_what_is_imported_is_declared():
    """A module imported outside functions is a dependency. Optional packages are imported in functions."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    declared = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {re.split(r"[^\w-]", text)[0].lower().replace("-", "_") for text in declared}
    needed: dict[str, Path] = {}
    for path in files():
        for node in tree_of(path).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                needed[IN_DISTRIBUTION.get(str(module).partition(".")[0], str(module).partition(".")[0])] = path
    missing = {name: path for name, path in needed.items() if name not in {*sys.stdlib_module_names, NAME, *names}}
    assert not missing, "declare it in pyproject.toml"


# ---- one place for an idea -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", WRITTEN_ONCE)
def test_a_constant_is_written_once(what: str):
    found = [place for value, place in literals() if WRITTEN_ONCE[what](value)]
    places = "\n".join(map(str, found))
    if what in WRITTEN_OFTEN:
        assert len(found) <= WRITTEN_OFTEN[what], f"once more than before:\n{places}"
    else:
        assert len(found) <= 1, f"import it from where it is a constant:\n{places}"
        assert all(place.is_constant for place in found), f"write it as a constant of the module:\n{places}"


def test_the_public_names():
    tree = tree_of(PACKAGE / "__init__.py")
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    names = ast.literal_eval(lists[0])
    assert len(names) == len(set(names))
    assert set(names) == PUBLIC
    given = {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert given >= PUBLIC, "a public name is imported, so that type checkers and readers find it"


# ---- how much there is -----------------------------------------------------------------------------------------------


def test_there_is_not_more_of_it():
    """A step that has to add lines first raises a limit, and its commit says what will lower the limit again."""
    assert sum(map(lines_of, files())) <= MOST_LINES
    assert len(files()) <= MOST_FILES
