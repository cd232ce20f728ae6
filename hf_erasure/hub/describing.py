"""Keep in an adapter's configuration what only its maker knows, and what was measured after it was fitted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_erasure.adapters.common.acting import warn_user
from hf_erasure.adapters.common.config import CARD_FACTS, ChildConfig, Provenance, adapter_config
from hf_erasure.adapters.common.files import CONFIG, write_text
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.adapters.loading.fingerprint import most_different_weight
from hf_erasure.adapters.saving import digest_of
from hf_erasure.fitting.report import concept_of_config

from .cards import config_in, own_adapters
from .facts import Measured, hub_id, read_object, state_of

# The layout of `results.json` that is read, and the column of the model without adapters in it.
EVALUATION_FORMAT = 1
BASE = "base"


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
    """Add to a fitted adapter what its card cannot know by itself. It is saved with the adapter; a new fit deletes it.

    Args:
        model: The model with the adapter; or the adapter's configuration.
        adapter_name: The adapter.
        datasets: Names on the Hub of the data sets that it was fitted on.
        labels_from: Who or what labelled the data, in words.
        base_model: The base's name on the Hub, if it was loaded from a folder. The name replaces the folder in the
            adapter's configuration.
        license: The licence in the Hub's spelling, such as `"apache-2.0"`.
        language: Codes of languages, such as `"en"`.

    Raises:
        ValueError: If there is no such adapter of ours, or a name is not the name of a repository.
    """
    config = model if isinstance(model, ChildConfig) else adapter_of(model, adapter_name, ChildConfig).config
    datasets = [datasets] if isinstance(datasets, str) else list(datasets or [])
    for name in [*datasets, *([base_model] if base_model else [])]:
        if hub_id(name) is None:
            raise ValueError(f"{name!r} is not a name on the Hub: write it as in 'user/name', not as a folder.")
    if base_model:
        config.base_model_name_or_path = base_model
    card = config.provenance.get(CARD_FACTS)
    card = card if isinstance(card, dict) else {}
    details = {"datasets": datasets, "labels_from": labels_from, "license": license, "language": language}
    config.provenance = config.provenance | {CARD_FACTS: card | {key: value for key, value in details.items() if value}}


def describe_folder(folder: str | Path, *, results: str | Path | None = None, **details: Any) -> list[Measured]:
    """Do with a saved adapter what `describe` does, and keep what `hf-erasure evaluate` has measured for it.

    Args:
        folder: The folder of the adapter.
        results: The `results.json` of `hf-erasure evaluate`, or its folder.
        **details: Further arguments of `describe`.

    Returns:
        The rows that were taken from the results.

    Raises:
        ValueError: If the folder holds no adapter of ours, or the results are of another adapter or of another base.
    """
    folder = Path(folder)
    config = config_in(folder)
    if config is None:
        if (folder / CONFIG).is_file():
            adapter_config(folder)  # raises an error if it cannot be read
        within = [name for name, _ in own_adapters(folder)]
        where = f"; there is one in {within}, give such a folder" if within else f": give the folder with its {CONFIG}"
        raise ValueError(f"{folder} itself holds no adapter of hf_erasure{where}.")
    rows = [] if results is None else evaluation_rows(results, config, folder)
    describe(config, **details)
    if rows:
        kept = {"results": [asdict(row) for row in rows], "results_of": state_of(config)}
        config.provenance[CARD_FACTS] = config.provenance[CARD_FACTS] | kept
    # Only these entries are changed: the rest of the file, such as entries of a newer version, stays as it is.
    changed = {"base_model_name_or_path": config.base_model_name_or_path, "provenance": config.provenance}
    write_text(folder / CONFIG, json.dumps(read_object(folder / CONFIG) | changed, indent=2, sort_keys=True))
    return rows


def evaluation_rows(path: str | Path, config: ChildConfig, folder: Path) -> list[Measured]:
    """The rows of a folder's adapter in results of `hf-erasure evaluate`. Raises `ValueError` if it is not in them."""
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    content = read_object(path)
    if content.get("format") != EVALUATION_FORMAT:
        raise ValueError(f"{path} holds no results that this version reads: run `hf-erasure evaluate` again.")
    rows, concept, about = [], concept_of_config(config), content["about"]
    name = _adapter_column(content, config, folder, path)
    data = f"hf-erasure evaluate, suite {about['suite']}"
    data += "" if about["limit"] is None else f", at most {about['limit']} items a data set"
    for measure in content["measures"]:
        before, after = (content["values"].get(entry, {}).get(measure["key"]) for entry in (BASE, name))
        if not before or not after:
            continue
        better, ideal = measure["better"], measure["ideal"]
        better = f"closer to {ideal:g}" if better == "closer" else better
        is_other = measure["purpose"] == "bias" and measure.get("concept") not in (None, concept)
        rows.append(Measured(
            measure["key"], measure["title"], before["value"], after["value"], better, data, before["interval"],
            after["interval"], ideal, is_other,
        ))  # fmt: skip
    return rows


def _adapter_column(content: dict[str, Any], config: ChildConfig, folder: Path, path: Path) -> str:
    """The column of the adapter, recognised by its values and those of its base."""
    remedy = f"Run `hf-erasure evaluate` with {folder} and with the model that it was fitted on."
    known, digest = content.get("fingerprints", {}).get("adapters", {}), digest_of(folder, config)
    alone = [entry["name"] for entry in content["entries"] if len(entry["adapters"]) == 1 and entry["strength"] == 1]
    same = [name for name in alone if digest is not None and known.get(name, {}).get("adapter") == digest]
    if not same:
        raise ValueError(
            f"{path} has fingerprints of the adapters {list(known)}, and the {config.described} in {folder} is not "
            f"among them: it is another one, or was fitted or steered anew after that. {remedy}"
        )
    sample, measured = Provenance.of(config).fingerprint, known[same[0]]["base"]
    if not sample.keys() & measured.keys():
        warn_user(
            f"Whether {path} was measured on the base that the {config.described} was fitted on cannot be checked: "
            f"{'the adapter keeps no sample of it' if not sample else 'its weights could not be read there'}."
        )
    elif weight := most_different_weight(sample, measured):
        raise ValueError(
            f"{path} was measured on another base than the {config.described} was fitted on, as the weight {weight!r} "
            f"shows, so its figures are not those of this adapter. {remedy}"
        )
    return same[0]
