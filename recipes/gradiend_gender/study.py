"""Gender read from gradients and written into weights: a causal and a masked model, on unseen names and prompts.

Names, prompts and stories are split in three by a seed. The feature is fitted on the first part, an edit is chosen on
the second, and everything that is reported is measured on the third.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
import yaml
from datasets import Dataset, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import GradiendConfig
from hf_erasure.adapters import edited, set_features
from hf_erasure.fitting.gradiend import SLOT, EncodedValues, GradiendTrainer, GradiendTrainingArguments
from hf_erasure.fitting.gradiend.selection import Point, Scorer, Selection
from hf_erasure.gradiend import FeatureDecoder
from hf_erasure.recipes.schema import check_section, read_content
from recipes import studies
from recipes.over_seeds import cell, markdown

if TYPE_CHECKING:
    import pandas as pd

ADAPTER = "gender"
PRONOUNS = re.compile(r"\b(he|she|him|her|his|hers|himself|herself)\b", re.IGNORECASE)

PAPER = (
    "*Differs from the paper* (arXiv 2502.01406). The paper has the trained estimator on BERT, DistilBERT, RoBERTa, "
    "GPT-2 and Llama, with thousands of names in sentences from books, and edits of all weights. This study also has "
    "the closed form. It has two small models of children's stories, a few dozen names and sentences, and edits of the "
    "top share of the weights. They are chosen from a smaller grid, on other names, sentences and stories than those "
    "reported."
)


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass
class Material:
    """Names of both genders, and sentences with a place for a name and a slot for its pronoun.

    Attributes:
        female: Names.
        male: Names.
        prompts: Sentences with `{name}` and `[FEATURE]` in them.
    """

    female: list[str]
    male: list[str]
    prompts: list[str]

    def __add__(self, other: Material) -> Material:
        return Material(self.female + other.female, self.male + other.male, self.prompts + other.prompts)


@dataclass
class Trained:
    """How the paper's estimator is run, to compare it with the closed form.

    Attributes:
        splits: For how many of the seeds it is run; 0 leaves it out.
        steps: Steps of AdamW from each start.
        learning_rates: All are tried; the best correlation on the choice material decides.
        seeds: Number of starts with each learning rate.
        edits: Also choose edits with it, which takes another grid.
    """

    splits: int = 1
    steps: int = 300
    learning_rates: list[float] = field(default_factory=lambda: [1e-4, 1e-3, 1e-2])
    seeds: int = 1
    edits: bool = False


@dataclass
class Settings:
    """The settings in `study.yaml`.

    Attributes:
        models: Name → a Hub id or a folder of a causal, masked or encoder-decoder language model.
        stories: A text file of stories, or a Hub data set with a column `text`.
        output: Where tables and figures go.
        materials: Name of a set → its names and prompts, or the file that has them.
        material: Which of these sets is split into train, choice and test.
        fit_only: Which other sets are fitted on as a whole, under every split.
        seeds: One split for each.
        shares: Shares of names and prompts for train and for choice; the rest is for test.
        words: Class → its pronoun. The first class encodes to +1.
        train_rows: How many rows of all names in all prompts are drawn to fit on.
        eval_rows: How many are drawn to choose on, and to measure on; at most as many neutral sentences are used.
        choice_stories: Stories whose loss counts when an edit is chosen.
        letters: How many letters of each story are read, at most.
        mask_draws: How often a masked model reads every story, each time with other tokens masked, because its
            accuracy on few tokens is a noisy measure.
        batch_size: Pairs in one gradient.
        source: The gradient that the encoder reads.
        other_sources: Other gradients, whose encoders are measured too.
        exclude_modules: A model with modules of these names is also fitted and edited without them.
        density: The share of the weights that an edit changes.
        budget: The share of the loss (masked: of the accuracy) that an edit may cost on the choice stories, at the
            upper end of its interval.
        goals: The goals that edits are chosen for.
        feature_factors: The grid's values of h.
        learning_rates: The grid's sizes of α; each is tried with both signs.
        trained: The paper's estimator.
        dtype: The dtype of the model's weights.
        samples: Sentences whose slot is filled, or whose beginning is continued, under every edit.
    """

    models: dict[str, str]
    stories: str
    output: str
    materials: dict[str, Material]
    material: str = "report"
    fit_only: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    shares: list[float] = field(default_factory=lambda: [0.4, 0.3])
    words: dict[str, str] = field(default_factory=lambda: {"female": "she", "male": "he"})
    train_rows: int = 240
    eval_rows: int = 72
    choice_stories: int = 40
    letters: int = 600
    mask_draws: int = 3
    batch_size: int = 8
    source: str = "factual"
    other_sources: list[str] = field(default_factory=lambda: ["difference", "counterfactual"])
    exclude_modules: list[str] = field(default_factory=list)
    density: float = 0.01
    budget: float = 0.02
    goals: list[str] = field(default_factory=lambda: ["fpi", "mpi", "bpi"])
    feature_factors: list[float] = field(default_factory=lambda: [0.0, 0.5, -0.5, 1.0, -1.0])
    learning_rates: list[float] = field(default_factory=lambda: [5e-4, 1.5e-3, 2e-3, 2.5e-3, 3e-3, 5e-3])
    trained: Trained = field(default_factory=Trained)
    dtype: str = "float32"
    samples: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.words)

    @property
    def rates(self) -> list[float]:
        """The grid's values of α."""
        return [sign * rate for sign in (1, -1) for rate in self.learning_rates]


def read_settings(path: str | Path, overrides: Iterable[str] = (), kind: type = Settings) -> Any:
    """Read the file, and the settings that follow it on the command line.

    Raises:
        ValueError: If the file is not a recipe, or a key is unknown.
    """
    os.environ.setdefault("HF_ERASURE_TEST_ASSETS", str(studies.ASSETS))
    content = read_content(path, overrides, "models, stories, materials")
    check_section(content, kind)
    materials = content["materials"]
    if isinstance(materials, str):
        materials = yaml.safe_load((Path(path).parent / materials).read_text(encoding="utf-8"))
    content["materials"] = {name: Material(**lists) for name, lists in materials.items()}
    content["models"] = {name: os.path.expandvars(model) for name, model in content["models"].items()}
    content["stories"] = os.path.expandvars(content["stories"])
    content["trained"] = Trained(**content.get("trained", {}))
    return kind(**content)


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """The data of one step of the study.

    Attributes:
        material: Names and prompts.
        pairs: Pairs made from them.
        stories: Texts whose loss, or masked accuracy, is measured.
        neutral: Sentences of these stories without a name or a pronoun.
    """

    material: Material
    pairs: Dataset
    stories: Dataset
    neutral: Dataset


@dataclass
class Split:
    """The data of one seed: no name, prompt or story of one part is in another."""

    train: Part
    choice: Part
    test: Part


def split_data(stories: list[str], settings: Settings, seed: int) -> Split:
    """Draw a split of names, prompts and stories."""
    order = random.Random(seed)
    whole = settings.materials[settings.material]

    def cut(items: list[str]) -> list[list[str]]:
        drawn = order.sample(items, len(items))
        first = round(len(items) * settings.shares[0])
        second = first + round(len(items) * settings.shares[1])
        return [drawn[:first], drawn[first:second], drawn[second:]]

    parts = [Material(*lists) for lists in zip(cut(whole.female), cut(whole.male), cut(whole.prompts), strict=True)]
    for name in settings.fit_only:
        if name != settings.material:
            parts[0] = parts[0] + settings.materials[name]
    drawn = order.sample(stories, len(stories))
    half = len(drawn) // 2
    told = [drawn[:0], drawn[:half], drawn[half:]]
    rows = [settings.train_rows, settings.eval_rows, settings.eval_rows]
    found = []
    for material, texts, most in zip(parts, told, rows, strict=True):
        neutral = neutral_sentences(texts, [n for m in settings.materials.values() for n in m.female + m.male])[:most]
        counted = [text[: settings.letters] for text in texts]
        if texts is told[1]:
            counted = counted[: settings.choice_stories]
        found.append(
            Part(
                material,
                pairs(material, settings.words, most, order),
                Dataset.from_dict({"text": counted}),
                Dataset.from_dict({"text": neutral}),
            )
        )
    return Split(*found)


def pairs(material: Material, words: dict[str, str], most: int, order: random.Random) -> Dataset:
    """Names in prompts, half of them of each gender, with every prompt and every name about equally often."""
    rows = []
    for label, other in zip(words, reversed(words), strict=True):
        names = getattr(material, label)
        every = [(name, prompt) for name in names for prompt in material.prompts]
        for name, prompt in order.sample(every, min(most // 2, len(every))):
            text = prompt.replace("{name}", name)
            rows.append({"text": text, "factual": words[label], "counterfactual": words[other], "label": label})
    return Dataset.from_list(rows)


def ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:at], whole[at + len(bare) :]


def read_stories(source: str) -> list[str]:
    """The stories of a file in which only empty lines separate paragraphs, or the texts of a data set."""
    if not Path(source).is_file():
        return list(load_dataset(source, split="validation[:400]")["text"])
    text = Path(source).read_text(encoding="utf-8")
    stories = re.split(r"\n\s*\n(?=Once |One day, an? )", text)
    return list(dict.fromkeys(re.sub(r"\s*\n\s*", "\n", story.strip()) for story in stories))


def neutral_sentences(stories: list[str], names: Iterable[str]) -> list[str]:
    """Sentences of 30 to 120 letters without a pronoun or a name."""
    known = set(names)
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", "\n".join(stories)):
        words = re.findall(r"[A-Za-z]+", sentence)
        named = any(word[0].isupper() for word in words[1:]) or bool(words and words[0] in known)
        if 30 < len(sentence) < 120 and "\n" not in sentence and not named and not PRONOUNS.search(sentence):
            found.append(sentence.strip())
    return list(dict.fromkeys(found))


# ---- fits -----------------------------------------------------------------------------------------------------------


def load(path: str, dtype: str = "float32") -> tuple[Any, Any]:
    """A model with its head, and its tokenizer."""
    config = AutoConfig.from_pretrained(path)
    heads = {"ForMaskedLM": AutoModelForMaskedLM, "ForConditionalGeneration": AutoModelForSeq2SeqLM}
    named = (config.architectures or [""])[0]
    kind = next((auto for end, auto in heads.items() if named.endswith(end)), AutoModelForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return kind.from_pretrained(path, dtype=getattr(torch, dtype)).eval(), tokenizer


def fitted(
    model: Any,
    tokenizer: Any,
    split: Split,
    settings: Settings,
    source: str,
    without: Sequence[str] = (),
    **training: Any,
) -> Any:
    """A trainer whose model has a fitted adapter, `without` some modules; an earlier adapter is replaced."""
    if ADAPTER in (getattr(model, "peft_config", None) or {}):
        model.delete_adapter(ADAPTER)
    config = GradiendConfig(
        feature="gender", classes=settings.classes, source=source, density=settings.density,
        exclude_modules=list(without) or None,
    )  # fmt: skip
    model.add_adapter(config, adapter_name=ADAPTER)
    args = GradiendTrainingArguments(
        output_dir=str(Path(settings.output) / "checkpoints"),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=32,
        mask_draws=settings.mask_draws,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **training,
    )
    trainer = GradiendTrainer(
        model, args, split.train.pairs, split.choice.pairs, split.choice.neutral, tokenizer, adapter_name=ADAPTER
    )
    trainer.train()
    return trainer


def best_trained(model: Any, tokenizer: Any, split: Split, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The paper's estimator with the learning rate of the best correlation on the choice material.

    Returns:
        Its trainer, and the tries: learning rate → correlation, and the seconds of all tries and of one.
    """
    tried: dict[float, float] = {}
    best, started = None, time.perf_counter()
    for rate in settings.trained.learning_rates:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the table shows starts that did not converge
            trainer = fitted(
                model, tokenizer, split, settings, settings.source,
                estimator="trained", learning_rate=rate, max_steps=settings.trained.steps,
                seeds=settings.trained.seeds, eval_steps=max(1, settings.trained.steps // 2),
            )  # fmt: skip
        tried[rate] = trainer.fitted[0].correlation
        if best is None or tried[rate] > tried[best[0]]:
            best = rate, trainer.fitted
    seconds = time.perf_counter() - started
    trainer.fitted = best[1]
    set_features(trainer.model, ADAPTER, [best[1][0].feature], trainer.pairs)
    return trainer, {"tried": tried, "best": best[0], "seconds": seconds}


# ---- measures -------------------------------------------------------------------------------------------------------


@dataclass
class Edit:
    """One chosen edit.

    Attributes:
        chosen: The scores of the edit on the choice material.
        before: The scores of the unedited model on the test material.
        after: The scores of the edited model there.
    """

    chosen: Point
    before: Point
    after: Point

    def times(self, goal: str) -> float:
        """The factor by which the goal rose on the test material."""
        return self.after.goals[goal] / self.before.goals[goal]


def chosen_edits(trainer: Any, split: Split, settings: Settings) -> tuple[dict[str, Edit], Selection]:
    """For every goal the best edit within the budget on the choice material, measured on the test material."""
    selection = trainer.select(
        settings.goals[0], budget=settings.budget,
        feature_factors=settings.feature_factors, learning_rates=settings.rates,
        eval_dataset=split.choice.pairs, neutral_dataset=split.choice.stories,
    )  # fmt: skip
    measure = trainer.scorer(split.test.pairs, split.test.stories)
    before = scored(trainer, measure, selection.base, None)
    edits = {}
    for goal in settings.goals:
        best = selection.best if goal == selection.goal else selection.choose(goal).best
        edits[goal] = Edit(best, before, scored(trainer, measure, best, before))
    return edits, selection


def scored(trainer: Any, scorer: Scorer, edit: Point, base: Point | None) -> Point:
    """An edit, measured by a scorer."""
    with applied(trainer, edit):
        return scorer.score(edit.pair, edit.feature_factor, edit.learning_rate, base)


@contextmanager
def applied(trainer: Any, edit: Point | None) -> Iterator[None]:
    """Apply an edit to the weights within a `with` block; `None` leaves the model unedited."""
    factor, rate = (edit.feature_factor, edit.learning_rate) if edit else (0.0, 0.0)
    with edited(trainer.model, ADAPTER, feature_factor=factor, learning_rate=rate, pair=trainer.pairs[0]):
        yield


def encoded_test(trainer: Any, split: Split) -> EncodedValues:
    """The encoder's values on the test material."""
    return trainer.encode(split.test.pairs, split.test.neutral)[0]


@torch.no_grad()
def written(model: Any, tokenizer: Any, sentence: str) -> str:
    """The words that a masked model puts into a sentence's slot, or a causal model's continuation from the slot on."""
    begin, end = sentence.split(SLOT)
    if tokenizer.mask_token is not None:
        batch = tokenizer(begin + tokenizer.mask_token + end, return_tensors="pt")
        at = int((batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0])
        chances, tokens = model(**batch).logits[0, at].softmax(-1).topk(3)
        found = [f"{tokenizer.decode([t]).strip()} {p:.2f}" for t, p in zip(tokens, chances, strict=True)]
        return f"{begin}**[{', '.join(found)}]**{end}"
    batch = tokenizer(begin.rstrip(), return_tensors="pt")
    ids = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=40, do_sample=False,
        pad_token_id=tokenizer.pad_token_id or 0,
    )[0]  # fmt: skip
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip().replace("\n", " ")


# ---- which weights --------------------------------------------------------------------------------------------------


def place(parameter: str) -> tuple[str, str]:
    """A parameter's layer (empty if it is in none) and kind of module, as in `("encoder 3", "attention.query")`."""
    owner = parameter.rpartition(".")[0].split(".")
    at = next((i for i, part in enumerate(owner) if part.isdigit()), None)
    if at is None:
        return "", owner[-1]
    side = next((part for part in owner[:at] if part in ("encoder", "decoder")), "")
    # Parts of names, as in BERT's "attention.self.query" and T5's "layer.0.SelfAttention.q", that carry no meaning.
    inner = [part for part in owner[at + 1 :] if not part.isdigit() and part not in ("layer", "self")]
    return f"{side} {owner[at]}".strip(), ".".join(inner)


def weight_table(decoder: FeatureDecoder, density: float) -> pd.DataFrame:
    """Where the decoder changes the model: one row for each layer and kind of module.

    Columns: `layer`, `module`, `entries` (its share of all weights), `change` (its share of ‖Wd‖²) and `kept` (its
    share of the entries that the density leaves).
    """
    import pandas as pd

    pruned = decoder.prune(density).importance()
    rows = []
    for name, (_, square, _) in decoder.importance().items():
        layer, module = place(name)
        kept = pruned[name][2] if name in pruned else 0
        rows.append((layer, module, decoder.shapes[name].numel(), square, kept))
    table = pd.DataFrame(rows, columns=["layer", "module", "entries", "change", "kept"])
    table = table.groupby(["layer", "module"], as_index=False, sort=False).sum()
    for column in ("entries", "change", "kept"):
        table[column] = table[column] / table[column].sum()
    return table.sort_values("change", ascending=False, ignore_index=True)


# ---- the study ------------------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """One way of fitting, under one seed.

    Attributes:
        encoding: `cor`, `acc`, `cor_enc` and `acc_enc` on the test material.
        edits: Goal → edit; empty where none was chosen.
        seconds: How long the fit took.
        facts: Other figures of the fit.
    """

    encoding: dict[str, float]
    edits: dict[str, Edit] = field(default_factory=dict)
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """One model under one seed.

    Attributes:
        fits: Name of the fit → its figures.
        written: Name of the fit whose edits are shown: the one without `exclude_modules`, where the model has them.
        split: The data that the fits were measured on.
        encoded: The encoder's values under the first fit.
        selection: The grid of the fit that is shown.
        weights: `weight_table` of the first fit.
        samples: Goal or `"before"` → the texts that the model writes.
    """

    fits: dict[str, Fit]
    written: str
    split: Split
    encoded: EncodedValues
    selection: Selection
    weights: pd.DataFrame
    samples: dict[str, list[str]]


def run_seed(path: str, settings: Settings, seed: int, with_trained: bool = False) -> Outcome:
    """Fit one model in every way on one split, and measure."""
    split = split_data(read_stories(settings.stories), settings, seed)
    model, tokenizer = load(path, settings.dtype)
    fits, read, weights = {}, [], []
    present = [name for name in settings.exclude_modules if any(n.endswith(name) for n, _ in model.named_modules())]
    for without in [[], present] if present else [[]]:
        shown = ", ".join([f"closed form, {settings.source}", *(f"without {name}" for name in without)])
        started = time.perf_counter()
        trainer = fitted(model, tokenizer, split, settings, settings.source, without, eval_strategy="no")
        seconds = time.perf_counter() - started
        read.append(encoded_test(trainer, split))
        edits, selection = chosen_edits(trainer, split, settings)
        weights.append(weight_table(trainer.fitted[0].feature.decoder, settings.density))
        fits[shown] = Fit(read[-1].metrics(), edits, seconds)
    samples = sampled(trainer, tokenizer, edits, settings)
    for source in settings.other_sources:
        trainer = fitted(model, tokenizer, split, settings, source)
        fits[f"closed form, {source}"] = Fit(encoded_test(trainer, split).metrics())
    if with_trained:
        trainer, facts = best_trained(model, tokenizer, split, settings)
        own = chosen_edits(trainer, split, settings)[0] if settings.trained.edits else {}
        fits[f"trained, {settings.source}"] = Fit(encoded_test(trainer, split).metrics(), own, facts["seconds"], facts)
    return Outcome(fits, shown, split, read[0], selection, weights[0], samples)


def sampled(trainer: Any, tokenizer: Any, edits: dict[str, Edit], settings: Settings) -> dict[str, list[str]]:
    """The texts that the model writes before and after every edit."""
    found = {}
    if trainer.task == "seq2seq":
        return found
    for name, edit in [("before", None), *((goal, edit.chosen) for goal, edit in edits.items())]:
        with applied(trainer, edit):
            found[name] = [written(trainer.model, tokenizer, sentence) for sentence in settings.samples]
    return found


# ---- report ---------------------------------------------------------------------------------------------------------


def spread(values: list[float], form: str) -> str:
    """Mean and interval over seeds; for one value only the value."""
    return cell(values, form) if len(values) > 1 else format(values[0], form)


def with_fit(outcomes: list[Outcome], name: str) -> list[Fit]:
    """One fit under all seeds that have it."""
    return [outcome.fits[name] for outcome in outcomes if name in outcome.fits]


def encoding_table(results: dict[str, list[Outcome]]) -> str:
    """How well every fit reads the gender of the test material."""
    names = ("cor", "cor_enc", "acc", "acc_enc")
    lines = []
    for model, outcomes in results.items():
        for fit in outcomes[0].fits:
            found = with_fit(outcomes, fit)
            lines.append([model, fit, *(spread([f.encoding[name] for f in found], ".3f") for name in names)])
    return markdown(["model", "fit", *names], lines, 2)


def edit_table(results: dict[str, list[Outcome]]) -> str:
    """What the edits do on the test material."""
    lines = []
    for model, outcomes in results.items():
        for fit in outcomes[0].fits:
            for goal in outcomes[0].fits[fit].edits:
                edits = [found.edits[goal] for found in with_fit(outcomes, fit)]
                cells = [spread([e.before.goals[goal] for e in edits], ".3f")]
                cells += [spread([e.after.goals[goal] for e in edits], ".3f")]
                cells += [spread([e.times(goal) for e in edits], ".1f")]
                for label in edits[0].before.probabilities:
                    before, after = ([getattr(e, at).probabilities[label] for e in edits] for at in ("before", "after"))
                    cells.append(f"{sum(before) / len(before):.2f} → {sum(after) / len(after):.2f}")
                cells.append(spread([e.after.cost for e in edits], ".1%"))
                lines.append([model, fit, goal, *cells])
    first = next(iter(results.values()))[0]
    classes = next(iter(next(iter(first.fits.values())).edits.values())).before.probabilities
    head = ["model", "fit", "goal", "before", "after", "times", *(f"P({label})" for label in classes), "cost"]
    return markdown(head, lines, 3)


def trained_table(results: dict[str, list[Outcome]], settings: Settings) -> str:
    """The time of the trained estimator, and its correlation at each learning rate."""
    lines = []
    for model, outcomes in results.items():
        closed = with_fit(outcomes, f"closed form, {settings.source}")
        found = with_fit(outcomes, f"trained, {settings.source}")
        rates = settings.trained.learning_rates
        tried = ", ".join(f"{rate:g}: {spread([f.facts['tried'][rate] for f in found], '.3f')}" for rate in rates)
        starts = f"{len(rates)} × {settings.trained.seeds} × {settings.trained.steps}"
        times = [fit.seconds / own.seconds for fit, own in zip(found, closed, strict=False)]
        lines.append([model, starts, tried, spread(times, ".0f")])
    head = ["model", "rates × starts × steps", "cor on choice by rate", "times the closed form's time"]
    return markdown(head, lines, 3)


def chosen_table(results: dict[str, list[Outcome]], settings: Settings) -> str:
    """The chosen edits, by seed."""
    lines = []
    for model, outcomes in results.items():
        for goal in settings.goals:
            edits = [outcome.fits[outcome.written].edits[goal].chosen for outcome in outcomes]
            cells = [f"h = {e.feature_factor:g}, α = {e.learning_rate:g} ({e.cost:.1%})" for e in edits]
            lines.append([model, outcomes[0].written, goal, *cells])
    return markdown(["model", "fit", "goal", *(f"seed {seed}" for seed in settings.seeds)], lines, 6)


def weights_section(results: dict[str, list[Outcome]], most: int = 8) -> str:
    """The layers and modules that the decoder changes most, for the first seed."""
    parts = []
    for model, outcomes in results.items():
        rows = outcomes[0].weights.head(most).itertuples()
        lines = [[r.layer or "–", r.module, f"{r.entries:.1%}", f"{r.change:.1%}", f"{r.kept:.1%}"] for r in rows]
        head = ["layer", "module", "of all weights", "of ‖Wd‖²", "of the entries kept"]
        parts.append(f"**{model}**\n\n" + markdown(head, lines, 2))
    return "\n\n".join(parts)


def sample_section(results: dict[str, list[Outcome]]) -> str:
    """The texts that the models write before and after, for the first seed."""
    parts = []
    for model, outcomes in results.items():
        for name, texts in outcomes[0].samples.items():
            parts.append(f"**{model}, {name}**\n\n" + "\n".join(f"- {text}" for text in texts))
    return "\n\n".join(parts)


def report(results: dict[str, list[Outcome]], settings: Settings, command: str) -> str:
    """The text of `results.md`."""
    split = next(iter(results.values()))[0].split
    counts = [
        f"{name}: {len(part.material.female) + len(part.material.male)} names, {len(part.material.prompts)} prompts, "
        f"{len(part.pairs)} pairs, {len(part.stories)} stories, {len(part.neutral)} neutral sentences"
        for name, part in (("train", split.train), ("choice", split.choice), ("test", split.test))
    ]
    parts = [
        "# GRADIEND, gender: results",
        f"```\n{command}\n```",
        "; ".join(counts) + f". Seeds {settings.seeds}: mean [95 % t-interval over seeds]. Everything is measured on "
        "test.",
        PAPER,
        "## Reading",
        encoding_table(results),
        f"## Writing\n\nA share of {settings.density:g} of the weights is changed. Edits are chosen on the choice "
        f"material; the interval of their cost there ends at {settings.budget:.1%} at most. The cost on test is a "
        "share of the loss, for masked models of the accuracy.",
        edit_table(results),
        "The chosen edits, with their cost on the choice stories:",
        chosen_table(results, settings),
    ]
    if any(name.startswith("trained") for outcomes in results.values() for name in outcomes[0].fits):
        parts += ["## The trained estimator", trained_table(results, settings)]
    parts += ["## Which weights\n\nThe first seed, fitted on all modules.", weights_section(results)]
    parts += ["## Before and after\n\nThe first seed, with the edits chosen above.", sample_section(results)]
    return "\n\n".join([*parts, ""])


def record(results: dict[str, list[Outcome]], settings: Settings) -> list[dict[str, Any]]:
    """The content of `results.json`: every fit under every seed."""
    return [
        {"model": model, "seed": seed, "fits": {name: asdict(fit) for name, fit in outcome.fits.items()}}
        for model, outcomes in results.items()
        for seed, outcome in zip(settings.seeds, outcomes, strict=True)
    ]


# ---- figures --------------------------------------------------------------------------------------------------------


def figure_encoded(results: dict[str, list[Outcome]], path: Path) -> None:
    """A histogram of encoded values for each class and neutral sentences, all seeds together."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4.6 * len(results), 3.2), layout="constrained")
    for axes, (model, outcomes) in zip(
        drawing.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        tables = [outcome.encoded.to_pandas() for outcome in outcomes]
        names = [*outcomes[0].encoded.pair, "neutral"]
        for name, colour in zip(names, ("C3", "C0", "0.6"), strict=True):
            values = [v for table in tables for v in table.loc[table["class"] == name, "value"]]
            axes.hist(values, bins=[i / 20 for i in range(-20, 21)], density=True, alpha=0.7, color=colour, label=name)
        axes.set(title=model, xlabel="encoded value", ylabel="density", xlim=(-1, 1))
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    drawing.savefig(path, dpi=130)


def figure_surface(results: dict[str, list[Outcome]], settings: Settings, path: Path) -> None:
    """Draw every goal over feature factor and learning rate, first seed; hatched: too costly, star: the chosen edit."""
    from matplotlib.figure import Figure

    goals = settings.goals
    drawing = Figure(figsize=(4.2 * len(goals), 2.9 * len(results)), layout="constrained")
    grid = drawing.subplots(len(results), len(goals), squeeze=False)
    factors, rates = sorted(settings.feature_factors), sorted(settings.rates)
    for row, (model, outcomes) in zip(grid, results.items(), strict=True):
        points = {(p.feature_factor, p.learning_rate): p for p in outcomes[0].selection.points}
        edits = outcomes[0].fits[outcomes[0].written].edits
        for axes, goal in zip(row, goals, strict=True):
            values = torch.full((len(factors), len(rates)), torch.nan)
            for (factor, rate), point in points.items():
                values[factors.index(factor), rates.index(rate)] = point.goals[goal]
            image = axes.imshow(values.numpy(), origin="lower", aspect="auto", cmap="viridis", vmin=0)
            for (factor, rate), point in points.items():
                if point.cost_upper > settings.budget:
                    axes.add_patch(_hatched(rates.index(rate), factors.index(factor)))
            best = edits[goal].chosen
            if best.learning_rate:
                axes.plot(rates.index(best.learning_rate), factors.index(best.feature_factor), "*", color="red", ms=13)
            axes.set_xticks(range(len(rates)), [f"{r:g}" for r in rates], rotation=90, fontsize=7)
            axes.set_yticks(range(len(factors)), [f"{f:g}" for f in factors], fontsize=7)
            axes.set_title(f"{model}: {goal}", fontsize=10)
            drawing.colorbar(image, ax=axes)
        row[0].set_ylabel("feature factor h")
    for axes in grid[-1]:
        axes.set_xlabel("learning rate α")
    drawing.savefig(path, dpi=130)


def _hatched(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="white", linewidth=0)


def figure_weights(results: dict[str, list[Outcome]], path: Path) -> None:
    """The share of ‖Wd‖² by layer and kind of module, mean over seeds."""
    import pandas as pd
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5.6 * len(results), 4.2), layout="constrained")
    for axes, (model, outcomes) in zip(
        drawing.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        table = pd.concat([outcome.weights for outcome in outcomes])
        table = table.pivot_table(index="module", columns="layer", values="change", aggfunc="sum") / len(outcomes)
        table = table.loc[table.sum(axis=1).sort_values(ascending=False).index]
        image = axes.imshow(table, aspect="auto", cmap="magma_r", vmin=0)
        for (i, j), value in ((at, table.iloc[at]) for at in _cells(table.shape)):
            if value >= 0.005:
                axes.text(
                    j,
                    i,
                    f"{value:.0%}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value > 0.5 * table.max().max() else "black",
                )
        axes.set_xticks(range(table.shape[1]), [name or "none" for name in table.columns], fontsize=8)
        axes.set_yticks(range(table.shape[0]), table.index, fontsize=8)
        axes.set(title=model, xlabel="layer")
        drawing.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}")
    drawing.savefig(path, dpi=130)


def _cells(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(shape[0]) for j in range(shape[1]))


# ---- command --------------------------------------------------------------------------------------------------------


def run(settings: Settings) -> dict[str, list[Outcome]]:
    """Run every model under every seed."""
    results: dict[str, list[Outcome]] = {}
    for name, path in settings.models.items():
        for number, seed in enumerate(settings.seeds):
            typer.echo(f"{name}, seed {seed}", err=True)
            results.setdefault(name, []).append(run_seed(path, settings, seed, number < settings.trained.splits))
    return results


def write(results: dict[str, list[Outcome]], settings: Settings, command: str) -> str:
    """Write tables and figures to the output folder; returns the text."""
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    text = report(results, settings, command)
    (output / "results.md").write_text(text, encoding="utf-8")
    (output / "results.json").write_text(json.dumps(record(results, settings), indent=1) + "\n", encoding="utf-8")
    figure_encoded(results, output / "encoded.png")
    figure_surface(results, settings, output / "surface.png")
    figure_weights(results, output / "weights.png")
    return text


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    settings = read_settings(settings_file, overrides)
    command = studies.command_line("gradiend_gender", settings_file, overrides)
    typer.echo(write(run(settings), settings, command))


if __name__ == "__main__":
    studies.start(main)
