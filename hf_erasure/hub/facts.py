"""The facts of an adapter that its card says, gathered from its configuration and from what lies beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_erasure._version import __version__
from hf_erasure.adapters import ConceptErasureConfig, GradiendConfig
from hf_erasure.adapters.common.config import ChildConfig
from hf_erasure.adapters.common.provenance import TOLD, Provenance
from hf_erasure.adapters.saved_tensors import digest_of_data
from hf_erasure.models.heads import head_of

from .markdown import is_number, plain
from .measured import at_fitting, figures_on, kept_rows, leakage_of, of_recipe, of_selection, of_training


def hub_id(name: Any) -> str | None:
    """A name where it can be that of a repository on the Hub, and is none of a folder; else None."""
    if not isinstance(name, str) or name.count("/") > 1:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


# So many sites are listed in a card, which a model of any depth must leave readable.
MOST_SITES = 200
# What a name ends with that is one of a file.
_FILES = (".csv", ".json", ".jsonl", ".parquet", ".txt", ".tsv", ".arrow")
# Pictures that this package draws beside an adapter → their captions.
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
        examples: How many sequences it was fitted on.
        tokens: How many positions.
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
    made, recipe = Provenance.of(config), _recipe(folder)
    told, data = made.card, recipe["data"] if isinstance(recipe.get("data"), dict) else {}
    named = [name for name in map(hub_id, _texts(made.data.datasets)) if name is not None]
    facts = CardFacts(
        kind="gradiend" if isinstance(config, GradiendConfig) else "concept_erasure",
        concept=plain(config.feature if isinstance(config, GradiendConfig) else getattr(config, "concept", "concept")),
        classes=_texts(getattr(config, "classes", None) or getattr(config, "labels", None) or ()),
        fitted=bool(config.fitted),
        base_id=hub_id(base_model or config.base_model_name_or_path),
        base_class=plain(made.base_class) or None,
        base_revision=plain(config.revision or "") or None,
        examples=made.examples,
        tokens=made.tokens,
        datasets=list(dict.fromkeys([*_texts(told.datasets), *_datasets(data), *named])),
        labels_from=plain(told.labels_from) or _labels_from(data) or plain(made.data.labels_from) or None,
        fingerprint=digest_of_data(made.fingerprint),
        parts=_texts(made.combined_from),
        versions=_versions(config, made),
        pictures={name: text for name, text in PICTURES.items() if folder is not None and (folder / name).is_file()},
        license=plain(told.license) or None,
        language=_texts(told.language),
    )
    measured = kept_rows(told.results) if told.results_of == state_of(config) else []
    measured += of_training(facts.concept, made)
    by_recipe = [] if folder is None else of_recipe(folder, recipe, config)
    measured += by_recipe
    if isinstance(config, ConceptErasureConfig):
        _add_erasure(facts, config, made)
        measured += at_fitting(facts.concept, made)
    elif isinstance(config, GradiendConfig):
        facts.method = _gradiend_method(config, made)
        measured += [] if by_recipe else of_selection(made)
    facts.measured = [row.as_dict() for row in measured]
    return facts


def state_of(config: ChildConfig) -> str:
    """Changes where an adapter is fitted or steered anew, so that results of the old one are not taken for its own."""
    known = config.to_dict()
    names = ("fitted_sites", "fitted_parameters", "encoders", "feature_factor", "learning_rate", "pair")
    made = {key: value for key, value in (known.get("provenance") or {}).items() if key != TOLD}
    return str(digest_of_data([{name: known.get(name) for name in names}, made]))


def _add_erasure(facts: CardFacts, config: ConceptErasureConfig, made: Provenance) -> None:
    """Add the sites and the method of an erasure."""
    leakage, fitted = leakage_of(made), config.fitted_sites or {}
    unmeasured = dict.fromkeys(("before", "after", "before_interval", "after_interval"))
    sites = [{"name": plain(name), **size, **leakage.get(plain(name), unmeasured)} for name, size in fitted.items()]
    facts.sites, facts.more_sites = sites[:MOST_SITES], max(0, len(sites) - MOST_SITES)
    finals = leakage.keys() - {site["name"] for site in sites}
    facts.finals = [{"name": n, "width": None, "rank": None, **own} for n, own in leakage.items() if n in finals]
    ranks = [site["rank"] for site in facts.sites]
    facts.method = {
        "name": config.method, "side": config.site, "affine": bool(config.affine), "sites": len(sites),
        "pool": plain(made.pool) or None, "reader": plain(made.reader) or None, "figures_on": figures_on(made),
        "concept_dim": config.concept_dim, "ranks": [min(ranks), max(ranks)] if ranks else [],
        "guarded": _is_guarded(config),
    }  # fmt: skip


def _is_guarded(config: ConceptErasureConfig) -> bool:
    """Whether the method and the rank are those of the theorem."""
    if config.method == "inlp" or (config.labels is None and config.concept_dim is None):
        return False
    needed = config.z_dim - 1 if config.labels is not None else config.z_dim
    return config.rank is None or config.rank >= needed


def _gradiend_method(config: GradiendConfig, made: Provenance) -> dict[str, Any]:
    sizes = [(math.prod(size["shape"]), size.get("count")) for size in (config.fitted_parameters or {}).values()]
    chosen = made.selection
    return {
        "estimator": plain(made.estimator) or None, "task": plain(made.task) or None, "source": config.source,
        "pair": _texts(config.pair or (config.pairs[0] if config.pairs else config.classes) or ()),
        "pairs": [_texts(pair) for pair in config.pairs or []], "feature_factor": config.feature_factor,
        "learning_rate": config.learning_rate, "density": config.density, "parameters": len(sizes),
        "weights": sum(size for size, _ in sizes),
        "changed": sum(size if count is None else count for size, count in sizes),
        "has_encoder": bool(config.keep_encoder), "goal": plain(chosen.goal) or None,
        "budget": chosen.budget if is_number(chosen.budget) else None,
        "kept_share": chosen.kept_share if is_number(chosen.kept_share) else None,
        "correlation": {plain(pair): value for pair, value in made.correlation.items() if is_number(value)},
    }  # fmt: skip


def _versions(config: ChildConfig, made: Provenance) -> dict[str, str]:
    """What it was made with, where that is known, and what the card is written with."""
    here = {name: version(name) for name in ("peft", "transformers", "torch")}
    configured = getattr(config, "peft_version", None)
    known = {
        "hf-erasure (fitted with)": made.hf_erasure_version,
        "hf-erasure": __version__,
        **here,
        "peft (configured with)": configured if configured != here["peft"] else None,
    }
    return {name: plain(value, 60) for name, value in known.items() if value}


def _texts(values: Iterable[Any]) -> list[str]:
    return [plain(value) for value in values]


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
    return content if isinstance(content, dict) else {}


def _datasets(data: dict[str, Any]) -> list[str]:
    """Names on the Hub that are the source of a recipe's data; a source may also be a file, or `"occupations"`."""
    found = [data.get("source"), data.get("background")]
    for part in ("train", "choice", "test", "whole"):
        section = data.get(part)
        if isinstance(section, dict):
            found += [section.get("file"), section.get("sentences")]
    named = [name for name in map(hub_id, found) if name is not None and "/" in name]
    return [name for name in named if not name.lower().endswith(_FILES)]


def _labels_from(data: dict[str, Any]) -> str | None:
    """Who or what labelled a recipe's data, in words."""
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


def head(facts: CardFacts) -> tuple[str, str | None]:
    """The class to load the base with, and the Hub's name of its task."""
    found = head_of(facts.base_class)
    return ("AutoModel", None) if found is None else (found.auto_class, found.pipeline_tag)
