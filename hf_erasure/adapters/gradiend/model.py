"""The tuner that PEFT calls to attach, merge and remove GRADIEND adapters, and the parameters that they change."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from hf_erasure.models.dummy import dummy_batch
from hf_erasure.models.heads import HEAD_MODULES

from ..common.acting import warn_user
from ..common.layer import AdapterChild, RowAdapters, innermost
from ..common.placement import FLOAT_FIRST, is_quantised, quantised_modules
from ..common.tuner import ChildTuner, exact_targets
from .config import GradiendConfig
from .forward import rounded_share
from .layer import GradiendLayer

# The share of its edit that a merge must keep; with less, the merged model differs from the one that was selected.
LEAST_KEPT = 0.9
# The beginnings of the names that models give to inputs of images and sounds.
_MEDIA = ("pixel_", "image", "input_features", "input_values", "audio", "input_image", "input_audio")


def default_owners(model: nn.Module) -> list[str]:
    """Names of the modules that own weights of the base model, without prediction heads and poolers.

    If a language model has towers for images or sounds, only its language side is taken, with a warning.
    """
    body = getattr(model, "base_model", model)
    inside = next((name for name, module in model.named_modules() if module is body), "")
    prefix = f"{inside}." if inside else ""
    if towers := [f"{prefix}{name}" for name in _towers(model, body)]:
        warn_user(
            f"target_modules=None leaves out {towers}, which texts alone do not reach: the language side is the "
            "default. To include others, name all modules whose weights the feature may change."
        )
    tower_prefixes = tuple(f"{name}." for name in towers)
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    names = []
    for name, module in base_modules(model):
        parts = name.split(".")
        if not name or not name.startswith(prefix) or f"{name}.".startswith(tower_prefixes):
            continue
        is_pooler = any("pooler" in part.lower() for part in parts)
        is_head = innermost(module) is head or (not inside and parts[0] in HEAD_MODULES)
        if not is_pooler and not is_head and any(True for _ in innermost(module).parameters(recurse=False)):
            names.append(name)
    return names


def _towers(model: nn.Module, body: Any) -> list[str]:
    """Names of the parts of a language model that a text alone does not reach; none in encoders such as CLIP."""
    inputs = inspect.signature(body.forward).parameters
    has_media = "input_ids" in inputs and any(name.startswith(_MEDIA) for name in inputs)
    if not has_media or hasattr(body, "get_text_features"):
        return []
    reached: set[nn.Module] = set()

    def watch(call: Callable[[], Any]) -> None:
        reached.clear()
        with register_module_forward_pre_hook(lambda module, _: reached.add(module)):
            call()

    try:
        dummy_batch(model, watch)
    except ValueError:
        return []
    used = {id(parameter) for module in reached for parameter in module.parameters(recurse=False)}
    parts = {name: part for name, part in body.named_children() if next(part.parameters(), None) is not None}
    left = [name for name, part in parts.items() if not used & {id(parameter) for parameter in part.parameters()}]
    is_tower = any(isinstance(module, PreTrainedModel) for name in left for module in parts[name].modules())
    return left if is_tower else []


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules under their original names; the wrapper of another adapter stands for its module."""
    inside_adapters: set[str] = set()
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in inside_adapters):
            continue
        if isinstance(module, BaseTunerLayer):
            inside_adapters.add(name)
            if not hasattr(module, "base_layer"):
                continue
        yield name, module


class GradiendModel(ChildTuner):
    """The tuner that attaches one `GradiendLayer` to every module that owns targeted parameters."""

    prefix: str = "gradiend_"
    tuner_layer_cls = GradiendLayer
    find_default = staticmethod(default_owners)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        # The ids of the parameters that the new adapter already changes; a tied weight belongs to its first owner.
        self._claimed_ids: set[int] = set()
        # Targeted modules that have no parameters of their own, or only such as an earlier module shares.
        self._passed_over: dict[str, nn.Module] = {}
        is_default = peft_config.target_modules is None
        super()._prepare_adapter_config(peft_config, model_config)
        if is_default:
            peft_config.layers_to_transform = peft_config.layers_pattern = None  # they are in the names
        return peft_config

    def _check_tied_modules(self, model: nn.Module, peft_config: GradiendConfig) -> None:
        """Give no warning: a tied weight is changed for all its owners."""

    def _check_merge_allowed(self) -> None:
        """Refuse nothing: a tied weight stays tied when it is edited in place."""

    def _child_arguments(self, config: GradiendConfig, target: nn.Module, path: str) -> tuple[Any, ...] | None:
        owner = innermost(target)
        if isinstance(owner, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{path!r} is trained with another adapter, by its modules_to_save or trainable_token_indices, so that "
                f"the {config.described} cannot change it: leave it out of target_modules, or delete that adapter."
            )
        if config.fitted_parameters is not None:
            names = self._fitted_parameters(config, config.fitted_parameters, owner, path)
        else:
            own = owner.named_parameters(recurse=False)
            names = [name for name, parameter in own if id(parameter) not in self._claimed_ids]
        for name in names:
            if is_quantised(owner.get_parameter(name)):
                message = f"the {config.described} changes it. Instead, {FLOAT_FIRST}"
                if not config.fitted:
                    message = (
                        f"a GRADIEND adapter changes weights. Instead, {FLOAT_FIRST}; or let the adapter change none "
                        f"but the float weights of this one: exclude_modules={quantised_modules(self.model)}"
                    )
                full = f"{path}.{name}"
                raise ValueError(f"{full!r} is quantised, and {message}.")
        if not names:
            if not isinstance(config.target_modules, str):
                super()._child_arguments(config, target, path)
            self._passed_over[path] = target
            return None
        self._claimed_ids.update(id(owner.get_parameter(name)) for name in names)
        return (tuple(names),)

    def _fitted_parameters(
        self, config: GradiendConfig, fitted: dict[str, dict[str, Any]], owner: nn.Module, path: str
    ) -> list[str]:
        wanted = [full.rpartition(".")[2] for full in fitted if full.rpartition(".")[0] == path]
        # The names come in the order of the module, since a file has them sorted.
        names = [name for name in owner._parameters if name in wanted]
        subject, load = f"The {config.described}", "Load it into the model it was fitted on."
        for name in [*names, *(set(wanted) - set(names))]:
            full, parameter = f"{path}.{name}", owner._parameters.get(name)
            if parameter is None:
                raise ValueError(f"{subject} changes {full!r}, which this model does not have. {load}")
            if id(parameter) in self._claimed_ids:
                raise ValueError(
                    f"{full!r} shares its tensor with another weight of this model, but had its own tensor where the "
                    f"{config.described} was fitted. Load the adapter into a model with untied weights "
                    "(tie_word_embeddings=False)."
                )
            shape = fitted[full]["shape"]
            if list(parameter.shape) != list(shape) and config.has_size_of(full, shape) and not is_quantised(parameter):
                here = list(parameter.shape)
                raise ValueError(f"{subject} was fitted where {full!r} has shape {shape}; here it has {here}. {load}")
        return names

    def _check_complete(self, config: Any, children: list[AdapterChild], wanted: list[str]) -> None:
        at = [child.path for child in children]
        if not at:
            raise ValueError(
                f"target_modules={config.target_modules!r} matches no module that owns parameters itself: name the "
                "linear layers, embeddings and norms inside, e.g. target_modules='all-linear' or a regular expression."
            )
        for path, module in self._passed_over.items():
            if next(module.parameters(), None) is not None and not any(name.startswith(f"{path}.") for name in at):
                super()._child_arguments(config, module, path)
                is_named = not isinstance(config.target_modules, str)
                if is_named and next(innermost(module).parameters(recurse=False), None) is None:
                    raise ValueError(
                        f"target_modules names {path!r}, which owns no parameters itself, and no module in it: name "
                        "the linear layers, embeddings and norms inside, or leave it out."
                    )
        if config.fitted_parameters is None:
            # PEFT shortens long lists to suffixes, and with "embed_tokens" among them it would save embeddings too.
            config.target_modules = exact_targets(at, self.model)
        super()._check_complete(config, children, wanted)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters into the weights, in the weights' dtype; `unmerge_adapter` restores them bit for bit.

        Warns when rounding to that dtype loses more than a tenth of the edit.

        Raises:
            ValueError: If a weight cannot be merged into; the message names it, and nothing has changed.
        """
        names = self._adapters_to_merge(adapter_names)
        layers: list[GradiendLayer] = [layer for layer in self._children() if set(names) & set(layer.adapters)]
        for layer in layers:
            if layer.disable_adapters:
                raise ValueError(f"The adapters are disabled: call enable_adapter_layers() before merging {names}.")
            reason = layer.why_not_mergeable(names)
            if reason is not None:
                raise ValueError(f"The GRADIEND adapter cannot be merged: {reason}.")
        for name in names:
            own = [layer for layer in layers if name in layer.adapters]
            kept = rounded_share((x.parameter(at), edit) for x in own for at, edit in x.edits_of(name))
            if kept < LEAST_KEPT:
                warn_user(
                    f"Merged into weights of this dtype, {name!r} keeps {kept:.0%} of its edit, since the rest is lost "
                    "to rounding. Merge into a float32 copy of the model, or choose a larger learning_rate."
                )
        with ExitStack() as undo_merges:
            for layer in layers:
                layer.merge_weights(safe_merge=safe_merge, adapter_names=names)
                undo_merges.callback(layer.unmerge_last)
            undo_merges.pop_all()

    def _check_mixed_batch(self, rows: RowAdapters) -> None:
        raise ValueError(
            f"adapter_names={[*rows.names]} cannot be followed: a GRADIEND adapter changes weights, which all rows of "
            "a batch share. Run the rows of each adapter as a batch of their own, with set_adapter(name)."
        )
