"""Modules that README and docs named by paths which are gone: for one release they are found, and say what is new."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# A module of before → where its names are now, within this package; the first that has a name counts.
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


class _Moved(ModuleType):
    """A module of before; what is taken from it comes from where it is now, with a warning."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for place in MOVED[self.__name__.removeprefix(f"{_PACKAGE}.")]:
                found = getattr(import_module(f"{_PACKAGE}.{place}"), name, None)
                if found is not None:
                    warnings.warn(
                        f"{self.__name__}.{name} has moved: from {_PACKAGE}.{place} import {name}. The path of before "
                        "works in this release, and not in the next.",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    return found
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(Loader):
    """Finds modules of before, after all other finders have not."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """The module of that name; None for all others."""
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty one."""
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: what is in it is looked up when it is asked for."""


def install() -> None:
    """Let paths of before be found; called again, as after a reload, it takes the place of the former call."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
    sys.meta_path.append(_Finder())
