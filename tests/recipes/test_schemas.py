"""The JSON schemas in `recipes/schemas` are those of the code, and accept what the reader of recipes accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from hf_erasure.cli import app

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SHIPPED = sorted(RECIPES.glob("*/recipe.yaml"))
LINE = "# yaml-language-server: $schema="


def schema_for(recipe: Path) -> dict[str, Any]:
    """The schema that the second line of a recipe names; the first line is the command that runs it."""
    named = recipe.read_text(encoding="utf-8").splitlines()[1]
    assert named.startswith(LINE)
    found: dict[str, Any] = json.loads((recipe.parent / named.removeprefix(LINE)).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("kind", ["erasure", "gradiend"])
def test_a_shipped_schema_is_what_the_command_prints(kind: str) -> None:
    printed = CliRunner().invoke(app, ["recipe", "schema", kind])
    assert printed.exit_code == 0
    # `hf-erasure recipe schema KIND > recipes/schemas/KIND.json` writes the file anew.
    assert printed.stdout == (RECIPES / "schemas" / f"{kind}.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.parent.name)
def test_a_shipped_recipe_fits_its_schema(recipe: Path) -> None:
    jsonschema.validate(yaml.safe_load(recipe.read_text(encoding="utf-8")), schema_for(recipe))


@pytest.mark.parametrize(
    "wrong",
    [{"fit": {"batch_size": "many"}}, {"fit": {"pool": "average"}}, {"data": 5}, {"cocnept": "gender"}, {"labels": 1}],
)
def test_an_editor_marks_what_the_reader_refuses(wrong: dict[str, Any]) -> None:
    recipe = RECIPES / "minilm-gender" / "recipe.yaml"
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | wrong, schema_for(recipe))
