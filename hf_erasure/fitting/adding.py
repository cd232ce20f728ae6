"""Add two fits of one adapter on different data, as if it had been fitted on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.adapters.beside import RECORD
from hf_erasure.adapters.saving import staged
from hf_erasure.erasers import ConceptMoments

from .checkpoint import FitCheckpoint
from .solving import SiteFit, solve_site

FIT_FOLDER = "fit"
_WEIGHTS = "adapter_model.safetensors"


def merge_fits(one: str | Path, other: str | Path, output: str | Path) -> ConceptErasureConfig:
    """Solve for the erasers of two one-pass fits together, from their moments; no model and no data are needed.

    Args:
        one: An adapter folder with its moments in `fit/`, as `hf-erasure fit … fit.sequential=false
            fit.checkpoint=true` writes it.
        other: Another, fitted on other data of the same base with the same configuration.
        output: The adapter folder to write; its moments go along, so that a third can be added.

    Returns:
        The configuration of the new adapter.

    Raises:
        ValueError: If a folder has no moments, or the two fits are not of the same adapter and base.
    """
    configs = [_read_config(folder) for folder in (one, other)]
    _check_same(configs[0], configs[1])
    config, sites = configs[0], list(configs[0].fitted_sites or {})
    pool = config.provenance["pool"]
    procedure: dict[str, Any] = {"pool": pool, "sequential": False, "active": config.provenance.get(RECORD, ())}
    stores = [FitCheckpoint(Path(folder) / FIT_FOLDER, config, sites, **procedure) for folder in (one, other)]
    total = FitCheckpoint(Path(output) / FIT_FOLDER, config, sites, **procedure)
    labelled, background = (_sum(stores, total, name, z) for name, z in (("labelled", config.z_dim), ("background", 0)))
    if not labelled:
        raise ValueError(f"{one} and {other} hold no moments: fit with fit.sequential=false fit.checkpoint=true.")
    weights = load_file(Path(one) / _WEIGHTS)
    fits = {}
    for site in sites:
        dtype = _parts_of(weights, site)["left"].dtype
        fits[site] = solve_site(site, [labelled[site]], background.get(site), dtype, config)
    _write(config, configs[1], fits, weights, Path(output))
    return config


def _read_config(folder: str | Path) -> ConceptErasureConfig:
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, ConceptErasureConfig) or not config.fitted:
        raise ValueError(f"{folder} holds no fitted erasure.")
    if not (Path(folder) / FIT_FOLDER).is_dir():
        raise ValueError(
            f"{folder} has no moments in {FIT_FOLDER!r}: fit with fit.sequential=false fit.checkpoint=true. "
            "Sequential fits cannot be added, since each site depends on the erasers before it."
        )
    return config


def _check_same(one: ConceptErasureConfig, other: ConceptErasureConfig) -> None:
    """The moments' own folder checks the rest: sites, labels, method, pool."""
    if one.provenance.get("fingerprint") != other.provenance.get("fingerprint"):
        raise ValueError("The two erasures were fitted on different base models: their activations cannot be added.")
    if one.provenance.get(RECORD, []) != other.provenance.get(RECORD, []):
        raise ValueError(
            "The two erasures were fitted beside different active adapters: their activations cannot be added. Fit "
            "both with the same adapters on."
        )


def _sum(stores: list[FitCheckpoint], total: FitCheckpoint, name: str, z_dim: int) -> dict[str, ConceptMoments]:
    """The moments of all stores, also written to `total`."""
    first, tally, batches, _ = stores[0].load_moments(name, z_dim)
    for store in stores[1:]:
        found, more, count, _ = store.load_moments(name, z_dim)
        if found.moments.keys() != first.moments.keys():
            raise ValueError(f"Only one of the two fits has {name} moments: fit both with the same kind of data.")
        for site, moments in found.moments.items():
            first.moments[site].merge(moments)
        tally.examples, tally.tokens, batches = (
            tally.examples + more.examples,
            tally.tokens + more.tokens,
            batches + count,
        )
    if first.moments:
        total.save_moments(name, first, tally, batches, "merged", final=True)
    return first.moments


def _parts_of(weights: dict[str, Tensor], site: str) -> dict[str, Tensor]:
    """The tensors of one site among those of an adapter file, by their last name."""
    marker = f".{site}.concept_erasure.concept_erasure_"
    return {key.rpartition(marker)[2]: value for key, value in weights.items() if marker in f".{key}"}


def _write(
    config: ConceptErasureConfig,
    other: ConceptErasureConfig,
    fits: dict[str, SiteFit],
    weights: dict[str, Tensor],
    output: Path,
) -> None:
    """An adapter folder with the keys of the first one and the new erasers."""
    for site, fit in fits.items():
        parts = dict(zip(("left", "right", "bias"), fit.parts(weights[next(iter(weights))].device), strict=True))
        for key in weights:
            marker = f".{site}.concept_erasure.concept_erasure_"
            if marker in f".{key}":
                weights[key] = parts[key.rpartition("concept_erasure_")[2]].contiguous()
    config.fitted_sites = {site: {"width": f.eraser.x_dim, "rank": f.eraser.rank} for site, f in fits.items()}
    for count in ("examples", "tokens"):
        config.provenance[count] += other.provenance[count]
    # What was measured of the first alone says nothing of the sum.
    config.provenance["leakage"] = {}
    with staged(output) as content:
        config.save_pretrained(str(content))
        save_file(weights, content / _WEIGHTS, metadata={"format": "pt"})
