"""The names and contents of what is pushed and pulled. This module does not import hf-erasure."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import Tensor

from tests.hub.clients import OWNER
from tests.small_models import outputs_of, small_batch

KINDS = ("erasure", "gradiend")
BASE = f"{OWNER}/base"
NAME = "gender"
NOTE = "Ask me before you use it on poems."
# Pushes to one repository, one after the other; each is another fit.
FIRST, SECOND, BRANCH, PROPOSED = 1, 2, 3, 4


def base() -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(BASE).eval()


def logits(model: Any) -> Tensor:
    return outputs_of(model.eval(), small_batch("llama", seed=7))["logits"]
