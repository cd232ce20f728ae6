"""Recognise the base model an adapter was fitted on by a sample of its weights.

A hash would call a float32 and a bf16 copy of one checkpoint different; sampled values, compared within the coarser
dtype's rounding, do not. Of a quantised weight the numbers that it stands for are compared, only by their correlation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .base_config import ChildConfig
from .merging import shared_weights
from .offloading import value_of, why_not_reachable
from .quantised import dequantised, is_quantised

SAMPLES = 64
QUANTISED = "quantised"
# Below this correlation of the sampled values the weights are those of another model, not a further training of it.
RELATED = 0.9
# Packed into 2 bits a normal sample still correlates by 0.85 with itself, and 64 values of another model by 0 ± 0.13.
RELATED_QUANTISED = 0.5


def fingerprint(model: nn.Module, sites: list[str]) -> dict[str, Any]:
    """Sample the weights at and around `sites`.

    Args:
        model: The base model.
        sites: Names of modules.

    Returns:
        Parameter name → `{"shape", "dtype", "positions", "values"}`, for JSON; of a quantised one the shape and values
        are those it stands for.
    """
    found: dict[str, Any] = {}
    for name, weight, dtype in _telling_weights(model, sites):
        flat = weight.reshape(-1)
        positions = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), device="cpu").long().unique()
        found[name] = {
            "shape": list(weight.shape),
            "dtype": dtype,
            "positions": positions.tolist(),
            "values": flat[positions.to(flat.device)].double().tolist(),
        }
    return found


def check_base(model: nn.Module, config: ChildConfig) -> None:
    """Compare a fitted adapter with the model it is about to be attached to.

    Warns when the weights are a further-trained version of the adapter's base, and when none of them can be read.

    Raises:
        ValueError: If a site is missing, has another width, or the weights are those of another model.
    """
    sites = list(config.fitted_modules)
    modules = dict(model.named_modules())
    fitted_on = config.provenance.get("base_class", "another model")
    missing = [site for site in sites if site not in modules]
    if missing:
        raise ValueError(
            f"The {config.described} was fitted on {fitted_on} and acts at {missing[0]!r} and "
            f"{len(missing) - 1} other modules that this {type(model).__name__} does not have.{_hint(model, sites)}"
        )
    exact, rough = _Pairs(), _Pairs()
    fingerprinted = config.provenance.get("fingerprint", {})
    for name, sample in fingerprinted.items():
        weight, dtype = _weight(model, name)
        if weight is None:
            continue
        if list(weight.shape) != sample["shape"]:
            raise ValueError(
                f"The {config.described} was fitted on {fitted_on}, where {name!r} has shape "
                f"{sample['shape']}; here it has {list(weight.shape)}. Load it into the model it was fitted on."
            )
        positions = torch.tensor(sample["positions"], device=weight.device)
        pairs = rough if QUANTISED in (dtype, sample["dtype"]) else exact
        pairs.seen += weight.reshape(-1)[positions].double().tolist()
        pairs.kept += sample["values"]
    if fingerprinted and not exact.seen and not rough.seen:
        warnings.warn(
            f"Whether this is the base that the {config.described} was fitted on ({fitted_on}) could not be checked: "
            f"none of the {len(fingerprinted)} weights to compare, {next(iter(fingerprinted))!r} among them, can be "
            "read here, since they are offloaded, sharded, or packed by a quantiser.",
            stacklevel=2,
        )
    _compare(exact, config, RELATED)
    _compare(rough, config, RELATED_QUANTISED)


@dataclass
class _Pairs:
    """Sampled values, as they are here and as they were where the adapter was fitted."""

    seen: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)


def _compare(pairs: _Pairs, config: ChildConfig, related: float) -> None:
    seen, kept = torch.tensor(pairs.seen, device="cpu"), torch.tensor(pairs.kept, device="cpu")
    # bf16 keeps 8 significant bits; two copies rounded once each differ by at most 2^-8 of the value.
    if seen.numel() < 2 or bool(torch.isclose(seen, kept, rtol=2**-7, atol=1e-6).all()):
        return
    correlation = float(torch.corrcoef(torch.stack([seen, kept]))[0, 1])
    fitted_on = config.base_model_name_or_path or config.provenance.get("base_class")
    if not correlation >= related:
        raise ValueError(
            f"The {config.described} was fitted on {fitted_on}, whose weights correlate with this model's "
            f"by {correlation:.2f}: this is another model. Load the adapter into its own base, or fit it on this one."
        )
    if related == RELATED_QUANTISED:
        return  # what a quantiser has rounded off cannot be told from further training
    warnings.warn(
        f"The base model has been trained further since the {config.described} was fitted (sampled weights "
        f"correlate by {correlation:.4f}). It was made for the old weights: fit the adapter again.",
        stacklevel=2,
    )


def _telling_weights(model: nn.Module, sites: list[str]) -> Iterator[tuple[str, Tensor, str]]:
    """One matrix next to each site, with the name of its dtype; a norm alone tells little, as many stay at ones."""
    matrices = [n for n, p in model.named_parameters() if p.dim() > 1 and "lora_" not in n]
    # Of a tied weight one name is enough, the same wherever the model is.
    tied = shared_weights(model)
    matrices = [n for n in matrices if _is_whole(model.get_parameter(n)) and tied.get(n, [n])[0] == n]
    told: dict[str, bool] = {}  # names → whether there was something to read
    for site in sites:
        for full in _outwards(site, matrices):
            name = full.replace(".base_layer.", ".")
            if name not in told:
                weight, dtype = _weight(model, name)
                told[name] = weight is not None
                if weight is not None:
                    yield name, weight, dtype
            if told[name]:
                break


def _outwards(site: str, matrices: list[str]) -> Iterator[str]:
    """The matrices inside a module, then those inside the module that contains it, and so on."""
    around = site
    while around:
        yield from (name for name in matrices if name.startswith(f"{around}."))
        around = around.rpartition(".")[0]
    yield from matrices


def _is_whole(parameter: nn.Parameter) -> bool:
    """Whether one process sees all of a parameter."""
    return type(parameter.data) is Tensor or is_quantised(parameter)


def _weight(model: nn.Module, name: str) -> tuple[Tensor | None, str]:
    """The numbers of a parameter with the name of their dtype; None where there is nothing to read.

    It is found also where a LoRA has wrapped its module since.
    """
    path, _, own = name.rpartition(".")
    for candidate in (path, f"{path}.base_layer"):
        try:
            module = model.get_submodule(candidate)
        except AttributeError:
            continue
        parameter = module._parameters.get(own)
        if parameter is None or not _is_whole(parameter) or why_not_reachable(module) is not None:
            continue
        if not is_quantised(parameter):
            return value_of(module, own), str(parameter.dtype).removeprefix("torch.")
        if parameter.device.type != "meta":
            return dequantised(module, own), QUANTISED
    return None, ""


def _hint(model: nn.Module, sites: list[str]) -> str:
    """Where the sites are found one level down or up, as between a bare encoder and a model with a head."""
    names = {name for name, _ in model.named_modules()}
    for child, _ in model.named_children():
        if all(f"{child}.{site}" in names for site in sites):
            return f" They exist below model.{child}: call model.{child}.load_adapter(…)."
    return " Load it into the model it was fitted on."
