"""The commands that run recipes of both kinds, and go on with what a run has left: measure, steer, read texts."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from hf_erasure.fitting.processes import Processes
from hf_erasure.hub import write_card
from hf_erasure.recipes.erasure import FIGURE_FILE, Recipe, check_output, read_recipe, run_recipe
from hf_erasure.recipes.gradiend import (
    NO_EDIT,
    check_gradiend_output,
    encode_texts,
    run_gradiend_recipe,
    select_gradiend_output,
)
from hf_erasure.recipes.gradiend_recipe import GradiendRecipe, read_gradiend_recipe
from hf_erasure.recipes.schema import json_schema

from .app import app

# Same weights, same data, same probes: what differs is only the order in which threads add floats.
SAME_ACCURACY, SAME_FEATURE = 1e-6, 1e-5

gradiend = typer.Typer(
    help="Read a feature off a model's gradients, and change its weights with it.", no_args_is_help=True
)
app.add_typer(gradiend, name="gradiend")

ProgressBars = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")]
ProcessCount = Annotated[
    int | None, typer.Option("--processes", help="Fail unless so many processes run, each of which takes a share.")
]
Folder = Annotated[Path, typer.Argument(help="The output folder of a finished `gradiend fit`.", exists=True)]


class Kind(str, enum.Enum):
    """What a recipe makes."""

    erasure = "erasure"
    gradiend = "gradiend"


def _overrides(example: str) -> Any:
    return typer.Argument(metavar="[KEY=VALUE]...", help=f"Replace entries, e.g. {example}")


@app.command()
def schema(
    kind: Annotated[Kind, typer.Argument(help="What the recipe makes.")],
    output: Annotated[Path | None, typer.Option("--output", help="Write a file instead of printing.")] = None,
) -> None:
    """Print the JSON schema of a recipe, by which editors complete keys, show what they mean and mark mistakes.

    Example: hf-erasure schema erasure --output recipe.schema.json
    """
    recipe = Recipe if kind is Kind.erasure else GradiendRecipe
    text = json.dumps(json_schema(recipe, f"A recipe of hf-erasure: {kind.value}"), indent=1, ensure_ascii=False)
    if output is None:
        typer.echo(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")


@app.command()
def fit(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: model, concept, labels, data, output.", exists=True)],
    overrides: Annotated[list[str] | None, _overrides("model=bert-base-uncased fit.pool=cls")] = None,
    progress: ProgressBars = True,
    processes: ProcessCount = None,
) -> None:
    """Fit an erasure as a recipe says, and print what a probe reads before and after.

    Writes the adapter folder (load it with model.load_adapter), a figure of the leakage by depth and the results to
    the recipe's `output`.

    Under torchrun each process takes its share of the data, all fit the same erasers, and the first writes them.

    Example: hf-erasure fit recipes/minilm-gender/recipe.yaml output=out/demo

    Example: torchrun --nproc_per_node 2 -m hf_erasure.cli fit recipe.yaml
    """
    plan, (report, table) = _run(read_recipe, run_recipe, recipe, overrides, progress, processes)
    typer.echo(f"\n{report}\n")
    typer.echo(f"Probe accuracy on the split {plan.data.test!r}, probes fitted on {plan.data.train!r}:\n")
    typer.echo(_rendered(table))
    typer.echo(f"\nadapter: {plan.output}\nfigure:  {Path(plan.output) / FIGURE_FILE}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The output folder of a finished `fit`.", exists=True)],
    progress: ProgressBars = True,
) -> None:
    """Load a fitted adapter from its folder and measure it again; fails if it does not reproduce its results."""
    now, drift = check_output(folder, progress)
    typer.echo(_rendered(now))
    _say_whether_same(drift, SAME_ACCURACY)


@gradiend.command("fit")
def fit_feature(
    recipe: Annotated[
        Path, typer.Argument(help="A YAML file: model, feature, classes, data, select, output.", exists=True)
    ],
    overrides: Annotated[list[str] | None, _overrides("model=gpt2 select.budget=0.05")] = None,
    progress: ProgressBars = True,
    processes: ProcessCount = None,
) -> None:
    """Learn a feature as a recipe says, choose an edit, and print what it does to test data.

    Writes the adapter folder (load it with model.load_adapter), the results as JSON, CSV and Markdown, a histogram of
    encoded values and the surface of all edits that were tried to the recipe's `output`.

    Example: hf-erasure gradiend fit recipes/gradiend_demo/recipe.yaml output=out/demo
    """
    plan, outcome = _run(read_gradiend_recipe, run_gradiend_recipe, recipe, overrides, progress, processes)
    correlations = ", ".join(f"{name} {value:.3f}" for name, value in outcome.correlation.items())
    typer.echo("\nCorrelation of the dense neuron on the choice data: " + correlations)
    left_out = {name: count for name, count in outcome.counts.items() if name.endswith("left out") and count}
    if left_out:
        typer.echo("Rows the tokenizer cannot serve: " + ", ".join(f"{n} {count}" for n, count in left_out.items()))
    typer.echo("\nOn the test data:\n")
    _show(outcome.messages, outcome.encoding, outcome.edits)
    typer.echo(f"\nadapter: {plan.output}, steered for {plan.select.goals[0]!r}")


@gradiend.command()
def evaluate(folder: Folder, progress: ProgressBars = True) -> None:
    """Load a fitted adapter from its folder and measure it again; fails if it does not reproduce its results."""
    now, drift = check_gradiend_output(folder, progress)
    _show(now.messages, now.encoding, now.edits)
    _say_whether_same(drift, SAME_FEATURE)


@gradiend.command()
def select(
    folder: Folder,
    goal: Annotated[str, typer.Argument(help="balance, bpi, fpi, mpi, or the name of the class to strengthen.")],
    budget: Annotated[
        float | None,
        typer.Option(help="Share by which language modelling may get worse; the recipe's if left out."),
    ] = None,
    progress: ProgressBars = True,
) -> None:
    """Choose the edit for another goal, print what it does to test data, and save the adapter with it.

    Example: hf-erasure gradiend select out/demo she --budget 0.01
    """
    outcome = select_gradiend_output(folder, goal, budget, progress)
    write_card(folder)
    _show(outcome.messages, outcome.edits.loc[[NO_EDIT, goal]])
    typer.echo(f"\nadapter: {folder}, steered for {goal!r}")


@gradiend.command()
def encode(
    folder: Folder,
    data: Annotated[
        str, typer.Argument(help="A file or Hub id with `text`, and `factual` where the text has a [FEATURE] slot.")
    ],
    output: Annotated[Path | None, typer.Option(help="Where the CSV goes; printed if left out.")] = None,
    split: Annotated[str | None, typer.Option(help="The data set's split, where it has several.")] = None,
    progress: ProgressBars = True,
) -> None:
    """Read the feature off texts: a CSV with a value per text and pair of classes, +1 the first class, −1 the second.

    Example: hf-erasure gradiend encode out/demo texts.csv --output values.csv
    """
    values, plain = encode_texts(folder, data, split, progress)
    text = values.to_csv(output, index=False, float_format="%.6f")
    if plain:
        typer.echo(f"{plain} texts have no [FEATURE] slot; each was read at one of its tokens.", err=True)
    typer.echo(f"{len(values)} texts: {output}" if output is not None else text, nl=output is not None)


def _run(
    read: Callable[..., Any], run: Callable[..., Any], path: Path, overrides: list[str] | None, progress: bool,
    processes: int | None,
) -> tuple[Any, Any]:  # fmt: skip
    """A recipe and what its run finds; processes that are not the first end here."""
    count = Processes().count
    if processes is not None and count < processes:
        raise ValueError(
            f"{processes} processes were asked for, and {count} runs. Start them with torchrun, also where "
            f"there is no GPU: torchrun --nproc_per_node {processes} -m hf_erasure.cli …"
        )
    recipe = read(path, overrides or [])
    outcome = run(recipe, progress)
    if outcome is None:
        raise typer.Exit
    write_card(recipe.output)  # once more, since the results of the recipe lie there now
    return recipe, outcome


def _show(messages: list[str], *tables: pd.DataFrame) -> None:
    typer.echo("\n\n".join(_rendered(table) for table in tables if len(table)))
    for message in messages:
        typer.echo(f"Warning: {message}", err=True)


def _rendered(table: pd.DataFrame) -> str:
    """A table as text, three digits behind the point; the steps of a grid as they are written."""
    steps = {name: table[name].map("{:g}".format) for name in ("h", "α") if name in table}
    return table.assign(**steps).to_string(float_format="{:.3f}".format)


def _say_whether_same(drift: float, most: float) -> None:
    """Say whether the results that a run has written differ by `most` at most, and end with status 1 if not."""
    verdict = "same" if drift <= most else "NOT THE SAME"
    typer.echo(f"\nlargest difference from the results written when it was fitted: {drift:.1e}: {verdict}")
    if verdict != "same":
        raise typer.Exit(1)
