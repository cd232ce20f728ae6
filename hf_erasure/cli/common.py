"""What all commands share: tables as text, and errors as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from huggingface_hub.errors import HTTPError

from hf_erasure.fitting.processes import AnotherProcessFailed

if TYPE_CHECKING:
    import pandas as pd


def rendered(table: pd.DataFrame) -> str:
    """A table as text, three digits behind the point."""
    return table.to_string(float_format=lambda value: f"{value:.3f}")


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Turn the errors a user can mend into one line instead of a traceback."""
    try:
        yield
    except (ValueError, ImportError, OSError, NotImplementedError, AnotherProcessFailed) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except HTTPError as error:
        # A connection that broke while something was loaded from the Hub.
        typer.echo(f"Error: the connection to the Hub broke ({type(error).__name__}: {error}). Try again.", err=True)
        raise typer.Exit(2) from error
