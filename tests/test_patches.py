"""All wrapped functions are in one table; if a library lacks one of them, a message names it and the consequence."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_erasure import patches
from hf_erasure.patches import Patch
from tests.house import wrapped
from tests.prepared import TRANSFORMERS, run, run_code


def noted(original: Callable, *args: Any, **kwargs: Any) -> Any:
    return ["noted", original(*args, **kwargs)]


def method_noted(original: Callable, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return [type(owner).__name__, original(*args, **kwargs)]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for two modules of another package; one of them has a function of the other."""
    module, again = types.ModuleType("peft.theirs"), types.ModuleType("peft.theirs_again")

    class Owner:
        def method(self, number: int) -> int:
            return number + 1

        @classmethod
        def made(cls, number: int) -> Any:
            return cls.__name__, number

    def function(number: int) -> int:
        return number + 2

    module.Owner, module.function, again.function = Owner, function, function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peft.theirs", module)
    monkeypatch.setitem(sys.modules, "peft.theirs_again", again)
    return module


def patch(name: str, **options: Any) -> Patch:
    wrapper = options.pop("wrapper", noted)
    return Patch(options.pop("module", "peft.theirs"), name, wrapper=wrapper, **options)


def test_a_function_is_wrapped_once_wherever_it_is(theirs: types.ModuleType):
    table = (patch("function", other_modules=("peft.theirs_again",)), patch("Owner.method", wrapper=method_noted))
    for _ in range(3):
        patches.wrap(table)
    assert theirs.function(1) == ["noted", 3] and sys.modules["peft.theirs_again"].function(1) == ["noted", 3]
    assert theirs.Owner().method(number=1) == ["Owner", 2]
    patches.wrap((patch("function", wrapper=lambda original, number: original(number) * 10),))
    assert theirs.function(1) == 30


def test_a_class_method_is_one_still(theirs: types.ModuleType):
    patches.wrap((patch("Owner.made", wrapper=lambda original, cls, number: (cls, original(number))),))
    assert theirs.Owner.made(3) == (theirs.Owner, ("Owner", 3))


def test_a_function_that_moved_to_another_of_its_modules_is_found(theirs: types.ModuleType):
    del theirs.function
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patches.wrap((patch("function", other_modules=("peft.theirs_again", "peft.theirs_never")),))
        patches.wrap((patch("function", module="peft.theirs_before", other_modules=("peft.theirs_again",)),))
    assert sys.modules["peft.theirs_again"].function(1) == ["noted", 3]


def test_what_cannot_be_done_without_is_named(theirs: types.ModuleType):
    with pytest.raises(ImportError, match=r"relies on peft\.theirs\.Owner\.gone, which peft \d.* does not have"):
        patches.wrap((patch("function"), patch("Owner.gone")))
    assert theirs.function(1) == 3, "nothing was wrapped"
    with pytest.raises(ImportError, match=r"relies on the parameter .other. of peft\.theirs\.function"):
        patches.wrap((patch("function", parameters=("other",)),))


def test_what_can_be_done_without_is_warned_of(theirs: types.ModuleType):
    with pytest.warns(UserWarning, match=r"theirs\.gone, which peft \d.* does not have.*not work here: hats") as said:
        patches.wrap((patch("gone", without="hats"), patch("function")))
    assert len(said) == 1 and theirs.function(1) == ["noted", 3]


def test_every_line_says_why():
    table = patches.patches()
    names = [(line.module, line.name) for line in table]
    assert len(set(names)) == len(names)
    above = re.findall(r"^ {8}# .*\.\n {8}\w+\(", inspect.getsource(patches), re.MULTILINE)
    assert len(above) == len(table), "a comment with a full stop stands above each"
    assert len(wrapped()) == len(table), "what is wrapped is in the table"


# The slowest imports among the packages that this one can use.
LATER = {"datasets", "jinja2", "matplotlib", "pandas", "pyarrow", "sklearn", "transformers.trainer", "typer"}


def test_an_import_brings_in_little_beside_peft_and_transformers():
    """At most a tenth of what PEFT and transformers import, in modules, since time differs between machines."""
    program = (
        "import sys, peft, transformers\nbefore = set(sys.modules)\nimport hf_erasure\n"
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    others = {name for name in done.stdout.split() if name.partition(".")[0] != "hf_erasure"}
    assert others and not others & LATER and len(others) < 50, sorted(others)


@pytest.mark.parametrize("order", [("hf_erasure", "transformers.trainer"), ("transformers.trainer", "hf_erasure")])
def test_trainer_is_wrapped_in_either_order_and_once(order: tuple[str, str], tmp_path: Path):
    program = "import importlib, importlib.util, sys\n" + "".join(
        f"importlib.util.find_spec('transformers.trainer')\nimport {name}\n" for name in order
    )
    program += (
        "trainer = sys.modules['transformers.trainer']\n"
        "for again in (None, hf_erasure, hf_erasure.patches):\n"
        "    again and importlib.reload(again)\n"
        "    for method in (trainer.Trainer.train, trainer.Trainer._save):\n"
        "        assert hasattr(method, '_hf_erasure_wrappers'), (again, method)\n"
        "        assert not hasattr(method.__wrapped__, '__wrapped__'), (again, method)\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__module__ == 'hf_erasure.patches']\n"
        "print(trainer.__spec__.name, trainer.__file__ == trainer.__spec__.origin)\n"
    )
    done = run(run_code, program, folder=tmp_path, kind=TRANSFORMERS)
    assert done.stdout.split() == ["transformers.trainer", "True"], done.stderr


# Runs in a process that has imported transformers, but not PEFT or this package.
RENAMED = """
import warnings
from transformers import Trainer
for name in ("_load_best_model", "_push_from_checkpoint", "_save"):
    setattr(Trainer, f"{name}_anew", getattr(Trainer, name))
    delattr(Trainer, name)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import hf_erasure
for warning in said:
    if "hf_erasure wraps" in str(warning.message):
        print(warning.message)
import peft
from peft import PeftModel
del PeftModel.from_pretrained
try:
    hf_erasure.patches.install()
except ImportError as error:
    print(error)
"""


def test_renamed_methods_of_trainer_leave_the_rest_at_work(tmp_path: Path):
    """Another release may name Trainer's private methods differently, and an import must not fail because of that."""
    done = run(run_code, RENAMED, folder=tmp_path, kind=TRANSFORMERS)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    named = [line.partition("Trainer.")[2].partition(",")[0] for line in lines]
    assert sorted(named) == ["_load_best_model", "_push_from_checkpoint", "_save"], done.stdout
    assert all("does not have. What does not work here: " in line for line in lines)
    assert last.startswith("hf_erasure relies on peft.peft_model.PeftModel.from_pretrained, which peft"), last
