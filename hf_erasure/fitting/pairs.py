"""Texts and their counterfactuals in one batch: which rows they are, which positions are compared, the differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from hf_erasure.erasers.statistics import IGNORED
from hf_erasure.models import pooling
from hf_erasure.models.layout import Visit, rows_of

# The keys of a batch that describe its pairs of texts and counterfactuals.
_PAIR_KEYS = ("concept_pairs", "concept_pair_labels", "concept_words")
_ARGUMENTS = {"concept_environments": "environment_column", "concept_kept": "keep"}  # of concept_dataloader


@dataclass(frozen=True)
class Pairs:
    """Which rows of a batch are counterfactuals of which texts; its length is the number of counterfactuals."""

    text_of: Tensor  # `(rows,)` int64, for a counterfactual the row of its text, −1 for a text.
    labels: Tensor  # `(rows,)` int64 class ids of texts and counterfactuals, `IGNORED` for a text without a pair.
    words: Tensor | None  # `(rows, seq)` int64, the number of a token's word, equal for counterparts; −1 for none.
    classes: int  # How many classes the concept has.

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any], rows: int, classes: int) -> Pairs:
        """Read and check the pairs of a batch.

        Raises:
            ValueError: The rows do not have one id each, or a pair is not of two texts of two classes.
        """
        text_of, labels = (ids_in(batch, name, rows) for name in ("concept_pairs", "concept_pair_labels"))
        words = batch.get("concept_words")
        found = cls(text_of, labels, words.cpu() if isinstance(words, Tensor) else None, classes)
        if bool((text_of >= rows).any()) or bool((text_of[found.texts] >= 0).any()):
            raise ValueError("concept_pairs must name a row of the same batch that is a text, or be -1 for a text.")
        both = torch.stack([labels[found.texts], labels[found.others]])
        if bool(((both < 0) | (both >= classes)).any() or (both[0] == both[1]).any()):
            raise ValueError(
                f"concept_pair_labels must hold two of the {classes} classes of the adapter for each pair, those of a "
                f"text and of its counterfactual; got {both[0].tolist()[:4]} and {both[1].tolist()[:4]}."
            )
        return found

    def __len__(self) -> int:
        return len(self.others)

    @property
    def is_text(self) -> Tensor:
        """`(rows,)` bool: whether a row is a text, not a counterfactual."""
        return self.text_of < 0

    @property
    def others(self) -> Tensor:
        """`(pairs,)` the rows that are counterfactuals."""
        return (self.text_of >= 0).nonzero().flatten()

    @property
    def texts(self) -> Tensor:
        """`(pairs,)` the rows of the texts of `others`, in the same order."""
        return self.text_of[self.others]

    def compared(self, real: Tensor, of_tokens: slice, side: str | None, pool: str, where: Visit) -> Tensor:
        """`(rows, seq)` int64: positions of a pair with equal numbers are compared, words or whole texts; −1: not.

        Args:
            real: `(rows, seq)` bool, positions that are not padding.
            of_tokens: The positions of tokens.
            side: The side of an encoder-decoder, as in `Axes`.
            pool: One of `POOLS`.
            where: The visit, for messages.
        """
        if pool != "tokens":
            return torch.where(pooling.counted(real, pool), 0, -1)
        if side == "" and self.words is not None:
            found = torch.full(real.shape, -1, device="cpu")
            found[:, of_tokens] = torch.where(real[:, of_tokens], self.words, -1)
            return found
        lengths = real.sum(1)
        if not torch.equal(lengths[self.texts], lengths[self.others]):
            raise ValueError(
                f"A text and its counterfactual have different numbers of positions at {where!r}, and which of them "
                "are counterparts is not known: load a fast tokenizer, which tells the words of tokens, or compare "
                "whole texts, pool='mean'."
            )
        return torch.where(real, real.cumsum(1) - 1, -1)

    def differences(self, activation: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
        """The activations of texts minus those of their counterfactuals.

        Args:
            activation: `(rows, seq, …, width)`.
            compared: `(rows, seq)`, the result of `compared`, on the device of the activation.

        Returns:
            `(differences, width)` in the dtype of the activation, at least float32; and `(differences, classes)` the
            class of the text, one-hot, minus that of the counterfactual.
        """
        rows, numbers, chosen = len(compared), int(compared.max()) + 1, compared >= 0
        places = (compared + torch.arange(rows, device=compared.device)[:, None] * numbers)[chosen]
        flat = activation.flatten(2)[chosen].double()
        sums = flat.new_zeros(rows * numbers, flat.shape[1]).index_add_(0, places, flat)
        counts = torch.bincount(places, minlength=rows * numbers)
        means = (sums / counts.clamp_min(1)[:, None]).view(rows, numbers, *activation.shape[2:])
        texts, others = self.texts.to(compared.device), self.others.to(compared.device)
        is_present = counts.view(rows, numbers) > 0
        both = is_present[texts] & is_present[others]
        found = (means[texts] - means[others])[both]
        classes = one_hot(self.labels.clamp_min(0), self.classes).to(compared.device)
        z = (classes[texts] - classes[others]).double()[:, None].expand(-1, numbers, -1)[both]
        heads = found[0].numel() // found.shape[-1] if len(found) else 1
        found = found.reshape(-1, found.shape[-1]).to(torch.promote_types(activation.dtype, torch.float32))
        return found, z.repeat_interleave(heads, 0)


def ids_in(batch: Mapping[str, Any], name: str, rows: int, count: int | None = None) -> Tensor:
    """`(rows,)` int64 ids that a batch has under a name, on the CPU; below `count` where one is given.

    Raises:
        ValueError: The rows do not have one id each, or an id is out of range.
    """
    values = batch.get(name)
    if values is None and name in _ARGUMENTS:
        raise ValueError(
            f"A batch has no {name!r}, which the adapter was configured or fitted with: give "
            f"concept_dataloader(…, {_ARGUMENTS[name]}=…), or add the adapter anew."
        )
    ids = torch.as_tensor([] if values is None else values, device="cpu")
    if ids.shape != (rows,) or ids.is_floating_point():
        raise ValueError(
            f"{name} must hold one id for each of the {rows} rows, as concept_dataloader makes them; got "
            f"{'nothing' if values is None else f'{ids.dtype} of shape {tuple(ids.shape)}'}."
        )
    if count is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(f"{name} hold ids from {int(ids.min())} to {int(ids.max())}: they must be 0 to {count - 1}.")
    return ids.long()


def without_counterfactuals(batch: Any) -> Any:
    """Take the counterfactuals, unless they have labels, out of a batch; other batches are returned as they are."""
    if not isinstance(batch, Mapping) or "concept_pairs" not in batch or "concept_labels" not in batch:
        return batch
    texts = torch.as_tensor(batch["concept_pairs"], device="cpu") < 0
    if bool((torch.as_tensor(batch["concept_labels"], device="cpu")[~texts] != IGNORED).any()):
        return batch  # the batch has only the labels of its pairs
    remaining = {name: value for name, value in batch.items() if name not in _PAIR_KEYS}
    return rows_of(remaining, len(texts), texts.nonzero().flatten().tolist())
