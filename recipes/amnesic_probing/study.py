"""Amnesic probing by layer: what a language model loses when one block's output no longer shows the part of speech.

After Elazar et al. 2021 (arXiv 2006.00995). A model may not use what a probe can read. If it does, erasing it makes
the model worse. So the tags are erased at one block, and the loss is compared with that of removing as many random
directions there. Everything is measured on sentences and stories that nothing was fitted on.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import Eraser
from hf_erasure.metrics.benchmarks import text_perplexity
from hf_erasure.recipes.erasure import majority, probe_accuracy
from recipes import studies
from recipes.gradiend_gender.study import read_stories
from recipes.over_seeds import cell, markdown, t_interval
from recipes.pos_scrubbing import study as pos

ADAPTER = "no_tags"


@dataclass
class Settings:
    """The settings in `study.yaml`.

    Attributes:
        model: A Hub id or a folder of a causal language model.
        blocks: The name of its list of blocks.
        fit: A treebank (CoNLL-U) to fit on.
        test: A treebank to measure on.
        stories: A text file of stories, which are measured on too.
        output: Where table and figure go.
        fit_sentences: How many sentences are drawn from `fit`.
        test_sentences: How many are drawn from `test`.
        test_stories: How many stories are drawn.
        max_tokens: Longer sentences are left out.
        batch_size: Sentences in a batch.
        probe_tokens: How many tokens of each part are probed.
        random_draws: Random subspaces at each block.
        seeds: The seeds of all draws.
    """

    model: str
    blocks: str
    fit: str
    test: str
    stories: str
    output: str
    fit_sentences: int = 600
    test_sentences: int = 300
    test_stories: int = 24
    max_tokens: int = 128
    batch_size: int = 32
    probe_tokens: int = 2000
    random_draws: int = 3
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Read the file, and the settings that follow it on the command line.

    Raises:
        ValueError: If the file is not a recipe, or a key is unknown.
    """
    return studies.read_settings(Settings, path, overrides, "model, fit, test")


# ---- the study ------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """One block under one seed.

    Attributes:
        bits: `"erased"` or `"random"` → bits per byte of the treebank's sentences and of the stories.
        probe: Accuracy of a tag probe on the block's output: `"before"`, `"after"`, and without `"random"` directions;
            and `"at the end"`, on the last hidden state with the block erased.
    """

    bits: dict[str, tuple[float, float]]
    probe: dict[str, float]


@dataclass
class Outcome:
    """The outcome of one seed.

    Attributes:
        seed: The seed of the draws.
        base: Bits per byte of the model without erasure.
        layers: One for each block, from the first.
        end: Accuracy of a tag probe on the last hidden state without erasure.
        majority: Accuracy of the most frequent tag.
        rank: Directions erased.
        width: Width of a hidden state.
        tokens: Number of labelled tokens fitted on, and probed.
    """

    seed: int
    base: tuple[float, float]
    layers: list[Layer]
    end: float
    majority: float
    rank: int
    width: int
    tokens: tuple[int, int]


@dataclass
class Data:
    """The data of one seed."""

    fit: list[Any]
    test: list[Any]
    texts: tuple[list[str], list[str]]
    picked: list[Any]
    tags: list[list[str]]


def draw_data(settings: Settings, tokenizer: Any, seed: int) -> Data:
    """Sentences to fit on and to measure on, stories, and the tokens that are probed."""
    draw = random.Random(seed)
    drawn = []
    for path, count in ((settings.fit, settings.fit_sentences), (settings.test, settings.test_sentences)):
        sentences = pos.read_treebank(path)
        drawn.append(draw.sample(sentences, min(count, len(sentences))))
    parts = [pos.tokenised(sentences, tokenizer, settings.max_tokens) for sentences in drawn]
    fit, test = (pos.batches_of(rows, tokenizer, settings.batch_size) for rows in parts)
    stories = read_stories(settings.stories)
    texts = [sentence.text for sentence in drawn[1]], draw.sample(stories, min(settings.test_stories, len(stories)))
    picked = [pos.draw_tokens(batches, settings.probe_tokens, seed) for batches in (fit, test)]
    tags = [pos.labels_of(batches, chosen) for batches, chosen in zip((fit, test), picked, strict=True)]
    return Data(fit, test, texts, picked, tags)


def bits(model: Any, tokenizer: Any, data: Data) -> tuple[float, float]:
    """Bits per byte of the sentences and of the stories, with the adapters that are active."""
    return tuple(text_perplexity(model, tokenizer, texts, resamples=2)["bits_per_byte"] for texts in data.texts)  # type: ignore[return-value]


def probes(model: Any, data: Data, places: Iterable[str]) -> dict[str, float]:
    """Accuracy of tag probes at some places, trained on fitted tokens, judged on others."""
    states = [
        pos.token_states(model, batches, picked)
        for batches, picked in zip((data.fit, data.test), data.picked, strict=True)
    ]
    return {p: probe_accuracy(states[0][p], data.tags[0], states[1][p], data.tags[1]) for p in places}


def run_layer(model: Any, tokenizer: Any, data: Data, settings: Settings, index: int, draws: torch.Generator) -> Layer:
    """Erase at one block, measure, and do the same with random directions; the model is left as it was."""
    config = ConceptErasureConfig(
        concept="part of speech", labels=pos.TAGS, target_modules=f"{settings.blocks}.{index}".replace(".", r"\.")
    )
    model.add_adapter(config, adapter_name=ADAPTER)
    ((site, layer),) = erasure_layers(model, ADAPTER).items()
    before = probes(model, data, [site])[site]  # nothing is fitted yet
    fit_concept_erasure(model, data.fit, ADAPTER, progress=False)
    found = {"erased": bits(model, tokenizer, data)}
    after = probes(model, data, [site, pos.FINAL])
    left, _, mean = layer.eraser_state(ADAPTER)
    controls = []
    for _ in range(settings.random_draws):
        basis, _ = torch.linalg.qr(torch.randn(left.shape, generator=draws, dtype=torch.float64))
        layer.set_eraser(ADAPTER, Eraser(basis, basis.T, mean.double().cpu()), left.dtype)
        controls.append(bits(model, tokenizer, data))
    read = probes(model, data, [site])[site]
    found["random"] = tuple(sum(column) / len(controls) for column in zip(*controls, strict=True))
    model.delete_adapter(ADAPTER)
    return Layer(found, {"before": before, "after": after[site], "random": read, "at the end": after[pos.FINAL]})


def run_seed(settings: Settings, seed: int) -> Outcome:
    """Run every block, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = draw_data(settings, tokenizer, seed)
    model = AutoModelForCausalLM.from_pretrained(settings.model).eval()
    blocks = model.get_submodule(settings.blocks)
    draws = torch.Generator().manual_seed(seed)
    base = bits(model, tokenizer, data)
    layers = [run_layer(model, tokenizer, data, settings, index, draws) for index in range(len(blocks))]
    width = int(model.config.hidden_size)
    end = probes(model, data, [pos.FINAL])[pos.FINAL]
    labelled = sum(int((batch["concept_labels"] != pos.IGNORED).sum()) for batch in data.fit)
    rank = min(len(pos.TAGS) - 1, width)
    return Outcome(seed, base, layers, end, majority(data.tags[1]), rank, width, (labelled, len(data.tags[1])))


# ---- report ---------------------------------------------------------------------------------------------------------

TEXTS = ("sentences", "stories")
PAPER = (
    "*Differs from the paper*: the paper has BERT, INLP, which removes many directions, and the accuracy of predicted "
    "words. Here are the model of `study.yaml`, LEACE, which removes the fewest directions that guard, bits per byte, "
    "and random directions of the same rank as the control. Later blocks may compute the tag again from what is left: "
    "the probe at the end says how much. The paper's control for selectivity (words get their tags back) is left out."
)


def rises(outcomes: list[Outcome], index: int, way: str, text: int) -> list[float]:
    """How many bits per byte it adds to the model without erasure, for every seed."""
    return [o.layers[index].bits[way][text] - o.base[text] for o in outcomes]


def table(outcomes: list[Outcome]) -> str:
    """Cost and probes by block: mean and interval over seeds."""
    lines = []
    for index in range(len(outcomes[0].layers)):
        cells = [cell(rises(outcomes, index, way, text), "+.3f") for text in (0, 1) for way in ("erased", "random")]
        more = [
            a - b for a, b in zip(rises(outcomes, index, "erased", 1), rises(outcomes, index, "random", 1), strict=True)
        ]
        names = ("before", "after", "random", "at the end")
        cells += [cell(more, "+.3f"), *(cell([o.layers[index].probe[n] for o in outcomes]) for n in names)]
        lines.append([str(index), *cells])
    head = ["block", "sentences: POS erased", "random", "stories: POS erased", "random", "POS less random, stories",
            "probe before", "after", "random", "probe at the end"]  # fmt: skip
    return markdown(head, lines)


def report(outcomes: list[Outcome], settings: Settings, command: str) -> str:
    """The text of `results.md`."""
    first = outcomes[0]
    base = [cell([o.base[text] for o in outcomes]) for text in (0, 1)]
    return "\n\n".join(
        [
            "# Amnesic probing by layer: results",
            f"```\n{command}\n```",
            f"Part of speech is erased from the output of one block at a time, {first.rank} of {first.width} "
            f"directions, fitted on {first.tokens[0]} labelled tokens. Seeds {settings.seeds}, each with other "
            "sentences, stories and random directions: mean [95 % t-interval over seeds].",
            f"Bits per byte of the model without erasure: {base[0]} on held-out sentences of the treebank, {base[1]} "
            "on stories. The table has how much an erasure adds, and the accuracy of tag probes on held-out tokens "
            f"(the most frequent tag: {cell([o.majority for o in outcomes])}; the last hidden state without erasure: "
            f"{cell([o.end for o in outcomes])}).",
            table(outcomes),
            PAPER,
            "",
        ]
    )


def figure(outcomes: list[Outcome], path: Path) -> None:
    """Cost of the erasure and of random directions by block, beside what probes read there."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, 4.4), layout="constrained")
    panels = drawing.subplots(1, 3)
    blocks = range(len(outcomes[0].layers))

    def line(axes: Any, values: list[list[float]], mark: str, label: str, shift: float) -> None:
        mean, low, high = zip(*(t_interval(v) for v in values), strict=True)
        errors = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
        axes.errorbar([i + shift for i in blocks], mean, errors, fmt=mark, capsize=3, label=label)

    for text, axes in zip((1, 0), panels, strict=False):
        for way, mark, shift in (("erased", "o-", -0.06), ("random", "s--", 0.06)):
            label = {"erased": "part of speech", "random": "random directions"}[way]
            line(axes, [rises(outcomes, i, way, text) for i in blocks], mark, label, shift)
        axes.set(title=f"{TEXTS[text]}: bits per byte added")
    marks = {"before": "D-", "after": "o-", "random": "s--", "at the end": "^:"}
    names = {"before": "block, before", "after": "block, erased", "random": "block, random directions away",
             "at the end": "last state, block erased"}  # fmt: skip
    for step, (name, mark) in enumerate(marks.items()):
        line(panels[2], [[o.layers[i].probe[name] for o in outcomes] for i in blocks], mark, names[name],
             0.06 * (step - 1.5))  # fmt: skip
    chance = sum(o.majority for o in outcomes) / len(outcomes)
    panels[2].axhline(chance, color="black", linestyle=":", label="most frequent tag")
    panels[2].set(title="accuracy of tag probes", ylim=(0, None))
    for axes in panels:
        axes.set(xlabel="block erased", xticks=list(blocks))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False, fontsize="small")
    drawing.savefig(path, dpi=140)


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    settings = read_settings(settings_file, overrides)
    command = studies.command_line("amnesic_probing", settings_file, overrides)
    runs = {f"seed {seed}": partial(run_seed, settings, seed) for seed in settings.seeds}
    studies.run(runs, settings.output, lambda outcomes: report(outcomes, settings, command), figure)


if __name__ == "__main__":
    # Probes stop after a few hundred steps, when their accuracy no longer changes.
    warnings.filterwarnings("ignore", message="lbfgs failed to converge")
    studies.start(main)
