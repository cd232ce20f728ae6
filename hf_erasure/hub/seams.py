"""Where transformers, PEFT and Trainer write a card of their own over ours, wrapped once.

A save writes the card into the staged folder (`hf_erasure.adapters.saving`). But `push_to_hub` of transformers writes
a template over it, PEFT and Trainer do too, and Trainer calls a method on the model that only a `PeftModel` has. What
they do for models without an adapter of ours is left as it is.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers.modeling_utils
import transformers.utils.hub
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from hf_erasure.adapters.common.config import ChildConfig
from hf_erasure.adapters.common.files import root_of, target_of
from hf_erasure.adapters.saving import ON_STAGED
from hf_erasure.adapters.wrapping import is_wrapped, wrap

from .cards import README, WrittenCard, config_in, has_own_text, own_adapters, text_of, with_metadata_of, write_card
from .metadata import filled
from .pushing import card_on_hub

_MARK = "hf_erasure.hub"
_TRAINING = "## Training procedure"
_MODEL_FILES = ("config.json", "adapter_config.json")


def install() -> None:
    """Wrap the seams; called again, it puts the wrappers of now in the place of the former."""
    ON_STAGED[:] = [function for function in ON_STAGED if not hasattr(function, _MARK)]
    ON_STAGED.append(_on_staged)
    wrap(transformers.utils.hub, "create_and_tag_model_card", _create_and_tag_model_card, _MARK)
    wrap(transformers.modeling_utils, "create_and_tag_model_card", _create_and_tag_model_card, _MARK)
    wrap(PreTrainedModel, "save_pretrained", _save_pretrained, _MARK)
    wrap(PeftModel, "create_or_update_model_card", _create_or_update_model_card, _MARK)
    wrap(Trainer, "_save", _save, _MARK)
    wrap(Trainer, "create_model_card", _create_model_card, _MARK)
    wrap(Trainer, "push_to_hub", _push_to_hub, _MARK)
    wrap(Trainer, "_push_from_checkpoint", _push_from_checkpoint, _MARK)


# ---- saving ----------------------------------------------------------------------------------------------------------


def _on_staged(folder: Path, model: Any, adapter_name: str) -> None:
    """The card of an adapter that is about to be saved, and of the folder with several."""
    known = _told_by(model)
    _kept_quiet(folder, lambda: write_card(folder, redraw=True, **known))
    root = root_of(folder)
    target = target_of(root)
    # Of another method's adapter that lies there, PEFT has written the card.
    is_ours = next(own_adapters(root), None) is not None
    is_free = holds_adapters_only(target) or not any((target / name).exists() for name in _MODEL_FILES)
    if root != folder and is_ours and is_free:
        _kept_quiet(root, lambda: write_card(root, beside=target, **known))


setattr(_on_staged, _MARK, True)


def _create_or_update_model_card(original: Callable, model: Any, output_dir: Any) -> None:
    """PEFT calls this before it saves, when there is nothing of ours in the folder yet; others after it."""
    if not any(isinstance(config, ChildConfig) for config in model.peft_config.values()):
        original(output_dir)
    elif holds_adapters_only(Path(output_dir)):
        _kept_quiet(output_dir, lambda: write_card(output_dir, **_told_by(model)))


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
        if path.name != README or not holds_adapters_only(path.parent):
            super().save(filepath)
            return
        # Of what lies in the folder and what lies on the Hub, that counts which somebody has written.
        here = text_of(path) if _saved_to.get() is None else text_of(Path(_saved_to.get() or "", README))
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


# Where a save goes that pushes too: what is uploaded lies in another folder.
_saved_to: ContextVar[str | None] = ContextVar("saved_to", default=None)


def _save_pretrained(original: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    if not given.get("push_to_hub"):
        return original(*args, **kwargs)
    token = _saved_to.set(str(given["save_directory"]))
    try:
        return original(*args, **kwargs)
    finally:
        _saved_to.reset(token)


def _create_and_tag_model_card(original: Callable, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    card: Any = original(repo_id, *args, **kwargs)
    given = inspect.signature(original).bind(repo_id, *args, **kwargs).arguments
    card.__class__ = _PushedCard
    card.hf_erasure_repo_id, card.hf_erasure_token = repo_id, given.get("token")
    return card


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def _save(original: Callable, trainer: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
    """Adapters that a callback of ours puts into folders of their names get their cards there."""
    result = original(output_dir, *args, **kwargs)
    _cards_within(Path(output_dir or trainer.args.output_dir), **_told_by(trainer.model))
    return result


def _cards_within(folder: Path, into: Path | None = None, **told: Any) -> None:
    for place in [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []:
        config = config_in(place)
        target = place if into is None else into / place.name
        if config is not None and (into is not None or not (place / README).is_file()):
            target.mkdir(parents=True, exist_ok=True)
            _kept_quiet(target, functools.partial(write_card, target, config, **told))


def _create_model_card(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Trainer's card says how training went: that becomes a part of ours, which says all the rest."""
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
        generated = text_of(Path(elsewhere, README)) or ""
    repo_id = getattr(trainer, "hub_model_id", None)
    _kept_quiet(folder, functools.partial(_with_training, folder, ModelCard(generated), repo_id))


def _with_training(folder: Path, theirs: ModelCard, repo_id: str | None) -> WrittenCard:
    """Our card, with what Trainer's says of the training run, and with its metadata."""
    training = theirs.text.partition(_TRAINING)[2].partition("<!-- hf-erasure end")[0].strip()
    present = filled(text_of(folder / README) or "---\n{}\n---\n", theirs.data)
    text = f"{_TRAINING}\n\n{training}" if training else ""
    return write_card(folder, repo_id=repo_id, training=text, present=present)


def _push_to_hub(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Trainers of other libraries have a `create_model_card` of their own."""
    theirs = type(trainer).create_model_card
    if is_wrapped(theirs, _MARK):
        return original(*args, **kwargs)
    trainer.create_model_card = functools.partial(_create_model_card, theirs.__get__(trainer), trainer)
    try:
        return original(*args, **kwargs)
    finally:
        del trainer.create_model_card


def _push_from_checkpoint(original: Callable, trainer: Any, checkpoint_folder: str) -> None:
    """Trainer copies an adapter's files from the checkpoint, and not its card."""
    source, target = Path(checkpoint_folder), Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        told = _told_by(trainer.model)
        _cards_within(source, target, **told)
        config = config_in(source)
        if config is not None:
            repo_id = getattr(trainer, "hub_model_id", None)
            _kept_quiet(target, lambda: write_card(target, config, repo_id=repo_id, **told))
    original(checkpoint_folder)
