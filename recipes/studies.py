"""The parts that all studies share: settings from a file, one outcome for each run, and the three files they write."""

from __future__ import annotations

import functools
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import typer

from hf_erasure.cli.app import errors_as_sentences
from hf_erasure.recipes.schema import check_section, read_content

# The folder with models and data of the studies, unless the environment names another by this variable.
ASSETS = Path(__file__).parents[1].parent / "shared" / "assets"
VARIABLE = "HF_ERASURE_TEST_ASSETS"

Settings = TypeVar("Settings")
Outcome = TypeVar("Outcome")


def read_settings(kind: type[Settings], path: str | Path, overrides: Iterable[str], expected: str) -> Settings:
    """Read a study's file, and the settings that follow it on the command line, into the dataclass `kind`.

    Args:
        kind: The dataclass of the study's settings.
        path: The file.
        overrides: Settings of the form `key=value`.
        expected: Some of its keys, for the message when the file is not a recipe.

    Raises:
        ValueError: If the file is not a recipe, or a key is unknown.
    """
    os.environ.setdefault(VARIABLE, str(ASSETS))
    content = read_content(path, overrides, expected)
    check_section(content, kind)
    return kind(**{key: os.path.expandvars(v) if isinstance(v, str) else v for key, v in content.items()})


def start(main: Callable[[Path, list[str]], None]) -> None:
    """Run the command of a study: a settings file, and settings that follow it; an error is one line.

    Raises:
        typer.BadParameter: If settings name files in the folder of models and data, and there is no such folder.
    """

    @functools.wraps(main)
    @errors_as_sentences()
    def checked(settings_file: Path, overrides: list[str]) -> None:
        folder, content = os.environ.setdefault(VARIABLE, str(ASSETS)), read_content(settings_file, overrides, "keys")
        needing = [key for key, value in content.items() if f"${VARIABLE}" in json.dumps(value)]
        if needing and not Path(folder).is_dir():
            raise typer.BadParameter(
                f"there is no folder {folder} with the models and data of {', '.join(needing)}, which are not in the "
                f"repository. Set {VARIABLE} to such a folder, or set {needing[0]}=… after the file."
            )
        main(settings_file, overrides)

    typer.run(checked)


def keep(outcomes: Sequence[Any], folder: str | Path) -> None:
    """Write `results.json`: the dataclass of each outcome."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(outcome) for outcome in outcomes], indent=1)
    (Path(folder) / "results.json").write_text(text + "\n", encoding="utf-8")


def run(
    runs: Mapping[str, Callable[[], Outcome]],
    output: str | Path,
    report: Callable[[list[Outcome]], str],
    figure: Callable[[list[Outcome], Path], None],
) -> None:
    """Do every run and write `results.json` (after each), `results.md` and `figure.png`; also print the text.

    Args:
        runs: The message when a run begins, such as `"seed 0"`, and the run.
        output: The folder.
        report: All outcomes as Markdown.
        figure: Draws them into a file.
    """
    outcomes: list[Outcome] = []
    for said, one in runs.items():
        typer.echo(said, err=True)
        outcomes.append(one())
        keep(outcomes, output)
    text = report(outcomes)
    (Path(output) / "results.md").write_text(text, encoding="utf-8")
    figure(outcomes, Path(output) / "figure.png")
    typer.echo(text)


def command_line(study: str, settings_file: Path, overrides: Iterable[str]) -> str:
    """The command that makes these results, for `results.md`."""
    return shlex.join(["python", f"recipes/{study}/study.py", str(settings_file), *overrides])
