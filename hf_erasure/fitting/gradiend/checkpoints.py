"""What a training run keeps on disk: its progress and the best features so far."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from hf_erasure.adapters.common.files import read_tensors, write_tensors
from hf_erasure.gradiend import Feature, FeatureDecoder, FeatureEncoder

from .arguments import GradiendTrainingArguments

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


# Between the keys of nested dictionaries in the name of a tensor; no key has it.
_WITHIN = "::"
FEATURES = "features"


def save_feature(path: Path, feature: Feature, facts: Mapping[str, Any]) -> None:
    """Write a dense feature, and facts about it."""
    encoder, decoder = feature.encoder, feature.decoder
    if any(position is not None for position in (*encoder.index.values(), *decoder.index.values())):
        raise ValueError("Only features that were not pruned are kept while training.")
    tensors = {f"encoder.{name}": value for name, value in encoder.weight.items()}
    tensors |= {f"weight.{name}": value for name, value in decoder.weight.items()}
    tensors |= {f"bias.{name}": value for name, value in decoder.bias.items()}
    reading = {key: getattr(encoder, key) for key in ("scale", "bias", "activation", "unit_norm")}
    shapes = {name: list(shape) for name, shape in decoder.shapes.items()}
    write_tensors(path, tensors, {**facts, "encoder": reading, "shapes": shapes})


def load_feature(path: Path) -> tuple[Feature, dict[str, Any]]:
    """What `save_feature` wrote."""
    tensors, facts = read_tensors(path)
    shapes = {name: torch.Size(shape) for name, shape in facts.pop("shapes").items()}
    index: dict[str, Tensor | None] = dict.fromkeys(shapes)
    encoder = FeatureEncoder(
        weight={name: tensors[f"encoder.{name}"] for name in shapes}, index=index, shapes=shapes, **facts.pop("encoder")
    )
    decoder = FeatureDecoder(
        weight={name: tensors[f"weight.{name}"] for name in shapes},
        bias={name: tensors[f"bias.{name}"] for name in shapes},
        index=dict(index),
        shapes=shapes,
    )
    return Feature(encoder, decoder), facts


def save_state(path: Path, state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write an estimator's state, nested dictionaries of tensors and plain numbers."""
    tensors, plain = _split(state)
    write_tensors(path, tensors, {"facts": dict(facts), "plain": plain})


def load_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `save_state` wrote."""
    tensors, kept = read_tensors(path)
    return _join(tensors, kept["plain"]), kept["facts"]


def _split(state: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by their path, and the same tree without them."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in state.items():
        path = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[path] = value
        elif isinstance(value, Mapping):
            inner, rest = _split(value, f"{path}{_WITHIN}")
            tensors |= inner
            plain[key] = rest
        else:
            plain[key] = value
    return tensors, plain


def _join(tensors: Mapping[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = plain
    for path, value in tensors.items():
        *parents, name = path.split(_WITHIN)
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return state


def _link(path: Path, other: Path) -> None:
    """The same bytes under another name; files here are replaced as a whole and never written into."""
    try:
        os.link(path, other)
    except OSError:  # a file system without links
        shutil.copyfile(path, other)


class KeptFeatures:
    """The best feature of every start so far: files in a folder, or in memory where nothing may be written.

    Args:
        folder: Made when first needed; `None` keeps them in memory, three vectors of the size of the model each.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[int, tuple[Feature, dict[str, Any]]] = {}

    def keep(self, start: int, feature: Feature, facts: Mapping[str, Any]) -> None:
        """Keep a start's feature in the place of the one before."""
        if self.folder is None:
            self._held[start] = feature, dict(facts)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_feature(self._path(start), feature, facts)

    def get(self, start: int) -> tuple[Feature, dict[str, Any]]:
        """A start's feature and the facts about it."""
        return self._held[start] if self.folder is None else load_feature(self._path(start))

    def clear(self) -> None:
        """Forget what another training has left here."""
        self._held.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def put_into(self, checkpoint: Path) -> None:
        """Make a checkpoint complete: add what is kept to it."""
        if self.folder is not None and self.folder.is_dir():
            (checkpoint / FEATURES).mkdir()
            for path in self.folder.glob("start-*.safetensors"):
                _link(path, checkpoint / FEATURES / path.name)

    def take_from(self, checkpoint: Path) -> None:
        """Keep what a checkpoint holds, and nothing else."""
        self.clear()
        if self.folder is None:
            for path in sorted((checkpoint / FEATURES).glob("start-*.safetensors")):
                self._held[int(path.stem.removeprefix("start-"))] = load_feature(path)
        elif (checkpoint / FEATURES).is_dir():
            self.folder.mkdir(parents=True)
            for path in (checkpoint / FEATURES).glob("start-*.safetensors"):
                _link(path, self.folder / path.name)

    def _path(self, start: int) -> Path:
        return Path(str(self.folder)) / f"start-{start:03d}.safetensors"
