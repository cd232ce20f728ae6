"""The tuner PEFT calls to attach, merge and remove erasures."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from ..common.field_checks import as_names
from ..common.layer import refuse_another_owner, refuse_container
from ..common.mixed_batches import Rows, rows_have_adapters
from ..common.tuner import ChildTuner, exactly, is_child
from ..merging.plan import merge
from .config import ConceptErasureConfig
from .layer import CHILD, ErasureLayer, erasure_layers
from .targets import default_targets, is_fitted_at, keep_layers


class ConceptErasureModel(ChildTuner):
    """Attaches one `ErasureLayer` to every targeted module; the modules themselves stay in place."""

    prefix: str = "concept_erasure_"
    tuner_layer_cls = ErasureLayer

    def _check_config(self, config: ConceptErasureConfig) -> None:
        if not config.fitted and config.labels is None and config.concept_dim is None:
            config.z_dim  # noqa: B018  raises with the remedy

    def _complete(self, model: nn.Module, adapter_name: str) -> None:
        if not erasure_layers(model, adapter_name):  # some releases of PEFT say so of a model's first adapter only
            config = self.peft_config[adapter_name]
            raise ValueError(f"target_modules={config.target_modules!r} not found in {type(model).__name__}.")

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
        if is_child(key):
            return False
        if peft_config.fitted_sites is not None:
            return is_fitted_at(as_names(peft_config, key), key, peft_config.fitted_sites)
        return BaseTuner._check_target_module_exists(as_names(peft_config, key), key)

    def _check_tied_modules(self, model: nn.Module, peft_config: ConceptErasureConfig) -> None:
        super()._check_tied_modules(model, as_names(peft_config, *EMBEDDING_LAYER_NAMES))

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
        refuse_container(current_key, target)
        layer = target._modules.get(CHILD)
        if not isinstance(layer, ErasureLayer):
            layer = ErasureLayer(target, current_key)
            target.add_module(CHILD, layer)
        refuse_another_owner(layer, current_key)
        layer.add_adapter(adapter_name, peft_config)
        layer.set_adapter(self.active_adapters)

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
        merge(self.model, self._left_to_merge(adapter_names), safe_merge=safe_merge)

    # ---- several adapters -------------------------------------------------------------------------------------------

    def _mixed_batch(self, rows: Rows) -> AbstractContextManager[None]:
        if self.training:
            raise ValueError(
                f"adapter_names={[*rows.names]} is for inference, and the model is in training mode: call eval() first."
            )
        return rows_have_adapters(self._children(), rows)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of erasers erases none of the concepts."""
        raise ValueError(
            f"{adapters} cannot be added with weights: a weighted sum of erasers erases none of the concepts. "
            "hf_erasure.combine_adapters(model, names, into) makes one erasure that erases all of them."
        )
