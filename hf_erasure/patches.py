"""Every function of PEFT, transformers and Trainer that is wrapped, in one table.

Each of them is a place where they offer no hook. A wrapper calls the original and adds what its line says; without an
adapter of this package in the model it does nothing else. Where a release lacks a function, importing this package
fails with a sentence, or, where the line says what does not work then, warns of that.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from .adapters import saved_tensors, saving
from .adapters.common import acting, tuner
from .adapters.internals import Internal, check_internals, installed
from .adapters.loading import load
from .callbacks import trainer
from .hub import cards, pushing

# On a function that is wrapped: a list with the wrapper of now.
_WRAPPERS = "_hf_erasure_wrappers"


@dataclass(frozen=True, kw_only=True)
class Patch(Internal):
    """A function in whose place a wrapper is called."""

    # Called as `wrapper(original, *args, **kwargs)`. Of a method `original` is bound already, and the instance comes
    # first among the arguments.
    wrapper: Callable[..., Any]
    why: str  # what the original does not do
    without: str = ""  # what does not work where a release lacks it; empty where nothing would
    also: tuple[str, ...] = ()  # other modules in which the same function is

    def why_missing(self) -> str | None:
        """What is not as expected; None when all is, or the function is in another of its modules."""
        missing = super().why_missing()
        return None if any(hasattr(_owner(place), self.name) for place in self.also) else missing


def patches() -> tuple[Patch, ...]:
    """The table, made anew at each call: after a reload the wrappers are other functions."""
    mixin, tuners, models = "transformers.integrations.peft", "peft.tuners.tuners_utils", "peft.peft_model"
    of_transformers = functools.partial(Patch, "transformers", mixin)
    of_tuners, of_models = functools.partial(Patch, "peft", tuners), functools.partial(Patch, "peft", models)
    return (
        of_transformers(
            "PeftAdapterMixin.load_adapter",
            ("peft_model_id", "adapter_name"),
            wrapper=load.load_adapter,
            why="files are not looked at, missing and non-finite values are not noticed, what fails is not undone",
        ),
        of_transformers(
            "PeftAdapterMixin.set_adapter",
            ("adapter_name",),
            wrapper=acting.set_adapter,
            why="it stops halfway at a trained module that not every adapter has a copy of; add_adapter calls it last, "
            "and does not say which adapter went off",
        ),
        of_models(
            "PeftModel.__init__",
            ("model", "peft_config", "adapter_name"),
            wrapper=tuner.make_peft_model,
            why="the class of a task changes the caller's configuration, and what fails afterwards leaves the adapter",
        ),
        of_models(
            "PeftModel.load_adapter",
            ("model_id", "adapter_name"),
            wrapper=load.load_into_peft_model,
            why="as load_adapter of transformers; values that a file lacks stay those of the adapter before, and "
            "it fails where the class of a task wants a head that was not saved",
        ),
        of_models(
            "PeftModel.from_pretrained",
            ("model", "model_id", "config"),
            wrapper=load.peft_model_from_pretrained,
            why="an adapter is attached before its files are looked at",
        ),
        of_models(
            "PeftModel.save_pretrained",
            ("save_directory",),
            wrapper=saving.save_pretrained,
            why="a save that is killed leaves half of an adapter, and one may overwrite another's",
        ),
        Patch(
            "transformers",
            "transformers.modeling_utils",
            "PreTrainedModel.save_pretrained",
            ("save_directory",),
            wrapper=saving.save_pretrained,
            why="as save_pretrained of a PeftModel; and it pushes before the card is written",
        ),
        Patch(
            "peft",
            "peft.utils.save_and_load",
            "get_peft_model_state_dict",
            ("model", "state_dict", "adapter_name"),
            wrapper=saved_tensors.adapter_state_dict,
            why="tensors that are missing are left out without a word",
            also=("peft", "peft.utils", models, "peft.functional"),
        ),
        of_tuners(
            "BaseTuner.inject_adapter",
            ("model", "adapter_name", "state_dict"),
            wrapper=tuner.inject_adapter,
            why="another method wraps modules on which children hang, which then do not see what it adds",
        ),
        of_tuners(
            "onload_layer",
            ("layer",),
            wrapper=tuner.onload_layer,
            why="another method merges every layer that it finds, and takes every merge back, children's too",
        ),
        of_tuners(
            "BaseTuner.unload",
            wrapper=tuner.unload,
            why="another method takes its wrappers away, and the children that hang on them",
        ),
        of_tuners(
            "BaseTuner.merge_and_unload",
            ("safe_merge", "adapter_names"),
            wrapper=tuner.unload,
            why="as unload",
        ),
        Patch(
            "transformers",
            "transformers.utils.hub",
            "create_and_tag_model_card",
            ("repo_id",),
            wrapper=pushing.create_and_tag_model_card,
            why="push_to_hub writes a template over the card of an adapter",
            without="model.push_to_hub replaces the card of an adapter by a template",
            also=("transformers.modeling_utils",),
        ),
        Patch(
            "transformers",
            "transformers.trainer",
            "Trainer.train",
            wrapper=trainer.train,
            why="no event comes before a training whose saves would lose an adapter, nor before a log is reported",
            without="Trainer does not say at its start what its saves will lose, nor log what callbacks measure",
        ),
        Patch(
            "transformers",
            "transformers.trainer",
            "Trainer._save",
            wrapper=trainer.save,
            why="of a model with adapters it saves the active one alone, also where it did not train",
            without="Trainer saves the active adapter alone, without the weights that were trained under it",
        ),
    )


def install(table: tuple[Patch, ...] | None = None) -> None:
    """Wrap the functions; called again, as after a reload, it puts the wrappers of now in the place of the former.

    Args:
        table: What to wrap; `patches()` when None.

    Raises:
        ImportError: Names what a release lacks and this package cannot do without.
    """
    table = patches() if table is None else table
    check_internals(tuple(patch for patch in table if not patch.without))
    relied_on: list[tuple[Internal, str, Patch | None]] = [(patch, patch.without, patch) for patch in table]
    for method in trainer.OWN_METHODS:
        without = f"what hf_erasure does in Trainer.{method} for a model with an adapter of its own"
        relied_on.append((Internal("transformers", "transformers.trainer", f"Trainer.{method}"), without, None))
    for internal, without, patch in relied_on:
        missing = internal.why_missing()
        if missing is not None:
            warnings.warn(
                f"hf_erasure wraps {missing}, which {internal.package} {installed(internal.package)} does not have. "
                f"What does not work here: {without}. Everything else does.",
                stacklevel=3,
            )
        elif patch is not None:
            _wrap(patch)
    name = cards.write_saved_card.__qualname__
    saving.ON_STAGED[:] = [function for function in saving.ON_STAGED if function.__qualname__ != name]
    saving.ON_STAGED.append(cards.write_saved_card)


def _wrap(patch: Patch) -> None:
    path, _, name = f"{patch.module}.{patch.name}".rpartition(".")
    for place in (path, *patch.also):
        owner = _owner(place)
        present = vars(owner).get(name) if owner is not None else None
        if present is None:
            continue
        is_classmethod = isinstance(present, classmethod)
        function = present.__func__ if is_classmethod else present
        wrappers: list[Callable[..., Any]] | None = getattr(function, _WRAPPERS, None)
        if wrappers is not None:
            wrappers[:] = [patch.wrapper]
            continue
        wrapped = _wrapped(function, patch.wrapper, is_method=isinstance(owner, type))
        setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)


def _owner(place: str) -> Any:
    """A class or a module; None where a release does not have it."""
    try:
        return resolve_name(place)
    except (ImportError, AttributeError):
        return None


def _wrapped(function: Any, wrapper: Callable[..., Any], *, is_method: bool) -> Callable[..., Any]:
    wrappers = [wrapper]

    @functools.wraps(function)
    def patched(*args: Any, **kwargs: Any) -> Any:
        bound = args[:1] if is_method else ()
        return wrappers[0](functools.partial(function, *bound), *args, **kwargs)

    setattr(patched, _WRAPPERS, wrappers)
    return patched
