"""Which rows of an activation carry which label.

A batch labels whole sequences or single tokens; activations come with padding, with another length in a decoder than
in an encoder, and sometimes with heads or flattened. This file is the one place where the two are brought together.
Batches come in by `Source.read`, which checks each of them; what follows relies on that. Which rows the label of a
sequence counts for is its pool, by default what the model's head reads: `pool_for`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.erasers.statistics import IGNORED
from hf_erasure.models import POOLS, Reading, pooling, reading_of, sentence_reading
from hf_erasure.models.model import Runner, evaluating, on_cpu, unwrapped
from hf_erasure.models.pooling import IN_WORDS

from .processes import Processes

# Where a head reads every token by itself, it reads these two as well.
_POSITIONS = ("cls", "last")


@dataclass(frozen=True)
class Selection:
    """The labelled rows of one activation of shape (batch, seq, …, width).

    Attributes:
        counted: `(batch, seq)` bool, rows that enter the statistics.
        real: `(batch, seq)` bool, positions that are not padding.
        z: Class ids `(batch, seq)`, values `(batch, seq, concept_dim)`, or None for a background.
        weight: `(batch, seq)` float64, or None where every row counts alike.
    """

    counted: Tensor
    real: Tensor
    z: Tensor | None
    weight: Tensor | None


def mean_pooled(activation: Tensor, selection: Selection) -> tuple[Tensor, Selection]:
    """One row a sequence, `(batch, 1, …, width)`, where each row weighs 1/length: the mean, which `pool="mean"` guards.

    An activation whose rows carry no weight is left alone.
    """
    if selection.weight is None or selection.z is None:
        return activation, selection
    mean = pooling.pooled(activation.flatten(2), selection.counted, "mean").unflatten(1, activation.shape[2:])
    labelled = selection.counted.any(1, keepdim=True)
    return mean.unsqueeze(1), Selection(labelled, labelled, selection.z[:, :1], None)


@dataclass(frozen=True)
class Source:
    """Batches of one kind.

    Attributes:
        key: Tells them from the others of the fit.
        title: What messages call them.
        batches: Dicts of model inputs, plus `concept_labels` where there is a concept.
        z_dim: Columns of the concept; 0 for a background, which decides on mean and covariance alone.
        categorical: Whether labels are class ids.
    """

    key: str
    title: str
    batches: Iterable[Any]
    z_dim: int = 0
    categorical: bool = True

    def read(self, pool: str) -> Iterator[BatchLabels]:
        """The batches one after another, each checked and with its labels.

        Args:
            pool: Which rows a sequence label counts for.

        Raises:
            TypeError: If something is not a batch, or its inputs are not tensors.
            ValueError: If labels are missing or do not fit.
        """
        name = "batches" if self.z_dim else "background"
        for position, batch in enumerate(self.batches):
            where = f"{name}[{position}]"
            if not hasattr(batch, "keys"):
                raise TypeError(
                    f"{where} is a {type(batch).__name__}; a batch is a dict of model inputs"
                    f"{' plus concept_labels' if self.z_dim else ''}, as concept_dataloader makes them."
                )
            if self.z_dim and "concept_labels" not in batch:
                raise ValueError(
                    f"{where} has no 'concept_labels', only {sorted(batch.keys())}. Use concept_dataloader(dataset, "
                    "tokenizer, text_column=…, label_column=…), or add the labels to your batches."
                )
            for key, value in batch.items():
                numbers = isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (int, float, list))
                if key != "concept_labels" and (isinstance(value, np.ndarray) or numbers):
                    raise TypeError(
                        f"{where}[{key!r}] is of type {type(value).__name__}, and a model takes tensors: write "
                        "torch.as_tensor(…)."
                    )
            yield BatchLabels(batch, self, pool)


def labelled_by(
    concept: ConceptErasureConfig, batches: Iterable[Any], key: str = "labelled", title: str = "batches"
) -> Source:
    """Batches with the labels of a concept."""
    return Source(key, title, batches, concept.z_dim, concept.labels is not None)


class BatchLabels:
    """One batch with its labels and masks.

    Attributes:
        batch: Model inputs and `concept_labels`.
        source: Where it comes from; says what its labels are.
        rows: The number of sequences.

    Raises:
        TypeError: If labels are not numbers.
        ValueError: If labels are not those of this batch and of such a concept.
    """

    def __init__(self, batch: Mapping[str, Any], source: Source, pool: str = "tokens") -> None:
        self.batch, self.source, self._pool = dict(batch), source, pool
        inputs = (v for name, v in batch.items() if name != "concept_labels" and isinstance(v, Tensor) and v.dim())
        self.rows: int = next(inputs).shape[0]
        self._labels: Tensor | None = None
        self._by_token = False
        self._selections: dict[tuple[bool, int, torch.device], Selection] = {}
        if source.z_dim:
            self._labels = label_tensor(batch)
            self._by_token = self._labels.dim() == (2 if source.categorical else 3)
            self._check(self._labels)

    def __reduce__(self) -> tuple[Any, ...]:
        """One batch is lent to another process without the others of its source, which may be a generator."""
        return type(self), (self.batch, replace(self.source, batches=()), self._pool)

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
        decoder = "decoder" in where
        mask = self._mask(decoder)
        if activation.dim() == 2:
            # One row a sequence (poolers), or all tokens in one list (experts).
            flattened = mask is not None and activation.shape[0] == mask.numel() and mask.shape[1] > 1
            shape = mask.shape if flattened and mask is not None else (activation.shape[0], 1)
            activation = activation.reshape(*shape, activation.shape[-1])
        seq = activation.shape[1]
        if activation.shape[0] != self.rows or (mask is not None and seq not in (1, mask.shape[1])):
            expected = f"({self.rows}, {'any' if mask is None else mask.shape[1]}, …)"
            raise ValueError(
                f"The activation at {where!r} has shape {tuple(activation.shape)}, which does not line up with the "
                f"batch, expected {expected}: its rows cannot be labelled. Choose another target module."
            )
        key = (decoder, seq, activation.device)
        if key not in self._selections:
            all_real = torch.ones(self.rows, seq, dtype=torch.bool, device="cpu")
            real = all_real if mask is None or seq != mask.shape[1] else mask.cpu()
            self._selections[key] = self._selection(real, activation.device, where)
        return activation, self._selections[key]

    def covers(self, where: str) -> bool:
        """Whether the labels speak of this side of an encoder-decoder; labels of whole sequences speak of both."""
        if self._labels is None or not self._by_token:
            return True
        mask = self._mask("decoder" in where)
        return mask is None or self._labels.shape[:2] == mask.shape

    def _mask(self, decoder: bool) -> Tensor | None:
        """`(batch, seq)` bool, or None where the batch has none to say (images)."""
        # A model that is all decoder calls its modules so too, but its batch has one mask.
        decoder = decoder and any(name.startswith("decoder_") or name == "labels" for name in self.batch)
        side = "decoder_" if decoder else ""
        mask = self.batch.get(f"{side}attention_mask")
        if mask is None and decoder and "labels" in self.batch and "decoder_input_ids" not in self.batch:
            mask = self.batch["labels"] != IGNORED
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
        counted, z, weight = real, self._labels, None
        if z is not None and self._by_token:
            if z.shape[:2] != real.shape:
                raise ValueError(
                    f"concept_labels label {z.shape[1]} positions, but {where!r} has {real.shape[1]}: tokens "
                    "cannot be matched. In an encoder-decoder, target the side whose tokens are labelled."
                )
        elif z is not None:
            counted = pooling.counted(real, self._pool)
            z = z.unsqueeze(1).expand(-1, real.shape[1], *z.shape[1:])
            if self._pool == "mean":
                # Each sequence weighs 1, so that the mean-pooled embedding is what is guarded.
                weight = (real / real.sum(1, keepdim=True).clamp_min(1)).double()
        if z is not None and self.source.categorical:
            counted = counted & (z != IGNORED)
        return Selection(*(None if t is None else t.to(device) for t in (counted, real, z, weight)))  # type: ignore[arg-type]

    def _check(self, labels: Tensor) -> None:
        of = f"concept_labels of {labels.dtype} and shape {tuple(labels.shape)}"
        z_dim, categorical = self.source.z_dim, self.source.categorical
        if categorical and (labels.is_floating_point() or labels.dim() not in (1, 2)):
            raise ValueError(
                f"{of} are not class ids of shape (batch,) or (batch, seq). A continuous concept is declared by "
                "ConceptErasureConfig(concept_dim=…)."
            )
        is_float = labels.is_floating_point() and labels.shape[-1] == z_dim and labels.dim() in (2, 3)
        if not categorical and not is_float:
            raise ValueError(
                f"{of} are not floats of shape (batch, {z_dim}) or (batch, seq, {z_dim}). Classes are declared by "
                "ConceptErasureConfig(labels=[…])."
            )
        if categorical and self._by_token:
            lengths = {mask.shape[1] for mask in (self._mask(False), self._mask(True)) if mask is not None}
            if labels.shape[1] == 1 and 1 not in lengths:
                raise ValueError(f"{of} are a column: for one class a sequence write concept_labels.squeeze(1).")
            if labels.shape[1] == z_dim and lengths and z_dim not in lengths:
                raise ValueError(
                    f"{of} cannot be matched with the tokens: of one-hot rows write concept_labels.argmax(1)."
                )
        strange = labels[((labels < 0) & (labels != IGNORED)) | (labels >= z_dim)]
        if categorical and strange.numel():
            raise ValueError(
                f"concept_labels hold the class id {strange[0].item()}, and the adapter has {z_dim} classes, 0 to "
                f"{z_dim - 1}: name every class in ConceptErasureConfig(labels=[…]), or write {IGNORED} where a row "
                "has none of them."
            )
        if labels.shape[0] != self.rows:
            raise ValueError(f"{of} label {labels.shape[0]} rows, and the batch has {self.rows}: give one for each.")
        if self._pool != "tokens" and self._by_token:
            raise ValueError(
                f"pool={self._pool!r} is for labels of whole sequences; these label tokens: use pool='tokens'."
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


# ---- the pool of a fit -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """What a fit guards.

    Attributes:
        name: One of `POOLS`.
        reader: What the model's head reads, in words.
    """

    name: str
    reader: str


def pool_for(
    pool: str | None, model: nn.Module, runner: Runner, config: ConceptErasureConfig, first: Any, processes: Processes
) -> Pool:
    """The pool of a fit; warns where it is not what the model's head reads, or where that could not be found out.

    Args:
        pool: What was asked for, one of `POOLS`; None for what the head reads.
        model: The model as the caller has given it.
        runner: Calls it.
        config: By whose labels the batches are read.
        first: The first of the labelled batches; None where this process has no batch.
        processes: Those that share the data.
    """
    rows = next((rows for rows in processes.gathered([_two_rows(first)]) if rows is not None), None)
    if rows is None:
        return Pool(pool or "tokens", "")  # fitting says what is wrong with the batches
    of_tokens = 2 if config.labels is not None else 3
    if pool in (None, "tokens") and "concept_labels" in rows and label_tensor(rows).dim() == of_tokens:
        return Pool("tokens", "the labels are of single tokens")
    reading = sentence_reading(model) or _reading(model, runner, rows)
    if pool is None:
        if not reading.clear:
            warnings.warn(
                f"pool=None: {reading.text}, so that all tokens count alike. Say what is to be guarded, "
                f"pool={' or '.join(map(repr, POOLS))}, and pad batches on the side that the head expects.",
                stacklevel=4,
            )
        alike = ": all tokens count alike" if reading.pool is None else ""
        return Pool(reading.pool or "tokens", reading.text + alike)
    is_read = pool == reading.pool or (reading.pool == "tokens" and pool in _POSITIONS)
    remedy, beside = "", "" if reading.pool is None else f" (pool={reading.pool!r})"
    if reading.pool is not None and not is_read:
        remedy = f"Leave pool out, or give pool={reading.pool!r}."
    elif reading.is_other and pool != "tokens":
        remedy = "Pad batches on the side that the head expects, or give pool='tokens'."
    if remedy:
        warnings.warn(
            f"pool={pool!r} guards {IN_WORDS[pool]}, but {reading.text}{beside}: what the head reads is not guarded. "
            f"{remedy}",
            stacklevel=4,
        )
    return Pool(pool, reading.text)


def _two_rows(batch: Any) -> dict[str, Any] | None:
    """The longest and the shortest row of a batch; None where it is not one."""
    if not isinstance(batch, Mapping):
        return None
    tensors = {name: value.cpu() for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    inputs = [value for name, value in tensors.items() if name != "concept_labels"]
    if not inputs or not len(inputs[0]):
        return None
    mask = tensors.get("attention_mask", torch.ones(len(inputs[0]), 1, device="cpu"))
    lengths = mask.flatten(1).sum(1)
    chosen = sorted({int(lengths.argmax()), int(lengths.argmin())})
    return {
        name: tensors[name][chosen].clone() if name in tensors and len(tensors[name]) == len(lengths) else value
        for name, value in batch.items()
    }


@on_cpu
def _reading(model: nn.Module, runner: Runner, rows: dict[str, Any]) -> Reading:
    is_bare = runner.backbone is runner.model
    final = runner.final_states()["last_hidden_state"] if is_bare else runner.backbone
    # Around a bare model a module of the caller's own may have the head.
    while (inner := unwrapped(model)) is not model:
        model = inner
    has_own_head = is_bare and model is not runner.model and not runner.is_sharded
    read = model if has_own_head else runner.model
    root = runner.callee if runner.is_sharded else read
    asked = {**rows, "output_hidden_states": True} if is_bare and not has_own_head else rows

    def real_of(hidden: Tensor) -> Tensor:
        unlabelled = BatchLabels(rows, Source("background", "background", ()))
        return unlabelled.select(hidden, runner.side_of("last_hidden_state"))[1].real

    with evaluating(read):
        return reading_of(read, final, lambda: runner.call(root, asked), real_of, is_bare=is_bare and not has_own_head)
