"""What a fit is asked to do: the adapter, the pool that it guards, and who takes part."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.adapters import ConceptErasureConfig, ErasureLayer, erasure_layers
from hf_erasure.adapters.common.lookup import Found, adapter_of
from hf_erasure.adapters.common.provenance import Provenance
from hf_erasure.models import POOLS, Reading, check_pool, reading_of, sentence_reading
from hf_erasure.models.model import evaluating, on_cpu, unwrapped
from hf_erasure.models.pooling import IN_WORDS
from hf_erasure.models.runner import Runner

from .checkpoint import FitCheckpoint
from .labels import BatchLabels, label_tensor
from .processes import Processes
from .sites import observed

# Where a head reads every token by itself, it reads these two as well.
_POSITIONS = ("cls", "last")


@dataclass(frozen=True)
class Pool:
    """What a fit guards.

    Attributes:
        name: One of `POOLS`.
        reader: What the model's head reads, in words.
    """

    name: str
    reader: str


@dataclass
class FitTask:
    """One adapter to be fitted.

    Attributes:
        owner: The model that has the adapter.
        runner: Calls the model.
        layers: The sites, by the name of their module, in the model's order.
        name: The adapter.
        config: Its configuration.
        pool: Which rows a sequence label counts for, and what the model's head reads.
        processes: Those that share the data.
        progress: Whether to show progress bars.
        resident_batches: How many batches keep their activations in memory in sequential fitting; all when None.
        checkpoint: Where to keep what is finished, if anywhere.
    """

    owner: nn.Module
    runner: Runner
    layers: dict[str, ErasureLayer]
    name: str
    config: ConceptErasureConfig
    pool: Pool
    processes: Processes
    progress: bool = False
    resident_batches: int | None = None
    checkpoint: FitCheckpoint | None = None

    def in_step(self, batches: Iterable[BatchLabels]) -> Iterator[tuple[BatchLabels, bool]]:
        """The batches to run the model on, and which of them count.

        Every forward pass of a sharded model needs all processes, so that those with fewer batches repeat one.
        """
        if self.runner.is_sharded and self.processes.count > 1:
            return self.processes.equally_often(batches)
        return ((batch, True) for batch in batches)

    def run_over(
        self,
        batches: Iterable[BatchLabels],
        observer: Callable[[BatchLabels | None, str, Tensor], Tensor],
        then: Callable[[BatchLabels], None] = lambda labels: None,
    ) -> None:
        """Run the model over batches.

        Args:
            batches: This process's own.
            observer: Sees the batch, the site and its activation in the place of the adapter's eraser, and returns
                what goes on; the batch is None where it does not count.
            then: Called with each batch that counts after its forward pass.
        """
        running: list[BatchLabels | None] = [None]
        with observed(self.layers, self.name, lambda site, hidden: observer(running[0], site, hidden)):
            for labels, counts in self.in_step(batches):
                running[0] = labels if counts else None
                self.runner(labels.batch)
                if counts:
                    then(labels)


def task_for(
    model: nn.Module,
    name: str,
    batches: Iterable[Any],
    pool: str | None,
    *,
    concept: ConceptErasureConfig | None = None,
    as_fitted: bool = False,
) -> tuple[FitTask, Iterator[Any]]:
    """The task of fitting or measuring an adapter, and its batches, of which the first was looked at.

    Args:
        model: With the adapter, or whatever that is inside of.
        name: The adapter.
        batches: Labelled batches; the labels' form and two rows of the first one decide on the pool.
        pool: As in `fit_concept_erasure`.
        concept: By whose labels the batches are read; the adapter's own when None.
        as_fitted: Take the pool that the adapter was fitted for, if there is one and none is asked for.

    Raises:
        ValueError: If the pool is not known, there is no such adapter, or it is merged.
    """
    check_pool(pool)
    found, layers = adapter_to_fit(model, name)
    config, runner, processes = found.config, Runner(model, layers.values()), Processes()
    with processes.agreeing("reading its batches"):
        rest = iter(batches)
        first = list(itertools.islice(rest, 1))
    known = Provenance.of(config)
    if as_fitted and pool is None and known.pool in POOLS:
        guarded = Pool(known.pool, known.reader)
    else:
        guarded = pool_for(pool, model, runner, concept or config, first[0] if first else None, processes)
    task = FitTask(found.owner, runner, layers, name, config, guarded, processes)
    return task, itertools.chain(first, rest)


def adapter_to_fit(model: nn.Module, name: str) -> tuple[Found[ConceptErasureConfig], dict[str, ErasureLayer]]:
    """An adapter that can be fitted, and its sites.

    Raises:
        ValueError: If there is no such adapter, or its eraser is part of the weights at present.
    """
    found = adapter_of(model, name, ConceptErasureConfig)
    layers = erasure_layers(found.owner, name)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("Adapters are merged into the weights: call unmerge_adapter() before fitting.")
    return found, layers


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
    not_guarded = f"pool={pool!r} guards {IN_WORDS[pool]}, but {reading.text}"
    if reading.pool is not None and not is_read:
        warnings.warn(
            f"{not_guarded} (pool={reading.pool!r}): what the head reads is not guarded. Leave pool out, or give "
            f"pool={reading.pool!r}.",
            stacklevel=4,
        )
    elif reading.is_other and pool != "tokens":
        warnings.warn(
            f"{not_guarded}: what the head reads is not guarded. Pad batches on the side that the head expects, or "
            "give pool='tokens'.",
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
        return BatchLabels(rows).select(hidden, runner.side_of("last_hidden_state"))[1].real

    with evaluating(read):
        return reading_of(read, final, lambda: runner.call(root, asked), real_of, is_bare=is_bare and not has_own_head)
