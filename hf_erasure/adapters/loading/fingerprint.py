"""Recognise the base model an adapter was fitted on, by the names of its modules and a sample of its weights.

The same modules have other names in the bare model than in a model with a head. A hash of the weights would call a
float32 and a bf16 copy of one checkpoint different. Therefore sampled values are compared, within the rounding of the
coarser dtype. Quantised weights are unpacked, and compared only by their correlation.

Every weight that an adapter acts on is sampled: the weights of its modules and, for a module without a matrix (such as
a norm, whose weights often are all ones), also the next matrix. Only the sampled values are read, also from weights
that accelerate keeps on disk. Weights that cannot be read (sharded, or packed for good) are left out, with a warning.

An eraser or a feature that was fitted while other adapters acted is only right for the model with them. So fitting
records which others acted, each with a few of its values, since names change from one session to the next.

Values are correlated within each weight, about its own mean and in units of its own spread: otherwise norms near one
and matrices near zero would make any two models correlate. Constant weights are left out of the correlation.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_erasure.models.model import as_attribute

from ..common.acting import adapters_now, warn_user
from ..common.config import ChildConfig, Provenance, field_error, is_a, number_of, short
from ..common.layer import innermost
from ..common.placement import QUANTISED, is_quantised, shared_weights, values_and_dtype

Rename = Callable[[str], str]

# How many values are kept: of a weight at most, of all weights together, and of a weight at least. They are enough for
# a correlation, and the configuration file stays at some hundred kilobytes.
SAMPLES, TOTAL, FEWEST = 64, 2048, 4
# Below this correlation of the sampled values the weights are those of another model, not of one trained further.
RELATED = 0.9
# A normal sample still correlates by 0.85 with its copy in 2 bits, and 64 values of another model by 0 ± 0.13.
RELATED_QUANTISED = 0.5
# A normal sample correlates by 0.99 with its copy in 4 bits, 0.9999 in 8 bits. Below this, more than rounding differs.
ROUNDED = 0.97
# With at least so many values, one matrix below this correlation means another model, even if all others are the same.
MIN_VALUES, RELATED_MATRIX = 16, 0.5
# New rows of two models differ by at most this share of the weight's spread if both were made as means of old rows.
_NEW_ROW_TOLERANCE = 1e-2
ANY_BASE = "HF_ERASURE_ANY_BASE"
# How many tensors of another adapter are sampled, with two values of each.
_MOST_TENSORS = 16
# The relative change of a value by rounding to bfloat16, with a margin.
_ROUNDING = 2.0**-7


def fingerprint(model: nn.Module, sites: list[str]) -> dict[str, Any]:
    """Sample the weights at and around modules: parameter → `{"shape", "dtype", "positions", "values"}`, for JSON."""
    names = _weights_to_sample(model, sites)
    each = max(FEWEST, min(SAMPLES, TOTAL // max(1, len(names))))
    found: dict[str, Any] = {}
    for name in names:
        weight, dtype = values_and_dtype(model, name)
        if weight is None or not weight.numel():
            continue
        positions = torch.linspace(0, weight.numel() - 1, min(each, weight.numel()), device="cpu", dtype=torch.double)
        found[name] = _sample_weight(weight, dtype, positions.long().unique())
    return found


def check_base(model: nn.Module, config: ChildConfig) -> None:
    """Check the model to which an adapter is attached, and rename the adapter's modules as this model names them.

    A model that lacks a site, that has a weight which the tensors do not fit, or that has other weights is refused;
    other weights are only a warning where the environment variable `HF_ERASURE_ANY_BASE` is 1. Weights that were
    trained further or cannot be read give a warning. After tokens were added or removed, only common rows are compared.
    """
    rename = find_renaming(model, config.fitted_modules)
    if rename is None:
        _refuse_absent(model, config)
    elif rename is not str:
        rename_modules(config, rename)
    samples = Provenance.of(config).fingerprint
    if config.fitted and not samples:
        warn_user(
            f"The {config.described} does not say what weights it was fitted on ({_base_text(config)}): whether "
            "this is the same base cannot be checked."
        )
    pairs = _pairs_of(model, config, samples)
    for is_packed, related in ((False, RELATED), (True, RELATED_QUANTISED)):
        group = [pair for pair in pairs if (QUANTISED in pair.dtypes) is is_packed]
        changed = [pair for pair in group if bool(pair.differ().any())]
        if changed:
            _judge_change(changed, group, config, related)


def _pairs_of(model: nn.Module, config: ChildConfig, samples: dict[str, Any]) -> list[_SamplePair]:
    """Pair a fingerprint's samples with this model's values at the same places; weights of other shape are refused."""
    pairs, unread, of_tokens = [], [], functools.cache(lambda: _token_weights(model))
    for name, sample in samples.items():
        _check_sample(name, sample)
        weight, dtype = values_and_dtype(model, name)
        if weight is None:
            unread.append(name)
            continue
        shape = list(weight.shape)
        if shape != sample["shape"]:
            is_resized = name in of_tokens() and len(shape) == len(sample["shape"]) and shape[1:] == sample["shape"][1:]
            _check_shape(name, shape, sample["shape"], config, is_resized)
            if not is_resized:
                continue
        size = max(1, math.prod(shape[1:]))  # the size of a row
        common = min(shape[:1] + sample["shape"][:1], default=1) * size
        positions = torch.tensor([p for p in sample["positions"] if p < common], device="cpu", dtype=torch.long)
        values = torch.tensor(sample["values"][: len(positions)], device="cpu", dtype=torch.double)
        # Only these values are read, whatever the strides; `None` gives a weight without axes one axis.
        actual = weight[None][torch.unravel_index(positions.to(weight.device), (1, *weight.shape))]
        pair = _SamplePair(name, actual.to("cpu", torch.double), values, {dtype, sample["dtype"]}, len(shape) > 1)
        if QUANTISED not in pair.dtypes and bool(pair.differ().any()) and name in of_tokens():
            pair = _without_new_rows(pair, positions // size, sample.get("last", weight.numel()) // size, config)
        if len(pair.actual):
            pairs.append(pair)
    if unread:
        is_all = len(unread) == len(samples)
        checked = "could not be checked: none" if is_all else f"was checked in part: {len(unread)}"
        warn_user(
            f"Whether this is the base that the {config.described} was fitted on ({_base_text(config)}) {checked} of "
            f"the {len(samples)} weights to compare, {unread[0]!r} among them, {'can' if is_all else 'cannot'} be read "
            "here, since they are offloaded, sharded, or packed by a quantiser."
        )
    return pairs


def resample(model: nn.Module, config: ChildConfig) -> dict[str, Any]:
    """Sample a model at the places of an adapter's fingerprint, under the adapter's names.

    Weights that cannot be read or are smaller here are left out.
    """
    found, rename = {}, find_renaming(model, config.fitted_modules) or str
    for name, sample in Provenance.of(config).fingerprint.items():
        _check_sample(name, sample)
        weight, dtype = values_and_dtype(model, rename(name))
        if weight is not None and max(sample["positions"]) < weight.numel():
            positions = torch.tensor(sample["positions"], device="cpu", dtype=torch.long)
            found[name] = sample | _sample_weight(weight, dtype, positions)
    return found


def most_different_weight(fitted: dict[str, Any], actual: dict[str, Any]) -> str:
    """The weight that differs most between two fingerprints of the same places; empty if only rounding differs."""
    pairs = []
    for name in fitted.keys() & actual.keys():
        _check_sample(name, fitted[name])
        _check_sample(name, actual[name])
        now, then = (torch.tensor(of[name]["values"], device="cpu", dtype=torch.double) for of in (actual, fitted))
        dtypes = {actual[name]["dtype"], fitted[name]["dtype"]}
        pairs.append(_SamplePair(name, now, then, dtypes, len(fitted[name]["shape"]) > 1))
    changed = [pair for pair in pairs if bool(pair.differ().any())]
    changed = [pair for pair in changed if not (QUANTISED in pair.dtypes and _correlation(changed)[0] >= ROUNDED)]
    return min(changed, key=_correlation_of).name if changed else ""


@dataclass
class _SamplePair:
    """Sampled values of one weight: `actual` in this model, and `fitted` where the adapter was fitted."""

    name: str
    actual: Tensor
    fitted: Tensor
    dtypes: set[str]  # contains `QUANTISED` where a quantiser has packed one of the two weights
    is_matrix: bool

    def differ(self) -> Tensor:
        """Which values differ by more than the coarser dtype's rounding: each was rounded by half a step."""
        if QUANTISED in self.dtypes:
            return self.actual != self.fitted
        steps = [torch.finfo(getattr(torch, name)) for name in self.dtypes]
        rtol, atol = max(step.eps for step in steps), max(step.smallest_normal * step.eps for step in steps)
        return ~torch.isclose(self.actual, self.fitted, rtol=rtol, atol=atol)


def _correlation(pairs: list[_SamplePair]) -> tuple[float, float]:
    """Correlate all values within their weights; and how far they moved, as a share of spread. Constants give nan."""
    parts = []
    for pair in pairs:
        spread = pair.fitted.std(correction=0)
        if spread > 1e-6 * pair.fitted.abs().max():  # rounding gives constant values a small spread
            actual, fitted = pair.actual - pair.actual.mean(), pair.fitted - pair.fitted.mean()
            parts.append(torch.stack([actual, fitted, pair.actual - pair.fitted]) / spread)
    if not parts:
        return math.nan, math.nan
    actual, fitted, change = torch.cat(parts, dim=1)
    both = actual.norm() * fitted.norm()
    return float(actual @ fitted / both) if both else 0.0, float(change.norm() / fitted.norm())


def _check_shape(name: str, shape: list[int], kept: list[int], config: ChildConfig, is_resized: bool) -> None:
    """Raise an error if an adapter cannot act on a weight of another shape; other numbers of tokens may be allowed."""
    is_in_the_way, reason = config.has_size_of(name, kept), f"The {config.described} was fitted on {_base_text(config)}"
    if is_resized and is_in_the_way:
        raise ValueError(
            f"{reason}, where the vocabulary has {kept[0]} tokens; here it has {shape[0]} tokens. The adapter acts on "
            f"the rows of {name!r}, one for each token, and they are not the same any more. Call "
            f"model.resize_token_embeddings({kept[0]}) before loading it, or fit it on this model."
        )
    if not is_resized:
        reason += f", where {name!r} has shape {kept}; here it has {shape}"
        _refuse_another_base(reason, "Load it into the model it was fitted on.", always=is_in_the_way)


def _refuse_another_base(reason: str, remedy: str, *, always: bool = False) -> None:
    """Raise a `ValueError`, or only warn where the environment variable allows any base, unless `always`."""
    if always:
        raise ValueError(f"{reason}. {remedy}")
    if os.environ.get(ANY_BASE, "").lower() not in ("1", "true", "yes", "on"):
        raise ValueError(f"{reason}. {remedy} To load it anyway, set the environment variable {ANY_BASE}=1.")
    warn_user(f"{reason}. It is loaded anyway, since {ANY_BASE} is set.")


def _without_new_rows(pair: _SamplePair, rows: Tensor, last_changed: int, config: ChildConfig) -> _SamplePair:
    """Leave out the values of rows that were made when tokens were added to this model or to the fitted one.

    Rows are taken as new from the first row that differs, if from there on all values differ, or differ very little.
    `rows` are the rows of the sampled values, and `last_changed` is the last row that the adapter changes.
    """
    differ = pair.differ()
    first = int(rows[differ].min())
    new, change = rows >= first, (pair.actual - pair.fitted) / (float(pair.fitted.std(correction=0)) or 1.0)
    if bool(new.all()) or not (bool(differ[new].all()) or bool((change[new].abs() <= _NEW_ROW_TOLERANCE).all())):
        return pair
    if config.has_size_of(pair.name, []) and last_changed >= first:
        _refuse_another_base(
            f"The {config.described} changes rows of added tokens: {pair.name!r} has, from row {first} or before, "
            f"other rows than those it was fitted on ({_base_text(config)}), since resize_token_embeddings "
            "initialises new rows anew each time",
            "Save the resized model, model.save_pretrained(folder) without adapters, and load the adapter into this "
            "saved model.",
        )
    return replace(pair, actual=pair.actual[~new], fitted=pair.fitted[~new])


def _judge_change(changed: list[_SamplePair], pairs: list[_SamplePair], config: ChildConfig, related: float) -> None:
    """Refuse the weights of another model; warn of weights that were trained further."""
    correlation, drift = _correlation(pairs)
    if related == RELATED_QUANTISED and correlation >= ROUNDED:
        return  # a quantiser's rounding cannot be told from further training
    worst = min(changed, key=_correlation_of)
    is_another = worst.is_matrix and worst.actual.numel() >= MIN_VALUES and not _correlation_of(worst) >= RELATED_MATRIX
    is_finite = all(bool(pair.actual.isfinite().all()) for pair in changed)
    is_another = is_another or not is_finite or correlation < related
    reason = (
        f"sampled weights correlate by {correlation:.4f} and have moved by {drift:.1%} of their spread, most at "
        f"{worst.name!r}, by {_correlation_of(worst):.2f}"
    )
    if is_another:
        _refuse_another_base(
            f"The {config.described} was fitted on {_base_text(config)}, and this is another model ({reason})",
            "Load the adapter into its own base, or fit it on this one. If others are merged here, call "
            "unmerge_adapter() first.",
        )
        return
    warn_user(
        f"The base model has been trained further since the {config.described} was fitted ({reason}). It was made for "
        "the old weights: fit the adapter again."
    )


def _correlation_of(pair: _SamplePair) -> float:
    """The correlation of one weight's values; 1 for constant values, which have none."""
    correlation, _ = _correlation([pair])
    return 1.0 if math.isnan(correlation) else correlation


def _check_sample(name: str, sample: Any) -> None:
    """Check a sample of a fingerprint, since a file may hold any value."""
    types = {"shape": list[int], "dtype": str, "positions": list[int], "values": list[float]}
    if not (
        isinstance(sample, dict)
        and all(is_a(sample.get(key), kind) for key, kind in types.items())
        and sample["dtype"] in (QUANTISED, "float64", "float32", "float16", "bfloat16")
        and len(sample["positions"]) == len(sample["values"]) > 0
        and all(0 <= position < math.prod(sample["shape"]) for position in sample["positions"])
        and all(abs(value) < math.inf for value in sample["values"])
        and is_a(sample.get("last", 0), int)
    ):
        raise field_error(f"The fingerprint has {short(sample)} of {name!r}, which is not a sample")


def _base_text(config: ChildConfig) -> str:
    """The base model that an adapter names: its source and its class, as far as they are known."""
    name, kind = config.base_model_name_or_path, Provenance.of(config).base_class
    known = f"{name} at {config.revision}" if name and config.revision else name
    return f"{known} ({kind})" if known and kind else known or kind or "another model"


# ---- names in the bare model, and in the same model with a head ------------------------------------------------------


def find_renaming(model: nn.Module, names: Iterable[str]) -> Rename | None:
    """A function that adds or removes a model's prefix so that it has all the modules; None if no way finds all."""
    names, modules, prefix = list(names), {name for name, _ in model.named_modules()}, f"{prefix_of(model)}."
    ways: tuple[Rename, ...] = (str, lambda name: prefix + name, lambda name: name.removeprefix(prefix))
    return next((rename for rename in ways if all(rename(name) in modules for name in names)), None)


def prefix_of(model: Any) -> str:
    """The prefix of the bare model's modules in the same model with a head; may be empty."""
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model:
        return next(name for name, module in model.named_modules() if module is body)
    return getattr(model, "base_model_prefix", "")


def rename_modules(config: ChildConfig, rename: Rename) -> None:
    """Rename the modules of a fitted adapter, everywhere in its configuration."""
    modules = list(config.fitted_modules)
    for key in ("fitted_sites", "fitted_parameters"):
        if getattr(config, key, None):
            setattr(config, key, {rename(name): value for name, value in getattr(config, key).items()})
    weights = getattr(config, "weights", None) or {}
    if weights:
        config.weights = {rename(s): [[rename(name), *more] for name, *more in group] for s, group in weights.items()}
    leakages = {key: config.provenance[key] for key in ("leakage", "leakage_intervals") if config.provenance.get(key)}
    for key, figures in leakages.items():
        config.provenance[key] = {rename(name) if name in modules else name: value for name, value in figures.items()}
    samples = config.provenance.get("fingerprint") or {}
    config.provenance["fingerprint"] = {rename(name): sample for name, sample in samples.items()}
    # Patterns were made for the old names; they are not needed, since the modules are known.
    for key in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        setattr(config, key, None)


def _refuse_absent(model: nn.Module, config: ChildConfig) -> None:
    """Raise a `ValueError` that names missing sites; sites that only have another name here are named last."""
    sites, names, prefix = config.fitted_modules, {name for name, _ in model.named_modules()}, f"{prefix_of(model)}."
    missing = [site for site in sites if not {site, prefix + site, site.removeprefix(prefix)} & names]
    missing = missing or [site for site in sites if site not in names]
    others = f" and {number_of(len(missing) - 1, 'other module')}" if missing[1:] else ""
    parts = {path: part for path, part in model.named_modules() if path and isinstance(part, PreTrainedModel)}
    known = next((path for path, part in parts.items() if find_renaming(part, sites) is not None), None)
    made = "fitted on" if config.fitted else "added to"
    place = "" if known is None else f", or into the part that has them, {as_attribute(known)}.load_adapter(…)"
    raise ValueError(
        f"The {config.described} was {made} {_base_text(config)} and acts at {missing[0]!r}{others}, which this "
        f"{type(model).__name__} does not have. Load it into the model it was {made}{place}, or fit it again with "
        "targets that both models have."
    )


def _weights_to_sample(model: nn.Module, sites: list[str]) -> list[str]:
    """Names of the weights at each site, and of the next matrix where a site has no matrix that can be read."""
    tied = shared_weights(model)  # one name of a tied weight is enough, the same one on every device
    first = {name: tied.get(name, [name])[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    weights = {n: model.get_parameter(n) for n, first_name in first.items() if n == first_name and "lora_" not in n}
    matrices = {name: weight for name, weight in weights.items() if weight.dim() > 1 or is_quantised(weight)}
    own: dict[str, list[str]] = {}
    for name, first_name in first.items():
        own.setdefault(name.rpartition(".")[0].removesuffix(".base_layer"), []).append(first_name)
    readable = functools.cache(lambda name: values_and_dtype(model, name)[0] is not None)
    found: dict[str, None] = {}
    for site in sites:
        here = [name for name in own.get(site, []) if "lora_" not in name and readable(name)]
        if not matrices.keys() & here:  # the next is one inside the module, or inside the one around it, and so on
            parts = site.split(".")
            around = [".".join([*parts[:depth], ""]) for depth in range(len(parts), -1, -1)]
            matrices_near = (name for place in around for name in matrices if name.startswith(place) and readable(name))
            here += [name for name in [next(matrices_near, None)] if name is not None]
        found |= dict.fromkeys(name.replace(".base_layer.", ".") for name in here)
    return list(found)


def _sample_weight(weight: Tensor, dtype: str, positions: Tensor) -> dict[str, Any]:
    # As in `_pairs_of`, only these values are read.
    values = weight[None][torch.unravel_index(positions.to(weight.device), (1, *weight.shape))].to("cpu", torch.double)
    return {"shape": list(weight.shape), "dtype": dtype, "positions": positions.tolist(), "values": values.tolist()}


def _token_weights(model: nn.Module) -> set[str]:
    """The names of the weights with a row for each token; empty for a model without tokens."""
    layers: list[Any] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(NotImplementedError, AttributeError):  # a model without such a layer raises them
            layers.append(innermost(getattr(model, getter)()))
    layers = [layer for layer in layers if isinstance(layer, (nn.Embedding, nn.Linear))]
    counts = {layer.weight.shape[0] for layer in layers if isinstance(layer.weight, Tensor)}
    own = {id(parameter) for layer in layers for parameter in layer._parameters.values() if parameter is not None}
    found = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0]
        is_another = isinstance(model.get_submodule(path), nn.Embedding) and parameter.shape[0] in counts
        if id(parameter) in own or is_another:
            found.add(name.replace(".base_layer.", "."))
    return found


# ---- the other adapters that act at fitting, and afterwards ----------------------------------------------------------


def other_acting_adapters(model: nn.Module, adapter_name: str) -> list[dict[str, Any]]:
    """The other adapters that act, as fitting records them: `{"name", "kind", "sample"}` for each."""
    now = adapters_now(model)
    configs = {name: now.configs.get(name) for name in now.acting if name != adapter_name}
    fitted = [name for name, config in configs.items() if not isinstance(config, ChildConfig) or config.fitted]
    return [{"name": name, "kind": now.acting[name], "sample": _sample(model, name, configs[name])} for name in fitted]


def record_without(record: Iterable[Any], names: Collection[Any]) -> list[Any]:
    """A record without the adapters of these names, and without double entries."""
    left: list[Any] = []
    for entry in record:
        if entry not in left and (not isinstance(entry, dict) or entry.get("name") not in names):
            left.append(entry)
    return left


def differences_since_fit(model: nn.Module, adapter_name: str) -> str:
    """A text that says how the other acting adapters differ from those that acted at fitting; empty if they do not."""
    now = adapters_now(model)
    config = now.configs.get(adapter_name)
    record = Provenance.of(config).active_adapters if isinstance(config, ChildConfig) and config.fitted else None
    if record is None:  # an older release did not write it
        return ""
    missing, added = list(record), other_acting_adapters(model, adapter_name)
    for entry in record:
        same = next((other for other in added if _is_same_adapter(entry, other)), None)
        if same is not None:
            missing.remove(entry)
            added.remove(same)
    remarks, changed = [], []
    for entry in missing:
        phrase = f"the {short(entry.get('kind'))[1:-1]} {short(entry.get('name'))}"
        namesake = next((o for o in added if (o["name"], o["kind"]) == (entry.get("name"), entry.get("kind"))), None)
        if namesake is not None:
            added.remove(namesake)
            changed.append(f"{phrase} has other values than it had")
        elif entry.get("name") in now.loaded:
            remarks.append(f"{phrase} was on and is off now")
        else:
            remarks.append(f"{phrase} was on and is not loaded here, unless it is merged into the weights")
    remarks += [f"the {entry['kind']} {entry['name']!r} is on and was not" for entry in added]
    remarks += changed
    if not remarks:
        return ""
    return (
        f"Other adapters act here than when {adapter_name!r} was fitted: {'; '.join(remarks)}. What was measured at "
        "fitting holds only with the adapters of that time: switch on the same ones, or fit again."
    )


def _sample(model: nn.Module, name: str, config: Any) -> list[float]:
    """A few values by which an adapter can be recognised; empty where they are offloaded or sharded."""
    named = [*model.named_parameters(), *model.named_buffers()]
    own = {key: tensor for key, tensor in named if name in key.split(".")[-2:] and "modules_to_save" not in key}
    # Keys are sorted without the adapter's own name, which may differ in another session.
    keys = sorted((key for key in own if own[key].numel()), key=lambda key: key.replace(f".{name}", ""))
    keys = keys[:: math.ceil(len(keys) / _MOST_TENSORS)] if keys else []
    found = []
    for key in keys:
        tensor = own[key].data
        if tensor.device.type == "meta" or type(tensor) is not Tensor:
            return []
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.contiguous().view(-1)
        positions = torch.tensor([flat.numel() // 3, 2 * flat.numel() // 3], device=flat.device)
        found += flat[positions].double().tolist()
    if isinstance(config, ChildConfig):
        found += config.strengths
    layers = (module for module in model.modules() if isinstance(module, LoraLayer) and name in module.scaling)
    found += [float(layer.scaling[name]) for layer in list(layers)[:1]]
    return [float(f"{value:.6g}") for value in found] if all(map(math.isfinite, found)) else []


def _is_same_adapter(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    fitted, actual = then.get("sample"), now["sample"]
    if then.get("kind") != now["kind"] or not fitted or not actual or not is_a(fitted, list[float]):
        return then.get("kind") == now["kind"] and then.get("name") == now["name"]
    is_near = functools.partial(math.isclose, rel_tol=_ROUNDING, abs_tol=1e-30)
    return len(fitted) == len(actual) and all(map(is_near, fitted, actual))
