"""What goes wrong between a user and the Hub, in a sentence that says what to do about it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

from .markdown import plain

_REMEDIES = {
    401: "Log in with `hf auth login`, or give a valid token.",
    403: "Use a token that may write there, or open a pull request (create_pr=True, --create-pr), which everybody may.",
    404: "Is the name right, and may this token see the repository?",
    409: "Somebody else changes the repository at the same time: try again.",
    412: "Somebody else changes the repository at the same time: try again.",
    429: "Wait a little, and try again.",
}
_AGAIN = "Try again; a second push sends only what has not arrived."
_LONGEST = 400
Result = TypeVar("Result")


class PushError(OSError):
    """A push that failed. What the client itself said is its `__cause__`.

    Attributes:
        status: The HTTP status; None where there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def explained(push: Callable[..., Result]) -> Callable[..., Result]:
    """Wrap a function that pushes to the repository which is its first argument.

    The client's own exceptions are of several types, of which some are no `OSError`, over several lines, and about
    addresses that the user has never seen.
    """

    @functools.wraps(push)
    def explaining(repo_id: str, *args: Any, **kwargs: Any) -> Result:
        try:
            return push(repo_id, *args, **kwargs)
        except (HTTPError, RuntimeError, LocalEntryNotFoundError) as error:
            # What went wrong with one file has its reason as the cause.
            reason = error if isinstance(error, HTTPError) else error.__cause__
            if not isinstance(reason, HTTPError):
                raise
            what = f" ({plain(error).rstrip('.')})" if isinstance(error, RuntimeError) else ""
            raise PushError(f"Pushing to {repo_id!r} failed{what}: {reason_of(reason)}", _status_of(reason)) from error

    return explaining


def reason_of(error: HTTPError) -> str:
    """Why a request failed, and what to do."""
    status = _status_of(error)
    if status is None:
        return f"the connection to the Hub broke ({type(error).__name__}: {plain(error, _LONGEST)}). {_AGAIN}"
    said = plain(getattr(error, "server_message", None) or "no reason given", _LONGEST)
    remedy = _REMEDIES.get(status, f"The trouble is the Hub's. {_AGAIN}" if status >= 500 else "")
    return f"the Hub answered {status} ({said}). {remedy}".rstrip()


def _status_of(error: HTTPError) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
