"""How many files and functions of this package a reader goes through when following one call.

`python -m tests.walk` prints a table of all calls. `python -m tests.walk --list load_adapter` prints the functions of
one call in the order of their first entry, with their lengths, how often each is entered, and from where. A short
function that is entered from only one other is the first to look at.

What is counted: files and functions with at least one entered frame, on any thread. A function is a `def`,
whether it is a plain function, a method, a property, a wrapper of another library's function, or a `def` inside
another. A lambda, a comprehension or a generator expression belongs to the `def` around it. What a dataclass
generates is not counted, as it has no line in a file. Module bodies are not counted either: every call is made once
before it is measured, so that imports and caches are done. Functions of other libraries are not counted.

The models are small. An erasure is fitted on a Llama with two layers and two batches of 16 rows, a GRADIEND on a masked
BERT with two layers and six pairs.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import importlib
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from transformers.utils.logging import disable_progress_bar

import hf_erasure
from hf_erasure import (
    ConceptErasureConfig,
    GradiendAdapter,
    GradiendConfig,
    GradiendTrainer,
    GradiendTrainingArguments,
    fit_concept_erasure,
)
from tests.fitting.gradiend.language_models import CLASSES, model_of, neutral, pairs, tokenizer_of
from tests.small_models import LABELS, inputs_of, small_batch, small_batches, small_model

# Until transformers.trainer is imported, a function of this package runs at every import, and would be counted.
importlib.import_module("transformers.trainer")

PACKAGE = Path(hf_erasure.__file__).parent
ERASURE, GRADIEND = "llama", "bert"
RATE = 1e-2

# The goals for each call: files and functions.
GOALS = {
    "add_adapter": (9, 50),
    "fit_concept_erasure, sequential": (18, 110),
    "fit_concept_erasure, one pass": (18, 110),
    "save_pretrained": (10, 65),
    "load_adapter": (10, 75),
    "GradiendTrainer.train": (20, 150),
}


@dataclass(frozen=True, order=True)
class Function:
    """A `def` of this package.

    Attributes:
        file: The file, relative to the folder of the package.
        line: The line of its first decorator, or of its `def`.
        name: The qualified name within the file.
        lines: The number of its lines.
    """

    file: str
    line: int
    name: str
    lines: int


@dataclass
class Entered:
    """How a function was entered.

    Attributes:
        times: How often; each resumption of a generator counts too.
        callers: For each entry, the nearest function of this package above it on the stack.
    """

    times: int = 0
    callers: set[Function] = field(default_factory=set)


@dataclass
class Walk:
    """What one call went through.

    Attributes:
        entered: The functions, in the order of the first entry.
        deepest: The highest number of frames of this package on one stack.
    """

    entered: dict[Function, Entered] = field(default_factory=dict)
    deepest: int = 0

    @property
    def files(self) -> int:
        return len({function.file for function in self.entered})

    @property
    def functions(self) -> int:
        return len(self.entered)


@functools.cache
def _functions_of(path: Path) -> tuple[tuple[int, int, str], ...]:
    """First line, last line and name of every `def` in a file; an inner one comes after the one around it."""
    found: list[tuple[int, int, str]] = []

    def look(node: ast.AST, within: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = within
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{within}.{child.name}".lstrip(".")
                if not isinstance(child, ast.ClassDef):
                    first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                    found.append((first, child.end_lineno or first, name))
            look(child, name)

    look(ast.parse(path.read_text(encoding="utf-8")), "")
    return tuple(found)


@functools.cache
def function_of(code: CodeType) -> Function | None:
    """The `def` that code belongs to; None for code of other packages, modules and classes."""
    path = Path(code.co_filename)
    # Python calls `moved` for every module that an import does not find, in any library; it is not part of a walk.
    if code.co_name == "<module>" or not path.is_relative_to(PACKAGE) or path.name == "moved.py":
        return None
    line = code.co_firstlineno
    around = [spot for spot in _functions_of(path) if spot[0] <= line <= spot[1]]
    if not around:
        return None
    first, last, name = around[-1]
    return Function(path.relative_to(PACKAGE).as_posix(), first, name, last - first + 1)


def walk_of(call: Callable[[], Any]) -> Walk:
    """Make a call, and return the functions that it went through."""
    walk, lock = Walk(), threading.Lock()

    def enter(frame: FrameType, event: str, _: Any) -> None:
        function = function_of(frame.f_code) if event == "call" else None
        if function is None:
            return
        above = []
        outer = frame.f_back
        while outer is not None:
            above.append(function_of(outer.f_code))
            outer = outer.f_back
        own = [caller for caller in above if caller is not None]
        with lock:
            entered = walk.entered.setdefault(function, Entered())
            entered.times += 1
            entered.callers.update(caller for caller in own[:1] if caller != function)
            walk.deepest = max(walk.deepest, len(own) + 1)

    before, before_in_threads = sys.getprofile(), threading.getprofile()
    threading.setprofile(enter)
    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(before)
        threading.setprofile(before_in_threads)
    return walk


# ---- the calls -------------------------------------------------------------------------------------------------------


def _with_erasure(*, fitted: bool = False) -> Any:
    model = copy.deepcopy(small_model(ERASURE))
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=LABELS), adapter_name="no_gender")
    if fitted:
        _fit(model)
    return model


def _fit(model: Any, *, sequential: bool = True) -> None:
    fit_concept_erasure(model, small_batches(ERASURE, 2), "no_gender", sequential=sequential, progress=False)


def _saved(folder: Path) -> Path:
    if not folder.is_dir():
        _with_erasure(fitted=True).save_pretrained(folder)
    return folder


def _trainer(folder: Path, *, trained: bool = False) -> GradiendTrainer:
    model = model_of(GRADIEND).eval()
    model.add_adapter(GradiendConfig(feature="gender", classes=CLASSES, density=1.0), adapter_name="gender")
    trainer = GradiendTrainer(
        model,
        args=GradiendTrainingArguments(output_dir=str(folder), disable_tqdm=True, per_device_train_batch_size=1),
        train_dataset=pairs(GRADIEND),
        eval_dataset=pairs(GRADIEND),
        neutral_dataset=neutral(),
        tokenizer=tokenizer_of(GRADIEND),
    )
    if trained:
        trainer.train()
    return trainer


def _adding(folder: Path) -> Callable[[], Any]:
    model = copy.deepcopy(small_model(ERASURE))
    config = ConceptErasureConfig(concept="gender", labels=LABELS)
    return lambda: model.add_adapter(config, adapter_name="no_gender")


def _fitting(folder: Path, *, sequential: bool) -> Callable[[], Any]:
    model = _with_erasure()
    return lambda: _fit(model, sequential=sequential)


def _erased_forward(folder: Path) -> Callable[[], Any]:
    model, inputs = _with_erasure(fitted=True), inputs_of(small_batch(ERASURE))
    return lambda: model(**inputs)


def _saving(folder: Path) -> Callable[[], Any]:
    model = _with_erasure(fitted=True)
    return lambda: model.save_pretrained(folder / "saved now")


def _loading(folder: Path) -> Callable[[], Any]:
    model, place = copy.deepcopy(small_model(ERASURE)), str(_saved(folder / "saved"))
    return lambda: model.load_adapter(place, adapter_name="no_gender")


def _training(folder: Path) -> Callable[[], Any]:
    return _trainer(folder).train


def _selecting(folder: Path) -> Callable[[], Any]:
    trainer = _trainer(folder, trained=True)
    return lambda: trainer.select("bpi", budget=1.0, feature_factors=[1.0], learning_rates=[RATE])


def _steering(folder: Path) -> Callable[[], Any]:
    adapter = GradiendAdapter.of(_trainer(folder, trained=True).model, "gender")
    return lambda: adapter.steer(feature_factor=1.0, learning_rate=RATE)


def _steered_forward(folder: Path) -> Callable[[], Any]:
    model = _trainer(folder, trained=True).model
    GradiendAdapter.of(model, "gender").steer(feature_factor=1.0, learning_rate=RATE)
    inputs = tokenizer_of(GRADIEND)("the king said she was late", return_tensors="pt")
    return lambda: model(**inputs)


# A function for each call that prepares it, in a folder that may be written to, and returns it.
CALLS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "add_adapter": _adding,
    "fit_concept_erasure, sequential": functools.partial(_fitting, sequential=True),
    "fit_concept_erasure, one pass": functools.partial(_fitting, sequential=False),
    "forward with erasure": _erased_forward,
    "save_pretrained": _saving,
    "load_adapter": _loading,
    "GradiendTrainer.train": _training,
    "select, 1 × 1": _selecting,
    "steer": _steering,
    "forward with GRADIEND": _steered_forward,
}


def measured(name: str) -> Walk:
    """The walk of one of `CALLS`, measured after the call was made once before."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CALLS[name](Path(folder, "first"))()
        return walk_of(CALLS[name](Path(folder, "second")))


# ---- what is printed -------------------------------------------------------------------------------------------------


def table(walks: dict[str, Walk]) -> str:
    """A line for each call, with its goal if it has one."""
    rows = [("call", "files", "functions", "goal", "deepest stack")]
    for name, walk in walks.items():
        goal = "{} / {}".format(*GOALS[name]) if name in GOALS else ""
        rows.append((name, str(walk.files), str(walk.functions), goal, str(walk.deepest)))
    return _aligned(rows)


def listing(walk: Walk) -> str:
    """The functions of a walk in the order of the first entry, then its files."""
    rows = [("function", "at", "lines", "entered", "from")]
    of_file: dict[str, int] = {}
    for function, entered in walk.entered.items():
        of_file[function.file] = of_file.get(function.file, 0) + 1
        place = f"{PACKAGE.name}/{function.file}:{function.line}"
        callers = sorted(caller.name for caller in entered.callers)
        above = callers[0] if len(callers) == 1 else f"{len(callers)} functions" if callers else "another library"
        rows.append((function.name, place, str(function.lines), f"{entered.times} ×", above))
    files = [("file", "functions"), *((f"{PACKAGE.name}/{file}", str(count)) for file, count in of_file.items())]
    return f"{_aligned(rows)}\n\n{_aligned(files)}"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.walk", description=(__doc__ or "").split("\n\n")[0])
    says = f"also the functions of the calls whose name has this in it: {', '.join(CALLS)}"
    parser.add_argument("--list", metavar="CALL", help=says)
    wanted = parser.parse_args(arguments).list or ""
    names = [name for name in CALLS if name == wanted] or [name for name in CALLS if wanted in name]
    if not names:
        parser.error(f"{wanted!r} is not one of {', '.join(CALLS)}")
    disable_progress_bar()
    walks = {name: measured(name) for name in names}
    if wanted:
        for name, walk in walks.items():
            print(f"{name}\n\n{listing(walk)}\n")
    print(table(walks))


if __name__ == "__main__":
    main()
