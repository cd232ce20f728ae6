"""Gender erased from a model of stories: what is left on unseen names and prompts, and the cost on other stories.

Every fit uses the same names and prompts. They differ only in where the covariance comes from, and how it is shrunk.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import typer
from concept_erasure import LeaceFitter
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import ConceptErasureConfig, concept_dataloader, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import ConceptMoments, Eraser
from recipes import studies

GENDERS = ["male", "female"]
ADAPTER = "no_gender"
IGNORED = -100
Solve = Callable[[Tensor, Tensor], Eraser]  # (rows, width) and class ids (rows,) → eraser


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass
class Material:
    """Names of both genders, and prompts with a place for a name.

    Attributes:
        male: Names.
        female: Names.
        prompts: Beginnings of stories with `{name}` in them, after which a pronoun may come.
    """

    male: list[str]
    female: list[str]
    prompts: list[str]


@dataclass
class Settings:
    """The settings in `study.yaml`.

    Attributes:
        model: A Hub id or a folder of a causal language model.
        stories: A text file of stories.
        output: Where table and figure go.
        materials: Name of a set → its names and prompts.
        material: Which of these sets is split into fit and test.
        fit_only: Which other sets are fitted on as a whole, under every split.
        seeds: One split for each.
        test_share: Share of names, of prompts and of stories that is only measured on.
        background_stories: Unlabelled stories for mean and covariance.
        story_tokens: How many tokens of each story are read, at most.
        batch_size: Texts in a batch.
        positions: Which tokens of a prompt are labelled: `"all"`, from the end of the `"name"` on, or the `"last"`.
        pronouns: The token whose probability is compared, by its gender.
        sample: A beginning that is continued under every fit of the first seed.
    """

    model: str
    stories: str
    output: str
    materials: dict[str, Material]
    material: str = "report"
    fit_only: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    test_share: float = 0.5
    background_stories: int = 120
    story_tokens: int = 256
    batch_size: int = 64
    positions: str = "last"
    pronouns: dict[str, str] = field(default_factory=lambda: {"he": " he", "she": " she"})
    sample: str = "Once upon a time, there was a child named Lily. One day, Lily"


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Read the file, and the settings that follow it on the command line.

    Raises:
        ValueError: If the file is not a recipe, or a key is unknown.
    """
    settings = studies.read_settings(Settings, path, overrides, "model, stories, materials")
    return replace(settings, materials={name: Material(**lists) for name, lists in settings.materials.items()})


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """The data of one seed; nothing in `test` or `test_stories` was fitted on.

    Attributes:
        fit: Names and prompts to fit on.
        test: Other names, in other prompts.
        background: Stories without labels.
        test_stories: Other stories.
    """

    fit: Material
    test: Material
    background: list[str]
    test_stories: list[str]


def split_data(material: Material, stories: list[str], settings: Settings, seed: int) -> Split:
    """Draw a split of names, prompts and stories."""
    order = random.Random(seed)

    def cut(items: list[str]) -> tuple[list[str], list[str]]:
        drawn = order.sample(items, len(items))
        held = round(len(items) * settings.test_share)
        return drawn[held:], drawn[:held]

    (male, other_male), (female, other_female) = cut(material.male), cut(material.female)
    prompts, other_prompts = cut(material.prompts)
    background, test_stories = cut(stories)
    for name in settings.fit_only:
        if (more := settings.materials[name]) is not material:
            male, female, prompts = male + more.male, female + more.female, prompts + more.prompts
    return Split(
        Material(male, female, prompts),
        Material(other_male, other_female, other_prompts),
        background[: settings.background_stories],
        test_stories,
    )


def read_stories(path: str) -> list[str]:
    """The stories of a file with empty lines between paragraphs: a story begins with "Once" or "One day, a …"."""
    text = Path(path).read_text(encoding="utf-8")
    stories = re.split(r"\n\s*\n(?=Once |One day, an? )", text)
    # The model was trained on stories whose paragraphs follow each other without an empty line.
    return list(dict.fromkeys(re.sub(r"\s*\n\s*", "\n", story.strip()) for story in stories))


def labelled_rows(material: Material, tokenizer: Any, positions: str) -> Dataset:
    """Every name in every prompt, tokenised, with one label for each token.

    Returns:
        Columns `input_ids`, `attention_mask` and `gender`, a list of class ids with −100 at unlabelled tokens.
    """
    rows = []
    for gender, label in ((gender, label) for label, gender in enumerate(GENDERS)):
        for name in getattr(material, gender):
            for prompt in material.prompts:
                encoded = tokenizer(prompt.format(name=name), return_offsets_mapping=True)
                named = prompt.index("{name}") + len(name)
                ends = [end for _, end in encoded["offset_mapping"]]
                first = {"all": 0, "name": next(i for i, end in enumerate(ends) if end >= named), "last": len(ends) - 1}
                labels = [IGNORED] * first[positions] + [label] * (len(ends) - first[positions])
                rows.append({"input_ids": encoded["input_ids"], "attention_mask": [1] * len(ends), "gender": labels})
    return Dataset.from_list(rows)


def labelled_batches(material: Material, tokenizer: Any, settings: Settings) -> Any:
    """Prompts with names, as the fit reads them."""
    rows = labelled_rows(material, tokenizer, settings.positions)
    return concept_dataloader(rows, tokenizer, label_column="gender", batch_size=settings.batch_size, labels=GENDERS)


def story_batches(stories: list[str], tokenizer: Any, settings: Settings) -> Any:
    """Stories without labels."""
    rows = Dataset.from_dict({"text": stories})
    return concept_dataloader(
        rows, tokenizer, label_column=None, batch_size=settings.batch_size, max_length=settings.story_tokens
    )


# ---- fits -----------------------------------------------------------------------------------------------------------


def fit_in_order(model: Any, batches: Iterable[dict[str, Tensor]], solve: Solve) -> None:
    """Fit one site after the other by any solver, on activations that are erased upstream, with one pass per site."""
    batches = list(batches)
    for layer in erasure_layers(model, ADAPTER).values():
        # The adapter's own hook runs first and does not change the output of a site without an eraser.
        layer.set_eraser(ADAPTER, solve(*rows_at(layer.host, model, batches)), torch.float32)


class Reached(Exception):
    """Raised to stop a forward pass at the module that it was run for."""


@torch.no_grad()
def rows_at(module: Any, model: Any, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The labelled rows of a module's output, `(rows, width)`, and their class ids; what comes after it is not run."""
    kept: list[Tensor] = []

    def stop(host: Any, inputs: Any, output: Tensor) -> None:
        kept.append(output)
        raise Reached

    handle = module.register_forward_hook(stop)
    labels = [batch["concept_labels"] for batch in batches]
    try:
        for batch in batches:
            with suppress(Reached):
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        handle.remove()
    rows = [states[found != IGNORED] for states, found in zip(kept, labels, strict=True)]
    return torch.cat(rows), torch.cat([found[found != IGNORED] for found in labels])


def solve_without_shrinkage(x: Tensor, z: Tensor) -> Eraser:
    """LEACE with the unshrunk covariance of the labelled rows."""
    return ConceptMoments(x.shape[1], len(GENDERS)).update(x, z).eraser(shrinkage=None)


def solve_by_reference(x: Tensor, z: Tensor) -> Eraser:
    """The eraser that `concept_erasure.LeaceFitter` finds with its defaults."""
    found = LeaceFitter.fit(x, torch.nn.functional.one_hot(z, len(GENDERS)).to(x.dtype)).eraser
    return Eraser(found.proj_left, found.proj_right, found.bias)


def fits(split: Split, tokenizer: Any, settings: Settings) -> dict[str, Callable[[Any], Any]]:
    """Name of a fit → the function that fits the adapter of a model."""
    labelled = list(labelled_batches(split.fit, tokenizer, settings))
    background = list(story_batches(split.background, tokenizer, settings))
    return {
        "background, shrinkage": lambda model: fit_concept_erasure(
            model, labelled, ADAPTER, background=background, progress=False
        ),
        "shrinkage only": lambda model: fit_concept_erasure(model, labelled, ADAPTER, progress=False),
        "neither": lambda model: fit_in_order(model, labelled, solve_without_shrinkage),
        "reference's fit": lambda model: fit_in_order(model, labelled, solve_by_reference),
    }


# ---- measures -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pronoun_probabilities(model: Any, tokenizer: Any, material: Material, pronouns: dict[str, str]) -> Tensor:
    """Probability of each pronoun as the next token: `(prompts, genders, names, pronouns)`."""
    tokens = [pronoun_token(tokenizer, pronoun) for pronoun in pronouns.values()]
    found = []
    for prompt in material.prompts:
        texts = [prompt.format(name=name) for name in material.male + material.female]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        ends = logits[torch.arange(len(texts)), batch["attention_mask"].sum(1) - 1]
        found.append(ends.softmax(-1)[:, tokens])
    return torch.stack(found).reshape(len(material.prompts), len(GENDERS), -1, len(tokens))


def pronoun_token(tokenizer: Any, pronoun: str) -> int:
    """The one token of a pronoun in the middle of a sentence.

    Raises:
        ValueError: If the pronoun is several tokens.
    """
    start, whole = (tokenizer("so" + text)["input_ids"] for text in ("", pronoun))
    if len(whole) != len(start) + 1:
        raise ValueError(f"{pronoun!r} is {len(whole) - len(start)} tokens of this model: give pronouns of one token.")
    return int(whole[-1])


@torch.no_grad()
def loss(model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
    """Mean negative log-likelihood of a token, in nats."""
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total += float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                                                         ignore_index=IGNORED, reduction="sum"))  # fmt: skip
        count += int((labels[:, 1:] != IGNORED).sum())
    return total / count


def continuation(model: Any, tokenizer: Any, beginning: str) -> str:
    """The most likely continuation of a beginning, of one to three sentences."""
    inputs = tokenizer(beginning, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)
    return str(tokenizer.decode(written[0], skip_special_tokens=True)).strip()


def measure(model: Any, tokenizer: Any, split: Split, settings: Settings) -> dict[str, float]:
    """All figures of one line of the table."""
    found = pronoun_probabilities(model, tokenizer, split.test, settings.pronouns)
    figures = {}
    for index, pronoun in enumerate(settings.pronouns):
        by_prompt = found[..., index].mean(2)  # (prompts, genders)
        for column, gender in enumerate(GENDERS):
            figures[f"P({pronoun}) {gender}"] = float(by_prompt[:, column].mean())
        figures[f"gap P({pronoun})"] = abs(float((by_prompt[:, 0] - by_prompt[:, 1]).mean()))
        figures[f"gap P({pronoun}) by prompt"] = float((by_prompt[:, 0] - by_prompt[:, 1]).abs().mean())
    figures["loss"] = loss(model, story_batches(split.test_stories, tokenizer, settings))
    return figures


def relative(figures: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """The figures, and also how far gaps fell and the loss rose, as shares."""
    falls = {f"{name} fell": 1 - figures[name] / before[name] for name in figures if name.startswith("gap")}
    return figures | falls | {"loss rose": figures["loss"] / before["loss"] - 1}


# ---- the study ------------------------------------------------------------------------------------------------------


def fresh_model(settings: Settings) -> Any:
    """The model with an adapter that is not fitted yet."""
    model = AutoModelForCausalLM.from_pretrained(settings.model).eval()
    config = ConceptErasureConfig(concept="gender", labels=GENDERS, affine=True)  # the reference's map is affine
    model.add_adapter(config, adapter_name=ADAPTER)
    return model


@dataclass
class Outcome:
    """One seed.

    Attributes:
        figures: Fit → name of a figure → its value.
        samples: Fit → how the sample story continues under it.
        split: What was measured on.
    """

    figures: dict[str, dict[str, float]]
    samples: dict[str, str]
    split: Split


def run_seed(settings: Settings, seed: int) -> Outcome:
    """Fit in every way on one split, and measure."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    split = split_data(settings.materials[settings.material], read_stories(settings.stories), settings, seed)
    model = fresh_model(settings)
    before = measure(model, tokenizer, split, settings)
    table = {"none": relative(before, before)}
    stories = {"none": continuation(model, tokenizer, settings.sample)}
    for name, fit in fits(split, tokenizer, settings).items():
        model = fresh_model(settings)
        fit(model)
        table[name] = relative(measure(model, tokenizer, split, settings), before)
        stories[name] = continuation(model, tokenizer, settings.sample)
    return Outcome(table, stories, split)


def spread(values: list[float], form: str) -> str:
    """Mean and range, as in `0.80 (0.75–0.84)`."""
    mean, least, most = (format(value, form) for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({least}–{most})"


def markdown(lines: list[list[str]]) -> str:
    """A table from its cells, the head first."""
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def table(outcomes: list[Outcome], pronouns: Iterable[str]) -> str:
    """The figures as a Markdown table: mean over seeds, and in brackets the least and the most."""
    columns: list[tuple[str, str, str]] = []
    for pronoun in pronouns:
        columns += [(f"P({pronoun}) {gender}", f"P({pronoun}) {gender}", ".3f") for gender in GENDERS]
    columns += [(f"gap P({p}) fell", f"gap P({p}) fell", ".0%") for p in pronouns]
    columns += [("loss", "loss on stories", ".3f"), ("loss rose", "loss rose", ".1%")]
    lines = [["fit", *(title for _, title, _ in columns)]]
    for fit in outcomes[0].figures:
        first = fit == "none"
        cells = [
            "" if first and name.endswith(("fell", "rose")) else spread([o.figures[fit][name] for o in outcomes], form)
            for name, _, form in columns
        ]
        lines.append([fit, *cells])
    return markdown(lines)


def by_prompt(outcomes: list[Outcome], pronouns: Iterable[str]) -> str:
    """The stricter gap, in which prompts cannot make up for each other, as a Markdown table."""
    names = [f"gap P({pronoun}) by prompt" for pronoun in pronouns]
    lines = [["fit", *names, *(f"{name} fell" for name in names)]]
    for fit in outcomes[0].figures:
        cells = [spread([o.figures[fit][name] for o in outcomes], ".3f") for name in names]
        cells += [
            "" if fit == "none" else spread([o.figures[fit][f"{n} fell"] for o in outcomes], ".0%") for n in names
        ]
        lines.append([fit, *cells])
    return markdown(lines)


def report(outcomes: list[Outcome], settings: Settings) -> str:
    """The text of `results.md`."""
    split = outcomes[0].split
    count = {part: len(m.male) + len(m.female) for part, m in (("fit", split.fit), ("test", split.test))}
    fitted = f"{count['fit']} names in {len(split.fit.prompts)} prompts, {len(split.background)} background stories"
    measured = (
        f"{count['test']} other names in {len(split.test.prompts)} other prompts, {len(split.test_stories)} stories"
    )
    samples = [f"**{fit}**: {text}" for fit, text in outcomes[0].samples.items()]
    return "\n\n".join(
        [
            "# Gender scrubbing: results",
            f"Fitted on {fitted}; measured on {measured}. Seeds {settings.seeds}: mean (range).",
            table(outcomes, settings.pronouns),
            "A gap above is the difference of the means over all prompts; a gap below is the mean size over prompts.",
            by_prompt(outcomes, settings.pronouns),
            "The most likely continuation of the sample prompt, with the first seed:",
            *(sample.replace("\n", " ") for sample in samples),
            "",
        ]
    )


def figure(outcomes: list[Outcome], pronouns: Iterable[str], path: Path) -> None:
    """Draw gap left against loss added: one colour a fit, one mark a pronoun, one point a seed; target shaded."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8.4, 4.2), layout="constrained")
    axes = drawing.subplots()
    axes.fill_between([1e-2, 0.06], 0, 0.3, color="0.9", label="target", linewidth=0)
    for number, fit in enumerate(fit for fit in outcomes[0].figures if fit != "none"):
        for mark, pronoun in zip("os^v", pronouns, strict=False):
            rose = [outcome.figures[fit]["loss rose"] for outcome in outcomes]
            left = [1 - outcome.figures[fit][f"gap P({pronoun}) fell"] for outcome in outcomes]
            axes.plot(rose, left, mark, color=f"C{number}", label=f"{fit}, {pronoun}", alpha=0.8)
    axes.set(xscale="log", xlabel="loss on other stories, rise", ylabel="gap between names, share left", ylim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    drawing.legend(loc="outside right upper", fontsize="small")
    drawing.savefig(path, dpi=150)


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    settings = read_settings(settings_file, overrides)
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for seed in settings.seeds:
        typer.echo(f"seed {seed}", err=True)
        outcomes.append(run_seed(settings, seed))
    text = report(outcomes, settings)
    (output / "results.md").write_text(text, encoding="utf-8")
    figure(outcomes, settings.pronouns, output / "figure.png")
    typer.echo(text)


if __name__ == "__main__":
    studies.start(main)
