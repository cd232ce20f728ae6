"""The commands `hf-erasure gradiend …`: learn a feature from gradients, measure it, steer it, read it off texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_erasure.hub import write_card
from hf_erasure.recipes.gradiend import (
    GradiendOutcome,
    check_gradiend_output,
    encode_texts,
    read_gradiend_recipe,
    run_gradiend_recipe,
    select_gradiend_output,
)

from .app import ProcessCount, ProgressBars, app, check_count, errors_as_sentences, rendered, say_whether_same

# Sums of the same floats, in an order that threads decide.
SAME = 1e-5

commands = typer.Typer(
    help="Read a feature off a model's gradients, and change its weights with it.", no_args_is_help=True
)
app.add_typer(commands, name="gradiend")

Folder = Annotated[Path, typer.Argument(help="The output folder of a finished `gradiend fit`.", exists=True)]


@commands.command()
def fit(
    recipe: Annotated[
        Path, typer.Argument(help="A YAML file: model, feature, classes, data, select, output.", exists=True)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace entries, e.g. model=gpt2 select.budget=0.05"),
    ] = None,
    progress: ProgressBars = True,
    processes: ProcessCount = None,
) -> None:
    """Learn a feature as a recipe says, choose an edit, and print what it does to test data.

    Writes the adapter folder (load it with model.load_adapter), the results as JSON, CSV and Markdown, a histogram of
    encoded values and the surface of all edits that were tried to the recipe's `output`.

    Example: hf-erasure gradiend fit recipes/gradiend_demo/recipe.yaml output=out/demo
    """
    with errors_as_sentences():
        check_count(processes)
        plan = read_gradiend_recipe(recipe, overrides or [])
        outcome = run_gradiend_recipe(plan, progress)
        if outcome is None:
            return  # the first process goes on
        write_card(plan.output)  # once more, since the results of the recipe lie there now
    correlations = ", ".join(f"{name} {value:.3f}" for name, value in outcome.correlation.items())
    typer.echo("\nCorrelation of the dense neuron on the choice data: " + correlations)
    left_out = {name: count for name, count in outcome.counts.items() if name.endswith("left out") and count}
    if left_out:
        typer.echo("Rows the tokenizer cannot serve: " + ", ".join(f"{n} {count}" for n, count in left_out.items()))
    typer.echo("\nOn the test data:\n")
    _show(outcome)
    typer.echo(f"\nadapter: {plan.output}, steered for {plan.select.goals[0]!r}")


@commands.command()
def evaluate(folder: Folder, progress: ProgressBars = True) -> None:
    """Load a fitted adapter from its folder and measure it again; fails if it does not reproduce its results."""
    with errors_as_sentences():
        now, drift = check_gradiend_output(folder, progress)
    _show(now)
    say_whether_same(drift, SAME)


@commands.command()
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
    with errors_as_sentences():
        outcome = select_gradiend_output(folder, goal, budget, progress)
        write_card(folder)
    typer.echo(rendered(outcome.edits))
    _warn(outcome)
    typer.echo(f"\nadapter: {folder}, steered for {goal!r}")


@commands.command()
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
    with errors_as_sentences():
        values, plain = encode_texts(folder, data, split, progress)
        text = values.to_csv(output, index=False, float_format="%.6f")
    if plain:
        typer.echo(f"{plain} texts have no [FEATURE] slot; each was read at one of its tokens.", err=True)
    typer.echo(f"{len(values)} texts: {output}" if output is not None else text, nl=output is not None)


def _show(outcome: GradiendOutcome) -> None:
    if len(outcome.encoding):
        typer.echo(rendered(outcome.encoding) + "\n")
    typer.echo(rendered(outcome.edits))
    _warn(outcome)


def _warn(outcome: GradiendOutcome) -> None:
    for message in outcome.messages:
        typer.echo(f"Warning: {message}", err=True)
