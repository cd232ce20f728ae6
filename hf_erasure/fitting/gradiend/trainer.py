"""`GradiendTrainer`: it learns a feature neuron from pairs, fills the adapter with it, and selects an edit."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import TrainOutput

from hf_erasure._version import __version__
from hf_erasure.adapters import GradiendConfig, kept_share, set_features, stated_bytes, steer
from hf_erasure.adapters.common.acting import warn_of_inactive
from hf_erasure.adapters.common.config import ACTIVE, CARD_FACTS, RECIPE
from hf_erasure.adapters.common.lookup import adapter_of, only_adapter
from hf_erasure.adapters.gradiend.model import LEAST_KEPT
from hf_erasure.adapters.loading.fingerprint import other_acting_adapters
from hf_erasure.fitting.report import rows_in_words
from hf_erasure.models.heads import check_next_word, task_of
from hf_erasure.models.model import bare_model, datasets, pandas
from hf_erasure.models.neutral import LanguageModelling, neutral_batches
from hf_erasure.models.slots import SlotReader

from ..processes import Processes
from .adapter import GradiendAdapter
from .checkpoints import PairFit, Progress
from .gradients import Encode, EncodedValues, encode_all, joint_metrics, reading_the_base
from .pairs import Pair, PairSet
from .selection import (
    FEATURE_FACTORS,
    LEARNING_RATES,
    Scorer,
    Selection,
    all_words,
    check_search,
    choose,
    class_probabilities,
    goal_by_name,
    scan,
)
from .training import GradiendTrainingArguments, Training

_LOGGER = logging.getLogger(__name__)


class GradiendTrainer:
    """Learns a feature neuron from gradients of a model and puts it into the model's GRADIEND adapter.

    The weights of the model are not trained: gradients are only read, while the adapter has no effect. Afterwards the
    adapter has no effect until `select` or `GradiendAdapter.steer` sets an edit.

    Args:
        model: A model with a GRADIEND adapter (`model.add_adapter(GradiendConfig(…))`), or a module that contains it.
        args: `GradiendTrainingArguments`.
        train_dataset: Pairs: `text` with one `[FEATURE]` slot, `factual`, `counterfactual`, `label`.
        eval_dataset: Pairs that are not trained on, or a dictionary of several such sets by name.
        neutral_dataset: `text` without the feature, for label 0 in `evaluate` and language modelling in `select`.
        processing_class: The tokenizer.
        callbacks: Callbacks as transformers' `TrainerCallback`.
        tokenizer: Another name of `processing_class`.
        adapter_name: The name of the adapter; may be left out if the model has one GRADIEND adapter.

    Raises:
        ValueError: If the adapter is missing, or the data cannot be used: the message names the row and the remedy.
    """

    def __init__(
        self,
        model: nn.Module,
        args: GradiendTrainingArguments | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        neutral_dataset: datasets.Dataset | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        tokenizer: Any = None,
        adapter_name: str | None = None,
    ) -> None:
        self.model = model
        self.args = args or GradiendTrainingArguments()
        self.adapter_name = adapter_name or only_adapter(model, GradiendConfig)
        GradiendAdapter.of(model, self.adapter_name)  # raises an error if the adapter is missing
        if processing_class is not None and tokenizer is not None:
            raise ValueError("processing_class and tokenizer are two names of one argument: give one of them.")
        self.processing_class = processing_class if processing_class is not None else tokenizer
        if self.processing_class is None:
            raise ValueError("GradiendTrainer needs the model's tokenizer: give it as processing_class (or tokenizer).")
        self.train_dataset, self.eval_dataset, self.neutral_dataset = train_dataset, eval_dataset, neutral_dataset
        _require_dataset("train_dataset", train_dataset)
        _require_dataset("neutral_dataset", neutral_dataset)
        self.callbacks = [c() for c in get_reporting_integration_callbacks(self.args.report_to)] + (callbacks or [])
        self.task = task_of(model)
        if self.task == "causal":
            check_next_word(model)
        self.fitted: list[PairFit] = []
        self.starts: list[dict[str, Any]] = []  # Pair, seed and best absolute correlation of each start.
        classes = self.config.classes
        if classes is None:
            if train_dataset is None or "label" not in train_dataset.column_names:
                raise ValueError(
                    "The classes are not known: write GradiendConfig(classes=['female', 'male']), or give a "
                    "train_dataset with a column `label`."
                )
            feature = train_dataset.features["label"]
            is_named = isinstance(feature, datasets.ClassLabel)
            classes = feature.names if is_named else sorted(set(train_dataset["label"]))
            if not all(isinstance(name, str) for name in classes):
                raise ValueError(f"The labels {classes} are not names of classes: write GradiendConfig(classes=[…]).")
        self.classes = list(classes)
        if self.config.pair is not None and tuple(self.config.pair) not in self.pairs:
            known = ", ".join(str(list(pair)) for pair in self.pairs)
            raise ValueError(f"pair={self.config.pair!r} in GradiendConfig: write one of {known}, in this order.")
        self._tokenised: dict[int, PairSet] = {}
        for dataset in [train_dataset, *self._eval_sets().values()]:
            if dataset is not None:
                self._pair_set(dataset)
        self.config.classes = self.classes
        self._processes = Processes()

    @property
    def config(self) -> GradiendConfig:
        """The adapter's configuration."""
        return adapter_of(self.model, self.adapter_name, GradiendConfig).config

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of classes; each has a feature neuron."""
        return list(itertools.combinations(self.classes, 2))

    # ---- training ---------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Estimate the feature neuron of every pair, and fill the adapter.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or `True` for the last one in `output_dir`.

        Returns:
            The number of steps, the mean loss of the latest steps (0 for the closed form, which minimises no loss), and
            `cor` of each pair.

        Raises:
            ValueError: If training data is missing, a gradient is not finite, or the checkpoint is not of this
                training.
        """
        if self.train_dataset is None:
            raise ValueError("GradiendTrainer has no train_dataset to train on: give it a dataset of pairs.")
        warn_of_inactive(self.model, self.adapter_name)
        config, pairs = self.config, self._pair_set(self.train_dataset)
        was_fitted = config.fitted
        evaluation = next(map(self._pair_set, self._eval_sets().values()), None)
        progress = Progress(self.model, self.args, self.callbacks, self.processing_class, self._processes)
        with reading_the_base(self.model, self.adapter_name, self.task) as reader:
            weights, size = reader.parameters.values(), stated_bytes(self.model, self.adapter_name)
            _LOGGER.info(
                f"GRADIEND adapter {self.adapter_name!r}: {config.density:.2%} of "
                f"{sum(p.numel() for p in weights):,} weights, so the adapter will take {size / 2**20:.2f} MiB, "
                f"{size / sum(p.numel() * p.element_size() for p in weights):.2f} times what these weights take."
            )
            training = Training(reader, config.source, self.args, pairs, evaluation, self._processes, progress)
            self.fitted = training.run(self.pairs, resume_from_checkpoint)
            self.starts = training.results
            features = [fitted.feature for fitted in self.fitted]
            if config.keep_encoder:
                features = [training.calibrated(fitted, config.density) for fitted in self.fitted]
            set_features(self.model, self.adapter_name, features, [fitted.pair for fitted in self.fitted])
        for key in ("selection", RECIPE, CARD_FACTS):  # these are about the features that the adapter held before
            config.provenance.pop(key, None)
        config.provenance |= {
            "hf_erasure_version": __version__,
            ACTIVE: other_acting_adapters(self.model, self.adapter_name),
            "estimator": self.args.estimator,
            "task": self.task,
            "examples": len(pairs),
            "data": dict(pairs.origin),
            # Without evaluation data the correlation may be NaN, which is not JSON.
            "correlation": {"/".join(f.pair): f.correlation for f in self.fitted if not math.isnan(f.correlation)},
        }
        if was_fitted:  # the strength was chosen for the features that the adapter held before
            steer(self.model, self.adapter_name, learning_rate=0.0)
        metrics = {f"cor_{a}_{b}": fitted.correlation for fitted in self.fitted for a, b in [fitted.pair]}
        losses = training.losses
        return TrainOutput(progress.state.global_step, sum(losses) / len(losses) if losses else 0.0, metrics)

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def evaluate(
        self,
        eval_dataset: datasets.Dataset | dict[str, datasets.Dataset] | None = None,
        neutral_dataset: datasets.Dataset | None = None,
    ) -> dict[str, float]:
        """Measure how well the feature neuron reads pairs that it was not trained on.

        With `keep_encoder=True` this is the neuron as the adapter keeps it, at its density. Otherwise it is the dense
        neuron, which only this trainer keeps, and which is not written to a file.

        Args:
            eval_dataset: Replaces the `eval_dataset` of the trainer; each of several sets by name is measured.
            neutral_dataset: Replaces the `neutral_dataset` of the trainer.

        Returns:
            `cor` and `acc`, and with neutral texts `cor_enc` and `acc_enc`; each also under `eval_cor` and so on. For
            several pairs of classes these are means, and `cor_a_b` is that of the pair (a, b). For several sets there
            are only keys such as `eval_set_cor`.

        Raises:
            ValueError: If an `eval_dataset` is missing, or the adapter is not fitted.
        """
        sets = self._eval_sets(eval_dataset)
        if not sets:
            raise ValueError("GradiendTrainer has no eval_dataset: give one to evaluate(), of pairs not trained on.")
        results: dict[str, float] = {}
        for name, dataset in sets.items():
            figures = joint_metrics(self.encode(dataset, neutral_dataset))
            self._measured_on(dataset)
            prefix = f"eval_{name}" if name else "eval"
            results |= {f"{prefix}_{key}": value for key, value in figures.items()}
            if len(sets) == 1:
                results |= figures
        return results

    @torch.inference_mode(False)
    def encode(
        self, dataset: datasets.Dataset | None = None, neutral_dataset: datasets.Dataset | None = None
    ) -> list[EncodedValues]:
        """The feature neuron's values for all pairs and neutral texts: one `EncodedValues` for each pair of classes."""
        neutral = self.neutral_dataset if neutral_dataset is None else neutral_dataset
        pairs, source, encoders, batches = self.pairs_to_read(dataset), self.config.source, self.encoders(), []
        if neutral is not None:
            batches = neutral_batches(
                neutral, self.processing_class, self.task, all_words(self._words(dataset)), batch_size=1,
                seed=self.args.seed, config=bare_model(self.model).config,
            )  # fmt: skip
        texts = [(batch, 0) for batch in batches]
        with reading_the_base(self.model, self.adapter_name, self.task) as reader:
            return [
                encode_all(reader, source, encoders[pair], pairs.signed(1, pair) + texts, pair, self._processes)
                for pair in self.pairs
            ]

    def encoders(self) -> dict[Pair, Encode]:
        """Pair of classes → the function that reads its feature from a gradient; `evaluate` measures these.

        Raises:
            ValueError: If the adapter is not fitted, or holds no encoder and was not fitted by this trainer.
        """
        if self.fitted and not self.config.keep_encoder:  # the dense encoders, as they were estimated
            return {fitted.pair: fitted.feature.encoder.encode for fitted in self.fitted}
        return GradiendAdapter.of(self.model, self.adapter_name).encoders()

    def pairs_to_read(self, dataset: datasets.Dataset | None = None) -> PairSet:
        """Check and tokenise a data set, by default the first evaluation set; a `ValueError` without any."""
        dataset = dataset if dataset is not None else next(iter(self._eval_sets().values()), None)
        if dataset is None:
            raise ValueError("GradiendTrainer has no eval_dataset to read: give it, or this call, a data set of pairs.")
        return self._pair_set(dataset)

    def summary(self) -> pandas.DataFrame:
        """The results of the starts of the last `train`: one row for each pair of classes.

        Columns: `pair`, `starts`, `converged` (how many), and `mean`, `std` (NaN for one start), `min` and `max` of the
        best absolute correlations of all starts, and the `seed` that was kept. If training was resumed from a
        checkpoint, starts that ended before it are not counted.

        Raises:
            ValueError: If `train` was not called.
        """
        if not self.starts:
            raise ValueError("There are no starts to summarise: call train() first.")
        table = pandas.DataFrame(self.starts)
        table["converged"] = table["correlation"] >= self.args.convergence
        by_pair = table.groupby("pair", sort=False)
        found = by_pair["correlation"].agg(["size", "mean", "std", "min", "max"]).rename(columns={"size": "starts"})
        found.insert(1, "converged", by_pair["converged"].sum())
        found["seed"] = {"/".join(fitted.pair): fitted.seed for fitted in self.fitted}
        return found.reset_index()

    # ---- selection --------------------------------------------------------------------------------------------------

    def select(
        self,
        goal: str = "bpi",
        *,
        budget: float = 0.02,
        feature_factors: Sequence[float] = FEATURE_FACTORS,
        learning_rates: Sequence[float] = LEARNING_RATES,
        eval_dataset: datasets.Dataset | None = None,
        neutral_dataset: datasets.Dataset | None = None,
    ) -> Selection:
        """Find the edit that serves `goal` best, and steer the adapter to it.

        Args:
            goal: `"bpi"`, `"fpi"`, `"mpi"`, `"balance"`, or the name of the class to strengthen.
            budget: By how much language modelling may get worse: a share of the loss, or of the accuracy of a masked
                model or a classifier (whose right labels are those that it gives without an edit). The upper end of the
                cost's one-sided 95 % interval over the neutral texts must be within the budget, so that it holds for
                other texts too; more texts make the interval smaller.
            feature_factors: The grid's values of h.
            learning_rates: The grid's values of α.
            eval_dataset: Pairs whose slots are scored; report results on other pairs.
            neutral_dataset: Texts for language modelling; report results on other texts.

        Returns:
            The chosen edit and all edits that were tried. If no edit within the budget serves the goal better than the
            unedited model, the unedited model is chosen, with a warning.

        Raises:
            ValueError: If the goal is not defined for these classes, data is missing, or budget or grid are not valid.
            PairError: If a word belongs to several classes, and the rows of a text give no word for some class.
        """
        check_search(budget, feature_factors, learning_rates)
        scorer = self.scorer(eval_dataset, neutral_dataset)
        goal_by_name(goal, self.classes)  # raises an error that lists the goals
        scanned = scan(self.model, self.adapter_name, scorer, self.pairs, budget, feature_factors, learning_rates)
        total = len(self.pairs) * len(feature_factors) * len(learning_rates) + 1
        bar = tqdm(scanned, total=total, desc=f"select {goal}", disable=self.args.disable_tqdm)
        base, *points = list(bar)
        best = choose(base, points, goal, budget)
        edit = {"feature_factor": best.feature_factor, "learning_rate": best.learning_rate, "pair": best.pair}
        steer(self.model, self.adapter_name, **edit)
        selection = Selection(goal, budget, best, base, tuple(points))
        kept = kept_share(self.model, self.adapter_name) if best.learning_rate else 1.0
        if kept < LEAST_KEPT:
            warnings.warn(
                f"Merged into these weights, {kept:.0%} of the chosen edit is left: the rest is below the spacing of "
                "their values. The merged edit was scored; unmerged, the adapter acts in full. A larger learning_rate, "
                "or the base in float32, keeps more.",
                stacklevel=2,
            )
        measured_on = self._measured_on(self.pairs_to_read(eval_dataset).dataset)
        self.config.provenance["selection"] = selection.to_dict() | {"kept_share": kept, "measured_on": measured_on}
        return selection

    def _measured_on(self, dataset: datasets.Dataset) -> str:
        """The rows that figures on a set of pairs are on, in words; warns if some of the pairs were trained on."""
        # As the model reads them: a causal model reads nothing behind the slot.
        measured, learned = (
            [] if rows is None else [str(replace(row, label=None, other=None)) for row in self._pair_set(rows).rows]
            for rows in (dataset, self.train_dataset)
        )
        known = set(learned)
        fitted = sum(row in known for row in measured)
        if fitted:
            warnings.warn(
                f"{fitted} of the {len(dataset)} pairs measured on are pairs of train_dataset: the figures are "
                "on fitted rows, and say little about others. Give pairs that were not trained on.",
                stacklevel=3,
            )
        return rows_in_words(len(dataset), fitted)

    def scorer(
        self, eval_dataset: datasets.Dataset | None = None, neutral_dataset: datasets.Dataset | None = None
    ) -> Scorer:
        """The scorer that `select` uses for edits: class probabilities at the slots, and language modelling."""
        pairs = self.pairs_to_read(eval_dataset)
        neutral = neutral_dataset if neutral_dataset is not None else self.neutral_dataset
        if neutral is None:
            raise ValueError("Scoring an edit needs eval_dataset and neutral_dataset; neutral_dataset is missing.")
        words, size = self._words(eval_dataset), self.args.per_device_eval_batch_size
        reader = SlotReader(self.model, self.task)
        probabilities = class_probabilities(reader, words, pairs, self.processing_class, size)
        language = LanguageModelling(
            reader, neutral, self.processing_class, feature_words=all_words(words), batch_size=size,
            seed=self.args.seed, mask_draws=self.args.mask_draws,
        )  # fmt: skip
        return Scorer(self.classes, probabilities, language)

    # ---- files and data sets ----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the adapter, as `model.save_pretrained` does."""
        if self._processes.is_main:
            model: Any = adapter_of(self.model, self.adapter_name, GradiendConfig).holder
            model.save_pretrained(output_dir or self.args.output_dir)

    def _words(self, given: datasets.Dataset | None = None) -> dict[str, list[str]]:
        """Class → its words in all sets of pairs and in the set `given` to a call, each once.

        For classification they are the names of the model's labels.
        """
        known = (self.train_dataset, *self._eval_sets().values(), given)
        sets = [self._pair_set(dataset) for dataset in known if dataset is not None]
        return {name: list(dict.fromkeys(w for s in sets for w in s.words[i])) for i, name in enumerate(self.classes)}

    def _pair_set(self, dataset: datasets.Dataset) -> PairSet:
        """Check and tokenise a data set once. The result keeps the data set alive, so that its id stays unique."""
        _require_dataset("The data set of pairs", dataset)
        if id(dataset) not in self._tokenised:
            config = bare_model(self.model).config
            self._tokenised[id(dataset)] = PairSet(dataset, self.processing_class, self.task, self.classes, config)
        return self._tokenised[id(dataset)]

    def _eval_sets(
        self, given: datasets.Dataset | dict[str, datasets.Dataset] | None = None
    ) -> dict[str, datasets.Dataset]:
        """The evaluation sets by name, `given` or else the trainer's; a single set has the name ""."""
        sets = self.eval_dataset if given is None else given
        return sets if isinstance(sets, dict) else {} if sets is None else {"": sets}


def _require_dataset(name: str, dataset: Any) -> None:
    if dataset is not None and not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}, not a datasets.Dataset: make one with Dataset.from_list(rows), "
            "Dataset.from_pandas(frame), or from a stream with Dataset.from_generator(lambda: iter(stream))."
        )
