"""What models are called on the Hub, and what they are for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.models.auto import modeling_auto

# The Auto class that loads a model, the Hub's name of its task, and where transformers lists the classes. What an
# encoder-decoder does in general has no name there any longer.
_TASKS: tuple[tuple[str, str | None, str], ...] = (
    ("AutoModelForCausalLM", "text-generation", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForMaskedLM", "fill-mask", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("AutoModelForSequenceClassification", "text-classification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForTokenClassification", "token-classification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForQuestionAnswering", "question-answering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    ("AutoModelForSeq2SeqLM", None, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForImageClassification", "image-classification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModel", "image-feature-extraction", "MODEL_FOR_IMAGE_MAPPING_NAMES"),
    ("AutoModel", "feature-extraction", "MODEL_MAPPING_NAMES"),
)


@dataclass(frozen=True)
class Head:
    """How a class of transformers is loaded, and its task as the Hub calls it, if it does."""

    auto_class: str
    pipeline_tag: str | None


@functools.cache
def head_of(class_name: str | None) -> Head | None:
    """What is known of a model's class; None for one that transformers does not list."""
    for auto_class, task, mapping in _TASKS:
        listed: Any = getattr(modeling_auto, mapping, {})
        names = {n for value in listed.values() for n in ([value] if isinstance(value, str) else value)}
        if class_name in names:
            return Head(auto_class, task)
    return None


def hub_id(name: Any) -> str | None:
    """A name where it can be that of a repository on the Hub, and is none of a folder; else None."""
    if not isinstance(name, str) or name.count("/") > 1:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name
