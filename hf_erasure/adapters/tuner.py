"""The tuner PEFT calls to attach, merge and remove erasures."""

from __future__ import annotations

import copy
import re
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from .config import ConceptErasureConfig
from .fingerprint import check_base
from .folding import merge
from .layer import CHILD, ErasureLayer, erasure_layers
from .targets import default_targets, keep_layers


class ConceptErasureModel(BaseTuner):
    """Attaches one `ErasureLayer` to every targeted module; the modules themselves stay in place."""

    prefix: str = "concept_erasure_"
    tuner_layer_cls = ErasureLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  as in every tuner of PEFT

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if erasure_layers(model, adapter_name):
            raise ValueError(
                f"adapter_name={adapter_name!r} is the name of an erasure that is there already. Choose another name, "
                "or delete that adapter first."
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter; a failure leaves the model as it was.

        Raises:
            ValueError: If the name, the targets or the base model do not fit the adapter.
        """
        # A configuration of its own: fitting writes into it, and the caller may use one for several models.
        config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            _check_name(adapter_name, model)
            if config.fitted:
                check_base(model, config)
            elif config.labels is None and config.concept_dim is None:
                config.z_dim  # noqa: B018  raises with the remedy
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            remove_adapter(model, adapter_name)
            for parameter, required in trainable:
                parameter.requires_grad_(required)
            raise

    def _prepare_adapter_config(self, peft_config: ConceptErasureConfig, model_config: dict) -> ConceptErasureConfig:
        if not peft_config.fitted and peft_config.target_modules is None:
            names = default_targets(self.model)
            if peft_config.layers_to_transform is not None:
                names = keep_layers(names, peft_config.layers_to_transform, peft_config.layers_pattern)
            peft_config.target_modules = exactly(names, self.model)
            if isinstance(peft_config.target_modules, str):
                peft_config.layers_to_transform = peft_config.layers_pattern = None  # they are in the expression
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: ConceptErasureConfig, key: str) -> Any:
        if CHILD in key.split("."):
            return False
        # A fitted adapter goes where it was fitted, whatever else a pattern may match in this model.
        if peft_config.fitted_sites is not None:
            return key in peft_config.fitted_sites
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: ConceptErasureConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, nn.Embedding) and peft_config.site == "input":
            raise ValueError(f"{current_key!r} takes token ids, which hold no activation to erase: use site='output'.")
        layer = target._modules.get(CHILD)
        if not isinstance(layer, ErasureLayer):
            layer = ErasureLayer(target, current_key)
            target.add_module(CHILD, layer)
        layer.add_adapter(adapter_name, peft_config)
        layer.set_adapter(self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the layers that held no other."""
        super().delete_adapter(adapter_name)
        remove_empty_layers(self.model)

    # ---- merging: all sites of an adapter, or none ------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write erasers into the weights, at every site or, if one refuses, at none.

        An erasure at a norm goes into the linear layers that take the norm's output. What the model returns stays the
        same; `output_hidden_states` then shows the states of the model without the erasures at norms, and so does
        whatever else looks at a norm's output.

        Raises:
            ValueError: Names the site that cannot be merged exactly and what to do instead.
        """
        if adapter_names is None:
            adapter_names = self._acting_adapters()
        self._check_merge_allowed()
        merge(self.model, adapter_names, safe_merge=safe_merge)

    def _acting_adapters(self) -> list[str]:
        """The active adapters, and before them the sticky ones that act all the same."""
        layers = erasure_layers(self.model).values()
        sticky = {name for layer in layers for name, on in layer.concept_erasure_sticky.items() if on}
        return [*sorted(sticky - set(self.active_adapters)), *self.active_adapters]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        layers = list(erasure_layers(self.model).values())
        if merge:
            self.merge_adapter(adapter_names, safe_merge=safe_merge)
        for layer in layers:
            if not merge and layer.merged:
                layer.unmerge()
            layer.forget_originals()
            layer.detach()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off all its sites, and the layers that are empty then."""
    for layer in erasure_layers(model, adapter_name).values():
        layer.merged_adapters = [name for name in layer.merged_adapters if name != adapter_name]
        if layer.adapters == [adapter_name]:
            layer.detach()
        else:
            layer.delete_adapter(adapter_name)


def remove_empty_layers(model: nn.Module) -> None:
    """Take off the layers whose last adapter was deleted, so that the model is as it was before the first."""
    for layer in erasure_layers(model).values():
        if not layer.adapters:
            layer.detach()


def rehome_layers(model: nn.Module) -> None:
    """Move the erasures of modules that another adapter has wrapped out to the wrapper.

    An erasure then sees what the wrapped module and the other adapter give together, whichever came first, and its
    keys in the state dict stay as they are.
    """
    modules = dict(model.named_modules())
    for path, layer in erasure_layers(model).items():
        outermost = modules.get(path)
        if outermost is not None and outermost is not layer.host:
            layer.rehome(outermost)


def move_inside_wrappers(model: nn.Module) -> None:
    """The way back from `rehome_layers`, for when the wrappers are about to be taken away."""
    for layer in erasure_layers(model).values():
        if isinstance(layer.host, BaseTunerLayer):
            layer.rehome(layer.host.get_base_layer())


def exactly(names: list[str], model: nn.Module) -> Any:
    """`target_modules` that mean these modules and no others.

    PEFT takes a name in a list for a suffix too, so that the final norm `norm` would stand for every `….norm`.
    """
    suffixes = tuple(f".{name}" for name in names)
    if any(name.endswith(suffixes) and name not in names for name, _ in model.named_modules()):
        return "|".join(re.escape(name) for name in names)
    return set(names)


def _check_name(name: str, model: nn.Module) -> None:
    if "." in name or ConceptErasureModel.prefix in name or name in ("", CHILD):
        raise ValueError(
            f"adapter_name={name!r} cannot be used: it becomes part of state-dict keys, so it must not be empty, "
            f"contain a dot, be {CHILD!r} or contain {ConceptErasureModel.prefix!r}."
        )
    if any(name in path.split(".") for path, _ in model.named_modules()):
        raise ValueError(
            f"adapter_name={name!r} cannot be used: {type(model).__name__} has modules of that name, and PEFT would "
            "leave their tensors out when it saves any other adapter. Choose another name."
        )
