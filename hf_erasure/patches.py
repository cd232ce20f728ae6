"""All functions of PEFT, transformers and Trainer that are wrapped, in one table.

Each is at a place without a hook, and the comment above its line says what it does wrong or lacks. A wrapper calls the
original and mends this; without an adapter of this package in the model it only calls the original. If a release lacks
a function, importing this package raises an error, or warns if the line says (`without`) what then does not work.

Trainer is wrapped when a program imports it, since it imports `datasets`, which takes longer than this package.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

from .adapters import saving
from .adapters.common import acting, tuner
from .adapters.internals import Internal, check_internals
from .adapters.loading import load
from .callbacks import trainer
from .hub import cards, pushing

# An attribute of a wrapped function: a list with its present wrapper.
_WRAPPERS = "_hf_erasure_wrappers"
_TRAINER = "transformers.trainer"


@dataclass(frozen=True, kw_only=True)
class Patch(Internal):
    """A function for which a wrapper is called instead."""

    # It is called as `wrapper(original, *args, **kwargs)`. For a method `original` is bound, and the first argument is
    # the instance. None if the function is only checked for.
    wrapper: Callable[..., Any] | None
    without: str = ""  # what does not work if a release lacks the function; empty if the package cannot work without it
    other_modules: tuple[str, ...] = ()  # other modules that have the same function

    def why_missing(self) -> str | None:
        """The part that is missing; None if none is, or if another of its modules has the function."""
        missing = super().why_missing()
        return None if any(hasattr(_find_owner(place), self.name) for place in self.other_modules) else missing


def patches() -> tuple[Patch, ...]:
    """Make the table, anew at each call: after a reload the wrappers are other functions."""
    return *_library_patches(), *_trainer_patches()


def _library_patches() -> tuple[Patch, ...]:
    models, tuners, mixin = "peft.peft_model", "peft.tuners.tuners_utils", "transformers.integrations.peft"
    return (
        # The class of a task names its head after an adapter is attached, and the adapter stays if it then fails.
        Patch(models, "PeftModel.__init__", ("model", "peft_config", "adapter_name"), wrapper=tuner.make_peft_model),
        # It lacks the same as load_adapter of transformers, below. Values that a file lacks stay those of the former
        # adapter, and it fails if the class of a task needs a head that was not saved.
        Patch(models, "PeftModel.load_adapter", ("model_id", "adapter_name"), wrapper=load.load_into_peft_model),
        # It attaches an adapter before it checks the adapter's files.
        Patch(
            models,
            "PeftModel.from_pretrained",
            ("model", "model_id", "config"),
            wrapper=load.peft_model_from_pretrained,
        ),
        # A save that is killed leaves half of an adapter, and a save may overwrite another adapter.
        Patch(models, "PeftModel.save_pretrained", ("save_directory",), wrapper=saving.save_pretrained),
        # It leaves missing tensors out without an error.
        Patch(
            "peft.utils.save_and_load",
            "get_peft_model_state_dict",
            ("model", "state_dict", "adapter_name"),
            wrapper=saving.adapter_state_dict,
            other_modules=("peft", "peft.utils", "peft.peft_model", "peft.functional"),
        ),
        # Another method wraps modules that have adapters of this package as children, which do not see what it adds.
        Patch(
            tuners, "BaseTuner.inject_adapter", ("model", "adapter_name", "state_dict"), wrapper=tuner.inject_adapter
        ),
        # It forgets the configuration of an adapter of another method, which then acts on and is not saved.
        Patch(models, "PeftModel.delete_adapter", ("adapter_name",), wrapper=tuner.delete_adapter),
        # Another method removes its wrappers, and with them the adapters of this package that are their children.
        Patch(tuners, "BaseTuner.unload", wrapper=tuner.unload),
        # It removes the same as unload.
        Patch(tuners, "BaseTuner.merge_and_unload", ("safe_merge", "adapter_names"), wrapper=tuner.unload),
        # It does not check the files, nor for missing and non-finite values, and does not undo a failed load.
        Patch(mixin, "PeftAdapterMixin.load_adapter", ("peft_model_id", "adapter_name"), wrapper=load.load_adapter),
        # It stops halfway at a trained module of which some adapter has no copy; add_adapter calls it last, and does
        # not say which adapter it switched off.
        Patch(mixin, "PeftAdapterMixin.set_adapter", ("adapter_name",), wrapper=acting.set_adapter),
        # It lacks the same as save_pretrained of a PeftModel, and pushes before the card is written.
        Patch(
            "transformers.modeling_utils",
            "PreTrainedModel.save_pretrained",
            ("save_directory",),
            wrapper=saving.save_pretrained,
        ),
        # push_to_hub replaces the card of an adapter by a template.
        Patch(
            "transformers.utils.hub",
            "create_and_tag_model_card",
            ("repo_id",),
            wrapper=pushing.create_and_tag_model_card,
            without="model.push_to_hub replaces the card of an adapter by a template",
            other_modules=("transformers.modeling_utils",),
        ),
    )


def _trainer_patches() -> tuple[Patch, ...]:
    return (
        # There is no event at which to stop a training whose saves would lose an adapter, nor one before a log is sent.
        Patch(
            _TRAINER,
            "Trainer.train",
            wrapper=trainer.train,
            without="Trainer does not warn at its start of what its saves will lose, nor log what callbacks measure",
        ),
        # It saves only the active adapter of a model with adapters, even if another one was trained.
        Patch(
            _TRAINER,
            "Trainer._save",
            wrapper=trainer.save,
            without="Trainer saves only the active adapter, without the model's own weights that were trained",
        ),
    )


def install() -> None:
    """Wrap the functions of the table; a second call, as after a reload, replaces the wrappers by the present ones."""
    wrap(_library_patches())
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]
    if _TRAINER in sys.modules:
        _wrap_trainer()
    else:
        sys.meta_path.insert(0, _TrainerFinder())
    name = cards.write_saved_card.__qualname__
    saving.ON_STAGED[:] = [f for f in saving.ON_STAGED if f.__qualname__ != name] + [cards.write_saved_card]


class _TrainerFinder:
    """Wraps Trainer as soon as its module has been imported; the other finders find the module."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """The module of Trainer as the other finders find it; None for all other modules."""
        if fullname != _TRAINER:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_wrap(module: ModuleType) -> None:
                execute(module)
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                _wrap_trainer()

            spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap_trainer() -> None:
    without = "what hf_erasure does in Trainer.{} for a model with an adapter of its own"
    names = ((f"Trainer.{name}", without.format(name)) for name in trainer.OWN_METHODS)
    wrap((*_trainer_patches(), *(Patch(_TRAINER, name, wrapper=None, without=effect) for name, effect in names)))


def wrap(table: tuple[Patch, ...]) -> None:
    """Wrap the functions of a table."""
    check_internals(tuple(patch for patch in table if not patch.without))
    for patch in table:
        missing = patch.why_missing()
        if missing is not None:
            warnings.warn(
                f"hf_erasure wraps {missing}, which {patch.package} {version(patch.package)} does not have. "
                f"What does not work here: {patch.without}. Everything else works.",
                stacklevel=3,
            )
        elif patch.wrapper is not None:
            _wrap(patch, patch.wrapper)


def _wrap(patch: Patch, wrapper: Callable[..., Any]) -> None:
    path, _, name = f"{patch.module}.{patch.name}".rpartition(".")
    for place in (path, *patch.other_modules):
        owner = _find_owner(place)
        present = vars(owner).get(name) if owner is not None else None
        if present is None:
            continue
        is_classmethod = isinstance(present, classmethod)
        function = present.__func__ if is_classmethod else present
        wrappers: list[Callable[..., Any]] | None = getattr(function, _WRAPPERS, None)
        if wrappers is not None:
            wrappers[:] = [wrapper]
            continue
        wrapped = _wrapped_function(function, wrapper, is_method=isinstance(owner, type))
        setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)


def _find_owner(place: str) -> Any:
    """A class or a module; None if a release does not have it."""
    try:
        return resolve_name(place)
    except (ImportError, AttributeError):
        return None


def _wrapped_function(function: Any, wrapper: Callable[..., Any], *, is_method: bool) -> Callable[..., Any]:
    wrappers = [wrapper]

    @functools.wraps(function)
    def patched(*args: Any, **kwargs: Any) -> Any:
        bound = args[:1] if is_method else ()
        return wrappers[0](functools.partial(function, *bound), *args, **kwargs)

    setattr(patched, _WRAPPERS, wrappers)
    return patched
