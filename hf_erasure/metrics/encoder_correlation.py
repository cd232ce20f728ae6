"""How well a feature neuron reads a feature: correlation and balanced accuracy (arXiv 2502.01406, section 4).

The figures are those of `hf_erasure.fitting.gradiend.EncodedValues`; this metric adds intervals.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Features, Value

from hf_erasure.fitting.gradiend.gradients import encoded
from hf_erasure.metrics import base, resampling


def score(values: Any, labels: Any, **drawing: Any) -> dict[str, Any]:
    """Correlation and accuracy of encoded values.

    Args:
        values: `(texts,)` Values of the feature neuron.
        labels: `(texts,)` +1, −1, and 0 for neutral texts.
        **drawing: `confidence`, `resamples` and `seed` of the bootstrap over texts, within each label.

    Returns:
        `cor`, Pearson's correlation with the label, and `acc`, the balanced accuracy of the sign, both without neutral
        texts; with neutral texts, if there are any, `cor_enc`, and `acc_enc`, of three classes with limits at ±0.5. A
        correlation is NaN if the values do not vary. `texts`, `intervals`.

    Raises:
        ValueError: If +1 or −1 has no text, a label is another number, or the input is malformed.
    """
    found = base.numbers("predictions", values, dims=1)
    signs = np.array(base.labels("references", labels, len(found)))
    if not set(signs.tolist()) <= {-1, 0, 1} or not {-1, 1} <= set(signs.tolist()):
        raise ValueError(
            f"references hold {sorted(set(signs.tolist()))}: give texts of +1 and of −1, and 0 for neutral texts."
        )

    def figures(index: base.Ints) -> dict[str, float]:
        return encoded(found[index].tolist(), signs[index].astype(int).tolist(), ("+1", "-1")).metrics()

    measured = figures(np.arange(len(found)))
    # A figure that has no value for all texts has no interval either.
    defined = [name for name, value in measured.items() if np.isfinite(value)]
    drawn = resampling.bootstrap(
        lambda index: {name: value for name, value in figures(index).items() if name in defined},
        len(found), strata=signs.tolist(), **drawing,
    )  # fmt: skip
    return {**measured, "texts": len(found), **drawn}


class EncoderCorrelation(base.Measure):
    """`score` as an `evaluate` metric."""

    facts = base.Facts(
        title="Encoder correlation",
        figure="cor",
        paper="Drechsel & Herbold 2025",
        url="https://arxiv.org/abs/2502.01406",
        formula="Pearson correlation of encoded values with labels of ±1",
        better="higher",
        bounds=(-1.0, 1.0),
        ideal=1.0,
        interval="bootstrap over texts within each label",
    )
    inputs = Features({"predictions": Value("float64"), "references": Value("int64")})
    score = staticmethod(score)
