"""Estimate feature neurons: one pass for the closed form, AdamW from one seed or several for the trained one.

A feature of k classes has k (k − 1) / 2 pairs, each with a neuron of its own. One run of an estimator for one pair is
a *start*; the starts of all pairs and seeds follow one another.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_erasure.gradiend import ClosedFormEstimator, Feature, FeatureNeuron
from hf_erasure.models.slots import PairBatch, some_rows

from ..processes import Processes
from .arguments import GradiendTrainingArguments
from .checkpoints import KeptFeatures, Progress
from .encoding import ENOUGH, EncodedValues, centred, encoded
from .gradients import GradientReader

Pair = tuple[str, str]
Encode = Callable[[Mapping[str, Tensor]], float]
# Correlation and loss of training steps are those of so many latest ones.
WINDOW = 100


class Batches(Protocol):
    """The training data."""

    def __call__(self, pair: Pair, seed: int | None, times: int = 1) -> tuple[list[PairBatch], list[PairBatch]]:
        """The batches of a pair's class 0 and of its class 1, so many times the size of one device's batch.

        They are shuffled where there is a seed.
        """


@dataclass(frozen=True)
class Start:
    """One run of an estimator for one pair."""

    number: int
    pair: Pair
    seed: int
    per_epoch: int
    steps: int


@dataclass(frozen=True)
class Fitted:
    """A pair's feature: class 0 encodes to +1.

    Attributes:
        pair: Its classes.
        feature: Dense encoder and decoder.
        correlation: On the evaluation data; on training steps where there was none; NaN where nothing was measured.
        steps: After how many steps of its start.
        seed: Of its start.
    """

    pair: Pair
    feature: Feature
    correlation: float
    steps: int
    seed: int


class Training:
    """Runs all starts.

    Args:
        reader: Gives gradients of the base model.
        source: What the encoder reads: `"factual"`, `"counterfactual"` or `"difference"`.
        args: Estimator, steps and intervals.
        progress: Told of every step.
        batches: The training data.
        evaluate: Encodes the evaluation data of a pair with a function; `None` without evaluation data.
        processes: Those that share the work.
        kept: Where the best features go.
        data: What identifies the training data, for checkpoints.
    """

    def __init__(
        self,
        reader: GradientReader,
        source: str,
        args: GradiendTrainingArguments,
        progress: Progress,
        batches: Batches,
        evaluate: Callable[[Pair, Encode], EncodedValues] | None,
        processes: Processes,
        kept: KeptFeatures,
        data: str,
    ) -> None:
        self.reader, self.source, self.args, self.progress = reader, source, args, progress
        self.batches, self.evaluate, self.processes, self.kept = batches, evaluate, processes, kept
        self.data = data
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._epoch_key: tuple[int, int] | None = None
        self._epoch: list[tuple[PairBatch, int]] = []

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The blocks of a gradient."""
        return {name: parameter.shape for name, parameter in self.reader.parameters.items()}

    @property
    def device(self) -> torch.device:
        """Where estimators live: with the first of the weights."""
        return next(iter(self.reader.parameters.values())).device

    def run(self, pairs: Sequence[Pair], resume_from: str | bool | None) -> list[Fitted]:
        """Estimate every pair's feature; the best start of each is kept."""
        closed = self.args.estimator == "closed_form"
        seeds = [self.args.seed + i for i in range(1 if closed else self.args.seeds)]
        starts = [self._start(*numbered) for numbered in enumerate(itertools.product(pairs, seeds))]
        state, facts = self._resumed(resume_from)
        self.progress.begin(sum(start.steps for start in starts), at=self.progress.state.global_step)
        for start in starts[facts["start"] :]:
            now = start.number == facts["start"]
            run = self._closed_form if closed else self._trained
            run(start, state if now else {}, facts if now else {"step": 0})
        self.progress.end()
        return [self._best([start for start in starts if start.pair == pair]) for pair in pairs]

    def _resumed(self, resume_from: str | bool | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """State and facts to go on from; what an earlier training left behind is not mistaken for this one's."""
        resumed = self.progress.resume(resume_from)
        if resumed is None:
            if self.processes.is_main:
                self.kept.clear()
            self.processes.wait()
            return {}, {"start": 0, "step": 0}
        folder, state, facts = resumed
        mine = self._identity()
        for name, value in facts["identity"].items():
            if mine.get(name) != value:
                raise ValueError(
                    f"The checkpoint {str(folder)!r} is of another training: its {name} is {value!r}, here it is "
                    f"{mine.get(name)!r}. Resume with the same, or train anew in another output_dir."
                )
        if self.processes.is_main:
            self.kept.take_from(folder)
        self.processes.wait()
        return state, facts

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on from."""
        blocks = hashlib.sha256(repr([(name, list(shape)) for name, shape in self.shapes.items()]).encode())
        args = self.args
        same: dict[str, Any] = {
            "estimator": args.estimator,
            "source": self.source,
            "targeted weights": blocks.hexdigest(),
            "train_dataset": self.data,
            "per_device_train_batch_size": args.per_device_train_batch_size,
        }
        if args.estimator == "trained":
            names = ("seed", "seeds", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
            same |= {name: getattr(args, name) for name in (*names, "max_steps", "num_train_epochs", "activation")}
        return same

    def _start(self, number: int, pair_and_seed: tuple[Pair, int]) -> Start:
        pair, seed = pair_and_seed
        if self.args.estimator == "closed_form":
            a_pass = len(self.processes.in_step(self.batches(pair, None)))
            return Start(number, pair, seed, a_pass, a_pass)
        a_pass = sum(len(group) for group in self.batches(pair, None, self.processes.count))
        steps = self.args.max_steps if self.args.max_steps > 0 else math.ceil(a_pass * self.args.num_train_epochs)
        return Start(number, pair, seed, a_pass, steps)

    # ---- closed form ------------------------------------------------------------------------------------------------

    def _closed_form(self, start: Start, state: dict[str, Any], facts: dict[str, Any]) -> None:
        estimator = ClosedFormEstimator(self.shapes, device=self.device)
        # What was accumulated before adds up over processes: the main one goes on with it, the others start anew.
        if state and self.processes.is_main:
            estimator.load_state_dict(state)
        positive, negative = self.batches(start.pair, None)
        signs = {id(batch): sign for group, sign in ((positive, 1), (negative, -1)) for batch in group}
        for step, row in enumerate(self.processes.in_step((positive, negative))):
            if step < facts["step"]:
                continue
            batch = self.processes.take(row)
            if batch is not None:
                sign = signs[id(batch)]
                self.reader.accumulate(batch, self.source, estimator, sign, low_memory=self.args.low_memory)
            self.progress.step()
            if self.progress.control.should_save and step + 1 < start.steps:
                self._add_up(estimator)
                self._save(start, step + 1, estimator.state_dict(), None)
                if not self.processes.is_main:
                    estimator = ClosedFormEstimator(self.shapes, device=self.device)  # the main one has it all
        self._add_up(estimator)
        feature = estimator.feature()
        if self.args.per_device_train_batch_size > 1:
            encoder = centred(feature.encoder, self._singly(positive), self._singly(negative))
            feature = replace(feature, encoder=encoder)
        correlation = self._correlation(start.pair, feature.encoder.encode)
        self.progress.evaluated({"cor": correlation})
        self._finish(start, feature, correlation, start.steps)

    def _singly(self, batches: list[PairBatch]) -> Iterator[Callable[[], dict[str, Tensor]]]:
        """Gradients of single rows, as `encode` takes them, of as many batches as possible."""
        most = max(len(batch) for batch in batches)
        rows = ((batch, row) for row in range(most) for batch in batches if row < len(batch))

        def reading(batch: PairBatch, row: int) -> dict[str, Tensor]:
            return self.reader.gradients(some_rows(batch, [row]), wanted=(self.source,))[self.source]

        for batch, row in itertools.islice(rows, ENOUGH):
            yield functools.partial(reading, batch, row)

    def _add_up(self, estimator: ClosedFormEstimator) -> None:
        """Make it the sum over all processes."""
        if self.processes.count > 1:
            estimator.pool(lambda own: self.processes.gathered([own]), self.processes.add_one)

    # ---- trained ----------------------------------------------------------------------------------------------------

    def _trained(self, start: Start, state: dict[str, Any], facts: dict[str, Any]) -> None:
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
                self._save(start, done, neuron.state_dict(), best)
            if args.patience is not None and best.since >= args.patience:
                break

    def _batch_at(self, start: Start, step: int) -> tuple[PairBatch | None, int]:
        """This process's rows of a step's batch, and its sign; the order depends on seed and epoch only."""
        epoch, within = divmod(step, start.per_epoch)
        if self._epoch_key != (start.number, epoch):
            self._epoch_key, self._epoch = (start.number, epoch), self._order(start, epoch)
        batch, sign = self._epoch[within]
        if self.processes.count == 1:
            return batch, sign
        mine = self.processes.mine(range(len(batch)))
        return (some_rows(batch, mine) if mine else None), sign

    def _order(self, start: Start, epoch: int) -> list[tuple[PairBatch, int]]:
        # A prime far above any number of epochs keeps the orders of two seeds apart.
        seed = start.seed * 1_000_003 + epoch
        groups = self.batches(start.pair, seed, self.processes.count)
        batches = [(batch, sign) for group, sign in zip(groups, (1, -1), strict=True) for batch in group]
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
        return [batches[i] for i in order]

    def _step(self, neuron: FeatureNeuron, batch: PairBatch | None, sign: int) -> None:
        wanted = tuple(dict.fromkeys((self.source, "difference")))
        if batch is not None:
            gradients, rows = self.reader.gradients(batch, wanted=wanted), len(batch)
        else:
            gradients = {
                key: {name: torch.zeros_like(p) for name, p in self.reader.parameters.items()} for key in wanted
            }
            rows = 0
        if self.processes.count > 1:
            self._average(gradients, rows)
        result = neuron.step(gradients[self.source], gradients["difference"])
        self.losses.append(result.loss)
        self.recent.append((result.encoded, sign))

    def _average(self, gradients: dict[str, dict[str, Tensor]], rows: int) -> None:
        """The mean over the rows of all processes, in place: as if they had been one batch."""
        total = self.processes.total(rows)
        for blocks in gradients.values():
            for block in blocks.values():
                block.mul_(rows / total)
            self.processes.add(blocks)

    def _consider(self, start: Start, neuron: FeatureNeuron, best: _Best, step: int) -> None:
        """Measure the correlation and keep the neuron if it is the best so far."""
        correlation = self._correlation(start.pair, neuron.encode)
        self.progress.evaluated({"cor": correlation, "eval_cor": correlation})
        # A correlation that is not defined is no better than none, but something must be kept.
        size = 0.0 if math.isnan(correlation) else abs(correlation)
        if size <= best.size:
            best.since += 1
            return
        best.size, best.step, best.since = size, step, 0
        if correlation < 0:  # class 0 is +1
            neuron.flip()
        if self.processes.is_main or self.kept.folder is None:
            self._keep(start, neuron.feature(), size if not math.isnan(correlation) else math.nan, step)

    # ---- what is kept -----------------------------------------------------------------------------------------------

    def _correlation(self, pair: Pair, encode: Encode) -> float:
        if self.evaluate is None:
            return self._recent_correlation()
        return self.evaluate(pair, encode).metrics()["cor"]

    def _recent_correlation(self) -> float:
        if not self.recent:
            return math.nan
        values, signs = zip(*self.recent, strict=True)
        return encoded(values, signs, ("", "")).metrics()["cor"]

    def _save(self, start: Start, step: int, state: dict[str, Any], best: _Best | None) -> None:
        facts = {"start": start.number, "step": step, "identity": self._identity()}
        if self.processes.is_main:
            self.progress.save(state, facts | ({"best": vars(best)} if best is not None else {}), self.kept)
        self.processes.wait()

    def _finish(self, start: Start, feature: Feature, correlation: float, step: int) -> None:
        if self.processes.is_main or self.kept.folder is None:
            self._keep(start, feature, correlation, step)
        self.processes.wait()

    def _keep(self, start: Start, feature: Feature, correlation: float, step: int) -> None:
        facts = {"correlation": None if math.isnan(correlation) else correlation, "steps": step, "seed": start.seed}
        self.kept.keep(start.number, feature, facts)

    def _best(self, starts: Iterable[Start]) -> Fitted:
        self.processes.wait()
        found = []
        for start in starts:
            feature, facts = self.kept.get(start.number)
            correlation = math.nan if facts["correlation"] is None else facts["correlation"]
            found.append(Fitted(start.pair, feature, correlation, facts["steps"], facts["seed"]))
        best = max(found, key=lambda fitted: -1.0 if math.isnan(fitted.correlation) else abs(fitted.correlation))
        if self.args.estimator == "trained" and not abs(best.correlation) >= self.args.convergence:
            warnings.warn(
                f"None of {len(found)} starts for {'/'.join(best.pair)} converged: the best correlation is "
                f"{best.correlation:.2f}, below convergence={self.args.convergence}. Try other learning_rates, more "
                "steps or seeds, or estimator='closed_form'.",
                stacklevel=2,
            )
        return best


@dataclass
class _Best:
    """The best evaluation of a start so far, and how many came since."""

    size: float = -1.0
    step: int = 0
    since: int = 0
