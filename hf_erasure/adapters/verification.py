"""Check whether a loaded adapter really acts: a model with the numbers of its base often has one that does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_erasure.models.dummy import dummy_batch
from hf_erasure.models.model import callee_of, distance, evaluating, floats_of, forked_rng, inputs_of

from .common.config import ChildConfig, Provenance, number_of
from .common.layer import adapter_children
from .common.lookup import AdapterNotFound, FoundAdapter, adapter_of
from .erasure.layer import site_layers
from .gradiend.config import GradiendConfig
from .gradiend.forward import UneditedUses, why_not_editable
from .gradiend.layer import gradiend_layers
from .gradiend.state import edited, kept_share, targeted_parameters
from .loading.fingerprint import differences_since_fit


@dataclass(frozen=True)
class Verification:
    """The result of `verify_adapter`: true when the adapter acts, with a text that says what it does, or why not."""

    ok: bool
    text: str

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return self.text


def verify_adapter(
    model: nn.Module, adapter_name: str = "default", batch: dict[str, Any] | None = None
) -> Verification:
    """Check that an adapter is loaded, active and changes the model's output.

    Args:
        model: A model with adapters, or a module that contains one: a `PeftModel`, a `SentenceTransformer`,
            `DataParallel`, DDP, FSDP, a compiled model, a module of your own.
        adapter_name: The adapter to check.
        batch: Model inputs for the comparison of outputs; the model's own dummy input by default.

    Returns:
        A `Verification`. For an erasure its text states the leakage of `last_hidden_state` that was measured when the
        adapter was fitted, and that of the worst site. If other adapters act now than at fitting, the text names them:
        the measured figures hold only with the adapters of that time.

    Raises:
        ValueError: If several models inside `model` have an adapter of that name.
    """
    name = adapter_name
    try:
        found = adapter_of(model, name, ChildConfig)
        reason = _why_inactive(found)
    except AdapterNotFound as error:
        reason = str(error)
    if reason is not None:
        return Verification(False, f"Adapter {name!r} does not act: {reason}")
    owner, config, children = found.owner, found.config, adapter_children(found.owner, name)
    outcome = "merged into the weights"
    if not all(name in child.merged_adapters for child in children):
        output = _runner(model, found, batch)
        active = output()
        with ExitStack() as stack:  # in this block the adapter does not act, and the others act as before
            for child in children:
                stack.enter_context(child.suspend(name))
            plain = output()
        weights = targeted_parameters(owner, name) if isinstance(config, GradiendConfig) else {}
        merged = plain
        if weights and not any(map(why_not_editable, weights.values())):
            with edited(owner, name):
                merged = output()
        # Both use the same weights, bit for bit; kernels may sum in another order, which changes far less.
        if merged is not plain and distance([active], [merged]) > 1e-2 * distance([plain], [merged]):
            with UneditedUses(weights) as used:
                output()
            return Verification(
                False,
                f"Adapter {name!r} acts in part only: the output differs from that of the merged weights. "
                f"{used.names or 'Some weights'} are read in a way that an unmerged change does not reach: not as an "
                "attribute of their module, or outside of the model that the adapter was added to. Merge the adapter "
                "with merge_adapter() or merge_and_unload() of the PeftModel, or leave such modules out with "
                "exclude_modules.",
            )
        change = distance([active], [plain])
        if change == 0:
            where = f"{len(children)} {config.places}"
            return Verification(False, f"Adapter {name!r} is active at {where} but the output is the same without it.")
        outcome = f"changes the output by {change:.2%} of its norm"
    effect, remark = _gradiend_text(owner, name, config) if isinstance(config, GradiendConfig) else _erasure_text(found)
    sentences = [f"Adapter {name!r} {effect} and {outcome}.", remark, differences_since_fit(found.model, name)]
    return Verification(True, " ".join(filter(None, sentences)))


def _gradiend_text(model: nn.Module, name: str, config: GradiendConfig) -> tuple[str, str]:
    """Say in words what an acting GRADIEND adapter does; and how much rounding leaves of it, if not nearly all."""
    layers, parameters = gradiend_layers(model, name).values(), targeted_parameters(model, name).values()
    share = sum(edit.values.numel() for layer in layers for _, edit in layer.edits_of(name))
    total = sum(parameter.numel() for parameter in parameters)
    pair = (config.pairs or [])[config.pair_index(config.pair)]
    effect = (
        f"steers {config.feature!r} ({pair[0]} +1, {pair[1]} −1) with feature_factor={config.feature_factor:g} and "
        f"learning_rate={config.learning_rate:g} in {share:,} of {total:,} weights"
    )
    if any(name in layer.merged_adapters for layer in layers) or any(p.device.type == "meta" for p in parameters):
        return effect, ""
    kept = kept_share(model, name)
    return effect, "" if kept > 0.999 else f"Rounding to the dtype of the weights leaves {kept:.0%} of the edit."


def _erasure_text(found: FoundAdapter[Any]) -> tuple[str, str]:
    """Say in words what an acting erasure does; and what was measured when it was fitted."""
    ranks = [x.eraser_state(found.name)[0].shape[-1] for x in site_layers(found.owner, found.name).values()]
    config, provenance = found.config, Provenance.of(found.config)
    shared = f" of {len(config.fitted_modules)} modules" if len(config.fitted_modules) > len(ranks) else ""
    action = f"erases {config.concept!r}"
    if config.target is not None:
        action = f"moves {config.concept!r} to target={config.target!r}"
    strength = "" if config.strength == 1 else f" with strength={config.strength:g}"
    effect = f"{action}{strength} at {number_of(len(ranks), 'site')}{shared} (rank {min(ranks)} to {max(ranks)})"
    reader = f" ({provenance.reader})" if provenance.reader else ""
    guarded = f"It was fitted for pool={provenance.pool!r}{reader}. " if provenance.pool else ""
    leakage: dict[str, tuple[float, float]] = provenance.leakage
    if not leakage:
        return effect, f"{guarded}No leakage was measured when it was fitted: pass eval_batches to fit_concept_erasure."

    def leakage_text(site: str) -> str:
        ends = [f"{end:.2f}" for end in provenance.leakage_intervals.get(site, ())]
        interval = f" (95 %: [{ends[0]}, {ends[1]}] → [{ends[2]}, {ends[3]}])" if ends else ""
        before, after = (max(0.0, value) for value in leakage[site])  # older versions wrote signed values
        return f"{site} {before:.3f} → {after:.3f}{interval}"

    sites = [name for name in leakage if "last_hidden_state" not in name]
    parts = [f"worst site {leakage_text(max(sites, key=lambda name: leakage[name][1]))}"] if sites else []
    parts += [leakage_text(name) for name in leakage if name == "last_hidden_state"]
    measured = f"Correlation with the concept on {provenance.measured_on or 'held-out data'} when fitted"
    if config.dial is not None:
        measured += ", with strength 1 and without a target"
    return effect, f"{guarded}{measured}: {', '.join(parts)}. {config.reach}"


def _why_inactive(found: FoundAdapter[ChildConfig]) -> str | None:
    name, config, children = found.name, found.config, adapter_children(found.owner, found.name)
    if config.why_idle:
        return config.why_idle
    absent = sorted(set(config.fitted_modules) - {child.path for child in children})
    if absent:
        return (
            f"{len(absent)} of its {config.places} are gone from the model, the first is {absent[0]!r}. Load it again."
        )
    for child in children:
        try:
            child.check_values(name)
        except ValueError as error:
            return str(error)
        if name in child.merged_adapters:
            continue
        if child.disable_adapters:
            return "the adapters are disabled. Call model.enable_adapters() (enable_adapter_layers() of a PeftModel)."
        if name not in child.switched_on():
            return f"it is not active; active is {child.active_adapters}. Call model.set_adapter({name!r})."
    return None


def _runner(model: nn.Module, found: FoundAdapter[ChildConfig], batch: dict[str, Any] | None) -> Callable[[], Tensor]:
    """A function that returns the first floating-point output of the model around an adapter, or of its wrapper."""
    callee: nn.Module = callee_of(model, found.model)
    inputs = inputs_of(batch or {})
    if batch is None:
        inputs = dummy_batch(found.model)
    else:  # a forward with `**kwargs` takes any input, so only named parameters count
        inner, outer = (inputs.keys() <= inspect.signature(m.forward).parameters.keys() for m in (found.model, model))
        callee = model if outer and not inner else callee

    def output() -> Tensor:
        with evaluating(callee), forked_rng(callee):
            returned = callee(**inputs)
        tensor = next(floats_of(returned), None)
        if tensor is None:
            raise ValueError(f"The model returns a {type(returned).__name__}, in which no tensor to compare was found.")
        return tensor.detach().float()

    return output
