"""Merging erasers into a model's weights: all sites of an adapter, or none.

At a linear layer, a convolution or an embedding, and where an adapter names the weights that make or take its
activations, the eraser goes into the weights of that very module. At any other site (a norm, above all) it goes into
the layers that take the site's activation, if nothing but linear layers does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_erasure.models.model import distance

from ..common import placement
from ..common.acting import all_configs, warn_user
from ..erasure.config import SITES
from ..erasure.layer import ErasureLayer, erasure_layers
from ..gradiend.layer import gradiend_layers
from .probe import Probe, Uses, check_drift, is_head, preset, tied_words, trace_uses, why_not_foldable
from .record import (
    CONVOLUTIONS,
    EraserInWeight,
    MergeRecord,
    Snapshot,
    Untied,
    axis_of,
    bias_of,
    changed_since,
    is_weight_layer,
    originals,
    put_record,
    record_of,
    takes_mean,
    why_not_mergeable,
    why_not_untied,
    write,
    written_anew,
)

T = TypeVar("T")
Place = tuple[str, int]  # the name of a weight, and the axis of the features in it

_UNMERGED_OR_LINEAR = "Use the adapter unmerged, or target linear layers, e.g. target_modules='all-linear'."
_WRAPPED = (
    "another adapter wraps its module, and what that one adds would not be erased. Call merge_and_unload() of that one "
    "first, or use the adapter unmerged."
)


@dataclass
class MergePlan:
    """What is to be written where, before anything is."""

    # By the path of a site the adapters that are merged there, or are to be, in the order in which they act.
    orders: dict[str, list[str]] = field(default_factory=dict)
    # The erasers that go into each layer, by the layer's name, the one next to the weight first.
    erasers: dict[str, list[EraserInWeight]] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)  # those layers
    tied: dict[str, list[str]] = field(default_factory=dict)  # of those whose weight is another's too, all its names
    rewritten: bool = False  # whether erasers go in front of some that are merged already


def merge(model: nn.Module, names: list[str], *, safe_merge: bool = False, untie: bool = False) -> None:
    """Write erasers into a model's weights, as `ConceptErasureModel.merge_adapter` says, and check the outputs."""
    refuse_sharded(model)
    probe = Probe(model)
    plan = plan_merge(model, names, probe, allow_tied=untie)
    if not plan.erasers:
        return
    _refuse_beside_other_changes(model, plan)
    layers = erasure_layers(model)
    values = _values(model, layers, plan, names, safe_merge=safe_merge)
    untied = _untied(model, plan)
    modules = list(plan.modules.values())
    # Rounding is measured on weights that are there.
    unchecked = "its weights are offloaded" if any(map(placement.owns_offloaded, modules)) else None
    if unchecked is None and probe.failure:
        unchecked = f"{type(model).__name__} cannot be run on a dummy input ({probe.failure})"
    before = None if unchecked else _run_before(model, layers, plan, probe)
    snapshot = Snapshot([layers[path] for path in plan.orders], [*modules, *(untied.modules if untied else [])], untied)
    try:
        if untied is not None:
            _untie(model, untied, None if unchecked else probe)
        for target, module in plan.modules.items():
            write(module, values[target], plan.erasers[target])
            for path in {eraser.path for eraser in plan.erasers[target]}:
                if not any(module is known for known in layers[path].written):
                    layers[path].written.append(module)
        for path, order in plan.orders.items():
            layers[path].merged_adapters = order
        if before is not None:
            check_drift(probe, before, modules, names)
    except BaseException:
        snapshot.restore()
        raise
    if untied is not None:
        warn_user(
            f"{sorted(plan.tied)} have weights of their own now, where they were tied: the model is {untied.bytes:,} "
            "bytes larger, and its configuration says tie_word_embeddings=False."
        )
    if before is None:
        warn_user(
            f"{names} were merged without the usual comparison of outputs, since {unchecked}. Compare them yourself."
        )


def plan_merge(model: nn.Module, names: list[str], probe: Probe, *, allow_tied: bool = False) -> MergePlan:
    """Find the layers that take the erasers of adapters, tied ones if `allow_tied`; refused for a site without."""
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
        weights = {name: _own_weights(model, layers[path], name) for name in here}
        own = {name: places for name, places in weights.items() if places is not None}
        if own:
            _refuse_direct(model, layers[path], own, plan, allow_tied=allow_tied)
            plan.modules[path] = layers[path].host
            _add(plan, layers[path], [*own], {path: own})
        if len(own) < len(here):
            folded[path] = [name for name in here if name not in own]
    if folded:
        at = {path: layers[path] for path in folded}
        uses = _folded_uses(model, at, names, probe, allow_tied=allow_tied)
        for path, others in folded.items():
            places: dict[str, list[Place]] = {}
            for weight in uses[path].weights:
                places.setdefault(weight.module, []).append((weight.parameter, weight.axis))
            plan.modules |= {target: model.get_submodule(target) for target in places}
            plan.tied |= {target: tied for target in places if (tied := placement.tied_to(model, target)) is not None}
            _add(plan, layers[path], others, {t: dict.fromkeys(others, p) for t, p in places.items()}, "input")
    return plan


def _own_weights(model: nn.Module, layer: ErasureLayer, name: str) -> list[Place] | None:
    """The weights of a site's own module that take an eraser, each with its axis of the features, or None."""
    host, site = layer.host, layer.concept_erasure_site[name]
    weights = getattr(all_configs(model).get(name), "weights", None)
    if weights is not None:
        here = [(own, axis) for group in weights.values() for path, own, axis in group if path == layer.path]
        biases = {bias_of(host, own) for own, _ in here}  # they change with their weights
        return [place for place in here if place[0] not in biases]
    axis = axis_of(host, site)
    if axis is None and not placement.has_quantised(host):
        return None
    return [("weight", axis or 0)]


def refuse_sharded(model: nn.Module) -> None:
    """Raise before any forward pass: a sharded model that first runs below its root is useless afterwards."""
    sharded = next((name for name, p in model.named_parameters() if placement.is_sharded(p)), None)
    if sharded is not None:
        raise ValueError(
            f"The erasure cannot be merged: {sharded!r} and other weights of the model are sharded, and each process "
            "has a part of them. Load the model whole to merge or to export."
        )


def _refuse_beside_other_changes(model: nn.Module, plan: MergePlan) -> None:
    """Refuse weights that something else changes, too.

    An eraser in a weight would not reach what a GRADIEND adapter adds to that weight later, on the forward pass. And
    erasers before and behind a change that is not an eraser's could not be told apart when they are taken back.
    """
    merging = {id(module): target for target, module in plan.modules.items()}
    for layer in gradiend_layers(model).values():
        names = layer.acting_adapters() or layer.merged_adapters
        targets = [merging[id(m)] for places in layer.owners.values() for m, _ in places if id(m) in merging]
        if names and targets:
            raise ValueError(
                f"The erasure cannot be merged into {targets[0]!r} beside the GRADIEND adapter {names[0]!r}, whose "
                "change of that weight it would not erase. Merge that one first, by its own merge_and_unload()."
            )
    for target, module in plan.modules.items():
        if changed_since(module):
            raise ValueError(
                f"The erasure cannot be merged into {target!r}: an erasure is merged there, and something else, such "
                "as a LoRA, was merged after it. Call unmerge_adapter() of the erasure first, then merge both together."
            )


def _refuse_direct(
    model: nn.Module, layer: ErasureLayer, weights: dict[str, list[Place]], plan: MergePlan, *, allow_tied: bool
) -> None:
    """Refuse a module that cannot take the erasers at its own sides into its weights."""
    path, host, tied = layer.path, layer.host, placement.tied_to(model, layer.path)
    if isinstance(host, BaseTunerLayer):
        raise ValueError(f"The erasure at {path!r} cannot be merged: {_WRAPPED}")
    if tied:
        if not allow_tied:
            left = "what the head reads is un-erased" if is_head(model, path) else "a token says what it said alone"
            raise ValueError(
                f"The erasure at {path!r} cannot be merged: its weight {tied_words(model, path, tied)}. Or fit it "
                f"again with exclude_modules=[{path!r}]; then {left}."
            )
        plan.tied[path] = tied
    for name, places in weights.items():
        site = layer.concept_erasure_site[name]
        for edit in _edits(layer, name, places):
            refusal = why_not_mergeable(host, site, edit.parameter)
            shape, width = host.get_parameter(edit.parameter).shape if refusal is None else (), len(edit.left)
            if refusal is None and width:  # fitted; are its features those of an axis of the weight?
                if isinstance(host, CONVOLUTIONS) and layer.site_of(name).concept_erasure_axis[name] != 1:
                    refusal = (
                        "it does not erase along the channels of this convolution. Fit it again with "
                        f"exclude_modules=[{path!r}], or use the adapter unmerged."
                    )
                elif edit.axis >= len(shape) or shape[edit.axis] != width:
                    refusal = (
                        f"its {edit.parameter} of shape {tuple(shape)} does not have the {width} features along axis "
                        f"{edit.axis}. Use the adapter unmerged."
                    )
            if refusal is not None:
                raise ValueError(f"The erasure at the {site} of {path!r} cannot be merged: {refusal}")


def _folded_uses(
    model: nn.Module, sites: dict[str, ErasureLayer], names: list[str], probe: Probe, *, allow_tied: bool
) -> dict[str, Uses]:
    """What takes the activations of sites that are not linear layers themselves; refused unless linear layers do."""
    refused = f"The erasure at {next(iter(sites))!r} cannot be merged: which layers take its activation is found by"
    if placement.is_offloaded(model):
        raise ValueError(
            f"{refused} following it to their weights, and weights of this model are offloaded. Load the model on one "
            "device to merge, use the adapter unmerged, or target linear layers, e.g. target_modules='all-linear'."
        )
    if probe.failure:
        raise ValueError(
            f"{refused} running the model on a dummy input, and this {type(model).__name__} cannot be "
            f"({probe.failure}). {_UNMERGED_OR_LINEAR}"
        )
    uses, fed = trace_uses(model, probe.run, sites, names)
    found = {path: why_not_foldable(model, path, uses[path], fed, allow_tied=allow_tied) for path in uses}
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
    remedy = f"{preset(model, sites.values())}{remedy}"
    raise ValueError(f"The erasure at {path!r} cannot be merged: {reason}.{more} {remedy}")


# ---- the order in which erasers of different concepts, which do not commute, enter a weight --------------------------


def _add(
    plan: MergePlan,
    layer: ErasureLayer,
    names: list[str],
    weights: dict[str, dict[str, list[Place]]],
    side: str | None = None,
) -> None:
    """Let the erasers of adapters at a site go into weights, by module and adapter; at their own side, or at `side`."""
    for site in SITES:
        for name in _outwards(plan, layer, names, site):
            for target, places in weights.items():
                edits = _edits(layer, name, places[name], side)
                plan.erasers.setdefault(target, []).extend(edit for edit in edits if edit.left.shape[-1])


def _edits(layer: ErasureLayer, name: str, places: list[Place], side: str | None = None) -> Iterator[EraserInWeight]:
    """An adapter's eraser at a site, on its way into some weights: at its own side of each, or at the one given."""
    left, right, bias = layer.eraser_state(name)
    for parameter, axis in places:
        yield EraserInWeight(
            layer.path, name, side or layer.concept_erasure_site[name], left, right, bias, parameter, axis
        )


def _outwards(plan: MergePlan, layer: ErasureLayer, names: list[str], site: str) -> list[str]:
    """The order in which erasers at one side of a module enter the weight: from the weight outwards.

    They act in the order in which they are named, and after those that are merged already. Where all of these are
    active, and each call named them in the order in which they act, that order stays. One that is not to be merged and
    acts between them and the weight is refused.
    """
    here = [name for name in names if layer.concept_erasure_site[name] == site]
    present = _from_the_weight(layer, site, layer.applied_adapters(site))
    merging = [name for name in present if name in here]
    if merging != present[: len(merging)]:
        raise ValueError(
            f"{merging} cannot be merged into {layer.path!r} before {present[0]!r}, which acts between them and the "
            f"weight: merge {present[: present.index(merging[-1]) + 1]} together."
        )
    merged = [name for name in layer.merged_adapters if layer.concept_erasure_site[name] == site]
    acting = [name for name in layer.switched_on() if name in (*merged, *here)]
    parts = [[name for name in acting if name in part] for part in (merged, here)]
    order = acting if parts == [merged, here] else [*merged, *here]
    plan.orders.setdefault(layer.path, []).extend(order)
    return [name for name in _from_the_weight(layer, site, order) if name in here]


def _from_the_weight(layer: ErasureLayer, site: str, ordered: list[T]) -> list[T]:
    """What is given in the order in which it acts, in that in which it enters the weight: reversed at an input."""
    return ordered if site == "output" and is_weight_layer(layer.host) else ordered[::-1]


def _run_before(model: nn.Module, layers: dict[str, ErasureLayer], plan: MergePlan, probe: Probe) -> list[Tensor]:
    """What the model gives while erasers act unmerged in the order in which they will act once merged."""
    written = [module for module in model.modules() if plan.rewritten and record_of(module) is not None]
    snapshot = Snapshot(layers.values(), written)
    try:
        for path, layer in layers.items():
            names = plan.orders.get(path, layer.merged_adapters)
            layer.merged_adapters = [] if plan.rewritten else layer.merged_adapters
            active: list[str] = []
            for site in SITES:
                merged = [name for name in names if layer.concept_erasure_site[name] == site]
                others = [name for name in layer.applied_adapters(site) if name not in merged]
                first, second = _from_the_weight(layer, site, [merged, others])
                active += first + second
            layer._active_adapter = active
        for module in written:
            for name, value in originals(module).items():
                placement.set_parameter(module, name, value)
        return probe.run()
    finally:
        snapshot.restore()


def _values(
    model: nn.Module, layers: dict[str, ErasureLayer], plan: MergePlan, names: list[str], *, safe_merge: bool
) -> dict[str, dict[str, Tensor]]:
    """The merged parameters of each layer; the plan then has all erasers in them, from the weight outwards."""

    def place(eraser: EraserInWeight) -> tuple[int, int]:
        layer, order = layers[eraser.path], plan.orders.get(eraser.path)
        site = layer.concept_erasure_site[eraser.adapter]
        # Where nothing is merged now, those that are there stay in their order.
        own_place = 0 if order is None else _from_the_weight(layer, site, order).index(eraser.adapter)
        return SITES.index(site), own_place

    present = {target: (record_of(module) or MergeRecord()).erasers for target, module in plan.modules.items()}
    for target, known in present.items():
        # Its own before those of a norm in front of it.
        erasers = sorted([*known, *plan.erasers[target]], key=lambda e: (e.path != target, *place(e)))
        plan.erasers[target] = erasers
        plan.rewritten |= erasers[: len(known)] != known
    _refuse_means(model, plan)
    values = {target: written_anew(module, plan.erasers[target]) for target, module in plan.modules.items()}
    for target, found in values.items():
        for key, value in found.items():
            if safe_merge and not bool(torch.isfinite(value).all()):
                raise ValueError(f"Merging {names} makes {target}.{key} non-finite; the adapter seems to be broken.")
    return values


def _refuse_means(model: nn.Module, plan: MergePlan) -> None:
    """Refuse erasers that keep a mean for which a layer has no place; names the sites."""
    lacking: dict[str, str] = {}  # site → the first layer without a place
    for target, module in plan.modules.items():
        for edit in plan.erasers[target]:
            if bool((edit.right @ edit.bias).any()) and not takes_mean(module, edit.parameter, edit.side):
                lacking.setdefault(edit.path, target)
    if not lacking:
        return
    sites = list(lacking)
    layers = erasure_layers(model)
    why = f"for which {lacking[sites[0]]!r} would need a bias, and has none."
    edits = [edit for here in plan.erasers.values() for edit in here if edit.path in sites]
    if not any(layers[edit.path].concept_erasure_bias[edit.adapter].any() for edit in edits):  # of the linear map
        raise ValueError(
            f"The erasure at {sites[0]!r} cannot be merged: it moves activations to a target, {why} Take the target "
            "away first, hf_erasure.set_target(model, name, None), or use this adapter unmerged."
        )
    without = f"leave out the sites that need one, exclude_modules={sites}, " if len(sites) < len(plan.orders) else ""
    raise ValueError(
        f"The erasure at {sites[0]!r} cannot be merged: it keeps the mean of the activations, or moves it to a target, "
        f"{why} Leave a target out, and fit it again with ConceptErasureConfig(affine=None), which takes the linear "
        "map that keeps the mean where there is no place for a bias, or with affine=False, "
        f"{without}or use this adapter unmerged. {preset(model, [layers[site] for site in sites])}".rstrip()
    )


def _untied(model: nn.Module, plan: MergePlan) -> Untied | None:
    """What will untie the weights that erasers go into; None where none of them is tied."""
    for target, names in plan.tied.items():
        reason = why_not_untied(model, target)
        if reason is not None:
            raise ValueError(
                f"The erasure cannot be merged into {target!r}, whose weight is shared by {names}: {reason}. Fit it "
                f"again with exclude_modules=[{target!r}], or use the adapter unmerged."
            )
    return Untied(model) if plan.tied else None


def _untie(model: nn.Module, untied: Untied, probe: Probe | None) -> None:
    """Untie the weights, unless the model then computes something else with the same weights."""
    plain = [] if probe is None else probe.run()
    untied.untie()
    for module in untied.modules:
        record = record_of(module) or MergeRecord()
        record.untied = untied
        put_record(module, record)
    if probe is not None and distance(probe.run(), plain) > 0:
        raise ValueError(
            f"{type(model).__name__} computes something else with the same weights where its configuration says "
            "tie_word_embeddings=False, so they cannot be untied. Fit the erasure again without "
            "the modules that share a weight, exclude_modules=[…], or use the adapter unmerged."
        )
