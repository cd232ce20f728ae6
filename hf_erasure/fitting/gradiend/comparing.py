"""Compare several features: how alike their weights are, and what each reads in the pairs of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_erasure.adapters import features_of
from hf_erasure.gradiend import FeatureDecoder
from hf_erasure.gradiend.blocks import largest, pieces, total
from hf_erasure.gradiend.features import dense
from hf_erasure.models.model import pandas

from ..processes import Processes
from ..report import figures
from .gradients import encode_all, reading_the_base
from .trainer import GradiendTrainer


@dataclass(frozen=True)
class FeatureComparison:
    """The result of `compare_features`, in the order of `names`.

    Attributes:
        names: One for each of the k feature neurons: its given name, with its classes if a trainer has several.
        cosine: `(k, k)` float64 cosines of the decoders' Wd: ±1 for edits in one direction, 0 for unrelated ones.
        overlap: `(k, k)` share of the largest |Wd| of one that are also among the largest of the other.
        top: The share of all weights that counted as the largest.
        reading: `(k, k)` correlation of the neuron of a row with the classes of the pairs of a column; None if it
            was not asked for. NaN where the values do not vary.
    """

    names: list[str]
    cosine: Tensor
    overlap: Tensor
    top: float
    reading: Tensor | None = None

    def to_pandas(self) -> pandas.DataFrame:
        """One row for each two features: `feature`, `other`, `cosine`, `overlap`, and `reading` if it was measured."""
        tables = {"cosine": self.cosine, "overlap": self.overlap, "reading": self.reading}
        known = {name: table for name, table in tables.items() if table is not None}
        return pandas.DataFrame(
            [
                {"feature": one, "other": other} | {name: float(table[i, j]) for name, table in known.items()}
                for i, one in enumerate(self.names)
                for j, other in enumerate(self.names)
            ]
        )

    def plot(self, path: str | None = None) -> Any:
        """Draw the tables as images with their numbers; return the figure, and write it to `path` if one is given."""
        titles = {"cosine of Wd": self.cosine, f"overlap of the top {self.top:.2%}": self.overlap}
        if self.reading is not None:
            titles["correlation of neuron (row) and pairs (column)"] = self.reading
        size = 1.5 + 0.9 * len(self.names)
        figure = figures.Figure(figsize=(size * len(titles), size), layout="constrained")
        for axes, (title, table) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
            axes.imshow(table.numpy(), vmin=-1, vmax=1, cmap="PuOr")
            axes.set_title(title, fontsize=9)
            places = range(len(self.names))
            axes.set_xticks(places, self.names, rotation=45, ha="right", fontsize=8)
            axes.set_yticks(places, self.names, fontsize=8)
            for i in places:
                for j in places:
                    strong = abs(float(table[i, j])) > 0.6
                    colour = "white" if strong else "black"
                    axes.text(j, i, f"{float(table[i, j]):.2f}", ha="center", va="center", color=colour, fontsize=8)
        if path is not None:
            figure.savefig(path)
        return figure


def compare_features(
    trainers: Mapping[str, GradiendTrainer], *, top: float = 0.01, reading: bool = True
) -> FeatureComparison:
    """Compare the features of several trainers: other features of one model, other seeds, or other estimators.

    Args:
        trainers: Name to show → a trainer with a fitted adapter. Their models have one architecture.
        top: The share of all targeted weights, in (0, 1], that counts as the largest. If an adapter holds fewer, all
            of its weights count.
        reading: Whether every neuron reads the pairs of every trainer, which takes one backward pass for each of the
            pairs and each neuron. The trainers then need an `eval_dataset`.

    Raises:
        ValueError: If there are fewer than two features, `top` is not a share, the adapters target different weights,
            one is not fitted, or pairs or an encoder are missing.
    """
    if not 0 < top <= 1:
        raise ValueError(f"top={top}: give a share of the weights above 0 and up to 1.")
    features = {
        name if len(trainer.pairs) == 1 else f"{name}: {'/'.join(pair)}": (trainer, pair, feature.decoder)
        for name, trainer in trainers.items()
        for pair, feature in zip(trainer.pairs, features_of(trainer.model, trainer.adapter_name), strict=True)
    }
    if len(features) < 2:
        raise ValueError(f"There are {len(features)} features to compare: give trainers of at least two.")
    decoders = [decoder for *_, decoder in features.values()]
    for name, decoder in zip(features, decoders, strict=True):
        if decoder.shapes != decoders[0].shapes:
            raise ValueError(
                f"{name!r} and {next(iter(features))!r} target different weights: fit both on the same target_modules."
            )
    count, most = len(decoders), math.ceil(top * total(decoders[0].shapes))
    masks = []  # Block → which weights are among the largest of a decoder; one that is 0 is not.
    for decoder in decoders:
        found = largest(partial(_dense, decoder), list(decoder.shapes), most)
        masks.append({name: mask & (_dense(decoder, name) != 0) for name, mask in found.items()})
    products, shared = torch.zeros(2, count, count, dtype=torch.float64, device="cpu")
    for block in decoders[0].shapes:
        weights = pieces(*(_dense(decoder, block) for decoder in decoders))
        for parts, chosen in zip(weights, pieces(*(mask[block] for mask in masks)), strict=True):
            values, kept = torch.stack(parts).double(), torch.stack(chosen).double()
            products += values @ values.T
            shared += kept @ kept.T
    lengths, counts = products.diagonal().sqrt(), shared.diagonal()
    cosine, overlap = products / torch.outer(lengths, lengths), shared / counts[:, None].minimum(counts).clamp_min(1)
    rows = []
    for trainer, pair, _ in features.values() if reading else ():
        encode = trainer.encoders()[pair]
        with reading_the_base(trainer.model, trainer.adapter_name, trainer.task) as reader:
            pair_batches = ((other.pairs_to_read().signed(1, own), own) for other, own, _ in features.values())
            read = [encode_all(reader, trainer.config.source, encode, *each, Processes()) for each in pair_batches]
            rows.append([one.metrics()["cor"] for one in read])
    correlations = torch.tensor(rows, dtype=torch.float64, device="cpu") if reading else None
    return FeatureComparison(list(features), cosine, overlap, top, correlations)


def _dense(decoder: FeatureDecoder, block: str) -> Tensor:
    """All weights of a block, on the CPU."""
    return dense(decoder.weight[block], decoder.index[block], decoder.shapes[block].numel()).cpu()
