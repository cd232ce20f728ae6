"""Adding, switching, deleting and merging beside adapters of other methods, where PEFT and transformers offer no hook.

They do not undo a failed `add_adapter`, do not say that adding one adapter switched another off, and do not know
children that hang on their modules. Each function here is called in the place of one of theirs, calls it, and adds only
that; without an adapter of this package in the model it does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel, PeftModelForQuestionAnswering, PeftModelForTokenClassification
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .common.acting import all_configs, kind_of, naming_what_goes_off, say_which_copies_went_off
from .common.config import ChildConfig
from .common.layer import adapter_children, child_configs
from .common.model_state import (
    ActiveCopies,
    auxiliary_wrappers,
    check_one_copy,
    enable_copies,
    remove_empty_layers,
    set_by_hand,
    undone_on_failure,
)
from .common.tuner import ChildTuner, move_inside_wrappers, out_of_sight, refuse_copies, rehome_layers

# The heads that PEFT adds to modules_to_save after it has attached an adapter, which is too late to keep it off them.
_LATE_HEADS: dict[type[PeftModel], tuple[str, ...]] = {
    PeftModelForTokenClassification: ("classifier", "score"),
    PeftModelForQuestionAnswering: ("qa_outputs",),
}


# ---- adding ----------------------------------------------------------------------------------------------------------


def add_adapter(original: Callable, model: Any, adapter_config: Any, adapter_name: str | None = None) -> None:
    """`add_adapter` of a transformers model: undone if it fails; trained modules of other methods act on."""
    name, ours = adapter_name or "default", isinstance(adapter_config, ChildConfig)
    if not ours and isinstance(adapter_config, PeftConfig) and not adapter_children(model):
        original(adapter_config, adapter_name)
        return

    def stays(on: str, wrapper: AuxiliaryTrainingWrapper) -> bool:
        is_concerned = ours or isinstance(all_configs(model).get(on), ChildConfig)
        return on != "" and is_concerned and name not in wrapper._adapters

    copies = ActiveCopies(model)
    with (
        undone_on_failure(model, name, is_ours=ours or not isinstance(adapter_config, PeftConfig)),
        naming_what_goes_off(model, name),
    ):
        original(adapter_config, adapter_name)
        # What else was on is off now, but for trained modules: without them untrained ones would answer.
        copies.restore(trained=False, where=stays)


def make_peft_model(
    original: Callable,
    wrapped: PeftModel,
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    **kwargs: Any,
) -> None:
    """`PeftModel(…)`: what the class of a task adds to the configuration goes into a copy."""
    if not isinstance(peft_config, ChildConfig):
        original(model, peft_config, adapter_name, **kwargs)
        return
    with undone_on_failure(model, adapter_name, is_ours=True):
        original(model, peft_config.copied(_LATE_HEADS.get(type(wrapped), ())), adapter_name, **kwargs)


def inject_adapter(
    original: Callable, tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """`BaseTuner.inject_adapter`: children of modules that it wraps move out to the wrappers."""
    if not isinstance(tuner, ChildTuner) and not adapter_children(model):
        original(model, adapter_name, *args, **kwargs)
        return
    try:
        refuse_copies(model, adapter_name, getattr(tuner.peft_config[adapter_name], "modules_to_save", None) or ())
    except ValueError:
        tuner.peft_config.pop(adapter_name)
        raise
    with naming_what_goes_off(model, adapter_name):
        original(model, adapter_name, *args, **kwargs)
        rehome_layers(model)


# ---- switching -------------------------------------------------------------------------------------------------------


def set_adapter(original: Callable, model: Any, adapter_name: list[str] | str) -> None:
    """`set_adapter` of a transformers model, which stops halfway at a trained module that lacks one of the names."""
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    if not adapter_children(model) or not auxiliary_wrappers(model):
        return original(adapter_name)
    check_one_copy(model, names)
    before = ActiveCopies(model).on
    with set_by_hand(model, names):
        original(adapter_name)
    say_which_copies_went_off(model, before)


def enable_adapters(original: Callable, model: Any) -> None:
    """`enable_adapters` of a transformers model, which forgets trained modules."""
    original()
    if adapter_children(model):
        enable_copies(model)


def set_adapter_of_method(original: Callable, tuner: BaseTuner, adapter_name: Any, *args: Any, **kwargs: Any) -> None:
    """`BaseTuner.set_adapter` switches layers of one method, but trained modules of all: those of others stay."""
    model = tuner.model
    if not adapter_children(model):
        original(adapter_name, *args, **kwargs)
        return
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    configs = {**all_configs(model), **tuner.peft_config}
    method = {kind_of(configs[name]) for name in names if name in configs}

    def stays(on: str, wrapper: AuxiliaryTrainingWrapper) -> bool:
        is_concerned = isinstance(tuner, ChildTuner) or isinstance(configs.get(on), ChildConfig)
        is_other = on in configs and kind_of(configs[on]) not in method
        return is_concerned and is_other and not wrapper._adapters & set(names)

    if isinstance(tuner, ChildTuner):
        check_one_copy(model, names)
    copies = ActiveCopies(model)
    original(adapter_name, *args, **kwargs)
    copies.restore(where=stays)


def delete_adapter(original: Callable, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """PEFT's `delete_adapter`, by which every method deletes: children that are empty then go too."""
    if not adapter_children(model):
        return original(model, adapter_name, *args, **kwargs)
    copies = ActiveCopies(model)
    result = original(model, adapter_name, *args, **kwargs)
    copies.restore(where=lambda on, wrapper: on in wrapper._adapters)
    remove_empty_layers(model)
    return result


# ---- merging ---------------------------------------------------------------------------------------------------------


def merge_or_unmerge(original: Callable, tuner: BaseTuner, *args: Any, **kwargs: Any) -> Any:
    """Another method (ours have their own) merges or unmerges its layers, and no others."""
    with out_of_sight(tuner.model):
        return original(*args, **kwargs)


def unload(original: Callable, tuner: BaseTuner, *args: Any, **kwargs: Any) -> Any:
    """Another method takes its wrappers away: the children that hang on them stay, and so do their configurations."""
    model, configs = tuner.model, child_configs(tuner)
    if isinstance(tuner, ChildTuner) or not adapter_children(model):
        return original(*args, **kwargs)
    move_inside_wrappers(model)
    try:
        result = original(*args, **kwargs)
    finally:
        rehome_layers(model)
    if configs:
        model.peft_config = configs
    return result
