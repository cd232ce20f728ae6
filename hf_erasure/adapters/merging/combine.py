"""One erasure adapter for the concepts of several that are fitted already."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model
from torch import nn

from hf_erasure._version import __version__
from hf_erasure.erasers import Eraser, combine_erasers
from hf_erasure.models.model import as_attribute, without_peft

from ..common.acting import naming_what_goes_off, without
from ..common.lookup import adapter_of
from ..common.provenance import RECORD, Provenance
from ..common.tuner import exactly
from ..erasure.config import CONCEPT_ERASURE, ConceptErasureConfig
from ..erasure.layer import ErasureLayer, erasure_layers

Sites = dict[str, Eraser]


def combine_fitted(
    model: Any, names: Sequence[str], into: str, *, sticky: bool = False, fitted_anew: bool = False
) -> ConceptErasureConfig:
    """Make one erasure adapter that removes the concepts of several fitted ones, from their erasers.

    Arguments and result are those of `hf_erasure.combine_adapters`. Of erasers that will be `fitted_anew`, it is not
    said that they are approximate at deeper sites.

    Raises:
        ValueError: As `hf_erasure.combine_adapters`; the model is as it was then.
    """
    configs, model = _to_combine(model, names, into)
    parts = {name: erasure_layers(model, name) for name in configs}
    sites = _combined_sites(model, configs, parts)
    config = _combined_config(configs, sites, sticky)
    _attach(model, config, into, list(configs))
    for path, layer in erasure_layers(model, into).items():
        kept = {parts[name][path].eraser_state(name)[0].dtype for name in configs if path in parts[name]}
        layer.set_eraser(into, sites[path], torch.float64 if torch.float64 in kept else torch.float32)
    if len(sites) > 1 and not fitted_anew:
        warnings.warn(
            f"{into!r} was combined from erasers that were fitted while the other concepts were still there upstream. "
            "It is exact at the sites whose input the other adapters leave alone, such as the first one; what arrives "
            "at deeper sites is changed by all of them. To erase the concepts from the whole network, fit anew: give "
            "batches={name: …} with the labels of each.",
            stacklevel=3,
        )
    attached: ConceptErasureConfig = model.peft_config[into]
    return attached


def _to_combine(model: Any, names: Sequence[str], into: str) -> tuple[dict[str, ConceptErasureConfig], Any]:
    """The configurations of adapters that can be combined, and what holds them all."""
    if isinstance(names, str) or len(set(names)) < 2:
        raise ValueError(f"names={names!r}: give the names of at least two adapters, as in ['gender', 'pos'].")
    if len(set(names)) < len(names):
        raise ValueError(f"names={list(names)} has an adapter twice: give each once.")
    found = [adapter_of(model, name, ConceptErasureConfig) for name in names]
    holder = found[0].holder
    if any(place.owner is not found[0].owner for place in found):
        places = {place.name: as_attribute(place.path) for place in found}
        raise ValueError(f"The adapters are on different models, {places}: combine those of one.")
    if into in holder.peft_config:
        raise ValueError(f"into={into!r} is the name of an adapter that is there already: choose another name.")
    for place in found:
        if not place.config.fitted:
            raise ValueError(f"Adapter {place.name!r} was never fitted. {place.config.remedy}")
    configs = {place.name: place.config for place in found}
    for field, remedy in (
        ("site", "only erasers at the same side of a module act on the same activations"),
        ("affine", "fit all of them with the same"),
    ):
        values = {name: getattr(config, field) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            raise ValueError(f"The adapters differ in {field}, {values}: {remedy}.")
    return configs, holder


def _combined_sites(
    model: nn.Module, configs: dict[str, ConceptErasureConfig], parts: dict[str, dict[str, ErasureLayer]]
) -> Sites:
    """The eraser of every site that one of the adapters acts on, in the model's order."""
    for name, layers in parts.items():
        if any(name in layer.merged_adapters for layer in layers.values()):
            raise ValueError(f"Adapter {name!r} is merged into the weights: call unmerge_adapter() first.")
        for layer in layers.values():
            layer.check_values(name)
    sites = {}
    for path in erasure_layers(model):
        # In an order of their own, so that the same adapters give the same eraser to the bit.
        here = [name for name in sorted(configs) if path in parts[name]]
        if not here:
            continue
        erasers = []
        for name in here:
            left, right, bias = (part.cpu() for part in parts[name][path].eraser_state(name))
            erasers.append(Eraser(left, right, bias if configs[name].affine else None))
        rows = [float(Provenance.of(configs[name]).examples or 0) for name in here]
        try:
            sites[path] = combine_erasers(erasers, rows if all(rows) else None)
        except ValueError as error:
            raise ValueError(f"At {path!r} {here} cannot be combined: {error}") from error
    return sites


def _combined_config(configs: dict[str, ConceptErasureConfig], sites: Sites, sticky: bool) -> ConceptErasureConfig:
    first = next(iter(configs.values()))
    methods = {config.method for config in configs.values()}
    ranks = [eraser.rank for eraser in sites.values()]
    return ConceptErasureConfig(
        task_type=first.task_type,
        concept="+".join(dict.fromkeys(config.concept for config in configs.values())),
        concept_dim=sum(config.z_dim for config in configs.values()),
        target_modules=list(sites),
        site=first.site,
        # Orthogonal projections together make one; with an oblique one among them, they do not.
        method="leace" if "leace" in methods else "inlp" if methods == {"inlp"} else "orth",
        affine=first.affine,
        rank=max(ranks) or None,
        sticky=sticky,
        fitted=True,
        fitted_sites={path: {"width": eraser.x_dim, "rank": eraser.rank} for path, eraser in sites.items()},
        provenance=_combined_provenance(configs),
    )


def _combined_provenance(configs: dict[str, ConceptErasureConfig]) -> dict[str, Any]:
    """What the new adapter says about itself: nothing was measured of it, and its parts were."""
    sources = [Provenance.of(config) for config in configs.values()]
    combined = {}
    for name, config in configs.items():
        told = {field: getattr(config, field) for field in ("concept", "labels", "concept_dim", "method", "rank")}
        kept = {key: value for key, value in config.provenance.items() if key not in ("fingerprint", RECORD)}
        combined[name] = told | kept
    return {
        "hf_erasure_version": __version__,
        "base_class": sources[0].base_class or None,
        "examples": sum(source.examples or 0 for source in sources),
        "tokens": sum(source.tokens or 0 for source in sources),
        "pool": "+".join(dict.fromkeys(source.pool for source in sources if source.pool)),
        "leakage": {},
        "combined_from": combined,
        RECORD: without((entry for source in sources for entry in source.active_adapters or ()), configs),
        "fingerprint": {key: value for source in sources for key, value in source.fingerprint.items()},
    }


def _attach(model: Any, config: ConceptErasureConfig, into: str, names: list[str]) -> None:
    """Add the adapter as this model adds adapters; that the former ones went dark needs no warning."""
    if isinstance(model, PeftModel) and model.peft_type != CONCEPT_ERASURE:
        raise ValueError(
            f"This PeftModel takes {getattr(model.peft_type, 'value', model.peft_type)} adapters only: call "
            "combine_adapters(model.get_base_model(), …)."
        )
    base = without_peft(model)
    config.target_modules = exactly(list(config.fitted_modules), base)
    with warnings.catch_warnings(), naming_what_goes_off(model, into, expected=names):
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        if isinstance(model, PeftModel):
            model.add_adapter(into, config)
        elif hasattr(model, "add_adapter"):
            model.add_adapter(config, adapter_name=into)
        else:
            inject_adapter_in_model(config, model, adapter_name=into)
