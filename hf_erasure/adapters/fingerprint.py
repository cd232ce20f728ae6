"""Recognise the base model an adapter was fitted on by a sample of its weights.

A hash would call a float32 and a bf16 copy of one checkpoint different; sampled values, compared within the coarser
dtype's rounding, do not.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .base_config import ChildConfig

SAMPLES = 64
# Below this correlation of the sampled values the weights are those of another model, not a further training of it.
RELATED = 0.9


def fingerprint(model: nn.Module, sites: list[str]) -> dict[str, Any]:
    """Sample the weights at and around `sites`.

    Args:
        model: The base model.
        sites: Names of modules.

    Returns:
        Parameter name → `{"shape", "dtype", "positions", "values"}`, for JSON.
    """
    found: dict[str, Any] = {}
    for name, parameter in _telling_parameters(model, sites).items():
        flat = parameter.detach().reshape(-1)
        positions = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), device="cpu").long().unique()
        found[name] = {
            "shape": list(parameter.shape),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "positions": positions.tolist(),
            "values": flat[positions.to(flat.device)].double().tolist(),
        }
    return found


def check_base(model: nn.Module, config: ChildConfig) -> None:
    """Compare a fitted adapter with the model it is about to be attached to.

    Warns when the weights are a further-trained version of the adapter's base.

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
    seen: list[float] = []
    kept: list[float] = []
    for name, sample in config.provenance.get("fingerprint", {}).items():
        parameter = _get_parameter(model, name)
        if parameter is None or parameter.device.type == "meta" or not parameter.is_floating_point():
            continue  # offloaded or quantised: no plain value to look at
        if list(parameter.shape) != sample["shape"]:
            raise ValueError(
                f"The {config.described} was fitted on {fitted_on}, where {name!r} has shape "
                f"{sample['shape']}; here it has {list(parameter.shape)}. Load it into the model it was fitted on."
            )
        positions = torch.tensor(sample["positions"], device=parameter.device)
        seen += parameter.detach().reshape(-1)[positions].double().tolist()
        kept += sample["values"]
    _compare(torch.tensor(seen, device="cpu"), torch.tensor(kept, device="cpu"), config)


def _compare(seen: Tensor, kept: Tensor, config: ChildConfig) -> None:
    # bf16 keeps 8 significant bits; two copies rounded once each differ by at most 2^-8 of the value.
    if seen.numel() < 2 or bool(torch.isclose(seen, kept, rtol=2**-7, atol=1e-6).all()):
        return
    correlation = float(torch.corrcoef(torch.stack([seen, kept]))[0, 1])
    fitted_on = config.base_model_name_or_path or config.provenance.get("base_class")
    if not correlation >= RELATED:
        raise ValueError(
            f"The {config.described} was fitted on {fitted_on}, whose weights correlate with this model's "
            f"by {correlation:.2f}: this is another model. Load the adapter into its own base, or fit it on this one."
        )
    warnings.warn(
        f"The base model has been trained further since the {config.described} was fitted (sampled weights "
        f"correlate by {correlation:.4f}). It was made for the old weights: fit the adapter again.",
        stacklevel=2,
    )


def _telling_parameters(model: nn.Module, sites: list[str]) -> dict[str, nn.Parameter]:
    """One matrix next to each site; a norm alone tells little, since many models leave it at ones."""
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and p.device.type != "meta"]
    matrices = [(n, p) for n, p in matrices if p.is_floating_point() and type(p.data) is Tensor and "lora_" not in n]
    found = {}
    for site in sites:
        around = site
        while True:
            prefix = f"{around}." if around else ""
            match = next(((n, p) for n, p in matrices if n.startswith(prefix)), None)
            if match is not None:
                found[match[0].replace(".base_layer.", ".")] = match[1]
            if match is not None or not around:
                break
            around = around.rpartition(".")[0]
    return found


def _get_parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of that name, also where a LoRA has wrapped its module since."""
    module_name, _, parameter = name.rpartition(".")
    for candidate in (name, f"{module_name}.base_layer.{parameter}"):
        try:
            return model.get_parameter(candidate)
        except AttributeError:
            continue
    return None


def _hint(model: nn.Module, sites: list[str]) -> str:
    """Where the sites are found one level down or up, as between a bare encoder and a model with a head."""
    names = {name for name, _ in model.named_modules()}
    for child, _ in model.named_children():
        if all(f"{child}.{site}" in names for site in sites):
            return f" They exist below model.{child}: call model.{child}.load_adapter(…)."
    return " Load it into the model it was fitted on."
