"""The commands that inspect adapters: what an adapter is, whether it acts, and which adapters a folder has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .adapters import Adapter, Model, model_path
from .app import app, lazy

if TYPE_CHECKING:
    from hf_erasure.adapters import verification
    from hf_erasure.adapters.common import config as configs
    from hf_erasure.adapters.common import files
    from hf_erasure.adapters.merging import export
    from hf_erasure.hub import facts, rendering
else:
    verification, configs, files = lazy("adapters.verification", "adapters.common.config", "adapters.common.files")
    export, facts, rendering = lazy("adapters.merging.export", "hub.facts", "hub.rendering")


@app.command()
def info(
    adapter: Adapter,
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model: it is loaded, to try whether the adapter merges into it.", callback=model_path
        ),
    ] = None,
) -> None:
    """Say what an adapter is: kind, concept, base, where it acts, what was measured, and whether it merges.

    Example: hf-erasure info out/no-gender
    """
    lines = {"adapter": adapter} | _adapter_lines(adapter)
    if "kind" in lines and model is not None:
        lines["merges"] = _try_merge(model, adapter)
    elif "kind" in lines:
        lines["merges"] = f"not tried; hf-erasure info {adapter} --model MODEL tries it"
    for name, text in lines.items():
        typer.echo(f"{name + ':':<10}{text}")


@app.command()
def verify(model: Model, adapter: Adapter) -> None:
    """Load an adapter onto its model and check that it acts; ends with status 1 if it does not.

    Example: hf-erasure verify bert-base-uncased out/no-gender
    """
    found = verification.verify_adapter(export.load_with_erasure(model, adapter))
    typer.echo(str(found))
    if not found:
        raise typer.Exit(1)


@app.command("list")
def list_adapters(
    folder: Annotated[Path, typer.Argument(help="The folder to look through.", exists=True, file_okay=False)] = Path(),
) -> None:
    """List the adapters in a folder and in the folders within it, with the first measure of each.

    Example: hf-erasure list out
    """
    count = 0
    for place, within, names in os.walk(folder):
        within[:] = sorted(name for name in within if not name.startswith("."))
        if files.CONFIG in names:
            count += 1
            try:
                lines = _adapter_lines(place)
            except ValueError as error:  # the other adapters are still listed
                lines = {"where": str(error)}
            shown = [lines[name].splitlines()[0] for name in ("kind", "base", "where", "measured") if lines.get(name)]
            typer.echo(f"{place}\n  " + "\n  ".join(shown))
    if not count:
        typer.echo(f"There is no adapter in {folder}.")


def _adapter_lines(place: str) -> dict[str, str]:
    """The facts of an adapter, in a folder or on the Hub, by name."""
    config: Any = configs.adapter_config(place)
    if not hasattr(config, "described"):
        kind = getattr(config.peft_type, "value", config.peft_type)
        return {"base": config.base_model_name_or_path or "", "where": f"a {kind} adapter of PEFT, not of hf-erasure"}
    own = facts.facts_of(config)
    method, classes = own.method, " / ".join(own.classes)
    lines = {"kind": f"{config.described}" + (f" ({classes})" if classes else "")}
    lines["base"] = " ".join(filter(None, [own.base_class, own.base_id or str(config.base_model_name_or_path or "")]))
    if not own.fitted:
        return lines | {"where": "it was never fitted: loaded, it changes nothing"}
    if own.kind == "gradiend":
        parameters = configs.number_of(method["parameters"], "parameter")
        lines["where"] = (
            f"{method['changed']:,} of {method['weights']:,} weights in {parameters}, steered with "
            f"feature_factor={method['feature_factor']:g}, learning_rate={method['learning_rate']:g}"
        )
    else:
        ranks = "-".join(str(rank) for rank in sorted(set(method["ranks"])))
        sites = configs.number_of(method["sites"], "site")
        lines["where"] = f"{method['name']} at the {method['side']} of {sites}, rank {ranks}"
        lines["pool"] = (method["pool"] or "not recorded") + (f" ({method['reader']})" if method["reader"] else "")
    rows = [
        f"{row['title']}: {rendering.number(row['before'])} → {rendering.number(row['after'])}" for row in own.measured
    ]
    lines["measured"] = ("\n" + " " * 10).join(rows) or "nothing was measured"
    return lines


def _try_merge(model: str, adapter: str) -> str:
    """Merge an adapter into its model, and return whether that worked, in words."""
    loaded = export.load_with_erasure(model, adapter)
    try:
        loaded.merge_adapter()
    except (ValueError, NotImplementedError) as error:
        return f"no: {error}"
    return f"yes: hf-erasure merge {model} {adapter} FOLDER"
