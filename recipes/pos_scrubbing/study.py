"""Part of speech erased from a language model: bits per byte and tag probes, with four erasures and without.

The study of arXiv 2306.03819, section 5, on a treebank. Everything is measured on sentences that nothing was fitted on.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import ConceptErasureConfig, concept_dataloader, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import Eraser
from hf_erasure.evaluation.data import Sentence, read_treebank
from hf_erasure.recipes.erasure import majority, probe_accuracy
from recipes import studies

# fmt: off
TAGS = ["ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ",
        "SYM", "VERB", "X"]
# fmt: on
IGNORED = -100
FINAL = "last_hidden_state"


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """The settings in `study.yaml`.

    Attributes:
        model: A Hub id or a folder of a causal language model.
        fit: A treebank (CoNLL-U) to fit on.
        test: A treebank to measure on.
        other: A file with another kind of text, on which the cost is measured; its lines count as sentences.
        output: Where table and figure go.
        max_tokens: Longer sentences are left out.
        batch_size: Sentences in a batch.
        probe_tokens: How many tokens of each treebank are probed.
        seed: The seed of the random subspaces, and of the tokens that are probed.
    """

    model: str
    fit: str
    test: str
    other: str
    output: str
    max_tokens: int = 256
    batch_size: int = 32
    probe_tokens: int = 8000
    seed: int = 0


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Read the file, and the settings that follow it on the command line.

    Raises:
        ValueError: If the file is not a recipe, or a key is unknown.
    """
    return studies.read_settings(Settings, path, overrides, "model, fit, test")


# ---- treebank -------------------------------------------------------------------------------------------------------


def read_lines(path: str | Path) -> list[Sentence]:
    """The lines of a plain text, without tags."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [Sentence(line.strip(), []) for line in lines if line.strip()]


def tag_of_tokens(sentence: Sentence, offsets: list[tuple[int, int]]) -> list[int]:
    """One class id for each token: the tag of the word of its last visible character, −100 where there is none."""
    return [IGNORED if tag is None else TAGS.index(tag) for tag in sentence.tags(offsets)]


def tokenised(sentences: list[Sentence], tokenizer: Any, max_tokens: int) -> Dataset:
    """Sentences as token ids and one tag for each token; each begins with the token that begins a text.

    Returns:
        Columns `input_ids`, `attention_mask`, `tags` and `bytes`, the length of the sentence in UTF-8.
    """
    rows = []
    for sentence in sentences:
        encoded = tokenizer(sentence.text, return_offsets_mapping=True, add_special_tokens=False)
        ids = [tokenizer.bos_token_id, *encoded["input_ids"]]
        if len(ids) <= max_tokens:
            tags = [IGNORED, *tag_of_tokens(sentence, encoded["offset_mapping"])]
            size = len(sentence.text.encode())
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "tags": tags, "bytes": size})
    return Dataset.from_list(rows)


def batches_of(rows: Dataset, tokenizer: Any, batch_size: int) -> list[dict[str, Tensor]]:
    """The batches that are fitted and measured on."""
    return list(concept_dataloader(rows, tokenizer, label_column="tags", batch_size=batch_size, labels=TAGS))


# ---- erasures -------------------------------------------------------------------------------------------------------


@dataclass
class Erasures:
    """The adapters that are compared, in one model.

    Attributes:
        model: The model with all of them.
        random: Makes the random subspaces.
    """

    model: Any
    random: torch.Generator

    def fit(self, batches: list[dict[str, Tensor]]) -> None:
        """Add and fit every adapter."""
        plans = {
            "one-pass LEACE": ("leace", False),
            "sequential LEACE": ("leace", True),
            "sequential orth": ("orth", True),
        }
        for name, (method, sequential) in plans.items():
            config = ConceptErasureConfig(concept="part of speech", labels=TAGS, method=method, affine=True)
            self.model.add_adapter(config, adapter_name=adapter(name))
            fit_concept_erasure(self.model, batches, adapter(name), sequential=sequential, progress=False)
        config = ConceptErasureConfig(concept="nothing", labels=TAGS)
        self.model.add_adapter(config, adapter_name=adapter("random subspace"))

    def draw(self) -> None:
        """Put a fresh random subspace at every site, of the rank and around the mean of one-pass LEACE."""
        for layer in erasure_layers(self.model, adapter("random subspace")).values():
            left, _, mean = layer.eraser_state(adapter("one-pass LEACE"))
            basis, _ = torch.linalg.qr(torch.randn(left.shape, generator=self.random, dtype=torch.float64))
            layer.set_eraser(adapter("random subspace"), Eraser(basis, basis.T, mean.double().cpu()), left.dtype)

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Apply one erasure, or with `"none"` no erasure."""
        if name == "none":
            self.model.disable_adapters()
        else:
            self.model.enable_adapters()
            self.model.set_adapter(adapter(name))
        yield


def adapter(name: str) -> str:
    """A row's name in the table, as a name that PEFT accepts."""
    return name.replace(" ", "_").replace("-", "_")


# ---- measures -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bits(model: Any, batch: dict[str, Tensor]) -> float:
    """Bits that the model needs for a batch: every token is predicted, the first from the begin-of-text token alone."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return float(nats) / math.log(2)


def unigram_bits(rows: Dataset) -> float:
    """Bits that the same tokens need under their own frequencies."""
    counts = Counter(token for ids in rows["input_ids"] for token in ids[1:])
    total = sum(counts.values())
    return -sum(count * math.log2(count / total) for count in counts.values())


@torch.no_grad()
def bits_per_byte(erasures: Erasures, name: str, rows: Dataset, batches: list[dict[str, Tensor]]) -> float:
    """Bits that the model needs for a byte of the sentences (UTF-8), under one erasure."""
    total = 0.0
    with erasures.only(name):
        for batch in batches:
            if name == "random subspace":
                erasures.draw()
            total += bits(erasures.model, batch)
    return total / sum(rows["bytes"])


@torch.no_grad()
def token_states(model: Any, batches: list[dict[str, Tensor]], picked: Tensor) -> dict[str, Tensor]:
    """States of some labelled tokens at every norm, after every block, and at the end: place → `(tokens, width)`.

    Args:
        model: The model, with the adapter applied.
        batches: Labelled batches.
        picked: Positions among all labelled tokens of the batches.
    """
    found: dict[str, list[Tensor]] = {}
    wanted = torch.zeros(sum(int((batch["concept_labels"] != IGNORED).sum()) for batch in batches), dtype=torch.bool)
    wanted[picked] = True
    current: list[Tensor] = []

    def keep(place: str, states: Tensor) -> None:
        found.setdefault(place, []).append(states[current[0]])

    def hook(place: str) -> Callable[..., None]:
        return lambda host, inputs, output: keep(place, output)

    handles = [layer.host.register_forward_hook(hook(path)) for path, layer in erasure_layers(model).items()]
    start = 0
    try:
        for batch in batches:
            labelled = batch["concept_labels"] != IGNORED
            chosen = wanted[start : start + int(labelled.sum())]
            start += len(chosen)
            current[:] = [labelled.masked_scatter(labelled, chosen)]
            output = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                                      output_hidden_states=True)  # fmt: skip
            for depth, states in enumerate(output.hidden_states[:-1]):
                keep(f"residual stream {depth}", states)
            keep(FINAL, output.last_hidden_state)
    finally:
        for handle in handles:
            handle.remove()
    return {place: torch.cat(parts) for place, parts in found.items()}


def labels_of(batches: list[dict[str, Tensor]], picked: Tensor) -> list[str]:
    """The tags of the picked tokens."""
    ids = torch.cat([batch["concept_labels"][batch["concept_labels"] != IGNORED] for batch in batches])
    return [TAGS[index] for index in ids[picked].tolist()]


def draw_tokens(batches: list[dict[str, Tensor]], count: int, seed: int) -> Tensor:
    """Positions of randomly drawn tokens among the labelled ones."""
    total = sum(int((batch["concept_labels"] != IGNORED).sum()) for batch in batches)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


# ---- the study ------------------------------------------------------------------------------------------------------

ROWS = ("none", "random subspace", "one-pass LEACE", "sequential LEACE", "sequential orth")
PROBED = ("none", "one-pass LEACE", "sequential LEACE", "sequential orth")


@dataclass
class Outcome:
    """What was measured.

    Attributes:
        sentences: Sentences fitted on, and measured on.
        left_out: Sentences of the treebanks that were too long.
        tokens: Numbers of labelled tokens fitted on, and of predicted tokens measured on.
        sizes: Numbers of bytes measured on, of the treebank and of the other text.
        width: Number of features at a site.
        rank: Number of directions erased there.
        bits: Erasure → bits per byte of the treebank and of the other text.
        unigram: Unigram entropies of both in bits per byte.
        probes: Place → erasure → accuracy of a tag probe.
        majority: Accuracy of always saying the most frequent tag.
    """

    sentences: tuple[int, int]
    left_out: int
    tokens: tuple[int, int]
    sizes: tuple[int, int]
    width: int
    rank: int
    bits: dict[str, tuple[float, float]]
    unigram: tuple[float, float]
    probes: dict[str, dict[str, float]]
    majority: float


def run(settings: Settings) -> Outcome:
    """Fit all erasures, and measure them."""
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    treebanks = [read_treebank(path) for path in (settings.fit, settings.test)]
    parts = [tokenised(sentences, tokenizer, settings.max_tokens) for sentences in treebanks]
    fit, test = (batches_of(rows, tokenizer, settings.batch_size) for rows in parts)
    model = AutoModelForCausalLM.from_pretrained(settings.model).eval()
    erasures = Erasures(model, torch.Generator().manual_seed(settings.seed))
    erasures.fit(fit)
    other_rows = tokenised(read_lines(settings.other), tokenizer, settings.max_tokens)
    other = batches_of(other_rows, tokenizer, settings.batch_size)
    found = {
        name: (bits_per_byte(erasures, name, parts[1], test), bits_per_byte(erasures, name, other_rows, other))
        for name in ROWS
    }
    probes, tags = probe(erasures, fit, test, settings)
    left = next(iter(erasure_layers(model).values())).eraser_state(adapter("sequential LEACE"))[0]
    return Outcome(
        sentences=(len(parts[0]), len(parts[1])),
        left_out=sum(map(len, treebanks)) - sum(map(len, parts)),
        tokens=(
            sum(int((batch["concept_labels"] != IGNORED).sum()) for batch in fit),
            sum(len(ids) - 1 for ids in parts[1]["input_ids"]),
        ),
        sizes=(sum(parts[1]["bytes"]), sum(other_rows["bytes"])),
        width=left.shape[0],
        rank=left.shape[1],
        bits=found,
        unigram=(
            unigram_bits(parts[1]) / sum(parts[1]["bytes"]),
            unigram_bits(other_rows) / sum(other_rows["bytes"]),
        ),
        probes=probes,
        majority=majority(tags),
    )


def probe(
    erasures: Erasures, fit: list[dict[str, Tensor]], test: list[dict[str, Tensor]], settings: Settings
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Accuracies of tag probes by place and erasure, and the tags they were measured on.

    A probe is trained again under every erasure, on the fitted treebank, and judged on the other treebank.
    """
    drawn = [draw_tokens(batches, settings.probe_tokens, settings.seed) for batches in (fit, test)]
    tags = [labels_of(batches, picked) for batches, picked in zip((fit, test), drawn, strict=True)]
    accuracies: dict[str, dict[str, float]] = {}
    for name in PROBED:
        with erasures.only(name):
            states = [token_states(erasures.model, b, picked) for b, picked in zip((fit, test), drawn, strict=True)]
        for place in states[0]:
            accuracy = probe_accuracy(states[0][place], tags[0], states[1][place], tags[1])
            accuracies.setdefault(place, {})[name] = accuracy
    return accuracies, tags[1]


def markdown(lines: list[list[str]]) -> str:
    """A table from its cells, the head first."""
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def report(outcome: Outcome) -> str:
    """The text of `results.md`."""
    costs = [
        [name, *(f"{value:.3f}" for value in values)]
        for name, values in (*outcome.bits.items(), ("unigram entropy", outcome.unigram))
    ]
    probes = [[place, *(f"{by[name]:.3f}" for name in PROBED)] for place, by in outcome.probes.items()]
    return "\n\n".join(
        [
            "# Part-of-speech scrubbing: results",
            f"Fitted on {outcome.sentences[0]} sentences ({outcome.tokens[0]} labelled tokens), measured on "
            f"{outcome.sentences[1]} others ({outcome.tokens[1]} tokens, {outcome.sizes[0]} bytes) and on "
            f"{outcome.sizes[1]} bytes of other text. Rank {outcome.rank} of {outcome.width} features at every site; "
            f"sentences left out as too long: {outcome.left_out}.",
            markdown([["erasure", "bits per byte", "of other text"], *costs]),
            f"Accuracy of tag probes on held-out sentences; the most frequent tag alone has {outcome.majority:.3f}.",
            markdown([["place", *PROBED], *probes]),
            "",
        ]
    )


def figure(outcome: Outcome, path: Path) -> None:
    """Bits per byte beside the probes of norms (solid) and of the residual stream (dashed)."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 4), layout="constrained")
    costs, depths = drawing.subplots(1, 2)
    colours = dict(zip(ROWS, ("C0", "C7", "C1", "C2", "C3"), strict=True))
    for row, (name, values) in enumerate(outcome.bits.items()):
        for column, value in enumerate(values):
            costs.barh(row + 0.4 * column, value, height=0.38, color=colours[name], alpha=(1.0, 0.5)[column])
    for value, style, text in zip(
        outcome.unigram, (":", "--"), ("held-out sentences", "other text (pale)"), strict=True
    ):
        costs.axvline(value, color="black", linestyle=style, label=f"unigrams, {text}")
    costs.set_yticks([row + 0.2 for row in range(len(outcome.bits))], list(outcome.bits))
    costs.invert_yaxis()
    costs.set_xlabel("bits per byte")
    costs.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.4, -0.14), frameon=False)
    streams = [place for place in outcome.probes if place.startswith("residual stream")]
    norms = [place for place in outcome.probes if place not in [*streams, FINAL]]
    for name in PROBED:
        for places, style in ((norms, "-o"), (streams, "--")):
            across = [index / (len(places) - 1 if places is norms else len(places)) for index in range(len(places))]
            label = name if places is norms else None
            heights = [outcome.probes[place][name] for place in places]
            depths.plot(across, heights, style, color=colours[name], label=label, markersize=3)
    depths.axhline(outcome.majority, color="black", linestyle=":", label="most frequent tag")
    depths.set(xlabel="depth (norms; dashed: residual stream)", ylabel="accuracy of tag probe", ylim=(0, 1))
    depths.legend(fontsize="small")
    drawing.savefig(path, dpi=150)


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    settings = read_settings(settings_file, overrides)
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    outcome = run(settings)
    text = report(outcome)
    (output / "results.md").write_text(text, encoding="utf-8")
    figure(outcome, output / "figure.png")
    typer.echo(text)


if __name__ == "__main__":
    # One model holds all adapters and applies one at a time; PEFT and the adapters warn about that.
    warnings.filterwarnings("ignore", message="Already found a `peft_config`|Adding '")
    # Probes stop after a few hundred steps, when their accuracy no longer changes.
    warnings.filterwarnings("ignore", message="lbfgs failed to converge")
    studies.start(main)
