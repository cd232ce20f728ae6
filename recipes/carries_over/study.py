"""What an erasure leaves in texts that nobody labelled, and what helps: counterfactuals, and environments.

Gender is erased from a few biographies, and the erasure is judged on biographies of other people. It is also erased
from sentences made from templates, and judged on other templates, names and occupations. All figures are of fresh
probes, fitted and judged on rows that the erasure was not fitted on.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from datasets import Dataset, load_dataset
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import ConceptErasureConfig, concept_dataloader, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import Eraser, expected_accuracy
from hf_erasure.metrics import fresh_probes
from hf_erasure.models.model import is_norm
from hf_erasure.models.scorer import pooled_embeddings
from hf_erasure.recipes.erasure import EMBEDDED, embedded_model
from hf_erasure.recipes.occupations import occupation_sentences
from recipes import studies
from recipes.over_seeds import cell, markdown, t_interval

ADAPTER = "no_gender"
READERS = ("linear", "rbf", "mlp")
# Way of fitting on biographies → options of `concept_dataloader`, and of `fit_concept_erasure`.
WORDS = {"counterfactual_words": "english_gender"}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]] | None] = {
    "nothing": None,
    "LEACE": ({}, {}),
    "LEACE, keep the profession": ({"keep": "profession"}, {}),
    "counterfactuals": (WORDS, {}),
    "counterfactuals, pair_rank=4": (WORDS, {"pair_rank": 4}),
    "counterfactuals without labels": (WORDS | {"label_column": None}, {}),
}


@dataclass
class Settings:
    """The settings in `study.yaml`.

    Attributes:
        encoders: Hub ids, folders, or `"embedded"`, for the first part.
        biographies: A folder of CSV files with `hard_text`, `profession` and `gender`.
        output: Where tables and figure go.
        sizes: Numbers of biographies to fit on.
        seeds: One split for each.
        max_length: Longest biography in tokens.
        batch_size: Texts in a batch.
        template_encoder: The encoder of the second part.
        template_ranks: `environment_rank` of each erasure by template.
        template_seeds: One draw of names, cities and numbers for each.
        template_rows: Number of training sentences; None takes all.
    """

    encoders: list[str]
    biographies: str
    output: str
    sizes: list[int] = field(default_factory=lambda: [60, 180])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    max_length: int = 64
    batch_size: int = 32
    template_encoder: str = EMBEDDED
    template_ranks: list[int] = field(default_factory=lambda: [4])
    template_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    template_rows: int | None = None


@dataclass
class Outcome:
    """One split of the biographies for one encoder, or one draw of the sentences.

    Attributes:
        part: `"biographies"` or `"templates"`.
        encoder: The name of the encoder.
        seed: The seed of the split, or of the draw.
        fitted: How many texts were fitted on.
        held_out: How many others were measured on.
        figures: Way → figure → value.
    """

    part: str
    encoder: str
    seed: int
    fitted: int
    held_out: int
    figures: dict[str, dict[str, float]]


def loaded(name: str) -> tuple[Any, Any]:
    """An encoder and its tokenizer."""
    path = embedded_model() if name == EMBEDDED else os.path.expandvars(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModel.from_pretrained(path).eval(), tokenizer


def embeddings(model: Any, tokenizer: Any, texts: list[str], settings: Settings) -> torch.Tensor:
    """`(rows, width)` float64 mean-pooled states, with the adapters that are active."""
    return pooled_embeddings(
        model, tokenizer, texts, pool="mean", batch_size=settings.batch_size, max_length=settings.max_length,
        truncate=True,
    ).double()  # fmt: skip


def moved(before: torch.Tensor, after: torch.Tensor) -> float:
    """The mean squared change by the erasure, as a share of the variance."""
    return float((after - before).square().sum() / (before - before.mean(0)).square().sum())


# ---- biographies: counterfactuals ------------------------------------------------------------------------------------


def biographies(settings: Settings) -> list[dict[str, str]]:
    """All biographies, each once, with the names of genders that the table of counterparts uses."""
    files = sorted(map(str, Path(os.path.expandvars(settings.biographies)).glob("*.csv")))
    rows = load_dataset("csv", data_files={"rows": files})["rows"]
    found = {row["hard_text"]: {**row, "gender": row["gender"].lower()} for row in rows}
    return [{"text": text, "profession": row["profession"], "gender": row["gender"]} for text, row in found.items()]


def split(rows: list[dict[str, str]], size: int, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers to fit on, equally many of each profession and gender, and all other row numbers."""
    places: dict[tuple[str, str], list[int]] = {}
    for place in random.Random(seed).sample(range(len(rows)), len(rows)):
        places.setdefault((rows[place]["profession"], rows[place]["gender"]), []).append(place)
    each = size // len(places)
    cells = list(places.values())
    return [place for own in cells for place in own[:each]], [place for own in cells for place in own[each:]]


def last_norm(model: Any) -> str:
    """The name of the norm that makes the last hidden state."""
    return [name for name, module in model.named_modules() if is_norm(module)][-1]


def erased(encoder: tuple[Any, Any], rows: list[dict[str, str]], way: Any, settings: Settings) -> Eraser:
    """An erasure of gender from the last hidden state, fitted on some biographies."""
    model, tokenizer = encoder
    data, fit = way
    config = ConceptErasureConfig(
        concept="gender", labels=["female", "male"], target_modules=[last_norm(model)], affine=True
    )
    model.add_adapter(config, adapter_name=ADAPTER)
    options = {"label_column": "gender", "batch_size": settings.batch_size, "max_length": settings.max_length} | data
    batches = concept_dataloader(Dataset.from_list(rows), tokenizer, labels=["female", "male"], **options)
    fit_concept_erasure(model, batches, ADAPTER, pool="mean", progress=False, **fit)
    (layer,) = erasure_layers(model, ADAPTER).values()
    eraser = Eraser(*(part.double() for part in layer.eraser_state(ADAPTER)))
    model.delete_adapter(ADAPTER)
    return eraser


def run_biographies(settings: Settings, name: str, known: dict[str, Any], size: int, seed: int) -> Outcome:
    """Fit on one split in every way, and measure on the others.

    The erasure of the last hidden state is an affine map of every token, so it commutes with the mean, and the
    encoder runs only once over the biographies that are measured on.
    """
    rows = known.setdefault("rows", biographies(settings))
    encoder = known.setdefault(name, loaded(name))
    if (name, "states") not in known:
        known[name, "states"] = embeddings(*encoder, [row["text"] for row in rows], settings)
    fitted, held = split(rows, size, seed)
    x = known[name, "states"][held]
    labels, kept = ([rows[place][column] for place in held] for column in ("gender", "profession"))
    figures: dict[str, dict[str, float]] = {}
    for way, options in WAYS.items():
        eraser = None if options is None else erased(encoder, [rows[place] for place in fitted], options, settings)
        after = x if eraser is None else eraser(x)
        found = fresh_probes.score(after.numpy(), labels, readers=READERS, folds=5, seed=seed, resamples=2)["by_group"]
        figures[way] = {reader: found[reader]["accuracy"] for reader in READERS}
        profession = fresh_probes.score(after.numpy(), kept, folds=5, seed=seed, resamples=2)["by_group"]["linear"]
        figures[way] |= {"profession": profession["accuracy"], "moved": moved(x, after)}
        figures[way]["rank"] = 0 if eraser is None else eraser.rank
    before = figures["nothing"]["linear"]
    figures["LEACE"]["expected"] = expected_accuracy(before, x.shape[1], size)
    return Outcome("biographies", Path(name).name, seed, size, len(held), figures)


# ---- sentences: environments -----------------------------------------------------------------------------------------


def run_templates(settings: Settings, seed: int) -> Outcome:
    """Erase gender at every norm, with and without environments; measure the last hidden state on other templates."""
    data = occupation_sentences(seed)
    train = data["train"] if settings.template_rows is None else data["train"].select(range(settings.template_rows))
    test = data["test"]
    ways: dict[str, Any] = {"nothing": None, "LEACE": ({}, {})}
    by_template = {"environment_column": "template"}
    for rank in settings.template_ranks:
        ways[f"environment_rank={rank}"] = by_template, {"environment_rank": rank}
        ways[f"counterfactuals, environment_rank={rank}"] = by_template | WORDS, {"environment_rank": rank}
    figures: dict[str, dict[str, float]] = {}
    plain: torch.Tensor | None = None
    for way, options in ways.items():
        model, tokenizer = loaded(settings.template_encoder)
        if options is not None:
            model.add_adapter(ConceptErasureConfig(concept="gender", labels=["female", "male"]), adapter_name=ADAPTER)
            batches = concept_dataloader(
                train, tokenizer, label_column="gender", labels=["female", "male"], batch_size=64, **options[0]
            )
            fit_concept_erasure(model, batches, ADAPTER, pool="mean", progress=False, **options[1])
        x = embeddings(model, tokenizer, test["text"], settings)
        plain = x if plain is None else plain
        found = fresh_probes.score(x.numpy(), test["gender"], test["template"], seed=seed, resamples=2)
        field_kept = fresh_probes.score(x.numpy(), test["field"], test["occupation"], seed=seed, resamples=2)
        figures[way] = {
            "by row": found["by_row"]["linear"]["accuracy"],
            "by template": found["by_group"]["linear"]["accuracy"],
            "control": found["control"],
            "field": field_kept["by_group"]["linear"]["accuracy"],
            "moved": moved(plain, x),
        }
    return Outcome("templates", Path(settings.template_encoder).name, seed, len(train), len(test), figures)


# ---- what is written -------------------------------------------------------------------------------------------------


def values(outcomes: list[Outcome], way: str, key: str) -> list[float]:
    """One figure under every seed."""
    return [outcome.figures[way][key] for outcome in outcomes]


def biography_tables(outcomes: list[Outcome]) -> Iterable[str]:
    """One table for each encoder and size."""
    groups: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.encoder, outcome.fitted), []).append(outcome)
    for (encoder, size), own in groups.items():
        expected = float(np.mean(values(own, "LEACE", "expected")))
        yield (
            f"**{encoder}, {size} biographies fitted on, {own[0].held_out} others measured on.** By the formula a "
            f"linear probe is expected to read {expected:.3f} after LEACE."
        )
        head = ["erased", "directions", "gender: linear", "RBF-SVM", "MLP", "profession", "variance moved"]
        lines = []
        for way in WAYS:
            cells = [cell(values(own, way, key)) for key in (*READERS, "profession", "moved")]
            lines.append([way, f"{np.mean(values(own, way, 'rank')):g}", *cells])
        yield markdown(head, lines)


def template_table(outcomes: list[Outcome]) -> str:
    """What is left of gender in the sentences."""
    head = ["erased", "gender: by random halves", "by held-out template", "control label", "field", "variance moved"]
    keys = ("by row", "by template", "control", "field", "moved")
    return markdown(head, [[way, *(cell(values(outcomes, way, key)) for key in keys)] for way in outcomes[0].figures])


def report(outcomes: list[Outcome], settings: Settings, command: str) -> str:
    """The text of `results.md`."""
    by_part = {part: [o for o in outcomes if o.part == part] for part in ("biographies", "templates")}
    templates = by_part["templates"]
    parts = [
        "# What an erasure leaves for unseen texts: results",
        f"```\n{command}\n```",
        "Accuracies of fresh probes, cross-validated on rows that no erasure was fitted on (in five folds; sentences "
        "in two halves). Mean [95 % t-interval over seeds]: the seeds draw from the same texts, so an interval "
        "says what another split would give.",
        "## Biographies: counterfactuals",
        f"Three professions, as many women as men; the first {settings.max_length} tokens of each biography, "
        "mean-pooled; the last hidden state is erased. The splits share no person. Counterfactuals are made by "
        "exchanging the words and first names of the table `english_gender`. No option was chosen on these rows: the "
        "tables show all of them.",
        *biography_tables(by_part["biographies"]),
    ]
    if templates:
        parts += [
            "## Sentences: environments",
            f"The demo's sentences, {templates[0].fitted} to fit on and {templates[0].held_out} of other templates, "
            f"occupations and names to measure on, with the encoder `{templates[0].encoder}`; every norm is erased. A "
            "split by random rows has sentences of one template on both sides. The *control label* (gender exchanged "
            "in a random half of the templates) says how much a probe gains from that. *Field*: a fresh probe for one "
            "of eight fields, judged on held-out occupations.",
            template_table(templates),
        ]
    return "\n\n".join([*parts, ""])


def figure(outcomes: list[Outcome], path: Path) -> None:
    """What a fresh linear probe reads, by the number of biographies fitted on."""
    from matplotlib.figure import Figure

    own = [outcome for outcome in outcomes if outcome.part == "biographies"]
    encoders = list(dict.fromkeys(outcome.encoder for outcome in own))
    drawing = Figure(figsize=(4.2 * len(encoders), 4.2), layout="constrained")
    panels = np.atleast_1d(drawing.subplots(1, len(encoders), sharey=True))
    for axes, encoder in zip(panels, encoders, strict=True):
        sizes = sorted({outcome.fitted for outcome in own})
        for shift, way in enumerate(WAYS):
            found = [
                t_interval(values([o for o in own if (o.encoder, o.fitted) == (encoder, size)], way, "linear"))
                for size in sizes
            ]
            mean, low, high = map(np.array, zip(*found, strict=True))
            places = np.array(sizes) * (1 + 0.02 * (shift - 2))
            axes.errorbar(places, mean, [mean - low, high - mean], fmt="o-", capsize=3, label=way)
        axes.axhline(0.5, color="0.6", linewidth=0.8)
        axes.set(title=encoder, xlabel="biographies fitted on", xscale="log", ylim=(0.4, 1))
        axes.set_xticks(sizes, list(map(str, sizes)))
        axes.set_xticks([], minor=True)
    panels[0].set_ylabel("gender, fresh linear probe")
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    drawing.savefig(path, dpi=140)


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    expected = "encoders, biographies, output"
    settings = studies.read_settings(Settings, settings_file, overrides, expected)
    command, known = studies.command_line("carries_over", settings_file, overrides), dict[Any, Any]()
    runs: dict[str, Any] = {
        f"{Path(name).name}, {size} biographies, seed {seed}": partial(
            run_biographies, settings, name, known, size, seed
        )
        for name in settings.encoders
        for size in settings.sizes
        for seed in settings.seeds
    }
    runs |= {f"sentences, seed {seed}": partial(run_templates, settings, seed) for seed in settings.template_seeds}
    studies.run(runs, settings.output, lambda outcomes: report(outcomes, settings, command), figure)


if __name__ == "__main__":
    studies.start(main)
