"""Modules that have moved: their old paths, which README and docs named, still work for one release, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module → the modules of this package that have its names now; a name is taken from the first that has it.
MOVED: dict[str, tuple[str, ...]] = {
    "adapters.config": ("adapters", "adapters.erasure.config"),
    "adapters.gradiend_config": ("adapters", "adapters.gradiend.config"),
    "adapters.lora_export": ("adapters", "adapters.merging.export"),
    "erasers.inlp": ("erasers",),
    "erasers.oracle": ("erasers",),
    "erasers.quadratic": ("erasers",),
    "erasers.rlace": ("erasers",),
    "evaluation.treebank": ("evaluation.data",),
    "fitting.combining": ("fitting", "fitting.combine"),
    "fitting.data": ("fitting", "fitting.dataloader"),
    "fitting.erasure": ("fitting", "fitting.fit"),
    "fitting.gradiend.arguments": ("fitting.gradiend",),
    "fitting.gradiend.evaluation": ("fitting.gradiend", "fitting.gradiend.gradients"),
    "fitting.gradiend.language": ("fitting.gradiend", "models.neutral"),
    "fitting.gradiend.templates": ("fitting.gradiend",),
    "fitting.gradiend.words": ("fitting.gradiend",),
    "fitting.occupations": ("recipes", "recipes.occupations"),
    "fitting.probing": ("recipes.erasure",),
    "fitting.recipe": ("recipes", "recipes.erasure"),
    "fitting.recipe_file": ("recipes.schema",),
    "hub.failures": ("hub",),
    "metrics.probe": ("metrics.minimum_description_length", "metrics.linear_leakage"),
    "metrics.scoring": ("models.scorer",),
}
_PACKAGE = __name__.rpartition(".")[0]


class _MovedModule(ModuleType):
    """A module at an old path; a name is taken from the module that has it now, with a warning."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for place in MOVED[self.__name__.removeprefix(f"{_PACKAGE}.")]:
                value = getattr(import_module(f"{_PACKAGE}.{place}"), name, None)
                if value is not None:
                    warnings.warn(
                        f"{self.__name__}.{name} has moved: from {_PACKAGE}.{place} import {name}. The old path works "
                        "in this release, but not in the next.",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    return value
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _MovedFinder(Loader):
    """Finds modules at old paths, if no other finder has found them."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """The specification of a module at an old path; None for all other modules."""
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Create an empty module."""
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: names are looked up when they are first used."""


def install() -> None:
    """Make old paths work; a second call, as after a reload, replaces the finder of the first."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
    sys.meta_path.append(_MovedFinder())
