"""Where to erase: norms, readers, writers, both, or whole blocks; what each removes on unseen text, costs, and merges.

Four studies: gender in a model of stories (with labels at last tokens, and at all tokens), parts of speech in the same
model, gender in a masked model of the same stories, and gender in biographies read by a sentence encoder.
All figures are measured on data that nothing was fitted on.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import ConceptErasureConfig, concept_dataloader, fit_concept_erasure, set_strength
from hf_erasure.recipes.erasure import majority, probe_accuracy
from recipes import studies
from recipes.biographies import study as biographies
from recipes.gender_scrubbing import study as stories
from recipes.over_seeds import cell, markdown
from recipes.pos_scrubbing import study as tags

# Place → the fields of the adapters that erase there. The second of two is fitted while the first acts.
PLACES: dict[str, list[dict[str, Any]]] = {
    "norms": [{"affine": True}],
    "norms, linear": [{"affine": False}],
    "readers": [{"target_modules": "readers"}],
    "writers": [{"target_modules": "writers"}],
    "readers and writers": [{"target_modules": "writers"}, {"target_modules": "readers"}],
    "blocks": [{"target_modules": r".*\.layers?\.\d+"}],
}
POSITIONS = ("last", "all")
NONE = "none"
IGNORED = -100
# Outputs of a merged model may differ from those of the unmerged model by the rounding of float32.
ROUNDING = 1e-4

Fit = Callable[[Any, str], None]  # a model and the name of an adapter in it


@dataclass
class Settings:
    """The settings in `study.yaml`.

    Attributes:
        stories: The file of the gender study.
        tags: The file of the part-of-speech study.
        biographies: The file of the study of biographies.
        masked_model: A masked language model of stories.
        output: Where tables and figure go.
        seeds: One split for each, also of the biographies.
        studies: Which of the studies are run.
        places: Which places are compared.
        strengths: Strengths of the erasures in the figure.
        probed_at: The residual stream is probed before this block.
    """

    stories: str
    tags: str
    biographies: str
    masked_model: str
    output: str
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4, 5])
    studies: list[str] = field(default_factory=lambda: list(TABLES))
    places: list[str] = field(default_factory=lambda: list(PLACES))
    strengths: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0])
    probed_at: int = 4


# ---- erasing at a place ----------------------------------------------------------------------------------------------


def erased(model: Any, place: str, concept: str, labels: list[str], fit: Fit) -> Any:
    """A copy of the model with fitted erasures at a place.

    Raises:
        LookupError: If the model has no such place.
    """
    model = copy.deepcopy(model)
    for number, fields in enumerate(PLACES[place]):
        name = f"{concept.replace(' ', '_')}_{number}"
        config = ConceptErasureConfig(concept=concept, labels=labels, **fields)
        try:
            model.add_adapter(config, adapter_name=name)
        except ValueError as error:
            raise LookupError(str(error)) from error
        model.set_adapter(list(model.peft_config))  # adding activates only the new adapter
        fit(model, name)
    return model


def merges(plain: Any, model: Any, batch: dict[str, Tensor]) -> str:
    """Whether a model's erasures merge into its weights: `"yes"`, `"untied"` if the head must be untied, or `"no"`."""
    names = list(model.peft_config)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            model.set_adapter(name)
            model.save_pretrained(f"{folder}/{name}")
        model.set_adapter(names)
        for answer, options in (("yes", {}), ("untied", {"untie": True})):
            first, *others = names
            wrapped = PeftModel.from_pretrained(copy.deepcopy(plain), f"{folder}/{first}", adapter_name=first).eval()
            for name in others:
                wrapped.load_adapter(f"{folder}/{name}", adapter_name=name)
            wrapped.base_model.set_adapter(names)
            try:
                merged = wrapped.merge_and_unload(**options)
            except ValueError:
                continue
            with torch.no_grad():
                before, after = (m(**batch)[0] for m in (model, merged))
            if float((before - after).abs().max() / before.abs().max()) > ROUNDING:
                raise RuntimeError("The merged model computes something else.")
            return answer
    return "no"


def at_places(settings: Settings, plain: Any, concept: str, labels: list[str], fit: Fit, measure: Any) -> dict:
    """Place → the figures of an erasure there; a place that the model does not have is left out."""
    found = {NONE: measure(plain)}
    for place in settings.places:
        try:
            model = erased(plain, place, concept, labels, fit)
        except LookupError as error:
            typer.echo(f"{type(plain).__name__}, {place}: {error}", err=True)
            continue
        found[place] = measure(model)
    return found


# ---- gender in stories -----------------------------------------------------------------------------------------------


def gender_in_stories(settings: Settings, seed: int, positions: str) -> dict[str, dict[str, Any]]:
    """Place → gaps between names on unseen prompts, the loss on other stories, and whether it merges."""
    study = replace(stories.read_settings(settings.stories), positions=positions)
    tokenizer = AutoTokenizer.from_pretrained(study.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    plain = AutoModelForCausalLM.from_pretrained(study.model).eval()
    split = stories.split_data(study.materials[study.material], stories.read_stories(study.stories), study, seed)
    labelled = list(stories.labelled_batches(split.fit, tokenizer, study))
    background = list(stories.story_batches(split.background, tokenizer, study))
    before = stories.measure(plain, tokenizer, split, study)
    batch = {key: value for key, value in background[0].items() if key in ("input_ids", "attention_mask")}

    def fit(model: Any, name: str) -> None:
        fit_concept_erasure(model, labelled, name, background=background, progress=False)

    def measure(model: Any) -> dict[str, Any]:
        figures: dict[str, Any] = stories.relative(stories.measure(model, tokenizer, split, study), before)
        if model is not plain and seed == settings.seeds[0]:
            figures["merges"] = merges(plain, model, batch)
        if model is not plain and positions == POSITIONS[0]:
            figures["dial"] = dial(model)
        return figures

    def dial(model: Any) -> list[tuple[float, float, float]]:
        """For each strength: the strength, the gap left in P(she), and the rise of the loss."""
        points = []
        for strength in settings.strengths:
            for name in model.peft_config:
                set_strength(model, name, strength)
            found = stories.relative(stories.measure(model, tokenizer, split, study), before)
            points.append((strength, 1 - found["gap P(she) fell"], found["loss rose"]))
        return points

    return at_places(settings, plain, "gender", stories.GENDERS, fit, measure)


def gender_in_masked_stories(settings: Settings, seed: int) -> dict[str, dict[str, Any]]:
    """The figures of `gender_in_stories` for a masked model, which predicts the word after the prompt."""
    study = stories.read_settings(settings.stories)
    tokenizer = AutoTokenizer.from_pretrained(settings.masked_model)
    plain = AutoModelForMaskedLM.from_pretrained(settings.masked_model).eval()
    split = stories.split_data(study.materials[study.material], stories.read_stories(study.stories), study, seed)
    fitted, test = (_with_masks(part, tokenizer) for part in (split.fit, split.test))
    rows = masked_rows(fitted, tokenizer)
    labelled = list(
        concept_dataloader(rows, tokenizer, label_column="gender", batch_size=study.batch_size, labels=stories.GENDERS)
    )
    background = list(stories.story_batches(split.background, tokenizer, study))
    held_out = list(stories.story_batches(split.test_stories, tokenizer, study))
    before: dict[str, float] = {}

    def fit(model: Any, name: str) -> None:
        fit_concept_erasure(model, labelled, name, background=background, progress=False)

    def measure(model: Any) -> dict[str, Any]:
        figures: dict[str, Any] = masked_figures(model, tokenizer, test, held_out)
        before.update({} if before else figures)
        relative = {f"{name} fell": 1 - figures[name] / before[name] for name in before if name.startswith("gap")}
        figures |= relative | {"loss rose": figures["loss"] / before["loss"] - 1}
        if model is not plain and seed == settings.seeds[0]:
            figures["merges"] = merges(plain, model, {k: background[0][k] for k in ("input_ids", "attention_mask")})
        return figures

    return at_places(settings, plain, "gender", stories.GENDERS, fit, measure)


def _with_masks(material: stories.Material, tokenizer: Any) -> stories.Material:
    return replace(material, prompts=[f"{prompt} {tokenizer.mask_token}" for prompt in material.prompts])


def masked_rows(material: stories.Material, tokenizer: Any) -> Dataset:
    """Every name in every prompt, with a label only at the mask."""
    rows = []
    for label, gender in enumerate(stories.GENDERS):
        texts = [prompt.format(name=name) for name in getattr(material, gender) for prompt in material.prompts]
        for ids in tokenizer(texts)["input_ids"]:
            labels = [label if token == tokenizer.mask_token_id else IGNORED for token in ids]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "gender": labels})
    return Dataset.from_list(rows)


@torch.no_grad()
def masked_figures(
    model: Any, tokenizer: Any, material: stories.Material, held_out: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Gaps between the means of male and female names at the mask, and the loss if every seventh token is masked."""
    words = ["he", "she"]
    ids = tokenizer.convert_tokens_to_ids(words)
    means = []
    for gender in stories.GENDERS:
        names = getattr(material, gender)
        batch = tokenizer(
            [prompt.format(name=name) for prompt in material.prompts for name in names],
            return_tensors="pt", padding=True,
        )  # fmt: skip
        logits = model(**batch).logits[batch["input_ids"] == tokenizer.mask_token_id]
        means.append(logits.softmax(-1)[:, ids].reshape(len(material.prompts), len(names), -1).mean(1))
    differences = means[0] - means[1]  # (prompts, words)
    gaps = differences.mean(0).abs().tolist(), differences.abs().mean(0).tolist()
    total, count = 0.0, 0
    for batch in held_out:
        masked = batch["attention_mask"].bool() & (torch.arange(batch["input_ids"].shape[1]) % 7 == 3)
        given = batch["input_ids"].masked_fill(masked, tokenizer.mask_token_id)
        logits = model(input_ids=given, attention_mask=batch["attention_mask"]).logits[masked]
        total += float(torch.nn.functional.cross_entropy(logits, batch["input_ids"][masked], reduction="sum"))
        count += int(masked.sum())
    figures = {f"gap P({word})": gap for word, gap in zip(words, gaps[0], strict=True)}
    figures |= {f"gap P({word}) by prompt": gap for word, gap in zip(words, gaps[1], strict=True)}
    return figures | {"loss": total / count}


# ---- parts of speech -------------------------------------------------------------------------------------------------


def parts_of_speech(settings: Settings) -> dict[str, dict[str, Any]]:
    """Place → tag probes at what the head reads and in the residual stream, bits per byte of tests and other text."""
    study = tags.read_settings(settings.tags)
    tokenizer = AutoTokenizer.from_pretrained(study.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    plain = AutoModelForCausalLM.from_pretrained(study.model).eval()
    sentences = [tags.read_treebank(path) for path in (study.fit, study.test)]
    rows = [tags.tokenised(part, tokenizer, study.max_tokens) for part in (*sentences, tags.read_lines(study.other))]
    batches = [tags.batches_of(part, tokenizer, study.batch_size) for part in rows]
    drawn = [tags.draw_tokens(part, study.probe_tokens, study.seed) for part in batches[:2]]
    labels = [tags.labels_of(part, picked) for part, picked in zip(batches, drawn, strict=False)]

    def fit(model: Any, name: str) -> None:
        fit_concept_erasure(model, batches[0], name, progress=False)

    def measure(model: Any) -> dict[str, Any]:
        states = [seen(model, part, at, settings.probed_at) for part, at in zip(batches, drawn, strict=False)]
        figures: dict[str, Any] = {
            place: probe_accuracy(states[0][place], labels[0], states[1][place], labels[1]) for place in states[0]
        }
        for what, part, texts in (("bits per byte", batches[1], rows[1]), ("of other text", batches[2], rows[2])):
            figures[what] = sum(tags.bits(model, batch) for batch in part) / sum(texts["bytes"])
        if model is not plain:
            figures["merges"] = merges(plain, model, {k: batches[1][0][k] for k in ("input_ids", "attention_mask")})
        return figures

    return at_places(settings, plain, "part of speech", tags.TAGS, fit, measure) | {"majority": majority(labels[1])}


@torch.no_grad()
def seen(model: Any, batches: list[dict[str, Tensor]], picked: Tensor, block: int) -> dict[str, Tensor]:
    """States of some labelled tokens at the input of the head, of a block's norm, and of the map behind the norm."""
    found: dict[str, list[Tensor]] = {}
    head, layer = model.get_output_embeddings(), model.base_model.layers[block]
    with recorded({"head": head, "stream": layer.input_layernorm, "query": layer.self_attn.q_proj}) as last:
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for place, states in last.items():
                found.setdefault(place, []).append(states[batch["concept_labels"] != IGNORED])
    return {place: torch.cat(parts)[picked] for place, parts in found.items()}


@contextmanager
def recorded(modules: dict[str, Any]) -> Iterable[dict[str, Tensor]]:
    """The last input of each module, after adapters have erased it."""
    last: dict[str, Tensor] = {}

    def keep(place: str) -> Callable[..., None]:
        return lambda module, given: last.__setitem__(place, given[0])

    handles = [module.register_forward_pre_hook(keep(place)) for place, module in modules.items()]
    try:
        yield last
    finally:
        for handle in handles:
            handle.remove()


# ---- biographies -----------------------------------------------------------------------------------------------------


def gender_in_biographies(settings: Settings, seed: int) -> dict[str, dict[str, Any]]:
    """Place → accuracies of a fresh gender probe and of a profession classifier, on rows that were not fitted on."""
    study = replace(biographies.read_settings(settings.biographies), train_shares=None, test_shares=None, seeds=[seed])
    rows = biographies.read_biographies(study)
    train, test = biographies.split_rows(rows, study, seed)
    plain, tokenizer = biographies.load(study)
    data = biographies.labelled_batches(train, tokenizer, study)

    def fit(model: Any, name: str) -> None:
        fit_concept_erasure(model, data, name, pool=study.pool, progress=False)

    def measure(model: Any) -> dict[str, Any]:
        x = [biographies.embeddings(model, tokenizer, part, study) for part in (train, test)]
        fresh = biographies.linear_leakage.score(x[1], [row.gender for row in test], seed=seed, resamples=2)
        classifier = biographies.Classifier.train(x[0], [row.profession for row in train])
        right = [a == row.profession for a, row in zip(classifier(x[1]), test, strict=True)]
        figures: dict[str, Any] = {"gender": fresh["accuracy"], "profession": sum(right) / len(right)}
        if model is not plain:
            batch = tokenizer([test[0].text], return_tensors="pt", truncation=True, max_length=study.max_length)
            figures["merges"] = merges(plain, model, dict(batch))
        return figures

    return at_places(settings, plain, "gender", sorted({row.gender for row in train}), fit, measure)


# ---- report ----------------------------------------------------------------------------------------------------------

TABLES = {
    "gender, labels at last tokens": {
        "gap P(he) fell": ".0%", "gap P(she) fell": ".0%", "gap P(she) by prompt fell": ".0%", "loss rose": ".1%",
    },
    "gender, labels at all tokens": {
        "gap P(he) fell": ".0%", "gap P(she) fell": ".0%", "gap P(she) by prompt fell": ".0%", "loss rose": ".1%",
    },
    "gender, masked model": {
        "gap P(he) fell": ".0%", "gap P(she) fell": ".0%", "gap P(he) by prompt fell": ".0%",
        "gap P(she) by prompt fell": ".0%", "loss rose": ".1%",
    },
    "parts of speech": {
        "head": ".3f", "query": ".3f", "stream": ".3f", "bits per byte": ".3f", "of other text": ".3f",
    },
    "gender in biographies": {"gender": ".1%", "profession": ".1%"},
}  # fmt: skip


@dataclass
class Outcome:
    """The outcome of one seed: study → place → figures."""

    seed: int
    figures: dict[str, dict[str, Any]]


def run_seed(settings: Settings, seed: int) -> Outcome:
    """Run all studies for one seed; parts of speech have one split, and run with the first seed."""
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        f"gender, labels at {positions} tokens": partial(gender_in_stories, settings, seed, positions)
        for positions in POSITIONS
    }
    runs["gender, masked model"] = partial(gender_in_masked_stories, settings, seed)
    runs["gender in biographies"] = partial(gender_in_biographies, settings, seed)
    if seed == settings.seeds[0]:
        runs["parts of speech"] = partial(parts_of_speech, settings)
    return Outcome(seed, {name: run() for name, run in runs.items() if name in settings.studies})


def table(outcomes: list[Outcome], name: str) -> str:
    """One study: mean and interval over seeds, and whether the first seed's erasure merges."""
    of = [outcome.figures[name] for outcome in outcomes if name in outcome.figures]
    forms = TABLES[name]
    lines = []
    for place in of[0]:
        if place == "majority":
            continue
        columns = {figure: [found[place].get(figure) for found in of] for figure in forms}
        cells = [
            "" if values[0] is None else cell(values, forms[figure]) if len(values) > 1 else
            format(values[0], forms[figure])
            for figure, values in columns.items()
        ]  # fmt: skip
        lines.append([place, *cells, of[0][place].get("merges", "")])
    return markdown(["erased at", *forms, "merges"], lines)


def report(outcomes: list[Outcome], settings: Settings, command: str) -> str:
    """The text of `results.md`."""
    most = outcomes[0].figures.get("parts of speech", {}).get("majority", float("nan"))
    said = {
        "gender, labels at last tokens": "A Llama of stories; unseen names in unseen prompts, loss on other stories.",
        "gender, labels at all tokens": "The same model, fitted with the labels at every token of a prompt.",
        "gender, masked model": "A BERT of the same stories; loss of every seventh token of other stories.",
        "parts of speech": "Accuracy of tag probes on held-out sentences at what the head reads, what a query map "
        f"reads and in the residual stream; the most frequent tag alone has {most:.3f}. One split.",
        "gender in biographies": "MiniLM's mean-pooled embedding of biographies that were not fitted on: accuracy of a "
        "fresh gender probe (cross-validated on them), and of a profession classifier trained on the fitted rows.",
    }
    done = {name: words for name, words in said.items() if name in outcomes[0].figures}
    parts = [part for name, words in done.items() for part in (f"## {name.capitalize()}", words, table(outcomes, name))]
    seeds = f"Seeds {settings.seeds}, each with another split: mean [95 % t-interval over seeds]."
    merging = "*merges*: into the plain model (yes), after the tied head got its own table (untied), or not (no)."
    return "\n\n".join(["# Where to erase: results", f"```\n{command}\n```", seeds, merging, *parts, ""])


def figure(outcomes: list[Outcome], path: Path) -> None:
    """Draw the gap left in P(she) against the rise of the loss: a line for each place, a mark a strength; means."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 4.4), layout="constrained")
    axes = drawing.subplots()
    name = f"gender, labels at {POSITIONS[0]} tokens"
    by_seed = [outcome.figures[name] for outcome in outcomes if name in outcome.figures]
    for place in by_seed[0] if by_seed else ():
        if "dial" not in by_seed[0][place]:
            continue
        points = torch.tensor([found[place]["dial"] for found in by_seed]).mean(0)
        axes.plot(points[:, 2], points[:, 1], "-o", markersize=3, label=place)
        whole = points[points[:, 0] == 1.0]
        axes.plot(whole[:, 2], whole[:, 1], "ks", markersize=5, fillstyle="none")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="loss on other stories, rise (square: strength 1)", ylabel="gap in P(she), share left")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    axes.legend(fontsize="small")
    drawing.savefig(path, dpi=140)


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Read the file, and the settings that follow it on the command line.

    Raises:
        ValueError: If the file is not a recipe, or a key is unknown.
    """
    return studies.read_settings(Settings, path, overrides, "stories, tags, biographies")


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    settings = read_settings(settings_file, overrides)
    command = studies.command_line("where_to_erase", settings_file, overrides)
    runs = {f"seed {seed}": lambda seed=seed: run_seed(settings, seed) for seed in settings.seeds}
    studies.run(runs, settings.output, lambda outcomes: report(outcomes, settings, command), figure)


if __name__ == "__main__":
    studies.start(main)
