"""The few places where PEFT and transformers offer no hook, wrapped once.

Neither undoes a failed `add_adapter` or `load_adapter`, neither notices a missing or non-finite tensor or looks at
files before it uses them, neither says that adding one adapter switched another off, and neither saves all of an
adapter or nothing. Every wrapper calls the original and adds only that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import peft
import torch
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    PeftModelForQuestionAnswering,
    PeftModelForTokenClassification,
    peft_model,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, transformers_weight_conversion
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import peft as integration
from transformers.integrations.peft import PeftAdapterMixin

from .common.acting import (
    ActiveCopies,
    active_copies,
    all_configs,
    auxiliary_wrappers,
    check_one_copy,
    copies_of_others_kept,
    enable_copies,
    keys_of_own_copies,
    kind_of,
    naming_what_goes_off,
    say_which_copies_went_off,
    set_by_hand,
)
from .common.config import ChildConfig
from .common.fitted_with import comparing_with_fitting
from .common.layer import adapter_children, child_configs, ordinarily
from .common.placement import device_map_of_offloaded, left_in_place
from .common.tuner import (
    ChildTuner,
    move_inside_wrappers,
    out_of_sight,
    refuse_copies,
    rehome_layers,
    remove_adapter,
    remove_empty_layers,
)
from .loading.file_checks import PREFIX, Source, looked_at, with_what_was_fitted
from .loading.key_renaming import conversions_kept, prefix_of, rename_tensors, weight_mapping
from .saved_tensors import adapter_state_dict
from .saving import finish, save_model, save_peft_model
from .wrapping import wrap

_MARK = "hf_erasure.adapters"
# The heads that PEFT adds to modules_to_save after it has attached an adapter, which is too late to keep it off them.
_LATE_HEADS: dict[type[PeftModel], tuple[str, ...]] = {
    PeftModelForTokenClassification: ("classifier", "score"),
    PeftModelForQuestionAnswering: ("qa_outputs",),
}


class _Before:
    """What a failed call must leave as it was."""

    def __init__(self, model: nn.Module, overwritten: str | None = None) -> None:
        self.model = model
        self.loaded = getattr(model, "_hf_peft_config_loaded", None)
        self.names = set(getattr(model, "peft_config", None) or {})
        self.training = [(module, module.training) for module in model.modules()]
        self.trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.active = [(m, m._active_adapter) for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self.trained_copies = ActiveCopies(model)
        children = adapter_children(model)
        self.values = [
            (child, overwritten, tuple(part.clone() for part in child.state_of(overwritten)))
            for child in children
            if overwritten in child.adapters
        ]
        self.ours = {name for child in children for name in child.adapters}
        self.copies = [(tensor, tensor.detach().clone()) for tensor in _saved_tensors(model, overwritten or "")]

    def restore(self, adapter_name: str) -> None:
        """Undo whatever the call did to the model."""
        if adapter_name not in self.names:
            remove_adapter(self.model, adapter_name)
            configs = getattr(self.model, "peft_config", None) or {}
            configs.pop(adapter_name, None)
            if not configs and "peft_config" in self.model.__dict__:
                del self.model.peft_config
        for child, name, state in self.values:
            child.restore_state(name, state)
        with torch.no_grad():
            for tensor, value in self.copies:
                tensor.copy_(value)
        for tuner_layer, active in self.active:
            tuner_layer._active_adapter = active
        self.trained_copies.restore()
        for parameter, required in self.trainable:
            parameter.requires_grad_(required)
        for module, training in self.training:
            module.training = training
        if self.loaded is not None:
            self.model._hf_peft_config_loaded = self.loaded


def install() -> None:
    """Wrap the seams; called again, as after a reload, it puts the wrappers of now in the place of the former."""
    verbs = [(PeftAdapterMixin, "add_adapter"), (PeftAdapterMixin, "load_adapter"), (PeftModel, "add_adapter")]
    for owner, verb in [*verbs, (PeftModel, "load_adapter"), (PeftModel, "from_pretrained")]:
        wrap(owner, verb, ordinarily, f"{_MARK}.ordinarily")
    wrap(PeftAdapterMixin, "add_adapter", _add_adapter, _MARK)
    wrap(PeftAdapterMixin, "load_adapter", _load_adapter, _MARK)
    wrap(PeftAdapterMixin, "delete_adapter", _delete_adapter, _MARK)
    for place in (integration, transformers_weight_conversion):  # where it is differs between releases
        if hasattr(place, "build_peft_weight_mapping"):
            wrap(place, "build_peft_weight_mapping", weight_mapping, _MARK)
    for kind in {PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        wrap(kind, "__init__", _peft_init, _MARK)
    wrap(peft_model, "set_peft_model_state_dict", _set_peft_model_state_dict, _MARK)
    wrap(PeftAdapterMixin, "set_adapter", _set_adapter, _MARK)
    wrap(PeftAdapterMixin, "enable_adapters", _enable_adapters, _MARK)
    wrap(PeftModel, "load_adapter", _peft_load_adapter, _MARK)
    wrap(PeftModel, "from_pretrained", _peft_from_pretrained, _MARK)
    wrap(PeftModel, "save_pretrained", save_peft_model, _MARK)
    wrap(PreTrainedModel, "save_pretrained", save_model, _MARK)
    for place in (peft, peft.utils, peft.utils.save_and_load, peft.peft_model):
        wrap(place, "get_peft_model_state_dict", adapter_state_dict, _MARK)
    wrap(BaseTuner, "inject_adapter", _inject_adapter, _MARK)
    wrap(BaseTuner, "set_adapter", _set_adapter_of_method, _MARK)
    wrap(BaseTuner, "delete_adapter", _delete_adapter_of_method, _MARK)
    wrap(BaseTuner, "merge_adapter", _merge_or_unmerge, _MARK)
    wrap(BaseTuner, "unmerge_adapter", _merge_or_unmerge, _MARK)
    wrap(BaseTuner, "unload", _unload, _MARK)
    wrap(BaseTuner, "merge_and_unload", _unload, _MARK)


def _add_adapter(original: Callable, model: Any, adapter_config: Any, adapter_name: str | None = None) -> None:
    name, before = adapter_name or "default", _Before(model)
    ours = isinstance(adapter_config, ChildConfig)
    try:
        with naming_what_goes_off(model, name):
            original(adapter_config, adapter_name)
            # What else was on is off now, but for trained modules: without them untrained ones would answer.
            before.trained_copies.restore(
                trained=False, where=lambda on, wrapper: _stays(model, on, wrapper, name, ours=ours)
            )
    except BaseException:
        # Another method's adapter is PEFT's to clean up.
        if ours or not isinstance(adapter_config, PeftConfig):
            before.restore(name)
        elif adapter_children(model):
            before.trained_copies.restore()
        raise


def _stays(model: nn.Module, on: str, wrapper: AuxiliaryTrainingWrapper, newcomer: str, *, ours: bool) -> bool:
    """Whether a copy that acted acts on beside a newcomer of another method, one of which is of this package."""
    is_concerned = ours or isinstance(all_configs(model).get(on), ChildConfig)
    return on != "" and is_concerned and newcomer not in wrapper._adapters


def _set_adapter(original: Callable, model: Any, adapter_name: list[str] | str) -> None:
    """The original tells all modules all names, and stops halfway at a module of `modules_to_save` that lacks one."""
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    if not adapter_children(model) or not auxiliary_wrappers(model):
        return original(adapter_name)
    check_one_copy(model, names)
    before = active_copies(model)
    with set_by_hand(model, names):
        original(adapter_name)
    say_which_copies_went_off(model, before)


def _enable_adapters(original: Callable, model: Any) -> None:
    original()
    if adapter_children(model):
        enable_copies(model)


def _set_adapter_of_method(original: Callable, tuner: BaseTuner, adapter_name: Any, *args: Any, **kwargs: Any) -> None:
    """PEFT switches the layers of one method, but the trained modules of all: those of others stay as they are."""
    model = tuner.model
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


def _load_adapter(
    original: Callable,
    model: Any,
    peft_model_id: Any = None,
    adapter_name: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    before = _Before(model)
    name = adapter_name or "default"
    call = inspect.signature(original).bind(peft_model_id, adapter_name, *args, **kwargs)
    given, config = call.arguments, call.arguments.get("peft_config")
    try:
        with naming_what_goes_off(model, name), comparing_with_fitting(model, name):
            looking = _looked_at(model, given)
            with looking as given["peft_model_id"], device_map_of_offloaded(model), conversions_kept(model, name):
                result = original(*call.args, **call.kwargs)
            _keep_given(model, name, config)
            _check_loaded(model, name)
            _check_copies(model, name)
    except BaseException as error:
        if _is_ours(model, name):
            before.restore(name)
            _explain_damage(error, peft_model_id)
        raise
    return result


def _looked_at(model: nn.Module, given: dict[str, Any]) -> AbstractContextManager[Any]:
    """Look at the files that `load_adapter` of a transformers model is about to read; none when it is given tensors."""
    load_config, more = given.get("load_config"), given.get("kwargs", {})
    place = given.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
    if place is None or given.get("adapter_state_dict") is not None:
        return nullcontext(given.get("peft_model_id"))
    options = (getattr(load_config, "download_kwargs", None), more.get("download_kwargs"), given.get("adapter_kwargs"))
    source = Source.of(place, *options, more, given)
    finish(source.folder)
    if isinstance(given.get("peft_config"), ChildConfig):
        given["peft_config"] = with_what_was_fitted(given["peft_config"], source)
    pickled = more.get("use_safetensors", getattr(load_config, "use_safetensors", None)) is False
    return looked_at(model, source, given.get("peft_config"), pickled=pickled)


def _delete_adapter(original: Callable, model: Any, adapter_names: list[str] | str) -> None:
    with copies_of_others_kept(model):
        original(adapter_names)
    remove_empty_layers(model)


def _delete_adapter_of_method(original: Callable, tuner: BaseTuner, adapter_name: str) -> None:
    with copies_of_others_kept(tuner.model):
        original(adapter_name)


def _peft_init(
    original: Callable,
    wrapped: PeftModel,
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    **kwargs: Any,
) -> None:
    """What the class of a task adds to the configuration goes into a copy, as the adapter itself has one."""
    if not isinstance(peft_config, ChildConfig):
        original(model, peft_config, adapter_name, **kwargs)
        return
    before = _Before(model)
    try:
        original(model, peft_config.copied(_LATE_HEADS.get(type(wrapped), ())), adapter_name, **kwargs)
    except BaseException:
        before.restore(adapter_name)
        raise


def _set_peft_model_state_dict(
    original: Callable, model: Any, tensors: dict[str, Tensor], adapter_name: str = "default", *args: Any, **kwargs: Any
) -> Any:
    """An adapter saved without a head, and loaded by a class of PEFT that wants one, is used with the model's own.

    That is the head that was trained with a LoRA, where there is one.
    """
    configs = all_configs(model)
    if not isinstance(configs.get(adapter_name), ChildConfig):
        return original(model, tensors, adapter_name, *args, **kwargs)
    trained = [name for name, config in configs.items() if not isinstance(config, ChildConfig)]
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            own = [module.modules_to_save[other] for other in trained if other in module.modules_to_save]
            for key, value in [*own, module.original_module][0].state_dict().items():
                tensors.setdefault(f"{name}.{key}", value)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    tensors = rename_tensors(tensors, model.peft_config[adapter_name], prefix_of(base), PREFIX)
    with keys_of_own_copies(model, adapter_name):
        return original(model, tensors, adapter_name, *args, **kwargs)


def _peft_load_adapter(
    original: Callable, model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    before = _Before(model, adapter_name)
    # Loading over an adapter would keep the old values of tensors that the file lacks.
    for child in adapter_children(model, adapter_name):
        child.await_values(adapter_name)
    try:
        source, config = Source.of(model_id, kwargs), model.peft_config.get(adapter_name)
        finish(source.folder)
        with naming_what_goes_off(model, adapter_name), comparing_with_fitting(model, adapter_name):
            with looked_at(model, source, config) as place, _staying_in_place(model, place, config, kwargs):
                result = original(place, adapter_name, *args, **kwargs)
            _check_loaded(model, adapter_name)
    except BaseException as error:
        if _is_ours(model, adapter_name):
            before.restore(adapter_name)
            _explain_damage(error, model_id)
        raise
    return result


def _peft_from_pretrained(original: Callable, cls: type, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Weights are loaded after PEFT has injected the adapter and frozen the model, so both are undone here."""
    before = _Before(model)
    call = inspect.signature(original).bind(model, *args, **kwargs)
    given = call.arguments
    try:
        source, config = Source.of(given["model_id"], kwargs), given.get("config")
        finish(source.folder)
        if isinstance(config, ChildConfig):
            given["config"] = with_what_was_fitted(config, source)
        wanted = given.get("config")
        with (
            comparing_with_fitting(model, given.get("adapter_name", "default")),
            looked_at(model, source, wanted) as place,
            _staying_in_place(model, place, wanted, kwargs),
        ):
            given["model_id"] = place
            result = original(*call.args, **call.kwargs)
        _keep_given(result, given.get("adapter_name", "default"), config)
        return result
    except BaseException:
        for name in {n for child in adapter_children(model) for n in child.adapters} - before.ours:
            before.restore(name)
        raise


def _keep_given(model: Any, name: str, config: PeftConfig | None) -> None:
    """The configuration that a caller gave for loading is the adapter's own afterwards, as in PEFT."""
    if isinstance(config, ChildConfig):
        config.__dict__.update(model.peft_config[name].__dict__)
        model.peft_config[name] = config


def _staying_in_place(
    model: nn.Module, model_id: Any, config: PeftConfig | None, kwargs: dict[str, Any]
) -> AbstractContextManager[None]:
    """Keep an offloaded model where it is while PEFT puts an adapter of ours on it."""
    if not hasattr(model, "hf_device_map"):
        return nullcontext()
    if config is None:
        places = ("subfolder", "revision", "cache_dir", "token")
        kind = PeftConfig._get_peft_type(model_id, **{key: kwargs[key] for key in places if key in kwargs})
        ours = issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], ChildConfig)
    else:
        ours = isinstance(config, ChildConfig)
    return left_in_place(model) if ours else nullcontext()


def _inject_adapter(
    original: Callable, tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    try:
        refuse_copies(model, adapter_name, getattr(tuner.peft_config[adapter_name], "modules_to_save", None) or ())
    except ValueError:
        tuner.peft_config.pop(adapter_name)
        raise
    with naming_what_goes_off(model, adapter_name):
        original(model, adapter_name, *args, **kwargs)
        rehome_layers(model)


def _merge_or_unmerge(original: Callable, tuner: BaseTuner, *args: Any, **kwargs: Any) -> Any:
    """Another method (ours have their own) merges its layers, and no others."""
    with out_of_sight(tuner.model):
        return original(*args, **kwargs)


def _unload(original: Callable, tuner: BaseTuner, *args: Any, **kwargs: Any) -> Any:
    """Another method takes its wrappers away: the children that hang on them stay, and so do their configs."""
    if isinstance(tuner, ChildTuner):
        return original(*args, **kwargs)
    model = tuner.model
    configs = child_configs(tuner)
    move_inside_wrappers(model)
    try:
        result = original(*args, **kwargs)
    finally:
        rehome_layers(model)
    if configs:
        model.peft_config = configs
    return result


def _is_ours(model: Any, name: str) -> bool:
    """Whether what failed was an adapter of ours; an adapter of another method is PEFT's to clean up."""
    config = (getattr(model, "peft_config", None) or {}).get(name)
    return config is None or isinstance(config, ChildConfig)


def _explain_damage(error: BaseException, folder: Any) -> None:
    """Say in an exception of a common type what a damaged file means.

    Raises:
        ValueError: In the place of the reader's own exception.
    """
    if isinstance(error, SafetensorError):
        raise ValueError(
            f"The adapter_model.safetensors of {str(folder)!r} is damaged ({error}): copy or download it again."
        ) from error


def _saved_tensors(model: nn.Module, name: str) -> list[Tensor]:
    """An adapter's copies of `modules_to_save`."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    copies = [wrapper.modules_to_save[name] for wrapper in wrappers if name in wrapper.modules_to_save]
    return [tensor for copy in copies for tensor in copy.state_dict(keep_vars=True).values()]


def _check_loaded(model: Any, name: str) -> None:
    for child in adapter_children(model, name):
        child.settle(name)
        child.check_values(name)
    broken = any(
        tensor.device.type != "meta" and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        for tensor in (_saved_tensors(model, name) if _is_ours(model, name) else ())
    )
    if broken:
        raise ValueError(
            f"The modules_to_save={model.peft_config[name].modules_to_save} of adapter {name!r} are not finite: "
            "adapter_model.safetensors holds NaN. Copy or download it again."
        )


def _check_copies(model: Any, name: str) -> None:
    """Older releases of transformers load no `modules_to_save`, and report them as weights that are not needed."""
    wanted = model.peft_config[name].modules_to_save if _is_ours(model, name) else None
    if wanted and "adapter_state_dict_load_map" not in inspect.getsource(integration):
        raise ValueError(
            f"This release of transformers does not load modules_to_save={wanted} with load_adapter: load the adapter "
            "with PeftModel.from_pretrained(model, folder), or use a newer transformers."
        )
