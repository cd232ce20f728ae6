"""Estimate feature neurons: one pass for the closed form, AdamW from one seed or several for the trained one.

A feature of k classes has k (k − 1) / 2 pairs, each with a neuron of its own. One run of an estimator for one pair is
a *start*; the starts of all pairs and seeds follow one another.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_erasure.gradiend import ClosedFormEstimator, FeatureNeuron
from hf_erasure.models.slots import PairBatch

from ..processes import Processes
from .arguments import GradiendTrainingArguments
from .checkpoints import Fitted, Progress
from .encoding import ENOUGH, Encode, centred, encode_all, encoded
from .gradients import GradientReader
from .pairs import Pair, PairSet, Signed

# Correlation and loss of training steps are those of so many latest ones.
WINDOW = 100
# A prime far above any number of epochs keeps the orders of two seeds apart.
APART = 1_000_003


@dataclass(frozen=True)
class Start:
    """One run of an estimator for one pair."""

    number: int
    pair: Pair
    seed: int
    per_epoch: int
    steps: int


@dataclass
class _Best:
    """The best evaluation of a start so far, and how many came since."""

    size: float = -1.0
    step: int = 0
    since: int = 0


@dataclass
class Training:
    """Runs all starts.

    Attributes:
        reader: Gives gradients of the base model.
        source: What the encoder reads: `"factual"`, `"counterfactual"` or `"difference"`.
        args: Estimator, steps and intervals.
        train: The training data.
        evaluation: What correlations are measured on; those of the latest training steps are taken where it is None.
        processes: Those that share the work.
        progress: Told of every step; keeps checkpoints and features.
        losses: Of the latest steps.
        recent: Encoded values and signs of the latest steps.
    """

    reader: GradientReader
    source: str
    args: GradiendTrainingArguments
    train: PairSet
    evaluation: PairSet | None
    processes: Processes
    progress: Progress
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def __post_init__(self) -> None:
        parameters = self.reader.parameters
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        # Estimators live with the first of the weights.
        self.device = next(iter(parameters.values())).device
        self.identity = self._identity()
        self._epoch: tuple[tuple[int, int], list[Signed]] = (-1, -1), []

    def run(self, pairs: Sequence[Pair], resume_from: str | bool | None) -> list[Fitted]:
        """Estimate every pair's feature; the best start of each is kept."""
        closed = self.args.estimator == "closed_form"
        seeds = [self.args.seed + i for i in range(1 if closed else self.args.seeds)]
        numbered = enumerate(itertools.product(pairs, seeds))
        starts = [self._start(number, pair, seed) for number, (pair, seed) in numbered]
        state, facts = self.progress.resume(resume_from, self.identity)
        self.progress.begin(sum(start.steps for start in starts))
        run = self._closed_form if closed else self._trained
        for start in starts[facts["start"] :]:
            run(start, state, facts)
            state, facts = {}, {"step": 0}
        self.progress.end()
        self.processes.wait()
        return [self._best([start for start in starts if start.pair == pair]) for pair in pairs]

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from."""
        blocks = hashlib.sha256(repr([(name, list(shape)) for name, shape in self.shapes.items()]).encode())
        args = self.args
        same: dict[str, Any] = {
            "estimator": args.estimator,
            "source": self.source,
            "targeted weights": blocks.hexdigest(),
            "train_dataset": _digest(self.train.dataset),
            "per_device_train_batch_size": args.per_device_train_batch_size,
        }
        if args.estimator == "trained":
            names = ("seed", "seeds", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
            same |= {name: getattr(args, name) for name in (*names, "max_steps", "num_train_epochs", "activation")}
        return same

    def _start(self, number: int, pair: Pair, seed: int) -> Start:
        if self.args.estimator == "closed_form":
            a_pass = len(self.processes.in_step(self._sides(pair)))
            return Start(number, pair, seed, a_pass, a_pass)
        a_pass = sum(map(len, self._sides(pair, times=self.processes.count)))
        steps = self.args.max_steps if self.args.max_steps > 0 else math.ceil(a_pass * self.args.num_train_epochs)
        return Start(number, pair, seed, a_pass, steps)

    def _sides(self, pair: Pair, seed: int | None = None, times: int = 1) -> list[list[Signed]]:
        """The batches of a pair's class 0 and of its class 1, so many times the size of one device's batch."""
        signed = self.train.signed(self.args.per_device_train_batch_size * times, pair, seed)
        return [[entry for entry in signed if entry[1] == sign] for sign in (1, -1)]

    # ---- closed form ------------------------------------------------------------------------------------------------

    def _closed_form(self, start: Start, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        estimator = ClosedFormEstimator(self.shapes, device=self.device)
        # What was accumulated before adds up over processes: the main one goes on with it, the others start anew.
        if state and self.processes.is_main:
            estimator.load_state_dict(state)
        sides = self._sides(start.pair)
        for step, row in enumerate(self.processes.in_step(sides)):
            if step < facts["step"]:
                continue
            taken = self.processes.take(row)
            if taken is not None:
                self.reader.accumulate(taken[0], self.source, estimator, taken[1], low_memory=self.args.low_memory)
            self.progress.step()
            if self.progress.control.should_save and step + 1 < start.steps:
                self._add_up(estimator)
                self._save(start, step + 1, estimator.state_dict())
                if not self.processes.is_main:
                    estimator = ClosedFormEstimator(self.shapes, device=self.device)  # the main one has it all
        self._add_up(estimator)
        feature = estimator.feature()
        if self.args.per_device_train_batch_size > 1:
            feature = replace(feature, encoder=centred(feature.encoder, *map(self._singly, sides)))
        correlation = self._correlation(start.pair, feature.encoder.encode)
        self.progress.log({"cor": correlation}, evaluated=True)
        self.progress.keep(start.number, Fitted(start.pair, feature, correlation, start.steps, start.seed))

    def _singly(self, side: list[Signed]) -> Iterator[dict[str, Tensor]]:
        """Gradients of single rows, as `encode` takes them, of as many batches as possible."""
        most = max(len(batch) for batch, _ in side)
        rows = ((batch, row) for row in range(most) for batch, _ in side if row < len(batch))
        return (
            self.reader.gradient(batch.some_rows([row]), self.source) for batch, row in itertools.islice(rows, ENOUGH)
        )

    def _add_up(self, estimator: ClosedFormEstimator) -> None:
        """Make it the sum over all processes."""
        if self.processes.count > 1:
            estimator.pool(lambda own: self.processes.gathered([own]), self.processes.add_one)

    # ---- trained ----------------------------------------------------------------------------------------------------

    def _trained(self, start: Start, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        args = self.args
        neuron = FeatureNeuron(
            self.shapes, activation=args.activation, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon, weight_decay=args.weight_decay, seed=start.seed, device=self.device,
        )  # fmt: skip
        if state:
            neuron.load_state_dict(state)
        best = _Best(**facts.get("best") or {})
        self.losses.clear()
        self.recent.clear()
        for step in range(facts["step"], start.steps):
            self._step(neuron, *self._batch_at(start, step))
            self.progress.step()
            control, done = self.progress.control, step + 1
            if control.should_log:
                self.progress.log({"loss": sum(self.losses) / len(self.losses), "cor": self._recent_correlation()})
            if done == start.steps or control.should_evaluate:
                self._consider(start, neuron, best, done)
            if control.should_save and done < start.steps:
                self._save(start, done, neuron.state_dict(), best=asdict(best))
            if args.patience is not None and best.since >= args.patience:
                break

    def _batch_at(self, start: Start, step: int) -> tuple[PairBatch | None, int]:
        """This process's rows of a step's batch, and its sign; the order depends on seed and epoch only."""
        epoch, within = divmod(step, start.per_epoch)
        if self._epoch[0] != (start.number, epoch):
            seed = start.seed * APART + epoch
            batches = list(itertools.chain(*self._sides(start.pair, seed, self.processes.count)))
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
            self._epoch = (start.number, epoch), [batches[i] for i in order]
        batch, sign = self._epoch[1][within]
        if self.processes.count == 1:
            return batch, sign
        mine = self.processes.mine(range(len(batch)))
        return (batch.some_rows(mine) if mine else None), sign

    def _step(self, neuron: FeatureNeuron, batch: PairBatch | None, sign: int) -> None:
        wanted = tuple(dict.fromkeys((self.source, "difference")))
        if batch is not None:
            gradients, rows = self.reader.gradients(batch, wanted=wanted), len(batch)
        else:
            parameters = self.reader.parameters.items()
            gradients, rows = {kind: {name: torch.zeros_like(p) for name, p in parameters} for kind in wanted}, 0
        if self.processes.count > 1:
            self._average(gradients, rows)
        result = neuron.step(gradients[self.source], gradients["difference"])
        self.losses.append(result.loss)
        self.recent.append((result.encoded, sign))

    def _average(self, gradients: dict[str, dict[str, Tensor]], rows: int) -> None:
        """The mean over the rows of all processes, in place: as if they had been one batch."""
        total = sum(self.processes.gathered([rows]))
        for blocks in gradients.values():
            for block in blocks.values():
                block.mul_(rows / total)
            self.processes.add(blocks)

    def _consider(self, start: Start, neuron: FeatureNeuron, best: _Best, step: int) -> None:
        """Measure the correlation and keep the neuron if it is the best so far."""
        correlation = self._correlation(start.pair, neuron.encode)
        self.progress.log({"cor": correlation, "eval_cor": correlation}, evaluated=True)
        # A correlation that is not defined is no better than none, but something must be kept.
        size = 0.0 if math.isnan(correlation) else abs(correlation)
        if size <= best.size:
            best.since += 1
            return
        best.size, best.step, best.since = size, step, 0
        if correlation < 0:  # class 0 is +1
            neuron.flip()
        self.progress.keep(start.number, Fitted(start.pair, neuron.feature(), abs(correlation), step, start.seed))

    # ---- both -------------------------------------------------------------------------------------------------------

    def _correlation(self, pair: Pair, encode: Encode) -> float:
        if self.evaluation is None:
            return self._recent_correlation()
        values = encode_all(self.reader, self.source, encode, self.evaluation.signed(1, pair), pair, self.processes)
        return values.metrics()["cor"]

    def _recent_correlation(self) -> float:
        if not self.recent:
            return math.nan
        values, signs = zip(*self.recent, strict=True)
        return encoded(values, signs, ("", "")).metrics()["cor"]

    def _save(self, start: Start, step: int, state: dict[str, Tensor], **more: Any) -> None:
        self.progress.save(state, {"start": start.number, "step": step, "identity": self.identity, **more})

    def _best(self, starts: Iterable[Start]) -> Fitted:
        found = [self.progress.kept(start.number, start.pair) for start in starts]
        best = max(found, key=lambda fitted: -1.0 if math.isnan(fitted.correlation) else abs(fitted.correlation))
        if self.args.estimator == "trained" and not abs(best.correlation) >= self.args.convergence:
            warnings.warn(
                f"None of {len(found)} starts for {'/'.join(best.pair)} converged: the best correlation is "
                f"{best.correlation:.2f}, below convergence={self.args.convergence}. Try other learning_rates, more "
                "steps or seeds, or estimator='closed_form'.",
                stacklevel=2,
            )
        return best


def _digest(dataset: Dataset) -> str:
    """What identifies the rows of pairs."""
    names = [name for name in ("text", "factual", "counterfactual", "label") if name in dataset.column_names]
    found = hashlib.sha256()
    for row in dataset.select_columns(names):
        found.update(repr(sorted(row.items())).encode())
    return found.hexdigest()
