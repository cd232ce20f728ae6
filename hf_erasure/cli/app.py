"""The application that the commands add themselves to; an error that a user can mend is one line in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from huggingface_hub.errors import HTTPError
from typer.core import TyperGroup

from hf_erasure.fitting.processes import AnotherProcessFailed


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Turn the errors a user can mend into one line instead of a traceback."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever reads what is printed has seen enough, as in `| head`
    except (ValueError, ImportError, OSError, NotImplementedError, AnotherProcessFailed) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except HTTPError as error:
        # A connection that broke while something was loaded from the Hub.
        typer.echo(f"Error: the connection to the Hub broke ({type(error).__name__}: {error}). Try again.", err=True)
        raise typer.Exit(2) from error


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        with errors_as_sentences():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Erase a concept from a Hugging Face model, or change a feature of it, as a PEFT adapter.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
