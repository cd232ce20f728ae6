"""Labelled batches: which rows of an activation carry which label, and the moments of these rows.

A batch labels whole sequences or single tokens. Activations have padding, other lengths in a decoder than in an
encoder, and sometimes heads, or they are flattened. Only this file aligns activations with labels. `Source.read` reads
the batches and checks each of them; other functions rely on these checks.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.erasers import ConceptMoments
from hf_erasure.erasers.moments import Strata
from hf_erasure.erasers.statistics import IGNORED
from hf_erasure.models import pooling
from hf_erasure.models.layout import FRAMES, Axes, Visit
from hf_erasure.models.model import inputs_of, on_cpu

from .layouts import Layouts, is_of_numbers
from .pairs import Pairs, ids_in
from .processes import Processes

# The names of masks that tell what of images or sounds is padding.
_MEDIA_MASKS = ("pixel_attention_mask", "pixel_mask", "input_features_mask", "feature_attention_mask")


@dataclass(frozen=True)
class Selection:
    """The labelled rows of one activation of shape (batch, seq, …, width)."""

    counted: Tensor  # `(batch, seq)` bool, rows that enter the statistics.
    real: Tensor  # `(batch, seq)` bool, positions that are not padding.
    z: Tensor | None  # Class ids `(batch, seq)`, values `(batch, seq, concept_dim)`, or None for a background.
    weight: Tensor | None  # `(batch, seq)` float64, or None where every row counts alike.
    # `(batch, seq)` int64, positions of a pair with equal numbers are compared, −1: not compared; None without pairs.
    compared: Tensor | None = None


def mean_pooled(activation: Tensor, selection: Selection) -> tuple[Tensor, Selection]:
    """The mean over each sequence, `(batch, 1, …, width)`, where its rows weigh 1/length: `pool="mean"` guards it.

    An activation whose rows have no weights is returned as it is.
    """
    if selection.weight is None or selection.z is None:
        return activation, selection
    mean = pooling.pooled(activation.flatten(2), selection.counted, "mean").unflatten(1, activation.shape[2:])
    labelled = selection.counted.any(1, keepdim=True)
    return mean.unsqueeze(1), Selection(labelled, labelled, selection.z[:, :1], None)


# ---- batches of one kind ---------------------------------------------------------------------------------------------


@dataclass
class SiteStatistics:
    """The moments at each visit of a site."""

    concept: ConceptErasureConfig | None  # The concept that is erased, with its environments; None for a background.
    # Visit → its moments, created when the width of the activation is known; and the dtype of the activation.
    moments: dict[Visit, ConceptMoments] = field(default_factory=dict)
    dtypes: dict[Visit, torch.dtype] = field(default_factory=dict)

    @property
    def strata(self) -> Strata:
        """The numbering of classes, of environments (if the concept is erased within each), and of what is kept."""
        if self.concept is None:
            return Strata(0)
        environments = len(self.concept.environments or ()) if self.concept.environment_rank else 1
        return Strata(self.concept.z_dim, environments or 1, len(self.concept.kept or ()) or 1)

    def moments_for(self, visit: Visit, width: int) -> ConceptMoments:
        """The moments of a visit; they are created if they are missing."""
        z_dim = self.strata.classes if visit.of_pairs else self.strata.size
        return self.moments.setdefault(visit, ConceptMoments(width, z_dim))

    @on_cpu()
    def add(self, visit: Visit, labels: BatchLabels, hidden: Tensor) -> None:
        """Add the activation of a batch at one visit of a site, and its differences within pairs."""
        activation, selection = labels.select(hidden, visit)
        self.update(visit, activation, selection)
        if selection.compared is not None and labels.pairs is not None:
            differences, z = labels.pairs.differences(activation, selection.compared)
            if len(differences):
                of_pairs = visit._replace(of_pairs=True)
                self.dtypes[of_pairs] = activation.dtype
                # Each difference with both signs, so that their mean is zero and centring takes nothing away.
                both = torch.cat([differences, -differences]), torch.cat([z, -z])
                self.moments_for(of_pairs, differences.shape[-1]).update(*both)

    @on_cpu()
    def update(self, visit: Visit, activation: Tensor, selection: Selection) -> None:
        """Add an activation `(batch, seq, …, width)`."""
        counted = selection.counted
        if not bool(counted.any()):
            return
        self.dtypes.setdefault(visit, activation.dtype)
        # Heads between the positions and the width have the label of their position.
        rows = activation[counted]
        heads = rows[0].numel() // rows.shape[-1]
        z = None if selection.z is None else selection.z[counted].repeat_interleave(heads, 0)
        weight = None if selection.weight is None else selection.weight[counted].repeat_interleave(heads, 0)
        try:
            self.moments_for(visit, rows.shape[-1]).update(rows.reshape(-1, rows.shape[-1]), z, weight)
        except ValueError as error:
            raise ValueError(f"At {visit!r}: {error}") from error

    def pool(self, processes: Processes, visits: Collection[Visit] | None = None) -> None:
        """Add up the moments of these visits, or of all, over all processes, in every process."""
        if processes.count == 1:
            return
        chosen = {visit: moments for visit, moments in self.moments.items() if visits is None or visit in visits}
        own = {visit: (moments.x_dim, self.dtypes[visit], moments.shared) for visit, moments in chosen.items()}
        shares = processes.gathered([own])
        for visit in sorted({visit for share in shares for visit in share}):
            there = [share.get(visit) for share in shares]
            # Any one of them, since all have the same width: the last.
            width, self.dtypes[visit], _ = next(seen for seen in reversed(there) if seen is not None)
            sums = [None if seen is None else seen[2] for seen in there]
            self.moments_for(visit, width).pool(sums, processes.add)


class Source(SiteStatistics):
    """Batches of one kind, and the counts and statistics of those that were read.

    Args:
        concept: The concept whose labels are read; None for a background, which decides on mean and covariance alone.
        batches: Dicts of model inputs, plus `concept_labels` with a concept.
        key: The name of these batches in messages and in the checkpoint of a fit.
        original: The object that the batches came from, by default `batches`.
    """

    def __init__(
        self,
        concept: ConceptErasureConfig | None,
        batches: Iterable[Any] = (),
        key: str = "labelled",
        original: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(concept)
        self.batches, self.key = batches, key
        original = batches if original is None else original
        # The batches for another pass; None if they can be read only once.
        self.rereadable = None if isinstance(original, Iterator) else original
        self.title = "batches" if key == "labelled" else key
        # Sequences with a label, or of a background, and their positions without padding.
        self.examples = self.tokens = 0
        self.pairs, self.is_paired = 0, False  # How many counterfactuals were read, and whether there should be some.
        self.covered: set[str] = set()  # The sites whose rows are labelled by some batch.
        self.uncovered: set[str] = set()  # The sites whose rows are not labelled by some batch with labels of tokens.

    def read(self, pool: str, layouts: Layouts) -> Iterator[BatchLabels]:
        """Yield the batches with their labels; each is checked and counted."""
        for position, batch in enumerate(self.batches):
            where = f"{self.title}[{position}]"
            if not hasattr(batch, "keys"):
                raise TypeError(
                    f"{where} is a {type(batch).__name__}; a batch is a dict of model inputs"
                    f"{' plus concept_labels' if self.concept else ''}, as concept_dataloader makes them."
                )
            if self.concept and "concept_labels" not in batch:
                raise ValueError(
                    f"{where} has no 'concept_labels', only {sorted(batch.keys())}. Use concept_dataloader(dataset, "
                    "tokenizer, text_column=…, label_column=…), or add the labels to your batches."
                )
            for key, value in inputs_of(batch).items():
                if is_of_numbers(value):
                    raise TypeError(
                        f"{where}[{key!r}] is of type {type(value).__name__}, and a model takes tensors: write "
                        "torch.as_tensor(…)."
                    )
            axes, mask = layouts.of(batch), batch.get("attention_mask")
            labels = BatchLabels(batch, self, pool, axes, layouts.frames_of(batch))
            for site in {visit.site for visit in axes}:
                (self.covered if labels.covers(site) else self.uncovered).add(site)
            counted = labels.labelled if self.concept else ~labels.labelled
            if labels.pairs is not None:
                self.pairs, self.is_paired = self.pairs + len(labels.pairs), True
            self.examples += int(counted.sum())
            self.tokens += int((mask[counted.to(mask.device)] if isinstance(mask, Tensor) else counted).sum())
            yield labels

    def pool_counts(self, processes: Processes) -> None:
        """Add up the counts of what was read over all processes, in every process."""
        counts = self.examples, self.tokens, self.pairs, self.is_paired
        read = processes.gathered([(*counts, self.covered, self.uncovered)])
        self.examples, self.tokens, self.pairs = (sum(one[place] for one in read) for place in range(3))
        self.is_paired = any(one[3] for one in read)
        self.covered, self.uncovered = (set().union(*(one[place] for one in read)) for place in (4, 5))

    def check_reached(
        self, sites: Collection[str], reached: Container[str] | None = None, *, may_lack: bool = False
    ) -> list[str]:
        """Check that batches were read, and that every site is in `reached`, by default the sites with moments.

        Returns:
            The sites that are in `reached`: all of them, unless `may_lack` allows that some are not.
        """
        if not self.examples and not self.covered | self.uncovered:
            raise ValueError(
                f"{self.title} is empty: there is nothing to fit on. An iterator that was used up is empty, too."
            )
        if not self.examples:
            raise ValueError(
                f"concept_labels are {IGNORED}, which stands for no label, at every row of {self.title}: look at where "
                "they are made, and give the rows their class ids."
            )
        if not self.pairs and self.concept and (self.is_paired or self.concept.pair_rank):
            raise ValueError(
                f"None of the {self.examples} examples of {self.title} has a counterfactual: no text has a word of the "
                "table, or the batches were made without them. Give concept_dataloader(…, counterfactual_column=…), or "
                "another table, counterfactual_words=…, or pair_rank=0."
            )
        reached = {visit.site for visit in self.moments if visit.number == 1} if reached is None else reached
        absent = [site for site in sites if site not in reached]
        elsewhere = [site for site in sites if site in self.uncovered]
        mixed = [site for site in elsewhere if site in self.covered]
        if mixed or (absent and absent == elsewhere == list(sites)):
            raise ValueError(
                f"In {'some' if mixed else 'all'} of the {self.title} concept_labels label tokens that are not the "
                f"rows at {(mixed or elsewhere)[0]!r}: label the tokens of its side in all of them, give labels of "
                "whole sequences, or name modules on the side whose tokens are labelled."
            )
        if absent and (not may_lack or (self.concept and len(absent) == len(sites))):
            raise ValueError(
                f"{absent[0]!r} and {len(absent) - 1} other sites were never reached by a row that counts while the "
                f"model ran over {self.title}. Give batches that use them (decoder inputs for a decoder) and label "
                "their rows, or leave out what the forward pass does not call, such as a module whose weight another "
                f"module reads itself: exclude_modules={absent}."
            )
        return [site for site in sites if site not in absent]


# ---- one batch -------------------------------------------------------------------------------------------------------


class BatchLabels:
    """One batch with its labels and masks; its source has the concept of the labels."""

    def __init__(
        self,
        batch: Mapping[str, Any],
        source: Source,
        pool: str,
        axes: Mapping[Visit, Axes | ValueError],
        frames: Tensor | None = None,
    ) -> None:
        self.batch, self.source, self._pool, self._axes, self._frames = dict(batch), source, pool, axes, frames
        inputs = (value for value in inputs_of(batch).values() if isinstance(value, Tensor) and value.dim())
        self.rows: int = len(next(inputs, ()))  # The number of sequences.
        self.pairs: Pairs | None = None  # Which rows are counterfactuals of which; None if the batch does not say.
        self._labels: Tensor | None = None
        # `(batch,)` bool on the CPU, which sequences have a label; counterfactuals are left out.
        self.labelled = torch.zeros(self.rows, dtype=torch.bool, device="cpu")
        self._by_token = self._by_class = False
        self._selections: dict[tuple[Any, ...], Selection] = {}
        if source.concept is not None:
            self._labels, self._by_class = label_tensor(batch), source.concept.labels is not None
            self._by_token = self._labels.dim() == (2 if self._by_class else 3)
            self._check_labels(self._labels, source.concept.z_dim)
            known = self._labels.unsqueeze(1).flatten(1) != IGNORED
            self.labelled = known.any(1) if self._by_class else ~self.labelled
            if "concept_pairs" in batch:
                if not self._by_class or self._by_token:
                    raise ValueError(
                        "concept_pairs are for classes of whole texts: give ConceptErasureConfig(labels=[…])."
                    )
                self.pairs = Pairs.of_batch(batch, self.rows, source.concept.z_dim)
                self.labelled &= self.pairs.is_text.cpu()
            if (strata := source.strata).size > strata.classes:
                shape = (-1, 1) if self._by_token else (-1,)
                apart = ("concept_environments", strata.environments), ("concept_kept", strata.kept)
                ids = [ids_in(batch, name, self.rows, count).view(shape) if count > 1 else 0 for name, count in apart]
                self._labels = strata.ids(self._labels, *ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """A batch is sent to another process without the other batches of its source, which may be a generator."""
        return type(self), (self.batch, Source(self.source.concept), self._pool, self._axes, self._frames)

    def select(self, activation: Tensor, where: Visit) -> tuple[Tensor, Selection]:
        """Return the activation at a visit or last hidden state as `(batch, seq, …, width)`, and its labelled rows."""
        if not activation.numel():
            none = torch.zeros(self.rows, 0, dtype=torch.bool, device=activation.device)
            return activation.new_zeros(self.rows, 0, 1), Selection(none, none, None, None)
        axes = self._axes.get(where, self._axes.get(Visit(where.site)))
        if not isinstance(axes, Axes):
            raise axes or ValueError(
                f"{where!r} was not reached by the rows that showed what the axes of activations are: choose another "
                "target module."
            )
        shape, activation = tuple(activation.shape), axes.arranged(activation, self.rows, where)
        seq = activation.shape[1]
        key = (axes.side, axes.start, axes.beside, seq, activation.device)
        if key in self._selections:
            return activation, self._selections[key]
        mask = self._mask_of_media(seq, axes, where) if axes.side is None else self._mask(axes.side)
        if mask is not None and (mask.shape[1] != seq if axes.beside is None else mask.shape[1] + axes.start > seq):
            raise ValueError(
                f"The activation at {where!r} has shape {shape}, which does not line up with the batch of "
                f"{mask.shape[1]} positions: its rows cannot be labelled. Choose another target module."
            )
        real = torch.full((self.rows, seq), axes.beside is not False, device="cpu")
        of_tokens = slice(axes.start, seq if mask is None else axes.start + mask.shape[1])
        if mask is not None:
            real[:, of_tokens] = mask.cpu()
        counted, z, weight = real, self._labels, None
        if z is not None and self._by_token:
            tokens, labels = real[:, of_tokens], z
            if labels.shape[:2] != tokens.shape:
                raise ValueError(
                    f"concept_labels label {labels.shape[1]} positions, but {where!r} has {tokens.shape[1]}: tokens "
                    "cannot be matched. In an encoder-decoder, target the side whose tokens are labelled."
                )
            counted = torch.zeros_like(real)
            z = torch.zeros(*real.shape, *labels.shape[2:], dtype=labels.dtype, device="cpu")
            counted[:, of_tokens], z[:, of_tokens] = tokens, labels
        elif z is not None:
            counted = pooling.counted(real, self._pool)
            z = z.unsqueeze(1).expand(-1, seq, *z.shape[1:])
            if self._pool == "mean":
                # Each sequence weighs 1, so that the mean-pooled embedding is guarded.
                weight = real.double() / real.sum(1, keepdim=True).clamp_min(1)
        if z is not None and self._by_class:
            counted = counted & (z != IGNORED)
        compared = self.pairs.compared(real, of_tokens, axes.side, self._pool, where) if self.pairs else None
        tensors = (None if t is None else t.to(activation.device) for t in (counted, real, z, weight, compared))
        self._selections[key] = Selection(*tensors)  # type: ignore[arg-type]
        return activation, self._selections[key]

    def covers(self, site: str) -> bool:
        """Whether the labels are about the rows at a site or last hidden state.

        Labels of whole sequences are about the rows everywhere. Labels of tokens are about one side of an
        encoder-decoder, and not about images. If the axes at some visit are not known, the result is True.
        """
        visits = [axes for visit, axes in self._axes.items() if visit.site == site]
        if self._labels is None or not self._by_token or not all(isinstance(axes, Axes) for axes in visits):
            return True
        masks = [None if axes.side is None else self._mask(axes.side) for axes in visits if isinstance(axes, Axes)]
        return all(mask is not None and self._labels.shape[:2] == mask.shape for mask in masks)

    def _mask(self, side: str) -> Tensor | None:
        """`(batch, seq)` bool, which positions are not padding; None for a batch without a mask (images)."""
        if side == FRAMES:
            return self._frames
        mask, labels = self.batch.get(f"{side}attention_mask"), self.batch.get("labels")
        if mask is None and side and getattr(labels, "ndim", 0) == 2 and "decoder_input_ids" not in self.batch:
            mask = labels != IGNORED
        if mask is None:
            ids = self.batch.get(f"{side}input_ids")
            mask = torch.ones_like(ids) if isinstance(ids, Tensor) else None
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"{side}attention_mask has shape {tuple(mask.shape)}; a mask of shape (batch, seq) is needed to tell "
                "which positions are padding."
            )
        return None if mask is None else mask.bool()

    def _mask_of_media(self, seq: int, axes: Axes, where: Visit) -> Tensor | None:
        """`(batch, seq)` bool, which rows of images or sounds are not padding; None if no mask of the batch says it."""
        if axes.is_unequal and self._labels is not None:
            raise ValueError(
                "The texts of a batch have different numbers of tokens for images or sounds, and the rows at "
                f"{where!r} do not say which text they belong to, so they cannot be labelled. Give each text of a "
                "batch as many images, of one size, or choose modules of the language model."
            )
        masks = {name: self.batch[name].bool() for name in _MEDIA_MASKS if self.batch.get(name) is not None}
        found = next((mask for mask in masks.values() if mask.shape == (self.rows, seq)), None)
        if found is None and (padded := [name for name, mask in masks.items() if not mask.all()]):
            warnings.warn(
                f"The batches have {padded[0]}, and which rows of an activation it marks as padding is not known: "
                "where rows are not tokens, all of them count. Give images or sounds of one size.",
                stacklevel=2,
            )
        return found

    def _check_labels(self, labels: Tensor, z_dim: int) -> None:
        of = f"concept_labels of {labels.dtype} and shape {tuple(labels.shape)}"
        if self._by_class and (labels.is_floating_point() or labels.dim() not in (1, 2)):
            raise ValueError(
                f"{of} are not class ids of shape (batch,) or (batch, seq). A continuous concept is declared by "
                "ConceptErasureConfig(concept_dim=…)."
            )
        is_float = labels.is_floating_point() and labels.shape[-1] == z_dim and labels.dim() in (2, 3)
        if not self._by_class and not is_float:
            raise ValueError(
                f"{of} are not floats of shape (batch, {z_dim}) or (batch, seq, {z_dim}). Classes are declared by "
                "ConceptErasureConfig(labels=[…])."
            )
        if self._by_class and self._by_token:
            lengths = {mask.shape[1] for mask in (self._mask(""), self._mask("decoder_")) if mask is not None}
            if labels.shape[1] == 1 and 1 not in lengths:
                raise ValueError(f"{of} are a column: for one class a sequence write concept_labels.squeeze(1).")
            if labels.shape[1] == z_dim and lengths and z_dim not in lengths:
                raise ValueError(f"{of} are not those of tokens: for one-hot rows write concept_labels.argmax(1).")
        strange = labels[((labels < 0) & (labels != IGNORED)) | (labels >= z_dim)]
        if self._by_class and strange.numel():
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


class BatchesOnDisk(Sequence[BatchLabels]):
    """Batches on disk, each read again whenever it is asked for; their folder is deleted together with this object."""

    def __init__(self, batches: Iterable[BatchLabels]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="hf-erasure-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        # What batches share, which stays in memory: source, pool and axes.
        self._shared: list[tuple[Source, str, Mapping[Visit, Axes | ValueError]]] = []
        # The batch that was read last: a forward pass that begins asks for the batch that was used just before.
        self._last: tuple[int, BatchLabels] | None = None
        for labels in batches:
            torch.save((labels.batch, labels._frames), self._folder / str(len(self._shared)))
            self._shared.append((labels.source, labels._pool, labels._axes))

    def __len__(self) -> int:
        return len(self._shared)

    def __getitem__(self, which: Any) -> Any:
        if not 0 <= which < len(self):
            raise IndexError(which)
        if self._last is None or self._last[0] != which:
            path = self._folder / str(which)
            batch, frames = torch.load(path, weights_only=False)  # a file of this process
            source, pool, axes = self._shared[which]
            self._last = which, BatchLabels(batch, source, pool, axes, frames)
        return self._last[1]


def length_of(batches: Any) -> int | None:
    """How many batches there are, for a progress bar; None if they have no length, or asking for it fails."""
    with suppress(Exception):
        return len(batches)
    return None


def label_tensor(batch: Mapping[str, Any]) -> Tensor:
    """The `concept_labels` of a batch, on the CPU; integers are int64, since 156 would be equal to −100 in uint8."""
    given = batch["concept_labels"]
    try:
        labels = torch.as_tensor(given, device="cpu")
        return labels if labels.is_floating_point() or labels.is_complex() else labels.long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"concept_labels are not numbers, the first is {given[0]!r}: write the id of each row's class, or let "
            "concept_dataloader(…, labels=[…]) number the names."
        ) from error
