"""Our card in place of those that transformers, PEFT and Trainer write: in what is saved, pushed and trained.

A save writes the card into the staged folder (`hf_erasure.adapters.saving`). But `push_to_hub` of transformers writes
a template over it, Trainers do too, and Trainer calls a method on the model that only a `PeftModel` has. What they do
for models without an adapter of ours is left as it is.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from hf_erasure.adapters.common.files import CARD, CONFIG, root_of, target_of
from hf_erasure.adapters.saving import PUSHED_FROM

from .cards import WrittenCard, config_in, has_own_text, own_adapters, text_of, with_metadata_of, write_card
from .metadata import filled
from .pushing import card_on_hub

_TRAINING = "## Training procedure"
_MODEL_FILES = ("config.json", CONFIG)


# ---- saving ----------------------------------------------------------------------------------------------------------


def write_saved_card(folder: Path, model: Any, adapter_name: str) -> None:
    """Write the card of an adapter that is about to be saved, and of the folder with several; see `ON_STAGED`."""
    known, root = _told_by(model), root_of(folder)
    _kept_quiet(folder, lambda: write_card(folder, model.peft_config[adapter_name], redraw=True, **known))
    if root == folder:
        return
    target = target_of(root)
    # The card of another method's adapter that lies there is not ours to write.
    is_ours = next(own_adapters(root), None) is not None
    is_free = holds_adapters_only(target) or not any((target / name).exists() for name in _MODEL_FILES)
    if is_ours and is_free:
        _kept_quiet(root, lambda: write_card(root, beside=target, **known))


def _told_by(model: Any) -> dict[str, Any]:
    """What the model tells of the base, for the card of an adapter of it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    library = ["transformers"] if isinstance(base, PreTrainedModel) else []
    return {"tags": [*library, *(getattr(base, "model_tags", None) or [])], "base_class": type(base).__name__}


def holds_adapters_only(folder: Path) -> bool:
    """Whether a folder is one of our adapters, or has only such in it: its card is ours to write."""
    if config_in(folder) is None and any((folder / name).exists() for name in _MODEL_FILES):
        return False
    return next(own_adapters(folder), None) is not None


def _kept_quiet(where: Any, write: Callable[[], WrittenCard]) -> None:
    """An adapter is worth more than its card: what goes wrong with the card is said, and stops no save."""
    try:
        written = write()
    except Exception as error:
        warnings.warn(
            f"The card of the adapter in {where} could not be written: {type(error).__name__}: {error}", stacklevel=4
        )
        return
    if written.outcome == "left":
        warnings.warn(str(written), stacklevel=4)


# ---- pushing ---------------------------------------------------------------------------------------------------------


class _PushedCard(ModelCard):
    """What the repository has, or transformers' template; where an adapter of ours is pushed, our card takes it up."""

    hf_erasure_repo_id = ""
    hf_erasure_token: Any = None

    def save(self, filepath: Path | str) -> None:
        """Write README.md into the folder that is about to be pushed."""
        path = Path(filepath)
        if path.name != CARD or not holds_adapters_only(path.parent):
            super().save(filepath)
            return
        # What lies in the folder and what lies on the Hub: the one that somebody has written counts.
        pushed_from = PUSHED_FROM.get()
        here = text_of(path if pushed_from is None else pushed_from / CARD)
        present = here if has_own_text(here) else with_metadata_of(self._there(), text_of(path))
        where, tags = self.hf_erasure_repo_id, self.data.get("tags") or []
        _kept_quiet(path.parent, lambda: write_card(path.parent, repo_id=where, present=present, tags=tags))
        for name in [name for name, _ in own_adapters(path.parent) if name]:
            write = functools.partial(write_card, path.parent / name, repo_id=where, subfolder=name)
            _kept_quiet(path.parent / name, write)

    def _there(self) -> str:
        """What the repository has, which transformers takes for nothing where the Hub could not be asked."""
        if not has_own_text(str(self)):
            there = card_on_hub(self.hf_erasure_repo_id, self.hf_erasure_token)
            if there is not None and has_own_text(there):
                return there
        return str(self)


def create_and_tag_model_card(original: Callable, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """The card that `push_to_hub` of transformers writes over that of what it pushes."""
    card: Any = original(repo_id, *args, **kwargs)
    given = inspect.signature(original).bind(repo_id, *args, **kwargs).arguments
    card.__class__ = _PushedCard
    card.hf_erasure_repo_id, card.hf_erasure_token = repo_id, given.get("token")
    return card


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def write_pushed_card(trainer: Any, checkpoint: Path) -> None:
    """Write the card of what Trainer copies from a checkpoint before it pushes it: the files, and not the card."""
    target, config = Path(trainer.args.output_dir), config_in(checkpoint)
    if config is not None:
        known = {"repo_id": getattr(trainer, "hub_model_id", None), **_told_by(trainer.model)}
        _kept_quiet(target, lambda: write_card(target, config, **known))


def create_model_card(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """A Trainer's card says how training went: that becomes a part of ours, which says all the rest."""
    output_dir = trainer.args.output_dir
    folder = Path(output_dir)
    if not trainer.is_world_process_zero() or not holds_adapters_only(folder):
        original(*args, **kwargs)
        return
    with TemporaryDirectory() as elsewhere:
        # Into an empty folder: where Trainer finds a card of PEFT, it calls a method that only a PeftModel has.
        object.__setattr__(trainer.args, "output_dir", elsewhere)
        try:
            original(*args, **kwargs)
        finally:
            object.__setattr__(trainer.args, "output_dir", output_dir)
        theirs = ModelCard(text_of(Path(elsewhere, CARD)) or "")
    repo_id = getattr(trainer, "hub_model_id", None)
    _kept_quiet(folder, functools.partial(_with_training, folder, theirs, repo_id))


def _with_training(folder: Path, theirs: ModelCard, repo_id: str | None) -> WrittenCard:
    """Our card, with what Trainer's says of the training run, and with its metadata."""
    training = theirs.text.partition(_TRAINING)[2].partition("<!-- hf-erasure end")[0].strip()
    present = filled(text_of(folder / CARD) or "---\n{}\n---\n", theirs.data)
    text = f"{_TRAINING}\n\n{training}" if training else ""
    return write_card(folder, repo_id=repo_id, training=text, present=present)
