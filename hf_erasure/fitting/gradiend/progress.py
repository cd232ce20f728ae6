"""Steps, logs, checkpoints and callbacks, by the conventions of transformers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from .arguments import GradiendTrainingArguments
from .shelf import KeptFeatures, load_state, save_state

STATE = "gradiend_state.safetensors"
TRAINER_STATE = "trainer_state.json"


class FeatureProgressCallback(ProgressCallback):
    """The bar of transformers, with loss and correlation at its end instead of a line a log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the latest figures."""
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {k: f"{v:.4g}" for k, v in (logs or {}).items() if k in ("loss", "cor", "eval_cor")}
            self.training_bar.set_postfix(shown)


class Progress:
    """How far a training is.

    Args:
        model: What is trained on, for callbacks.
        args: The intervals of logs, evaluations and checkpoints.
        callbacks: Added to those that transformers' `Trainer` has.
        processing_class: For callbacks.
        is_main: Whether this process writes and shows.
    """

    def __init__(
        self,
        model: nn.Module,
        args: GradiendTrainingArguments,
        callbacks: list[TrainerCallback],
        processing_class: Any,
        *,
        is_main: bool,
    ) -> None:
        bar: list[TrainerCallback] = [] if args.disable_tqdm else [FeatureProgressCallback()]
        self.args = args
        self.handler = CallbackHandler([DefaultFlowCallback(), *bar, *callbacks], model, processing_class, None, None)
        self.state = TrainerState(is_local_process_zero=is_main, is_world_process_zero=is_main)
        self.control = TrainerControl()

    def begin(self, steps: int, *, at: int = 0) -> None:
        """Begin, or go on after `at` steps."""
        self.state.max_steps, self.state.global_step = steps, at
        self.state.compute_steps(self.args, steps)
        self.control = self.handler.on_train_begin(self.args, self.state, self.control)

    def step(self) -> None:
        """One more step is done; afterwards `control` says what is due."""
        self.state.global_step += 1
        self.control = self.handler.on_step_end(self.args, self.state, self.control)

    def log(self, figures: dict[str, float]) -> None:
        """Tell the callbacks, and keep in the history."""
        self.state.log_history.append({**figures, "step": self.state.global_step})
        self.control = self.handler.on_log(self.args, self.state, self.control, figures)

    def evaluated(self, figures: dict[str, float]) -> None:
        """Tell the callbacks of an evaluation."""
        self.log(figures)
        self.control = self.handler.on_evaluate(self.args, self.state, self.control, figures)

    def end(self) -> None:
        """Tell the callbacks that training is over."""
        self.control = self.handler.on_train_end(self.args, self.state, self.control)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, state: dict[str, Any], facts: dict[str, Any], kept: KeptFeatures) -> None:
        """Write a checkpoint, whole or not at all, and delete those beyond `save_total_limit`."""
        root = Path(str(self.args.output_dir))
        final = root / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = root / f".{final.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_state(unfinished / STATE, state, facts)
        kept.put_into(unfinished)
        self.state.save_to_json(str(unfinished / TRAINER_STATE))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        self._keep_within_limit(root)
        self.control = self.handler.on_save(self.args, self.state, self.control)

    def _keep_within_limit(self, root: Path) -> None:
        limit = self.args.save_total_limit
        if limit is not None and limit > 0:
            for old in checkpoints(root)[:-limit]:
                shutil.rmtree(old)

    def resume(self, checkpoint: str | bool | None) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
        """Folder, state and facts of a checkpoint: of the given one, of the last for `True`, or none.

        Raises:
            ValueError: If there is no checkpoint, or it is damaged.
        """
        if checkpoint is None or checkpoint is False:
            return None
        root = Path(str(self.args.output_dir))
        if checkpoint is True:
            last = get_last_checkpoint(str(root)) if root.is_dir() else None
            if last is None:
                raise ValueError(f"There is no checkpoint in output_dir={str(root)!r} to resume from.")
            checkpoint = last
        folder = Path(str(checkpoint))
        for name in (STATE, TRAINER_STATE):
            if not (folder / name).exists():
                raise ValueError(f"{str(folder)!r} is no whole checkpoint of a GradiendTrainer: it has no {name}.")
        kept = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
        self.state.log_history = kept["log_history"]
        self.state.global_step = kept["global_step"]
        try:
            return folder, *load_state(folder / STATE)
        except SafetensorError as error:
            raise ValueError(
                f"The {STATE} of the checkpoint {str(folder)!r} is damaged ({error}): resume from an earlier one."
            ) from error


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints in a folder, in the order of their steps."""
    named = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = {int(match[1]): path for path in root.iterdir() if (match := named.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]
