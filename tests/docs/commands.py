"""The commands of shell blocks: checks without running them, and running those of `hf-erasure`."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command
from typer.testing import CliRunner

from hf_erasure.cli import app
from hf_erasure.recipes.erasure import read_recipe
from hf_erasure.recipes.gradiend_recipe import read_gradiend_recipe
from tests.docs.blocks import Block, PageError

ROOT = Path(__file__).resolve().parents[2]
OURS = "hf-erasure"
ENVIRONMENT = re.compile(r"[A-Z][A-Z_0-9]*=.*")


def commands_of(block: Block) -> list[list[str]]:
    """The words of every command, without comments, prompts, variables before it and a file for its output."""
    text = block.code.replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        try:
            words = shlex.split(line.removeprefix("$ "), comments=True)
        except ValueError as error:
            raise PageError(f"{block.where}: {line!r}: {error}") from error
        while words and ENVIRONMENT.fullmatch(words[0]):
            words = words[1:]
        if words[-2:-1] == [">"]:  # the shell writes what the command prints into a file
            words = words[:-2]
        if words:
            found.append(words)
    return found


def check_command(words: list[str], where: str) -> None:
    """Refuse a command that this project does not have, or that has other options.

    Raises:
        PageError: If a command, an argument or an option is unknown.
    """
    head, rest = words[0], words[1:]
    if head == OURS:
        check_ours(rest, where)
    elif head in ("python", "torchrun", "accelerate"):
        _check_python(words, where)
    elif head == "make":
        _check_target(rest, where)
    elif head == "pip":
        _check_install(rest, where)
    elif (head, rest[:1]) in (("git", ["clone"]), ("hf", ["auth"])) or head in ("cd", "export"):
        return
    else:
        raise PageError(f"{where}: the tests of the documentation do not know what {head!r} is; teach them or leave it")


def check_ours(words: list[str], where: str) -> None:
    """Parse the arguments of `hf-erasure` as the command itself does; their files need not exist."""
    command: Any = get_command(app)
    path, rest = [OURS], list(words)
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            if "--help" in rest or "--version" in rest:
                return
            raise PageError(f"{where}: `{' '.join([*path, *rest])}`: there are {', '.join(command.commands)}")
        path.append(rest[0])
        command, rest = command.commands[rest[0]], rest[1:]
    if "--help" in rest:
        return
    with _where_all_exists(rest):
        try:
            command.make_context(" ".join(path), list(rest)).close()
        except Exception as error:
            said = error.format_message() if hasattr(error, "format_message") else str(error)
            raise PageError(f"{where}: `{' '.join([*path, *rest])}`: {said}") from error
    _check_recipe(path, rest, where)


@contextmanager
def _where_all_exists(words: list[str]) -> Iterator[None]:
    """Change into a temporary folder that has a folder for every word, since some arguments have to exist."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        for word in words:
            if not word.startswith("-") and "=" not in word and not Path(word).is_absolute():
                Path(folder, word).mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _check_recipe(path: list[str], rest: list[str], where: str) -> None:
    """If the recipe is in the repository, check the overrides too."""
    if path[-1] != "fit" or not rest or not (ROOT / rest[0]).is_file():
        return
    overrides = [word for word in rest[1:] if "=" in word and not word.startswith("-")]
    read = read_gradiend_recipe if "gradiend" in path else read_recipe
    try:
        read(ROOT / rest[0], overrides)
    except ValueError as error:
        raise PageError(f"{where}: {error}") from error


def _check_python(words: list[str], where: str) -> None:
    """Check `python FILE`, `python -m hf_erasure.cli …`, and launchers of either."""
    if "-m" in words and words.index("-m") + 1 < len(words):
        module, rest = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        if module == "hf_erasure.cli":
            check_ours(rest, where)
        elif module not in ("build", "venv", "pytest"):
            raise PageError(f"{where}: `python -m {module}` is not known to the tests of the documentation")
        return
    scripts = [word for word in words[1:] if word.endswith(".py")]
    if not scripts and "-c" not in words:
        raise PageError(f"{where}: `{' '.join(words)}` runs no file and no module")
    if "recipes/" in " ".join(scripts) or "benchmarks/" in " ".join(scripts):
        for word in words[1:]:
            if word.startswith(("recipes/", "benchmarks/")) and not (ROOT / word).exists():
                raise PageError(f"{where}: there is no {word}")


def _check_target(rest: list[str], where: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = [word for word in rest if "=" not in word and not word.startswith("-")]
    for word in asked:
        if word not in targets:
            raise PageError(f"{where}: the Makefile has no target {word!r}")


def _check_install(rest: list[str], where: str) -> None:
    """Check the extras that an installation names."""
    if rest[:1] != ["install"]:
        raise PageError(f"{where}: `pip {' '.join(rest)}` installs nothing")
    extras = metadata(OURS).get_all("Provides-Extra") or []
    for word in rest[1:]:
        named = re.fullmatch(r"(?:hf-erasure|\.)\[([a-z,]+)\]", word)
        for extra in named[1].split(",") if named else []:
            if extra not in extras:
                raise PageError(f"{where}: there is no extra {extra!r}")


def run_ours(words: list[str], where: str) -> str:
    """Run `hf-erasure …` in this process, and return what it prints.

    Raises:
        PageError: If it ends with an error.
    """
    result = CliRunner().invoke(app, words)
    if result.exit_code:
        raise PageError(f"{where}: `{OURS} {' '.join(words)}` ends with {result.exit_code}: {result.output}") from (
            None if isinstance(result.exception, SystemExit) else result.exception
        )
    return str(result.stdout)


def check_yaml(block: Block, folder: Path) -> None:
    """Read a block as a recipe, of an erasure or of a feature.

    Raises:
        PageError: If it is not a recipe, or has unknown keys.
    """
    try:
        content = yaml.safe_load(block.code)
    except yaml.YAMLError as error:
        raise PageError(f"{block.where}: {error}") from error
    path = folder / "recipe_of_the_page.yaml"
    path.write_text(block.code, encoding="utf-8")
    try:
        (read_gradiend_recipe if "feature" in content else read_recipe)(path)
    except (ValueError, TypeError) as error:
        raise PageError(f"{block.where}: {error}") from error
