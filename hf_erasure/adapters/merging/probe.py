"""A small forward pass finds where the output of a site goes, and whether a merge has kept the model's outputs.

The output is followed through the operations of the pass. The inputs of modules are not enough: a residual connection
adds a tensor that no module was called with, and a router of experts multiplies by its own parameter.

Parts that the probe batch does not run (an expert that no token chose, a branch that depends on values) are not seen.
Therefore only architectures are folded in which every use is simple, and the outputs are compared afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_erasure.models.dummy import dummy_batch
from hf_erasure.models.graph import REARRANGING, Graph, Node, Use, Weight, sibling_experts, whole_axis
from hf_erasure.models.model import distance, evaluating, floats_of, forked_rng, is_norm
from hf_erasure.models.streams import readers_of, writers_of

from ..common.acting import warn_user
from ..common.layer import innermost
from ..common.placement import has_quantised, is_offloaded, tied_to
from ..erasure.config import ConceptErasureConfig
from ..erasure.layer import ErasureLayer, erasure_layers
from .record import axis_of, takes_mean, why_not_mergeable, why_not_untied

# A merge may change the outputs so many times as much as another rounding of the weights does. That rounding is only
# one random sample, and other samples are larger.
_TIMES_ROUNDING = 4
# Operations that only move or copy entries of an activation, and change no tensor in place.
_MOVES = {name for name in REARRANGING if not name.endswith("_")} - {"neg", "masked_fill", "sum", "mean"}


class Probe:
    """Runs of a bare model on its dummy input, always in the same way: without dropout, gradients or autocast.

    `watch` is given the first forward pass as a function and must call it; without it, the probe runs the model once.
    """

    def __init__(self, model: nn.Module, watch: Callable[[Callable[[], Any]], object] | None = None) -> None:
        self.model = model
        self.failure: str | None = None  # the reason why the model cannot be run on the dummy input
        self.inputs: dict[str, Tensor] = {}
        device = next((p.device.type for p in model.parameters()), "cpu")
        self._device = device if torch.amp.is_autocast_available(device) else "cpu"
        try:
            with torch.inference_mode(False), torch.autocast(self._device, enabled=False):
                self.inputs = dummy_batch(model, watch)
            if watch is None:
                self.run()
        except Exception as error:  # a model may raise any error at an input for which it was not made
            self.failure = f"{type(error).__name__}: {error}"

    def run(self) -> list[Tensor]:
        """The floating-point tensors that the model returns; the state of random generators stays as it was."""
        with (
            torch.inference_mode(False),
            evaluating(self.model),
            torch.autocast(self._device, enabled=False),
            forked_rng(self.model),
        ):
            return list(floats_of(self.model(**self.inputs)))


def check_drift(probe: Probe, before: list[Tensor], modules: list[nn.Module], names: list[str]) -> None:
    """Raise a `ValueError` if a merge into modules has changed the outputs by more than rounding."""
    after = probe.run()
    drift = distance(after, before)
    if drift == 0:
        return
    rounding = _TIMES_ROUNDING * distance(_run_with_other_rounding(probe, modules), after)
    # The outputs are rounded too: if only few of them differ in their last bit, the other rounding may show none.
    rounding += max(torch.finfo(value.dtype).eps / 2 for value in after if value.is_floating_point())
    if not drift <= rounding:
        raise ValueError(
            f"Merging {names} changed the model's output by {drift:.1e} of its norm, where rounding explains "
            f"{rounding:.1e}: the merge was taken back. Use the adapter unmerged, and please report the architecture."
        )
    if rounding >= 1:
        warn_user(
            f"The outputs after merging {names} could not be compared with those before: another rounding of the "
            "weights changes them by their whole size. Compare them yourself, in float64."
        )


def _run_with_other_rounding(probe: Probe, modules: list[nn.Module]) -> list[Tensor]:
    """The outputs with every weight of the modules one rounding step up or down."""
    generator = torch.Generator().manual_seed(0)
    kept = [(p, p.data) for module in modules for p in module.parameters(recurse=False)]
    try:
        for parameter, value in kept:
            signs = 2 * torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8, device="cpu") - 1
            steps = torch.finfo(value.dtype).eps * signs.to(value.device, torch.float64)
            parameter.data = (value.double() * (1 + steps)).to(value.dtype)
        return probe.run()
    finally:
        for parameter, value in kept:
            parameter.data = value


# ---- the layers and operations that take the output of a site --------------------------------------------------------


@dataclass
class SiteUses:
    """What a forward pass does with the activation of one site."""

    # The weights that multiply it, in the order of the calls → the other sites and operations that use the weight.
    weights: dict[Weight, list[str]] = field(default_factory=dict)
    obstacles: list[str] = field(default_factory=list)  # names of the other operations that it goes into
    quantised: list[str] = field(default_factory=list)  # names of the modules with quantised weights that it goes into
    returned: bool = False  # whether it is part of what the model returns
    runs: int = 0  # how many times the site was reached


def trace_uses(
    model: nn.Module, run: Callable[[], Any], sites: dict[str, ErasureLayer], names: list[str]
) -> dict[str, SiteUses]:
    """Run the model on a small input and find where the activations of `sites` go, whose erasers will be folded.

    An erasure of an adapter that is not among `names` stays unmerged, and is an obstacle.
    """
    graph, uses = Graph(model, run), {path: SiteUses() for path in sites}
    erased = [
        (f"erasure at {path!r}" if path in sites else f"erasure of {name!r} at {path!r}", path, call, node, name)
        for path, layer in erasure_layers(model).items()
        for name in layer.adapters
        if name in layer.acting_adapters() or (name in names and name not in layer.merged_adapters)
        if path in sites or name not in names
        for site in [layer.erasures[name].side]
        for call in graph.calls
        if call.name == path
        for node in ([call.output] if site == "output" else call.inputs[:1])
        if node is not None
    ]
    site_of: dict[Node | None, str] = {}
    for _, path, call, node, name in erased:
        if path not in sites:
            continue
        here, site = uses[path], sites[path].erasures[name].side
        axis = sites[path].erasures[name].axis
        here.runs += 1
        here.returned |= node in graph.returned and (site == "output" or node is call.output)
        # An eraser at an input acts inside the call, an eraser at an output acts after it.
        is_inside = site == "input"
        here.obstacles += [
            text
            for text, other, other_call, other_node, _ in erased
            if other != path and other_node is node and (call.index in other_call.outer_calls) == is_inside
        ]
        if node.kind == "constant":
            here.obstacles.append("operations on the model's inputs, which are not followed")
        for use in graph.uses:
            if use.input is node and (call.index in use.calls) == is_inside:
                site_of[use.output] = path
                _record_use(graph, use, axis, here)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weight_uses: dict[int, set[str]] = {}
    used_elsewhere = set()
    for use in graph.uses:  # the products of which a weight is a factor are among its uses, too
        own, made_by = use.input.product, None if use.output is None or use.output.kind != "map" else use.output.product
        if own is None or made_by is None or (own.owner, own.parameter) != (made_by.owner, made_by.parameter):
            used_elsewhere.add(use.input)
    for node in graph.nodes:
        if node.product is not None and (node.kind != "parameter" or node in used_elsewhere):
            weight = parameters.get(f"{node.product.owner}.{node.product.parameter}".lstrip("."))
            is_named = node.kind != "parameter" and node.operation != node.product.owner
            text = f"<{node.operation}>" if is_named else "another use"
            weight_uses.setdefault(id(weight), set()).add(site_of.get(node, text))
    for path, here in uses.items():
        known = [*here.weights, *sibling_experts(model, graph, [*here.weights])]
        used_by = {w: weight_uses.get(id(parameters[f"{w.module}.{w.parameter}"]), set()) for w in known}
        here.weights = {weight: sorted(others - {path}) for weight, others in used_by.items()}
    return uses


def _record_use(graph: Graph, use: Use, axis: int, uses: SiteUses) -> None:
    """Record what takes an activation: a weight that multiplies its features, or an obstacle."""
    if use.output is use.input and use.operation in _MOVES:  # the moved entries have uses of their own
        return
    calls = [graph.calls[number] for number in use.calls]
    quantised = next((call.name for call in reversed(calls) if has_quantised(call.module)), None)
    wrapper = next((call.name for call in calls if isinstance(call.module, BaseTunerLayer)), None)
    product = use.output.product if use.output is not None and use.output.kind == "map" else None
    if quantised is not None:
        uses.quantised.append(quantised)
    elif wrapper is not None:
        uses.obstacles.append(f"the adapter around {wrapper!r}")
    elif product is None or not product.owner:
        is_call = bool(calls) and use.operation == calls[-1].name
        uses.obstacles.append(type(calls[-1].module).__name__ if is_call else use.operation)
    elif (
        product.in_axis is None
        or not use.input.shape
        or whole_axis(product.pattern, use.input) != axis % len(use.input.shape)
        or why_not_mergeable(graph.calls[product.call].module, "input", product.parameter) is not None
    ):
        uses.obstacles.append(type(graph.calls[product.call].module).__name__)
    else:
        uses.weights.setdefault(Weight(product.owner, product.parameter, product.in_axis), [])


def why_not_foldable(model: nn.Module, uses: SiteUses) -> str | None:
    """The reason why a site cannot be folded into the layers that take its activation; None when it can."""
    if not uses.runs:
        return "it was not reached when the model ran on a dummy input"
    if uses.returned:
        return f"its activation is part of what {type(model).__name__} returns, and would be returned un-erased"
    if uses.obstacles:
        obstacles = ", ".join(f"`{name}`" for name in dict.fromkeys(uses.obstacles))
        return (
            f"its activation goes into {obstacles}, and only linear maps of its features can take the projection into "
            "their weights"
        )
    if uses.quantised:
        return f"it goes into {uses.quantised[0]!r}, whose weight is quantised and would not be exact after a merge"
    if not uses.weights:
        return "no layer of the model takes its activation"
    for weight, others in uses.weights.items():
        tied = tied_to(model, weight.module) if others else None
        # A table that an embedding shares gets a copy of its own before a merge.
        if others and not (others == ["<embedding>"] and tied):
            used = f"{', '.join(others)}{f'; it is shared by {tied}' if tied else ''}"
            return f"it goes into {weight.module!r}, whose weight is used elsewhere too ({used})"
    return None


def sites_without_bias(
    model: nn.Module, name: str, config: ConceptErasureConfig, sites: dict[str, ErasureLayer], *, may_run: bool
) -> set[str]:
    """The sites of an unmerged adapter whose affine part would need a bias that a layer does not have.

    For norms, one small forward pass finds the layers that take their activations, if this process alone `may_run` one;
    other sites do not need it. The result is empty if the adapter cannot be merged as a whole anyway. Quantised and
    tied weights do not prevent a merge here, since they may be loaded in float, and untied.
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
    traced: dict[str, SiteUses] = {}
    if folded:
        acting = {name, *(other for layer in erasure_layers(model).values() for other in layer.acting_adapters())}
        can_run = may_run and not is_offloaded(model)
        if not can_run or Probe(model, lambda call: traced.update(trace_uses(model, call, folded, [*acting]))).failure:
            return set()
    for path, use in traced.items():
        quantised: dict[Weight, list[str]] = {Weight(module, "weight", 1): [] for module in use.quantised}
        whole = replace(use, weights=use.weights | quantised, quantised=[])
        if why_not_foldable(model, whole) is not None:
            return set()
        places[path] = [(model.get_submodule(w.module), w.parameter, "input") for w in whole.weights]
    without = set()
    for path, here in places.items():
        for module, weight, side in here:
            # A quantised layer with a bias has room for the affine part once it is loaded in float.
            has_bias = has_quantised(module) and module._parameters.get("bias") is not None
            if not has_bias and not takes_mean(module, weight, side):
                without.add(path)
    return without


# ---- what to do about an erasure that does not merge -----------------------------------------------------------------


def advise_targets(model: nn.Module, layers: Iterable[ErasureLayer]) -> str:
    """A sentence with the word for sites that merge in this model, for an erasure at norms that does not; or empty."""
    if not all(is_norm(innermost(layer.host)) for layer in layers):
        return ""
    for word in ("readers", "writers"):
        try:
            groups = readers_of(model) if word == "readers" else [writers_of(model)]
        except ValueError:
            continue
        side, weights = "input" if word == "readers" else "output", [weight for group in groups for weight in group]
        modules = {weight.module: innermost(model.get_submodule(weight.module)) for weight in weights}
        tied = [name for name in modules if tied_to(model, name)]
        merge = all(why_not_mergeable(modules[w.module], side, w.parameter) is None for w in weights)
        if merge and all(why_not_untied(model, name) is None for name in tied):
            untie = f", with untie=True for {tied}" if tied else ""
            advice = "'Where to erase' in the documentation shows how much the figures differ"
            return f"Fit it again with target_modules={word!r}, which merges in this model{untie} ({advice}). "
    return ""
