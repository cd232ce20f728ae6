"""The commands for finished adapters: merge, export and add them, make their card, and push them to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import app, lazy

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from hf_erasure import hub
    from hf_erasure.adapters.common import config as configs
    from hf_erasure.adapters.merging import export
    from hf_erasure.fitting import combine
    from hf_erasure.recipes import erasure, run
else:
    hub, configs, export = lazy("hub", "adapters.common.config", "adapters.merging.export")
    combine, erasure, run = lazy("fitting.combine", "recipes.erasure", "recipes.run")


def model_path(model: str | None) -> str | None:
    """Return a model as it is given; for `embedded`, as in a recipe, the folder of the encoder of the extra `demo`."""
    return erasure.embedded_model() if model == "embedded" else model


Model = Annotated[str, typer.Argument(help="A model's folder, or its name on the Hub.", callback=model_path)]
Adapter = Annotated[str, typer.Argument(help="The adapter's folder, or its name on the Hub.")]
Folder = Annotated[Path, typer.Argument(help="The folder of an adapter.", exists=True, file_okay=False)]
Push = Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload the result to this repository on the Hub.")]
Private = Annotated[bool, typer.Option("--private", help="If the repository is created, make it private.")]


@app.command()
def merge(
    model: Model,
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="Where the merged model is written.")],
    max_shard_size: Annotated[str | None, typer.Option(help="The largest file of weights, e.g. 5GB")] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Copy a table that embedding and head share, so that each has its own.")
    ] = False,
    push: Push = None,
    private: Private = False,
) -> None:
    """Write an erasure into a model's weights, as a plain checkpoint with its tokenizer that works without hf-erasure.

    Fails, with the reason, if the weights cannot compute exactly what the model with the adapter computes.

    Example: hf-erasure merge gpt2 out/demo out/gpt2-merged
    """
    run.refuse_unwritable(out)
    text = export.save_merged(model, adapter, out, max_shard_size=max_shard_size, untie=untie)
    hub.write_merged_card(out, model, adapter, text)
    typer.echo(f"{text}\nmodel: {out}")
    if push is not None:
        _print_commit(hub.push_model(out, push, private=private or None))


@app.command()
def export_lora(
    model: Model,
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="Where the LoRA adapter is written.")],
    push: Push = None,
    private: Private = False,
) -> None:
    """Write an erasure as a stock LoRA adapter, which PEFT loads without hf-erasure.

    Example: hf-erasure export-lora gpt2 out/demo out/demo-lora
    """
    run.refuse_unwritable(out)
    typer.echo(str(hub.export_to_lora(export.load_with_erasure(model, adapter), "default", out)))
    if push is not None:
        _print_commit(hub.push_model(out, push, private=private or None))


@app.command()
def merge_fits(
    one: Annotated[
        Path, typer.Argument(help="The output folder of a one-pass fit with fit.checkpoint=true.", exists=True)
    ],
    other: Annotated[Path, typer.Argument(help="The output folder of another such fit, on other data.", exists=True)],
    output: Annotated[Path, typer.Argument(help="The adapter folder to write.")],
) -> None:
    """Add two one-pass fits on different data, exactly as if one fit had read both; needs neither model nor data."""
    run.refuse_unwritable(output)
    config = combine.merge_fits(one, other, output)
    hub.write_card(output)
    examples, tokens = (configs.number_of(config.provenance[f"{noun}s"], noun) for noun in ("example", "token"))
    typer.echo(f"{config.concept}: {examples}, {tokens}: {output}")


@app.command()
def push(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; a new one is created.")],
    private: Private = False,
    revision: Annotated[str | None, typer.Option(help="The branch; without --create-pr a new one is created.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="A folder within the repository.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    token: Annotated[str | None, typer.Option(help="A token for the Hub; by default from `hf auth login`.")] = None,
    message: Annotated[str | None, typer.Option(help="The message of the commit.")] = None,
) -> None:
    """Upload an adapter with its card to the Hub, in one commit.

    Uploads only adapter_config.json, adapter_model.safetensors, README.md and its pictures. Text that somebody has
    written into the README.md is kept.

    Example: hf-erasure push out/demo alice/no-gender --private
    """
    commit = hub.push_adapter(
        folder, repo_id, private=private or None, revision=revision, subfolder=subfolder, create_pr=create_pr,
        token=token, message=message,
    )  # fmt: skip
    _print_commit(commit)


@app.command()
def card(
    folder: Folder,
    results: Annotated[
        Path | None, typer.Option(help="What `hf-erasure evaluate` measured: results.json, or its folder.", exists=True)
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model's name on the Hub, if the adapter was fitted on a local copy.")
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="A data set on the Hub that was fitted on.")] = None,
    labels_from: Annotated[str | None, typer.Option(help="Who or what labelled the data, in words.")] = None,
    license: Annotated[str | None, typer.Option(help="The licence in the Hub's spelling, e.g. apache-2.0")] = None,
    language: Annotated[list[str] | None, typer.Option(help="The code of a language, e.g. en")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also replace text that somebody has written into the README.md.")
    ] = False,
) -> None:
    """Make or update the card, README.md, of an adapter.

    Results of another adapter, or of another base model than the adapter was fitted on, are refused.

    What the options say is kept in the adapter's configuration, so that later saves and pushes have it too. Text that
    somebody has written into the README.md is kept.

    Example: hf-erasure card out/demo --results out/evaluation --license apache-2.0
    """
    rows = hub.describe_folder(
        folder, results=results, base_model=base_model, datasets=dataset, labels_from=labels_from, license=license,
        language=language,
    )  # fmt: skip
    written = hub.write_card(folder, overwrite=overwrite)
    typer.echo(str(written) + (f" It has {configs.number_of(len(rows), 'measure')} of {results}." if results else ""))
    if written.outcome == "left":
        raise typer.Exit(1)


def _print_commit(commit: CommitInfo) -> None:
    typer.echo(f"pull request: {commit.pr_url}" if commit.pr_url else f"pushed: {commit.commit_url}")
