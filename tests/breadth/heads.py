"""Count the causal language models into which an erasure can be merged: `python -m tests.breadth.heads [TYPE…]`.

Each model is built small with its head, fitted in one pass, merged with `untie=True`, compared and unmerged. The models
that do not merge are printed with the reason, and a table at the end.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from tests.breadth import zoo
from tests.breadth.erasure import Erasure
from tests.breadth.outcomes import WrongError

TARGETS = {"nothing: norms": None, '`"readers"`': "readers", '`"writers"`': "writers"}
# The most seconds of processor time for one model.
_MOST = 90


def merged(model_type: str) -> dict[str, str | None]:
    """Targets → None if they merge, or the reason why they do not."""
    found: dict[str, str | None] = {}
    with zoo.at_most(_MOST), tempfile.TemporaryDirectory() as folder:
        model = Erasure(zoo.build(model_type, AutoModelForCausalLM), Path(folder))
        for targets, word in TARGETS.items():
            try:
                model.merge(word)
                found[targets] = None
            except WrongError as error:
                found[targets] = f"WRONG: {error}"
            except ValueError as error:
                found[targets] = str(error)
    return found


def main() -> None:
    """Print the models that do not merge, and how many do."""
    warnings.simplefilter("ignore")
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    every: list[dict[str, str | None]] = []
    for model_type in sys.argv[1:] or [name for name in zoo.TYPES if name in causal]:
        try:
            every.append(merged(model_type))
        except (zoo.NotBuiltError, zoo.TooLongError, TypeError, RuntimeError) as error:
            print(f"{model_type}: not tried: {type(error).__name__}: {error}"[:200], flush=True)
            continue
        for targets, reason in every[-1].items():
            if reason is not None:
                print(f"{model_type}: {targets}: {reason}"[:200], flush=True)
    print("| `target_modules` | merges | of |\n| --- | ---: | ---: |")
    for targets in TARGETS:
        print(f"| {targets} | {sum(found[targets] is None for found in every)} | {len(every)} |")


if __name__ == "__main__":
    main()
