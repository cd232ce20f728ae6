"""At which sites of an adapter only a linear eraser merges, since the mean has no place in a bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_erasure.models.dummy import dummy_batch
from hf_erasure.models.model import tensors_of

from ..common.placement import has_quantised, is_offloaded
from ..erasure.config import ConceptErasureConfig
from ..erasure.layer import ErasureLayer, erasure_layers
from .plan import why_not_foldable
from .probe import trace_uses
from .record import is_weight_layer


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
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    folded = {}
    for path, layer in sites.items():
        if config.weights is not None:
            places[path] = [(model.get_submodule(module), weight) for module, weight, _ in config.weights[path]]
        elif is_weight_layer(layer.host) or has_quantised(layer.host):
            places[path] = [(layer.host, "weight")]
        else:
            folded[path] = layer
    if folded:
        targets = _targets_of(model, name, folded) if may_run and not is_offloaded(model) else None
        if targets is None:
            return set()
        places |= {path: [(model.get_submodule(target), "weight") for target in targets[path]] for path in targets}
    return {path for path, here in places.items() if not all(_takes_mean(*place) for place in here)}


def _takes_mean(module: nn.Module, weight: str) -> bool:
    """Whether what keeps the mean has a place beside a weight, or in it: the rows of a table are erased one by one."""
    bias = "bias" if weight == "weight" else f"{weight}_bias"
    return isinstance(module, nn.Embedding) or module._parameters.get(bias) is not None


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
