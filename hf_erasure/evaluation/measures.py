"""One measure of an evaluation each: what it needs, how it is read, and how it is taken of a model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_erasure.fitting.report import GENDER, POS, STEREOTYPES
from hf_erasure.metrics import METRICS, benchmarks, minimum_description_length, resampling, tpr_gap
from hf_erasure.metrics.linear_leakage import accuracy, held_out_answers
from hf_erasure.metrics.readers import spread
from hf_erasure.models.heads import known_task
from hf_erasure.models.pooling import IN_WORDS

from .data import Biographies, DataFolder
from .states import FINAL, StateReader, TokenStates

# So many labelled tokens are probed, and so many of them layer by layer.
_TOKENS, _TOKENS_BY_DEPTH = 2000, 1000
_TOKEN_FOLDS = 3
# Of the pseudo-perplexity of a masked model: texts at most, and tokens of a window.
_PSEUDO_TEXTS, _PSEUDO_WINDOW = 40, 64
_PERPLEXITY_ROWS = 32
# Of each kind of text: the base's states are kept.
_DISTORTION_TEXTS = 300
GENDER_SEAT = ("sent-weat6", "sent-weat6b", "sent-weat7", "sent-weat7b", "sent-weat8", "sent-weat8b")


class NotForThisModel(ValueError):
    """A measure cannot be asked of a model; the message says why."""


@dataclass
class Shared:
    """What the entries of one run have in common.

    Attributes:
        data: The folder.
        seed: Of folds, resamples and permutations.
        resamples: Of every bootstrap.
        confidence: Of every interval.
        stereoset: How causal models score StereoSet, as in `benchmarks.stereoset`.
        base_states: The base's last hidden states by text, which distortion is relative to.
    """

    data: DataFolder
    seed: int = 0
    resamples: int = 1000
    confidence: float = 0.95
    stereoset: str = "sentence"
    base_states: list[Tensor] | None = None

    @property
    def statistics(self) -> dict[str, Any]:
        """Keywords of every metric."""
        return {"confidence": self.confidence, "resamples": self.resamples, "seed": self.seed}


@dataclass
class Subject:
    """A model under examination; what several measures need of it is computed once.

    Attributes:
        model: With the adapters of its entry.
        tokenizer: Of the model.
        shared: What all entries have in common.
        is_base: Whether it is the model without adapters, which others are compared with.
        pool: How the states of a text become one vector.
        kept: Results that several measures read.
        others: The same model with other pools.
    """

    model: nn.Module
    tokenizer: Any
    shared: Shared
    is_base: bool = True
    pool: str = "mean"
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: dict[str, Subject] = field(default_factory=dict)

    def at(self, pool: str) -> Subject:
        """The same model, whose texts are pooled in another way."""
        if pool == self.pool:
            return self
        return self.others.setdefault(pool, replace(self, pool=pool, kept={}, others={}))

    @functools.cached_property
    def head(self) -> str | None:
        """`"masked"`, `"causal"` or None."""
        task = known_task(self.model)
        return task if task in ("masked", "causal") else None

    @property
    def data(self) -> DataFolder:
        """The folder of data."""
        return self.shared.data

    @property
    def statistics(self) -> dict[str, Any]:
        """Keywords of every metric."""
        return self.shared.statistics

    @functools.cached_property
    def reader(self) -> StateReader:
        """Of the hidden states."""
        return StateReader(self.model, self.tokenizer)

    @functools.cached_property
    def biographies(self) -> tuple[Biographies, dict[str, Tensor]]:
        """The biographies, and their pooled states by layer."""
        found = self.data.biographies()
        return found, self.reader.pooled(found.texts, self.pool)

    @functools.cached_property
    def tokens(self) -> TokenStates:
        """States of tagged tokens by layer."""
        return self.reader.tagged(self.data.sentences(), _TOKENS)

    @functools.cached_property
    def professions(self) -> list[str]:
        """The profession that a linear probe fitted on the others gives to each biography."""
        found, states = self.biographies
        return held_out_answers(states[FINAL], found.professions, seed=self.shared.seed)


@dataclass(frozen=True)
class Measure:
    """One row of the tables.

    Attributes:
        key: Its name in the results.
        title: In the tables.
        purpose: `"bias"`, or `"capability"`, what was paid.
        figure: Which number of the result is the main one.
        better: `"lower"`, `"higher"` or `"closer"` to the ideal.
        ideal: Of a model without the bias, or without loss.
        says: What the number is, in a sentence.
        take: Of a subject, the metric's whole result with `intervals`.
        needs_head: Whether the model must predict words.
        source: Paper and address, where it is one of the field's.
        harness: The task of lm-evaluation-harness that measures the same on causal models, if there is one.
        concept: What it is a measure of; None where it is of no concept.
        pool: Of a measure of pooled states, which pool it reads; None of others.
    """

    key: str
    title: str
    purpose: str
    figure: str
    better: str
    ideal: float
    says: str
    take: Callable[[Subject], dict[str, Any]]
    needs_head: bool = False
    source: str = ""
    harness: str | None = None
    concept: str | None = None
    pool: str | None = None

    def why_not(self, subject: Subject) -> str | None:
        """Why this model cannot be asked for it; None where it can."""
        if self.needs_head and subject.head is None:
            return f"{type(subject.model).__name__} has no head that predicts words"
        return None

    def described(self) -> dict[str, Any]:
        """Its facts for the results."""
        ideal = self.ideal if math.isfinite(self.ideal) else None
        names = ("key", "title", "purpose", "figure", "better", "says", "source", "harness", "concept", "pool")
        return {**{name: getattr(self, name) for name in names}, "ideal": ideal}


def _of_metric(
    metric: str, key: str, title: str, take: Callable[[Subject], dict[str, Any]], says: str = "", **changed: Any
) -> Measure:
    """A measure whose direction, ideal and source are those of a metric."""
    facts = METRICS[metric].facts
    given: dict[str, Any] = {
        "figure": facts.figure, "better": facts.better, "ideal": facts.ideal, "harness": facts.harness,
        "purpose": "bias", **changed,
    }  # fmt: skip
    return Measure(key, title, says=says or facts.formula, take=take, source=f"{facts.paper}, {facts.url}", **given)


# ---- gender -----------------------------------------------------------------------------------------------------


def _leakage(subject: Subject, *, nonlinear: bool = False) -> dict[str, Any]:
    found, states = subject.biographies
    given = held_out_answers(states[FINAL], found.genders, nonlinear=nonlinear, seed=subject.shared.seed)
    return accuracy(given, found.genders, **subject.statistics)


def _compression(subject: Subject) -> dict[str, Any]:
    found, states = subject.biographies
    return minimum_description_length.score(states[FINAL], found.genders, **subject.statistics)


def _tpr_gap(subject: Subject) -> dict[str, Any]:
    found, _ = subject.biographies
    return tpr_gap.score(subject.professions, found.professions, found.genders, **subject.statistics)


def _seat(subject: Subject, tests: Sequence[str] | None) -> dict[str, Any]:
    folder = subject.data.part("seat")
    chosen = None if tests is None else [name for name in tests if any(folder.glob(f"{name}.json*"))]
    return benchmarks.seat(
        subject.model, subject.tokenizer, folder, tests=chosen, pool=subject.pool, **subject.statistics
    )


def _seat_mean(key: str, title: str, tests: Sequence[str] | None) -> Measure:
    return _of_metric(
        "weat", key, title, functools.partial(_seat, tests=tests),
        "mean over the tests of |effect size|; each test with its permutation p value is in the JSON",
        figure="mean_absolute_effect_size", better="lower", pool="mean",
    )  # fmt: skip


def _winobias(subject: Subject) -> dict[str, Any]:
    folder, limit = subject.data.part("winobias"), subject.data.limit
    return benchmarks.winobias(subject.model, subject.tokenizer, folder, limit=limit, **subject.statistics)


def _crows_pairs(subject: Subject, bias_types: Sequence[str] | None) -> dict[str, Any]:
    path, limit = subject.data.file("crows-pairs"), subject.data.limit
    return benchmarks.crows_pairs(
        subject.model, subject.tokenizer, path, bias_types=bias_types, limit=limit, **subject.statistics
    )


def _stereoset(subject: Subject, bias_types: Sequence[str] | None) -> dict[str, Any]:
    path, limit = subject.data.file("stereoset"), subject.data.limit
    return benchmarks.stereoset(
        subject.model, subject.tokenizer, path, bias_types=bias_types, limit=limit,
        convention=subject.shared.stereoset, **subject.statistics,
    )  # fmt: skip


def _language_bias(of: str, bias_types: Sequence[str] | None) -> list[Measure]:
    """StereoSet and CrowS-Pairs, of one kind of bias or of all."""
    stereoset = _once(f"stereoset {of}", functools.partial(_stereoset, bias_types=bias_types))
    crows = functools.partial(_crows_pairs, bias_types=bias_types)
    name = f" ({of or 'all kinds'})"
    suffix = f"_{of}" if of else ""
    return [
        _of_metric(
            "crows_pairs", f"crows_pairs{suffix}", f"CrowS-Pairs{name}, % stereotype", crows,
            "share of pairs in which the stereotype is likelier; 50 is ideal", needs_head=True,
            figure="score", better="closer", ideal=50.0,
        ),
        _of_metric(
            "stereoset", f"stereoset_ss{suffix}", f"StereoSet SS{name}, % stereotype", stereoset,
            "share of terms for which the stereotype is likelier than the anti-stereotype; 50 is ideal. A masked model "
            "is asked for the word in the blank, a causal one for the whole sentence (the JSON names the convention)",
            needs_head=True, figure="ss", better="closer", ideal=50.0,
        ),
        _of_metric(
            "stereoset", f"stereoset_lms{suffix}", f"StereoSet LMS{name}", stereoset,
            "share of items in which a meaningful word is likelier than an unrelated one", needs_head=True,
            figure="lms", better="higher", ideal=100.0, purpose="capability",
        ),
    ]  # fmt: skip


def _once(key: str, take: Callable[[Subject], dict[str, Any]]) -> Callable[[Subject], dict[str, Any]]:
    """Two figures of one result are computed once a subject."""

    def taken(subject: Subject) -> dict[str, Any]:
        if key not in subject.kept:
            subject.kept[key] = take(subject)
        return subject.kept[key]

    return taken


def gender_measures() -> list[Measure]:
    """Gender in biographies, in associations, and in what the model would rather say."""
    return [
        _of_metric(
            "linear_leakage", "gender_linear", "Gender, linear probe − majority", _leakage,
            "accuracy of a cross-validated logistic regression on the last hidden states of biographies, minus the "
            "share of the larger gender", pool="mean",
        ),
        _of_metric(
            "linear_leakage", "gender_mlp", "Gender, MLP probe − majority", functools.partial(_leakage, nonlinear=True),
            "the same with a multilayer perceptron: what is not linearly readable may still be readable", pool="mean",
        ),
        _of_metric(
            "minimum_description_length", "gender_mdl", "Gender, MDL compression", _compression,
            "how much shorter the online code of the gender is than a uniform one; 1 is no shorter", pool="mean",
        ),
        _of_metric(
            "tpr_gap", "tpr_gap", "TPR gap of profession (RMS)", _tpr_gap,
            "root mean square over professions of the difference in true positive rate between the genders, of a "
            "linear probe fitted on the same states", pool="mean",
        ),
        _seat_mean("seat_gender", "SEAT gender, mean |d|", GENDER_SEAT),
        _of_metric(
            "pronoun_gap", "winobias", "WinoBias pronoun gap", _winobias,
            "how much more often the pronoun of the occupation's stereotype is likelier", needs_head=True,
        ),
        *_language_bias("gender", ["gender"]),
    ]  # fmt: skip


# ---- parts of speech --------------------------------------------------------------------------------------------


def _tag_leakage(subject: Subject, *, nonlinear: bool = False) -> dict[str, Any]:
    tokens = subject.tokens
    return tag_leakage(tokens.layers[FINAL], tokens, nonlinear=nonlinear, seed=subject.shared.seed, **{
        name: value for name, value in subject.statistics.items() if name != "seed"
    })  # fmt: skip


def tag_leakage(
    states: Tensor, tokens: TokenStates, *, nonlinear: bool = False, seed: int = 0, **statistics: Any
) -> dict[str, Any]:
    """Leakage of parts of speech, tags too rare to be in every fold left out and named."""
    of_tag: dict[str, set[int]] = {}
    for tag, sentence in zip(tokens.tags, tokens.sentences, strict=True):
        of_tag.setdefault(tag, set()).add(sentence)
    rare = sorted(tag for tag, own in of_tag.items() if len(own) < 2 * _TOKEN_FOLDS)
    kept = [i for i, tag in enumerate(tokens.tags) if tag not in rare]
    if not kept:
        raise ValueError("No part of speech occurs in enough sentences: raise --limit.")
    tags, groups = [tokens.tags[i] for i in kept], [tokens.sentences[i] for i in kept]
    given = held_out_answers(states[kept], tags, nonlinear=nonlinear, groups=groups, folds=_TOKEN_FOLDS, seed=seed)
    return {**accuracy(given, tags, groups, seed=seed, **statistics), "rare": rare}


def pos_measures() -> list[Measure]:
    """Part of speech at the tokens of a treebank."""
    return [
        _of_metric(
            "linear_leakage", "pos_linear", "Part of speech, linear probe − majority", _tag_leakage,
            "accuracy of a cross-validated logistic regression on the last hidden states of tokens, sentences never "
            "split, minus the share of the most frequent tag",
        ),
        _of_metric(
            "linear_leakage", "pos_mlp", "Part of speech, MLP probe − majority",
            functools.partial(_tag_leakage, nonlinear=True),
            "the same with a multilayer perceptron: what is not linearly readable may still be readable",
        ),
    ]  # fmt: skip


# ---- stereotypes ------------------------------------------------------------------------------------------------


def stereotype_measures() -> list[Measure]:
    """Stereotypes of all kinds."""
    return [_seat_mean("seat_all", "SEAT all, mean |d|", None), *_language_bias("", None)]


# ---- capability -------------------------------------------------------------------------------------------------


def _perplexity(subject: Subject, name: str) -> dict[str, Any]:
    chosen, longest = subject.data.paragraphs(name), subject.reader.longest
    if subject.head == "masked":
        # A forward row a token: few texts, and windows that are short.
        chosen, longest = spread(chosen, _PSEUDO_TEXTS), min(longest, _PSEUDO_WINDOW)
    return benchmarks.text_perplexity(
        subject.model, subject.tokenizer, chosen, max_length=longest, batch_size=_PERPLEXITY_ROWS, **subject.statistics
    )


def _profession(subject: Subject) -> dict[str, Any]:
    found, _ = subject.biographies
    return accuracy(subject.professions, found.professions, **subject.statistics)


def _distortion(subject: Subject) -> dict[str, Any]:
    texts = [text for part in subject.data.texts().values() for text in spread(part, _DISTORTION_TEXTS)]
    now, shared = subject.reader.final(texts), subject.shared
    if subject.is_base:
        shared.base_states = now
    if shared.base_states is None:
        raise ValueError("distortion is relative to the base's states, which could not be read")
    mean = torch.cat(shared.base_states).double().mean(0)
    pairs = list(zip(shared.base_states, now, strict=True))
    moved = np.array([float((b.double() - a.double()).square().sum()) for a, b in pairs])
    varied = np.array([float((a.double() - mean).square().sum()) for a, _ in pairs])

    def figures(index: Any) -> dict[str, float]:
        return {"distortion": float(np.sqrt(moved[index].sum() / varied[index].sum()))}

    found = resampling.bootstrap(figures, len(pairs), **subject.statistics)
    return {**found, "texts": len(pairs), "tokens": sum(len(state) for state in now)}


def capability_measures(data: DataFolder) -> list[Measure]:
    """What is paid, in every suite; perplexity on each kind of text that is there."""
    kinds = [name for name in ("wikitext-2", "tinystories-sample") if (data.path / name).is_dir()] or ["wikitext-2"]
    return [
        *(
            _of_metric(
                "perplexity", f"perplexity_{name}", f"Perplexity, {name}", functools.partial(_perplexity, name=name),
                "exp of the mean loss of a token; of a masked model, of its pseudo-likelihood",
                purpose="capability", needs_head=True, figure="perplexity", better="lower", ideal=1.0,
            )
            for name in kinds
        ),
        Measure(
            "profession", "Profession, linear probe", "capability", "accuracy", "higher", 1.0,
            "accuracy of a cross-validated logistic regression on the same states of biographies", _profession,
            pool="mean",
        ),
        Measure(
            "distortion", "Distortion of the last hidden state", "capability", "distortion", "lower", 0.0,
            "sqrt(E|x′ − x|² / E|x − E x|²) over the tokens of running text, x′ with the adapter", _distortion,
        ),
    ]  # fmt: skip


# ---- suites -----------------------------------------------------------------------------------------------------

_SUITES: dict[str, dict[str, Callable[[], list[Measure]]]] = {
    "gender": {GENDER: gender_measures},
    "pos": {POS: pos_measures},
    "stereotypes": {STEREOTYPES: stereotype_measures},
    "all": {GENDER: gender_measures, POS: pos_measures, STEREOTYPES: stereotype_measures},
}
SUITES = tuple(_SUITES)


def measures_of(suite: str, data: DataFolder, pools: Sequence[str] = ("mean",)) -> list[Measure]:
    """What a suite measures, capability at the end; what reads pooled states once for each pool.

    Raises:
        ValueError: If there is no such suite.
    """
    if suite not in _SUITES:
        raise ValueError(f"--suite {suite}: write one of {', '.join(SUITES)}.")
    own = [replace(measure, concept=concept) for concept, make in _SUITES[suite].items() for measure in make()]
    chosen = [*own, *capability_measures(data)]
    return [own for measure in chosen for own in ([measure] if measure.pool is None else _at_pools(measure, pools))]


def _at_pools(measure: Measure, pools: Sequence[str]) -> list[Measure]:
    """A measure of pooled states at each pool; the first keeps the key, and the title where it is the mean."""
    found = []
    for pool in pools:
        words = IN_WORDS[pool]
        found.append(
            replace(
                measure,
                key=measure.key if pool == pools[0] else f"{measure.key}_{pool}",
                title=measure.title if pools == ("mean",) else f"{measure.title}, {words}",
                says=f"{measure.says}; pooled: {words}",
                pool=pool,
                take=functools.partial(lambda subject, pool: measure.take(subject.at(pool)), pool=pool),
            )
        )
    return found


def leakage_by_depth(subject: Subject, concept: str) -> list[dict[str, Any]]:
    """Linear leakage of `"gender"` or `"pos"` at every layer, with intervals."""
    statistics = {name: value for name, value in subject.statistics.items() if name != "seed"}
    seed, rows = subject.shared.seed, []
    if concept == "gender":
        found, states = subject.biographies
        for layer, state in states.items():
            given = held_out_answers(state, found.genders, seed=seed)
            rows.append({"layer": layer, **accuracy(given, found.genders, seed=seed, **statistics)})
        return rows
    tokens = subject.tokens
    step = max(1, math.ceil(len(tokens.tags) / _TOKENS_BY_DEPTH))
    fewer = TokenStates({}, tokens.tags[::step], tokens.sentences[::step])
    for layer, state in tokens.layers.items():
        rows.append({"layer": layer, **tag_leakage(state[::step], fewer, seed=seed, **statistics)})
    return rows
