"""What was measured of an adapter, as rows of before and after: at fitting, by a recipe, and by `hf-erasure evaluate`.

Everything read here lies in files that a stranger may have written, so what is not a number is left out.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_erasure.adapters.common.config import ChildConfig
from hf_erasure.adapters.common.provenance import Provenance
from hf_erasure.adapters.loading.fingerprint import unlike
from hf_erasure.adapters.saved_tensors import digest_of, digest_of_data
from hf_erasure.fitting.report import concept_of_config, verdict
from hf_erasure.models.pooling import IN_WORDS

from .markdown import is_number, plain

EVALUATION_FORMAT = 1
BASE = "base"
FINAL = "last_hidden_state"
_TEST = "the recipe's test split"
# Of GRADIEND's tables: what a column is, and which way is better.
_GRADIEND = {"lms": ("language modelling, score", "higher"), "loss": ("language modelling, loss", "lower")}
# Of `GradiendCallback`: what a figure with this ending is.
_WATCHED = {
    "_encoded": "mean value of the feature neuron on the gradients of training",
    "_guarded": "mean cosine between the change of the weights and the feature's direction, which was taken out",
}
_GOALS = ("balance", "bpi", "fpi", "mpi")


@dataclass(frozen=True)
class Measured:
    """A number of the model without the adapter and with it.

    Attributes:
        key: What it is, in one word, as in the metadata of cards.
        title: What it is.
        before: Without the adapter; None where only the adapter was measured.
        after: With it.
        better: `"lower"`, `"higher"`, `"closer to …"`, or nothing where neither is.
        data: What it was measured on.
        before_interval: 95 % of a bootstrap, where there is one.
        after_interval: The same with the adapter.
        ideal: The best value, where there is one.
        is_other: Whether it is a measure of another concept than the adapter's.
    """

    key: str
    title: str
    before: float | None
    after: float
    better: str
    data: str
    before_interval: list[float] | None = None
    after_interval: list[float] | None = None
    ideal: float | None = None
    is_other: bool = False

    @property
    def change(self) -> str:
        """`"better"`, `"worse"` or `"no change"`; nothing where there is no interval to tell it by."""
        way = self.better.partition(" ")[0]
        if self.before is None or self.after_interval is None or way not in ("lower", "higher", "closer"):
            return ""
        return verdict(self.before, self.after, self.after_interval, way, self.ideal) or "no change"

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"change": self.change}


# ---- at fitting ------------------------------------------------------------------------------------------------------


def leakage_of(made: Provenance) -> dict[str, dict[str, Any]]:
    """Site → the correlation with the concept `before` and `after`, and the intervals about both, where there are any.

    The last hidden states come after the sites.
    """
    found: dict[str, dict[str, Any]] = {}
    for site, pair in made.leakage.items():
        if all(map(is_number, pair)):
            before, after = (max(0.0, float(value)) for value in pair)  # older versions kept a sign
            ends = made.leakage_intervals.get(site, ())
            intervals = {"before_interval": _interval(ends[:2]), "after_interval": _interval(ends[2:])}
            found[plain(site)] = {"before": before, "after": after} | intervals
    return dict(sorted(found.items(), key=lambda entry: FINAL in entry[0]))


def figures_on(made: Provenance, measured_on: str | None = None) -> str:
    """What figures are of, and what they were measured on: what the leakage was where nothing else is given."""
    found = (plain(made.measured_on) or "held-out examples") if measured_on is None else measured_on
    return f"{found}, of {IN_WORDS[made.pool]}" if made.pool in IN_WORDS else found


def at_fitting(concept: str, made: Provenance) -> list[Measured]:
    """The last hidden states, and of the sites the one that leaks most."""
    leakage = leakage_of(made)
    shown = {site: site for site in leakage if FINAL in site}
    worst = max((site for site in leakage if site not in shown), key=lambda s: leakage[s]["after"], default=None)
    if worst is not None:
        shown[worst] = f"the site that leaks most, {worst}"
    key, data = "linear_leakage", f"{figures_on(made)}, when it was fitted"
    return [
        Measured(key, f"correlation with {concept}: {name}", better="lower", data=data, **leakage[site])
        for site, name in shown.items()
    ]


def of_selection(made: Provenance) -> list[Measured]:
    """What the chosen edit of a GRADIEND adapter does to the data it was chosen on."""
    chosen = made.selection
    data = "the data that the edit was chosen on"
    data += f", {plain(chosen.measured_on)}" if "fitted" in chosen.measured_on else ""
    return _edit_rows(_flat(chosen.base), _flat(chosen.best), chosen.goal, data)


def _flat(point: dict[str, Any]) -> dict[str, Any]:
    shares, goals = point.get("probabilities"), point.get("goals")
    named = {f"P({name})": value for name, value in shares.items()} if isinstance(shares, dict) else {}
    return named | (goals if isinstance(goals, dict) else {}) | {name: point.get(name) for name in _GRADIEND}


def _edit_rows(base: dict[str, Any], edited: dict[str, Any], goal: Any, data: str) -> list[Measured]:
    rows = []
    for name, before in base.items():
        after = edited.get(name)
        if not (is_number(before) and is_number(after)):
            continue
        if name in _GRADIEND:
            title, better = _GRADIEND[name]
            rows.append(Measured(name, title, before, after, better, data))
        elif name.startswith("P("):
            rows.append(Measured("class_probability", f"mean probability {plain(name)}", before, after, "", data))
        elif name in _GOALS or name == goal:
            chosen = ", which the edit was chosen for" if name == goal else ""
            title = name.upper() if name in _GOALS[1:] else f"score of {plain(name)!r}"
            rows.append(Measured(plain(name), f"{title}{chosen}", before, after, "higher", data))
    return rows


def of_training(concept: str, made: Provenance) -> list[Measured]:
    """What a callback of ours logged last while the model under the adapter was trained."""
    figures = made.training.figures
    where = f"at step {made.training.step} of training"
    held_out = f"{figures_on(made, plain(made.training.measured_on) or 'held-out batches')}, {where}"
    refits = figures.get("erasure_refits")
    held_out += f", refitted {refits:g} times by then" if is_number(refits) else ""
    rows = []
    for name, value in figures.items():
        site = name.removeprefix("leakage/")
        if not is_number(value):
            continue
        if name == "leakage_max" or (site != name and FINAL in site):
            where_it_leaks = "the site that leaks most" if site == name else plain(site)
            title = f"correlation with {concept}: {where_it_leaks}"
            rows.append(Measured("linear_leakage", title, None, value, "lower", held_out))
        for suffix, title in _WATCHED.items():
            if name.endswith(suffix):
                rows.append(Measured(suffix[1:], title, None, value, "", f"the steps up to the log {where}"))
    return rows


# ---- by a recipe -----------------------------------------------------------------------------------------------------


def of_recipe(folder: Path, recipe: dict[str, Any], config: ChildConfig) -> list[Measured]:
    """The last line of an erasure's probe table, or the saved edit of a GRADIEND.

    The probes read one vector a text: that of the erasure's pool, and of all tokens their mean. Nothing where no recipe
    ran, or the adapter was fitted or steered anew since.
    """
    made, file = Provenance.of(config), folder / "results.json"
    results = read_json(file)
    if not recipe or not results or made.recipe != digest_of_data(file.read_text(encoding="utf-8")):
        return []
    if isinstance(results.get("edits"), dict):
        return _of_gradiend_recipe(results, config)
    read = "mean" if made.pool == "tokens" else made.pool
    probed = _TEST + (f", {IN_WORDS[read]}" if read in IN_WORDS else "")
    probed += f", {plain(made.measured_on)}" if "fitted" in made.measured_on else ""
    data = recipe["data"] if isinstance(recipe.get("data"), dict) else {}
    last = list(results)[-1]
    row = results[last] if isinstance(results[last], dict) else {}
    rows = []
    for column, better in ((data.get("label_column"), "lower"), (data.get("keep_column"), "higher")):
        before, after = row.get(f"{column} before"), row.get(f"{column} after")
        if not (is_number(before) and is_number(after)):
            continue
        majority = row.get(f"{column} majority")
        constant = f" (always the majority: {majority:.3f})" if is_number(majority) else ""
        title = f"accuracy of a linear probe for {plain(column)}, {plain(last)}{constant}"
        rows.append(Measured("probe_accuracy", title, before, after, better, probed))
        refitted = row.get(f"{column} refitted")
        if is_number(refitted):
            title = (
                f"the same of a probe fitted on one half of the erased test split, judged on the other: {plain(column)}"
            )
            rows.append(Measured("refitted_probe_accuracy", title, None, refitted, "lower", probed))
    return rows


def _of_gradiend_recipe(results: dict[str, Any], config: Any) -> list[Measured]:
    edits = results["edits"]
    base, saved = edits.get("none"), edits.get(results.get("saved"))
    if not (isinstance(base, dict) and isinstance(saved, dict)):
        return []
    if (saved.get("h"), saved.get("α")) != (config.feature_factor, config.learning_rate):
        return []
    return _edit_rows(base, saved, results.get("saved"), _TEST)


# ---- by `hf-erasure evaluate` ----------------------------------------------------------------------------------------


def of_evaluation(path: str | Path, names: Iterable[str], config: ChildConfig, folder: Path) -> list[Measured]:
    """The rows of an adapter in what `hf-erasure evaluate` wrote.

    Args:
        path: `results.json`, or the folder with it.
        names: What the adapter is called there; by default it is found by its values.
        config: Of the adapter.
        folder: Where it lies.

    Raises:
        ValueError: If the file holds no such results, or they are of another adapter or of another base.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    content = read_json(path)
    if content.get("format") != EVALUATION_FORMAT or not isinstance(content.get("values"), dict):
        raise ValueError(f"{path} holds no results that this version reads: run `hf-erasure evaluate` again.")
    try:
        return _rows_of(content, _column(content, list(names), config, folder, path), concept_of_config(config))
    except (AttributeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no results that this version reads ({reason}).") from error


def _rows_of(content: dict[str, Any], name: str, concept: str | None) -> list[Measured]:
    """The measures of a column beside those of the base."""
    values, about = content["values"], content.get("about", {})
    data = f"hf-erasure evaluate, suite {plain(about.get('suite'))}"
    limit = about.get("limit")
    data += f", at most {limit} items a data set" if is_number(limit) else ""
    rows = []
    for measure in content.get("measures", []):
        before, after = (values.get(entry, {}).get(measure.get("key")) for entry in (BASE, name))
        if not before or not after or not is_number(before.get("value")) or not is_number(after.get("value")):
            continue
        better, ideal, pool = measure.get("better"), measure.get("ideal"), IN_WORDS.get(str(measure.get("pool")))
        title = plain(measure.get("title"))
        title += f", {pool}" if pool and not title.endswith(pool) else ""
        better = f"closer to {ideal:g}" if better == "closer" else plain(better)
        rows.append(Measured(
            plain(measure["key"]), title, before["value"], after["value"], better, data,
            _interval(before.get("interval")), _interval(after.get("interval")), ideal if is_number(ideal) else None,
            measure.get("purpose") == "bias" and measure.get("concept") not in (None, concept),
        ))  # fmt: skip
    return rows


def _column(content: dict[str, Any], names: list[str], config: ChildConfig, folder: Path, path: Path) -> str:
    """The column of the adapter, which is known by its values and those of its base, and by its name only besides."""
    again = f"Run `hf-erasure evaluate` with {folder} and with the model that it was fitted on."
    prints = content.get("fingerprints")
    if not isinstance(prints, dict) or not isinstance(prints.get("adapters"), dict):
        raise ValueError(f"{path} does not say which adapters and which base it is of (no fingerprints). {again}")
    alone = [e["name"] for e in content.get("entries", []) if len(e["adapters"]) == 1 and e.get("strength", 1) == 1]
    known = {name: own for name in alone if isinstance(own := prints["adapters"].get(name), dict)}
    digest = digest_of(folder, config)
    same = [name for name, own in known.items() if digest is not None and own.get("adapter") == digest]
    chosen = [name for name in names if name in same] if names else same
    if not chosen:
        wanted = f" under the name {names[0]!r}" if names else ""
        raise ValueError(
            f"{path} has measures of the adapters {list(known)}, and the {config.described} in {folder} is not among "
            f"them{wanted}: it is another one, or was fitted or steered anew since. {again}"
        )
    kept, seen = Provenance.of(config).fingerprint, known[chosen[0]].get("base")
    if not isinstance(seen, dict) or not kept.keys() & seen.keys():
        warnings.warn(
            f"Whether {path} was measured on the base that the {config.described} was fitted on cannot be checked: "
            f"{'the adapter keeps no sample of it' if not kept else 'its weights could not be read there'}.",
            stacklevel=4,
        )
    elif weight := unlike(kept, seen):
        raise ValueError(
            f"{path} was measured on another base than the {config.described} was fitted on, as the weight {weight!r} "
            f"shows, so its figures are not those of this adapter. {again}"
        )
    return chosen[0]


def _interval(ends: Any) -> list[float] | None:
    """Both ends of an interval, where these are two numbers."""
    is_one = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(is_number, ends))
    return [float(end) for end in ends] if is_one else None


# ---- files -----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty where there is no file, or no object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def kept_rows(rows: list[Any]) -> list[Measured]:
    """Rows that were kept in an adapter's configuration."""
    found = []
    for row in rows:
        known = row if isinstance(row, dict) else {}
        numbers: dict[str, Any] = {n: known[n] for n in ("before", "after", "ideal") if is_number(known.get(n))}
        if {"before", "after"} <= numbers.keys():
            texts = {name: plain(known.get(name, "")) for name in ("key", "title", "better", "data")}
            intervals = {name: _interval(known.get(name)) for name in ("before_interval", "after_interval")}
            found.append(Measured(**texts | numbers | intervals, is_other=known.get("is_other") is True))
    return found
