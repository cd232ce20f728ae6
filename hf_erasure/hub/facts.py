"""What models are called on the Hub, and what they are for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_erasure._version import __version__
from hf_erasure.adapters import ConceptErasureConfig, GradiendConfig
from hf_erasure.adapters.common.config import ChildConfig
from hf_erasure.adapters.saved_tensors import digest_of_data
from hf_erasure.models.heads import head_of

from .markdown import is_number, plain
from .measured import (
    Measured,
    at_fitting,
    figures_on,
    intervals_of,
    kept_rows,
    leakage_of,
    of_recipe,
    of_selection,
    of_training,
)


def hub_id(name: Any) -> str | None:
    """A name where it can be that of a repository on the Hub, and is none of a folder; else None."""
    if not isinstance(name, str) or name.count("/") > 1:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


CARD = "card"  # the part of a configuration's provenance that `describe` writes
MOST_SITES = 200
_FILES = (".csv", ".json", ".jsonl", ".parquet", ".txt", ".tsv", ".arrow")
PICTURES = {
    "leakage.png": "Correlation with the concept by depth, before and after.",
    "effect.png": "What the chosen edit does.",
    "encoded.png": "Values of the feature neuron on texts that it was not learned from.",
    "surface.png": "All edits that were tried.",
}


@dataclass
class CardFacts:
    """The facts of one adapter; everything in it is plain data, and may come from a stranger.

    Attributes:
        kind: `"concept_erasure"` or `"gradiend"`: which template is filled.
        concept: What is erased or learned.
        classes: Of the concept; empty for a continuous one.
        fitted: Whether there is anything in it.
        base_id: The base model's name on the Hub, if it has one.
        base_revision: The commit of the base it was fitted on, where that is known.
        base_class: The class of the base model.
        repo_id: Where the adapter lies on the Hub, where that is known.
        subfolder: The folder of the adapter there.
        others: Adapters beside it, subfolder → what they are.
        method: Its settings by name, as the template of its kind wants them.
        sites: `name`, `width`, `rank`, `before`, `after`.
        finals: The same for the last hidden states, where nothing is erased but everything is read.
        more_sites: How many sites there are besides those.
        examples: Sequences it was fitted on.
        tokens: Positions.
        datasets: Names on the Hub.
        labels_from: Who or what labelled the data, in words.
        measured: Rows of before and after, as `Measured`.
        fingerprint: Of the weights it was fitted on, shortened.
        parts: Of an adapter that was combined: what it was made from.
        versions: Package → version.
        pictures: File → caption.
        license: As the Hub writes it.
        language: Codes.
        training: Markdown on a training run that ended with this adapter, as Trainer words it.
        tags: Of the base model, as they were given to `add_model_tags`, and what else the model tells.
    """

    kind: str
    concept: str
    classes: list[str]
    fitted: bool
    base_id: str | None = None
    base_revision: str | None = None
    base_class: str | None = None
    repo_id: str | None = None
    subfolder: str | None = None
    others: dict[str, str] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    sites: list[dict[str, Any]] = field(default_factory=list)
    finals: list[dict[str, Any]] = field(default_factory=list)
    more_sites: int = 0
    examples: int | None = None
    tokens: int | None = None
    datasets: list[str] = field(default_factory=list)
    labels_from: str | None = None
    measured: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: str | None = None
    parts: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    license: str | None = None
    language: list[str] = field(default_factory=list)
    training: str = ""
    tags: list[str] = field(default_factory=list)


def facts_of(config: ChildConfig, folder: Path | None = None, *, base_model: str | None = None) -> CardFacts:
    """Gather what is known of an adapter.

    Args:
        config: Its configuration.
        folder: Where it lies, with the recipe and the results of the run that made it, if there was one.
        base_model: The base's name on the Hub, in the place of what the configuration says.
    """
    provenance = _object(config.provenance)
    told = _object(provenance.get(CARD))
    recipe = _recipe(folder)
    facts = CardFacts(
        kind="gradiend" if isinstance(config, GradiendConfig) else "concept_erasure",
        concept=plain(config.feature if isinstance(config, GradiendConfig) else getattr(config, "concept", "concept")),
        classes=_texts(getattr(config, "classes", None) or getattr(config, "labels", None)),
        fitted=bool(config.fitted),
        base_id=hub_id(base_model or config.base_model_name_or_path),
        base_class=_text(provenance.get("base_class")),
        base_revision=_text(config.revision or provenance.get("base_revision")),
        examples=_count(provenance.get("examples")),
        tokens=_count(provenance.get("tokens")),
        fingerprint=digest_of_data(provenance.get("fingerprint")),
        parts=_texts(provenance.get("combined_from")),
        versions=_versions(config, provenance),
        license=_text(told.get("license")),
        language=_texts(told.get("language")),
    )
    data = _object(provenance.get("data"))
    known = [name for name in map(hub_id, _texts(data.get("datasets"))) if name is not None]
    facts.datasets = list(dict.fromkeys([*_texts(told.get("datasets")), *_datasets(recipe), *known]))
    facts.labels_from = _text(told.get("labels_from")) or _labels_from(recipe) or _text(data.get("labels_from"))
    rows = _describe_kind(facts, config, provenance)
    evaluated = kept_rows(told.get("results")) if told.get("results_of") == state_of(config) else []
    measured = of_recipe(folder, recipe, config) if folder is not None else []
    fitted = rows if facts.kind == "concept_erasure" or not measured else []
    trained = of_training(facts.concept, provenance)
    facts.measured = [row.as_dict() for row in [*evaluated, *trained, *measured, *fitted]]
    if folder is not None:
        facts.pictures = {name: text for name, text in PICTURES.items() if (folder / name).is_file()}
    return facts


def state_of(config: ChildConfig) -> str:
    """Changes where an adapter is fitted or steered anew, so that results of the old one are not taken for its own."""
    plain_config = config.to_dict()
    provenance = plain_config.get("provenance") or {}
    names = ("fitted_sites", "fitted_parameters", "encoders", "feature_factor", "learning_rate", "pair")
    held = {name: plain_config.get(name) for name in names}
    return str(digest_of_data([held, {key: value for key, value in provenance.items() if key != CARD}]))


def _describe_kind(facts: CardFacts, config: Any, provenance: dict[str, Any]) -> list[Measured]:
    """What only one kind of adapter has; returns what was measured at fitting."""
    if isinstance(config, ConceptErasureConfig):
        leakage, intervals = leakage_of(provenance), intervals_of(provenance)
        sites = list((config.fitted_sites or {}).items())
        facts.sites = [_site(name, entry, leakage, intervals) for name, entry in sites[:MOST_SITES]]
        facts.more_sites = max(0, len(sites) - MOST_SITES)
        facts.finals = [
            _site(name, {}, leakage, intervals) for name in leakage if name not in {plain(n) for n, _ in sites}
        ]
        ranks = [entry["rank"] for entry in facts.sites if is_number(entry["rank"])]
        facts.method = {
            "name": config.method, "side": config.site, "affine": bool(config.affine), "sites": len(sites),
            "pool": _text(provenance.get("pool")), "reader": _text(provenance.get("reader")),
            "figures_on": figures_on(provenance), "concept_dim": _count(config.concept_dim),
            "ranks": [min(ranks), max(ranks)] if ranks else [], "guarded": _is_guarded(config),
        }  # fmt: skip
        return at_fitting(facts.concept, provenance)
    if isinstance(config, GradiendConfig):
        facts.method = _gradiend_method(config, provenance)
        return of_selection(provenance)
    return []


def _is_guarded(config: ConceptErasureConfig) -> bool:
    """Whether the method and the rank are those of the theorem."""
    if config.method == "inlp" or (config.labels is None and config.concept_dim is None):
        return False
    needed = config.z_dim - 1 if config.labels is not None else config.z_dim
    return config.rank is None or config.rank >= needed


def _gradiend_method(config: GradiendConfig, provenance: dict[str, Any]) -> dict[str, Any]:
    shapes = [entry for entry in (config.fitted_parameters or {}).values() if isinstance(entry, dict)]
    sizes = [_size(entry.get("shape")) for entry in shapes]
    counts = [size if entry.get("count") is None else entry["count"] for entry, size in zip(shapes, sizes, strict=True)]
    pair = config.pair or (config.pairs[0] if config.pairs else config.classes)
    correlation = _object(provenance.get("correlation"))
    selection = _object(provenance.get("selection"))
    kept = selection.get("kept_share")
    return {
        "estimator": _text(provenance.get("estimator")), "task": _text(provenance.get("task")),
        "source": config.source, "pair": _texts(pair), "pairs": [_texts(p) for p in config.pairs or []],
        "feature_factor": config.feature_factor, "learning_rate": config.learning_rate, "density": config.density,
        "parameters": len(shapes), "weights": sum(sizes), "changed": sum(c for c in counts if is_number(c)),
        "has_encoder": bool(config.keep_encoder), "goal": _text(selection.get("goal")),
        "budget": selection.get("budget") if is_number(selection.get("budget")) else None,
        "kept_share": kept if is_number(kept) else None,
        "correlation": {
            plain(name): value
            for name, value in correlation.items()
            if is_number(value)
        },
    }  # fmt: skip


def _site(
    name: str, entry: dict[str, Any], leakage: dict[str, tuple[float, float]], intervals: dict[str, Any]
) -> dict[str, Any]:
    before, after = leakage.get(plain(name), (None, None))
    ends = intervals.get(plain(name), (None, None))
    width, rank = (entry.get(key) if is_number(entry.get(key)) else None for key in ("width", "rank"))
    return {
        "name": plain(name), "width": width, "rank": rank, "before": before, "after": after,
        "before_interval": ends[0], "after_interval": ends[1],
    }  # fmt: skip


# ---- the recipe that made it -----------------------------------------------------------------------------------------


def _recipe(folder: Path | None) -> dict[str, Any]:
    """The recipe in an output folder; empty where the adapter was made by a program."""
    path = folder / "recipe.yaml" if folder is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return _object(content)


def _sources(recipe: dict[str, Any]) -> list[str]:
    """Where a recipe's data come from: names on the Hub, files, or `"occupations"`."""
    data = _object(recipe.get("data"))
    found = [data.get("source"), data.get("background")]
    for part in ("train", "choice", "test", "whole"):
        section = data.get(part)
        if isinstance(section, dict):
            found += [section.get("file"), section.get("sentences")]
    return list(dict.fromkeys(source for source in found if isinstance(source, str)))


def _datasets(recipe: dict[str, Any]) -> list[str]:
    named = [name for name in map(hub_id, _sources(recipe)) if name is not None and "/" in name]
    return [name for name in named if not name.lower().endswith(_FILES)]


def _labels_from(recipe: dict[str, Any]) -> str | None:
    data = _object(recipe.get("data"))
    if isinstance(data.get("source"), str):
        column, split = (plain(data.get(key)) for key in ("label_column", "train"))
        if data["source"] == "occupations":
            return "sentences about people at work that hf-erasure makes from templates, which say who they are about"
        name = hub_id(data["source"]) or "a file of its maker"
        return f"the column {column!r} of {name}, split {split!r}"
    train = data.get("train") or data.get("whole")
    if not isinstance(train, dict):
        return None
    if isinstance(train.get("templates"), list):
        return f"{len(train['templates'])} sentence templates of the recipe, filled with words of each class"
    if train.get("sentences") is not None:
        return "sentences with one of the recipe's words, whose counterpart a table of the recipe names"
    return "a file of pairs with the columns factual, counterfactual and label" if train.get("file") else None


# ---- values of strangers ---------------------------------------------------------------------------------------------


def _versions(config: ChildConfig, provenance: dict[str, Any]) -> dict[str, str]:
    """What it was made with, where that is known, and what the card is written with."""
    made = {"hf-erasure (fitted with)": provenance.get("hf_erasure_version"), "hf-erasure": __version__}
    peft = getattr(config, "peft_version", None)
    for name in ("peft", "transformers", "torch"):
        try:
            made[name] = version(name)
        except PackageNotFoundError:
            continue
    if peft and peft != made.get("peft"):
        made["peft (configured with)"] = peft
    return {name: plain(value, 60) for name, value in made.items() if value}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return plain(value) if isinstance(value, str) and value else None


def _texts(values: Any) -> list[str]:
    if isinstance(values, str):
        return [plain(values)]
    return [plain(value) for value in values] if isinstance(values, Iterable) else []


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _size(shape: Any) -> int:
    size = 1
    for side in shape if isinstance(shape, list) else [0]:
        size *= side if isinstance(side, int) else 0
    return size


def head(facts: CardFacts) -> tuple[str, str | None]:
    """The class to load the base with, and the Hub's name of its task."""
    found = head_of(facts.base_class)
    return ("AutoModel", None) if found is None else (found.auto_class, found.pipeline_tag)
