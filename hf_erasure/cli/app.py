"""The application that the commands of this package add themselves to."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Erase a concept from a Hugging Face model, or change a feature of it, as a PEFT adapter.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def main() -> None:
    """Erase a concept from a Hugging Face model, or change a feature of it, as a PEFT adapter."""
