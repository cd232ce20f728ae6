"""Adding, switching, deleting and merging beside adapters of other methods, where PEFT and transformers offer no hook.

They do not undo a failed `add_adapter`, do not say that adding one adapter switched another off, and do not know
children that hang on their modules. Each function here is called in the place of one of theirs, calls it, and adds only
that; without an adapter of this package in the model it does nothing else.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForQuestionAnswering,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .common.acting import all_configs, naming_what_goes_off, warn_of_copies
from .common.config import ChildConfig
from .common.layer import AdapterChild, adapter_children, child_configs
from .common.model_state import (
    ActiveCopies,
    check_one_copy,
    note_adapters,
    undone_on_failure,
)
from .common.tuner import ChildTuner, move_inside_wrappers, rehome_layers

# The heads that the classes of tasks add to modules_to_save: the first before it calls `PeftModel.__init__`, the others
# afterwards, which is too late to keep an adapter off them.
_HEADS: dict[type[PeftModel], tuple[str, ...]] = {
    PeftModelForSequenceClassification: ("classifier", "score"),
    PeftModelForTokenClassification: ("classifier", "score"),
    PeftModelForQuestionAnswering: ("qa_outputs",),
}


# ---- adding ----------------------------------------------------------------------------------------------------------


def make_peft_model(
    original: Callable,
    wrapped: PeftModel,
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    **kwargs: Any,
) -> None:
    """`PeftModel.__init__`: what the class of a task adds to the configuration goes into a copy."""
    if isinstance(peft_config, ChildConfig):
        heads = next((names for kind, names in _HEADS.items() if isinstance(wrapped, kind)), ())
        if isinstance(wrapped, PeftModelForSequenceClassification):
            peft_config.forget_modules_to_save(len(peft_config.modules_to_save or ()) - len(heads))
        with undone_on_failure(model, adapter_name, is_ours=True):
            original(model, peft_config.copied(heads), adapter_name, **kwargs)
        tuner: Any = wrapped.base_model
        tuner.callers = peft_config, len(peft_config.modules_to_save or ())
    else:
        original(model, peft_config, adapter_name, **kwargs)


# ---- switching -------------------------------------------------------------------------------------------------------


def set_adapter(original: Callable, model: Any, adapter_name: list[str] | str) -> None:
    """`set_adapter` of a transformers model, which stops halfway at a trained module that lacks one of the names.

    After an adapter was added, by `add_adapter`, what goes off is named, and trained modules of other methods act on:
    without them untrained ones would answer.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    if not adapter_children(model):
        return original(adapter_name)
    copies, configs = ActiveCopies(model), all_configs(model)
    if copies.wrappers:
        check_one_copy(model, names)
        note_adapters(model)  # a class of a task may have added its head since
    ours = any(isinstance(configs.get(name), ChildConfig) for name in names)
    # `add_adapter` switches its newcomer on last, as a user would: only the calls that are running tell.
    running = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_name == "add_adapter")
    is_adding = any(frame.f_locals.get("self") is model for frame in running)

    def stays(on: str, wrapper: AuxiliaryTrainingWrapper) -> bool:
        is_concerned = ours or isinstance(configs.get(on), ChildConfig)
        return on != "" and is_concerned and not wrapper._adapters & set(names)

    with naming_what_goes_off(model, names[0]) if is_adding else nullcontext():
        original(adapter_name)
        for wrapper in copies.wrappers.values():
            wrapper.set_adapter(names)
        if is_adding:
            copies.restore(trained=False, where=stays)
    if not is_adding:
        warn_of_copies(model, copies.on)


# ---- merging ---------------------------------------------------------------------------------------------------------


@contextmanager
def onload_layer(original: Callable, layer: nn.Module) -> Iterator[None]:
    """Around `merge` and `unmerge` of each layer that another method finds (ours do not call it): not of ours."""
    if not isinstance(layer, AdapterChild):
        with original(layer):
            yield
        return
    methods = dict.fromkeys(("merge", "unmerge"), lambda *args, **kwargs: None)
    vars(layer).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(layer)[name]


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
