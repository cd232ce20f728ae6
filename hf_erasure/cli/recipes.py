"""The commands that run recipes of both kinds, and those that use a finished run: measure, steer, read texts."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import HELP, app, lazy

if TYPE_CHECKING:
    import pandas as pd

    from hf_erasure import hub
    from hf_erasure.adapters.common import config as configs
    from hf_erasure.fitting import processes as shared
    from hf_erasure.recipes import erasure, from_data, gradiend_recipe
    from hf_erasure.recipes import gradiend as feature
    from hf_erasure.recipes import run as runs
    from hf_erasure.recipes import schema as schemas
else:
    hub, shared, erasure, from_data = lazy("hub", "fitting.processes", "recipes.erasure", "recipes.from_data")
    configs, runs = lazy("adapters.common.config", "recipes.run")
    gradiend_recipe, feature, schemas = lazy("recipes.gradiend_recipe", "recipes.gradiend", "recipes.schema")

# The largest drift of the same weights, data and probes: only the order differs in which threads add floats.
SAME_ACCURACY, SAME_FEATURE = 1e-6, 1e-5

gradiend = typer.Typer(
    help="Learn a feature from a model's gradients, and edit the weights by it.", no_args_is_help=True,
    context_settings=HELP,
)  # fmt: skip
recipe = typer.Typer(help="Commands for recipes, the YAML files of `fit`.", no_args_is_help=True, context_settings=HELP)
app.add_typer(gradiend, name="gradiend")
app.add_typer(recipe, name="recipe")

ProgressBars = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")]
ProcessCount = Annotated[
    int | None, typer.Option("--processes", help="Fail unless this many processes run; each takes a share.")
]
Folder = Annotated[Path, typer.Argument(help="The output folder of a finished `gradiend fit`.", exists=True)]


class Kind(str, enum.Enum):
    """The kind of adapter that a recipe makes."""

    erasure = "erasure"
    gradiend = "gradiend"


Source = Annotated[str, typer.Argument(metavar="RECIPE.yaml|MODEL", help="A recipe, or a model with data after it.")]
Out = Annotated[str | None, typer.Option(help="The folder to write.")]


def _argument(data: str, example: str) -> Any:
    return typer.Argument(metavar="[DATA] [KEY=VALUE]...", help=f"{data} Then entries of the recipe, e.g. {example}")


@recipe.command()
def schema(kind: Annotated[Kind, typer.Argument(help="The kind of adapter that the recipe makes.")]) -> None:
    """Print the JSON schema of a recipe, with which editors complete keys, show their meaning and mark mistakes.

    Example: hf-erasure recipe schema erasure > recipe.schema.json
    """
    recipe_class = erasure.Recipe if kind is Kind.erasure else gradiend_recipe.GradiendRecipe
    typer.echo(json.dumps(schemas.json_schema(recipe_class), indent=1, ensure_ascii=False))


@app.command()
def fit(
    source: Source,
    rest: Annotated[
        list[str] | None, _argument("CSV, TSV, JSON lines, Parquet, a folder or a Hub data set.", "fit.batch_size=16")
    ] = None,
    label: Annotated[str | None, typer.Option(help="The column of the concept that is erased.")] = None,
    text: Annotated[str | None, typer.Option(help="The column of the text, if it is not clear.")] = None,
    keep: Annotated[str | None, typer.Option(help="A column that should stay readable; it is measured, too.")] = None,
    test: Annotated[str | None, typer.Option(help="A share to set aside, such as 0.2, or the name of a split.")] = None,
    group: Annotated[str | None, typer.Option(help="No value of this column is both fitted on and measured.")] = None,
    pool: Annotated[str | None, typer.Option(help="The vectors to erase from: tokens, mean, cls or last.")] = None,
    targets: Annotated[str | None, typer.Option(help="Where to erase: norms, readers, writers, or modules.")] = None,
    counterfactual_words: Annotated[
        str | None, typer.Option(help="Also make counterfactuals with these words: english_gender or a table's path.")
    ] = None,
    pair_rank: Annotated[int | None, typer.Option(help="Directions of texts and counterfactuals to add.")] = None,
    name: Annotated[str | None, typer.Option(help="The configuration of a Hub data set.")] = None,
    out: Out = None,
    progress: ProgressBars = True,
    processes: ProcessCount = None,
) -> None:
    """Fit an erasure, from a model and labelled texts or by a recipe, and say what a probe reads before and after.

    Writes the adapter folder (load it with model.load_adapter), a figure of the leakage by depth, the results and the
    recipe that was run. Under torchrun each process takes its share of the data, and the first writes.

    Example: hf-erasure fit sentence-transformers/all-MiniLM-L6-v2 people.csv --label gender

    Example: hf-erasure fit recipes/minilm-gender/recipe.yaml output=out/demo

    Example: torchrun --nproc_per_node 2 -m hf_erasure.cli fit recipe.yaml
    """
    options: dict[str, Any] = {
        "label": label, "text": text, "keep": keep, "test": test, "group": group, "pool": pool, "targets": targets,
        "counterfactual_words": counterfactual_words, "pair_rank": pair_rank, "name": name, "out": out,
    }  # fmt: skip

    def make(data: str, overrides: list[str]) -> Any:
        if label is None:
            raise ValueError("Which column is the concept? Write --label COLUMN.")
        return from_data.erasure_recipe(source, data, overrides=overrides, **options)

    plan, lines = _read_plan(source, rest or [], erasure.read_recipe, make, options)
    report, table = _run_recipe(plan, erasure.run_recipe, lines, progress, processes)
    typer.echo(f"\n{report}\n")
    typer.echo(f"Probe accuracy on the split {plan.data.test!r}, probes fitted on {plan.data.train!r}:\n")
    typer.echo(_table_text(table))
    _print_outcome(
        plan, f"{plan.output}\nfigure:  {Path(plan.output) / erasure.FIGURE_FILE}", erasure.in_plain_words(plan, table)
    )


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The output folder of a finished `fit`.", exists=True)],
    progress: ProgressBars = True,
) -> None:
    """Load a fitted adapter from its folder and measure it again; fails if it does not reproduce its results."""
    now, drift = erasure.check_output(folder, progress)
    typer.echo(_table_text(now))
    _print_drift(drift, SAME_ACCURACY)


@gradiend.command("fit")
def fit_feature(
    source: Source,
    rest: Annotated[
        list[str] | None, _argument("Sentences: a text file, one a line, or a column `text`.", "select.budget=0.05")
    ] = None,
    words: Annotated[
        list[str] | None, typer.Option(help="A word of each class, e.g. he,she; repeat it for more words.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Names of the classes; the first words by default.")] = None,
    out: Out = None,
    progress: ProgressBars = True,
    processes: ProcessCount = None,
) -> None:
    """Learn a feature, from a model and sentences or by a recipe, choose an edit, and say what it does to test data.

    Writes the adapter folder (load it with model.load_adapter), the results as JSON and CSV, a histogram of encoded
    values, the surface of all edits that were tried, and the recipe that was run.

    Example: hf-erasure gradiend fit bert-base-uncased stories.txt --words he,she

    Example: hf-erasure gradiend fit recipes/gradiend_demo/recipe.yaml output=out/demo
    """

    def make(data: str, overrides: list[str]) -> Any:
        if not words:
            raise ValueError("Which words tell the classes apart? Write one of each, as in --words he,she.")
        return from_data.feature_recipe(source, data, words, classes, out, overrides)

    options = {"words": words, "classes": classes, "out": out}
    plan, lines = _read_plan(source, rest or [], gradiend_recipe.read_gradiend_recipe, make, options)
    outcome = _run_recipe(plan, feature.run_gradiend_recipe, lines, progress, processes)
    typer.echo("\nRows: " + ", ".join(f"{name} {count}" for name, count in outcome.counts.items() if count))
    typer.echo("\nOn the test data:\n")
    _print_tables(outcome.encoding, outcome.edits)
    _print_outcome(plan, f"{plan.output}, {outcome.steered}", outcome.in_plain_words())


@gradiend.command()
def evaluate(folder: Folder, progress: ProgressBars = True) -> None:
    """Load a fitted adapter from its folder and measure it again; fails if it does not reproduce its results."""
    now, drift = feature.check_gradiend_output(folder, progress)
    _print_tables(now.encoding, now.edits)
    _print_drift(drift, SAME_FEATURE)


@gradiend.command()
def select(
    folder: Folder,
    goal: Annotated[str, typer.Argument(help="balance, bpi, fpi, mpi, or the name of the class to strengthen.")],
    budget: Annotated[
        float | None,
        typer.Option(help="The share by which language modelling may get worse; by default the recipe's."),
    ] = None,
    progress: ProgressBars = True,
) -> None:
    """Choose the edit for another goal, print what it does to test data, and save the adapter with it.

    Example: hf-erasure gradiend select out/demo she --budget 0.01
    """
    outcome = feature.select_gradiend_output(folder, goal, budget, progress)
    hub.write_card(folder)
    _print_tables(outcome.edits.loc[[feature.NO_EDIT, goal]])
    typer.echo(f"\nadapter: {folder}, {outcome.steered}")


@gradiend.command()
def encode(
    folder: Folder,
    data: Annotated[
        str, typer.Argument(help="A file or Hub id with `text`, and `factual` where the text has a [FEATURE] slot.")
    ],
    output: Annotated[Path | None, typer.Option(help="The CSV file to write; by default it is printed.")] = None,
    split: Annotated[str | None, typer.Option(help="The data set's split, if it has several.")] = None,
    progress: ProgressBars = True,
) -> None:
    """Write a CSV with the feature of each text: a value per pair of classes, +1 the first class, −1 the second.

    Example: hf-erasure gradiend encode out/demo texts.csv --output values.csv
    """
    if output is not None:
        runs.refuse_unwritable(output.parent)
        output.parent.mkdir(parents=True, exist_ok=True)
    values, plain = feature.encode_texts(folder, data, split, progress)
    text = values.to_csv(output, index=False, float_format="%.6f")
    if plain:
        typer.echo(f"Texts without a [FEATURE] slot, each read at one of its tokens: {plain}", err=True)
    typer.echo(f"{configs.number_of(len(values), 'text')}: {output}" if output else text, nl=output is not None)


def _read_plan(
    source: str, rest: list[str], read: Callable[..., Any], make: Callable[..., Any], options: dict[str, Any]
) -> tuple[Any, list[str]]:
    """The recipe to run, from a file or from a model and data, and lines about the data."""
    overrides = [word for word in rest if "=" in word and not Path(word).exists()]
    data = [word for word in rest if word not in overrides]
    if source.endswith((".yaml", ".yml")):
        if not Path(source).is_file():
            raise FileNotFoundError(f"There is no recipe {source}.")
        if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value]:
            raise ValueError(f"{source} is a recipe, which has its own {given[0]}: write KEY=VALUE, as in output=out.")
        if data:
            raise ValueError(f"{data[0]!r} is not key=value, as in model=bert-base-uncased.")
        return read(source, overrides), []
    if len(data) != 1:
        raise ValueError(
            f"{source!r} is a model, not a recipe (YAML), and is followed by {', '.join(data) or 'no data'}: write the "
            "command with MODEL DATA, or with RECIPE.yaml KEY=VALUE …"
        )
    plan, lines = make(data[0], overrides)
    return plan, lines


def _run_recipe(plan: Any, run: Callable[..., Any], lines: list[str], progress: bool, processes: int | None) -> Any:
    """Run a recipe and return its outcome; processes that are not the first end here."""
    count = shared.Processes().count
    if processes is not None and count < processes:
        raise ValueError(
            f"--processes {processes}: only {count} of them run. Start them with torchrun, also without a GPU: "
            f"torchrun --nproc_per_node {processes} -m hf_erasure.cli …"
        )
    if lines and shared.Processes().is_main:
        typer.echo("\n".join(lines))
    outcome = run(plan, progress)
    if outcome is None:
        raise typer.Exit
    hub.write_card(plan.output)  # once more, since the folder has the results of the recipe now
    return outcome


def _print_outcome(plan: Any, adapter: str, words: str) -> None:
    """Say where everything is, what happened, and what to type next."""
    typer.echo(f"\nadapter: {adapter}\nrecipe:  {Path(plan.output) / 'recipe.yaml'}")
    typer.echo(f"\n{words}\n\nnext:    hf-erasure info {plan.output}")


def _print_tables(*tables: pd.DataFrame) -> None:
    typer.echo("\n\n".join(_table_text(table) for table in tables if len(table)))


def _table_text(table: pd.DataFrame) -> str:
    """A table as text with three decimals; the steps of a grid keep their own digits."""
    steps = {name: table[name].map("{:g}".format) for name in ("h", "α") if name in table}
    return table.assign(**steps).to_string(float_format="{:.3f}".format)


def _print_drift(drift: float, most: float) -> None:
    """Say whether the results that a run has written differ by `most` at most, and end with status 1 if not."""
    verdict = "same" if drift <= most else "NOT THE SAME"
    typer.echo(f"\nlargest difference from the results written when it was fitted: {drift:.1e}: {verdict}")
    if verdict != "same":
        raise typer.Exit(1)
