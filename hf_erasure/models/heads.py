"""What the head of a model predicts: one table of transformers' classes, how each is loaded, and its task."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.models.auto import modeling_auto

from .dummy import text_inputs
from .model import Runner, bare_model, evaluating, forked_rng, is_encoder_decoder

Task = Literal["masked", "causal", "seq2seq", "classification"]
# Share of the largest logit. If a model reads forwards, the logits before a changed token differ by rounding alone:
# experts and scans may sum in another order. With attention both ways, small untrained models differ by 1e-3 or so.
_ROUNDING = 1e-4
# The same for weights of 8 bits, where the scale of an activation depends on the rest of the batch.
_QUANTISED = 0.05


@dataclass(frozen=True)
class Head:
    """One kind of head."""

    auto_class: str  # The Auto class that loads it.
    pipeline_tag: str | None  # Its task on the Hub; None for encoder-decoders, whose task has no single name.
    mapping: str  # The table in which transformers lists its classes.
    task: Task | None = None  # Its task as GRADIEND names it; None if GRADIEND cannot use the head.
    endings: tuple[str, ...] = ()  # The endings of the names of classes that transformers does not list.

    @functools.cached_property
    def listed(self) -> frozenset[str]:
        """The classes that transformers lists."""
        listed: Any = getattr(modeling_auto, self.mapping, {})
        return frozenset(n for value in listed.values() for n in ([value] if isinstance(value, str) else value))


# Names of the heads of models that have no base model without the head.
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
    # Language models with a tower for images or sounds: texts alone go through the language model.
    Head(
        "AutoModelForImageTextToText", "image-text-to-text", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "causal",
    ),
    Head("AutoModelForMultimodalLM", "any-to-any", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "causal"),
    Head("AutoModelForImageClassification", "image-classification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    Head("AutoModel", "image-feature-extraction", "MODEL_FOR_IMAGE_MAPPING_NAMES"),
    Head("AutoModel", "feature-extraction", "MODEL_MAPPING_NAMES"),
)  # fmt: skip
# The name of a class that transformers lists → its head: the first of the table that lists the class.
HEAD_OF: dict[Any, Head] = {name: head for head in reversed(HEADS) for name in head.listed}


def head_named(names: Iterable[str], *, encoder_decoder: bool) -> Head | None:
    """The head of a class, by the names of the class and its bases; None if GRADIEND can use no head of theirs."""
    names = list(names)
    usable = [h for h in HEADS if h.task == "classification" or (h.task and (h.task == "seq2seq") == encoder_decoder)]
    listed = (head for head in usable if not head.listed.isdisjoint(names))
    named_so = (head for head in usable if any(name.endswith(head.endings) for name in names))
    return next(listed, None) or next(named_so, None)


def known_task(model: nn.Module) -> Task | None:
    """The task of the head of a bare or wrapped model; None if it predicts neither words nor labels of whole texts."""
    base = bare_model(model)
    names = [kind.__name__ for kind in type(base).__mro__]
    head = head_named(names, encoder_decoder=is_encoder_decoder(base))
    # XLM has one class for causal and masked models; its configuration says which of them a model is.
    if head is not None and head.task == "causal" and getattr(getattr(base, "config", None), "causal", 1) is False:
        head = next((other for other in HEADS if other.task == "masked" and not other.listed.isdisjoint(names)), head)
    return None if head is None else head.task


def task_of(model: nn.Module) -> Task:
    """What a model's head predicts: ``masked``, ``causal``, ``seq2seq`` or ``classification``.

    Args:
        model: A bare model, or a wrapper around one.

    Raises:
        ValueError: The model has no head that GRADIEND can use.
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


def check_next_word(model: nn.Module) -> None:
    """Check that a model's logits at a token do not depend on later tokens, so that they predict the next token.

    A causal head may follow attention that goes both ways (XLNet, BERT without `is_decoder`, PaliGemma): it has then
    seen the token that it predicts. Two forward passes over a short text show this; a sharded or meta model is not run.

    Raises:
        ValueError: If the logits depend on later tokens, or the model does not accept a text alone.
    """
    base, runner = bare_model(model), Runner(model)
    if runner.is_sharded or any(parameter.device.type == "meta" for parameter in base.parameters()):
        return
    batch = text_inputs(base, torch.Generator().manual_seed(0))
    other = batch["input_ids"].clone()  # with another last token, taken from the same text
    other[:, -1] = torch.where(other[:, 0] == other[:, -1], other[:, 1], other[:, 0])
    texts = (batch, batch | {"input_ids": other})
    try:
        with evaluating(base), forked_rng(base):
            before, after = (runner(text, base) for text in texts)
    except Exception as error:
        raise ValueError(
            f"{type(base).__name__} does not accept a text alone, so its words cannot be predicted: {error}"
        ) from error
    left, right = (output["logits"] if hasattr(output, "keys") else output[0] for output in (before, after))
    rounding = max(_ROUNDING, 8 * torch.finfo(left.dtype).eps)
    if not all(parameter.is_floating_point() for parameter in base.parameters()):
        rounding = _QUANTISED
    if float((left - right)[:, :-1].abs().max()) > rounding * float(left.abs().max()):
        raise ValueError(
            f"The logits of {type(base).__name__} at a token depend on the tokens after it, so that they do not "
            "predict the next one. Take a model that reads forwards (a BERT with is_decoder=True), or a masked one."
        )
