"""The commands that fit, check, merge, export and add erasures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_erasure.adapters.merging.export import load_with_erasure, save_merged
from hf_erasure.fitting import combine
from hf_erasure.hub import export_to_lora, write_card, write_merged_card
from hf_erasure.recipes.erasure import FIGURE_FILE, check_output, read_recipe, run_recipe

from .app import ProcessCount, ProgressBars, app, check_count, errors_as_sentences, rendered, say_whether_same
from .hub import Private, Push, push_exported


@app.command()
def fit(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: model, concept, labels, data, output.", exists=True)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Replace entries, e.g. model=bert-base-uncased fit.pool=cls"),
    ] = None,
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
    with errors_as_sentences():
        check_count(processes)
        plan = read_recipe(recipe, overrides or [])
        outcome = run_recipe(plan, progress)
        if outcome is None:
            return  # the first process goes on
        write_card(plan.output)  # once more, since the results of the recipe lie there now
    typer.echo(f"\n{outcome.report}\n")
    typer.echo(f"Probe accuracy on the split {plan.data.test!r}, probes fitted on {plan.data.train!r}:\n")
    typer.echo(rendered(outcome.table))
    typer.echo(f"\nadapter: {plan.output}\nfigure:  {Path(plan.output) / FIGURE_FILE}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The output folder of a finished `fit`.", exists=True)],
    progress: ProgressBars = True,
) -> None:
    """Load a fitted adapter from its folder and measure it again; fails if it does not reproduce its results."""
    with errors_as_sentences():
        now, drift = check_output(folder, progress)
    typer.echo(rendered(now))
    # Same weights, same data, same probes: what differs is only the order in which threads add floats.
    say_whether_same(drift, 1e-6)


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the Hub.")],
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, or its name on the Hub.")],
    out: Annotated[Path, typer.Argument(help="Where the merged model is written.")],
    max_shard_size: Annotated[str | None, typer.Option(help="Of each file of weights, e.g. 5GB")] = None,
    push: Push = None,
    private: Private = False,
) -> None:
    """Write an erasure into a model's weights: a plain checkpoint, with the tokenizer, that needs no hf-erasure.

    Refuses, and says why, where the weights cannot compute exactly what the model with the adapter computes.

    Example: hf-erasure merge gpt2 out/demo out/gpt2-merged
    """
    with errors_as_sentences():
        text = save_merged(model, adapter, out, max_shard_size=max_shard_size)
        write_merged_card(out, model, adapter, text)
        typer.echo(f"{text}\nmodel: {out}")
        if push is not None:
            push_exported(out, push, private)


@app.command()
def export_lora(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the Hub.")],
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, or its name on the Hub.")],
    out: Annotated[Path, typer.Argument(help="Where the LoRA adapter is written.")],
    push: Push = None,
    private: Private = False,
) -> None:
    """Write an erasure as a stock LoRA adapter, which PEFT loads without hf-erasure.

    Example: hf-erasure export-lora gpt2 out/demo out/demo-lora
    """
    with errors_as_sentences():
        exported = export_to_lora(load_with_erasure(model, adapter), "default", out)
        typer.echo(str(exported))
        if push is not None:
            push_exported(out, push, private)


@app.command()
def merge_fits(
    one: Annotated[
        Path, typer.Argument(help="The output folder of a one-pass fit with fit.checkpoint=true.", exists=True)
    ],
    other: Annotated[Path, typer.Argument(help="That of a fit on other data.", exists=True)],
    output: Annotated[Path, typer.Argument(help="The adapter folder to write.")],
) -> None:
    """Add two one-pass fits on different data, exactly as if one had seen both; needs neither model nor data."""
    with errors_as_sentences():
        config = combine.merge_fits(one, other, output)
        write_card(output)
    typer.echo(
        f"{config.concept}: {config.provenance['examples']} examples, {config.provenance['tokens']} tokens: {output}"
    )
