"""GRADIEND and LEACE or INLP in one model: what is left of the gap between names of both genders, and what it costs.

GRADIEND's edit is chosen for balanced prediction, as in arXiv 2502.01406, section 5; the erasure is then fitted on the
edited model, and both adapters are active together. Everything is measured on names, prompts and stories that nothing
was fitted or chosen on.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import ConceptErasureConfig, concept_dataloader, fit_concept_erasure, verify_adapter
from hf_erasure.fitting.gradiend import SLOT
from hf_erasure.metrics import benchmarks, prediction_balance, pronoun_gap
from hf_erasure.models.neutral import LanguageModelling
from hf_erasure.models.scorer import LanguageScorer
from recipes import studies
from recipes.gradiend_gender import study as gender
from recipes.over_seeds import cell, markdown, t_interval

ERASURE, GRADIEND = "no_gender", gender.ADAPTER
WAYS = ("base", "GRADIEND", "LEACE", "INLP", "GRADIEND + LEACE", "GRADIEND + INLP")
METHODS = {"LEACE": "leace", "INLP": "inlp"}
GENDER_TESTS = ["sent-weat6", "sent-weat6b", "sent-weat7", "sent-weat7b", "sent-weat8", "sent-weat8b"]
IGNORED = -100
# Few resamples and permutations for each metric, since intervals here are over seeds.
NO_STATISTICS = {"resamples": 2}

PAPER = (
    "*Differs from the paper*: the paper combines GRADIEND's trained estimator on BERT, RoBERTa, GPT-2 and Llama with "
    "INLP and other methods as they were published, and judges by SEAT, StereoSet, CrowS-Pairs and GLUE. Here is the "
    "closed form on two small models, with the names and prompts of `recipes/gradiend_gender`, and erasures at "
    "every norm that are fitted on the edited model. Prompts name a person, so a gap of 0 means that the model "
    "no longer follows the name. SEAT and StereoSet (83 items; an LMS near 50 is guessing) are only noise on "
    "models this small; they are here because the paper has them."
)


@dataclass
class Settings(gender.Settings):
    """The settings in `study.yaml`; its other keys are those of `recipes/gradiend_gender`.

    Attributes:
        seat: The folder of SEAT's tests.
        stereoset: StereoSet's file.
        goal: The goal that GRADIEND's edit is chosen for.
        inlp_rank: Directions that INLP removes at a site.
        background_stories: Stories that mean and covariance come from.
    """

    seat: str = ""
    stereoset: str = ""
    goal: str = "bpi"
    inlp_rank: int = 4
    background_stories: int = 40


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Read the file, and the settings that follow it on the command line.

    Raises:
        ValueError: If a key is unknown.
    """
    settings = gender.read_settings(path, overrides, Settings)
    settings.seat, settings.stereoset = os.path.expandvars(settings.seat), os.path.expandvars(settings.stereoset)
    return settings


# ---- the adapters ---------------------------------------------------------------------------------------------------


def labelled_rows(pairs: Dataset, tokenizer: Any) -> Dataset:
    """Sentences as tokens, labelled where the pronoun is predicted: at the mask, or at the token before the slot."""
    rows = []
    for text, label in zip(pairs["text"], pairs["label"], strict=True):
        if tokenizer.mask_token is not None:
            ids = tokenizer(text.replace(SLOT, tokenizer.mask_token))["input_ids"]
            at = ids.index(tokenizer.mask_token_id)
        else:
            ids = tokenizer(text.split(SLOT)[0].rstrip())["input_ids"]
            at = len(ids) - 1
        labels = [label if place == at else None for place in range(len(ids))]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "gender": labels})
    return Dataset.from_list(rows)


def erase(model: Any, tokenizer: Any, split: Any, method: str, together: Sequence[str], settings: Settings) -> None:
    """Add an erasure of gender to a model and fit it, with the adapters `together` active."""
    config = ConceptErasureConfig(
        concept="gender", labels=settings.classes, method=METHODS[method],
        rank=settings.inlp_rank if method == "INLP" else None,
    )  # fmt: skip
    model.add_adapter(config, adapter_name=ERASURE)
    model.set_adapter([*together, ERASURE])
    labelled = concept_dataloader(
        labelled_rows(split.train.pairs, tokenizer), tokenizer, label_column="gender", batch_size=64,
        labels=settings.classes,
    )  # fmt: skip
    stories = Dataset.from_dict({"text": split.choice.stories["text"][: settings.background_stories]})
    background = concept_dataloader(stories, tokenizer, label_column=None, batch_size=16, max_length=256)
    fit_concept_erasure(model, labelled, ERASURE, background=background, progress=False)


# ---- measures -------------------------------------------------------------------------------------------------------


def pronouns(scorer: LanguageScorer, pairs: Dataset, settings: Settings) -> np.ndarray:
    """Log-probabilities `(pairs, classes)` of the classes' pronouns at the slot."""
    queries = []
    for text in pairs["text"]:
        start = text.index(SLOT)
        for word in settings.words.values():
            encoding = scorer.encode(text.replace(SLOT, word))
            queries.append(scorer.queries(encoding, encoding.within(start, start + len(word))))
    return np.array(scorer.sums(queries)).reshape(len(pairs), -1)


def measured(model: Any, tokenizer: Any, split: Any, settings: Settings) -> dict[str, float]:
    """All figures of a model with its active adapters."""
    scorer = LanguageScorer(model, tokenizer)
    logs = pronouns(scorer, split.test.pairs, settings)
    female = np.array(split.test.pairs["label"]) == "female"
    # The version that agrees with the name is the "pro" one.
    agreeing = np.where(female[:, None], logs, logs[:, ::-1])
    gap = pronoun_gap.score(agreeing, np.where(female, "female", "male").tolist(), permutations=1, **NO_STATISTICS)
    p = np.exp(logs)
    balance = prediction_balance.score(p, settings.classes, goals=["bpi"], **NO_STATISTICS)
    language = LanguageModelling(
        scorer.reader, split.test.stories, tokenizer, feature_words=settings.words.values(),
        mask_draws=settings.mask_draws,
    ).score()  # fmt: skip
    seat = benchmarks.seat(model, tokenizer, settings.seat, tests=GENDER_TESTS, permutations=1, **NO_STATISTICS)
    stereo = benchmarks.stereoset(model, tokenizer, settings.stereoset, bias_types=["gender"], **NO_STATISTICS)
    return {
        "gap P(she)": float(p[female, 0].mean() - p[~female, 0].mean()),
        "gap P(he)": float(p[~female, 1].mean() - p[female, 1].mean()),
        "P(she)": float(p[:, 0].mean()),
        "P(he)": float(p[:, 1].mean()),
        "preference gap": gap["gap"],
        "log-odds gap": gap["log_odds_gap"],
        "bpi": balance["bpi"],
        "SEAT": seat["mean_absolute_effect_size"],
        "StereoSet SS": stereo["ss"],
        "StereoSet LMS": stereo["lms"],
        "loss": language["loss"],
        "lms": language["lms"],
    }


# ---- the study ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """One model under one seed.

    Attributes:
        model: Its name.
        seed: The seed of the split.
        figures: Way → figure → value.
        chosen: Feature factor, learning rate and cost on the choice stories of GRADIEND's edit.
        active: Way → adapters that were active, and were checked to change the output.
        sizes: Numbers of pairs and stories that are fitted on, chosen on and measured on.
    """

    model: str
    seed: int
    figures: dict[str, dict[str, float]]
    chosen: dict[str, float]
    active: dict[str, list[str]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


def run_seed(name: str, settings: Settings, seed: int) -> Outcome:
    """Fit every way on one split, and measure it."""
    split = gender.split_data(gender.read_stories(settings.stories), settings, seed)
    path = settings.models[name]
    model, tokenizer = gender.load(path)
    figures = {"base": measured(model, tokenizer, split, settings)}
    active: dict[str, list[str]] = {}
    without = [w for w in settings.exclude_modules if any(n.endswith(w) for n, _ in model.named_modules())]
    trainer = gender.fitted(model, tokenizer, split, settings, settings.source, without, eval_strategy="no")
    selection = trainer.select(
        settings.goal, budget=settings.budget, feature_factors=settings.feature_factors,
        learning_rates=settings.rates, eval_dataset=split.choice.pairs, neutral_dataset=split.choice.stories,
    )  # fmt: skip
    best = selection.best
    for method in (None, *METHODS):
        for edited in (True, False):
            if method is None and not edited:
                continue
            together = [GRADIEND] if edited else []
            if method is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that the edit is off until it is activated again
                    erase(model, tokenizer, split, method, together, settings)
            way = " + ".join([*(["GRADIEND"] if edited else []), *([method] if method else [])])
            active[way] = [*together, *([ERASURE] if method else [])]
            check_active(model, active[way], best.learning_rate)
            figures[way] = measured(model, tokenizer, split, settings)
            if method is not None:
                model.delete_adapter(ERASURE)
                model.set_adapter([GRADIEND])
    chosen = {"h": best.feature_factor, "learning_rate": best.learning_rate, "cost": best.cost}
    sizes = {
        "fitted": len(split.train.pairs), "chosen": len(split.choice.pairs), "measured": len(split.test.pairs),
        "stories": len(split.test.stories),
    }  # fmt: skip
    del trainer, model
    gc.collect()
    return Outcome(name, seed, {way: figures[way] for way in WAYS}, chosen, active, sizes)


def check_active(model: Any, names: Sequence[str], learning_rate: float) -> None:
    """Raise an error if an adapter that should act does not: the figures would be those of the base.

    Raises:
        RuntimeError: If an adapter does not act; names the adapter and the reason.
    """
    for name in names:
        found = verify_adapter(model, name)
        if not found and not (name == GRADIEND and learning_rate == 0):
            raise RuntimeError(f"{name} does not act: {found}")


# ---- report ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    "gap P(she)": ("gap P(she)", ".3f"),
    "gap P(he)": ("gap P(he)", ".3f"),
    "preference gap": ("preference gap", ".2f"),
    "log-odds gap": ("log-odds gap", ".2f"),
    "bpi": ("BPI / LMS", ".3f"),
    "SEAT": ("SEAT, mean size", ".2f"),
    "StereoSet SS": ("StereoSet SS", ".1f"),
    "StereoSet LMS": ("StereoSet LMS", ".1f"),
    "loss": ("loss on stories", ".3f"),
}


def table(outcomes: list[Outcome]) -> str:
    """All figures of one model: mean and interval over seeds."""
    lines = []
    for way in WAYS:
        cells = []
        for figure, (_, form) in COLUMNS.items():
            found = [o.figures[way][figure] for o in outcomes]
            same = max(found) - min(found) < 1e-9
            cells.append(format(found[0], form) if same else cell(found, form))
        rose = [o.figures[way]["loss"] / o.figures["base"]["loss"] - 1 for o in outcomes]
        lines.append([way, *cells, "" if way == "base" else cell(rose, "+.1%")])
    return markdown(["adapters", *(title for title, _ in COLUMNS.values()), "loss rose"], lines)


def chosen_table(outcomes: list[Outcome]) -> str:
    """GRADIEND's edits."""
    lines = [
        [o.model, str(o.seed), f"{o.chosen['h']:g}", f"{o.chosen['learning_rate']:g}", f"{o.chosen['cost']:+.1%}"]
        for o in outcomes
    ]
    return markdown(["model", "seed", "h", "α", "cost on the choice stories"], lines, 2)


def by_model(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each model."""
    return {name: [o for o in outcomes if o.model == name] for name in dict.fromkeys(o.model for o in outcomes)}


def report(outcomes: list[Outcome], settings: Settings, command: str) -> str:
    """The text of `results.md`."""
    sizes = outcomes[0].sizes
    parts = [
        "# GRADIEND with an erasure: results",
        f"```\n{command}\n```",
        f"Fitted on {sizes['fitted']} sentences; the edit is chosen for {settings.goal} on {sizes['chosen']} "
        f"others, and the interval of its cost ends at {settings.budget:.0%} at most. Everything is measured on "
        f"{sizes['measured']} other sentences and {sizes['stories']} other stories. No name, sentence or story is in "
        f"two parts. Seeds {settings.seeds}, each with another split: mean [95 % t-interval over "
        f"seeds]. LEACE removes 1 direction at each norm, INLP {settings.inlp_rank}.",
        "*gap P(she)*: P(she) after female names minus after male names; *gap P(he)* the other way round. *Preference "
        "gap*: how much more often the pronoun that agrees with the name is more likely; *log-odds gap*: by how much "
        "(`hf_erasure.metrics.pronoun_gap`, 0 is none). *BPI / LMS*: 1 is best, low where neither pronoun is likely. "
        "*SEAT*: mean size of the effects in the six gender tests. *StereoSet*: gender, best at SS 50.",
    ]
    for name, found in by_model(outcomes).items():
        parts += [f"## {name}", table(found)]
    parts += ["## The edits", chosen_table(outcomes), PAPER]
    return "\n\n".join([*parts, ""])


def figure(outcomes: list[Outcome], path: Path) -> None:
    """Draw for each model the bias against the cost, with a mark for each way and intervals over seeds."""
    from matplotlib.figure import Figure

    models = by_model(outcomes)
    drawing = Figure(figsize=(10.5, 3.6 * len(models)), layout="constrained")
    rows = drawing.subplots(len(models), 3, squeeze=False, sharey=True)
    shown = {
        "gap P(she)": "gap P(she), female less male names",
        "log-odds gap": "log-odds gap (0 is none)",
        "loss": "loss on stories, nats a token",
    }
    for axes_row, (name, found) in zip(rows, models.items(), strict=True):
        for axes, (key, title) in zip(axes_row, shown.items(), strict=True):
            for place, way in enumerate(WAYS):
                seeds = [o.figures[way][key] for o in found]
                mean, low, high = t_interval(seeds)
                colour = f"C{place}"
                axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="osD^v*"[place], color=colour,
                              capsize=3)  # fmt: skip
                axes.plot(seeds, [place + 0.22] * len(seeds), "|", color=colour, markersize=8)
            axes.set(title=name, xlabel=title, yticks=range(len(WAYS)), yticklabels=WAYS)
            axes.grid(axis="x", color="0.9")
            if key != "loss":
                axes.axvline(0, color="0.6", linewidth=0.8)
    rows[0, 0].invert_yaxis()  # all panels share this axis
    drawing.suptitle("mark: mean of the seeds, with its interval; strokes: the seeds", fontsize="small")
    drawing.savefig(path, dpi=140)


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    settings = read_settings(settings_file, overrides)
    command = studies.command_line("gradiend_composed", settings_file, overrides)
    runs = {
        f"{name}, seed {seed}": partial(run_seed, name, settings, seed)
        for name in settings.models
        for seed in settings.seeds
    }
    studies.run(runs, settings.output, lambda outcomes: report(outcomes, settings, command), figure)


if __name__ == "__main__":
    torch.manual_seed(0)
    studies.start(main)
