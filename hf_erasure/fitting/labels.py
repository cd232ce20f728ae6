"""Which rows of an activation carry which label.

A batch labels whole sequences or single tokens; activations come with padding, with another length in a decoder than
in an encoder, and sometimes with heads or flattened. This file is the one place where the two are brought together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.models import counted
from hf_erasure.models.model import on_cpu

IGNORE = -100


@dataclass(frozen=True)
class Selection:
    """The labelled rows of one activation of shape (batch, seq, …, width).

    Attributes:
        counted: `(batch, seq)` bool, rows that enter the statistics.
        real: `(batch, seq)` bool, positions that are no padding.
        z: Class ids `(batch, seq)`, values `(batch, seq, concept_dim)`, or None for a background.
        weight: `(batch, seq)` float64, or None where every row counts alike.
    """

    counted: Tensor
    real: Tensor
    z: Tensor | None
    weight: Tensor | None


def mean_pooled(activation: Tensor, selection: Selection) -> tuple[Tensor, Selection]:
    """One row a sequence where each row weighs 1/length: the mean, which `pool="mean"` guards.

    Args:
        activation: `(batch, seq, …, width)`.
        selection: Its rows; left alone where they carry no weight.

    Returns:
        `(batch, 1, …, width)` and the selection of these.
    """
    if selection.weight is None or selection.z is None:
        return activation, selection
    weight = torch.where(selection.counted, selection.weight, 0.0).to(activation.dtype)
    # Padding may hold anything, NaN too.
    kept = torch.where(_like(selection.counted, activation), activation, 0.0)
    mean = (kept * _like(weight, activation)).sum(1, keepdim=True)
    labelled = selection.counted.any(1, keepdim=True)
    return mean, Selection(labelled, labelled, selection.z[:, :1], None)


def _like(rows: Tensor, activation: Tensor) -> Tensor:
    """`(batch, seq)` → `(batch, seq, 1, …)`, to broadcast over the rest."""
    return rows.reshape(*rows.shape, *[1] * (activation.dim() - 2))


@dataclass
class BatchLabels:
    """The labels and masks of one batch.

    Args:
        batch: Model inputs and `concept_labels`.
        z_dim: Columns of the concept; 0 for a background, which needs no labels.
        categorical: Whether labels are class ids.
        pool: Which rows a sequence label counts for: `"tokens"`, `"mean"`, `"cls"` or `"last"`.
    """

    batch: dict[str, Any]
    z_dim: int
    categorical: bool
    pool: str
    _cache: dict[tuple[bool, int, int, torch.device], Selection] = field(default_factory=dict)

    @on_cpu
    def select(self, activation: Tensor, where: str) -> tuple[Tensor, Selection]:
        """Align an activation with the labels.

        Args:
            activation: `(batch, seq, …, width)`, `(batch, width)` or `(batch · seq, width)`.
            where: The module's name; one with "decoder" in it is aligned with the decoder's mask.

        Returns:
            The activation as `(batch, seq, …, width)`, and its `Selection`.

        Raises:
            ValueError: If the positions of the activation are not those of the batch.
        """
        rows = self.rows
        decoder = "decoder" in where
        mask = self._mask(decoder)
        if activation.dim() == 2:
            # One row a sequence (poolers), or all tokens in one list (experts).
            flattened = mask is not None and activation.shape[0] == mask.numel() and mask.shape[1] > 1
            shape = mask.shape if flattened and mask is not None else (activation.shape[0], 1)
            activation = activation.reshape(*shape, activation.shape[-1])
        seq = activation.shape[1]
        if activation.shape[0] != rows or (mask is not None and seq not in (1, mask.shape[1])):
            expected = f"({rows}, {'any' if mask is None else mask.shape[1]}, …)"
            raise ValueError(
                f"The activation at {where!r} has shape {tuple(activation.shape)}, which does not line up with the "
                f"batch, expected {expected}: its rows cannot be labelled. Choose another target module."
            )
        key = (decoder, rows, seq, activation.device)
        if key not in self._cache:
            real = torch.ones(rows, seq, dtype=torch.bool) if mask is None or seq != mask.shape[1] else mask
            self._cache[key] = self._selection(real.cpu(), activation.device, where)
        return activation, self._cache[key]

    @on_cpu
    def covers(self, where: str) -> bool:
        """Whether the labels speak of this side of an encoder-decoder; labels of whole sequences speak of both."""
        if self.z_dim == 0 or not self._by_token(labels := self._labels()):
            return True
        mask = self._mask("decoder" in where)
        return mask is None or labels.shape[:2] == mask.shape

    def _by_token(self, labels: Tensor) -> bool:
        return labels.dim() == (2 if self.categorical else 3)

    @property
    def rows(self) -> int:
        """The number of sequences."""
        tensors = (
            v for name, v in self.batch.items() if name != "concept_labels" and isinstance(v, Tensor) and v.dim()
        )
        return next(tensors).shape[0]

    def _mask(self, decoder: bool) -> Tensor | None:
        """`(batch, seq)` bool, or None where the batch has none to say (images)."""
        # A model that is all decoder calls its modules so too, but its batch has one mask.
        decoder = decoder and any(name.startswith("decoder_") or name == "labels" for name in self.batch)
        side = "decoder_" if decoder else ""
        mask = self.batch.get(f"{side}attention_mask")
        if mask is None and decoder and "labels" in self.batch and "decoder_input_ids" not in self.batch:
            mask = self.batch["labels"] != IGNORE
        if mask is None:
            ids = self.batch.get(f"{side}input_ids")
            mask = torch.ones_like(ids) if isinstance(ids, Tensor) else None
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"{side}attention_mask has shape {tuple(mask.shape)}; a mask of shape (batch, seq) is needed to tell "
                "which positions are padding."
            )
        return None if mask is None else mask.bool()

    def _selection(self, real: Tensor, device: torch.device, where: str) -> Selection:
        if self.z_dim == 0:
            return Selection(real.to(device), real.to(device), None, None)
        labels = self._labels()
        if self._by_token(labels):
            if labels.shape[:2] != real.shape:
                raise ValueError(
                    f"concept_labels label {labels.shape[1]} positions, but {where!r} has {real.shape[1]}: tokens "
                    "cannot be matched. In an encoder-decoder, target the side whose tokens are labelled."
                )
            counted, weight, z = real.clone(), None, labels
        else:
            counted, weight = self._pooled(real)
            z = labels.unsqueeze(1).expand(-1, real.shape[1], *labels.shape[1:])
        if self.categorical:
            counted = counted & (z != IGNORE)
        return Selection(*(None if t is None else t.to(device) for t in (counted, real, z, weight)))  # type: ignore[arg-type]

    def _pooled(self, real: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows a sequence label counts for, and their weight."""
        if self.pool != "mean":
            return counted(real, self.pool), None
        # Each sequence weighs 1, so that the mean-pooled embedding is what is guarded.
        return real, (real / real.sum(1, keepdim=True).clamp_min(1)).double()

    def _labels(self) -> Tensor:
        labels = label_tensor(self.batch)
        of = f"concept_labels of {labels.dtype} and shape {tuple(labels.shape)}"
        if self.categorical:
            if labels.is_floating_point() or labels.dim() not in (1, 2):
                raise ValueError(
                    f"{of} are no class ids of shape (batch,) or (batch, seq). A continuous concept is declared by "
                    "ConceptErasureConfig(concept_dim=…)."
                )
            self._check_ids(labels, of)
        elif not labels.is_floating_point() or labels.shape[-1] != self.z_dim or labels.dim() not in (2, 3):
            raise ValueError(
                f"{of} are no floats of shape (batch, {self.z_dim}) or (batch, seq, {self.z_dim}). Classes are "
                "declared by ConceptErasureConfig(labels=[…])."
            )
        if labels.shape[0] != self.rows:
            raise ValueError(f"{of} label {labels.shape[0]} rows, and the batch has {self.rows}: give one for each.")
        if self.pool != "tokens" and self._by_token(labels):
            raise ValueError(
                f"pool={self.pool!r} is for labels of whole sequences; these label tokens: use pool='tokens'."
            )
        return labels

    def _check_ids(self, labels: Tensor, of: str) -> None:
        """Raise a `ValueError` for a column of class ids, and for ids that no class has."""
        lengths = {mask.shape[1] for mask in (self._mask(False), self._mask(True)) if mask is not None}
        if labels.dim() == 2 and labels.shape[1] == 1 and 1 not in lengths:
            raise ValueError(f"{of} are a column: for one class a sequence write concept_labels.squeeze(1).")
        if labels.dim() == 2 and labels.shape[1] == self.z_dim and lengths and self.z_dim not in lengths:
            raise ValueError(f"{of} cannot be matched with the tokens: of one-hot rows write concept_labels.argmax(1).")
        if bool(((labels < 0) & (labels != IGNORE)).any()) or bool((labels >= self.z_dim).any()):
            strange = labels[((labels < 0) & (labels != IGNORE)) | (labels >= self.z_dim)][0].item()
            raise ValueError(
                f"concept_labels hold the class id {strange}, and the adapter has {self.z_dim} classes, 0 to "
                f"{self.z_dim - 1}: name every class in ConceptErasureConfig(labels=[…]), or write {IGNORE} where a "
                "row has none of them."
            )


def label_tensor(batch: Mapping[str, Any]) -> Tensor:
    """The `concept_labels` of a batch, on the CPU.

    Raises:
        TypeError: If they are not numbers.
    """
    given = batch["concept_labels"]
    try:
        return torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"concept_labels are not numbers, the first is {given[0]!r}: write the id of each row's class, or let "
            "concept_dataloader(…, labels=[…]) number the names."
        ) from error


def check_batch(batch: Any, position: int, *, labelled: bool) -> dict[str, Any]:
    """A batch as a dict, or an error that says what it should be."""
    name = "batches" if labelled else "background"
    if not hasattr(batch, "keys"):
        raise TypeError(
            f"{name}[{position}] is a {type(batch).__name__}; a batch is a dict of model inputs"
            f"{' plus concept_labels' if labelled else ''}, as concept_dataloader makes them."
        )
    if labelled and "concept_labels" not in batch:
        raise ValueError(
            f"{name}[{position}] has no 'concept_labels', only {sorted(batch.keys())}. Use concept_dataloader(dataset, "
            "tokenizer, text_column=…, label_column=…), or add the labels to your batches."
        )
    for key, value in batch.items():
        numbers = isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (int, float, list))
        if key != "concept_labels" and (isinstance(value, np.ndarray) or numbers):
            raise TypeError(
                f"{name}[{position}][{key!r}] is of type {type(value).__name__}, and a model takes "
                "tensors: write torch.as_tensor(…)."
            )
    return dict(batch)


@dataclass(frozen=True)
class Source:
    """Batches of one kind.

    Attributes:
        key: Tells them from the others of the fit.
        title: What messages call them.
        batches: Dicts of model inputs, plus `concept_labels` where there is a concept.
        concept: By whose labels they are read; None for a background, which decides on mean and covariance alone.
    """

    key: str
    title: str
    batches: Iterable[Any]
    concept: ConceptErasureConfig | None

    @property
    def labelled(self) -> bool:
        """Whether there is a concept."""
        return self.concept is not None

    @property
    def z_dim(self) -> int:
        """The number of columns the concept is coded in; 0 for a background."""
        return 0 if self.concept is None else self.concept.z_dim

    def labels_of(self, batch: dict[str, Any], pool: str) -> BatchLabels:
        """Which rows of a batch count, and what they say of the concept."""
        if self.concept is None:
            return BatchLabels(batch, 0, True, "tokens")
        return BatchLabels(batch, self.concept.z_dim, self.concept.labels is not None, pool)


def sources_of(concept: ConceptErasureConfig, batches: Iterable[Any], background: Iterable[Any] | None) -> list[Source]:
    """The labelled batches of one concept, and unlabelled ones where they are given."""
    labelled = Source("labelled", "batches", batches, concept)
    return [labelled, *background_source(background)]


def background_source(background: Iterable[Any] | None) -> list[Source]:
    """Unlabelled batches, where they are given."""
    return [] if background is None else [Source("background", "background", background, None)]
