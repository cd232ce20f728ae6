"""Push a folder to the Hub in one commit, and put our card into what transformers and Trainer push.

Errors of the Hub are raised with a sentence that says what to do. `push_to_hub` of transformers writes a template over
the card of a save, Trainers do too, and Trainer calls a method of the model that only a `PeftModel` has. What they do
for models without an adapter of ours is not changed.
"""

from __future__ import annotations

import functools
import inspect
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
from .facts import plain
from .rendering import FOLDER_PLACEHOLDER, Card, rendered

_REMEDIES = {
    401: "Log in with `hf auth login`, or give a valid token.",
    403: "Use a token that may write there, or open a pull request (create_pr=True, --create-pr), which everybody may.",
    404: "Is the name right, is there such a branch, and may this token see the repository?",
    409: "Somebody else changes the repository at the same time: try again.",
    412: "Somebody else changes the repository at the same time: try again.",
    429: "Wait a little, and try again.",
}
_RETRY = "Try again; a second push sends only what has not arrived."
# The most characters of the Hub's answer that are shown.
_LONGEST = 400


class PushError(OSError):
    """A push that failed. The client's own error is its `__cause__`."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status  # the HTTP status; None if the Hub did not answer


@contextmanager
def explained_errors(repo_id: str) -> Iterator[None]:
    """Turn the errors of the client, while it works on a repository, into a `PushError` that says what to do."""
    try:
        yield
    except (HTTPError, RuntimeError, LocalEntryNotFoundError) as error:
        # The error of a single file has its reason as the cause.
        reason = error if isinstance(error, HTTPError) else error.__cause__
        if not isinstance(reason, HTTPError):
            raise
        what = f" ({plain(error).rstrip('.')})" if isinstance(error, RuntimeError) else ""
        response = reason.response if isinstance(reason, HfHubHTTPError) else None
        status = None if response is None else response.status_code
        if status is None:
            why = f"the connection to the Hub broke ({type(reason).__name__}: {plain(reason, _LONGEST)}). {_RETRY}"
        else:
            said = plain(getattr(reason, "server_message", None) or "no reason given", _LONGEST)
            remedy = _REMEDIES.get(status, f"The fault is the Hub's. {_RETRY}" if status >= 500 else "")
            why = f"the Hub answered {status} ({said}). {remedy}".rstrip()
        raise PushError(f"Pushing to {repo_id!r} failed{what}: {why}", status) from error


# Name of a file → its present text in the repository; None if the repository lacks the file.
RemoteText = Callable[[str], str | None]
# The files of a model's repository, by suffix; training states and pickles are left out.
_MODEL_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md", ".png", ".tiktoken", ".spm", ".bpe")
# The heading in Trainer's card above the text on the training run.
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
) -> CommitInfo:
    """Upload an adapter with its card to the Hub.

    The repository is created if it does not exist. Text that people have written into its README.md, or into that of
    the folder, is kept as by `write_card`. The folder itself is not changed, except for its picture.

    Args:
        folder: An adapter's folder, or a folder with adapters in folders of their names.
        repo_id: `user/name`.
        private: Make the repository private if it is created.
        revision: The branch; it is created if it does not exist, except for a pull request.
        subfolder: The folder within the repository, so that a repository can hold several adapters.
        create_pr: Open a pull request instead.
        token: The token for the Hub; the one of `hf auth login` when None.
        message: The message of the commit.

    Returns:
        The commit, with its address.

    Raises:
        ValueError: If the folder holds no fitted adapter of ours, or a name is not the name of a repository.
        PushError: If the Hub refuses, or does not answer.
    """
    parts = PurePosixPath(subfolder or "").parts
    if subfolder is not None and (not parts or parts[0] == "/" or ".." in parts or "\\" in subfolder):
        raise ValueError(f"subfolder={subfolder!r} is not a folder within a repository: write a name such as 'gender'.")
    folder, place, adapters = Path(folder), "/".join(parts), _fitted_adapters(Path(folder))

    def within(*parts: str) -> str:
        return str(PurePosixPath(place, *parts))

    def files(remote_text: RemoteText, repo: str) -> Iterator[CommitOperationAdd]:
        facts = cards.gather_facts(folder)
        facts.repo_id = repo
        if place:
            facts.subfolder = within(facts.subfolder or "")
            facts.others = {within(name): what for name, what in facts.others.items()}
        written = {"": facts}
        for name in filter(None, adapters):
            written[name] = replace(cards.gather_facts(folder / name), repo_id=repo, subfolder=within(name))
        # Recipes and training states are not uploaded.
        for name in adapters:
            for file in (CONFIG, WEIGHTS, *written[name].pictures):
                yield CommitOperationAdd(within(name, file), folder / name / file)
        for name, own in written.items():
            yield _add_readme(rendered(own), cards.text_of(folder / name / CARD), remote_text, within(name, CARD))
        if place and remote_text(CARD) is None:
            # The Hub shows the card at the top of a repository; a new repository would not have one.
            facts.pictures = {within(name): text for name, text in facts.pictures.items()}
            yield _add_readme(rendered(facts), None, remote_text, CARD)

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

    Arguments and errors are those of `push_adapter`. The folder's card replaces one that nobody has written into.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix in _MODEL_SUFFIXES)
    names = [name for name in names if not name.startswith(".") and name != CARD]
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{folder} holds no weights in safetensors: there is nothing to push.")

    def files(remote_text: RemoteText, repo: str) -> Iterator[CommitOperationAdd]:
        for name in names:
            yield CommitOperationAdd(name, folder / name)
        here = cards.text_of(folder / CARD)
        card = None if here is None else Card.read(here)
        if card is not None:
            yield _add_readme(replace(card, text=card.text.replace(FOLDER_PLACEHOLDER, repo)), here, remote_text, CARD)
        elif here is not None:
            yield CommitOperationAdd(CARD, here.encode("utf-8"))

    return _push(repo_id, files, message or f"Upload {folder.resolve().name}", private, revision, create_pr, token)


def _push(
    repo_id: str,
    files: Callable[[RemoteText, str], Iterator[CommitOperationAdd]],
    message: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    token: str | bool | None,
) -> CommitInfo:
    """Commit files to a repository, all of them or none."""
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    with explained_errors(repo_id):
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # A pull request is for a branch that exists, since its author may not be allowed to create one.
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
        head = api.model_info(repo, revision=revision).sha
        remote_text = functools.partial(_download_card, repo, head or revision, token)
        # The Hub answers 412 if somebody else commits in between: our README.md was not made from the latest one.
        return api.create_commit(
            repo, list(files(remote_text, repo)), commit_message=message, revision=revision, create_pr=create_pr,
            parent_commit=head,
        )  # fmt: skip


def _download_card(repo_id: str, revision: str | None, token: str | bool | None, name: str) -> str | None:
    """The present text of a card in a repository; None if the repository does not have it."""
    try:
        return cards.text_of(Path(hf_hub_download(repo_id, name, revision=revision, token=token)))
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None  # but if the Hub cannot be asked, an error: somebody's card would be overwritten


def _add_readme(card: Card, here: str | None, remote_text: RemoteText, path: str) -> CommitOperationAdd:
    """Put the card into the text that somebody has written, in the folder or on the Hub."""
    text, outcome, reason = cards.updated_readme(here if cards.has_own_text(here) else remote_text(path), card)
    if outcome == "left":
        raise ValueError(f"The {CARD} of the repository or of the folder cannot be kept: {reason}")
    return CommitOperationAdd(path, text.encode("utf-8"))


def _fitted_adapters(folder: Path) -> list[str]:
    """The names of the adapters' folders within a folder; an empty name if the folder is an adapter itself."""
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
    """The card that `push_to_hub` of transformers writes over the present one; for adapters of ours, write our card."""
    card: Any = original(repo_id, *args, **kwargs)
    token = inspect.signature(original).bind(repo_id, *args, **kwargs).arguments.get("token")
    original_save = card.save

    def save(filepath: Path | str) -> None:
        path = Path(filepath)
        if path.name != CARD or not cards.holds_adapters_only(path.parent):
            return original_save(filepath)
        # Of the cards in the folder and on the Hub, the one that somebody has written into is kept.
        pushed_from = PUSHED_FROM.get()
        local = cards.text_of(path if pushed_from is None else pushed_from / CARD)
        remote = str(card)
        if not cards.has_own_text(remote):
            with explained_errors(repo_id):  # transformers ignores the error if the Hub cannot be asked
                known = _download_card(repo_id, None, token, CARD)
            remote = known if known is not None and cards.has_own_text(known) else remote
        present = local if cards.has_own_text(local) else cards.with_metadata(remote, cards.text_of(path))
        tags = card.data.get("tags") or []
        cards.write_or_warn(path.parent, cards.write_card, repo_id=repo_id, present=present, tags=tags)
        for name in [name for name, _ in cards.own_adapters(path.parent) if name]:
            cards.write_or_warn(path.parent / name, cards.write_card, repo_id=repo_id, subfolder=name)

    card.save = save
    return card


def create_model_card(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Make the part of Trainer's card on the training run a part of our card."""
    output_dir = trainer.args.output_dir
    folder = Path(output_dir)
    if not trainer.is_world_process_zero() or not cards.holds_adapters_only(folder):
        original(*args, **kwargs)
        return
    with TemporaryDirectory() as empty_folder:
        # The folder is empty: if Trainer finds a card of PEFT, it calls a method that only a PeftModel has.
        object.__setattr__(trainer.args, "output_dir", empty_folder)
        try:
            original(*args, **kwargs)
        finally:
            object.__setattr__(trainer.args, "output_dir", output_dir)
        trainer_card = ModelCard(cards.text_of(Path(empty_folder, CARD)) or "")
    cards.write_or_warn(folder, _write_training_card, trainer_card, getattr(trainer, "hub_model_id", None))


def _write_training_card(folder: Path, trainer_card: ModelCard, repo_id: str | None) -> cards.WrittenCard:
    """Our card with the text on the training run, and with the metadata, of Trainer's card."""
    training = trainer_card.text.partition(_TRAINING)[2].partition("<!-- hf-erasure end")[0].strip()
    present = cards.with_metadata(cards.text_of(folder / CARD) or "---\n{}\n---\n", str(trainer_card))
    text = f"{_TRAINING}\n\n{training}" if training else ""
    return cards.write_card(folder, repo_id=repo_id, training=text, present=present)
