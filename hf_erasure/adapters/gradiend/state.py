"""Functions on a model with a GRADIEND adapter: they store fitted features, and read, steer or try them afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.gradiend.features import Feature, FeatureDecoder, FeatureEncoder, dense, prune_together
from hf_erasure.models.model import class_name

from ..common.acting import update_model
from ..common.config import number_of
from ..common.lookup import adapter_of
from ..loading.fingerprint import fingerprint
from .config import ENCODER, ENCODER_INDEX, FEATURE, INDEX, OFFSET, GradiendConfig
from .forward import rounded_share, write_edits
from .layer import GradiendLayer, gradiend_layers, steering_factors


@dataclass(frozen=True)
class StoredFeature:
    """A feature as it is stored in an adapter."""

    pair: tuple[str, str]  # the classes at +1 and −1
    encoder: FeatureEncoder | None  # reads the feature from a gradient; None if fitted without `keep_encoder`
    decoder: FeatureDecoder  # gives the change of the weights


def targeted_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Full name without wrappers → parameter that an adapter changes; a tied weight has only one entry."""
    layers, _ = layers_and_config(model, adapter_name, fitted=False, unmerged=False)
    return {name: layer.parameter(own) for name, layer, own in _parameter_places(layers, adapter_name)}


def stated_bytes(model: nn.Module, adapter_name: str) -> int:
    """The bytes of an adapter's state in float32; before it is fitted, about as many as it will have."""
    _, config = layers_and_config(model, adapter_name, fitted=False, unmerged=False)
    if config.fitted:
        return 4 * sum(math.prod(shape) for shape, _ in config.tensors().values())
    n = sum(p.numel() for p in targeted_parameters(model, adapter_name).values())
    pairs = config.expected_pairs()
    vectors = (3 if config.keep_encoder else 2) * pairs
    if config.density >= 0.5:
        return 4 * vectors * n
    # All pairs share one list of positions, and all encoders share another.
    positions = 2 if config.keep_encoder else 1
    return 4 * (vectors + positions) * math.ceil(config.density * n)


def set_features(
    model: nn.Module, adapter_name: str, features: Sequence[Feature], pairs: Sequence[tuple[str, str]]
) -> None:
    """Store features in an adapter, pruned to the `density` of its configuration; an error changes nothing.

    There is one feature for each pair of classes, at +1 and −1. The blocks of a feature are named as in
    `targeted_parameters`, or are some of them. The adapter acts once its learning rate is not 0.
    """
    layers, config = layers_and_config(model, adapter_name, fitted=False)
    parameters = targeted_parameters(model, adapter_name)
    if len(features) != len(pairs) or not features:
        raise ValueError(
            f"{len(features)} features for {len(pairs)} pairs of classes: give one for each, at least one."
        )
    for feature in features:
        _check_blocks(feature, parameters)
    if len({tuple(pair) for pair in pairs}) != len(pairs):
        raise ValueError(f"pairs={list(pairs)} names a pair of classes twice.")
    checked = copy.copy(config)
    checked.pairs = [list(pair) for pair in pairs]
    checked.check_pairs()
    most = math.ceil(config.density * sum(parameter.numel() for parameter in parameters.values()))
    decoders = [feature.decoder for feature in features]
    if any(sum(kept for *_, kept in decoder.importance().values()) > most for decoder in decoders):
        if all(index is None for decoder in decoders for index in decoder.index.values()):
            decoders = prune_together(decoders, config.density)
        else:
            decoders = [decoder.prune(config.density) for decoder in decoders]
    encoders = [f.encoder.prune(config.density) if config.keep_encoder else f.encoder for f in features]
    stored = encoders if config.keep_encoder else []
    sizes: dict[str, dict[str, Any]] = {}
    last_changed: dict[str, int] = {}  # the last entry of each weight that is changed
    for name, layer, own in _parameter_places(layers, adapter_name):
        shape = parameters[name].shape
        index, weight, bias = _align_blocks(
            name, shape, [d.index for d in decoders], [d.weight for d in decoders], [d.bias for d in decoders]
        )
        read_at, read = _align_blocks(name, shape, [encoder.index for encoder in stored], [e.weight for e in stored])
        parts = {INDEX: index, FEATURE: weight, OFFSET: bias, ENCODER_INDEX: read_at, ENCODER: read}
        for kind, part in parts.items():
            layer.set_part(adapter_name, own, kind, part)
        found = ((index, weight), (read_at, read))
        counts = [0 if value is None else None if at is None else at.numel() for at, value in found]
        sizes[name] = {"shape": list(shape), "count": counts[0], "encoder_count": counts[1]}
        if weight is not None:
            last_changed[name] = shape.numel() - 1 if index is None else int(index[-1])
    config.pairs, config.fitted_parameters, config.fitted = checked.pairs, sizes, True
    config.encoders = [
        {"scale": e.scale, "bias": e.bias, "activation": e.activation, "unit_norm": e.unit_norm} for e in encoders
    ]
    base = adapter_of(model, adapter_name, GradiendConfig).owner
    samples = fingerprint(base, list(config.fitted_modules))
    for name in samples.keys() & last_changed.keys():
        samples[name]["last"] = last_changed[name]
    config.provenance = {**config.provenance, "base_class": class_name(base), "fingerprint": samples}
    for layer in layers.values():
        layer.steer(adapter_name, config)
    update_model(base)  # the layers have more buffers now


def features_of(model: nn.Module, adapter_name: str) -> list[StoredFeature]:
    """The features of a fitted adapter, one for each pair of classes; they share the adapter's tensors."""
    layers, config = layers_and_config(model, adapter_name, unmerged=False)
    places = list(_parameter_places(layers, adapter_name))
    shapes = {name: layer.parameter(own).shape for name, layer, own in places}

    def blocks(kind: str, index_kind: str, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        values: dict[str, Tensor] = {}
        index: dict[str, Tensor | None] = {}
        for name, layer, own in places:
            part, nothing = layer.part(adapter_name, own, kind), torch.zeros(0, device=layer.state_placement()[0])
            values[name] = nothing.float() if part is None else part[number]
            index[name] = nothing.int() if part is None else layer.part(adapter_name, own, index_kind)
        return values, index

    features = []
    for number, pair in enumerate(config.pairs or []):
        weight, index = blocks(FEATURE, INDEX, number)
        bias, _ = blocks(OFFSET, INDEX, number)
        encoder = None
        if config.keep_encoder:
            read, read_at = blocks(ENCODER, ENCODER_INDEX, number)
            encoder = FeatureEncoder(read, read_at, shapes, **(config.encoders or [])[number])
        features.append(StoredFeature((pair[0], pair[1]), encoder, FeatureDecoder(weight, bias, index, shapes)))
    return features


def steer(model: nn.Module, adapter_name: str, **strengths: Any) -> None:
    """Set how strongly an adapter changes the weights: `W + learning_rate · (feature_factor · Wd + bd)`.

    `strengths` are `feature_factor`, `learning_rate` and the `pair` of classes that acts; others stay as they are. In
    place: compiled code stays valid, unless the learning rate changes from or to 0. An error changes nothing.
    """
    layers, config = layers_and_config(model, adapter_name)
    steered = _with_strengths(config, **strengths)
    for field in ("feature_factor", "learning_rate", "pair"):
        setattr(config, field, getattr(steered, field))
    for layer in layers.values():
        layer.steer(adapter_name, config)


@contextmanager
def edited(model: nn.Module, adapter_name: str, **strengths: Any) -> Iterator[None]:
    """Write an adapter's edit into the model's own weights inside the block, as a merge would.

    `strengths` are those of `steer`; the others are taken from the configuration, which does not change. Inside the
    block the adapter itself does not act, and other adapters act as before. Afterwards the weights are restored bit for
    bit. A sparse edit reads and writes only the entries that change. Quantised and offloaded weights are refused.
    """
    layers, config = layers_and_config(model, adapter_name)
    factors = steering_factors(_with_strengths(config, **strengths))
    changes = [(layer, name, edit) for layer in layers.values() for name, edit in layer.edits_of(adapter_name, factors)]
    for layer, name, _ in changes:
        reason = layer.why_not_editable(name)
        if reason is not None:
            raise ValueError(f"{layer.path}.{name} {reason} to edit it.")
    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.suspend(adapter_name))
        for layer, name, edit in changes:
            stack.callback(write_edits(layer.parameter(name), [edit]).undo)
        yield


def kept_share(model: nn.Module, adapter_name: str, **strengths: Any) -> float:
    """The share of an adapter's edit that is left when the weights are rounded to their own dtype; 1 if all is left.

    It is the rounded edit's length along the exact edit, divided by the exact edit's length. In bfloat16, edits far
    below the spacing of a weight's values vanish, so a small edit may do nothing. `strengths` are as for `edited`.
    """
    layers, config = layers_and_config(model, adapter_name)
    factors = steering_factors(_with_strengths(config, **strengths))
    return rounded_share((x.parameter(own), e) for x in layers.values() for own, e in x.edits_of(adapter_name, factors))


def layers_and_config(
    model: nn.Module, name: str, *, fitted: bool = True, unmerged: bool = True
) -> tuple[dict[str, GradiendLayer], GradiendConfig]:
    """An adapter's layers and configuration; raise an error if it must be `fitted` or `unmerged` and is not."""
    found = adapter_of(model, name, GradiendConfig)
    layers = gradiend_layers(found.owner, name)
    if fitted and not found.config.fitted:
        raise ValueError(f"The GRADIEND adapter {name!r} was never fitted. {found.config.remedy}")
    if unmerged and any(name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The GRADIEND adapter {name!r} is merged into the weights: call unmerge_adapter() first.")
    return layers, found.config


def _parameter_places(layers: dict[str, GradiendLayer], adapter_name: str) -> Iterator[tuple[str, GradiendLayer, str]]:
    """Each parameter that an adapter targets: its full name, its layer, and its name in the layer."""
    for path, layer in layers.items():
        for own in layer.gradiend_parameters[adapter_name]:
            yield f"{path}.{own}", layer, own


def _check_blocks(feature: Feature, parameters: dict[str, nn.Parameter]) -> None:
    decoder, shapes = feature.decoder, feature.decoder.shapes
    unknown = [name for name in shapes if name not in parameters]
    if unknown:
        raise ValueError(
            f"The feature has a block {unknown[0]!r}, and {number_of(len(unknown) - 1, 'other')}, that the adapter "
            "does not target. Fit it on targeted_parameters(model, adapter_name)."
        )
    for name, shape in shapes.items():
        there = parameters[name].shape
        if shape != there:
            raise ValueError(f"The feature's block {name!r} has shape {tuple(shape)}; the weight has {tuple(there)}.")
        positions = decoder.index[name]
        count = shape.numel() if positions is None else positions.numel()
        for values in (decoder.weight[name], decoder.bias[name]):
            if values.shape != (count,):
                raise ValueError(f"The feature has {len(values)} values at {name!r}, where it keeps {count} entries.")
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"The feature is not finite at {name!r}: fit it again, with a lower learning rate.")


def _align_blocks(
    name: str, shape: torch.Size, index_of: Sequence[dict[str, Tensor | None]], *values_of: Sequence[dict[str, Tensor]]
) -> list[Tensor | None]:
    """Common positions `(count,)` int32 of a block in all features, and their values `(features, count)` there."""
    nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
    found = [[values.get(name, nothing) for values in kind] for kind in values_of]
    filled = [value for value in found[0] if value.numel()]
    if not filled:
        return [None] * (1 + len(found))
    device = filled[0].device
    kept = [index.get(name, nothing.int()) for index in index_of]
    indices = [index if index is None else index.to(device) for index in kept]
    sparse = [index for index in indices if index is not None]
    union = torch.cat(sparse).unique() if len(sparse) == len(kept) else None
    rows = []
    for values in found:
        each = (dense(v.to(device, torch.float32), at, shape.numel()) for v, at in zip(values, indices, strict=True))
        rows.append(torch.stack([value if union is None else value[union.long()] for value in each]))
    return [union, *rows]


def _with_strengths(
    config: GradiendConfig,
    feature_factor: float | None = None,
    learning_rate: float | None = None,
    pair: Sequence[str] | None = None,
) -> GradiendConfig:
    """A copy of a configuration with the strengths that are given."""
    steered = copy.copy(config)
    steered.feature_factor = config.feature_factor if feature_factor is None else float(feature_factor)
    steered.learning_rate = config.learning_rate if learning_rate is None else float(learning_rate)
    steered.check_strength()
    if pair is not None:
        config.pair_index(pair)
        steered.pair = list(pair)
    return steered
