"""The application that the commands add themselves to, and what they share: options, verdicts, errors as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from huggingface_hub.errors import HTTPError

from hf_erasure.fitting.processes import AnotherProcessFailed, Processes

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    help="Erase a concept from a Hugging Face model, or change a feature of it, as a PEFT adapter.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ProgressBars = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")]
ProcessCount = Annotated[
    int | None, typer.Option("--processes", help="Fail unless so many processes run, each of which takes a share.")
]


@app.callback()
def main() -> None:
    """Erase a concept from a Hugging Face model, or change a feature of it, as a PEFT adapter."""


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


def check_count(asked: int | None) -> None:
    """Raise a `ValueError` where fewer processes run this command than were asked for."""
    count = Processes().count
    if asked is not None and count < asked:
        raise ValueError(
            f"{asked} processes were asked for, and {count} runs. Start them with torchrun, also where "
            f"there is no GPU: torchrun --nproc_per_node {asked} -m hf_erasure.cli …"
        )


def rendered(table: pd.DataFrame) -> str:
    """A table as text, three digits behind the point; the steps of a grid as they are written."""
    steps = {name: table[name].map("{:g}".format) for name in ("h", "α") if name in table}
    return table.assign(**steps).to_string(float_format="{:.3f}".format)


def say_whether_same(drift: float, most: float) -> None:
    """Say whether a finished run was reproduced, and end with status 1 where it was not.

    Args:
        drift: The largest difference from what was written.
        most: The difference that rounding explains.
    """
    verdict = "same" if drift <= most else "NOT THE SAME"
    typer.echo(f"\nlargest difference from the results written when it was fitted: {drift:.1e}: {verdict}")
    if verdict != "same":
        raise typer.Exit(1)
