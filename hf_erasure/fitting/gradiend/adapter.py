"""`GradiendAdapter`: one GRADIEND adapter of a model, to read with and to steer; and the values that are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_erasure.adapters import (
    GradiendConfig,
    features_of,
    gradiend_layers,
    kept_share,
    stated_bytes,
    steer,
    targeted_parameters,
)
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.models.heads import Task
from hf_erasure.models.slots import PairBatch, as_pair_batch

from ..processes import Processes
from .gradients import GradientReader
from .pairs import Pair, Signed

if TYPE_CHECKING:
    import pandas as pd

# ---- values of the feature neuron ------------------------------------------------------------------------------------

Encode = Callable[[Mapping[str, Tensor]], float]
# Encoded values above it count as class 0, below its negative as class 1, between them as neutral.
THRESHOLD = 0.5


@dataclass(frozen=True)
class EncodedValues:
    """Values of the feature neuron beside what was put in.

    Attributes:
        values: `(texts,)` in [−1, 1] for tanh.
        labels: `(texts,)` of +1, −1 and 0.
        pair: The names of the classes that +1 and −1 stand for.
    """

    values: Tensor
    labels: Tensor
    pair: Pair

    def metrics(self) -> dict[str, float]:
        """`cor` and `acc` without neutral texts, `cor_enc` and `acc_enc` with them, where there are any.

        `acc` is the balanced accuracy of the sign; `acc_enc` that of three classes told apart at ±0.5.
        """
        featured = self.labels != 0
        values, labels = self.values[featured], self.labels[featured]
        found = {"cor": pearson(values, labels), "acc": balanced_accuracy(values.sign(), labels)}
        if bool((~featured).any()):
            decided = (self.values > THRESHOLD).double() - (self.values < -THRESHOLD).double()
            found["cor_enc"] = pearson(self.values, self.labels)
            found["acc_enc"] = balanced_accuracy(decided, self.labels)
        return found

    def names(self) -> list[str]:
        """The class of every text, or `"neutral"`."""
        by_label = {1: self.pair[0], -1: self.pair[1], 0: "neutral"}
        return [by_label[int(label)] for label in self.labels]

    def to_pandas(self) -> pd.DataFrame:
        """One row a text: `value`, `class`."""
        import pandas as pd

        return pd.DataFrame({"value": self.values.tolist(), "class": self.names()})


def together(parts: Sequence[EncodedValues]) -> dict[str, float]:
    """The metrics of one pair, or of several: each by its name, and their means without one."""
    if len(parts) == 1:
        return parts[0].metrics()
    each = {part.pair: part.metrics() for part in parts}
    shared = set.intersection(*(set(found) for found in each.values()))
    means = {name: sum(found[name] for found in each.values()) / len(each) for name in sorted(shared)}
    return means | {f"{name}_{a}_{b}": value for (a, b), found in each.items() for name, value in found.items()}


def pearson(values: Tensor, labels: Tensor) -> float:
    """Pearson's correlation; NaN where one of the two does not vary, since there is none then."""
    x, y = values.double(), labels.double()
    if x.numel() == 0 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x.norm() * y.norm()))


def balanced_accuracy(decided: Tensor, labels: Tensor) -> float:
    """The mean over classes of the share that was recognised."""
    shares = [float((decided[labels == label] == label).double().mean()) for label in labels.unique()]
    return sum(shares) / len(shares)


def encoded(values: Iterable[float], labels: Iterable[int], pair: Pair) -> EncodedValues:
    """Gather values and labels; float64 on the CPU."""
    return EncodedValues(
        torch.tensor(list(values), dtype=torch.float64, device="cpu"),
        torch.tensor(list(labels), dtype=torch.long, device="cpu"),
        pair,
    )


def encode_all(
    reader: GradientReader, source: str, encode: Encode, batches: Sequence[Signed], pair: Pair, processes: Processes
) -> EncodedValues:
    """The values of batches of one text each, with +1, −1 or 0; the work is shared among processes."""
    mine = [(encode(reader.gradient(batch, source)), sign) for batch, sign in processes.mine(batches)]
    values, labels = zip(*processes.gathered(mine), strict=True)
    return encoded(values, labels, pair)


# ---- the adapter -----------------------------------------------------------------------------------------------------


class GradiendAdapter:
    """A handle on one GRADIEND adapter; it holds nothing itself.

    Args:
        model: A model with the adapter, or whatever it is inside of: a `PeftModel`, a `SentenceTransformer`,
            `DataParallel`, DDP, FSDP, a compiled model, a module of your own.
        name: The adapter's name.

    Raises:
        ValueError: If the model has no GRADIEND adapter of that name.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        adapter_of(model, name, GradiendConfig)  # raises where there is none
        self.model, self.name = model, name

    @classmethod
    def of(cls, model: nn.Module, name: str = "default") -> GradiendAdapter:
        """The adapter `name` of `model`."""
        return cls(model, name)

    @property
    def config(self) -> GradiendConfig:
        """The adapter's configuration."""
        return adapter_of(self.model, self.name, GradiendConfig).config

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's state; of one that is not fitted yet, what they will be."""
        return stated_bytes(self.model, self.name)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def steer(
        self,
        feature_factor: float | None = None,
        learning_rate: float | None = None,
        pair: Pair | list[str] | None = None,
    ) -> None:
        """Set the edit `W + learning_rate · (feature_factor · Wd + bd)`, in place; what is left out stays.

        Args:
            feature_factor: h; class 0 of the pair encodes to +1.
            learning_rate: α; 0 leaves the model as it is.
            pair: Of a feature of more than two classes, whose neuron acts.

        Raises:
            ValueError: If the adapter is not fitted or merged, a number is not finite, or the pair is unknown.
        """
        chosen = None if pair is None else list(pair)
        steer(self.model, self.name, feature_factor=feature_factor, learning_rate=learning_rate, pair=chosen)

    def kept_share(self) -> float:
        """The share of the edit that survives being merged in the dtype of the weights."""
        return kept_share(self.model, self.name)

    def importance(self, pair: Pair | list[str] | None = None) -> pd.DataFrame:
        """Which weights the decoder changes: one row a parameter, largest share of the squared change first.

        Columns: `parameter`, `entries`, `kept` (entries that the adapter holds), `norm` of Wd, `share` of ‖Wd‖².
        """
        import pandas as pd

        decoder = features_of(self.model, self.name)[self.config.pair_index(pair or self.config.pair)].decoder
        rows = []
        for name, (_, square, kept) in decoder.importance().items():
            entries = decoder.shapes[name].numel()
            rows.append({"parameter": name, "entries": entries, "kept": kept, "norm": square**0.5, "square": square})
        table = pd.DataFrame(rows)
        table["share"] = table.pop("square") / sum(row["square"] for row in rows)
        return table.sort_values("share", ascending=False, ignore_index=True)

    # ---- reading ----------------------------------------------------------------------------------------------------

    def encode(self, batch: PairBatch | dict[str, Tensor], pair: Pair | list[str] | None = None) -> Tensor:
        """Read the feature off the gradient of every row.

        Args:
            batch: Of `pair_batches`, or a dictionary of model inputs with `labels` as transformers' losses take them
                (−100 where nothing is predicted); the latter for an adapter whose source is `"factual"`.
            pair: Of a feature of more than two classes, whose neuron reads; by default the one that acts.

        Returns:
            `(batch,)` float32 values of the feature neuron, near +1 for class 0 and −1 for class 1 of the pair.

        Raises:
            ValueError: If the adapter was saved without its encoder, or is merged.
        """
        encode = list(self.encoders().values())[self.config.pair_index(pair or self.config.pair)]
        source = self.config.source
        with reading_the_base(self.model, self.name) as reader:
            if not isinstance(batch, PairBatch):
                batch = as_pair_batch(batch, reader.model, reader.task, source)
            rows = (batch.some_rows([row]) for row in range(len(batch)))
            values = [encode(reader.gradient(row, source)) for row in rows]
        return torch.tensor(values, dtype=torch.float32, device="cpu")

    def encoders(self) -> dict[Pair, Encode]:
        """The encoder of every pair.

        Raises:
            ValueError: If the adapter is not fitted, or does not hold them.
        """
        found: dict[Pair, Encode] = {}
        for pair, feature in zip(self.config.pairs or [], features_of(self.model, self.name), strict=True):
            if feature.encoder is None:
                raise ValueError(
                    f"The GRADIEND adapter {self.name!r} holds no encoder: it was fitted with keep_encoder=False. Fit "
                    "it with GradiendConfig(keep_encoder=True) to encode with what is saved and loaded."
                )
            found[(pair[0], pair[1])] = feature.encoder.encode
        return found

    def __repr__(self) -> str:
        config = self.config
        return (
            f"GradiendAdapter({self.name!r}, feature={config.feature!r}, classes={config.classes}, "
            f"feature_factor={config.feature_factor:g}, learning_rate={config.learning_rate:g}, "
            f"modules={len(gradiend_layers(self.model, self.name))})"
        )


@contextmanager
def reading_the_base(model: nn.Module, adapter_name: str, task: Task | None = None) -> Iterator[GradientReader]:
    """Read gradients of the base model at an adapter's weights: the adapter has no effect meanwhile.

    Raises:
        ValueError: If the adapter is merged.
    """
    if any(adapter_name in layer.merged_adapters for layer in gradiend_layers(model, adapter_name).values()):
        raise ValueError(
            f"The adapter {adapter_name!r} is merged into the weights, whose gradients are not those of the base "
            "model: call unmerge_adapter() first."
        )
    config = adapter_of(model, adapter_name, GradiendConfig).config
    rate, has_effect = config.learning_rate, config.fitted
    if has_effect:
        steer(model, adapter_name, learning_rate=0.0)
    try:
        yield GradientReader(model, targeted_parameters(model, adapter_name), task)
    finally:
        if has_effect:
            steer(model, adapter_name, learning_rate=rate)
