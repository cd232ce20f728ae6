"""Fine-tuning on skewed sentences: how much of the skew is learned with and without a guard, and the cost for the task.

The feature is learned from other names and sentences. A guard removes its direction from every step of the optimizer.
For comparison, a LoRA is trained alone, and with an erasure that is active only during training and deleted afterwards.
With the erasure, activations do not show which pronoun comes next, so that the LoRA has little to learn it with (arXiv
2507.16795).
"""

from __future__ import annotations

import copy
import json
import random
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import (
    ConceptErasureCallback,
    ConceptErasureConfig,
    GradiendCallback,
    GradiendConfig,
    GradiendTrainer,
    GradiendTrainingArguments,
)
from recipes import studies

ADAPTER = "gender"
PRONOUNS = ("she", "he")
IGNORED = -100
# The largest number of stories that the erasure is fitted on.
STORIES_FITTED = 1000
WAYS = ("no guard", "monitor", "guard", "LoRA", "LoRA, erased meanwhile")
ERASURE, LORA = "next_pronoun", "tuned"
# Skew → the pronoun of a person by their position among the people that are trained on.
SKEWS = {
    "all he": lambda position: "he",
    "all she": lambda position: "she",
    "half and half": lambda position: PRONOUNS[position % 2],
}


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """The settings in `study.yaml`.

    Attributes:
        model: A Hub id or a folder of a causal language model.
        stories: A text file of stories.
        output: Where tables and figure go.
        feature_people: The people that the feature is learned from.
        feature_sentences: Sentences with `{person}` and `[FEATURE]`.
        people: People that are trained on, or only measured on.
        things: One thing for each person that is trained on.
        task_sentences: Sentences with `{person}` and `{thing}`.
        pronoun_sentences: Sentences with `{person}` and `{pronoun}`.
        held_out_task: How many task sentences are only measured on.
        held_out_pronoun: How many pronoun sentences are only measured on.
        held_out_people: How many people are only measured on.
        skews: Which pronoun people get, keys of `SKEWS`.
        seeds: One split and one order of the data for each.
        steps: Steps of fine-tuning.
        batch_size: Sentences in a step.
        learning_rate: The learning rate of AdamW.
        lora_learning_rate: The learning rate for a LoRA.
        lora_rank: The rank of the LoRA, on every linear map.
        log_steps: Steps between two logs of the feature neuron.
        density: The density of the GRADIEND adapter.
        story_count: Number of stories on which the loss on other text is measured.
    """

    model: str
    stories: str
    output: str
    feature_people: list[str]
    feature_sentences: list[str]
    people: list[str]
    things: list[str]
    task_sentences: list[str]
    pronoun_sentences: list[str]
    held_out_task: int = 4
    held_out_pronoun: int = 4
    held_out_people: int = 6
    skews: list[str] = field(default_factory=lambda: list(SKEWS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 150
    batch_size: int = 16
    learning_rate: float = 3e-4
    lora_learning_rate: float = 3e-3
    lora_rank: int = 8
    log_steps: int = 5
    density: float = 1.0
    story_count: int = 60


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Read the file, and the settings that follow it on the command line.

    Raises:
        ValueError: If the file is not a recipe, or a key is unknown.
    """
    return studies.read_settings(
        Settings,
        path,
        overrides,
        "model, stories, feature_people, feature_sentences, people, things, task_sentences, pronoun_sentences",
    )


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """The people and sentences that are trained on, and those that are only measured on.

    Attributes:
        owners: Person → thing, for the people that are trained on.
        strangers: People who are never trained on.
        task: Task sentences trained on.
        task_test: Task sentences only measured on.
        pronoun: Sentences with a pronoun, trained on.
        pronoun_test: Sentences with a pronoun, only measured on.
    """

    owners: dict[str, str]
    strangers: list[str]
    task: list[str]
    task_test: list[str]
    pronoun: list[str]
    pronoun_test: list[str]


def split_data(settings: Settings, seed: int) -> Split:
    """Draw people, their things, and sentences."""
    draw = random.Random(seed)
    lists = (settings.people, settings.things, settings.task_sentences, settings.pronoun_sentences)
    people, things, task, pronoun = (draw.sample(items, len(items)) for items in lists)
    first, second, third = settings.held_out_people, settings.held_out_task, settings.held_out_pronoun
    owners = dict(zip(people[first:], things, strict=False))
    return Split(owners, people[:first], task[second:], task[:second], pronoun[third:], pronoun[:third])


def skewed_rows(split: Split, skew: str, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Every training sentence about every trained person, with the pronoun that the skew gives them."""
    texts = []
    for position, (person, thing) in enumerate(split.owners.items()):
        texts += [sentence.format(person=person, thing=thing) for sentence in split.task]
        texts += [sentence.format(person=person, pronoun=SKEWS[skew](position)) for sentence in split.pronoun]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED), "attention_mask": mask}


# ---- model and feature ----------------------------------------------------------------------------------------------


def load(settings: Settings) -> tuple[Any, Any]:
    """The model, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(settings.model), tokenizer


def learn_feature(model: Any, tokenizer: Any, settings: Settings) -> float:
    """Add a fitted adapter that has no effect but holds the direction; return its correlation."""
    rows = []
    for word, other in (PRONOUNS, PRONOUNS[::-1]):
        for person in settings.feature_people:
            rows += [(text.replace("{person}", person), word, other, word) for text in settings.feature_sentences]
    columns = dict(zip(("text", "factual", "counterfactual", "label"), map(list, zip(*rows, strict=True)), strict=True))
    pairs = Dataset.from_dict(columns).shuffle(seed=0)
    config = GradiendConfig(
        feature="gender", classes=list(PRONOUNS), density=settings.density, keep_encoder=True, sticky=True
    )
    model.add_adapter(config, adapter_name=ADAPTER)
    args = GradiendTrainingArguments(output_dir=settings.output, save_strategy="no", disable_tqdm=True, use_cpu=True)
    cut = len(pairs) * 4 // 5
    trainer = GradiendTrainer(
        model, args, pairs.select(range(cut)), pairs.select(range(cut, len(pairs))), processing_class=tokenizer
    )
    trainer.train()
    return float(trainer.evaluate()["cor"])


# ---- what is measured -----------------------------------------------------------------------------------------------


@torch.no_grad()
def leaning(model: Any, tokenizer: Any, people: Iterable[str], sentences: Iterable[str]) -> torch.Tensor:
    """`(people, 2)`: P(she) − P(he) where the pronoun comes, and log P(she)/P(he), averaged over sentences."""
    she, he = (tokenizer(f"a {word}")["input_ids"][-1] for word in PRONOUNS)
    found = []
    for person in people:
        values = []
        for sentence in sentences:
            ids = tokenizer(sentence.split(" {pronoun}")[0].format(person=person), return_tensors="pt").input_ids
            likely = model(ids).logits[0, -1].double().log_softmax(-1)
            values.append(torch.stack([likely[she].exp() - likely[he].exp(), likely[she] - likely[he]]))
        found.append(torch.stack(values).mean(0))
    return torch.stack(found)


def task_accuracy(model: Any, tokenizer: Any, split: Split) -> float:
    """How often, in unseen sentences, a person's own thing is the most likely of all things."""
    things, right = list(split.owners.values()), 0
    for person, thing in split.owners.items():
        for sentence in split.task_test:
            texts = [sentence.format(person=person, thing=candidate) for candidate in things]
            likely = log_likelihoods(model, [tokenizer(text)["input_ids"] for text in texts])
            right += things[int(likely.argmax())] == thing
    return right / (len(things) * len(split.task_test))


@torch.no_grad()
def log_likelihoods(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """`(rows,)`: the log-probability of each row."""
    batch = collate([{"input_ids": row, "labels": row} for row in rows])
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float().log_softmax(-1)
    return (logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != IGNORED)).sum(1)


def story_loss(model: Any, tokenizer: Any, stories: list[str]) -> float:
    """The mean loss in nats per token."""
    rows = [tokenizer(story)["input_ids"][:256] for story in stories]
    total = sum(float(log_likelihoods(model, [row])[0]) for row in rows)
    return -total / sum(len(row) - 1 for row in rows)


def measure(model: Any, tokenizer: Any, split: Split, skew: str, stories: list[str]) -> dict[str, float]:
    """How far the model follows the skew of the data, for trained people and for strangers, and the task's accuracy."""
    model.eval()
    signs = torch.tensor([1.0 if SKEWS[skew](n) == "she" else -1.0 for n in range(len(split.owners))]).double()
    known = signs @ leaning(model, tokenizer, split.owners, split.pronoun_test) / len(signs)
    found = {"skew": float(known[0]), "log-odds": float(known[1])}
    if abs(signs.sum()) == len(signs):  # with both pronouns the data give strangers no direction
        strangers = signs[0] * leaning(model, tokenizer, split.strangers, split.pronoun_test).mean(0)
        found |= {"skew of strangers": float(strangers[0]), "log-odds of strangers": float(strangers[1])}
    return found | {
        "accuracy": task_accuracy(model, tokenizer, split),
        "loss on stories": story_loss(model, tokenizer, stories),
    }


# ---- the study ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The outcome of one seed and one skew.

    Attributes:
        seed: The seed of split and order.
        skew: A key of `SKEWS`.
        figures: "before" and the ways of training → figure → value.
        neuron: Way of training → `(step, value of the feature neuron)` at every log.
    """

    seed: int
    skew: str
    figures: dict[str, dict[str, float]]
    neuron: dict[str, list[tuple[int, float]]]


def next_pronouns(stories: list[str], tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Stories in which a token is labelled with the pronoun that comes next; all others have no label."""
    ids = {tokenizer(f"a {word}")["input_ids"][-1]: number for number, word in enumerate(PRONOUNS)}
    batches = []
    for start in range(0, len(stories), 8):
        rows = [tokenizer(story)["input_ids"][:256] for story in stories[start : start + 8]]
        batch = collate([{"input_ids": row, "labels": row} for row in rows])
        following = batch.pop("labels")[:, 1:]
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for token, number in ids.items():
            labels[:, :-1][following == token] = number
        batches.append({**batch, "concept_labels": labels})
    return batches


def fine_tune(model: Any, rows: list[dict[str, list[int]]], way: str, settings: Settings, seed: int) -> list[tuple]:
    """Train in place; return the monitor's log."""
    callbacks: list[Any] = [GradiendCallback(ADAPTER, mode=way)] if way in ("monitor", "guard") else []
    rate = settings.learning_rate
    if way.startswith("LoRA"):
        rate = settings.lora_learning_rate
        torch.manual_seed(seed)
        if way != "LoRA":
            config = ConceptErasureConfig(concept="next pronoun", labels=list(PRONOUNS), affine=True, sticky=True)
            model.add_adapter(config, adapter_name=ERASURE)
            # The stories on which the loss is measured are not fitted on.
            stories = read_stories(settings.stories, STORIES_FITTED)[settings.story_count :]
            batches = next_pronouns(stories, load(settings)[1])
            callbacks = [ConceptErasureCallback(batches, ERASURE, pool="tokens", delete_at_end=True)]
        lora = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear")
        model.add_adapter(lora, adapter_name=LORA)
    else:
        model.requires_grad_(True)
    args = TrainingArguments(
        output_dir=settings.output, max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
        learning_rate=rate, logging_steps=settings.log_steps, seed=seed, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, args, collate, rows, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    key = f"{ADAPTER}_encoded"
    return [(row["step"], row[key]) for row in trainer.state.log_history if key in row]


def run_seed(settings: Settings, seed: int) -> list[Outcome]:
    """Run all skews and ways of training on one split."""
    model, tokenizer = load(settings)
    learn_feature(model, tokenizer, settings)
    stories = read_stories(settings.stories, settings.story_count)
    split = split_data(settings, seed)
    outcomes = []
    for skew in settings.skews:
        rows = skewed_rows(split, skew, tokenizer)
        figures = {"before": measure(model, tokenizer, split, skew, stories)}
        neuron = {}
        for way in WAYS:
            tuned = copy.deepcopy(model)
            neuron[way] = fine_tune(tuned, rows, way, settings, seed)
            figures[way] = measure(tuned, tokenizer, split, skew, stories)
        outcomes.append(Outcome(seed, skew, figures, neuron))
    return outcomes


def read_stories(path: str, count: int) -> list[str]:
    """The first stories of a file with empty lines between paragraphs: one begins with "Once" or "One day, a …"."""
    text = Path(path).read_text(encoding="utf-8")
    stories = re.split(r"\n\s*\n(?=Once |One day, an? )", text)
    # The model was trained on stories whose paragraphs follow each other without an empty line.
    return [re.sub(r"\s*\n\s*", "\n", story.strip()) for story in stories][:count]


def spread(values: list[float], form: str = ".3f") -> str:
    """Mean, and range in brackets."""
    return f"{sum(values) / len(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def tables(outcomes: list[Outcome]) -> str:
    """One table for each skew: a line for the model before, and for each way of training."""
    parts = []
    for skew in dict.fromkeys(outcome.skew for outcome in outcomes):
        chosen = [outcome for outcome in outcomes if outcome.skew == skew]
        names = list(chosen[0].figures["before"])
        lines = [["", *names], ["---", *["---:"] * len(names)]]
        lines += [
            [way, *(spread([o.figures[way][name] for o in chosen]) for name in names)] for way in ("before", *WAYS)
        ]
        parts.append(f"## {skew}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
        for name, way, beside in (
            ("guard", "guard", "no guard"),
            ("erasure kept out of the LoRA", "LoRA, erased meanwhile", "LoRA"),
        ):
            held = [kept_out(outcome, way, beside) for outcome in chosen]
            said = f"Of the shift in log-odds the {name}" + ("" if "kept" in name else " kept out")
            said += f" {spread([h[0] for h in held], '.0%')}"
            strangers = f", of that for strangers {spread([h[1] for h in held], '.0%')}" if len(held[0]) > 1 else ""
            parts.append(f"{said}{strangers}.")
    return "\n\n".join(parts)


def kept_out(outcome: Outcome, way: str, beside: str) -> list[float]:
    """The share of the shift in log-odds that `way` prevents, compared with `beside`: trained people, strangers."""
    found = []
    for name in ("log-odds", "log-odds of strangers"):
        if name in outcome.figures["before"]:
            start, free, guarded = (outcome.figures[way][name] for way in ("before", beside, way))
            found.append(1 - (guarded - start) / (free - start))
    return found


def neuron_table(outcomes: list[Outcome]) -> str:
    """The monitored neuron by skew: at the first log, and its mean over the later ones."""
    lines = ["| skew | first log | later, mean |", "| --- | ---: | ---: |"]
    for skew in dict.fromkeys(outcome.skew for outcome in outcomes):
        runs = [[value for _, value in o.neuron["monitor"]] for o in outcomes if o.skew == skew]
        first, later = [run[0] for run in runs], [sum(run[1:]) / len(run[1:]) for run in runs]
        lines.append(f"| {skew} | {spread(first)} | {spread(later)} |")
    return "\n".join(lines)


def report(outcomes: list[Outcome], settings: Settings) -> str:
    """The page of results."""
    return (
        "# Fine-tuning on skewed text: results\n\n"
        f"{settings.steps} steps of {settings.batch_size} sentences, learning rate {settings.learning_rate:g}, full "
        f"fine-tuning, feature with density {settings.density:g}; the LoRA has rank {settings.lora_rank} on all linear "
        f"maps, learning rate {settings.lora_learning_rate:g}. Seeds {settings.seeds}: mean (range).\n\n"
        "*skew*: the probability of the pronoun that the data give a person, minus that of the other pronoun, in "
        "unseen sentences. *log-odds*: the logarithm of their ratio, which does not saturate. *accuracy*: at saying "
        f"whose thing it is, in unseen sentences.\n\n{tables(outcomes)}\n\n## The neuron\n\nThe value that the monitor "
        "logs, +1 for she and −1 for he. It also reads the four fifths of the sentences that have no pronoun.\n\n"
        f"{neuron_table(outcomes)}\n"
    )


def figure(outcomes: list[Outcome], path: Path) -> None:
    """Draw the neuron during training (left, one line a seed) and the log-odds after it (right, one point a seed)."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = drawing.subplots(1, 2)
    skews = list(dict.fromkeys(outcome.skew for outcome in outcomes))
    for outcome in outcomes:
        color = f"C{skews.index(outcome.skew)}"
        label = outcome.skew if outcome.seed == outcomes[0].seed else None
        left.plot(*zip(*outcome.neuron["monitor"], strict=True), color=color, label=label, alpha=0.8)
        shown = ("before", "no guard", "guard", "LoRA", "LoRA, erased meanwhile")
        signed = {way: outcome.figures[way]["log-odds"] for way in shown}
        place = [skews.index(outcome.skew) + shift for shift in (-0.3, -0.15, 0, 0.15, 0.3)]
        right.plot(place, list(signed.values()), color="0.8", zorder=0)
        for x, (way, value), mark in zip(place, signed.items(), "os^Dv", strict=True):
            named = outcome is outcomes[0]
            right.plot(x, value, mark, color=color, label=way if named else None)
    left.axhline(0, color="0.7", linewidth=0.8)
    left.set(xlabel="step", ylabel="feature neuron (+1 she, −1 he)", title="what the monitor logs")
    right.set(xticks=range(len(skews)), xticklabels=skews, ylabel="log-odds, the way of the data", title="the skew")
    left.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=3, fontsize="small", frameon=False)
    right.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=3, fontsize="small", frameon=False)
    drawing.savefig(path, dpi=150)


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    settings = read_settings(settings_file, overrides)
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for seed in settings.seeds:
        typer.echo(f"seed {seed}", err=True)
        outcomes += run_seed(settings, seed)
    text = report(outcomes, settings)
    (output / "results.md").write_text(text, encoding="utf-8")
    rows = ",\n".join(json.dumps(vars(outcome)) for outcome in outcomes)
    (output / "results.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    figure(outcomes, output / "figure.png")
    typer.echo(text)


if __name__ == "__main__":
    studies.start(main)
