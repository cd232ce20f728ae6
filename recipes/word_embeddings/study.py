"""Word embeddings without gender: association tests on a model's input embeddings, before and after an erasure.

WEAT (Caliskan et al. 2017, arXiv 1608.07187) on the embedding layer, whose output an adapter erases. The erasure is
fitted on pairs of words such as "king" and "queen", none of which is in a test; some pairs are held out by seed.
"""

from __future__ import annotations

import json
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
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.metrics import linear_leakage, weat
from hf_erasure.metrics.readers import read_seat
from hf_erasure.recipes.erasure import EMBEDDED, embedded_model
from recipes import studies
from recipes.over_seeds import cell, markdown, t_interval

ADAPTER = "no_gender"
GENDERS = ["male", "female"]
METHODS = {"none": None, "LEACE": "leace", "INLP": "inlp"}


@dataclass
class Settings:
    """The settings in `study.yaml`.

    Attributes:
        model: A Hub id, a folder, or `"embedded"`.
        embedding: The module whose output is erased.
        pairs: A JSON list of pairs of words, the male one first.
        swapped: First words of the pairs in which the female word comes first.
        tests: The folder of WEAT's tests.
        gender: Tests of gender.
        others: Tests of other associations.
        output: Where table and figure go.
        held_out: Share of the pairs that is only measured on.
        background: Number of words of the vocabulary that give mean and covariance.
        inlp_rank: Number of directions that INLP removes.
        seeds: One split of the pairs for each.
    """

    model: str
    embedding: str
    pairs: str
    tests: str
    gender: list[str]
    others: list[str]
    output: str
    swapped: list[str] = field(default_factory=list)
    held_out: float = 0.3
    background: int = 3000
    inlp_rank: int = 10
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Read the file, and the settings that follow it on the command line.

    Raises:
        ValueError: If the file is not a recipe, or a key is unknown.
    """
    return studies.read_settings(Settings, path, overrides, "model, pairs, tests")


# ---- data -----------------------------------------------------------------------------------------------------------


class Words:
    """The words that a tokenizer has as one token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def id(self, word: str) -> int | None:
        """The token of a word in the middle of a sentence; None where it is several or unknown."""
        found = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        return found[0] if len(found) == 1 and found[0] != self.tokenizer.unk_token_id else None

    def known(self, words: Iterable[str]) -> list[int]:
        """The tokens of the words that are a single token, each once."""
        return list(dict.fromkeys(token for word in words if (token := self.id(word)) is not None))


@dataclass
class Data:
    """The data of one seed.

    Attributes:
        fitted: `(male, female)` tokens that are fitted on.
        held_out: `(male, female)` tokens that are not.
        tests: Test → `X`, `Y`, `A`, `B` → tokens.
        coverage: Test → share of its words that are one token.
        background: Tokens of other words.
    """

    fitted: list[tuple[int, int]]
    held_out: list[tuple[int, int]]
    tests: dict[str, dict[str, list[int]]]
    coverage: dict[str, float]
    background: list[int]


def read_pairs(settings: Settings, words: Words) -> list[tuple[int, int]]:
    """Pairs of words of one token, the male word first, each pair once."""
    found = {}
    for first, second in json.loads(Path(settings.pairs).read_text(encoding="utf-8")):
        male, female = (second, first) if first in settings.swapped else (first, second)
        ids = words.id(male), words.id(female)
        if None not in ids:
            found[ids] = None
    return list(found)


def draw_data(settings: Settings, tokenizer: Any, seed: int) -> Data:
    """Split the pairs; those with a word of a test are never fitted on.

    Raises:
        ValueError: If a test has too few words of one token.
    """
    words, draw = Words(tokenizer), random.Random(seed)
    sets, _ = read_seat(settings.tests, [*settings.gender, *settings.others])
    tests = {name: {key: words.known(part) for key, part in parts.items()} for name, parts in sets.items()}
    for name, parts in tests.items():
        if min(len(parts["X"]), len(parts["Y"])) < 2 or not parts["A"] or not parts["B"]:
            raise ValueError(f"{name}: too few of its words are one token of this model; leave the test out.")
    coverage = {
        name: sum(map(len, tests[name].values())) / sum(len(set(part)) for part in parts.values())
        for name, parts in sets.items()
    }
    tested = {token for parts in tests.values() for part in parts.values() for token in part}
    pairs = read_pairs(settings, words)
    free = [pair for pair in pairs if not tested & set(pair)]
    drawn = draw.sample(free, len(free))
    held = drawn[: round(settings.held_out * len(drawn))]
    taken = tested | {token for pair in pairs for token in pair}
    vocabulary = [token for word, token in sorted(tokenizer.get_vocab().items()) if word.isalpha() and len(word) > 2]
    usable = [token for token in vocabulary if token not in taken]
    background = draw.sample(usable, min(settings.background, len(usable)))
    return Data(drawn[len(held) :], held, tests, coverage, background)


def batches_of(tokens: list[int], labels: list[int] | None = None, size: int = 100) -> list[dict[str, Tensor]]:
    """Tokens in rows, for the embedding layer; the output of the rest of the model is not used."""
    found = []
    for start in range(0, len(tokens), size):
        ids = torch.tensor([tokens[start : start + size]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if labels is not None:
            batch["concept_labels"] = torch.tensor([labels[start : start + size]])
        found.append(batch)
    return found


# ---- the study ------------------------------------------------------------------------------------------------------


def load(settings: Settings) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    path = embedded_model() if settings.model == EMBEDDED else settings.model
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def erase(model: Any, data: Data, method: str, settings: Settings) -> None:
    """Put a fitted erasure of gender at the embedding layer."""
    config = ConceptErasureConfig(
        concept="gender", labels=GENDERS, target_modules=[settings.embedding], site="output", method=METHODS[method],
        rank=settings.inlp_rank if method == "INLP" else None,
    )  # fmt: skip
    model.add_adapter(config, adapter_name=ADAPTER)
    tokens = [token for pair in data.fitted for token in pair]
    labelled = batches_of(tokens, [0, 1] * len(data.fitted))
    background = batches_of(data.background)
    fit_concept_erasure(model, labelled, ADAPTER, background=background, sequential=False, progress=False)


@torch.no_grad()
def vectors(model: Any, tokens: list[int]) -> np.ndarray:
    """The output `(tokens, width)` of the embedding layer, with the adapters that are active."""
    return model.get_input_embeddings()(torch.tensor(tokens)).double().numpy()


@dataclass
class Outcome:
    """The outcome of one seed.

    Attributes:
        seed: The seed of the split.
        pairs: Numbers of pairs fitted on, and held out.
        coverage: Test → share of its words that are one token.
        effects: Erasure → test → effect size.
        p_values: Erasure → test → p value.
        gender: Erasure → how many held-out pairs are told apart by the direction of the fitted ones.
        probe: Erasure → accuracy of a cross-validated probe on all gendered words not fitted on.
        cosine: Erasure → mean cosine of other words with their vectors before it.
    """

    seed: int
    pairs: tuple[int, int]
    coverage: dict[str, float]
    effects: dict[str, dict[str, float]]
    p_values: dict[str, dict[str, float]]
    gender: dict[str, float]
    probe: dict[str, float]
    cosine: dict[str, float]


def run_seed(settings: Settings, seed: int) -> Outcome:
    """Fit every erasure on one split, and measure."""
    model, tokenizer = load(settings)
    data = draw_data(settings, tokenizer, seed)
    found = Outcome(seed, (len(data.fitted), len(data.held_out)), data.coverage, {}, {}, {}, {}, {})
    others = data.background[:1000]
    before = vectors(model, others)
    direction = np.mean([np.subtract(*vectors(model, list(pair))) for pair in data.fitted], axis=0)
    gendered = attributes(data) + [(t, g) for pair in data.held_out for t, g in zip(pair, GENDERS, strict=True)]
    for name in METHODS:
        if name != "none":
            erase(model, data, name, settings)
        results = {
            test: weat.score(*(vectors(model, parts[key]) for key in weat.SETS), resamples=2, permutations=5000)
            for test, parts in data.tests.items()
        }
        found.effects[name] = {test: result["effect_size"] for test, result in results.items()}
        found.p_values[name] = {test: result["p_value"] for test, result in results.items()}
        told = [float(direction @ np.subtract(*vectors(model, list(pair)))) for pair in data.held_out]
        found.gender[name] = float(np.mean([(value > 0) + (value == 0) / 2 for value in told]))
        x = vectors(model, [token for token, _ in gendered])
        found.probe[name] = linear_leakage.score(x, [g for _, g in gendered], seed=seed, resamples=2)["accuracy"]
        after = vectors(model, others)
        cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
        found.cosine[name] = float(cosines.mean())
        if name != "none":
            model.delete_adapter(ADAPTER)
    return found


def attributes(data: Data) -> list[tuple[int, str]]:
    """The gendered words of the tests with their gender: names and words such as "brother", each once."""
    found: dict[int, str] = {}
    for name, (male, female) in {"weat6": ("X", "Y"), "weat7": ("A", "B"), "weat8": ("A", "B")}.items():
        for key, gender in ((male, GENDERS[0]), (female, GENDERS[1])):
            found |= dict.fromkeys(data.tests.get(name, {}).get(key, []), gender)
    return list(found.items())


# ---- report ---------------------------------------------------------------------------------------------------------

PAPER = (
    "*Differs from the papers*: Caliskan et al. test GloVe and word2vec. This study tests the input embeddings of the "
    "model in `study.yaml`, so only words of one token. Bolukbasi et al. (arXiv 1607.06520) take the "
    "direction from the same pairs and remove it only from neutral words; here LEACE and INLP act on every token. "
    "Even when an effect is gone, other probes may still read gender (Gonen & Goldberg 2019, arXiv 1903.03862): see "
    "the probe."
)


def effect_table(outcomes: list[Outcome], tests: Iterable[str]) -> str:
    """Effect sizes and p values, before and after, as means over seeds."""
    lines = []
    for test in tests:
        cells = [f"{outcomes[0].coverage[test]:.0%}"]
        for name in METHODS:
            effects = [o.effects[name][test] for o in outcomes]
            p = sum(o.p_values[name][test] for o in outcomes) / len(outcomes)
            # Without an erasure all seeds give the same figure.
            value = f"{effects[0]:+.2f}" if name == "none" else cell(effects, "+.2f")
            cells.append(f"{value}, p {'< 0.001' if p < 0.001 else format(p, '.3f')}")
        lines.append([test, *cells])
    return markdown(["test", "words known", *METHODS], lines)


def reading_table(outcomes: list[Outcome]) -> str:
    """What is left of gender, and how much other words change."""
    lines = [
        [name, *(cell([getattr(o, figure)[name] for o in outcomes]) for figure in ("gender", "probe", "cosine"))]
        for name in METHODS
    ]
    head = ["erasure", "held-out pairs told apart", "probe on gendered words not fitted on", "cosine of other words"]
    return markdown(head, lines)


def report(outcomes: list[Outcome], settings: Settings, command: str) -> str:
    """The text of `results.md`."""
    fitted, held = outcomes[0].pairs

    def size(tests: list[str]) -> str:
        means = {n: [np.mean([abs(o.effects[n][t]) for t in tests]) for o in outcomes] for n in METHODS}
        return ", ".join(
            f"{name} {found[0]:.2f}" if name == "none" else f"{name} {cell(found, '.2f')}"
            for name, found in means.items()
        )

    return "\n\n".join(
        [
            "# Word embeddings without gender: results",
            f"```\n{command}\n```",
            f"Fitted on {fitted} pairs of words, none of which is in a test; {held} pairs are held out. Seeds "
            f"{settings.seeds}, each with another split of the pairs: mean [95 % t-interval over seeds]; p values are "
            f"means over seeds. LEACE removes 1 direction, INLP {settings.inlp_rank}.",
            f"Tests of gender; mean size of the effects: {size(settings.gender)}.",
            effect_table(outcomes, settings.gender),
            f"Tests of other associations, which should stay; mean size: {size(settings.others)}.",
            effect_table(outcomes, settings.others),
            "weat6, weat7b and weat8b use first names for the genders, weat6b, weat7 and weat8 words such as "
            '"brother"; the fitted pairs have no names.',
            "What can still be read: *held-out pairs told apart* by the direction of the fitted pairs before erasure "
            "(half is chance); a cross-validated probe on the tests' gendered words and the held-out pairs.",
            reading_table(outcomes),
            PAPER,
            "",
        ]
    )


def figure(outcomes: list[Outcome], settings: Settings, path: Path) -> None:
    """Draw the effect sizes of every test, with intervals over seeds."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 4.4), layout="constrained")
    panels = drawing.subplots(1, 2, sharey=True)
    groups = (("gender", settings.gender), ("something else", settings.others))
    for axes, (title, tests) in zip(panels, groups, strict=True):
        for step, (name, mark) in enumerate(zip(METHODS, "os^", strict=True)):
            mean, low, high = zip(*(t_interval([o.effects[name][t] for o in outcomes]) for t in tests), strict=True)
            errors = [np.subtract(mean, low), np.subtract(high, mean)]
            filled = "white" if mark == "s" else None
            axes.errorbar(np.arange(len(tests)) + 0.15 * (step - 1), mean, errors, fmt=mark, capsize=3, label=name,
                          markerfacecolor=filled)  # fmt: skip
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_xticks(range(len(tests)), tests)
        axes.set(title=f"tests of {title}", ylim=(-2, 2))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    panels[0].set_ylabel("effect size")
    drawing.savefig(path, dpi=140)


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    settings = read_settings(settings_file, overrides)
    command = studies.command_line("word_embeddings", settings_file, overrides)
    runs = {f"seed {seed}": partial(run_seed, settings, seed) for seed in settings.seeds}
    studies.run(
        runs,
        settings.output,
        lambda outcomes: report(outcomes, settings, command),
        lambda outcomes, path: figure(outcomes, settings, path),
    )


if __name__ == "__main__":
    studies.start(main)
