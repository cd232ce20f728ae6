"""Biographies without gender: professions, genders and true positive rates, read before and after an erasure.

The study of arXiv 2306.03819, section 4, on a sentence encoder. The classifier is trained on embeddings before the
erasure and judged on erased ones ("same"), or trained again on erased ones ("refitted"). All figures are of biographies
that neither the erasure nor a classifier was fitted on.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from datasets import Dataset, load_dataset
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import ConceptErasureConfig, concept_dataloader, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import Eraser
from hf_erasure.metrics import linear_leakage, tpr_gap
from hf_erasure.models.scorer import pooled_embeddings
from hf_erasure.recipes.erasure import EMBEDDED, embedded_model
from recipes import studies
from recipes.over_seeds import cell, markdown, t_interval

ADAPTER = "no_gender"
ERASURES = ("none", "last norm", "every norm")
CLASSIFIERS = ("same", "refitted")
FIGURES = ("profession", "gender", "fresh", "rms", "chance", "correlation")

PAPER = (
    "*Differs from the paper*: the paper has BERT's [CLS] state, 28 professions, all biographies of bias-in-bios, and "
    "erases only that state (profession accuracy 79.3 → 77.3 %, RMS 0.198 → 0.084, correlation 0.867 → 0.392). "
    "Here are the data and the encoder of `study.yaml`: by default three professions of 200 biographies, men and "
    "women in equal number; rows are left out until each profession has about its true share of women. A "
    "correlation over three professions is one of three points."
)


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """The settings in `study.yaml`.

    Attributes:
        model: A Hub id, a folder, or `"embedded"`.
        last: Suffix of the module whose output is the last hidden state.
        data: A Hub data set, or a folder of CSV files.
        output: Where table and figure go.
        splits: Names of the splits to fit on and to measure on; None splits rows by seed.
        text_column: Column of the biography.
        class_column: Column of the class that is predicted.
        group_column: Column of the group that is erased; two groups.
        positive: The group whose rate comes first in a gap.
        train_rows: Without `splits` the share of each class and group to fit on, with them a number of rows.
        test_rows: The same for the rows measured on.
        train_shares: Class → share of the positive group among the rows fitted on; rows are left out to reach it.
        test_shares: The same for the rows measured on.
        pool: How an embedding is made from tokens.
        max_length: Longest biography in tokens.
        batch_size: Biographies in a batch.
        shuffles: Draws for the gap that chance alone gives.
        seeds: One split, or draw of rows, for each.
    """

    model: str
    last: str
    data: str
    output: str
    splits: list[str] | None = None
    text_column: str = "hard_text"
    class_column: str = "profession"
    group_column: str = "gender"
    positive: str = "Female"
    train_rows: float = 0.5
    test_rows: float = 0.5
    train_shares: dict[str, float] | None = None
    test_shares: dict[str, float] | None = None
    pool: str = "mean"
    max_length: int = 128
    batch_size: int = 32
    shuffles: int = 200
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Read the file, and the settings that follow it on the command line.

    Raises:
        ValueError: If the file is not a recipe, or a key is unknown.
    """
    settings = studies.read_settings(Settings, path, overrides, "model, data, seeds")
    return replace(settings, positive=str(settings.positive))


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Biography:
    """One row, its labels as strings."""

    text: str
    profession: str
    gender: str


def read_biographies(settings: Settings) -> dict[str, list[Biography]]:
    """All rows by split. The files of a folder are one split, in which each biography is kept once."""
    if Path(settings.data).is_dir():
        files = [str(file) for file in sorted(Path(settings.data).glob("*.csv"))]
        loaded = load_dataset("csv", data_files={"rows": files})
    else:
        loaded = load_dataset(settings.data)
    names = (settings.text_column, settings.class_column, settings.group_column)
    found = {}
    for split, rows in loaded.items():
        every = [Biography(*map(str, row)) for row in zip(*(rows[name] for name in names), strict=True)]
        found[str(split)] = list({row.text: row for row in every}.values())
    return found


def split_rows(rows: dict[str, list[Biography]], settings: Settings, seed: int) -> list[list[Biography]]:
    """The rows to fit on and those to measure on."""
    draw = random.Random(seed)
    if settings.splits is not None:
        counts = (int(settings.train_rows), int(settings.test_rows))
        pairs = zip(settings.splits, counts, strict=True)
        parts = [draw.sample(rows[name], min(count, len(rows[name]))) for name, count in pairs]
    else:
        parts = [[], []]
        for cell_rows in _cells([row for part in rows.values() for row in part]).values():
            drawn = draw.sample(cell_rows, len(cell_rows))
            held = round(settings.test_rows * len(drawn))
            parts[1] += drawn[:held]
            parts[0] += drawn[held : held + round(settings.train_rows * len(drawn))]
    shares = (settings.train_shares, settings.test_shares)
    return [with_shares(part, share, settings.positive) for part, share in zip(parts, shares, strict=True)]


def with_shares(rows: list[Biography], shares: dict[str, float] | None, positive: str) -> list[Biography]:
    """As many rows as can be kept so that each profession has its share of the positive group."""
    if shares is None:
        return rows
    kept: list[Biography] = []
    for profession, share in shares.items():
        cells = [cell for (name, _), cell in _cells(rows).items() if name == profession]
        ours = [row for cell in cells for row in cell if row.gender == positive]
        others = [row for cell in cells for row in cell if row.gender != positive]
        size = min(len(ours) / share, len(others) / (1 - share))
        kept += ours[: round(size * share)] + others[: round(size * (1 - share))]
    return kept


def _cells(rows: list[Biography]) -> dict[tuple[str, str], list[Biography]]:
    """Rows by profession and gender."""
    found: dict[tuple[str, str], list[Biography]] = defaultdict(list)
    for row in rows:
        found[row.profession, row.gender].append(row)
    return found


# ---- the classifiers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classifier:
    """A logistic regression on standardised embeddings, which keeps the scale of those it was trained on."""

    probe: LogisticRegression
    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def train(cls, x: np.ndarray, labels: Sequence[str]) -> Classifier:
        """Train on `(rows, width)` embeddings."""
        deviation = x.std(0)
        # A feature that an erasure removed completely varies only by rounding, and must not be scaled up to full size.
        mean, deviation = x.mean(0), np.where(deviation > 1e-6 * np.sqrt((x**2).mean()), deviation, 1.0)
        probe = LogisticRegression(tol=1e-9, max_iter=2000).fit((x - mean) / deviation, labels)
        return cls(probe, mean, deviation)

    def __call__(self, x: np.ndarray) -> list[str]:
        """The predicted class of every row."""
        answers: list[str] = self.probe.predict((x - self.mean) / self.deviation).tolist()
        return answers


# ---- the study ------------------------------------------------------------------------------------------------------


def load(settings: Settings) -> tuple[Any, Any]:
    """The encoder and its tokenizer."""
    path = embedded_model() if settings.model == EMBEDDED else settings.model
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def embeddings(model: Any, tokenizer: Any, rows: list[Biography], settings: Settings) -> np.ndarray:
    """`(rows, width)` in float64, with the adapters that are active."""
    found = pooled_embeddings(
        model, tokenizer, [row.text for row in rows], pool=settings.pool, batch_size=settings.batch_size,
        max_length=settings.max_length, truncate=True,
    )  # fmt: skip
    return found.double().numpy()


def erase(model: Any, tokenizer: Any, rows: list[Biography], erasure: str, settings: Settings) -> None:
    """Put a fitted erasure of gender into the model; an older one is replaced."""
    if ADAPTER in (getattr(model, "peft_config", None) or {}):
        model.delete_adapter(ADAPTER)
    labels = sorted({row.gender for row in rows})
    target = [settings.last] if erasure == "last norm" else None
    model.add_adapter(
        ConceptErasureConfig(concept="gender", labels=labels, target_modules=target), adapter_name=ADAPTER
    )
    fit_concept_erasure(model, labelled_batches(rows, tokenizer, settings), ADAPTER, pool=settings.pool, progress=False)


def labelled_batches(rows: list[Biography], tokenizer: Any, settings: Settings) -> Any:
    """Biographies with the ids of their genders, as the fit reads them."""
    table = Dataset.from_dict({"text": [row.text for row in rows], "gender": [row.gender for row in rows]})
    return concept_dataloader(
        table, tokenizer, label_column="gender", batch_size=settings.batch_size, max_length=settings.max_length,
        labels=sorted({row.gender for row in rows}),
    )  # fmt: skip


def at_the_end(model: Any, x: np.ndarray) -> np.ndarray:
    """The embeddings of the unerased model after an erasure of only the last hidden state.

    The erasure is an affine map of every token, so it commutes with pooling, and the encoder need not run again.
    """
    (layer,) = erasure_layers(model, ADAPTER).values()
    left, right, mean = layer.eraser_state(ADAPTER)
    return Eraser(left.double(), right.double(), mean.double())(torch.from_numpy(x)).numpy()


@dataclass
class Outcome:
    """The outcome of one seed.

    Attributes:
        seed: The seed of the split.
        rows: Rows fitted on, and measured on.
        figures: Erasure → classifier → figure.
        gaps: Erasure → classifier → profession → true positive rate of the positive group minus that of the other.
        shares: Profession → share of the positive group among the rows fitted on.
    """

    seed: int
    rows: tuple[int, int]
    figures: dict[str, dict[str, dict[str, float]]]
    gaps: dict[str, dict[str, dict[str, float]]]
    shares: dict[str, float]


def measured(
    x: np.ndarray, rows: list[Biography], classifiers: dict[str, Classifier], settings: Settings, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The figures of classifiers of professions and of genders on embeddings, and the gaps by profession."""
    professions, genders = [row.profession for row in rows], [row.gender for row in rows]
    answers = classifiers["profession"](x)
    found = tpr_gap.score(answers, professions, genders, positive=settings.positive, resamples=2, permutations=1)
    named = classifiers["gender"](x)
    figures = {
        "profession": float(np.mean([a == b for a, b in zip(answers, professions, strict=True)])),
        "gender": float(np.mean([a == b for a, b in zip(named, genders, strict=True)])),
        "rms": found["rms"],
        "chance": chance(answers, professions, genders, settings, seed),
    }
    if found["correlation"] is not None:
        figures["correlation"] = found["correlation"]
    return figures, found["gaps"]


def chance(answers: list[str], professions: list[str], genders: list[str], settings: Settings, seed: int) -> float:
    """The mean RMS gap of the same answers when genders are shuffled within each profession."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(settings.shuffles):
        dealt = np.array(genders)
        for profession in set(professions):
            place = np.flatnonzero(np.array(professions) == profession)
            dealt[place] = draw.permutation(dealt[place])
        found.append(tpr_gap.score(answers, professions, dealt.tolist(), resamples=2, permutations=1)["rms"])
    return float(np.mean(found))


def run_seed(settings: Settings, rows: dict[str, list[Biography]], seed: int, known: dict[str, Any]) -> Outcome:
    """Fit on one split in every way, and measure.

    Args:
        settings: The study's settings.
        rows: All rows by split.
        seed: The seed of the split.
        known: Text → embedding of the unerased encoder, kept from seed to seed.
    """
    train, test = split_rows(rows, settings, seed)
    model, tokenizer = load(settings)
    figures: dict[str, Any] = {}
    gaps: dict[str, Any] = {}
    before: dict[str, Classifier] = {}
    for erasure in ERASURES:
        if erasure != "none":
            erase(model, tokenizer, train, erasure, settings)
        if erasure == "every norm":
            x = [embeddings(model, tokenizer, part, settings) for part in (train, test)]
        elif erasure == "last norm":
            x = [at_the_end(model, part) for part in x]
        else:
            new = [row for row in train + test if row.text not in known]
            if new:
                known |= zip((row.text for row in new), embeddings(model, tokenizer, new, settings), strict=True)
            x = [np.stack([known[row.text] for row in part]) for part in (train, test)]
        fresh = linear_leakage.score(x[1], [row.gender for row in test], seed=seed, resamples=2)["accuracy"]
        own = {
            "profession": Classifier.train(x[0], [row.profession for row in train]),
            "gender": Classifier.train(x[0], [row.gender for row in train]),
        }
        before = before or own
        for name, classifiers in zip(CLASSIFIERS, (before, own), strict=True):
            if erasure == "none" and name == "refitted":
                continue  # the same
            made, by_class = measured(x[1], test, classifiers, settings, seed)
            figures.setdefault(erasure, {})[name] = made | {"fresh": fresh}
            gaps.setdefault(erasure, {})[name] = by_class
    professions = sorted({row.profession for row in train})
    of = {p: [row.gender == settings.positive for row in train if row.profession == p] for p in professions}
    shares = {p: sum(genders) / len(genders) for p, genders in of.items()}
    return Outcome(seed, (len(train), len(test)), figures, gaps, shares)


# ---- report ---------------------------------------------------------------------------------------------------------


def ways(outcomes: list[Outcome]) -> list[tuple[str, str]]:
    """Erasure and classifier of every line of the table."""
    return [(erasure, name) for erasure, by in outcomes[0].figures.items() for name in by]


def values(outcomes: list[Outcome], way: tuple[str, str], figure: str) -> list[float]:
    """One figure under all seeds."""
    return [o.figures[way[0]][way[1]][figure] for o in outcomes if figure in o.figures[way[0]][way[1]]]


def table(outcomes: list[Outcome]) -> str:
    """The figures: mean and interval over seeds."""
    forms = {"profession": ".1%", "gender": ".1%", "fresh": ".1%", "rms": ".3f", "chance": ".3f", "correlation": ".2f"}
    lines = []
    for way in ways(outcomes):
        found = {figure: values(outcomes, way, figure) for figure in FIGURES}
        cells = [cell(found[f], form) if len(found[f]) == len(outcomes) else "–" for f, form in forms.items()]
        lines.append([way[0], way[1] if way[0] != "none" else "–", *cells])
    head = ["erased at", "classifier", "profession accuracy", "gender accuracy", "gender, fresh probe", "TPR gap, RMS",
            "RMS by chance", "correlation"]  # fmt: skip
    return markdown(head, lines, 2)


def gap_table(outcomes: list[Outcome]) -> str:
    """The gap of every profession."""
    lines = []
    for profession, share in sorted(outcomes[0].shares.items(), key=lambda item: -item[1]):
        cells = [cell([o.gaps[e][c][profession] for o in outcomes], "+.3f") for e, c in ways(outcomes)]
        lines.append([profession, f"{share:.0%}", *cells])
    heads = [e if e == "none" else f"{e}, {c}" for e, c in ways(outcomes)]
    return markdown(["profession", "share of women", *heads], lines)


def report(outcomes: list[Outcome], settings: Settings, command: str) -> str:
    """The text of `results.md`."""
    sizes = outcomes[0].rows
    return "\n\n".join(
        [
            "# Biographies without gender: results",
            f"```\n{command}\n```",
            f"Fitted on {sizes[0]} biographies, measured on {sizes[1]} others; the first {settings.max_length} "
            f"tokens of each are read. Seeds {settings.seeds}, each with another "
            "split: mean [95 % t-interval over seeds]. The splits draw from the same biographies, so an interval says "
            "what another split would give.",
            table(outcomes),
            "The refitted classifiers are trained on the rows that the erasure was fitted on, where it leaves nothing "
            "linear, so for gender they learn the majority. *Gender, fresh probe*: cross-validated on the measured "
            "rows, which the erasure has not seen; it shows what is left there.",
            "*RMS by chance*: the RMS of the same answers after genders are shuffled within each profession; a "
            "smaller gap is chance. *Correlation*: of the gaps with the share of women.",
            PAPER,
            "The gap by profession, the rate of women minus that of men:",
            gap_table(outcomes),
            "",
        ]
    )


def figure(outcomes: list[Outcome], path: Path) -> None:
    """Draw the accuracies (left), the gap (middle), and each profession's gap against the share of women (right)."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, 4.4), layout="constrained")
    accuracies, rms, classes = drawing.subplots(1, 3)
    shown = ways(outcomes)
    places = np.arange(len(shown))
    names = [e if e == "none" else f"{e}\n{c}" for e, c in shown]
    for axes, keys in ((accuracies, ("profession", "gender")), (rms, ("rms", "chance"))):
        for key, mark, shift in zip(keys, "os", (-0.08, 0.08), strict=True):
            mean, low, high = zip(*(t_interval(values(outcomes, way, key)) for way in shown), strict=True)
            errors = [np.subtract(mean, low), np.subtract(high, mean)]
            label = {"rms": "measured", "chance": "by chance"}.get(key, key)
            filled = "white" if mark == "s" else None
            axes.errorbar(places + shift, mean, errors, fmt=mark, capsize=3, label=label, markerfacecolor=filled)
        axes.set_xticks(places, names, fontsize="small")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    accuracies.set(title="accuracy", ylim=(0, 1))
    rms.set(title="TPR gap, root mean square", ylim=(0, None))
    order = sorted(outcomes[0].shares, key=outcomes[0].shares.get)
    for way, mark in zip(shown, "osD^v", strict=False):
        mean, low, high = zip(*(t_interval([o.gaps[way[0]][way[1]][p] for o in outcomes]) for p in order), strict=True)
        share = np.array([outcomes[0].shares[p] for p in order]) + 0.012 * (shown.index(way) - 2)
        errors = [np.subtract(mean, low), np.subtract(high, mean)]
        label = ", ".join(way) if way[0] != "none" else "none"
        classes.errorbar(share, mean, errors, fmt=f"{mark}:", capsize=2, label=label, linewidth=1)
    classes.axhline(0, color="0.6", linewidth=0.8)
    classes.set(title="TPR of women less that of men", xlabel="share of women in the profession, fitted on")
    classes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize="small")
    drawing.savefig(path, dpi=140)


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    settings = read_settings(settings_file, overrides)
    command = studies.command_line("biographies", settings_file, overrides)
    rows, known = read_biographies(settings), {}
    runs = {f"seed {seed}": partial(run_seed, settings, rows, seed, known) for seed in settings.seeds}
    studies.run(runs, settings.output, lambda outcomes: report(outcomes, settings, command), figure)


if __name__ == "__main__":
    studies.start(main)
