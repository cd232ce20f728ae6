"""One small, valid input for every metric, and the arguments of its `score`."""

from __future__ import annotations

from typing import Any

import numpy as np

QUICK = {"resamples": 50}


def inputs(name: str) -> dict[str, Any]:
    """Keyword arguments of `compute`, as lists."""
    rng = np.random.default_rng(5)
    y = [str(label) for label in np.repeat(["female", "male"], 20)]
    x = rng.normal(size=(40, 6)) + 0.8 * np.repeat([[1.0], [-1.0]], 20, axis=0)
    made: dict[str, dict[str, Any]] = {
        "linear_leakage": {"predictions": x.tolist(), "references": y},
        "minimum_description_length": {"predictions": x.tolist(), "references": y},
        "tpr_gap": {
            "predictions": ["nurse", "surgeon", "surgeon", "nurse"] * 10,
            "references": ["nurse", "nurse", "surgeon", "surgeon"] * 10,
            "groups": ["f", "m", "m", "f", "f", "f", "f", "m"] * 5,
        },
        "weat": {"predictions": x.tolist(), "references": ["X"] * 10 + ["A"] * 10 + ["Y"] * 10 + ["B"] * 10},
        "stereoset": {"predictions": rng.normal(size=(12, 3)).tolist(), "references": ["poet", "nurse", "chess"] * 4},
        "crows_pairs": {"predictions": rng.normal(size=(12, 2)).tolist(), "references": ["stereo", "antistereo"] * 6},
        "pronoun_gap": {"predictions": rng.normal(size=(12, 2)).tolist(), "references": ["male", "female"] * 6},
        "prediction_balance": {"predictions": (rng.random((12, 2)) / 2).tolist()},
        "encoder_correlation": {"predictions": rng.normal(size=12).tolist(), "references": [1, -1, 0] * 4},
        "perplexity": {"predictions": [30.0, 21.5, 44.0], "tokens": [10, 8, 12], "bytes": [40, 35, 50]},
    }
    return made[name]
