"""Pushing to the Hub: of a folder in one commit, and our card in what transformers and Trainer push.

What goes wrong between a user and the Hub is said in a sentence that tells what to do about it. `push_to_hub` of
transformers writes a template over the card that a save has left, Trainers do too, and Trainer calls a method on the
model that only a `PeftModel` has. What they do for models without an adapter of ours is left as it is.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_erasure.adapters.common.files import CARD, CONFIG, WEIGHTS
from hf_erasure.adapters.saving import PUSHED_FROM

from . import cards
from .facts import PICTURES, hub_id, plain, read_object
from .rendering import SOMEWHERE, Card, rendered

_REMEDIES = {
    401: "Log in with `hf auth login`, or give a valid token.",
    403: "Use a token that may write there, or open a pull request (create_pr=True, --create-pr), which everybody may.",
    404: "Is the name right, and may this token see the repository?",
    409: "Somebody else changes the repository at the same time: try again.",
    412: "Somebody else changes the repository at the same time: try again.",
    429: "Wait a little, and try again.",
}
_AGAIN = "Try again; a second push sends only what has not arrived."
# So many characters of what the Hub says are shown.
_LONGEST = 400


class PushError(OSError):
    """A push that failed. What the client itself said is its `__cause__`."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status  # of HTTP; None where there was no answer


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Raise a `PushError` that says what to do for what the client raises while it works on a repository."""
    try:
        yield
    except (HTTPError, RuntimeError, LocalEntryNotFoundError) as error:
        # What went wrong with one file has its reason as the cause.
        reason = error if isinstance(error, HTTPError) else error.__cause__
        if not isinstance(reason, HTTPError):
            raise
        what = f" ({plain(error).rstrip('.')})" if isinstance(error, RuntimeError) else ""
        status = _status_of(reason)
        if status is None:
            why = f"the connection to the Hub broke ({type(reason).__name__}: {plain(reason, _LONGEST)}). {_AGAIN}"
        else:
            said = plain(getattr(reason, "server_message", None) or "no reason given", _LONGEST)
            remedy = _REMEDIES.get(status, f"The trouble is the Hub's. {_AGAIN}" if status >= 500 else "")
            why = f"the Hub answered {status} ({said}). {remedy}".rstrip()
        raise PushError(f"Pushing to {repo_id!r} failed{what}: {why}", status) from error


def _status_of(error: HTTPError) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


# Name of a file → its text in the repository as it is now; None where there is none.
Present = Callable[[str], str | None]
# What a repository of a model consists of; training states and pickles are left out.
_MODEL_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md", ".png", ".tiktoken", ".spm", ".bpe")
# So often a push is made anew where somebody else commits in between.
_ATTEMPTS = 3
# Where Trainer's card begins to say how training went.
_TRAINING = "## Training procedure"


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    message: str | None = None,
    base_model: str | None = None,
) -> CommitInfo:
    """Upload an adapter with its card to the Hub.

    The repository is made if there is none. What people have written into its README.md, or into that of the folder,
    is kept, as `write_card` does; the folder itself is left as it is, but for its picture.

    Args:
        folder: An adapter's folder, or one with adapters in folders of their names.
        repo_id: `user/name`.
        private: Make the repository private, where it is made.
        revision: The branch; it is made if there is none.
        subfolder: The folder within the repository, so that one can hold several adapters.
        create_pr: Open a pull request instead.
        token: Of the Hub; the one of `hf auth login` when None.
        message: Of the commit.
        base_model: The base's name on the Hub, where the adapter was fitted on a local copy; what is uploaded names it.

    Returns:
        Where the commit is.

    Raises:
        ValueError: If the folder holds no fitted adapter of ours, or a name is not that of a repository.
        PushError: If the Hub refuses, or does not answer.
    """
    parts = PurePosixPath(subfolder or "").parts
    if subfolder is not None and (not parts or parts[0] == "/" or ".." in parts or "\\" in subfolder):
        raise ValueError(f"subfolder={subfolder!r} is not a folder within a repository: write a name such as 'gender'.")
    folder, place, adapters = Path(folder), "/".join(parts), _fitted_adapters(Path(folder))
    if base_model is not None and hub_id(base_model) is None:
        raise ValueError(f"base_model={base_model!r} is not a name on the Hub: write it as in 'user/name'.")

    def within(*parts: str) -> str:
        return str(PurePosixPath(place, *parts))

    def files(present: Present, to: str) -> Iterator[CommitOperationAdd]:
        facts = cards.gather(folder, base_model=base_model)
        facts.repo_id = to
        if place:
            facts.subfolder = within(facts.subfolder or "")
            facts.others = {within(name): what for name, what in facts.others.items()}
        written = {"": facts}
        for name in filter(None, adapters):
            own = cards.gather(folder / name, base_model=base_model)
            written[name] = replace(own, repo_id=to, subfolder=within(name))
        # No recipe and no training state.
        for name, file in itertools.product(adapters, (CONFIG, WEIGHTS, *PICTURES)):
            content: Path | bytes = folder / name / file
            if file == CONFIG and base_model is not None:
                # So that `AutoModel.from_pretrained` finds the base.
                known = read_object(folder / name / file) | {"base_model_name_or_path": base_model}
                content = json.dumps(known, indent=2, sort_keys=True).encode("utf-8")
            if (folder / name / file).is_file():
                yield CommitOperationAdd(within(name, file), content)
        for name, own in written.items():
            yield _readme(rendered(own), cards.text_of(folder / name / CARD), present, within(name, CARD))
        if place and present(CARD) is None:
            # The Hub shows the card at the top, where a new repository would have none.
            facts.pictures = {within(name): text for name, text in facts.pictures.items()}
            yield _readme(rendered(facts), None, present, CARD)

    return _push(repo_id, files, message or f"Upload {folder.resolve().name}", private, revision, create_pr, token)


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    message: str | None = None,
) -> CommitInfo:
    """Upload a folder that `merge` or `export-lora` wrote: configuration, weights, tokenizer and card.

    Arguments and errors are those of `push_adapter`. The card of the folder takes the place of one that nobody wrote.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix in _MODEL_SUFFIXES)
    names = [name for name in names if not name.startswith(".") and name != CARD]
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{folder} holds no weights in safetensors: there is nothing to push.")

    def files(present: Present, to: str) -> Iterator[CommitOperationAdd]:
        for name in names:
            yield CommitOperationAdd(name, folder / name)
        here = cards.text_of(folder / CARD)
        card = None if here is None else Card.read(here)
        if card is not None:
            yield _readme(replace(card, text=card.text.replace(SOMEWHERE, to)), here, present, CARD)
        elif here is not None:
            yield CommitOperationAdd(CARD, here.encode("utf-8"))

    return _push(repo_id, files, message or f"Upload {folder.resolve().name}", private, revision, create_pr, token)


def _push(
    repo_id: str,
    files: Callable[[Present, str], Iterator[CommitOperationAdd]],
    message: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    token: str | bool | None,
) -> CommitInfo:
    """Commit files onto what the repository holds; anew if somebody else commits in between."""
    validate_repo_id(repo_id)
    api, attempts = HfApi(token=token), 0
    with explained(repo_id):
        to = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            try:
                api.create_branch(to, branch=revision, exist_ok=True)
            except HfHubHTTPError as error:
                # Who may only propose changes cannot make branches; the commit says so if there is none.
                if not create_pr or _status_of(error) != 403:
                    raise
        while True:
            head = api.model_info(to, revision=revision).sha
            present = functools.partial(_card_at, to, head or revision, token)
            attempts += 1
            try:
                return api.create_commit(
                    to, list(files(present, to)), commit_message=message, revision=revision, create_pr=create_pr,
                    parent_commit=head,
                )  # fmt: skip
            except HfHubHTTPError as error:
                # 412: the README.md that ours was made from is no longer the latest.
                if _status_of(error) != 412 or attempts == _ATTEMPTS:
                    raise


def _card_at(repo_id: str, revision: str | None, token: str | bool | None, name: str) -> str | None:
    """A card of a repository as it is now; None where there is none."""
    try:
        return cards.text_of(Path(hf_hub_download(repo_id, name, revision=revision, token=token)))
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None  # and not where the Hub could not be asked: somebody's card would be overwritten


def _readme(card: Card, here: str | None, present: Present, path: str) -> CommitOperationAdd:
    """The card in the text that somebody has written, in the folder or on the Hub."""
    text, outcome, reason = cards.updated(here if cards.has_own_text(here) else present(path), card)
    if outcome == "left":
        raise ValueError(f"The {CARD} of the repository or of the folder cannot be kept: {reason}")
    return CommitOperationAdd(path, text.encode("utf-8"))


def _fitted_adapters(folder: Path) -> list[str]:
    """The folders of adapters within a folder; an empty name where it is one itself."""
    adapters = dict(cards.own_adapters(folder))
    if not adapters:
        raise ValueError(
            f"{folder} holds no adapter of hf_erasure: give the folder that save_pretrained or `hf-erasure fit` wrote. "
            "Other adapters and models are pushed with `hf upload`."
        )
    for name, config in adapters.items():
        if not config.fitted:
            raise ValueError(f"The {config.described} in {folder / name} was never fitted. {config.remedy}")
        if not (folder / name / WEIGHTS).is_file():
            raise ValueError(f"{folder / name} has no {WEIGHTS}: the adapter is not complete.")
    return list(adapters)


# ---- the card of what transformers pushes ----------------------------------------------------------------------------


def create_and_tag_model_card(original: Callable, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """The card that `push_to_hub` of transformers writes over that of what it pushes; of ours, our card takes it up."""
    card: Any = original(repo_id, *args, **kwargs)
    token = inspect.signature(original).bind(repo_id, *args, **kwargs).arguments.get("token")
    save_as_it_is = card.save

    def save(filepath: Path | str) -> None:
        path = Path(filepath)
        if path.name != CARD or not cards.holds_adapters_only(path.parent):
            return save_as_it_is(filepath)
        # What lies in the folder and what lies on the Hub: the one that somebody has written counts.
        pushed_from = PUSHED_FROM.get()
        here = cards.text_of(path if pushed_from is None else pushed_from / CARD)
        there = str(card)
        if not cards.has_own_text(there):
            with explained(repo_id):  # transformers takes it for nothing where the Hub could not be asked
                known = _card_at(repo_id, None, token, CARD)
            there = known if known is not None and cards.has_own_text(known) else there
        present = here if cards.has_own_text(here) else cards.filled(there, cards.text_of(path))
        tags = card.data.get("tags") or []
        cards.kept_quiet(path.parent, cards.write_card, repo_id=repo_id, present=present, tags=tags)
        for name in [name for name, _ in cards.own_adapters(path.parent) if name]:
            cards.kept_quiet(path.parent / name, cards.write_card, repo_id=repo_id, subfolder=name)

    card.save = save
    return card


def create_model_card(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """A Trainer's card says how training went: that becomes a part of ours, which says all the rest."""
    output_dir = trainer.args.output_dir
    folder = Path(output_dir)
    if not trainer.is_world_process_zero() or not cards.holds_adapters_only(folder):
        original(*args, **kwargs)
        return
    with TemporaryDirectory() as elsewhere:
        # Into an empty folder: where Trainer finds a card of PEFT, it calls a method that only a PeftModel has.
        object.__setattr__(trainer.args, "output_dir", elsewhere)
        try:
            original(*args, **kwargs)
        finally:
            object.__setattr__(trainer.args, "output_dir", output_dir)
        theirs = ModelCard(cards.text_of(Path(elsewhere, CARD)) or "")
    cards.kept_quiet(folder, _with_training, theirs, getattr(trainer, "hub_model_id", None))


def _with_training(folder: Path, theirs: ModelCard, repo_id: str | None) -> cards.WrittenCard:
    """Our card, with what Trainer's says of the training run, and with its metadata."""
    training = theirs.text.partition(_TRAINING)[2].partition("<!-- hf-erasure end")[0].strip()
    present = cards.filled(cards.text_of(folder / CARD) or "---\n{}\n---\n", str(theirs))
    text = f"{_TRAINING}\n\n{training}" if training else ""
    return cards.write_card(folder, repo_id=repo_id, training=text, present=present)
