"""Perplexity and bits per byte (Jelinek et al. 1977; Gao et al. 2020, arXiv 2101.00027, section 3.1).

`perplexity = exp(Σ nll / Σ tokens)` depends on the tokenizer; `bits per byte = Σ nll / (ln 2 · Σ bytes)` does not. The
bytes are those of the scored text in UTF-8: a token that is not scored, such as the first one of a causal model without
a start token, takes its bytes with it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from datasets import Features, Value

# `evaluate.load` runs a copy of this file from another folder: absolute imports, and no metric class by name.
from hf_erasure.metrics import base, checks, resampling


def score(
    losses: Any,
    tokens: Any,
    bytes: Any,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Perplexity and bits per byte of segments of text.

    Args:
        losses: `(segments,)` Summed negative log-likelihood of each segment's tokens in nats.
        tokens: `(segments,)` How many tokens that are.
        bytes: `(segments,)` How many bytes their text has in UTF-8.
        confidence: Of the intervals.
        resamples: Of the bootstrap over segments.
        seed: Of the resamples.

    Returns:
        `perplexity` of at least 1, `bits_per_byte`, `loss` in nats a token, `tokens`, `bytes`, `segments`, and
        `intervals`; with fewer than two segments there is nothing to draw from and `intervals` is empty.

    Raises:
        ValueError: If a loss is negative, there are no tokens or no bytes, or the input is malformed.
    """
    nll = checks.numbers("predictions", losses, dims=1)
    counts = {name: checks.numbers(name, part, dims=1) for name, part in (("tokens", tokens), ("bytes", bytes))}
    for name, part in counts.items():
        if len(part) != len(nll):
            raise ValueError(f"{len(part)} {name}, but {len(nll)} predictions: give one for each.")
        if part.min() < 0 or part.sum() == 0:
            raise ValueError(f"{name} are {'negative somewhere' if part.min() < 0 else 'all 0'}: give counts.")
    if nll.min() < 0:
        raise ValueError("predictions hold a negative number: give negative log-likelihoods, which are at least 0.")

    def figures(index: checks.Ints) -> dict[str, float]:
        total = nll[index].sum()
        spelt, written = counts["tokens"][index].sum(), counts["bytes"][index].sum()
        loss = total / spelt if spelt else math.nan
        bits = total / (math.log(2) * written) if written else math.nan
        return {"perplexity": float(np.exp(loss)), "bits_per_byte": bits, "loss": loss}

    found = {name: float(value) for name, value in figures(np.arange(len(nll))).items()}
    intervals = resampling.Intervals({})
    if len(nll) > 1:
        intervals = resampling.bootstrap(figures, len(nll), resamples=resamples, confidence=confidence, seed=seed)
    sizes = {name: int(part.sum()) for name, part in counts.items()}
    return {**found, **sizes, "segments": len(nll), **intervals.as_dict()}


class Perplexity(base.Measure):
    """`score` as an `evaluate` metric."""

    facts = base.Facts(
        title="Perplexity and bits per byte",
        figure="bits_per_byte",
        paper="Jelinek et al. 1977; Gao et al. 2020",
        url="https://arxiv.org/abs/2101.00027",
        formula="Σ nll / (ln 2 · UTF-8 bytes of the scored text); perplexity = exp(Σ nll / tokens)",
        better="lower",
        bounds=(0.0, float("inf")),
        ideal=0.0,
        interval="bootstrap over segments",
        harness="wikitext",
    )
    inputs = Features({"predictions": Value("float64"), "tokens": Value("int64"), "bytes": Value("int64")})
    usage = (
        "predictions: summed negative log-likelihood of each segment in nats; tokens, bytes: its sizes; "
        "confidence=, resamples=, seed="
    )

    def _compute(self, predictions: Any, tokens: Any, bytes: Any, **options: Any) -> dict[str, Any]:
        return score(predictions, tokens, bytes, **options)
