"""`GradiendAdapter`: one GRADIEND adapter of a model, which reads a feature and steers the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_erasure.adapters import GradiendConfig, features_of, kept_share, stated_bytes, steer
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.models.model import pandas
from hf_erasure.models.slots import PairBatch, as_pair_batch

from .gradients import Encode, reading_the_base
from .pairs import Pair


class GradiendAdapter:
    """A handle on one GRADIEND adapter; it holds no values itself.

    Args:
        model: A model with the adapter, or a module that contains it: a `PeftModel`, a `SentenceTransformer`,
            `DataParallel`, DDP, FSDP, a compiled model, a module of your own.
        name: The adapter's name.

    Raises:
        ValueError: If the model has no GRADIEND adapter of that name.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        adapter_of(model, name, GradiendConfig)  # raises an error if the adapter is missing
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
        """The bytes of the adapter's state; before it is fitted, about as many as it will have."""
        return stated_bytes(self.model, self.name)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def steer(
        self,
        feature_factor: float | None = None,
        learning_rate: float | None = None,
        pair: Pair | list[str] | None = None,
    ) -> None:
        """Set the edit `W + learning_rate · (feature_factor · Wd + bd)`, in place; omitted arguments keep their values.

        Args:
            feature_factor: h; class 0 of the pair encodes to +1.
            learning_rate: α; 0 leaves the model as it is.
            pair: For a feature of more than two classes, the pair whose neuron acts.

        Raises:
            ValueError: If the adapter is not fitted or merged, a number is not finite, or the pair is unknown.
        """
        chosen = None if pair is None else list(pair)
        steer(self.model, self.name, feature_factor=feature_factor, learning_rate=learning_rate, pair=chosen)

    def kept_share(self) -> float:
        """The share of the edit that is left when it is merged in the dtype of the weights."""
        return kept_share(self.model, self.name)

    def importance(self, pair: Pair | list[str] | None = None) -> pandas.DataFrame:
        """Which weights the decoder changes: one row for each parameter, largest share of the squared change first.

        Columns: `parameter`, `entries`, `kept` (entries that the adapter holds), `norm` of Wd, `share` of ‖Wd‖².
        """
        decoder = features_of(self.model, self.name)[self.config.pair_index(pair or self.config.pair)].decoder
        rows = []
        for name, (_, square, kept) in decoder.importance().items():
            entries = decoder.shapes[name].numel()
            rows.append({"parameter": name, "entries": entries, "kept": kept, "norm": square**0.5, "square": square})
        table = pandas.DataFrame(rows)
        table["share"] = table.pop("square") / sum(row["square"] for row in rows)
        return table.sort_values("share", ascending=False, ignore_index=True)

    # ---- reading ----------------------------------------------------------------------------------------------------

    def encode(self, batch: PairBatch | dict[str, Tensor], pair: Pair | list[str] | None = None) -> Tensor:
        """Read the feature from the gradient of every row.

        Args:
            batch: A batch of `pair_batches`. For an adapter with the source `"factual"` also a dictionary of model
                inputs with `labels` as transformers' losses take them (−100 where nothing is predicted).
            pair: For a feature of more than two classes, the pair whose neuron reads; by default the one that acts.

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
            ValueError: If the adapter is not fitted, or does not hold its encoders.
        """
        found: dict[Pair, Encode] = {}
        for pair, feature in zip(self.config.pairs or [], features_of(self.model, self.name), strict=True):
            if feature.encoder is None:
                raise ValueError(
                    f"The GRADIEND adapter {self.name!r} holds no encoder: it was fitted with keep_encoder=False. Fit "
                    "it with GradiendConfig(keep_encoder=True), which saves and loads the encoder too."
                )
            found[(pair[0], pair[1])] = feature.encoder.encode
        return found
