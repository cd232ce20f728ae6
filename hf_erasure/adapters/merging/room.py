"""At which sites of an adapter only a linear eraser merges, since the mean has no place in a bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_erasure.models.dummy import dummy_batch
from hf_erasure.models.model import tensors_of

from ..common.layer import innermost
from ..common.placement import has_quantised, is_offloaded
from ..erasure.config import ConceptErasureConfig
from ..erasure.layer import ErasureLayer, erasure_layers
from .plan import own_weights, why_not_foldable
from .probe import trace_uses
from .record import takes_mean


def sites_without_room(
    model: nn.Module, name: str, config: ConceptErasureConfig, sites: dict[str, ErasureLayer], *, may_run: bool
) -> set[str]:
    """The sites of an adapter whose affine part would need a bias that is not there.

    Which layers take the activations of a norm is found by one small forward pass; other sites need none. Where an
    adapter cannot be merged as a whole anyway, there are no such sites. Quantised and tied weights do not count as such
    a case, since they may be loaded in float, and untied.

    Args:
        model: The bare model.
        name: The adapter, which is not merged.
        config: Its configuration.
        sites: Its sites.
        may_run: Whether a small forward pass in this process alone is possible.
    """
    places: dict[str, list[tuple[nn.Module, str, str]]] = {}
    folded = {}
    for path, layer in sites.items():
        if config.weights is not None:
            own = [(innermost(model.get_submodule(module)), weight) for module, weight, _ in config.weights[path]]
            places[path] = [(*place, config.site) for place in own]
        elif own_weights(model, layer, name) is not None:
            places[path] = [(layer.host, "weight", config.site)]
        else:
            folded[path] = layer
    if folded:
        targets = _targets_of(model, name, folded) if may_run and not is_offloaded(model) else None
        if targets is None:
            return set()
        at = {target: model.get_submodule(target) for found in targets.values() for target in found}
        places |= {path: [(at[target], "weight", "input") for target in found] for path, found in targets.items()}
    return {path for path, here in places.items() if not all(_has_room(*place) for place in here)}


def _has_room(module: nn.Module, weight: str, side: str) -> bool:
    """Whether what keeps the mean has a place beside a weight; of quantised layers, once they are loaded in float."""
    has_bias = has_quantised(module) and module._parameters.get("bias") is not None
    return has_bias or takes_mean(module, weight, side)


def _targets_of(model: nn.Module, name: str, sites: dict[str, ErasureLayer]) -> dict[str, list[str]] | None:
    """The layers that would take the erasers of sites that are not linear layers themselves; None if others must."""
    acting = {other for layer in erasure_layers(model).values() for other in layer.acting_adapters()}
    found: list[Any] = []

    def watch(call: Any) -> None:
        device = next(model.parameters()).device.type
        off = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else torch.no_grad()
        with torch.inference_mode(False), torch.no_grad(), off:
            found[:] = trace_uses(model, lambda: tensors_of(call()), sites, sorted({*acting, name}))

    try:
        dummy_batch(model, watch)
    except Exception:  # whatever a model may raise at an input it was not made for
        return None
    uses, fed = found
    targets = {}
    for path, use in uses.items():
        whole = replace(use, layers=[*use.layers, *use.quantised], quantised=[])
        known = {target: fed.get(target, {path}) for target in whole.layers}
        if why_not_foldable(model, path, whole, known, allow_tied=True) is not None:
            return None
        targets[path] = whole.layers
    return targets
