"""The tuner PEFT calls to attach, merge and remove GRADIEND adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..common.field_checks import as_names
from ..common.layer import AdapterChild, refuse_another_owner, refuse_container
from ..common.mixed_batches import Rows
from ..common.quantised import FLOAT_FIRST, is_quantised, quantised_modules
from ..common.tuner import ChildTuner, exactly, is_child
from ..erasure.targets import is_fitted_at, keep_layers
from .config import GradiendConfig
from .edit import squares_of_change
from .forward_readers import Readers
from .layer import CHILD, GradiendLayer, innermost

# Below this share of the edit that a merge keeps, the merged model is not what was selected.
ENOUGH = 0.9
# Heads that sit in the base model's own class, where it has no part without them.
_HEADS = ("classifier", "score", "qa_outputs", "lm_head", "classification_head")


class GradiendModel(ChildTuner):
    """Attaches one `GradiendLayer` to every module that owns targeted parameters."""

    prefix: str = "gradiend_"
    tuner_layer_cls = GradiendLayer

    def _prepare_adapter_config(self, peft_config: GradiendConfig, model_config: dict) -> GradiendConfig:
        if not peft_config.fitted and peft_config.target_modules is None:
            names = default_owners(self.model)
            if peft_config.layers_to_transform is not None:
                names = keep_layers(names, peft_config.layers_to_transform, peft_config.layers_pattern)
                peft_config.layers_to_transform = peft_config.layers_pattern = None  # they are in the names
            if not names:
                raise ValueError(
                    f"No parameter of {type(self.model).__name__} is left for target_modules=None: name the modules "
                    "whose weights the feature may change."
                )
            peft_config.target_modules = exactly(names, self.model)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: GradiendConfig, key: str) -> Any:
        if is_child(key):
            return False
        if peft_config.fitted_parameters is not None:
            return is_fitted_at(as_names(peft_config, key), key, set(peft_config.fitted_modules))
        return BaseTuner._check_target_module_exists(as_names(peft_config, key), key)

    def _check_tied_modules(self, model: nn.Module, peft_config: GradiendConfig) -> None:
        """A tied weight is changed for all its owners, so that nothing is to be warned of."""

    def _check_merge_allowed(self) -> None:
        """A tied weight stays tied when it is edited in place."""

    def _create_and_replace(
        self,
        peft_config: GradiendConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        parameters = _own_parameters(peft_config, innermost(target), current_key, self._claimed, self.model)
        if not parameters:
            if not isinstance(self.peft_config[adapter_name].target_modules, str):
                refuse_container(current_key, target)
            self._passed_over[current_key] = target
            return
        layer = target._modules.get(CHILD)
        if not isinstance(layer, GradiendLayer):
            layer = GradiendLayer(target, current_key)
            target.add_module(CHILD, layer)
        refuse_another_owner(layer, current_key)
        layer.add_adapter(adapter_name, peft_config, parameters)
        layer.set_adapter(self.active_adapters)
        self._claimed.update(id(layer.parameter(name)) for name in parameters)

    def _check_config(self, config: Any) -> None:
        # The parameters that the adapter being attached has already; a tied weight comes with its first owner.
        self._claimed: set[int] = set()
        # Modules without parameters of their own, which an expression matched.
        self._passed_over: dict[str, nn.Module] = {}

    def _complete(self, model: nn.Module, adapter_name: str) -> None:
        config: Any = self.peft_config[adapter_name]
        if not any(adapter_name in layer.adapters for layer in self._children()):
            raise ValueError(
                f"target_modules={config.target_modules!r} matches no module that owns parameters itself: name the "
                "linear layers, embeddings and norms inside, e.g. target_modules='all-linear' or a regular expression."
            )
        at = [layer.path for layer in self._children() if adapter_name in layer.adapters]
        for path, module in self._passed_over.items():
            if next(module.parameters(), None) is not None and not any(name.startswith(f"{path}.") for name in at):
                refuse_container(path, module)
        if config.fitted_parameters is None:
            # PEFT shortens long lists to suffixes, and takes "embed_tokens" for a wish to save the embeddings too.
            config.target_modules = exactly(at, model)

    # ---- merging: the whole adapter, or nothing of it ----------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters into the weights, in the dtype these have; `unmerge_adapter` puts them back to the bit.

        Warns when rounding to that dtype loses more than a tenth of the edit, or when there is nothing to merge.

        Raises:
            ValueError: Names the weight that cannot be merged into; nothing has changed then.
        """
        names = self._left_to_merge(self._acting_adapters() if adapter_names is None else adapter_names)
        layers: list[GradiendLayer] = [layer for layer in self._children() if set(names) & set(layer.adapters)]
        for layer in layers:
            if layer.disable_adapters:
                raise ValueError(f"The adapters are disabled: call enable_adapter_layers() before merging {names}.")
            reason = layer.why_not_mergeable(names)
            if reason is not None:
                raise ValueError(f"The GRADIEND adapter cannot be merged: {reason}.")
        self._warn_before_merge(names)
        done: list[GradiendLayer] = []
        try:
            for layer in layers:
                layer.merge(safe_merge=safe_merge, adapter_names=names)
                done.append(layer)
        except BaseException:
            for layer in reversed(done):
                layer.unmerge_last()
            raise

    # ---- several adapters -------------------------------------------------------------------------------------------

    def _mixed_batch(self, rows: Rows) -> AbstractContextManager[None]:
        raise ValueError(
            f"adapter_names={[*rows.names]} cannot be followed: a GRADIEND adapter changes weights, which all rows of "
            "a batch share. Run the rows of each adapter as a batch of their own, with set_adapter(name)."
        )

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refused: what the weights would do, steering does."""
        raise ValueError(
            f"{adapters} cannot be made one adapter. Use them together, model.base_model.set_adapter({adapters}): "
            "their changes add up, each with the strength that GradiendAdapter.of(model, name).steer(…) gives it."
        )

    def _warn_before_merge(self, names: list[str]) -> None:
        for name in names:
            layers = [x for x in self._children() if name in x.adapters and name not in x.merged_adapters]
            if not layers:
                continue
            if not any(layer.gradiend_on[name] for layer in layers):
                warnings.warn(
                    f"The GRADIEND adapter {name!r} is not fitted, or its learning_rate is 0: merging it changes "
                    "nothing.",
                    stacklevel=4,
                )
                continue
            kept = share_kept(layers, name)
            if kept < ENOUGH:
                warnings.warn(
                    f"Merged into weights of this dtype, {name!r} keeps {kept:.0%} of its edit, since the rest is lost "
                    "to rounding. Merge into a float32 copy of the model, or choose a larger learning_rate.",
                    stacklevel=4,
                )


def share_kept(layers: list[GradiendLayer], name: str, steering: Tensor | None = None) -> float:
    """The share of an adapter's edit that rounding to the dtype of the weights leaves."""
    wanted = kept = 0.0
    for layer in layers:
        for parameter in layer.gradiend_parameters[name]:
            term = layer.terms(name, parameter, steering)
            if term is not None:
                squares, product = squares_of_change(layer.parameter(parameter), [term])
                wanted, kept = wanted + squares, kept + product
    return min(1.0, kept / wanted) if wanted else 1.0


# ---- which parameters ------------------------------------------------------------------------------------------------


def default_owners(model: nn.Module) -> list[str]:
    """Names of the modules that own weights of the base model, without prediction heads and poolers."""
    body: Any = getattr(model, "base_model", model)
    if not isinstance(body, nn.Module) or body is model:
        inside = ""
    else:
        inside = next(name for name, module in model.named_modules() if module is body)
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    names = []
    for name, module in base_modules(model):
        parts = name.split(".")
        if not name.startswith(f"{inside}." if inside else "") or not name:
            continue
        is_pooler = any("pooler" in part.lower() for part in parts)
        is_head = innermost(module) is head or (not inside and parts[0] in _HEADS)
        if not is_pooler and not is_head and any(True for _ in innermost(module).parameters(recurse=False)):
            names.append(name)
    return names


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model as it was without adapters, under the names that they have without them."""
    inside_adapters: set[str] = set()
    for name, module in model.named_modules():
        if any(name.startswith(f"{other}.") for other in inside_adapters):
            continue
        if isinstance(module, BaseTunerLayer):
            inside_adapters.add(name)
            if not hasattr(module, "base_layer"):
                continue
        yield name, module


def _own_parameters(
    config: GradiendConfig, owner: nn.Module, path: str, claimed: set[int], model: nn.Module
) -> tuple[str, ...]:
    """Names of the parameters of a module that an adapter changes and that no other module has brought yet."""
    if config.fitted_parameters is not None:
        return _fitted_parameters(config, config.fitted_parameters, owner, path, claimed, model)
    own = dict(owner.named_parameters(recurse=False))
    names = tuple(name for name, parameter in own.items() if id(parameter) not in claimed)
    for name in names:
        _refuse_quantised(f"{path}.{name}", own[name], config, model)
    return names


def _fitted_parameters(
    config: GradiendConfig,
    fitted: dict[str, dict[str, Any]],
    owner: nn.Module,
    path: str,
    claimed: set[int],
    model: nn.Module,
) -> tuple[str, ...]:
    wanted = [full.rpartition(".")[2] for full in fitted if full.rpartition(".")[0] == path]
    # In the order of the module: a file has names sorted.
    names = [name for name in owner._parameters if name in wanted]
    for name in [*names, *(set(wanted) - set(names))]:
        full, parameter = f"{path}.{name}", owner._parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"The {config.described} changes {full!r}, which this model does not have. Load it into the model it "
                "was fitted on."
            )
        if id(parameter) in claimed:
            raise ValueError(
                f"{full!r} is one tensor with another weight of this model, but was a weight of its own where the "
                f"{config.described} was fitted. Load it into a model with untied weights (tie_word_embeddings=False)."
            )
        _refuse_quantised(full, parameter, config, model)
        if list(parameter.shape) != list(fitted[full]["shape"]) and config.has_size_of(full, fitted[full]["shape"]):
            raise ValueError(
                f"The {config.described} was fitted where {full!r} has shape {fitted[full]['shape']}; here it has "
                f"{list(parameter.shape)}. Load it into the model it was fitted on."
            )
    return tuple(names)


def _refuse_quantised(full: str, parameter: nn.Parameter, config: GradiendConfig, model: nn.Module) -> None:
    if not is_quantised(parameter):
        return
    if config.fitted:
        raise ValueError(
            f"{full!r} is quantised in this model, and the {config.described} changes it. Instead, {FLOAT_FIRST}."
        )
    raise ValueError(
        f"{full!r} is quantised, and a GRADIEND adapter changes weights. Instead, {FLOAT_FIRST}; or let the adapter "
        f"change none but the float weights of this one: exclude_modules={quantised_modules(model)}."
    )


def link_owners(model: nn.Module) -> None:
    """Tell every layer which modules own its parameters, for a tied weight has several, and which others read them."""
    layers = modules_of_kind(model)
    if not layers:
        return
    modules = [m for m in model.modules() if not isinstance(m, GradiendLayer)]
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    readers = Readers(model, left_out=AdapterChild)
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for layer in layers:
        used = dict.fromkeys(name for names in layer.gradiend_parameters.values() for name in names)
        places = {name: owners[id(layer.parameter(name))] for name in used}
        for name, found in places.items():
            if layer.parameter(name).device.type == "meta":
                places[name] = found + _tied_by_name(model, ties, f"{layer.path}.{name}", found)
        read = [(m, owner) for place in places.values() for owner, name in place for m in readers.of(owner, name)]
        layer.link(places, list(dict.fromkeys(read)))


def modules_of_kind(model: nn.Module) -> list[GradiendLayer]:
    """The GRADIEND layers of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, GradiendLayer)]


def _tied_by_name(
    model: nn.Module, ties: dict[str, str], full: str, found: list[tuple[nn.Module, str]]
) -> list[tuple[nn.Module, str]]:
    """Owners that an offloaded model no longer shows to hold one tensor, since each holds a placeholder."""
    names = [a for a, b in ties.items() if b == full] + [b for a, b in ties.items() if a == full]
    names += [a for a, b in ties.items() if b in names and a != full]
    places = []
    for name in dict.fromkeys(names):
        path, _, own = name.rpartition(".")
        module = innermost(model.get_submodule(path))
        if not any(module is known for known, _ in found):
            places.append((module, own))
    return places
