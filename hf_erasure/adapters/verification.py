"""Does an adapter that seems to be there really act? The commonest reason for "same numbers as the base" is no."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConceptErasureConfig
from .layer import ErasureLayer, erasure_layers


@dataclass(frozen=True)
class Verification:
    """The result of `verify_adapter`: true when the adapter acts, and a text that says why, or why not."""

    ok: bool
    text: str

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return self.text


def verify_adapter(
    model: nn.Module, adapter_name: str = "default", batch: dict[str, Any] | None = None
) -> Verification:
    """Check that an erasure is loaded, active and changes the model's output.

    Args:
        model: A model with adapters, bare or wrapped in a `PeftModel`.
        adapter_name: The adapter to check.
        batch: Model inputs for the comparison of outputs; a dummy input of the model's own when left out.

    Returns:
        A `Verification`. Its text states the leakage of `last_hidden_state` that was measured when the adapter was
        fitted, beside the worst of the sites.
    """
    reason = _why_inactive(model, adapter_name)
    if reason is not None:
        return Verification(False, f"Adapter {adapter_name!r} does not act: {reason}")
    layers = erasure_layers(model, adapter_name)
    configs: Any = model.peft_config
    config: ConceptErasureConfig = configs[adapter_name]
    merged = all(adapter_name in layer.merged_adapters for layer in layers.values())
    change = None if merged else _output_change(model, adapter_name, list(layers.values()), batch)
    if change == 0:
        return Verification(
            False, f"Adapter {adapter_name!r} is active at {len(layers)} sites but the output is the same without it."
        )
    how = "merged into the weights" if merged else f"changes the output by {change:.2%} of its norm"
    ranks = [layer.concept_erasure_left[adapter_name].shape[-1] for layer in layers.values()]
    return Verification(
        True,
        f"Adapter {adapter_name!r} erases {config.concept!r} at {len(layers)} sites (rank {min(ranks)} to "
        f"{max(ranks)}) and {how}. {leakage_sentence(config)}",
    )


def leakage_sentence(config: ConceptErasureConfig) -> str:
    """What was measured at fitting, in words; says so when nothing was."""
    leakage: dict[str, list[float]] = config.provenance.get("leakage", {})
    if not leakage:
        return "No leakage was measured when it was fitted: pass eval_batches to fit_concept_erasure."
    final = leakage.get("last_hidden_state")
    sites = {name: pair for name, pair in leakage.items() if "last_hidden_state" not in name}
    worst = max(sites, key=lambda name: sites[name][1], default=None)
    parts = []
    if worst is not None:
        before, after = sites[worst]
        parts.append(f"worst site {worst} {before:.3f} → {after:.3f}")
    if final is not None:
        parts.append(f"last_hidden_state {final[0]:.3f} → {final[1]:.3f}")
    return (
        f"Held-out correlation with the concept when fitted: {', '.join(parts)}. On pre-LN models the intermediate "
        "hidden_states stay un-erased unless whole blocks are targeted."
    )


def _why_inactive(model: nn.Module, name: str) -> str | None:
    configs = getattr(model, "peft_config", None) or {}
    layers = erasure_layers(model, name)
    if name not in configs or not layers:
        known = sorted({other for layer in erasure_layers(model).values() for other in layer.adapters})
        return f"it is not loaded; the erasures here are {known or 'none'}. Call model.load_adapter(…)."
    config = configs[name]
    if not config.fitted:
        return "it was never fitted. Call fit_concept_erasure(model, batches, adapter_name=…)."
    absent = sorted(set(config.fitted_sites or {}) - set(layers))
    if absent:
        return f"{len(absent)} of its sites are gone from the model, the first is {absent[0]!r}. Load it again."
    for layer in layers.values():
        try:
            layer.check_values(name)
        except ValueError as error:
            return str(error)
        if name in layer.merged_adapters:
            continue
        if layer._disable_adapters:
            return "the adapters are disabled. Call model.enable_adapters() (enable_adapter_layers() of a PeftModel)."
        if name not in layer.applied_adapters(config.site):
            return f"it is not active; active is {layer.active_adapters}. Call model.set_adapter({name!r})."
    return None


def _output_change(model: nn.Module, name: str, layers: list[ErasureLayer], batch: dict[str, Any] | None) -> float:
    """How far the output moves when this adapter alone is taken away, relative to the output's norm."""
    inputs = dummy_batch(model) if batch is None else {k: v for k, v in batch.items() if k != "concept_labels"}
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            erased = _first_floating(model(**inputs))
            # Observers that change nothing stand in for the adapter, and leave all others as they are.
            for layer in layers:
                layer.observers[name] = _unchanged
            plain = _first_floating(model(**inputs))
    finally:
        for layer in layers:
            layer.observers.pop(name, None)
        for module in training:
            module.training = True
    return float((erased - plain).norm() / plain.norm().clamp_min(1e-30))


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


def _first_floating(output: Any) -> Tensor:
    values = output.values() if isinstance(output, dict) else output
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point()).detach().float()


def dummy_batch(model: nn.Module) -> dict[str, Tensor]:
    """A small input the model accepts: its own `dummy_inputs`, or noise of the shape its main input has."""
    wrapper: Any = model
    base: Any = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(base.parameters()).device
    if getattr(base, "main_input_name", "input_ids") == "pixel_values":
        config = base.config
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        noise = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(2, config.num_channels, *size, generator=noise).to(device, base.dtype)}
    dummies = getattr(base, "dummy_inputs", {})
    if getattr(base, "main_input_name", "input_ids") not in dummies:
        raise ValueError(f"{type(base).__name__} has no dummy input to compare outputs on: pass batch=, its inputs.")
    return {name: value.to(device) for name, value in dummies.items()}
