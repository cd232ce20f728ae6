"""Estimate feature neurons: one pass for the closed form, or AdamW from one or several seeds for the trained estimator.

A feature of k classes has k (k − 1) / 2 pairs, each with its own neuron. One run of an estimator for one pair is a
*start*; the starts of all pairs and seeds run one after the other.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_erasure.gradiend import ClosedFormEstimator, Feature, FeatureEncoder, FeatureNeuron
from hf_erasure.gradiend.features import ACTIVATIONS
from hf_erasure.models.slots import PairBatch

from ..processes import Processes, share_the_cpu
from .checkpoints import PairFit, Progress
from .gradients import Encode, GradientReader, encode_all, pearson
from .pairs import Pair, PairSet, Signed
from .sentences import PAIR_COLUMNS

ESTIMATORS = ("closed_form", "trained")
# Correlation and loss during training are those of this many latest steps.
WINDOW = 100
# About how many values of each weight tell a model from another one when training is resumed.
SAMPLES = 64
# The seed of an epoch's order is seed · SEED_STRIDE + epoch. A prime above any number of epochs keeps two seeds apart.
SEED_STRIDE = 1_000_003
# How many pairs of each class are read again to calibrate an encoder: enough for two means.
PAIRS_READ = 24


@dataclass
class GradiendTrainingArguments(TrainingArguments):
    """`TrainingArguments` with additional fields for the feature neuron.

    These fields of `TrainingArguments` are used: the output folder, the batch sizes, the learning rate, weight decay
    and betas of AdamW, the number of epochs or steps, those between logs, evaluations and checkpoints, the number of
    checkpoints kept, the seed and the progress bar. The loss of the language model is never minimised, so schedulers,
    the precision of training and similar fields have no effect here.

    Args:
        estimator: `"closed_form"` takes one pass over the pairs and has nothing to tune; `"trained"` is the paper's
            encoder-decoder, trained by AdamW.
        activation: The activation of the trained feature neuron: `"tanh"` (the paper's) or `"identity"`.
        seeds: How many seeds the trained estimator is started from: `seed`, `seed + 1`, …. The start with the best
            correlation is kept.
        convergence: A start has converged when the absolute correlation on the evaluation data reaches this value. If
            no start converges, a warning is given.
        mask_draws: When the language modelling of a masked or an encoder-decoder model is scored, how often it reads
            each neutral text, each time with other tokens masked. More draws make the cost of an edit less noisy.
        low_memory: Do not hold a whole gradient in the closed form. Four vectors of the size of the targeted weights
            are held instead of five, and each batch takes one more backward pass.
    """

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Pairs of one class in one gradient."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the trained estimator."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two logs of loss and correlation."})
    eval_strategy: str = field(default="steps", metadata={"help": "As in TrainingArguments."})
    eval_steps: float | None = field(default=100, metadata={"help": "Steps between two evaluations."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "As in TrainingArguments."})
    estimator: str = field(default="closed_form", metadata={"help": "'closed_form' or 'trained'."})
    activation: str = field(default="tanh", metadata={"help": "'tanh' or 'identity', of the trained estimator."})
    seeds: int = field(default=1, metadata={"help": "Seeds that the trained estimator starts from."})
    convergence: float = field(default=0.5, metadata={"help": "Correlation at which a start has converged."})
    low_memory: bool = field(default=False, metadata={"help": "Hold no whole gradient; run one more backward pass."})
    mask_draws: int = field(default=1, metadata={"help": "Draws of masked tokens in a neutral text."})

    def __post_init__(self) -> None:
        if share_the_cpu():
            self.use_cpu = True  # otherwise accelerate would not connect the processes
        super().__post_init__()
        for name, choices in (("estimator", ESTIMATORS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                known = ", ".join(map(repr, choices))
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {known}.")
        for name, what in (("seeds", "start"), ("mask_draws", "draw")):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least one {what} is needed.")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs}: give a number above 0, or max_steps.")
        if not 0 <= self.convergence <= 1:
            raise ValueError(f"convergence={self.convergence} is a correlation: give a number between 0 and 1.")


@dataclass(frozen=True)
class Start:
    """One run of an estimator for one pair."""

    number: int
    pair: Pair
    seed: int
    per_epoch: int
    steps: int


@dataclass
class Training:
    """Runs all starts; without evaluation data, correlations are those of the latest training steps."""

    reader: GradientReader
    source: str
    args: GradiendTrainingArguments
    train: PairSet
    evaluation: PairSet | None
    processes: Processes
    progress: Progress
    # The losses of the latest steps; and the encoded values and signs of these steps.
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    recent_values: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    results: list[dict[str, Any]] = field(default_factory=list)  # Pair, seed and correlation of each start.

    def run(self, pairs: Sequence[Pair], resume_from: str | bool | None) -> list[PairFit]:
        """Estimate every pair's feature; the best start of each is kept."""
        args, closed = self.args, self.args.estimator == "closed_form"
        seeds = [args.seed + i for i in range(1 if closed else args.seeds)]
        starts = []
        for number, (pair, seed) in enumerate(itertools.product(pairs, seeds)):
            if self.evaluation is not None:
                self.evaluation.groups(pair)  # raises an error where it has no rows of the pair
            if closed:
                steps = a_pass = len(self.processes.step_rows(self._by_class(pair, args.per_device_train_batch_size)))
            else:
                a_pass = sum(map(len, self._by_class(pair, args.per_device_train_batch_size * self.processes.count)))
                steps = args.max_steps if args.max_steps > 0 else math.ceil(a_pass * args.num_train_epochs)
            starts.append(Start(number, pair, seed, a_pass, steps))
        state, facts = self.progress.resume(resume_from, self._identity(), [start.pair for start in starts])
        run = self._run_closed_form if closed else self._run_trained
        with self.progress.running(sum(start.steps for start in starts)):
            for start in starts[facts["start"] :]:
                correlation = abs(run(start, state, facts))
                self.results.append({"pair": "/".join(start.pair), "seed": start.seed, "correlation": correlation})
                state, facts = {}, {"step": 0}
        self.processes.wait()
        found = [self.progress.best[pair][1] for pair in pairs]
        for best in found:
            if not closed and not abs(best.correlation) >= args.convergence:
                warnings.warn(
                    f"None of {len(seeds)} starts for {'/'.join(best.pair)} converged: the best correlation is "
                    f"{best.correlation:.2f}, below convergence={args.convergence}. Try other learning_rates, more "
                    "steps or seeds, or estimator='closed_form'.",
                    stacklevel=2,
                )
        return found

    def _identity(self) -> dict[str, Any]:
        """The facts that must be the same when training is resumed from a checkpoint."""
        args, dataset = self.args, self.train.dataset
        blocks = [(name, list(parameter.shape)) for name, parameter in self.reader.parameters.items()]
        flat = [parameter.detach().flatten() for parameter in self.reader.parameters.values()]
        values = [weight[:: max(1, weight.numel() // SAMPLES)].tolist() for weight in flat]
        # The counterfactual class of a row is given by its label if there are two classes.
        columns = PAIR_COLUMNS if len(self.train.classes) > 2 else PAIR_COLUMNS[:4]
        rows = hashlib.sha256()
        for row in dataset.select_columns(list(columns)):
            rows.update(repr(sorted(row.items())).encode())
        identity: dict[str, Any] = {
            "estimator": args.estimator,
            "source": self.source,
            "targeted weights": hashlib.sha256(repr(blocks).encode()).hexdigest(),
            "values of the targeted weights": hashlib.sha256(repr(values).encode()).hexdigest(),
            "train_dataset": rows.hexdigest(),
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "number of processes": self.processes.count,
        }
        if args.estimator == "trained":
            names = ("seed", "seeds", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
            identity |= {name: getattr(args, name) for name in (*names, "max_steps", "num_train_epochs", "activation")}
        return identity

    def _by_class(self, pair: Pair, size: int, seed: int | None = None) -> list[list[Signed]]:
        """The batches of a pair's class 0 and of its class 1."""
        signed = self.train.signed(size, pair, seed)
        return [[entry for entry in signed if entry[1] == sign] for sign in (1, -1)]

    # ---- closed form ------------------------------------------------------------------------------------------------

    def _run_closed_form(self, start: Start, state: dict[str, Tensor], facts: dict[str, Any]) -> float:
        estimator = ClosedFormEstimator(self.reader.shapes, device=self.reader.weights_device)
        # A saved state is the sum over all processes: the main process continues with it, the others start from zero.
        if state and self.processes.is_main:
            estimator.load_state_dict(state)
        size = self.args.per_device_train_batch_size
        for step, row in enumerate(self.processes.step_rows(self._by_class(start.pair, size))):
            if step < facts["step"]:
                continue
            for batch, sign in row[self.processes.rank :][:1]:  # the last row of a class may not have one for all
                self.reader.accumulate(batch, self.source, estimator, sign, low_memory=self.args.low_memory)
            self.progress.step((step + 1) / start.per_epoch)
            is_last = step + 1 == start.steps
            is_saved = self.progress.control.should_save and not is_last
            if (is_last or is_saved) and self.processes.count > 1:
                estimator.pool(self.processes.gathered([estimator.counts]), self.processes.add)
            if is_saved:
                self.progress.save(estimator.state_dict(), {"start": start.number, "step": step + 1})
                if not self.processes.is_main:  # the main process now holds the sum of all
                    estimator = ClosedFormEstimator(self.reader.shapes, device=self.reader.weights_device)
        feature = estimator.feature()
        if size > 1:  # `encode` reads single rows: one of each batch, then the next of each
            single = self._by_class(start.pair, 1)
            rows = [[entry for first in range(size) for entry in side[first::size]] for side in single]
            (high,), (low,) = self._class_means([feature.encoder], rows)
            if high > low:  # a positive scale cannot correct classes with the wrong sign
                feature = replace(feature, encoder=feature.encoder.centred(high, low))
        correlation = self._correlation(start.pair, feature.encoder.encode)
        self.progress.log({"cor": correlation}, evaluated=True)
        self.progress.keep(start.number, PairFit(start.pair, feature, correlation, start.steps, start.seed))
        return correlation

    def _class_means(self, encoders: Sequence[FeatureEncoder], sides: list[list[Signed]]) -> list[list[float]]:
        """Each encoder's mean `⟨w, g⟩ + bias` over the gradients of some batches of each class."""
        linear = [replace(encoder, scale=1.0, activation="identity") for encoder in encoders]
        means = []
        for side in sides:
            gradients = (self.reader.gradient(batch, self.source) for batch, _ in side[:PAIRS_READ])
            rows = [[encoder.encode(gradient) for encoder in linear] for gradient in gradients]
            means.append([sum(column) / len(rows) for column in zip(*rows, strict=True)])
        return means

    # ---- trained ----------------------------------------------------------------------------------------------------

    def _run_trained(self, start: Start, state: dict[str, Tensor], facts: dict[str, Any]) -> float:
        args = self.args
        neuron = FeatureNeuron(
            self.reader.shapes, activation=args.activation, lr=args.learning_rate, eps=args.adam_epsilon,
            betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.weight_decay, seed=start.seed,
            device=self.reader.weights_device,
        )  # fmt: skip
        if state:
            neuron.load_state_dict(state)
        else:
            self.progress.begin()
        best = facts.get("best") or {"size": -1.0}  # the best absolute correlation of this start so far
        self.losses = deque(facts.get("losses", ()), maxlen=WINDOW)
        self.recent_values = deque(facts.get("recent", ()), maxlen=WINDOW)
        size, batches = args.per_device_train_batch_size * self.processes.count, list[Signed]()
        for step in range(facts["step"], start.steps):
            epoch, within = divmod(step, start.per_epoch)
            if within == 0 or not batches:  # the order of batches depends on seed and epoch
                seed = start.seed * SEED_STRIDE + epoch
                ordered = list(itertools.chain(*self._by_class(start.pair, size, seed)))
                order = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(seed)).tolist()
                batches = [ordered[i] for i in order]
            self._step(neuron, *batches[within])
            done = step + 1
            self.progress.step(done / start.per_epoch)
            if self.progress.control.should_log:
                self.progress.log({"loss": sum(self.losses) / len(self.losses), "cor": self._recent_correlation()})
            is_last = done == start.steps or self.progress.control.should_training_stop
            if is_last or self.progress.control.should_evaluate:
                self._evaluate(start, neuron, best, done)
            if is_last or self.progress.control.should_training_stop:  # a callback may have stopped it just now
                break
            if self.progress.control.should_save:
                latest = {"losses": list(self.losses), "recent": list(self.recent_values)}
                self.progress.save(neuron.state_dict(), {"start": start.number, "step": done, "best": best, **latest})
        return float(best["size"])

    def _step(self, neuron: FeatureNeuron, batch: PairBatch, sign: int) -> None:
        """Update the neuron by one batch, of which every process reads its own rows."""
        mine, wanted = range(self.processes.rank, len(batch), self.processes.count), (self.source, "difference")
        if mine:
            own = batch if self.processes.count == 1 else batch.some_rows(mine)
            gradients = self.reader.gradients(own, wanted=wanted)
        else:
            parameters = self.reader.parameters.items()
            gradients = {kind: {name: torch.zeros_like(p) for name, p in parameters} for kind in wanted}
        if self.processes.count > 1:  # the mean over the rows of all processes, as if they were one batch
            for blocks in gradients.values():
                for block in blocks.values():
                    self.processes.add(block.mul_(len(mine) / len(batch)))
        result = neuron.step(gradients[self.source], gradients["difference"])
        self.losses.append(result.loss)
        self.recent_values.append((result.encoded, sign))

    def _evaluate(self, start: Start, neuron: FeatureNeuron, best: dict[str, Any], step: int) -> None:
        """Measure the correlation and keep the neuron if it is the best so far."""
        correlation = self._correlation(start.pair, neuron.encoder().encode)
        self.progress.log({"cor": correlation, "eval_cor": correlation}, evaluated=True)
        # An undefined correlation counts as 0. It is still above the initial -1, so that a first neuron is kept.
        size = 0.0 if math.isnan(correlation) else abs(correlation)
        if size <= best["size"]:
            return
        best["size"] = size
        if correlation < 0:  # class 0 must encode to +1
            neuron.flip()
            self.recent_values = deque(((-value, sign) for value, sign in self.recent_values), maxlen=WINDOW)
        self.progress.keep(start.number, PairFit(start.pair, neuron.feature(), abs(correlation), step, start.seed))

    # ---- both -------------------------------------------------------------------------------------------------------

    def _correlation(self, pair: Pair, encode: Encode) -> float:
        if self.evaluation is None:
            return self._recent_correlation()
        values = encode_all(self.reader, self.source, encode, self.evaluation.signed(1, pair), pair, self.processes)
        return values.metrics()["cor"]

    def _recent_correlation(self) -> float:
        if not self.recent_values:
            return math.nan
        values, signs = zip(*self.recent_values, strict=True)
        return pearson(torch.tensor(values, dtype=torch.float64), torch.tensor(signs))

    def calibrated(self, fitted: PairFit, density: float) -> Feature:
        """The feature of a start with an encoder of this density, whose class means are those of the dense encoder."""
        encoder = fitted.feature.encoder
        sparse = encoder.prune(density)
        if sparse is encoder:
            return fitted.feature
        sides = self._by_class(fitted.pair, 1, self.args.seed)
        (dense_up, sparse_up), (dense_down, sparse_down) = self._class_means([encoder, sparse], sides)
        factor = (dense_up - dense_down) / (sparse_up - sparse_down) if sparse_up != sparse_down else math.inf
        if not math.isfinite(factor) or factor == 0:
            raise ValueError(
                f"What density={density} leaves of the encoder does not tell the classes apart: give GradiendConfig a "
                "larger density, or keep_encoder=False."
            )
        # scale · (factor · (x − mean of the sparse) + mean of the dense), written as scale' · (⟨w, g⟩ + bias').
        offset = dense_up / factor - sparse_up
        sparse = replace(sparse, scale=encoder.scale * factor, bias=sparse.bias + offset)
        return replace(fitted.feature, encoder=sparse)
