"""At which sites of an adapter only a linear eraser merges, since the mean has no place in a bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from hf_erasure.models.streams import Weight

from ..common.layer import innermost
from ..common.placement import has_quantised, is_offloaded
from ..erasure.config import ConceptErasureConfig
from ..erasure.layer import ErasureLayer, erasure_layers
from .probe import Probe, trace_uses, why_not_foldable
from .record import axis_of, takes_mean


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
        elif axis_of(layer.host, config.site) is not None or has_quantised(layer.host):
            places[path] = [(layer.host, "weight", config.site)]
        else:
            folded[path] = layer
    traced: list[Any] = []
    if folded:
        acting = {name, *(other for layer in erasure_layers(model).values() for other in layer.acting_adapters())}
        can_run = may_run and not is_offloaded(model)
        if not can_run or Probe(model, lambda call: traced.extend(trace_uses(model, call, folded, [*acting]))).failure:
            return set()
    for path, use in traced[0].items() if traced else ():
        quantised = [Weight(module, "weight", 1) for module in use.quantised]
        whole = replace(use, weights=[*use.weights, *quantised], quantised=[])
        known = {weight: traced[1].get(weight, {path}) for weight in whole.weights}
        if why_not_foldable(model, path, whole, known, allow_tied=True) is not None:
            return set()
        places[path] = [(model.get_submodule(w.module), w.parameter, "input") for w in whole.weights]
    without = set()
    for path, here in places.items():
        for module, weight, side in here:
            # Of quantised layers there is room once they are loaded in float.
            has_bias = has_quantised(module) and module._parameters.get("bias") is not None
            if not has_bias and not takes_mean(module, weight, side):
                without.add(path)
    return without
