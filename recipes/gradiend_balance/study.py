"""A model that was made biased on purpose is balanced again: by GRADIEND, and by the difference of two models.

A model of stories is fine-tuned on sentences that give each occupation one pronoun. The feature is learned from other
people and other sentences. The edit with the best balanced prediction index (`bpi`) is chosen on some occupations and
sentences, and measured on others. It is compared with the difference of two models that are fine-tuned further, one
only on "she" and one only on "he" (arXiv 2511.05408), chosen and measured in the same way.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import GradiendConfig, GradiendTrainer, GradiendTrainingArguments
from hf_erasure.adapters import edited, set_features
from hf_erasure.fitting.gradiend import SLOT
from hf_erasure.fitting.gradiend.selection import Point
from recipes import studies
from recipes.gradiend_gender.study import read_stories
from recipes.over_seeds import cell, markdown, t_interval

ADAPTER = "gender"
CLASSES = ("female", "male")
WORDS = {"female": "she", "male": "he"}
WAYS = ("GRADIEND", "difference of two models")
# Skew → the class of an occupation by its position among the occupations that are fine-tuned on.
SKEWS = {"all he": lambda position: "male", "each its own": lambda position: CLASSES[position % 2]}


@dataclass
class Settings:
    """The settings in `study.yaml`.

    Attributes:
        model: A Hub id or a folder of a causal language model.
        stories: A text file of stories.
        output: Where tables and figure go.
        feature_people: Class → the people that the feature is learned from.
        feature_sentences: Sentences with `{person}` and `[FEATURE]`.
        occupations: Whom the skewed sentences are about.
        sentences: Sentences with `{person}` and `[FEATURE]`, to fine-tune on, choose on or measure on.
        skews: Keys of `SKEWS`.
        seeds: One split of occupations and sentences for each.
        shares: Shares of the sentences to fine-tune on, and to choose on; the others are measured on.
        strangers: Number of occupations that are not fine-tuned on: half of them to choose on, half to measure on.
        steps: Steps of AdamW on the skewed sentences, and for each of the two compared models.
        learning_rate: The learning rate of these steps.
        batch_size: Sentences in a step, and pairs in one gradient.
        choice_stories: Stories whose loss counts when an edit is chosen.
        test_stories: Other stories, whose loss is reported.
        letters: How many letters of each story are read, at most.
        density: The share of the weights that an edit changes.
        budget: The share of the loss that an edit may cost on the choice stories, at the upper end of its interval.
        feature_factors: The grid's values of h for GRADIEND; for the difference of two models h is always 1.
        learning_rates: The grid's sizes of α for GRADIEND; each is tried with both signs.
        difference_rates: The sizes of α for the difference of two models.
    """

    model: str
    stories: str
    output: str
    feature_people: dict[str, list[str]]
    feature_sentences: list[str]
    occupations: list[str]
    sentences: list[str]
    skews: list[str] = field(default_factory=lambda: list(SKEWS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    shares: list[float] = field(default_factory=lambda: [0.4, 0.3])
    strangers: int = 8
    steps: int = 100
    learning_rate: float = 3e-4
    batch_size: int = 16
    choice_stories: int = 96
    test_stories: int = 90
    letters: int = 600
    density: float = 0.05
    budget: float = 0.02
    feature_factors: list[float] = field(default_factory=lambda: [0.0, 1.0, -1.0])
    learning_rates: list[float] = field(default_factory=lambda: [2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2])
    difference_rates: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0])


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """The occupations, sentences and stories that are fine-tuned on, chosen on and measured on.

    Attributes:
        known: Occupations that are fine-tuned on, in the order of the skew.
        choice: Other occupations, to choose on.
        test: Other occupations, to measure on.
        sentences: The sentences of `"train"`, `"choice"` and `"test"`.
        stories: The stories of `"choice"` and `"test"`, in a column `text`.
    """

    known: list[str]
    choice: list[str]
    test: list[str]
    sentences: dict[str, list[str]]
    stories: dict[str, Dataset]


def split_data(settings: Settings, seed: int) -> Split:
    """Draw occupations, sentences and stories."""
    draw = random.Random(seed)
    people, sentences = (draw.sample(items, len(items)) for items in (settings.occupations, settings.sentences))
    first = round(len(sentences) * settings.shares[0])
    second = first + round(len(sentences) * settings.shares[1])
    stories = [story[: settings.letters] for story in read_stories(settings.stories)]
    told = draw.sample(stories, settings.choice_stories + settings.test_stories)
    half = settings.strangers // 2
    return Split(
        people[settings.strangers :],
        people[:half],
        people[half : settings.strangers],
        {"train": sentences[:first], "choice": sentences[first:second], "test": sentences[second:]},
        {
            "choice": Dataset.from_dict({"text": told[: settings.choice_stories]}),
            "test": Dataset.from_dict({"text": told[settings.choice_stories :]}),
        },
    )


def pairs(people: dict[str, list[str]], sentences: list[str]) -> Dataset:
    """Every person in every sentence, with the pronoun of their class and the other pronoun."""
    rows = []
    for label, other in (CLASSES, CLASSES[::-1]):
        for person in people.get(label, []):
            for sentence in sentences:
                text = sentence.replace("{person}", person)
                rows.append({"text": text, "factual": WORDS[label], "counterfactual": WORDS[other], "label": label})
    return Dataset.from_list(rows)


# ---- models ----------------------------------------------------------------------------------------------------------


def fine_tuned(model: nn.Module, tokenizer: Any, rows: list[tuple[str, str]], settings: Settings, seed: int) -> Any:
    """A copy of the model, trained on `(sentence, pronoun)` rows with AdamW."""
    tuned: Any = copy.deepcopy(model).train()
    texts = [sentence.replace(SLOT, pronoun) for sentence, pronoun in rows]
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=settings.learning_rate)
    draw = random.Random(seed)
    for _ in range(settings.steps):
        batch = tokenizer(draw.sample(texts, min(settings.batch_size, len(texts))), return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        loss = tuned(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned.eval()


def rows_of(split: Split, classes: Iterable[str]) -> list[tuple[str, str]]:
    """Every fine-tuned occupation in every training sentence, with the pronoun of its class."""
    return [
        (sentence.replace("{person}", f"The {person}"), WORDS[label])
        for person, label in zip(split.known, classes, strict=True)
        for sentence in split.sentences["train"]
    ]


def biased_model(model: nn.Module, tokenizer: Any, split: Split, skew: str, settings: Settings, seed: int) -> Any:
    """The model after sentences in which each occupation has the pronoun that the skew gives it."""
    classes = [SKEWS[skew](position) for position in range(len(split.known))]
    return fine_tuned(model, tokenizer, rows_of(split, classes), settings, seed)


def difference(model: nn.Module, tokenizer: Any, split: Split, settings: Settings, seed: int) -> dict[str, Tensor]:
    """Parameter → its value after fine-tuning only on "she" minus its value after fine-tuning only on "he"."""
    she, he = (
        dict(
            fine_tuned(model, tokenizer, rows_of(split, [label] * len(split.known)), settings, seed).named_parameters()
        )
        for label in CLASSES
    )
    return {name: (she[name] - he[name]).detach() for name in she}


def learn_feature(model: Any, tokenizer: Any, split: Split, settings: Settings) -> GradiendTrainer:
    """A trainer whose model has an adapter of gender, learned from the feature's own people and sentences."""
    model.add_adapter(
        GradiendConfig(feature="gender", classes=list(CLASSES), density=settings.density), adapter_name=ADAPTER
    )
    args = GradiendTrainingArguments(
        output_dir=settings.output, per_device_train_batch_size=settings.batch_size, save_strategy="no",
        eval_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    learned = pairs(settings.feature_people, settings.feature_sentences)
    trainer = GradiendTrainer(
        model, args, learned, strangers(split, "choice"), split.stories["choice"], tokenizer, adapter_name=ADAPTER
    )
    trainer.train()
    return trainer


def become_difference(trainer: GradiendTrainer, change: dict[str, Tensor], density: float) -> None:
    """Replace the adapter's edit by a multiple of the largest entries of `change`."""
    feature = trainer.fitted[0].feature
    dense = {name: change[name].flatten().float() for name in feature.decoder.shapes}
    decoder = dataclasses.replace(
        feature.decoder,
        weight=dense,
        bias={name: torch.zeros_like(value) for name, value in dense.items()},
        index=dict.fromkeys(dense),
    )
    set_features(trainer.model, ADAPTER, [dataclasses.replace(feature, decoder=decoder.prune(density))], trainer.pairs)


# ---- what is measured ------------------------------------------------------------------------------------------------


def strangers(split: Split, part: str) -> Dataset:
    """Occupations that nothing was fine-tuned on."""
    return occupied(getattr(split, part), split.sentences[part])


def occupied(people: list[str], sentences: list[str]) -> Dataset:
    """Occupations with each of the pronouns, since `bpi` does not depend on which is right."""
    return pairs({label: [f"The {person}" for person in people] for label in CLASSES}, sentences)


@dataclass
class Outcome:
    """One skew under one seed.

    Attributes:
        seed: The seed of the split.
        skew: A key of `SKEWS`.
        figures: `"original"`, `"biased"` or a way of balancing → figure → value, on the test part.
        chosen: Way of balancing → the edit, and its cost on the choice part.
    """

    seed: int
    skew: str
    figures: dict[str, dict[str, float]]
    chosen: dict[str, dict[str, float]]


def measured(trainer: GradiendTrainer, split: Split, edit: Point | None, base: float | None) -> dict[str, float]:
    """An edit on the test part: `bpi` and probabilities for unknown and fine-tuned occupations, loss and cost."""
    factor, rate = (edit.feature_factor, edit.learning_rate) if edit else (0.0, 0.0)
    found: dict[str, float] = {}
    with edited(trainer.model, ADAPTER, feature_factor=factor, learning_rate=rate, pair=trainer.pairs[0]):
        for name, rows in (
            ("strangers", strangers(split, "test")),
            ("known", occupied(split.known, split.sentences["test"])),
        ):
            point = trainer.scorer(rows, split.stories["test"]).score(trainer.pairs[0], factor, rate, None)
            # This part of the index says how alike both probabilities are; the other part is the LMS.
            found[f"{name} bpi"] = point.goals["bpi"] / point.lms
            found |= {f"{name} {word}": point.probabilities[label] for label, word in WORDS.items()}
    return found | {"loss": point.loss, "cost": 0.0 if base is None else point.loss / base - 1}


def run_seed(settings: Settings, skew: str, seed: int) -> Outcome:
    """Make a model biased, choose both edits, and measure."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    original = AutoModelForCausalLM.from_pretrained(settings.model).eval()
    split = split_data(settings, seed)
    biased = biased_model(original, tokenizer, split, skew, settings, seed)
    change = difference(biased, tokenizer, split, settings, seed)
    figures = {"original": measured(learn_feature(original, tokenizer, split, settings), split, None, None)}
    trainer = learn_feature(biased, tokenizer, split, settings)
    figures["biased"] = measured(trainer, split, None, None)
    grids = {
        "GRADIEND": (settings.feature_factors, settings.learning_rates),
        "difference of two models": ([1.0], settings.difference_rates),
    }
    chosen = {}
    for way, (factors, rates) in grids.items():
        if way != "GRADIEND":
            become_difference(trainer, change, settings.density)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="None of .* edits raises")  # then the table says 0
            best = trainer.select(
                "bpi", budget=settings.budget, feature_factors=factors,
                learning_rates=[sign * rate for sign in (1, -1) for rate in rates],
            ).best  # fmt: skip
        figures[way] = measured(trainer, split, best, figures["biased"]["loss"])
        chosen[way] = {"h": best.feature_factor, "α": best.learning_rate, "cost": best.cost}
    return Outcome(seed, skew, figures, chosen)


# ---- what is written -------------------------------------------------------------------------------------------------

ROWS = ("original", "biased", *WAYS)


def over_seeds(outcomes: list[Outcome], row: str, key: str) -> list[float]:
    """One figure under every seed."""
    return [outcome.figures[row][key] for outcome in outcomes]


def tables(outcomes: list[Outcome]) -> Iterable[str]:
    """One table for each skew, and the chosen edits."""
    for skew in dict.fromkeys(outcome.skew for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.skew == skew]
        yield f"## {skew}"
        head = ["model", "strangers: bpi", "P(she)", "P(he)", "known: bpi", "P(she)", "P(he)", "cost on stories"]
        keys = [f"{who} {what}" for who in ("strangers", "known") for what in ("bpi", "she", "he")] + ["cost"]
        yield markdown(head, [[row, *(cell(over_seeds(own, row, key)) for key in keys)] for row in ROWS])
        lines = [
            [
                way,
                *(f"h = {o.chosen[way]['h']:g}, α = {o.chosen[way]['α']:g} ({o.chosen[way]['cost']:.1%})" for o in own),
            ]
            for way in WAYS
        ]
        yield markdown(["chosen, with its cost on the choice stories", *(f"seed {o.seed}" for o in own)], lines)


def report(outcomes: list[Outcome], settings: Settings, command: str) -> str:
    """The text of `results.md`."""
    parts = [
        "# A biased model, balanced again: results",
        f"```\n{command}\n```",
        f"{len(settings.occupations) - settings.strangers} occupations are fine-tuned on, "
        f"{settings.strangers // 2} others are chosen on, and {settings.strangers - settings.strangers // 2} more are "
        "measured on (*strangers*), with their own sentences and stories; *known* are those fine-tuned on, in unseen "
        "sentences. *bpi* is (1 − |P(she) − P(he)|) · (P(she) + P(he)), mean over texts: 1 where the next word is "
        "certainly one of the two and both are equally likely. An edit changes a share of "
        f"{settings.density:g} of the weights, and may cost {settings.budget:.0%} of the loss on the choice "
        f"stories, at the upper end of the cost's interval. Seeds {settings.seeds}: mean [95 % t-interval over seeds].",
        *tables(outcomes),
    ]
    return "\n\n".join([*parts, ""])


def figure(outcomes: list[Outcome], path: Path) -> None:
    """Draw the index of unknown occupations, by skew."""
    from matplotlib.figure import Figure

    skews = list(dict.fromkeys(outcome.skew for outcome in outcomes))
    drawing = Figure(figsize=(3.6 * len(skews), 3.4), layout="constrained")
    panels = np.atleast_1d(drawing.subplots(1, len(skews), sharex=True, sharey=True))
    for axes, skew in zip(panels, skews, strict=True):
        own = [outcome for outcome in outcomes if outcome.skew == skew]
        found = [t_interval(over_seeds(own, row, "strangers bpi")) for row in ROWS]
        mean, low, high = map(np.array, zip(*found, strict=True))
        axes.barh(range(len(ROWS)), mean, xerr=[mean - low, high - mean], capsize=3, color="C0")
        axes.set_yticks(range(len(ROWS)), ROWS)
        axes.set(title=f"fine-tuned on: {skew}", xlabel="bpi of unseen occupations", xlim=(0, None))
    panels[0].invert_yaxis()
    drawing.savefig(path, dpi=140)


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    settings = studies.read_settings(Settings, settings_file, overrides, "model, stories, occupations, sentences")
    command = studies.command_line("gradiend_balance", settings_file, overrides)
    runs = {
        f"{skew}, seed {seed}": partial(run_seed, settings, skew, seed)
        for skew in settings.skews
        for seed in settings.seeds
    }
    studies.run(runs, settings.output, lambda outcomes: report(outcomes, settings, command), figure)


if __name__ == "__main__":
    studies.start(main)
