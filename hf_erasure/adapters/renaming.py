"""Keys of an adapter's file, which transformers renames as if they were those of an old checkpoint.

When it loads the checkpoint of some model types it renames keys by patterns, and the same patterns match keys of ours:
of DINOv3 `lambda1` at the end, of CLIP's relatives whole prefixes. A key of ours is the name of a module as it is in
the model, so that no renaming is ever due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.core_model_loading import WeightRenaming

from .base_config import ChildConfig

# Where a model notes how its checkpoint was converted.
_NOTE = "_weight_conversions"


def weight_mapping(
    original: Callable[..., Any], weight_conversions: Any, adapter_name: str, peft_config: Any = None
) -> Any:
    """What `load_adapter` does to the keys of a file: PEFT's prefix goes, and the adapter's name comes."""
    if not isinstance(peft_config, ChildConfig):
        return original(weight_conversions, adapter_name, peft_config=peft_config)
    kind = str(peft_config.peft_type).rpartition(".")[2].lower()
    return [
        WeightRenaming(r"^base_model\.model\.(.+)", r"\1"),
        WeightRenaming(rf"(\.{kind}\.{kind}_[^.]+)$", rf"\1.{adapter_name}"),
    ]


@contextmanager
def conversions_kept(model: Any, name: str) -> Iterator[None]:
    """Keep the model's note of how its checkpoint was converted, by which it is saved, while an adapter is loaded.

    transformers puts what the adapter's keys went through in its place, and all keys of the model would have PEFT's
    prefix when it is saved without the adapter.
    """
    noted = model.__dict__.get(_NOTE, _NOTE)
    yield
    if isinstance(model.peft_config.get(name), ChildConfig):
        if noted is _NOTE:
            model.__dict__.pop(_NOTE, None)
        else:
            setattr(model, _NOTE, noted)
