"""The command that measures a model before and after adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app, lazy

if TYPE_CHECKING:
    from hf_erasure import evaluation
    from hf_erasure.evaluation import report
else:
    evaluation, report = lazy("evaluation", "evaluation.report")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model's folder, its name on the Hub, or `embedded`.")],
    data: Annotated[
        Path, typer.Option(help="A folder with bias-in-bios/, stereoset/, crows-pairs/, seat/, winobias/, ud-ewt/, …")
    ],
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Folders of adapters, also of stock LoRA.")
    ] = None,
    suite: Annotated[str, typer.Option(help="What is measured: gender, pos, stereotypes or all.")] = "gender",
    output: Annotated[Path, typer.Option(help="The folder for results.json and report.html.")] = Path("out/evaluation"),
    limit: Annotated[int | None, typer.Option(help="The most items of each data set, evenly spread.")] = None,
    seed: Annotated[int, typer.Option(help="Decides folds, resamples and permutations.")] = 0,
    resamples: Annotated[int, typer.Option(help="How many resamples a bootstrap draws.")] = 1000,
    strengths: Annotated[
        str, typer.Option(help="Measure GRADIEND adapters at these multiples of their learning rate too, e.g. 0.5,2")
    ] = "",
    harness: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")] = "",
    harness_tasks: Annotated[str | None, typer.Option(help="A folder of further tasks for the harness.")] = None,
    allow_inactive: Annotated[bool, typer.Option(help="Continue if an adapter does not act.")] = False,
    stereoset: Annotated[
        str, typer.Option(help="How a causal model scores StereoSet: sentence (after the start token) or authors.")
    ] = "sentence",
    progress: Annotated[bool, typer.Option(help="Print what is measured next.")] = True,
) -> None:
    """Measure a model alone, with each adapter, and with all together: bias, what is still readable, and the cost.

    Each adapter is verified first: an adapter that does not act has the numbers of the base. Prints a table and writes
    results.json and report.html, a page that needs no other file. What cannot be measured is listed with the reason.
    results.json is written after each measure, so that a run that is killed keeps its results.

    Example: hf-erasure evaluate bert-base-uncased out/no-gender --suite gender --data data --output out/evaluation
    """

    def say(what: str) -> None:
        if progress:
            typer.echo(f"… {what}", err=True)

    plan = evaluation.Evaluation(
        model, data, adapters or [], suite=suite, limit=limit, seed=seed, resamples=resamples,
        strengths=_numbers(strengths), harness=_split_commas(harness), harness_tasks=harness_tasks,
        allow_inactive=allow_inactive, stereoset=stereoset,
    )  # fmt: skip
    results = evaluation.evaluate(plan, say, output)
    written, page = report.write(results, output)
    typer.echo(f"\n{results.table()}\n")
    typer.echo("[…]: 95 % intervals. ↓ lower is better, ↑ higher, → nearer to the number.")
    typer.echo("+ better, - worse; no mark where the interval contains the base's value.")
    for note in results.notes():
        typer.echo(f"Not measured: {note}")
    for rows in results.bad_rows():
        typer.echo(f"Left out: {rows}")
    typer.echo("\n" + "\n".join(f"* {limit}" for limit in evaluation.LIMITS))
    typer.echo(f"\nresults: {written}\nreport:  {page}")


def _split_commas(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in _split_commas(text)]
    except ValueError as error:
        raise ValueError(f"--strengths {text}: write numbers separated by commas, such as 0.5,2.") from error
