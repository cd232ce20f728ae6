"""Functions on a model with a GRADIEND adapter: what fitting fills in, and what is done with the feature afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.gradiend.features import Feature, FeatureDecoder, FeatureEncoder, prune_together
from hf_erasure.models.model import class_name

from ..common.lookup import adapter_of
from ..loading.fingerprint import fingerprint
from .config import ENCODER, ENCODER_INDEX, FEATURE, INDEX, OFFSET, GradiendConfig, refuse_beyond_float32
from .edit import WeightEdit, edited_tensor, written
from .layer import GradiendLayer, gradiend_layers, strength
from .model import share_kept


@dataclass(frozen=True)
class StoredFeature:
    """A feature as an adapter keeps it.

    Attributes:
        pair: The classes at +1 and −1.
        encoder: What reads the feature off a gradient; None where the adapter was fitted without `keep_encoder`.
        decoder: What says how weights change.
    """

    pair: tuple[str, str]
    encoder: FeatureEncoder | None
    decoder: FeatureDecoder


def targeted_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The parameters that an adapter changes, by their full names without wrappers; a tied weight comes once.

    Raises:
        ValueError: If the model has no GRADIEND adapter of that name.
    """
    layers, _ = _adapter(model, adapter_name, fitted=False, unmerged=False)
    return {name: layer.parameter(own) for name, layer, own in _places(layers, adapter_name)}


def stated_bytes(model: nn.Module, adapter_name: str) -> int:
    """What the state of an adapter will take once it is fitted, in memory and on disk, with its present `density`."""
    _, config = _adapter(model, adapter_name, fitted=False, unmerged=False)
    n = sum(p.numel() for p in targeted_parameters(model, adapter_name).values())
    pairs = config.expected_pairs()
    vectors = (3 if config.keep_encoder else 2) * pairs
    if config.density >= 0.5:
        return 4 * vectors * n
    # One list of positions serves all pairs, another all encoders.
    positions = 2 if config.keep_encoder else 1
    return 4 * (vectors + positions) * math.ceil(config.density * n)


def set_features(
    model: nn.Module, adapter_name: str, features: Sequence[Feature], pairs: Sequence[tuple[str, str]]
) -> None:
    """Give an adapter its features, pruned to the `density` of its configuration.

    The adapter does not act before `steer` has given it a learning rate, unless its configuration has one.

    Args:
        model: The model with the adapter, bare or wrapped in a `PeftModel`.
        adapter_name: The adapter.
        features: One for each pair; their blocks are named as in `targeted_parameters`, and may be some of these.
        pairs: The classes at +1 and −1 of each feature.

    Raises:
        ValueError: If the adapter is merged, or features and pairs do not fit each other, the configuration or the
            model. Nothing has changed then.
    """
    layers, config = _adapter(model, adapter_name, fitted=False)
    parameters = targeted_parameters(model, adapter_name)
    if len(features) != len(pairs) or not features:
        raise ValueError(
            f"{len(features)} features for {len(pairs)} pairs of classes: give one for each, at least one."
        )
    for feature in features:
        _check_blocks(feature, parameters)
    _check_pairs(config, pairs)
    n = sum(parameter.numel() for parameter in parameters.values())
    decoders = _pruned([feature.decoder for feature in features], config.density, n)
    encoders = [f.encoder.prune(config.density) if config.keep_encoder else f.encoder for f in features]
    sizes: dict[str, dict[str, Any]] = {}
    last: dict[str, int] = {}
    for name, layer, own in _places(layers, adapter_name):
        shape = parameters[name].shape
        index, values = _aligned(name, shape, [(d.index, (d.weight, d.bias)) for d in decoders])
        layer.set_part(adapter_name, own, INDEX, index)
        for kind, value in zip((FEATURE, OFFSET), values or (None, None), strict=True):
            layer.set_part(adapter_name, own, kind, value)
        sizes[name] = {"shape": list(shape), "count": _count(index, values)}
        if sizes[name]["count"] != 0:
            last[name] = shape.numel() - 1 if index is None else int(index[-1])
        kept = [(e.index, (e.weight,)) for e in encoders] if config.keep_encoder else []
        index, values = _aligned(name, shape, kept)
        layer.set_part(adapter_name, own, ENCODER_INDEX, index)
        layer.set_part(adapter_name, own, ENCODER, None if values is None else values[0])
        sizes[name]["encoder_count"] = _count(index, values)
    _record(adapter_of(model, adapter_name, GradiendConfig).owner, config, sizes, encoders, pairs, last)
    for layer in layers.values():
        layer.steer(adapter_name, config)


def features_of(model: nn.Module, adapter_name: str) -> list[StoredFeature]:
    """The features of a fitted adapter, one for each pair of classes; tensors are the adapter's own.

    Raises:
        ValueError: If there is not such an adapter, or it was never fitted.
    """
    layers, config = _adapter(model, adapter_name, unmerged=False)
    places = list(_places(layers, adapter_name))
    shapes = {name: layer.parameter(own).shape for name, layer, own in places}

    def rows(kind: str, position: int) -> dict[str, Tensor]:
        found = {}
        for name, layer, own in places:
            part = layer.part(adapter_name, own, kind)
            empty = torch.zeros(0, device=layer.state_placement()[0], dtype=torch.float32)
            found[name] = empty if part is None else part[position]
        return found

    def positions(kind: str, values: dict[str, Tensor]) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {}
        for name, layer, own in places:
            part = layer.part(adapter_name, own, kind)
            is_empty = part is None and not values[name].numel()
            found[name] = values[name].new_zeros(0, dtype=torch.int32) if is_empty else part
        return found

    features = []
    for number, pair in enumerate(config.pairs or []):
        weight, bias = rows(FEATURE, number), rows(OFFSET, number)
        encoder = None
        if config.keep_encoder:
            read = rows(ENCODER, number)
            encoder = FeatureEncoder(read, positions(ENCODER_INDEX, read), shapes, **(config.encoders or [])[number])
        decoder = FeatureDecoder(weight, bias, positions(INDEX, weight), shapes)
        features.append(StoredFeature((pair[0], pair[1]), encoder, decoder))
    return features


def steer(
    model: nn.Module,
    adapter_name: str,
    *,
    feature_factor: float | None = None,
    learning_rate: float | None = None,
    pair: Sequence[str] | None = None,
) -> None:
    """Say how an adapter changes the weights: `W + learning_rate · (feature_factor · Wd + bd)`.

    In place: compiled code stays valid, unless a learning rate of 0 is left or entered. What is not given stays.

    Raises:
        ValueError: If the adapter is not fitted, is merged, or a value cannot be used. Nothing has changed then.
    """
    layers, config = _adapter(model, adapter_name)
    for field, value in _steered(config, feature_factor, learning_rate, pair).items():
        setattr(config, field, value)
    for layer in layers.values():
        layer.steer(adapter_name, config)


@contextmanager
def edited(
    model: nn.Module,
    adapter_name: str,
    *,
    feature_factor: float | None = None,
    learning_rate: float | None = None,
    pair: Sequence[str] | None = None,
) -> Iterator[None]:
    """Hold an adapter's edit in the model's own weights for a while, as a merge would leave them.

    What is not given is taken from the configuration, which stays as it is. The adapter itself does not act meanwhile,
    others do as they did. Afterwards the weights are as they were, to the bit; of a sparse edit only the entries that
    change are read and written.

    Raises:
        ValueError: If the adapter is not fitted or is merged, or a weight is quantised or offloaded.
    """
    layers, config = _adapter(model, adapter_name)
    steering = _steering(config, feature_factor, learning_rate, pair)
    changes: list[tuple[nn.Parameter, list[WeightEdit]]] = []
    for name, layer, edit in _edits(layers, adapter_name, steering):
        parameter = layer.parameter(name)
        reason = layer.why_not_editable(name)
        if reason is not None:
            raise ValueError(f"{layer.path}.{name} {reason} to edit it.")
        changes.append((parameter, [edit]))
    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer.without(adapter_name))
        stack.enter_context(written(changes))
        yield


def kept_share(
    model: nn.Module,
    adapter_name: str,
    *,
    feature_factor: float | None = None,
    learning_rate: float | None = None,
    pair: Sequence[str] | None = None,
) -> float:
    """The share of an adapter's edit that is left when the weights are rounded to their own dtype, 1 for all.

    It is the length of the rounded edit along the wanted one. In bfloat16 edits far below the spacing of a weight's
    values vanish, so that a small learning rate may do nothing.

    Raises:
        ValueError: If the adapter is not fitted, or is merged already.
    """
    layers, config = _adapter(model, adapter_name)
    steering = _steering(config, feature_factor, learning_rate, pair)
    return share_kept(list(layers.values()), adapter_name, steering)


def changes_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[GradiendLayer, str, Tensor]]:
    """Each parameter that a fitted adapter changes, as its layer and own name, with the change in the weight's shape.

    Raises:
        ValueError: If the adapter is not fitted, or is merged.
    """
    layers, config = _adapter(model, adapter_name)
    for name, layer, edit in _edits(layers, adapter_name, _steering(config)):
        shape = layer.parameter(name).shape
        zeros = torch.zeros(shape, device=edit.values.device, dtype=torch.float32)
        yield layer, name, edited_tensor(zeros, [edit])


# ---- finding the adapter ---------------------------------------------------------------------------------------------


def _adapter(
    model: nn.Module, name: str, *, fitted: bool = True, unmerged: bool = True
) -> tuple[dict[str, GradiendLayer], GradiendConfig]:
    """An adapter's layers and configuration; refused where it is not `fitted` or `unmerged` though it must be."""
    found = adapter_of(model, name, GradiendConfig)
    layers = gradiend_layers(found.owner, name)
    if fitted and not found.config.fitted:
        raise ValueError(f"The GRADIEND adapter {name!r} was never fitted. {found.config.remedy}")
    if unmerged and any(name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The GRADIEND adapter {name!r} is merged into the weights: call unmerge_adapter() first.")
    return layers, found.config


def _places(layers: dict[str, GradiendLayer], adapter_name: str) -> Iterator[tuple[str, GradiendLayer, str]]:
    """Each parameter that an adapter targets: its full name, its layer, and its own name there."""
    for path, layer in layers.items():
        for own in layer.gradiend_parameters[adapter_name]:
            yield f"{path}.{own}", layer, own


# ---- filling it ------------------------------------------------------------------------------------------------------


def _check_blocks(feature: Feature, parameters: dict[str, nn.Parameter]) -> None:
    shapes = feature.decoder.shapes
    unknown = [name for name in shapes if name not in parameters]
    if unknown:
        raise ValueError(
            f"The feature has a block {unknown[0]!r}, and {len(unknown) - 1} others, that the adapter does not target. "
            "Fit it on targeted_parameters(model, adapter_name)."
        )
    for name, shape in shapes.items():
        if shape != parameters[name].shape:
            raise ValueError(
                f"The feature's block {name!r} has shape {tuple(shape)}; the weight has "
                f"{tuple(parameters[name].shape)}."
            )
    for name, values in (*feature.decoder.weight.items(), *feature.decoder.bias.items()):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"The feature is not finite at {name!r}: fit it again, with a lower learning rate.")


def _check_pairs(config: GradiendConfig, pairs: Sequence[tuple[str, str]]) -> None:
    if len({tuple(pair) for pair in pairs}) != len(pairs):
        raise ValueError(f"pairs={list(pairs)} names a pair of classes twice.")
    for pair in pairs:
        unknown = [name for name in pair if config.classes is not None and name not in config.classes]
        if len(pair) != 2 or unknown:
            raise ValueError(f"{tuple(pair)!r} is not a pair of the adapter's classes={config.classes!r}.")
    if config.pair is not None and tuple(config.pair) not in {tuple(pair) for pair in pairs}:
        raise ValueError(f"pair={config.pair} of the configuration is not among the pairs fitted, {list(pairs)}.")


def _pruned(decoders: list[FeatureDecoder], density: float, n: int) -> list[FeatureDecoder]:
    """All with the share of entries that was asked for; those that have no more already stay as they are."""
    if all(decoder.count <= math.ceil(density * n) for decoder in decoders):
        return decoders
    if all(index is None for decoder in decoders for index in decoder.index.values()):
        return prune_together(decoders, density)
    return [decoder.prune(density) for decoder in decoders]


def _aligned(
    name: str,
    shape: torch.Size,
    parts: Sequence[tuple[dict[str, Tensor | None], tuple[dict[str, Tensor], ...]]],
) -> tuple[Tensor | None, list[Tensor] | None]:
    """The blocks of several features on common positions.

    Args:
        name: The block.
        shape: Its shape.
        parts: For each feature its positions and its values by block.

    Returns:
        Positions `(count,)` int32, None for all of them in order; and each kind of values as `(features, count)`, None
        where no feature has an entry.
    """
    nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
    empty = (nothing.int(), [nothing] * len(parts[0][1])) if parts else None
    blocks = [(index[name], [v[name] for v in values]) if name in index else empty for index, values in parts]
    found = [block for block in blocks if block is not None]
    filled = [values[0] for _, values in found if values[0].numel()]
    if not filled:
        return None, None
    device = filled[0].device
    indices = [None if index is None else index.to(device).long() for index, _ in found]
    dense = any(index is None for index in indices)
    union = None if dense else torch.cat([index for index in indices if index is not None]).unique()
    count = shape.numel() if union is None else union.numel()
    rows = [torch.zeros(len(found), count, device=device, dtype=torch.float32) for _ in found[0][1]]
    for number, (index, (_, values)) in enumerate(zip(indices, found, strict=True)):
        for row, value in zip(rows, values, strict=True):
            if index is None:
                row[number] = value
            else:
                row[number, index if union is None else torch.searchsorted(union, index)] = value.to(device, row.dtype)
    return None if union is None else union.int(), rows


def _count(index: Tensor | None, values: list[Tensor] | None) -> int | None:
    if values is None:
        return 0
    return None if index is None else index.numel()


def _record(
    base: nn.Module,
    config: GradiendConfig,
    sizes: dict[str, dict[str, Any]],
    encoders: Sequence[FeatureEncoder],
    pairs: Sequence[tuple[str, str]],
    last: dict[str, int],
) -> None:
    """What the saved adapter says about itself; `last` is the last entry of each weight that it changes."""
    config.pairs = [list(pair) for pair in pairs]
    config.fitted_parameters = sizes
    config.encoders = [
        {"scale": e.scale, "bias": e.bias, "activation": e.activation, "unit_norm": e.unit_norm} for e in encoders
    ]
    config.fitted = True
    samples = fingerprint(base, list(config.fitted_modules))
    for name in samples.keys() & last.keys():
        samples[name]["last"] = last[name]
    config.provenance = {**config.provenance, "base_class": class_name(base), "fingerprint": samples}


# ---- how strongly ----------------------------------------------------------------------------------------------------


def _steered(
    config: GradiendConfig, feature_factor: float | None, learning_rate: float | None, pair: Sequence[str] | None
) -> dict[str, Any]:
    """The strength by field of the configuration, with what is there where nothing is given."""
    given = {"feature_factor": feature_factor, "learning_rate": learning_rate}
    fields: dict[str, Any] = {n: getattr(config, n) if v is None else float(v) for n, v in given.items()}
    for name, value in fields.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} is not a finite number.")
    refuse_beyond_float32(**fields)
    if pair is not None:
        config.pair_index(pair)
    return fields | {"pair": config.pair if pair is None else list(pair)}


def _steering(
    config: GradiendConfig,
    feature_factor: float | None = None,
    learning_rate: float | None = None,
    pair: Sequence[str] | None = None,
) -> Tensor:
    fields = _steered(config, feature_factor, learning_rate, pair)
    acting = config.pair_index(fields["pair"])
    return strength(config.expected_pairs(), acting, fields["feature_factor"], fields["learning_rate"])


def _edits(
    layers: dict[str, GradiendLayer], adapter_name: str, steering: Tensor
) -> Iterator[tuple[str, GradiendLayer, WeightEdit]]:
    for _, layer, own in _places(layers, adapter_name):
        edit = layer.edit_of(adapter_name, own, steering)
        if edit is not None:
            yield own, layer, edit
