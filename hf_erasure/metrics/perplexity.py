"""Perplexity and bits per byte (Jelinek et al. 1977; Gao et al. 2020, arXiv 2101.00027, section 3.1).

`perplexity = exp(Σ nll / Σ tokens)` depends on the tokenizer; `bits per byte = Σ nll / (ln 2 · Σ bytes)` does not. The
bytes are those of the scored text in UTF-8: the bytes of a token that is not scored, such as the first token of a
causal model without a start token, do not count.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from datasets import Features, Value

from hf_erasure.metrics import base, resampling


def score(losses: Any, tokens: Any, bytes: Any, **drawing: Any) -> dict[str, Any]:
    """Perplexity and bits per byte of segments of text.

    Args:
        losses: `(segments,)` Summed negative log-likelihood of each segment's tokens in nats.
        tokens: `(segments,)` The number of these tokens.
        bytes: `(segments,)` The number of bytes of their text in UTF-8.
        **drawing: `confidence`, `resamples` and `seed` of the bootstrap over segments.

    Returns:
        `perplexity` of at least 1, `bits_per_byte`, `loss` in nats per token, `tokens`, `bytes`, `segments`, and
        `intervals`, which is empty with fewer than two segments.

    Raises:
        ValueError: If a loss is negative, there are no tokens or no bytes, or the input is malformed.
    """
    nll = base.numbers("predictions", losses, dims=1)
    counts = {name: base.numbers(name, part, dims=1) for name, part in (("tokens", tokens), ("bytes", bytes))}
    for name, part in counts.items():
        if len(part) != len(nll):
            raise ValueError(f"{len(part)} {name}, but {len(nll)} predictions: give one for each.")
        if part.min() < 0 or part.sum() == 0:
            raise ValueError(f"{name} are {'negative somewhere' if part.min() < 0 else 'all 0'}: give counts.")
    if nll.min() < 0:
        raise ValueError("predictions hold a negative number: give negative log-likelihoods, which are at least 0.")

    def figures(index: base.Ints) -> dict[str, float]:
        total = nll[index].sum()
        spelt, written = counts["tokens"][index].sum(), counts["bytes"][index].sum()
        loss = float(total / spelt) if spelt else math.nan
        bits = float(total / (math.log(2) * written)) if written else math.nan
        return {"perplexity": float(np.exp(loss)), "bits_per_byte": bits, "loss": loss}

    has_several = len(nll) > 1
    found = resampling.bootstrap(figures, len(nll), **drawing) if has_several else figures(np.arange(1))
    return {"intervals": {}, **found, **{name: int(part.sum()) for name, part in counts.items()}, "segments": len(nll)}


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
    score = staticmethod(score)
