"""The command that writes what an editor needs to complete and check recipes."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated

import typer

from hf_erasure.recipes.erasure import Recipe
from hf_erasure.recipes.gradiend import GradiendRecipe
from hf_erasure.recipes.schema import json_schema

from .app import app, errors_as_sentences


class Kind(str, enum.Enum):
    """What a recipe makes."""

    erasure = "erasure"
    gradiend = "gradiend"


@app.command()
def schema(
    kind: Annotated[Kind, typer.Argument(help="What the recipe makes.")],
    output: Annotated[Path | None, typer.Option("--output", help="Write a file instead of printing.")] = None,
) -> None:
    """Print the JSON schema of a recipe, by which editors complete keys, show what they mean and mark mistakes.

    Example: hf-erasure schema erasure --output recipe.schema.json
    """
    recipe = {Kind.erasure: Recipe, Kind.gradiend: GradiendRecipe}[kind]
    text = json.dumps(json_schema(recipe, f"A recipe of hf-erasure: {kind.value}"), indent=1, ensure_ascii=False)
    if output is None:
        typer.echo(text)
        return
    with errors_as_sentences():
        output.write_text(text + "\n", encoding="utf-8")
