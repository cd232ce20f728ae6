"""What only its maker knows of an adapter, and what was measured of it afterwards; kept in its configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_erasure.adapters.common.config import ChildConfig
from hf_erasure.adapters.common.files import write_text
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.adapters.common.provenance import TOLD

from .cards import CONFIG, config_in, own_adapters
from .facts import hub_id, state_of
from .measured import Measured, of_evaluation


def describe(
    model: Any,
    adapter_name: str = "default",
    *,
    datasets: Sequence[str] | str | None = None,
    labels_from: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: Sequence[str] | str | None = None,
) -> None:
    """Say of a fitted adapter what its card cannot know by itself. Saved with it; fitting anew forgets it.

    Args:
        model: The model with the adapter.
        adapter_name: The adapter.
        datasets: Names on the Hub of what it was fitted on.
        labels_from: Who or what labelled the data, in words.
        base_model: The base's name on the Hub, where it was loaded from a folder; whose place it takes in the adapter's
            configuration.
        license: As the Hub writes it, such as `"apache-2.0"`.
        language: Codes such as `"en"`.

    Raises:
        ValueError: If there is no such adapter of ours, or a name is none of a repository.
    """
    config = adapter_of(model, adapter_name, ChildConfig).config
    tell(config, datasets=datasets, labels_from=labels_from, base_model=base_model, license=license, language=language)


def tell(config: ChildConfig, *, base_model: str | None = None, **told: Any) -> None:
    """Write into a configuration what `describe` is told.

    Raises:
        ValueError: If a name is none of a repository.
    """
    datasets = told.get("datasets")
    told["datasets"] = [datasets] if isinstance(datasets, str) else list(datasets or [])
    for name in [*told["datasets"], *([base_model] if base_model else [])]:
        if hub_id(name) is None:
            raise ValueError(f"{name!r} is no name on the Hub: write it as in 'user/name', and no folder.")
    if base_model:
        config.base_model_name_or_path = base_model
    known = config.provenance.get(TOLD)
    known = known if isinstance(known, dict) else {}
    config.provenance = config.provenance | {TOLD: known | {key: value for key, value in told.items() if value}}


def describe_folder(
    folder: str | Path,
    *,
    results: str | Path | None = None,
    names: Iterable[str] = (),
    **told: Any,
) -> list[Measured]:
    """Do the same with a saved adapter, and keep what `hf-erasure evaluate` has measured of it.

    Args:
        folder: The adapter's.
        results: What `hf-erasure evaluate` wrote.
        names: What the adapter is called in it; by default it is found by its values.
        **told: As of `describe`.

    Returns:
        The rows that were taken from the results.

    Raises:
        ValueError: If the folder holds no adapter of ours, or the results are of another adapter or of another base.
    """
    folder = Path(folder)
    config = config_in(folder)
    if config is None:
        within = [name for name, _ in own_adapters(folder)]
        where = f"; there is one in {within}, give such a folder" if within else f", with its {CONFIG}"
        raise ValueError(f"{folder} itself holds no adapter of hf_erasure{where}.")
    rows = [] if results is None else of_evaluation(results, names, config, folder)
    tell(config, **told)
    if rows:
        kept = {"results": [asdict(row) for row in rows], "results_of": state_of(config)}
        config.provenance[TOLD] = config.provenance[TOLD] | kept
    # Only these entries are changed: what else is in the file stays as it is.
    before = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    after = before | {"base_model_name_or_path": config.base_model_name_or_path}
    if config.provenance[TOLD]:
        after["provenance"] = {**(before.get("provenance") or {}), TOLD: config.provenance[TOLD]}
    if after != before:
        text = json.dumps(after, indent=2, sort_keys=True)
        write_text(folder / CONFIG, text)
    return rows
