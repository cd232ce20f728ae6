"""Counts of the package's own source: lines, files, imports, constants, and which functions of others it wraps.

`python -m tests.house` prints the counts, and the places of the lines that should become fewer.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

PACKAGE = Path(__file__).parents[1] / "hf_erasure"
NAME = PACKAGE.name
# The packages whose functions a plugin might replace.
OTHERS = (
    "peft",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "huggingface_hub",
    "safetensors",
    "torch",
    "trl",
)

# The goals for the whole package.
LINES, FILES, WRAPPED = 27_000, 140, 15


@dataclass(frozen=True)
class Place:
    """A place in the source, and its text.

    Attributes:
        path: The file, relative to the folder of the package.
        line: The line, counted from 1.
        function: The qualified name of the `def` around it; empty outside of any.
        says: The text at this place.
        is_constant: Whether it is part of what a module assigns to a name in capitals.
    """

    path: Path
    line: int
    function: str
    says: str
    is_constant: bool = False

    def __str__(self) -> str:
        within = f" in {self.function}" if self.function else ""
        return f"{NAME}/{self.path.as_posix()}:{self.line}{within}: {self.says}"


def files() -> list[Path]:
    """All files of the package's code."""
    return sorted(PACKAGE.rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def package_of(path: Path) -> tuple[str, ...]:
    """The names of the package that a file is in, from the outermost on."""
    return (NAME, *path.relative_to(PACKAGE).parent.parts)


def imported_by(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Absolute names of the modules that a statement imports; from this package's root, also the imported names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    above = package[: len(package) - node.level + 1] if node.level else ()
    name = ".".join([*above, *([node.module] if node.module else [])])
    return [f"{name}.{alias.name}" for alias in node.names] if name == NAME else [name]


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports."""
    package = package_of(path)
    return {name for node, _, _ in nodes(path) for name in imported_by(node, package)}


@functools.cache
def nodes(path: Path) -> tuple[tuple[Any, str, bool], ...]:
    """Every node of a file, with the function around it and whether it is part of a constant of the module."""
    found, tree = [], tree_of(path)

    def look(node: ast.AST, around: str, function: str, constant: bool) -> None:
        for child in ast.iter_child_nodes(node):
            found.append((child, function, constant))
            named, inside = around, function
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                named = f"{around}.{child.name}".lstrip(".")
                inside = function if isinstance(child, ast.ClassDef) else named
            look(child, named, inside, constant or (node is tree and _is_constant(child)))

    look(tree, "", "", False)
    return tuple(found)


def _is_constant(node: ast.AST) -> bool:
    """Whether a statement assigns to names in capitals."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return bool(names) and all(re.fullmatch(r"_?[A-Z][A-Z0-9_]*", n) for n in names)


def imports_in_functions() -> list[Place]:
    """Imports of this package inside a function."""
    found = []
    for path in files():
        package = package_of(path)
        for node, function, _ in nodes(path):
            if function and any(name.partition(".")[0] == NAME for name in imported_by(node, package)):
                taken = ", ".join(alias.name for alias in node.names)
                found.append(Place(path.relative_to(PACKAGE), node.lineno, function, taken))
    return found


@functools.cache
def literals() -> tuple[tuple[str | int, Place], ...]:
    """Strings, parts of f-strings, and whole numbers with their sign; docstrings are left out."""
    found = []
    for path in files():
        told = {id(node.value) for node, _, _ in nodes(path) if isinstance(node, ast.Expr)}
        for node, function, constant in nodes(path):
            value = node.value if isinstance(node, ast.Constant) and id(node) not in told else None
            if (
                isinstance(node, ast.UnaryOp)
                and isinstance(node.op, ast.USub)
                and isinstance(node.operand, ast.Constant)
            ):
                value = -node.operand.value if isinstance(node.operand.value, int) else None
            if isinstance(value, str | int):
                found.append((value, Place(path.relative_to(PACKAGE), node.lineno, function, repr(value), constant)))
    return tuple(found)


def lines_with(pattern: str) -> list[Place]:
    """Lines of code, comments and docstrings in which a pattern is found."""
    return [
        Place(path.relative_to(PACKAGE), number, "", line.strip())
        for path in files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]


def wrapped() -> dict[str, list[str]]:
    """Functions of other packages that this package replaces by its own, each with the places of the replacement."""
    import hf_erasure

    importlib.import_module("transformers.trainer")  # The package wraps it when it is imported.
    assert Path(hf_erasure.__file__).parent == PACKAGE
    found: dict[str, list[str]] = {}
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in OTHERS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some objects of torch warn as soon as they are looked at.
        for module in modules:
            for name, value in list(vars(module).items()):
                _note(found, module.__name__, name, value)
                if isinstance(value, type) and value.__module__ == module.__name__:
                    for member, function in list(vars(value).items()):
                        _note(found, f"{module.__name__}.{value.__qualname__}", member, function)
    return found


def _note(found: dict[str, list[str]], owner: str, name: str, value: Any) -> None:
    value = value.fget if isinstance(value, property) else value
    function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    if isinstance(function, type | ModuleType):
        return
    # The path stays a string: there are 150,000 functions, and making a `Path` takes ten times as long.
    path = function.__code__.co_filename if isinstance(function, FunctionType) else ""
    ours = path.startswith(f"{PACKAGE}{os.sep}") or type(function).__module__.partition(".")[0] == NAME
    if ours and callable(function):
        original = f"{function.__module__}.{function.__qualname__}" if path else f"{owner}.{name}"
        found.setdefault(original, []).append(f"{owner}.{name}")


def main() -> None:
    inside, replaced = imports_in_functions(), wrapped()
    is_no = lines_with(r"\bis no ")
    mended = [place for place in is_no if re.search(r"(?<!\bthere )\bis no (?!longer\b)", place.says, re.IGNORECASE)]
    for title, places in (
        ("Imports of the package in functions", inside),
        ('Lines with "is no " for "is not a "', mended),
    ):
        print(f"{title}:", *map(str, places), sep="\n  ", end="\n\n")
    print("Functions of other packages that are wrapped:", *sorted(replaced), sep="\n  ", end="\n\n")
    rows = [
        ("lines of hf_erasure", sum(map(lines_of, files())), LINES),
        ("files", len(files()), FILES),
        ("functions", _functions(), None),
        ("lines of the longest file", max(map(lines_of, files())), None),
        ("wrapped functions of other packages", len(replaced), WRAPPED),
        ('lines with "is no "', len(is_no), None),
        ('lines with "is no " for "is not a "', len(mended), 0),
        ("imports of the package in functions", len(inside), 0),
    ]
    for what, count, goal in rows:
        print(f"{what:<40}{count:>7}" + (f"   goal: at most {goal}" if goal is not None else ""))


def _functions() -> int:
    return sum(
        isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) for path in files() for n in ast.walk(tree_of(path))
    )


if __name__ == "__main__":
    main()
