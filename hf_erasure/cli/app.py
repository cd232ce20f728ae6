"""The application that has all commands; in each of them an error that a user can correct is printed as one line.

The modules of commands import nothing that is slow, so that help is shown at once: `lazy` names the modules of the
package that do the work. `hf_erasure_command` starts the command without importing the package.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperGroup

from hf_erasure._version import __version__

# The errors for a broken connection and for a process that ended, by name: importing their classes takes seconds.
_CONNECTION_ERROR, _PROCESS_ERROR = "HTTPError", "AnotherProcessFailed"


class _LazyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        """An attribute of the module; the package is imported before the module, if it is not imported yet."""
        package: Any = sys.modules["hf_erasure"]
        if "verify_adapter" not in vars(package):
            package.__spec__.loader.exec_module(package)
        return getattr(importlib.import_module(self.__name__), name)


def lazy(*names: str) -> list[Any]:
    """Modules of the package; each is imported when one of its attributes is first used."""
    return [_LazyModule(f"hf_erasure.{name}") for name in names]


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Print an error that a user can correct as one line instead of a traceback."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the output has closed it, as in `| head`
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if isinstance(error, (ValueError, ImportError, OSError, NotImplementedError)) or _PROCESS_ERROR in kinds:
            message = f"{error}"
        elif _CONNECTION_ERROR in kinds:
            # A connection that broke while a file was loaded from the Hub.
            message = f"the connection to the Hub broke ({type(error).__name__}: {error}). Try again."
        else:
            raise
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(2) from error


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed; a warning is shown without the line of code that gave it."""
        format_before = warnings.formatwarning
        warnings.formatwarning = lambda message, category, *_, **__: f"{category.__name__}: {message}\n"
        try:
            with errors_as_sentences():
                return super().invoke(ctx)
        finally:
            warnings.formatwarning = format_before


HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, context_settings=HELP,
)  # fmt: skip


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-erasure {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Erase a concept from a Hugging Face model, or change a feature of it, as a PEFT adapter."""
