"""Merging erasers into a model's weights: all sites of an adapter, or none.

If a site is a linear layer, a convolution or an embedding, or if the adapter names the weights that make or take its
activations, the eraser goes into weights of the site itself. At any other site, usually a norm, it goes into the layers
that take the site's activation, if only linear layers take it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_erasure.models.model import distance

from ..common import placement
from ..common.acting import adapters_now, remove_wrappers, warn_user
from ..erasure.config import SITES
from ..erasure.layer import ErasureLayer, erasure_layers
from ..gradiend.layer import gradiend_layers
from . import record
from .probe import Probe, SiteUses, advise_targets, check_drift, trace_uses, why_not_foldable

T = TypeVar("T")
Place = tuple[str, int]  # the name of a weight, and the axis of the features in it

_UNMERGED_OR_LINEAR = "Use the adapter unmerged, or target linear layers, e.g. target_modules='all-linear'."
_WRAPPED = (
    "another adapter wraps its module, and the change by that adapter would not be erased. Call merge_and_unload() of "
    "that adapter first, or use the erasure unmerged."
)


@dataclass
class MergePlan:
    """What a merge will write into which layers."""

    # Path of a site with erasers in the layers → side → the adapters that are merged there after this merge, in the
    # order in which they act.
    orders: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    # Name of a layer → the erasers that are in it after this merge, the one next to the weight first.
    erasers: dict[str, list[record.EraserInWeight]] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)  # name of a layer → the layer

    def add(self, layer: ErasureLayer, name: str, target: str, places: list[Place], side: str) -> None:
        """Plan that an adapter's eraser at a site goes into weights of a module, at one side of each weight."""
        left, right, bias = layer.eraser_state(name)
        new = [record.EraserInWeight(layer.path, name, side, left, right, bias, own, axis) for own, axis in places]
        self.erasers.setdefault(target, []).extend(new if left.shape[-1] else ())


def merge(model: nn.Module, names: list[str], *, safe_merge: bool = False, untie: bool = False) -> None:
    """Write erasers into a model's weights, as `ConceptErasureModel.merge_adapter` says, and check the outputs."""
    refuse_sharded(model)
    probe = Probe(model)
    plan = plan_merge(model, names, probe)
    if not plan.erasers:
        return
    _refuse_other_changes(model, plan)
    modules, untied = list(plan.modules.values()), _tied_weights(model, plan, untie=untie)
    _refuse_lost_means(model, plan)
    layers = {path: layer for path, layer in erasure_layers(model).items() if path in plan.orders}
    # Rounding is measured on the weights themselves, so none of them may be offloaded.
    obstacle = "its weights are offloaded" if any(map(placement.owns_offloaded, modules)) else None
    if obstacle is None and probe.failure:
        obstacle = f"{type(model).__name__} cannot be run on a dummy input ({probe.failure})"
    before = None if obstacle else _unmerged_outputs(layers, plan, probe)
    snapshot = record.Snapshot(layers.values(), [*modules, *(untied.modules if untied else [])], untied)
    try:
        if untied is not None:
            plain = [] if obstacle else probe.run()
            untied.untie()
            if not obstacle and distance(probe.run(), plain) > 0:
                raise ValueError(
                    f"{type(model).__name__} computes other outputs with the same weights if its configuration has "
                    "tie_word_embeddings=False, so they cannot be untied. Fit the erasure again without the "
                    "modules that share a weight, exclude_modules=[…], or use the adapter unmerged."
                )
        for target, module in plan.modules.items():
            for name, value in record.rewrite(module, plan.erasers[target]).items():
                if safe_merge and not bool(torch.isfinite(value).all()):
                    raise ValueError(
                        f"Merging {names} makes {target}.{name} non-finite; the adapter seems to be broken."
                    )
            for path in {eraser.path for eraser in plan.erasers[target]}:
                if not any(module is known for known in layers[path].merged_into):
                    layers[path].merged_into.append(module)
        for path, layer in layers.items():
            layer.merged_adapters = [name for site in SITES for name in plan.orders[path][site]]
        if before is not None:
            check_drift(probe, before, modules, names)
    except BaseException:
        snapshot.restore()
        raise
    if untied is not None:
        warn_user(
            f"The modules that shared {list(untied.owners)} have weights of their own now: the model is "
            f"{untied.bytes:,} bytes larger, and its configuration has tie_word_embeddings=False."
        )
    if before is None:
        warn_user(
            f"{names} were merged without the usual comparison of outputs, since {obstacle}. Compare them yourself."
        )


def plan_merge(model: nn.Module, names: list[str], probe: Probe) -> MergePlan:
    """Find the layers that take the erasers of adapters, also tied ones; raise an error if a site has none."""
    remove_wrappers(model, only_empty=True)
    plan, layers = MergePlan(), erasure_layers(model)
    folded: dict[str, list[str]] = {}  # site → the adapters whose erasers go into the layers that take its activation
    merging = {p: [n for n in names if n in at.adapters and n not in at.merged_adapters] for p, at in layers.items()}
    sites = {path: here for path, here in merging.items() if here}
    for path, here in sites.items():
        if layers[path]._disable_adapters:
            raise ValueError(f"The adapters are disabled: call enable_adapter_layers() before merging {here}.")
        for name in here:
            layers[path].check_values(name)
    for path, here in sites.items():
        layer, weights = layers[path], {name: _own_weights(model, layers[path], name) for name in here}
        own = {name: places for name, places in weights.items() if places is not None}
        if own:
            _refuse_own_weights(layer, own)
            plan.modules[path] = layer.host
            for name, places in own.items():
                plan.add(layer, name, path, places, layer.erasures[name].side)
        if len(own) < len(here):
            folded[path] = [name for name in here if name not in own]
    if folded:
        uses = _folded_uses(model, {path: layers[path] for path in folded}, names, probe)
        for path, others in folded.items():
            for target in dict.fromkeys(weight.module for weight in uses[path].weights):
                places = [(w.parameter, w.axis) for w in uses[path].weights if w.module == target]
                plan.modules[target] = model.get_submodule(target)
                for name in others:
                    plan.add(layers[path], name, target, places, "input")
    _sort_erasers(plan, layers, sites)
    return plan


def _sort_erasers(plan: MergePlan, layers: dict[str, ErasureLayer], sites: dict[str, list[str]]) -> None:
    """Add the erasers that are in the layers already, and sort all by the order in which they enter a weight."""
    for path in [*sites, *(eraser.path for module in plan.modules.values() for eraser in record.erasers_in(module))]:
        plan.orders[path] = {site: _merge_order(layers[path], sites.get(path, []), site) for site in SITES}
    place: dict[tuple[str, str], int] = {}  # (site, adapter) of an eraser → its position, from the weight outwards
    for path, order in plan.orders.items():
        entering = [name for site in SITES for name in _weight_outwards(layers[path], site, order[site])]
        place |= {(path, name): at for at, name in enumerate(entering)}
    for target, new in plan.erasers.items():
        # The layer's own erasers come before those of a norm in front of it.
        known = [
            (e.path != target, place[e.path, e.adapter], e) for e in [*record.erasers_in(plan.modules[target]), *new]
        ]
        plan.erasers[target] = [eraser for *_, eraser in sorted(known, key=lambda entry: entry[:2])]


def _own_weights(model: nn.Module, layer: ErasureLayer, name: str) -> list[Place] | None:
    """The weights of a site's own module that take an eraser, each with its axis of the features; None without any."""
    host, site = layer.host, layer.erasures[name].side
    weights = getattr(adapters_now(model).configs.get(name), "weights", None)
    if weights is not None:
        here = [(own, axis) for group in weights.values() for path, own, axis in group if path == layer.path]
        biases = {record.bias_of(host, own) for own, _ in here}  # they change with their weights
        return [place for place in here if place[0] not in biases]
    axis = record.axis_of(host, site)
    if axis is None and not placement.has_quantised(host):
        return None
    return [("weight", axis or 0)]


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a sharded model before any forward pass: if a part of it runs before its root, it cannot be used again."""
    sharded = next((name for name, p in model.named_parameters() if placement.is_sharded(p)), None)
    if sharded is not None:
        raise ValueError(
            f"The erasure cannot be merged: {sharded!r} and other weights of the model are sharded, and each process "
            "has a part of them. Load the model whole to merge or to export."
        )


def _refuse_other_changes(model: nn.Module, plan: MergePlan) -> None:
    """Refuse weights that other adapters change, too.

    An eraser in a weight would not act on the change that a GRADIEND adapter adds to this weight in the forward pass.
    And if another change is merged between two erasers, the erasers cannot be removed separately.
    """
    merging = {id(module): target for target, module in plan.modules.items()}
    for layer in gradiend_layers(model).values():
        names = layer.acting_adapters() or layer.merged_adapters
        targets = [merging[id(m)] for places in layer.owners.values() for m, _ in places if id(m) in merging]
        if names and targets:
            raise ValueError(
                f"The erasure cannot be merged into {targets[0]!r} beside the GRADIEND adapter {names[0]!r}, whose "
                "change of this weight it would not erase. Merge the GRADIEND first, by its own merge_and_unload()."
            )
    for target, module in plan.modules.items():
        if record.changed_since(module):
            raise ValueError(
                f"The erasure cannot be merged into {target!r}: an erasure is merged there, and something else, such "
                "as a LoRA, was merged after it. Call unmerge_adapter() of the erasure first, then merge both together."
            )


def _refuse_own_weights(layer: ErasureLayer, weights: dict[str, list[Place]]) -> None:
    """Refuse a module whose weights cannot take the erasers at its own sides."""
    path, host = layer.path, layer.host
    if isinstance(host, BaseTunerLayer):
        raise ValueError(f"The erasure at {path!r} cannot be merged: {_WRAPPED}")
    for name, places in weights.items():
        site = layer.erasures[name].side
        width = len(layer.eraser_state(name)[0])
        for parameter, axis in places:
            refusal = record.why_not_mergeable(host, site, parameter)
            shape = host.get_parameter(parameter).shape if refusal is None else ()
            if refusal is None and width:  # it is fitted: its features must lie along an axis of the weight
                if isinstance(host, record.CONVOLUTIONS) and layer.erasures[name].holder.erasures[name].axis != 1:
                    refusal = (
                        "it does not erase along the channels of this convolution. Fit it again with "
                        f"exclude_modules=[{path!r}], or use the adapter unmerged."
                    )
                elif axis >= len(shape) or shape[axis] != width:
                    refusal = (
                        f"its {parameter} of shape {tuple(shape)} does not have the {width} features along axis "
                        f"{axis}. Use the adapter unmerged."
                    )
            if refusal is not None:
                raise ValueError(f"The erasure at the {site} of {path!r} cannot be merged: {refusal}")


def _folded_uses(
    model: nn.Module, sites: dict[str, ErasureLayer], names: list[str], probe: Probe
) -> dict[str, SiteUses]:
    """What takes the activations of sites that are not linear layers; raise an error unless linear layers do."""
    refused = f"The erasure at {next(iter(sites))!r} cannot be merged: the layers that take its activation are found by"
    if placement.is_offloaded(model):
        raise ValueError(
            f"{refused} following it to their weights, but weights of this model are offloaded. Load the model on one "
            "device to merge, use the adapter unmerged, or target linear layers, e.g. target_modules='all-linear'."
        )
    if probe.failure:
        raise ValueError(
            f"{refused} running the model on a dummy input, but this {type(model).__name__} fails on it "
            f"({probe.failure}). {_UNMERGED_OR_LINEAR}"
        )
    uses = trace_uses(model, probe.run, sites, names)
    found = {path: why_not_foldable(model, here) for path, here in uses.items()}
    reasons = {path: reason for path, reason in found.items() if reason is not None}
    if not reasons:
        return uses
    path, reason = next(iter(reasons.items()))
    more = "" if len(reasons) == 1 else f" Of {len(uses)} such sites {len(reasons)} cannot be merged."
    remedy = _UNMERGED_OR_LINEAR
    if len(reasons) < len(uses):
        remedy = f"Fit it again without them, exclude_modules={list(reasons)}, or use the adapter unmerged."
    if any(uses[site].quantised for site in reasons):
        on_float = not any(uses[site].obstacles or uses[site].returned for site in reasons)
        remedy = f"Use the adapter unmerged{', or ' + placement.FLOAT_FIRST if on_float else ''}."
    if isinstance(model.get_submodule(path), BaseTunerLayer):
        raise ValueError(f"The erasure at {path!r} cannot be merged: {_WRAPPED}")
    remedy = f"{advise_targets(model, sites.values())}{remedy}"
    raise ValueError(f"The erasure at {path!r} cannot be merged: {reason}.{more} {remedy}")


# ---- the order in which erasers of different concepts, which do not commute, enter a weight --------------------------


def _merge_order(layer: ErasureLayer, names: list[str], site: str) -> list[str]:
    """The adapters that are merged at one side of a module after `names` are, in the order in which they act.

    They act in the order in which they are named, and after those that are merged already. If all merged adapters are
    active, and each call named them in the order in which they act, that order stays. An unmerged adapter that acts
    between them and the weight raises an error.
    """
    here = [name for name in names if layer.erasures[name].side == site]
    present = _weight_outwards(layer, site, layer.applied_adapters(site))
    merging = [name for name in present if name in here]
    if merging != present[: len(merging)]:
        raise ValueError(
            f"{merging} cannot be merged into {layer.path!r} before {present[0]!r}, which acts between them and the "
            f"weight: merge {present[: present.index(merging[-1]) + 1]} together."
        )
    merged = [name for name in layer.merged_adapters if layer.erasures[name].side == site]
    acting = [name for name in layer.switched_on() if name in (*merged, *here)]
    parts = [[name for name in acting if name in part] for part in (merged, here)]
    return acting if parts == [merged, here] else [*merged, *here]


def _weight_outwards(layer: ErasureLayer, site: str, ordered: list[T]) -> list[T]:
    """Sort items in acting order by the order in which they enter the weight; at an input that is the reverse."""
    return ordered if site == "output" and record.is_weight_layer(layer.host) else ordered[::-1]


def _unmerged_outputs(layers: dict[str, ErasureLayer], plan: MergePlan, probe: Probe) -> list[Tensor]:
    """The model's outputs while the erasers act unmerged, in the order in which they will act after the merge."""
    modules = {id(m): m for m in [*plan.modules.values(), *(m for layer in layers.values() for m in layer.merged_into)]}
    snapshot = record.Snapshot(layers.values(), modules.values())
    try:
        for path, layer in layers.items():
            layer.merged_adapters, active = [], []
            for site, merged in plan.orders[path].items():
                others = [name for name in layer.applied_adapters(site) if name not in merged]
                first, second = _weight_outwards(layer, site, [merged, others])
                active += first + second
            layer._active_adapter = active
        for module in modules.values():
            of_others = [eraser for eraser in record.erasers_in(module) if eraser.path not in layers]
            for name, value in record.values_with_erasers(module, of_others).items():
                placement.set_parameter(module, name, value)
        return probe.run()
    finally:
        snapshot.restore()


def _refuse_lost_means(model: nn.Module, plan: MergePlan) -> None:
    """Refuse erasers that keep a mean where a layer has no bias to hold it; the message names the sites."""
    without_bias: dict[str, str] = {}  # site → the first layer without a bias for its mean
    for target, module in plan.modules.items():
        for edit in plan.erasers[target]:
            if bool((edit.right @ edit.bias).any()) and not record.takes_mean(module, edit.parameter, edit.side):
                without_bias.setdefault(edit.path, target)
    if not without_bias:
        return
    sites, layers = list(without_bias), erasure_layers(model)
    without = f"leave out the sites that need one, exclude_modules={sites}, " if len(sites) < len(plan.orders) else ""
    raise ValueError(
        f"The erasure at {sites[0]!r} cannot be merged: it keeps the mean of the activations, or moves it to a target, "
        f"for which {without_bias[sites[0]]!r} would need a bias, and has none. If it has a target, remove it, "
        "hf_erasure.set_target(model, name, None). Otherwise fit it on this model with ConceptErasureConfig(affine="
        "None), which takes the linear map that keeps the mean where layers have no bias, or with affine=False, "
        f"{without}or use this adapter unmerged. {advise_targets(model, [layers[site] for site in sites])}".rstrip()
    )


def _tied_weights(model: nn.Module, plan: MergePlan, *, untie: bool) -> record.TiedWeights | None:
    """An object that will untie the weights that erasers go into; None where none is tied. Refuse ties that stay."""
    changed = [target for target, erasers in plan.erasers.items() if erasers]
    tied = {target: names for target in changed if (names := placement.tied_to(model, target)) is not None}
    reasons = {target: record.why_not_untied(model, target) for target in tied}
    refused = [target for target, reason in reasons.items() if reason is not None or not untie]
    if refused:
        first, layers = refused[0], erasure_layers(model)
        sites = list(dict.fromkeys(eraser.path for target in refused for eraser in plan.erasers[target]))
        way = "A merge with untie=True (on the command line --untie) gives it a table of its own. "
        if reasons[first] is not None:
            way = f"It cannot be untied: {reasons[first]}. {advise_targets(model, [layers[site] for site in sites])}"
        raise ValueError(
            f"The erasure at {sites[0]!r} cannot be merged: the weight of {first!r} is shared by {tied[first]}, which "
            f"would change too. {way}Or fit it again with exclude_modules={sites}, or use the adapter unmerged."
        )
    return record.TiedWeights(model) if tied else None
