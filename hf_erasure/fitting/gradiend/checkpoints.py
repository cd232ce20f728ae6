"""The progress of a training: its checkpoints, and the best feature of every pair so far.

`output_dir` has folders `checkpoint-N/`, each written whole: the state of the running start, the file in which Trainer
keeps its own state, and `features/start-NNN.safetensors`, the best features so far by the number of their start.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from hf_erasure.adapters.common.files import read_tensors, write_tensors
from hf_erasure.gradiend import Feature, FeatureDecoder, FeatureEncoder

from ..processes import Processes
from .pairs import Pair

STATE = "gradiend_state.safetensors"
TRAINER_STATE = "trainer_state.json"
FEATURES, FEATURE_FILE = "features", "start-{}.safetensors"


@dataclass(frozen=True)
class PairFit:
    """The fitted feature of a pair; class 0 encodes to +1."""

    pair: Pair  # The two classes.
    feature: Feature  # Dense encoder and decoder.
    # On the evaluation data, or on training steps without such data; NaN if it was not measured.
    correlation: float
    steps: int  # The number of steps of its start so far.
    seed: int  # The seed of its start.

    @property
    def score(self) -> float:
        """The absolute correlation, by which starts are compared; an undefined one is below all others."""
        return -1.0 if math.isnan(self.correlation) else abs(self.correlation)


class Progress:
    """Calls the callbacks of a training, and writes and reads its checkpoints.

    Attributes:
        state: The state, as Trainer has it.
        control: The actions that the callbacks ask for.
        best: Pair → the number of the best start so far, and its feature: three vectors of the size of the targeted
            weights.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        callbacks: list[TrainerCallback],
        processing_class: Any,
        processes: Processes,
    ) -> None:
        bar: list[TrainerCallback] = [] if args.disable_tqdm else [ProgressCallback()]
        self.args, self.processes, self.root = args, processes, Path(str(args.output_dir))
        self.handler = CallbackHandler([DefaultFlowCallback(), *bar, *callbacks], model, processing_class, None, None)
        is_main = processes.is_main
        self.state = TrainerState(is_local_process_zero=is_main, is_world_process_zero=is_main)
        self.control = TrainerControl()
        self.best: dict[Pair, tuple[int, PairFit]] = {}
        self._identity: dict[str, Any] = {}

    @contextmanager
    def running(self, steps: int) -> Iterator[None]:
        """Call the callbacks when training begins or is resumed, with this total of steps, and when it ends."""
        self.state.max_steps = steps
        self.state.compute_steps(self.args, steps)
        self.control = self.handler.on_train_begin(self.args, self.state, self.control)
        yield
        self.control = self.handler.on_train_end(self.args, self.state, self.control)

    def begin(self) -> None:
        """Begin a new start: a callback that stopped the last one does not stop this one, whose best is not known."""
        self.control.should_training_stop, self.state.best_metric = False, None

    def step(self, epoch: float) -> None:
        """Count one more step and call the callbacks, which set `control`; `epoch` is how much of a start is done."""
        self.state.global_step, self.state.epoch = self.state.global_step + 1, epoch
        self.control = self.handler.on_step_end(self.args, self.state, self.control)
        if epoch.is_integer():
            self.control = self.handler.on_epoch_end(self.args, self.state, self.control)

    def log(self, figures: dict[str, float], *, evaluated: bool = False) -> None:
        """Add figures to the history and call the callbacks; with `evaluated`, also those for an evaluation."""
        self.state.log_history.append({**figures, "step": self.state.global_step})
        self.control = self.handler.on_log(self.args, self.state, self.control, figures)
        if evaluated:
            self.control = self.handler.on_evaluate(self.args, self.state, self.control, figures)
            # `EarlyStoppingCallback` compares with the best value so far.
            name, best = str(self.args.metric_for_best_model).removeprefix("eval_"), self.state.best_metric
            value = figures.get(f"eval_{name}")
            if value is not None and (best is None or (value > best if self.args.greater_is_better else value < best)):
                self.state.best_metric = value

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write a checkpoint, whole or not at all, and delete those beyond `save_total_limit`."""
        if self.processes.is_main:
            final = self.root / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            unfinished = self.root / f".{final.name}"
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / FEATURES).mkdir(parents=True)
            write_tensors(unfinished / STATE, state, {"facts": {**facts, "identity": self._identity}, "plain": {}})
            for start, fitted in self.best.values():
                encoder, decoder = fitted.feature.encoder, fitted.feature.decoder
                tensors = {f"encoder.{name}": value for name, value in encoder.weight.items()}
                tensors |= {f"weight.{name}": value for name, value in decoder.weight.items()}
                tensors |= {f"bias.{name}": value for name, value in decoder.bias.items()}
                about = {
                    "correlation": None if math.isnan(fitted.correlation) else fitted.correlation,  # NaN is not JSON
                    "steps": fitted.steps,
                    "seed": fitted.seed,
                    "encoder": {key: getattr(encoder, key) for key in ("scale", "bias", "activation", "unit_norm")},
                    "shapes": {name: list(shape) for name, shape in decoder.shapes.items()},
                }
                write_tensors(unfinished / FEATURES / FEATURE_FILE.format(f"{start:03}"), tensors, about)
            self.state.save_to_json(str(unfinished / TRAINER_STATE))
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            rotate_checkpoints(str(self.root), self.args.save_total_limit)
        self.processes.wait()
        self.control = self.handler.on_save(self.args, self.state, self.control)

    def resume(
        self, checkpoint: str | bool | None, identity: dict[str, Any], pairs: Sequence[Pair]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state and facts of a checkpoint, as `save` got them; without one, those of the beginning.

        `checkpoint` is a folder, True for the last one, or None or False for none. `identity` must be the same as when
        it was written; `pairs` has the pair of every start. Raises a `ValueError` if the checkpoint is missing, damaged
        or of another training.
        """
        self._identity = identity
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.root)) if self.root.is_dir() else None
            if checkpoint is None:
                raise ValueError(f"output_dir={str(self.root)!r} has no checkpoint: train from the start.")
        if checkpoint is None or checkpoint is False:
            return {}, {"start": 0, "step": 0}
        folder = Path(str(checkpoint))
        try:
            state, content = read_tensors(folder / STATE)
            saved = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
            features = {path: read_tensors(path) for path in sorted((folder / FEATURES).glob(FEATURE_FILE.format("*")))}
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"{str(folder)!r} is not a whole checkpoint of a GradiendTrainer ({error}): resume from an earlier one."
            ) from error
        self.state.log_history, self.state.global_step = saved["log_history"], saved["global_step"]
        for name, value in content["facts"]["identity"].items():
            if identity.get(name) != value:
                raise ValueError(
                    f"The checkpoint {str(folder)!r} is of another training: its {name} is {value!r}, here it is "
                    f"{identity.get(name)!r}. Resume with the same, or train anew in another output_dir."
                )
        for path, (tensors, about) in features.items():
            start = int(path.stem.removeprefix("start-"))
            shapes = {name: torch.Size(shape) for name, shape in about["shapes"].items()}
            encoder, weight, bias = (
                {name: tensors[f"{part}.{name}"] for name in shapes} for part in ("encoder", "weight", "bias")
            )
            feature = Feature(
                FeatureEncoder(encoder, dict.fromkeys(shapes), shapes, **about["encoder"]),
                FeatureDecoder(weight, bias, dict.fromkeys(shapes), dict(shapes)),
            )
            correlation = math.nan if about["correlation"] is None else about["correlation"]
            self.keep(start, PairFit(pairs[start], feature, correlation, about["steps"], about["seed"]))
        return state, content["facts"]

    def keep(self, start: int, fitted: PairFit) -> None:
        """Keep a start's feature if it is the best of its pair so far."""
        if fitted.pair not in self.best or fitted.score > self.best[fitted.pair][1].score:
            self.best[fitted.pair] = start, fitted
