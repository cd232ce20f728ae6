"""The measures of the tables: what each needs, what its number means, and how it is computed for a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_erasure.fitting.report import GENDER, POS, STEREOTYPES
from hf_erasure.metrics import METRICS, benchmarks, linear_leakage, minimum_description_length, resampling, tpr_gap
from hf_erasure.metrics.readers import spread
from hf_erasure.models.pooling import IN_WORDS
from hf_erasure.models.scorer import FINAL

from .data import DataFolder
from .subject import Subject, TokenStates

# Folds of the probes of single tokens; a tag in fewer sentences than two for each fold is too rare for a probe.
_TOKEN_FOLDS = 3
# The most texts of a pseudo-perplexity, and the tokens of its windows: a masked model reads a row for each token.
_PSEUDO_TEXTS, _PSEUDO_WINDOW = 40, 64
# Rows of a batch of windows.
_PERPLEXITY_ROWS = 32
# The most texts of each kind for the distortion: the base's states of all of them are kept in memory.
_DISTORTION_TEXTS = 300
GENDER_SEAT = ("sent-weat6", "sent-weat6b", "sent-weat7", "sent-weat7b", "sent-weat8", "sent-weat8b")


@dataclass(frozen=True)
class Measure:
    """One row of the tables."""

    key: str  # its name in the results
    title: str  # its name in the tables
    purpose: str  # `"bias"`, or `"capability"`, for the cost
    figure: str  # which number of the result is the main one
    better: str  # `"lower"`, `"higher"` or `"closer"` to the ideal
    ideal: float  # the value of a model without the bias, or without loss
    says: str  # what the number is, in a sentence
    # A subject that pools as the measure does → the metric's whole result with `intervals`.
    compute: Callable[[Subject], dict[str, Any]]
    needs_head: bool = False  # whether the model must predict words
    source: str = ""  # paper and address, if the measure is an established one
    concept: str | None = None  # the concept that it measures; None if it measures none
    pool: str | None = None  # the pool, if it reads pooled states; None otherwise

    def described(self) -> dict[str, Any]:
        """The facts of the measure for the results."""
        ideal = self.ideal if math.isfinite(self.ideal) else None
        names = ("key", "title", "purpose", "figure", "better", "says", "source", "concept", "pool")
        return {**{name: getattr(self, name) for name in names}, "ideal": ideal}


def _metric_measure(
    metric: str, key: str, title: str, compute: Callable[[Subject], dict[str, Any]], says: str, **changed: Any
) -> Measure:
    """A measure whose direction, ideal and source are those of a metric."""
    facts = METRICS[metric].facts
    given: dict[str, Any] = {
        "figure": facts.figure, "better": facts.better, "ideal": facts.ideal, "purpose": "bias", **changed,
    }  # fmt: skip
    return Measure(key, title, says=says, compute=compute, source=f"{facts.paper}, {facts.url}", **given)


def _tag_leakage(states: Tensor, tokens: TokenStates, **options: Any) -> dict[str, Any]:
    """Leakage of parts of speech; tags that are too rare to be in every fold are left out and named."""
    sentences_of_tag: dict[str, set[int]] = {}
    for tag, sentence in zip(tokens.tags, tokens.sentences, strict=True):
        sentences_of_tag.setdefault(tag, set()).add(sentence)
    rare = sorted(tag for tag, own in sentences_of_tag.items() if len(own) < 2 * _TOKEN_FOLDS)
    kept = [i for i, tag in enumerate(tokens.tags) if tag not in rare]
    if not kept:
        raise ValueError("No part of speech occurs in enough sentences: raise --limit.")
    tags, groups = [tokens.tags[i] for i in kept], [tokens.sentences[i] for i in kept]
    return {**linear_leakage.score(states[kept], tags, groups, folds=_TOKEN_FOLDS, **options), "rare": rare}


def leakage_by_depth(subject: Subject, concept: str, most_tokens: int = 1000) -> list[dict[str, Any]]:
    """Linear leakage of `"gender"`, or of `"pos"` at no more than `most_tokens`, at every layer, with intervals."""
    if concept == "gender":
        genders = subject.biographies.genders
        return [
            {"layer": layer, **linear_leakage.score(state, genders, **subject.statistics)}
            for layer, state in subject.states.items()
        ]
    tokens = subject.tokens
    step = max(1, math.ceil(len(tokens.tags) / most_tokens))
    fewer = TokenStates({}, tokens.tags[::step], tokens.sentences[::step])
    return [
        {"layer": layer, **_tag_leakage(state[::step], fewer, **subject.statistics)}
        for layer, state in tokens.layers.items()
    ]


def _probes(key: str, title: str, compute: Callable[..., dict[str, Any]], says: str, **changed: Any) -> list[Measure]:
    """A linear probe of a concept, and nonlinear ones; the kernel is for texts only, as it reads all pairs of rows."""
    kinds = {
        "linear": ("linear", says),
        "mlp": ("MLP", "the same with a multilayer perceptron: what is not linearly readable may still be readable"),
        "rbf": ("RBF-SVM", "the same with a support vector machine and a radial basis function"),
    }
    return [
        _metric_measure("linear_leakage", f"{key}_{kind}", f"{title}, {name} probe − majority",
                        partial(compute, probe=kind), sentence, **changed)
        for kind, (name, sentence) in kinds.items() if kind != "rbf" or key == "gender"
    ]  # fmt: skip


def _benchmark(subject: Subject, run: Callable[..., dict[str, Any]], source: Path, **options: Any) -> dict[str, Any]:
    return run(subject.model, subject.tokenizer, source, limit=subject.data.limit, **options, **subject.statistics)


def _language_bias(bias_type: str, bias_types: Sequence[str] | None) -> list[Measure]:
    """StereoSet and CrowS-Pairs, for one kind of bias or for all."""

    def stereoset(subject: Subject) -> dict[str, Any]:
        path, convention = subject.data.file("stereoset"), subject.plan.stereoset
        return _benchmark(subject, benchmarks.stereoset, path, bias_types=bias_types, convention=convention)

    name, suffix = f" ({bias_type or 'all kinds'})", f"_{bias_type}" if bias_type else ""
    return [
        _metric_measure(
            "crows_pairs", f"crows_pairs{suffix}", f"CrowS-Pairs{name}, % stereotype",
            lambda subject: _benchmark(
                subject, benchmarks.crows_pairs, subject.data.file("crows-pairs"), bias_types=bias_types
            ),
            "share of pairs in which the stereotype is likelier; 50 is ideal", needs_head=True,
        ),
        _metric_measure(
            "stereoset", f"stereoset_ss{suffix}", f"StereoSet SS{name}, % stereotype", stereoset,
            "share of terms for which the stereotype is likelier than the anti-stereotype; 50 is ideal. A masked model "
            "is asked for the word in the blank, a causal one for the whole sentence (the JSON names the convention)",
            needs_head=True, figure="ss", better="closer", ideal=50.0,
        ),
        _metric_measure(
            "stereoset", f"stereoset_lms{suffix}", f"StereoSet LMS{name}", stereoset,
            "share of items in which a meaningful word is likelier than an unrelated one", needs_head=True,
            figure="lms", purpose="capability",
        ),
    ]  # fmt: skip


def _seat_mean(key: str, title: str, tests: Sequence[str] | None) -> Measure:
    def compute(subject: Subject) -> dict[str, Any]:
        folder = subject.data.part("seat")
        # Without any of them all are asked for, and the error names one.
        chosen = [name for name in tests or () if any(folder.glob(f"{name}.json*"))] or tests
        return benchmarks.seat(
            subject.model, subject.tokenizer, folder, tests=chosen, pool=subject.pool, **subject.statistics
        )

    return _metric_measure(
        "weat", key, title, compute,
        "mean over the tests of |effect size|; each test with its permutation p value is in the JSON",
        figure="mean_absolute_effect_size", better="lower", pool="mean",
    )  # fmt: skip


_GENDER = [
    *_probes(
        "gender", "Gender",
        lambda subject, **options: linear_leakage.score(
            subject.states[FINAL], subject.biographies.genders, **options, **subject.statistics
        ),
        "accuracy of a cross-validated logistic regression on the last hidden states of biographies, minus the "
        "share of the larger gender", pool="mean",
    ),
    _metric_measure(
        "minimum_description_length", "gender_mdl", "Gender, MDL compression",
        lambda subject: minimum_description_length.score(
            subject.states[FINAL], subject.biographies.genders, **subject.statistics
        ),
        "how much shorter the online code of the gender is than a uniform one; 1 is not shorter", pool="mean",
    ),
    _metric_measure(
        "tpr_gap", "tpr_gap", "TPR gap of profession (RMS)",
        lambda subject: tpr_gap.score(
            subject.professions, subject.biographies.professions, subject.biographies.genders, **subject.statistics
        ),
        "root mean square over professions of the difference in true positive rate between the genders, of a "
        "linear probe fitted on the same states", pool="mean",
    ),
    _seat_mean("seat_gender", "SEAT gender, mean |d|", GENDER_SEAT),
    _metric_measure(
        "pronoun_gap", "winobias", "WinoBias pronoun gap",
        lambda subject: _benchmark(subject, benchmarks.winobias, subject.data.part("winobias")),
        "how much more often the pronoun of the occupation's stereotype is likelier", needs_head=True,
    ),
    *_language_bias("gender", ["gender"]),
]  # fmt: skip
_POS = _probes(
    "pos", "Part of speech",
    lambda subject, **options: _tag_leakage(
        subject.tokens.layers[FINAL], subject.tokens, **options, **subject.statistics
    ),
    "accuracy of a cross-validated logistic regression on the last hidden states of tokens, sentences never "
    "split, minus the share of the most frequent tag",
)  # fmt: skip
_STEREOTYPES = [_seat_mean("seat_all", "SEAT all, mean |d|", None), *_language_bias("", None)]
# Suite → the concept that it is about, and its measures; capability is measured in all.
_CONCEPTS = {"gender": (GENDER, _GENDER), "pos": (POS, _POS), "stereotypes": (STEREOTYPES, _STEREOTYPES)}
SUITES = (*_CONCEPTS, "all")


def _perplexity(subject: Subject, name: str) -> dict[str, Any]:
    chosen, longest = subject.data.paragraphs(name), subject.longest
    if subject.head == "masked":
        # A masked model reads a row for each token: use few texts and short windows.
        chosen, longest = spread(chosen, _PSEUDO_TEXTS), min(longest, _PSEUDO_WINDOW)
    return benchmarks.text_perplexity(
        subject.model, subject.tokenizer, chosen, max_length=longest, batch_size=_PERPLEXITY_ROWS, **subject.statistics
    )


def _distortion(subject: Subject) -> dict[str, Any]:
    texts = [text for part in subject.data.texts().values() for text in spread(part, _DISTORTION_TEXTS)]
    now, before = subject.final_states(texts), subject.base_states
    if subject.is_base:
        before[:] = now
    if not before:
        raise ValueError("distortion is relative to the base's states, which could not be read")
    mean = torch.cat(before).double().mean(0)
    pairs = list(zip(before, now, strict=True))
    moved = np.array([float((b.double() - a.double()).square().sum()) for a, b in pairs])
    varied = np.array([float((a.double() - mean).square().sum()) for a, _ in pairs])

    def figures(index: Any) -> dict[str, float]:
        return {"distortion": float(np.sqrt(moved[index].sum() / varied[index].sum()))}

    found = resampling.bootstrap(figures, len(pairs), **subject.statistics)
    return {**found, "texts": len(pairs), "tokens": sum(len(state) for state in now)}


def measures_of(suite: str, data: DataFolder, pools: Sequence[str] = ("mean",)) -> list[Measure]:
    """The measures of a suite, capability at the end; a measure of pooled states is there once for each pool.

    Its title names the pool, and its key too except for the first pool. Perplexity is there for each kind of text that
    the folder has.
    """
    if suite not in SUITES:
        raise ValueError(f"--suite {suite}: write one of {', '.join(SUITES)}.")
    of_suite = [own for name, own in _CONCEPTS.items() if suite in (name, "all")]
    chosen = [replace(measure, concept=concept) for concept, measures in of_suite for measure in measures]
    kinds = [name for name in ("wikitext-2", "tinystories-sample") if (data.path / name).is_dir()] or ["wikitext-2"]
    capability = [
        *(
            _metric_measure(
                "perplexity", f"perplexity_{name}", f"Perplexity, {name}", partial(_perplexity, name=name),
                "exp of the mean loss of a token; of a masked model, of its pseudo-likelihood",
                purpose="capability", needs_head=True, figure="perplexity", ideal=1.0,
            )
            for name in kinds
        ),
        Measure(
            "profession", "Profession, linear probe", "capability", "accuracy", "higher", 1.0,
            "accuracy of a cross-validated logistic regression on the same states of biographies",
            lambda subject: linear_leakage.accuracy(
                subject.professions, subject.biographies.professions, **subject.statistics
            ),
            pool="mean",
        ),
        Measure(
            "distortion", "Distortion of the last hidden state", "capability", "distortion", "lower", 0.0,
            "sqrt(E|x′ − x|² / E|x − E x|²) over the tokens of running text, x′ with the adapter", _distortion,
        ),
    ]  # fmt: skip
    found = []
    for measure in [*chosen, *capability]:
        if measure.pool is None:
            found.append(measure)
            continue
        for pool in pools:
            key = measure.key if pool == pools[0] else f"{measure.key}_{pool}"
            found.append(replace(measure, key=key, title=f"{measure.title}, {IN_WORDS[pool]}", pool=pool))
    return found
