"""Merging erasers into a model's weights: all sites of an adapter, or none.

At a linear layer or an embedding the eraser goes into that layer's own weight. At any other site (a norm, above all) it
goes into the layers that take the site's activation, if nothing but linear layers does.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..common.placement import (
    FLOAT_FIRST,
    has_quantised,
    is_offloaded,
    is_sharded,
    owns_offloaded,
    set_parameter,
    shared_weights,
)
from ..erasure.config import SITES
from ..erasure.layer import ErasureLayer, erasure_layers
from ..gradiend.layer import gradiend_layers
from .probe import Probe, Uses, check_drift, trace_uses
from .record import (
    BiasEntry,
    EraserInWeight,
    Snapshot,
    bias_entries,
    changed_since,
    is_weight_layer,
    originals,
    record_of,
    why_not_mergeable,
    write,
    written_anew,
)

T = TypeVar("T")

_UNMERGED_OR_LINEAR = "Use the adapter unmerged, or target linear layers, e.g. target_modules='all-linear'."


@dataclass
class MergePlan:
    """What is to be written where, before anything is.

    Attributes:
        orders: By the path of a site the adapters that are merged there, or are to be, in the order in which they act.
        erasers: The erasers that go into each layer, by the layer's name, the one next to the weight first.
        modules: Those layers.
        rewritten: Whether erasers go in front of some that are merged already.
    """

    orders: dict[str, list[str]] = field(default_factory=dict)
    erasers: dict[str, list[EraserInWeight]] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    rewritten: bool = False


def merge(model: nn.Module, names: list[str], *, safe_merge: bool = False) -> None:
    """Write erasers into weights, and check on a small forward pass that the model still computes the same.

    Raises:
        ValueError: Names the site that cannot be merged exactly and what to do instead; nothing has changed then.
    """
    refuse_sharded(model)
    probe = Probe(model)
    plan = plan_merge(model, names, probe)
    if not plan.erasers:
        return
    _refuse_beside_other_changes(model, plan)
    layers = erasure_layers(model)
    values = _values(layers, plan, names, safe_merge=safe_merge)
    entries = _entries_for(model, plan, values)
    modules = list(plan.modules.values())
    # Rounding is measured on weights that are there.
    unchecked = "its weights are offloaded" if any(map(owns_offloaded, modules)) else None
    if unchecked is None and probe.failure:
        unchecked = f"{type(model).__name__} cannot be run on a dummy input ({probe.failure})"
    before = None if unchecked else _run_before(model, layers, plan, probe)
    given = [module for entry in entries for module in entry.modules.values()]
    snapshot = Snapshot([layers[path] for path in plan.orders], [*modules, *given], entries)
    try:
        for entry in entries:
            entry.open()
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
    if before is None:
        warnings.warn(
            f"{names} were merged without the usual comparison of outputs, since {unchecked}. Compare them yourself.",
            stacklevel=4,
        )


def plan_merge(model: nn.Module, names: list[str], probe: Probe, *, allow_tied: bool = False) -> MergePlan:
    """Find the layers that take the erasers of adapters.

    With `allow_tied` also those whose weight is another's too, for changes that do not touch the weight itself.

    Raises:
        ValueError: Names the site that has no such layers, what stands in the way, and the remedy.
    """
    plan, layers, folded = MergePlan(), erasure_layers(model), {}
    merging = {p: [n for n in names if n in at.adapters and n not in at.merged_adapters] for p, at in layers.items()}
    sites = {path: here for path, here in merging.items() if here}
    for path, here in sites.items():
        if layers[path]._disable_adapters:
            raise ValueError(f"The adapters are disabled: call enable_adapter_layers() before merging {here}.")
        for name in here:
            layers[path].check_values(name)
    for path, here in sites.items():
        host = layers[path].host
        if is_weight_layer(host) or has_quantised(host):
            _refuse_direct(model, layers[path], here, allow_tied=allow_tied)
            _add(plan, layers[path], here, {path: host})
        else:
            folded[path] = layers[path]
    if folded:
        uses = _folded_uses(model, folded, names, probe, allow_tied=allow_tied)
        for path, layer in folded.items():
            targets = {target: model.get_submodule(target) for target in uses[path].layers}
            _add(plan, layer, sites[path], targets, side="input")
    return plan


def refuse_sharded(model: nn.Module) -> None:
    """Before any forward pass: a sharded model that first runs below its root is useless afterwards.

    Raises:
        ValueError: If FSDP keeps only a part of some weight in this process.
    """
    sharded = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
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


def _refuse_direct(model: nn.Module, layer: ErasureLayer, names: list[str], *, allow_tied: bool) -> None:
    """Refuse a layer that cannot take the erasers at its own sides into its weight."""
    path, tied = layer.path, _tied_to(model, layer.path)
    if tied and not allow_tied:
        raise ValueError(
            f"The erasure at {path!r} cannot be merged: its weight is shared by {tied}, which would change too. Untie "
            "the weights (tie_word_embeddings=False) or use the adapter unmerged."
        )
    for site in dict.fromkeys(layer.concept_erasure_site[name] for name in names):
        refusal = why_not_mergeable(layer.host, site)
        if refusal is not None:
            raise ValueError(f"The erasure at the {site} of {path!r} cannot be merged: {refusal}")
    if allow_tied and owns_offloaded(layer.host):
        raise ValueError(f"The weight of {path!r} is offloaded: load the model on one device to export it.")


def _folded_uses(
    model: nn.Module, sites: dict[str, ErasureLayer], names: list[str], probe: Probe, *, allow_tied: bool
) -> dict[str, Uses]:
    """What takes the activations of sites that are not linear layers themselves; refused unless linear layers do."""
    refused = f"The erasure at {next(iter(sites))!r} cannot be merged: which layers take its activation is found by"
    if is_offloaded(model):
        raise ValueError(
            f"{refused} following it to their weights, and weights of this model are offloaded. Load the model on one "
            "device to merge, use the adapter unmerged, or target linear layers, e.g. target_modules='all-linear'."
        )
    if probe.failure:
        raise ValueError(
            f"{refused} running the model on a dummy input, and this {type(model).__name__} cannot be "
            f"({probe.failure}). {_UNMERGED_OR_LINEAR}"
        )
    uses, fed = trace_uses(model, probe, sites, names)
    found = {path: _why_not_foldable(model, path, uses[path], fed, allow_tied=allow_tied) for path in uses}
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
        remedy = f"Use the adapter unmerged{', or ' + FLOAT_FIRST if on_float else ''}."
    if isinstance(model.get_submodule(path), BaseTunerLayer):
        reason = "another adapter wraps its module, and what that one adds would not be erased"
        remedy = "Call merge_and_unload() of that one first, or use the adapter unmerged."
    raise ValueError(f"The erasure at {path!r} cannot be merged: {reason}.{more} {remedy}")


def _why_not_foldable(
    model: nn.Module, path: str, uses: Uses, fed: dict[str, set[str]], *, allow_tied: bool
) -> str | None:
    """What stands in the way of folding a site into the layers that take its activation; None when nothing does."""
    if not uses.runs:
        return "it was not reached when the model ran on a dummy input"
    if uses.returned:
        return f"its activation is part of what {type(model).__name__} returns, and would be returned un-erased"
    if uses.obstacles:
        obstacles = ", ".join(f"`{name}`" for name in dict.fromkeys(uses.obstacles))
        return (
            f"its activation goes into {obstacles}, and only linear layers (Linear, Conv1D) can take the projection "
            "into their weights"
        )
    if uses.quantised:
        return f"it goes into {uses.quantised[0]!r}, whose weight is quantised and would not be exact after it"
    if not uses.layers:
        return "no layer of the model takes its activation"
    for target in dict.fromkeys(uses.layers):
        names = _tied_to(model, target)
        if names and not allow_tied:
            return (
                f"it goes into {target!r}, whose weight is shared by {names}, which would change too; a model with "
                "untied weights (tie_word_embeddings=False) has no such tie"
            )
        others = sorted(fed[target] - {path, *(["<embedding>"] if allow_tied else [])})
        if others:
            return f"it goes into {target!r}, whose weight is used elsewhere too ({', '.join(others)})"
    return None


def _tied_to(model: nn.Module, owner: str) -> list[str] | None:
    """All the names of a module's parameters that are another module's too."""
    return next((names for name, names in shared_weights(model).items() if name.rpartition(".")[0] == owner), None)


# ---- the order in which erasers of different concepts, which do not commute, enter a weight --------------------------


def _add(
    plan: MergePlan, layer: ErasureLayer, names: list[str], targets: dict[str, nn.Module], side: str | None = None
) -> None:
    """Let the erasers of adapters at a site go into the weights of targets: at one side, or each at its own."""
    plan.modules |= targets
    for site in SITES:
        for name in _outwards(plan, layer, names, site):
            left, right, bias = layer.eraser_state(name)
            for target in targets:
                erasers = plan.erasers.setdefault(target, [])
                if left.shape[-1]:
                    erasers.append(EraserInWeight(layer.path, name, side or site, left, right, bias))


def _outwards(plan: MergePlan, layer: ErasureLayer, names: list[str], site: str) -> list[str]:
    """The order in which erasers at one side of a module enter the weight: from the weight outwards.

    They act in the order in which they are named, and after those that are merged already. Where all of these are
    active, and each call named them in the order in which they act, that order stays.

    Raises:
        ValueError: If one that is not to be merged acts between them and the weight.
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


def _arranged(layers: dict[str, ErasureLayer], plan: MergePlan, target: str) -> list[EraserInWeight]:
    """All erasers in a layer, old and new, from the weight outwards: its own before those of a norm in front of it."""
    record = record_of(plan.modules[target])

    def place(eraser: EraserInWeight) -> tuple[bool, int, int]:
        layer, order = layers[eraser.path], plan.orders.get(eraser.path)
        site = layer.concept_erasure_site[eraser.adapter]
        # Where nothing is merged now, those that are there stay in their order.
        own_place = 0 if order is None else _from_the_weight(layer, site, order).index(eraser.adapter)
        return eraser.path != target, SITES.index(site), own_place

    return sorted([*(record.erasers if record is not None else []), *plan.erasers[target]], key=place)


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
                for part in _from_the_weight(layer, site, [merged, others]):
                    active += part
            layer._active_adapter = active
        for module in written:
            for name, value in originals(module).items():
                set_parameter(module, name, value)
        return probe.run()
    finally:
        snapshot.restore()


# ---- values, and the biases they need --------------------------------------------------------------------------------


def _values(
    layers: dict[str, ErasureLayer], plan: MergePlan, names: list[str], *, safe_merge: bool
) -> dict[str, dict[str, Tensor]]:
    """The merged parameters of each layer; the plan then has all erasers that are in them."""
    values = {}
    for target, module in plan.modules.items():
        erasers, record = _arranged(layers, plan, target), record_of(module)
        plan.rewritten |= record is not None and erasers[: len(record.erasers)] != record.erasers
        plan.erasers[target], values[target] = erasers, written_anew(module, erasers)
        for key, value in values[target].items():
            if safe_merge and not bool(torch.isfinite(value).all()):
                raise ValueError(f"Merging {names} makes {target}.{key} non-finite; the adapter seems to be broken.")
    return values


def _entries_for(model: nn.Module, plan: MergePlan, values: dict[str, dict[str, Tensor]]) -> list[BiasEntry]:
    """The entries of the configuration that give layers without a bias the one that they need.

    Raises:
        ValueError: If some of them get none from any.
    """
    modules = plan.modules.items()
    lacking = [t for t, module in modules if "bias" in values[t] and module._parameters.get("bias") is None]
    known = bias_entries(model) if lacking else []
    found = {target: next((entry for entry in known if target in entry.modules), None) for target in lacking}
    left = [target for target, entry in found.items() if entry is None]
    if left:
        sites = list(dict.fromkeys(eraser.path for target in left for eraser in plan.erasers[target]))
        some = len(sites) < len(plan.orders)
        without = f"leave out the sites that need one, exclude_modules={sites}, " if some else ""
        raise ValueError(
            f"The erasure at {sites[0]!r} cannot be merged: it keeps the mean of the activations, for which {left[0]!r}"
            f" would need a bias; it has none, and no entry of {type(model).__name__}'s configuration gives one. "
            f"Fit a purely linear erasure with ConceptErasureConfig(affine=False), {without}or use this adapter "
            "unmerged."
        )
    return list(dict.fromkeys(entry for entry in found.values() if entry is not None))
