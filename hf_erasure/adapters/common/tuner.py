"""The base class of the tuners of both kinds: it attaches children to modules, and a failure leaves no trace."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import regex  # type: ignore[import-untyped]
import torch
from peft import PeftConfig, PeftModel, PeftModelForQuestionAnswering, PeftModelForTokenClassification
from peft.functional import delete_adapter as delete_from_layers
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel

from hf_erasure.models.model import base_of

from ..loading.fingerprint import check_base
from . import acting
from .config import PATTERN_FIELDS, ChildConfig, short
from .files import UNCHECKED
from .layer import AdapterChild, RowAdapters, adapter_children, child_configs, is_child

# PEFT's name for a row without an adapter.
_NO_ADAPTER = "__base__"
# The index of a layer in a module's name, after the name of the list of layers.
_INDEX = re.compile(r"(?:^|\.)(?P<list>[^.]*)\.(?P<index>\d+)(?:\.|$)")
# A list may have this many names more than the model has modules, since it may be made for a model with more layers.
_SPARE_NAMES = 10_000
# How long one match may take, in seconds; a match of an ordinary pattern takes microseconds.
_SECONDS_A_MATCH = 0.5
# How long all matches of one field in a model may take together, in seconds of processor time.
_SECONDS_A_MODEL = 5.0


# The heads that two of PEFT's task classes add to modules_to_save after they have called `PeftModel.__init__`, which is
# too late to keep an adapter off the heads.
_HEADS: dict[type[PeftModel], tuple[str, ...]] = {
    PeftModelForTokenClassification: ("classifier", "score"),
    PeftModelForQuestionAnswering: ("qa_outputs",),
}


class ChildTuner(BaseTuner):
    """A tuner that adds a child to every targeted module; the modules themselves stay in place."""

    tuner_layer_cls: type[AdapterChild]
    find_default: Callable[[nn.Module], list[str]]  # the names of the modules for `target_modules=None`
    _find_word: Callable[[Any], list[str]]  # the names of the modules for a word, from the configuration with it
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  as in every tuner of PEFT

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if adapter_children(model, adapter_name):
            raise ValueError(
                f"adapter_name={adapter_name!r} is the name of an adapter that is there already. Choose another name, "
                "or delete that adapter first."
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    # ---- attaching ---------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter; a failure leaves the model as it was."""
        # The adapter gets a copy: fitting writes into it, and the caller may use one configuration for several models.
        config: Any = copy.deepcopy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        if config.modules_to_save:  # PEFT's task classes add their heads once more for every adapter
            config.modules_to_save = list(dict.fromkeys(config.modules_to_save))
        try:
            undone = acting.undone_on_failure(model, adapter_name, is_ours=True, is_new=True)
            with undone, torch.inference_mode(False), torch.no_grad():
                copies = acting.ActiveCopies(model)
                if UNCHECKED.get():
                    raise ValueError("The adapter's files could not be checked before they are loaded: try again.")
                _check_new(config, adapter_name, model)
                is_word = str(config.target_modules).lower() in config.words
                # The modules that a word stood for are known before the fit.
                if config.fitted or (config.fitted_modules and not is_word):
                    check_base(model, config)
                    if config.target_modules is None or is_word:  # PEFT would replace None by its own default
                        config.target_modules = exact_targets(list(config.fitted_modules), model)
                        config.has_default_targets |= is_word
                elif config.revision is None:
                    # The revision, like the name beside it, is that of the base model which was downloaded.
                    config.revision = getattr(getattr(model, "config", None), "_commit_hash", None)
                if kwargs.get("state_dict") is not None:
                    # In a key of a state dict, PEFT takes the text before the prefix for the name of the target. Here
                    # that is the child, so the child's name is removed.
                    child, state_dict = f".{self.tuner_layer_cls.child_name}.{self.prefix}", kwargs["state_dict"]
                    state_dict = {key.replace(child, f".{self.prefix}"): value for key, value in state_dict.items()}
                    # Of the modules that share an eraser only one has tensors; the others use its tensors.
                    own, sites = {key.partition(f".{self.prefix}")[0] for key in state_dict}, config.fitted_modules
                    sharers = (name for name, site in sites.items() if site in own and name not in own)
                    kwargs["state_dict"] = state_dict | {f"{name}.{self.prefix}": None for name in sharers}
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                # The new adapter's copies start from the copies that acted, except those of its own method.
                same_method = [name for name, other in self.peft_config.items() if other.peft_type == config.peft_type]
                for place, former in copies.acting.items():
                    trained: Any = copies.wrappers[place]._modules.get("modules_to_save")
                    if trained is not None and adapter_name in trained and former not in same_method:
                        trained[adapter_name].load_state_dict(trained[former].state_dict())
                acting.refuse_copies(model, adapter_name)
                for wrapper in acting.auxiliary_wrappers(model).values():
                    # PEFT switches copies before the new one is there, so none may act.
                    is_on = adapter_name in wrapper._adapters and adapter_name in self.active_adapters
                    if is_on and not wrapper._adapters.intersection(wrapper.active_adapters):
                        wrapper._active_adapter = [adapter_name]
                # A `state_dict` may choose some of the modules, so the others are not required then.
                wanted = list(config.fitted_modules) if kwargs.get("state_dict") is None else []
                self._check_complete(config, adapter_children(model, adapter_name), wanted)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        """Replace `target_modules=None` and words by the modules that they stand for."""
        if peft_config.fitted:
            return peft_config
        targets = peft_config.target_modules
        text, names = targets.lower() if isinstance(targets, str) else "", None
        if targets is None:
            names = keep_layers(self.find_default(self.model), peft_config)
        elif text in peft_config.words:
            names = self._find_word(peft_config)
        elif text == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            peft_config = _maybe_include_all_linear_layers(peft_config, self.model)
        if names is not None:
            peft_config.target_modules = exact_targets(names, self.model)
            if isinstance(peft_config.target_modules, str):
                peft_config.layers_to_transform = peft_config.layers_pattern = None  # they are in the expression
        if not peft_config.target_modules:
            raise ValueError(
                f"target_modules={targets!r} with layers_to_transform={peft_config.layers_to_transform} stands for no "
                f"module of {type(self.model).__name__}: name modules, or leave both out, which takes the default."
            )
        peft_config.has_default_targets |= peft_config.target_modules is not targets
        return peft_config

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        super()._check_tied_modules(model, resolve_patterns(peft_config, *EMBEDDING_LAYER_NAMES))

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        if is_child(key):
            return False
        known = peft_config.fitted_modules
        if key in known:
            return True
        # For the other modules PEFT's own answer is returned only if it means "excluded", or PEFT would warn wrongly.
        found = BaseTuner._check_target_module_exists(resolve_patterns(peft_config, key), key)
        return False if known and found else found

    def _create_and_replace(self, peft_config: Any, adapter_name: str, target: Any, *args: Any, **kwargs: Any) -> None:
        current_key: str = kwargs["current_key"]
        arguments = self._child_arguments(peft_config, target, current_key)
        if arguments is None:
            return
        kind = self.tuner_layer_cls
        child: Any = target._modules.get(kind.child_name)
        if not isinstance(child, kind):
            child = kind(target, current_key)
            target.add_module(kind.child_name, child)
        elif child.path != current_key:
            raise ValueError(
                f"{current_key!r} has an adapter already, {child.adapters}, of a model in which it is called "
                f"{child.path!r}: one of the two models is a part of the other. Load both adapters into the same one: "
                "save the one that is there, delete it, and load it into this model."
            )
        child.add_adapter(adapter_name, peft_config, *arguments)
        child.set_adapter(self.active_adapters)

    def _child_arguments(self, config: Any, target: nn.Module, path: str) -> tuple[Any, ...] | None:
        """More arguments for the child's `add_adapter`; None where the adapter has nothing to do at a target."""
        lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
        if isinstance(target, lists) or type(target).forward is nn.Module.forward:
            raise ValueError(
                f"{path!r} is a {type(target).__name__}, which the model never calls itself, so no adapter can be "
                rf"put on it: name the modules in it, as in target_modules=r'{path}\.\d+'."
            )
        return ()

    def _check_complete(self, config: Any, children: list[AdapterChild], wanted: list[str]) -> None:
        """Raise an error if a module where the adapter was fitted got no child: a part of it would be missing."""
        kind, places = type(self.model).__name__, {child.path for child in children}
        if not children:  # some releases of PEFT raise this error only for a model's first adapter
            raise ValueError(f"target_modules={config.target_modules!r} not found in {kind}.")
        left_out = [name for name in wanted if name not in places]
        if left_out:
            raise ValueError(
                f"The {config.described} acts at {left_out[0]!r} and {len(left_out) - 1} other modules that no adapter "
                f"can be put on in this {kind}."
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the children that hold no other adapter."""
        for child in self._children():  # before PEFT forgets its configuration
            child.refuse_if_merged(adapter_name)
        super().delete_adapter(adapter_name)

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Switch adapters of this kind on. PEFT would also switch trained modules of other methods, which stay on."""
        if not acting.auxiliary_wrappers(self.model):
            super().set_adapter(adapter_name, *args, **kwargs)
            return
        names, copies = acting.check_single_copy(self.model, adapter_name), acting.ActiveCopies(self.model)
        configs = {**acting.adapters_now(self.model).configs, **self.peft_config}
        super().set_adapter(adapter_name, *args, **kwargs)
        kinds = {acting.kind_of(configs[name]) for name in names if name in configs}
        copies.keep_former(names, lambda on: on in configs and acting.kind_of(configs[on]) not in kinds)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Raise a `ValueError` that says what to do instead: a weighted sum of erasers erases none of the concepts."""
        raise ValueError(
            f"{adapters} cannot be added with weights. hf_erasure.combine_adapters(model, names, into) makes one "
            f"erasure of several. GRADIEND adapters act together: model.base_model.set_adapter({adapters}), each with "
            "the strength that GradiendAdapter.of(model, name).steer(…) sets."
        )

    def _children(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    # ---- batches whose rows have different adapters ------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` to the children; `PeftModel` calls this around `forward` and `generate`."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        children = self._children()
        if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"adapter_names={names!r} is not a list of names: give one for each row of the batch.")
        known = {name for child in children for name in child.adapters}
        unknown = sorted({*names} - known - {_NO_ADAPTER})
        if unknown:
            raise ValueError(
                f"adapter_names has {unknown}, but the adapters here are {sorted(known)}; a row without an adapter is "
                f"{_NO_ADAPTER!r}."
            )
        merged = sorted({name for child in children for name in child.merged_adapters})
        if merged:
            raise ValueError(
                f"adapter_names cannot be followed while {merged} are merged: call unmerge_adapter() first."
            )
        rows = RowAdapters(tuple(names), int(kwargs.get("num_beams") or 1))
        self._check_mixed_batch(rows)
        for child in children:
            child.rows = rows
        try:
            yield
        finally:
            for child in children:
                child.rows = None

    def _check_mixed_batch(self, rows: RowAdapters) -> None:
        """Raise a `ValueError` that says what to do instead, where rows cannot have adapters of their own."""

    # ---- merging -----------------------------------------------------------------------------------------------------

    def unmerge_adapter(self) -> None:
        """Unmerge the adapters of this kind; PEFT would unmerge those of all methods, whichever of them was merged."""
        for child in self._children():
            child.unmerge_weights()

    def _adapters_to_merge(self, names: list[str] | None) -> list[str]:
        """The given adapters, by default all that act, that are not merged yet; warns when all are merged."""
        children = self._children()
        if names is None:
            # Sticky adapters that are not active act too, before the active ones.
            sticky = {name for child in children for name, on in child.sticky_adapters.items() if on}
            known = dict.fromkeys([*self.peft_config, *sorted(sticky)])
            # The layers know it; the model inside may have been given another adapter than this tuner.
            active = children[0].active_adapters if children else self.active_adapters
            names = [*(name for name in known if name in sticky and name not in active), *active]
        elif unknown := [name for name in names if name not in acting.adapters_now(self.model).loaded]:
            here = sorted({name for child in children for name in child.adapters})
            raise ValueError(
                f"adapter_names={names!r}: there is no {unknown[0]!r} to merge; the adapters here are {here}."
            )
        merged = {name for child in children for name in child.merged_adapters}
        left = [name for name in dict.fromkeys(names) if name not in merged]
        if merged and not left:
            acting.warn_user("All adapters are already merged, nothing to do.")
        return left

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **merging: Any,
    ) -> Any:
        children = self._children()
        own = {name for child in children for name in child.adapters}
        if merge:
            self.merge_adapter(adapter_names, safe_merge=safe_merge, **merging)
        for child in children:
            if not merge and child.merged:
                child.unmerge_weights()
            child.forget_originals()
            child.detach()
        for name, wrapper in reversed(acting.auxiliary_wrappers(self.model).items()):
            if wrapper._adapters <= own and not adapter_children(wrapper):
                module = wrapper.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
                self.model.set_submodule(name, module)
            for adapter in wrapper._adapters & own if wrapper._adapters - own else ():
                wrapper.delete_adapter(adapter, [])
        acting.update_model(self.model)
        configs: dict[str, Any] = self.peft_config
        # Adapters of the other kind and of other methods stay.
        left = {
            name: config
            for name, config in configs.items()
            if name not in own and (adapter_children(self.model, name) or not isinstance(config, ChildConfig))
        }
        if left:
            self.model.peft_config = left
        elif hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


# ---- attaching beside adapters of other methods ----------------------------------------------------------------------


def inject_adapter(
    original: Callable, tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """`BaseTuner.inject_adapter`; warns of adapters that go off, and moves children of wrapped modules outwards."""
    if not isinstance(tuner, ChildTuner) and not adapter_children(model):
        return original(model, adapter_name, *args, **kwargs)
    config: Any = tuner.peft_config[adapter_name]
    copied, tokens = (getattr(config, name, None) or () for name in ("modules_to_save", "trainable_token_indices"))
    if tokens and not isinstance(tokens, dict):  # a list is of the input embeddings
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        tokens = [name for name, module in model.named_modules() if module is embeddings]
    try:
        if getattr(config, "layer_replication", None):
            raise ValueError(
                f"{adapter_name!r} cannot be added: its layer_replication gives layers other numbers, and this model "
                "has adapters at some of them. Add it first; then add and fit the others on the model with more layers."
            )
        acting.refuse_copies(model, adapter_name, [*copied, *tokens])
    except ValueError:
        tuner.peft_config.pop(adapter_name)
        raise
    with acting.warn_of_switched_off(model, adapter_name), acting.undone_on_failure(model, adapter_name):
        original(model, adapter_name, *args, **kwargs)
        acting.move_to_wrappers(model)
        acting.update_model(model)


def make_peft_model(
    original: Callable,
    wrapped: PeftModel,
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    **kwargs: Any,
) -> None:
    """`PeftModel.__init__`: an adapter gets a copy of the configuration, with the head that a task class will add."""
    if isinstance(peft_config, ChildConfig):
        heads = next((names for kind, names in _HEADS.items() if isinstance(wrapped, kind)), ())
        with acting.undone_on_failure(model, adapter_name, is_ours=True):
            config = copy.copy(peft_config)
            if heads:
                config.modules_to_save = [*(config.modules_to_save or ()), *heads]
            original(model, config, adapter_name, **kwargs)
    else:
        original(model, peft_config, adapter_name, **kwargs)


def delete_adapter(original: Callable, model: Any, adapter_name: str) -> None:
    """`PeftModel.delete_adapter`, which forgets the configuration of any adapter, but deletes those of one method."""
    config, base, tuner = model.peft_config.get(adapter_name), base_of(model), model.base_model
    kind: Any = config.peft_type if config is not None else None
    if kind in (None, model.peft_type) or not adapter_children(base):
        original(adapter_name)
        if model.active_adapter == adapter_name and adapter_children(base):
            # The tuner has no adapter left; a forward pass reads the configuration of the active one.
            model.active_adapter = next(iter(model.peft_config), adapter_name)
        return
    for child in adapter_children(base, adapter_name):
        child.refuse_if_merged(adapter_name)
    delete_from_layers(base, adapter_name, PEFT_TYPE_TO_PREFIX_MAPPING[kind])
    del model.peft_config[adapter_name]
    acting.update_model(base)
    if adapter_name in model.active_adapters:  # the layers of the tuner have switched another adapter on
        own: Any = (layer.active_adapters for layer in base.modules() if isinstance(layer, tuner.tuner_layer_cls))
        tuner.active_adapter = next(own, [])
        model.active_adapter = next(iter(tuner.active_adapter), adapter_name)


def unload(original: Callable, tuner: BaseTuner, *args: Any, **kwargs: Any) -> Any:
    """`unload` of another method removes its wrappers; the children go to the modules that take their places."""
    model, configs = tuner.model, child_configs(tuner)
    children = adapter_children(model)
    if isinstance(tuner, ChildTuner) or not children:
        return original(*args, **kwargs)
    try:
        result = original(*args, **kwargs)
    finally:
        acting.move_to_wrappers(model, children)
    if configs:
        model.peft_config = configs
    return result


def exact_targets(names: list[str], model: nn.Module) -> Any:
    """`target_modules` that match only these modules; in a list, PEFT matches `norm` with every `….norm` too."""
    suffixes = tuple(f".{name}" for name in names)
    if any(name.endswith(suffixes) and name not in names for name, _ in model.named_modules()):
        return "|".join(re.escape(name) for name in names)
    return set(names)


def keep_layers(names: list[str], config: Any) -> list[str]:
    """Keep the names whose first layer index is among `layers_to_transform`, as PEFT does; None keeps all."""
    layers, pattern = config.layers_to_transform, config.layers_pattern
    wanted = {layers} if layers is None or isinstance(layers, int) else set(layers)
    lists = [pattern] if isinstance(pattern, str) else list(pattern or [])
    found = {name: [m for m in _INDEX.finditer(name) if not lists or m["list"] in lists] for name in names}
    return [n for n, at in found.items() if layers is None or (at and int(at[0]["index"]) in wanted)]


def resolve_patterns(config: Any, *names: str) -> Any:
    """A copy of a configuration in which each pattern is replaced by the set of those `names` that it matches."""
    plain, began = copy.copy(config), time.process_time()
    for key in PATTERN_FIELDS:
        value = getattr(config, key, None)
        if not isinstance(value, str) or value.lower() in ("all-linear", *config.words):
            continue
        setattr(plain, key, set())
        try:
            for name in names:
                if regex.fullmatch(value, name, timeout=_SECONDS_A_MATCH) is not None:
                    getattr(plain, key).add(name)
                if time.process_time() - began > _SECONDS_A_MODEL:
                    raise TimeoutError
        except TimeoutError as error:
            raise ValueError(
                f"The regular expression {key}={short(value)} takes longer than {_SECONDS_A_MATCH:g} s on a name, or "
                f"{_SECONDS_A_MODEL:g} s on all names of this model: write one without nested repetitions, or a list "
                "of names."
            ) from error
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"{key}={short(value)} is not a regular expression: {error}.") from error
    return plain


def _check_new(config: ChildConfig, name: str, model: nn.Module) -> None:
    """Refuse tensor parallelism, a name that cannot be used, and lists and patterns that take PEFT too long."""
    if any((getattr(m, "tp_size", None) or 1) > 1 for m in model.modules() if isinstance(m, PreTrainedModel)):
        raise ValueError(
            f"{type(model).__name__} is split by tensor parallelism (tp_plan): each process has a part of a layer, and "
            "an adapter needs the whole layer. Load the model without tp_plan, attach, fit and merge the adapter "
            "there, and load the merged checkpoint with tp_plan."
        )
    for kind in AdapterChild.__subclasses__():
        prefix = f"{kind.child_name}_"
        if "." in name or prefix in name or name in ("", kind.child_name):
            raise ValueError(
                f"adapter_name={name!r} cannot be used: it becomes part of state-dict keys, so it must not be empty, "
                f"contain a dot, be {kind.child_name!r} or contain {prefix!r}."
            )
    if set(name) & set("/\\\0"):
        raise ValueError(f"adapter_name={name!r} cannot be used: it names a folder when the adapter is saved.")
    modules = [path for path, _ in model.named_modules()]
    if any(name in path.split(".") for path in modules):
        raise ValueError(
            f"adapter_name={name!r} cannot be used: {type(model).__name__} has modules of that name, and PEFT would "
            "leave their tensors out when it saves any other adapter. Choose another name."
        )
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        listed = getattr(config, key, None) or ()
        if not isinstance(listed, str) and len(listed) > len(modules) + _SPARE_NAMES:
            raise ValueError(
                f"{key} names {len(listed)} modules, and this {type(model).__name__} has {len(modules)} in all: the "
                "configuration is damaged, or was made for another model."
            )
    resolve_patterns(config, *modules)
