"""How the package is built: which folder imports which, where constants stand, how much there is of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

import pytest

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
# What each folder may import of the package, besides itself and the version.
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
# Files beside the folders. Only `__init__` imports the table of patches, which may import all but the command line.
BESIDE = {"__init__", "_version", "patches"}
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
    "fit_concept_erasure",
    "verify_adapter",
}

# Function → what it imports of the package, which belongs to the top of its file. To be emptied.
IMPORTS_IN_FUNCTIONS = {
    "card": {"describe_folder", "write_card"},
    "check": {"check_output"},
    "encode": {"encode_texts"},
    "evaluate": {"Evaluation", "LIMITS", "check_gradiend_output", "evaluate", "write"},
    "export_lora": {"export_to_lora", "load_with_erasure"},
    "fit": {"FIGURE_FILE", "read_gradiend_recipe", "read_recipe", "run_gradiend_recipe", "run_recipe", "write_card"},
    "merge": {"save_merged", "write_merged_card"},
    "merge_fits": {"merge_fits", "write_card"},
    "push": {"push_adapter"},
    "push_exported": {"push_model"},
    "select": {"select_gradiend_output", "write_card"},
}


def _is(text: str) -> Callable[[str | int], bool]:
    return lambda value: value == text


def _has(pattern: str) -> Callable[[str | int], bool]:
    return lambda value: isinstance(value, str) and re.search(pattern, value) is not None


# What is written down once, as a constant of a module that others import.
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
# How often it is written, where that is more than once or in a function. To be emptied.
WRITTEN_OFTEN = {
    "the configuration's file": 4,
    "the tensors' file": 4,
    "the pickled tensors' file": 2,
    "the card's file": 2,
    "what PEFT puts before a name": 5,
    "the names of an erasure's tensors": 2,
    "the names of a GRADIEND's tensors": 3,
    "the id of no label": 2,
}

# Not more than today; every step of the redesign lowers them, down to the goals in `tests.house`.
MOST_LINES, MOST_FILES = 32_423, 172


# ---- arrows ----------------------------------------------------------------------------------------------------------


def test_every_folder_has_its_place():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)
    assert {path.stem for path in PACKAGE.glob("*.py")} <= BESIDE


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
    new = [
        place for place in found if not set(place.says.split(", ")) <= IMPORTS_IN_FUNCTIONS.get(place.function, set())
    ]
    assert not new, "\n".join(map(str, new))


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
    """Where a step has to add something first, it raises a limit and says in its commit what will take it down."""
    assert sum(map(lines_of, files())) <= MOST_LINES
    assert len(files()) <= MOST_FILES
