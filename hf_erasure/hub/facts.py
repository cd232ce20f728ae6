"""The facts of an adapter for its card, gathered from its configuration and from the files beside it.

All that is read may come from a stranger: text becomes one visible line, and a figure that is not a number is left out.
"""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_erasure._version import __version__
from hf_erasure.adapters import ConceptErasureConfig, GradiendConfig
from hf_erasure.adapters.common.config import (
    CARD_FACTS,
    TESTED_ON,
    ChildConfig,
    ChosenEdit,
    Part,
    Provenance,
    number_of,
)
from hf_erasure.adapters.saving import digest_of_data
from hf_erasure.fitting.report import verdict
from hf_erasure.models.pooling import IN_WORDS
from hf_erasure.models.scorer import FINAL

# The most characters of a name that are shown, so that a table of a card stays readable.
LONGEST = 200
# Pictures beside an adapter → their captions: those that are drawn from its facts, and those of a recipe.
LEAKAGE, EFFECT = "leakage.png", "effect.png"
DRAWN = {
    LEAKAGE: "Correlation with the concept by depth, before and after.",
    EFFECT: "What the chosen edit does.",
}
OF_RECIPE = {
    "encoded.png": "Values of the feature neuron on texts that it was not learned from.",
    "surface.png": "All edits that were tried, measured on the data that one was chosen on.",
}
# Columns of GRADIEND's tables → what they are, and which direction is better.
_EDIT_FIGURES = {"loss": ("language modelling, loss", "lower"), "lms": ("language modelling, score", "higher")}
_GOALS = ("balance", "bpi", "fpi", "mpi")
# The ending of a figure of `GradiendCallback` → what the figure is.
_CALLBACK_FIGURES = {
    "_encoded": "mean value of the feature neuron on the gradients of training",
    "_guarded": "mean cosine between the change of the weights and the feature's direction, which was taken out",
}


def plain(value: Any, longest: int = LONGEST) -> str:
    """One line of visible characters: no line breaks, control characters, changes of direction or lone surrogates."""
    spaced = " ".join(str(value).split())
    # Cn is kept: a character that this Python does not know yet is a character too.
    visible = "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))
    return visible if len(visible) <= longest else f"{visible[: longest - 1]}…"


def hub_id(name: Any) -> str | None:
    """The name, if it can be the name of a repository on the Hub and is not a path that exists; else None."""
    if not isinstance(name, str) or name.count("/") > 1:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file does not exist or does not hold an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass
class CardFacts:
    """The facts of one adapter; everything in it is plain data, and may come from a stranger."""

    kind: str  # `"concept_erasure"` or `"gradiend"`: which template is filled
    concept: str  # what is erased or learned
    classes: list[str]  # of the concept; empty for a continuous one
    fitted: bool  # whether it was fitted
    base_id: str | None = None  # the base model's name on the Hub, if it has one
    base_revision: str | None = None  # the commit of the base it was fitted on, if it is known
    base_class: str | None = None  # the class of the base model
    repo_id: str | None = None  # the adapter's repository on the Hub, if it is known
    subfolder: str | None = None  # the folder of the adapter in the repository
    others: dict[str, str] = field(default_factory=dict)  # the repository's other adapters, subfolder → what they are
    method: dict[str, Any] = field(default_factory=dict)  # its settings by name, for the template of its kind
    sites: list[dict[str, Any]] = field(default_factory=list)  # `name`, `width`, `rank`, `before`, `after`
    finals: list[dict[str, Any]] = field(default_factory=list)  # the same for last hidden states, which are not a site
    examples: int | None = None  # how many sequences it was fitted on
    counterfactuals: int = 0  # how many counterfactuals of these sequences
    tokens: int | None = None  # how many positions of these sequences
    datasets: list[str] = field(default_factory=list)  # names on the Hub
    labels_from: str | None = None  # who or what labelled the data, in words
    measured: list[dict[str, Any]] = field(default_factory=list)  # rows of before and after, as `Measured`
    fingerprint: str | None = None  # the digest of the weights it was fitted on, shortened
    parts: list[str] = field(default_factory=list)  # the adapters that a combined adapter was made from
    versions: dict[str, str] = field(default_factory=dict)  # package → version
    pictures: dict[str, str] = field(default_factory=dict)  # file → caption
    license: str | None = None  # in the Hub's spelling
    language: list[str] = field(default_factory=list)  # codes of languages
    training: str = ""  # Markdown on a training run that ended with this adapter, in Trainer's words
    tags: list[str] = field(default_factory=list)  # further tags, such as those of the base model


def facts_of(config: ChildConfig) -> CardFacts:
    """Gather the facts in the configuration of an adapter."""
    provenance = Provenance.of(config)
    card, run, is_gradiend = provenance.card, provenance.recipe, isinstance(config, GradiendConfig)
    # What its maker told comes first; other names are left out if they cannot be names on the Hub.
    datasets = [*map(plain, card.datasets), *map(hub_id, map(plain, [*run.datasets, *provenance.data.datasets]))]
    versions = {"hf-erasure (fitted with)": provenance.hf_erasure_version, "hf-erasure": __version__}
    versions |= {name: version(name) for name in ("peft", "transformers", "torch")}
    facts = CardFacts(
        kind="gradiend" if is_gradiend else "concept_erasure",
        concept=plain(config.feature if isinstance(config, GradiendConfig) else getattr(config, "concept", "concept")),
        classes=list(map(plain, getattr(config, "classes" if is_gradiend else "labels", None) or ())),
        fitted=bool(config.fitted),
        base_id=hub_id(config.base_model_name_or_path),
        base_class=plain(provenance.base_class) or None,
        base_revision=plain(config.revision or "") or None,
        examples=provenance.examples,
        counterfactuals=provenance.counterfactuals,
        tokens=provenance.tokens,
        datasets=list(dict.fromkeys(filter(None, datasets))),
        labels_from=plain(card.labels_from or run.labels_from or provenance.data.labels_from) or None,
        fingerprint=digest_of_data(provenance.fingerprint),
        parts=list(map(plain, provenance.combined_from)),
        versions={name: plain(value, 60) for name, value in versions.items() if value},
        license=plain(card.license) or None,
        language=list(map(plain, card.language)),
    )
    rows = stored_rows(card.results) if card.results and card.results_of == state_of(config) else []
    rows += training_rows(facts.concept, provenance) if provenance.training.figures else []
    if isinstance(config, ConceptErasureConfig):
        rows += stored_rows(run.results) + _add_erasure(facts, config, provenance)
    elif isinstance(config, GradiendConfig):
        now = {name: getattr(config, name) for name in ("feature_factor", "learning_rate", "pair")}

        def if_steered(edit: ChosenEdit) -> ChosenEdit:
            then = {name: edit.best.get(name, value) for name, value in now.items()}  # an older edit lacks some
            return edit if digest_of_data(then) == digest_of_data(now) else ChosenEdit()

        tested, chosen = if_steered(run.edit), if_steered(provenance.selection)
        facts.method = _gradiend_method(config, provenance, chosen)
        rows += edit_rows(tested, config, TESTED_ON) or edit_rows(
            chosen, config, "the data that the edit was chosen on"
        )
    facts.measured = [asdict(row) | {"change": row.change} for row in rows]
    return facts


def state_of(config: ChildConfig) -> str:
    """A digest that changes when an adapter is fitted or steered anew, so that older results do not count for it."""
    known = config.to_dict()
    names = ("fitted_sites", "fitted_parameters", "encoders", "feature_factor", "learning_rate", "pair")
    made = {key: value for key, value in (known.get("provenance") or {}).items() if key != CARD_FACTS}
    return str(digest_of_data([{name: known.get(name) for name in names}, made]))


def _add_erasure(facts: CardFacts, config: ConceptErasureConfig, provenance: Provenance) -> list[Measured]:
    """Add the sites and the method of an erasure; returns what was measured when it was fitted."""
    measured: dict[str, dict[str, Any]] = {}  # site → the correlation with the concept, and the intervals about it
    for site, pair in provenance.leakage.items():
        if all(map(is_number, pair)):
            before, after = (max(0.0, float(value)) for value in pair)  # older versions kept a sign
            ends = provenance.leakage_intervals.get(site, ())
            intervals = {"before_interval": ends[:2] or None, "after_interval": ends[2:] or None}
            measured[plain(site)] = {"before": before, "after": after} | intervals
    # The last hidden states come after the sites.
    leakage = dict(sorted(measured.items(), key=lambda entry: FINAL in entry[0]))
    fitted = config.fitted_sites or {}
    unmeasured = dict.fromkeys(("before", "after", "before_interval", "after_interval"))
    sites = [{"name": plain(name), **size, **leakage.get(plain(name), unmeasured)} for name, size in fitted.items()]
    facts.sites = sites
    finals = leakage.keys() - {site["name"] for site in sites}
    facts.finals = [{"name": n, "width": None, "rank": None, **own} for n, own in leakage.items() if n in finals]
    ranks = [site["rank"] for site in sites]
    on = _figures_on(provenance, plain(provenance.measured_on) or "held-out examples")
    # The theorem holds where the method is not iterative and the rank is that of the concept, or above.
    needed = config.concept_dim if config.labels is None else len(config.labels) - 1
    is_guarded = config.method != "inlp" and needed is not None and (config.rank is None or config.rank >= needed)
    is_guarded = is_guarded and config.strength == 1
    left = {plain(site): float(value) for site, value in provenance.residuals.items() if is_number(value)}
    facts.method = {
        "name": config.method, "side": config.site, "affine": config.affine, "sites": len(sites),
        "modules": len(config.fitted_modules), "reach": config.reach,
        "pool": plain(provenance.pool) or None, "reader": plain(provenance.reader) or None, "figures_on": on,
        "strength": config.strength, "target": None if config.target is None else plain(str(config.target)),
        "concept_dim": config.concept_dim, "ranks": [min(ranks), max(ranks)] if ranks else [], "guarded": is_guarded,
        "left": [max(left, key=lambda site: left[site]), max(left.values()), len(left)] if left else None,
        "unsettled": [plain(site) for site in provenance.unsettled],
    }  # fmt: skip
    shown = {site: site for site in leakage if FINAL in site}
    worst = max((site for site in leakage if site not in shown), key=lambda s: leakage[s]["after"], default=None)
    if worst is not None:
        shown[worst] = f"the site that leaks most, {worst}"
    key, data = "linear_leakage", f"{on}, when it was fitted"
    return [
        Measured(key, f"correlation with {facts.concept}: {name}", better="lower", data=data, **leakage[site])
        for site, name in shown.items()
    ]


def _figures_on(provenance: Provenance, measured_on: str) -> str:
    """The rows and the vectors that figures were measured on, in words."""
    return f"{measured_on}, of {IN_WORDS[provenance.pool]}" if provenance.pool in IN_WORDS else measured_on


def _gradiend_method(config: GradiendConfig, provenance: Provenance, chosen: ChosenEdit) -> dict[str, Any]:
    sizes = [(math.prod(size["shape"]), size.get("count")) for size in (config.fitted_parameters or {}).values()]
    return {
        "estimator": plain(provenance.estimator) or None, "task": plain(provenance.task) or None,
        "source": config.source,
        "pair": list(map(plain, config.pair or (config.pairs[0] if config.pairs else config.classes) or ())),
        "pairs": [list(map(plain, pair)) for pair in config.pairs or []], "feature_factor": config.feature_factor,
        "learning_rate": config.learning_rate, "density": config.density, "parameters": len(sizes),
        "weights": sum(size for size, _ in sizes),
        "changed": sum(size if count is None else count for size, count in sizes),
        "has_encoder": bool(config.keep_encoder), "goal": plain(chosen.goal) or None,
        "budget": chosen.budget, "kept_share": chosen.kept_share,
        "correlation": {plain(pair): value for pair, value in provenance.correlation.items()},
    }  # fmt: skip


@dataclass(frozen=True)
class Measured(Part):
    """A number of the model without the adapter and with it."""

    key: str  # the name of the measure in the metadata of cards
    title: str  # the name of the measure in words
    before: float | None = None  # without the adapter; None where only the adapter was measured
    after: float = math.nan  # with it
    better: str = ""  # `"lower"`, `"higher"`, `"closer to …"`, or empty where none of these holds
    data: str = ""  # the data that it was measured on
    before_interval: tuple[float, float] | None = None  # 95 %, if there is one
    after_interval: tuple[float, float] | None = None  # the same with the adapter
    ideal: float | None = None  # the best value, if there is one
    is_other: bool = False  # whether it is a measure of another concept than the adapter's

    @property
    def change(self) -> str:
        """`"better"`, `"worse"` or `"no change"`; empty if there is no interval to decide by."""
        direction = self.better.partition(" ")[0]
        if self.before is None or self.after_interval is None or direction not in ("lower", "higher", "closer"):
            return ""
        return verdict(self.before, self.after, self.after_interval, direction, self.ideal) or "no change"


def edit_rows(chosen: ChosenEdit, config: GradiendConfig, data: str) -> list[Measured]:
    """The effect of an edit of a GRADIEND adapter on some data, a row for each figure."""
    data += f", {plain(chosen.measured_on)}" if "fitted" in chosen.measured_on else ""
    base, best = _figures_of_point(chosen.base, config), _figures_of_point(chosen.best, config)
    rows = []
    for name, before in base.items():
        after = best.get(name)
        if not (is_number(before) and is_number(after)):
            continue
        if name in _EDIT_FIGURES:
            title, better = _EDIT_FIGURES[name]
            rows.append(Measured(name, title, before, after, better, data))
        elif name.startswith("P("):
            rows.append(Measured("class_probability", f"mean probability {plain(name)}", before, after, "", data))
        elif name in _GOALS or name == chosen.goal:
            title = name.upper() if name in _GOALS[1:] else f"score of {plain(name)!r}"
            title += ", which the edit was chosen for" if name == chosen.goal else ""
            rows.append(Measured(plain(name), title, before, after, "higher", data))
    return rows


def _figures_of_point(point: dict[str, Any], config: GradiendConfig) -> dict[str, Any]:
    """Name → figure, in an order that writing to a file does not change."""
    order = dict.fromkeys([_GOALS[0], *(config.classes or ()), *_GOALS[1:]])
    found: dict[str, Any] = {}
    for part, form in (("probabilities", "P({})"), ("goals", "{}")):
        own = point.get(part)
        known = own if isinstance(own, dict) else {}
        found |= {form.format(name): known[name] for name in order | known if name in known}
    return found | {name: point.get(name) for name in _EDIT_FIGURES}


def training_rows(concept: str, provenance: Provenance) -> list[Measured]:
    """The last figures that a callback of ours logged while the model under the adapter was trained."""
    figures = provenance.training.figures
    where = f"at step {provenance.training.step} of training"
    held_out = f"{_figures_on(provenance, plain(provenance.training.measured_on) or 'held-out batches')}, {where}"
    refits = figures.get("erasure_refits")
    held_out += f", refitted {number_of(int(refits), 'time')} by then" if is_number(refits) else ""
    rows = []
    for name, value in figures.items():
        site = name.removeprefix("leakage/")
        if not is_number(value):
            continue
        if name == "leakage_max" or (site != name and FINAL in site):
            where_it_leaks = "the site that leaks most" if site == name else plain(site)
            title = f"correlation with {concept}: {where_it_leaks}"
            rows.append(Measured("linear_leakage", title, None, value, "lower", held_out))
        for suffix, title in _CALLBACK_FIGURES.items():
            if name.endswith(suffix):
                rows.append(Measured(suffix[1:], title, None, value, "", f"the steps up to the log {where}"))
    return rows


def stored_rows(rows: list[dict[str, Any]]) -> list[Measured]:
    """Rows that were kept in an adapter's configuration."""
    texts = ("key", "title", "better", "data")
    known = (Measured.of(row | {name: plain(row.get(name, "")) for name in texts}) for row in rows)
    return [row for row in known if is_number(row.after) and (row.before is None or is_number(row.before))]
