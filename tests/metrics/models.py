"""The small trained models on which the metrics are tested."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

_FOLDERS = {"masked": ("story-mlm", AutoModelForMaskedLM), "causal": ("stories260k", AutoModelForCausalLM)}


@functools.cache
def trained(assets: Path, task: str) -> tuple[Any, Any]:
    """A model and its tokenizer, shared by tests that do not change them."""
    return fresh(assets, task)


def fresh(assets: Path, task: str) -> tuple[Any, Any]:
    """A model and its tokenizer, for one test alone."""
    name, kind = _FOLDERS[task]
    folder = assets / "models" / name
    return kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
