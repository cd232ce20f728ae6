"""What the head of a model predicts: one table of transformers' classes, how each is loaded, and its task."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.models.auto import modeling_auto

from .model import bare_model, is_encoder_decoder

Task = Literal["masked", "causal", "seq2seq", "classification"]


@dataclass(frozen=True)
class Head:
    """One kind of head.

    Attributes:
        auto_class: The Auto class that loads it.
        pipeline_tag: Its task as the Hub calls it; what an encoder-decoder does in general has no name there.
        mapping: The table in which transformers lists its classes.
        task: What GRADIEND calls its task; None where it can use no such head.
        endings: How names of classes end that transformers does not list.
    """

    auto_class: str
    pipeline_tag: str | None
    mapping: str
    task: Task | None = None
    endings: tuple[str, ...] = ()

    @functools.cached_property
    def listed(self) -> frozenset[str]:
        """The classes that transformers lists."""
        listed: Any = getattr(modeling_auto, self.mapping, {})
        return frozenset(n for value in listed.values() for n in ([value] if isinstance(value, str) else value))


# Names of heads that sit in a model's own class, where it has no part without them.
HEAD_MODULES = ("classifier", "score", "qa_outputs", "lm_head", "classification_head")
HEADS = (
    Head(
        "AutoModelForSequenceClassification", "text-classification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "classification", ("ForSequenceClassification",),
    ),
    Head(
        "AutoModelForCausalLM", "text-generation", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "causal", ("ForCausalLM", "LMHeadModel"),
    ),
    Head("AutoModelForMaskedLM", "fill-mask", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "masked", ("ForMaskedLM",)),
    Head("AutoModelForTokenClassification", "token-classification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    Head("AutoModelForQuestionAnswering", "question-answering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    Head(
        "AutoModelForSeq2SeqLM", None, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "seq2seq", ("ForConditionalGeneration",),
    ),
    Head("AutoModelForImageClassification", "image-classification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    Head("AutoModel", "image-feature-extraction", "MODEL_FOR_IMAGE_MAPPING_NAMES"),
    Head("AutoModel", "feature-extraction", "MODEL_MAPPING_NAMES"),
)  # fmt: skip
# A class that transformers lists → its head, the first of the table that has it.
HEAD_OF: dict[Any, Head] = {name: head for head in reversed(HEADS) for name in head.listed}


def task_named(names: Iterable[str], *, encoder_decoder: bool) -> Task | None:
    """The task of a class by its name and those of its bases; None where they have no head that GRADIEND can use."""
    names = list(names)
    for head in HEADS:
        fits = head.task == "classification" or (head.task == "seq2seq") == encoder_decoder
        if head.task and fits and any(name in head.listed or name.endswith(head.endings) for name in names):
            return head.task
    return None


def known_task(model: nn.Module) -> Task | None:
    """What a model's head predicts, bare or wrapped; None where that is neither words nor labels of whole texts."""
    base = bare_model(model)
    return task_named((kind.__name__ for kind in type(base).__mro__), encoder_decoder=is_encoder_decoder(base))


def task_of(model: nn.Module) -> Task:
    """What a model's head predicts: ``masked``, ``causal``, ``seq2seq`` or ``classification``.

    Args:
        model: A bare model, or whatever it is inside of.

    Raises:
        ValueError: It has no head that GRADIEND can use.
    """
    base, task = bare_model(model), known_task(model)
    if task is None:
        raise ValueError(
            f"{type(base).__name__} has no head that predicts words or labels; load the model with "
            "AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForSeq2SeqLM or AutoModelForSequenceClassification"
        )
    if task == "classification":
        kind, labels = getattr(base.config, "problem_type", None), getattr(base.config, "num_labels", 2)
        if labels < 2 or kind in ("regression", "multi_label_classification"):
            raise ValueError(
                f"{type(base).__name__} has {labels} label(s) and problem_type {kind!r}; GRADIEND needs a classifier "
                "that chooses one of two labels or more"
            )
    return task
