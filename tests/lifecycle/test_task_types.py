"""Every task type of PEFT: its class, its head that is trained and saved, and the model after a failure."""

from __future__ import annotations

import copy
import functools
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

from tests.lifecycle.verbs import KINDS, OF, OURS, children, weights
from tests.small_models import outputs_of, roughen, same, small_batch, small_model

# Task → the small model, the class, its heads, and modules to act on.
TASKS: dict[str, tuple[str, Any, list[str], list[str]]] = {
    "SEQ_CLS": ("bert", hf.BertForSequenceClassification, ["classifier"], ["query"]),
    "TOKEN_CLS": ("bert", hf.BertForTokenClassification, ["classifier"], ["query"]),
    "QUESTION_ANS": ("bert", hf.BertForQuestionAnswering, ["qa_outputs"], ["query"]),
    "FEATURE_EXTRACTION": ("bert", hf.BertModel, [], ["query"]),
    "CAUSAL_LM": ("llama", hf.LlamaForCausalLM, [], ["q_proj"]),
    "SEQ_2_SEQ_LM": ("t5", hf.T5ForConditionalGeneration, [], ["q"]),
}
WITH_HEADS = [task for task, (_, _, heads, _) in TASKS.items() if heads]


@functools.cache
def _built(task: str) -> PreTrainedModel:
    architecture, kind, _, _ = TASKS[task]
    return roughen(kind(small_model(architecture).config), torch.Generator().manual_seed(0)).eval()


def base(task: str) -> PreTrainedModel:
    return copy.deepcopy(_built(task))


def trained(kind: str, task: str, **fields: Any) -> peft.PeftModel:
    """A `PeftModel` with an adapter that acts, and with a trained head if the task has one."""
    architecture, _, _, targets = TASKS[task]
    config = OF[kind].config(**{"task_type": task, "target_modules": targets, **fields})
    model = peft.get_peft_model(base(task), config, "a")
    OF[kind].fit(model, architecture, "a", 0)
    train(model)
    return model.eval()


def train(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.5)


def heads(model: nn.Module) -> list[str]:
    found = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    return list(dict.fromkeys(name.partition(".modules_to_save.")[0].rpartition(".")[2] for name in found))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_saved_and_loaded_with_the_trained_head(task: str, kind: str, tmp_path):
    batch = small_batch(TASKS[task][0], seed=7)
    model = trained(kind, task)
    assert type(model) is peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] and heads(model) == TASKS[task][2]
    expected = outputs_of(model, batch)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(task), str(tmp_path / "a"), "other")
    assert type(again) is type(model) and same(outputs_of(again, batch), expected)
    again.load_adapter(str(tmp_path / "a"), "third")
    again.set_adapter("third")
    assert same(outputs_of(again, batch), expected)
    again.save_pretrained(tmp_path / "again")
    names = peft.PeftConfig.from_pretrained(str(tmp_path / "again" / "third")).modules_to_save
    assert kind == "LoRA" or names is None or len(names) == len(set(names))


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("task", WITH_HEADS)
def test_an_adapter_that_was_saved_without_a_head_goes_with_the_models_own(task: str, kind: str, tmp_path):
    """`model.add_adapter` makes such an adapter; for a LoRA, PEFT raises a KeyError."""
    architecture, _, _, targets = TASKS[task]
    model, batch = base(task), small_batch(TASKS[task][0], seed=7)
    OF[kind].add(model, architecture, "a", task_type=task, target_modules=targets)
    expected = outputs_of(model, batch)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(task), str(tmp_path))
    assert same(outputs_of(again, batch), expected)
    train(again)
    assert not same(outputs_of(again, batch), expected)
    again.load_adapter(str(tmp_path), "default")
    assert same(outputs_of(again, batch), expected)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("task", WITH_HEADS)
def test_no_adapter_is_put_on_a_head_that_is_copied(task: str, kind: str):
    model = peft.get_peft_model(base(task), OF[kind].config(task_type=task, target_modules="all-linear"))
    assert children(model) and not any(head in path for path in children(model) for head in TASKS[task][2])
    model = base(task)
    with pytest.raises(ValueError, match=r"modules_to_save|matches no module|All modules were excluded"):
        peft.get_peft_model(model, OF[kind].config(task_type=task, target_modules=TASKS[task][2]))
    assert not children(model) and not hasattr(model, "peft_config")


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("task", [*WITH_HEADS, "CAUSAL_LM"])
def test_what_fails_leaves_the_model_as_it_was(task: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    model = base(task).train()
    model.base_model.requires_grad_(False).eval()
    model.gradient_checkpointing_enable()  # its preparation is what fails below
    modules, before = list(model.named_modules()), weights(model)
    states = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("after the adapter was attached")

    monkeypatch.setattr(peft.peft_model.PeftModel, "prepare_model_for_gradient_checkpointing", broken)
    with pytest.raises(RuntimeError, match="after the adapter was attached"):
        peft.get_peft_model(model, OF[kind].config(task_type=task, target_modules=TASKS[task][3]))
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == states
    assert weights(model).keys() == before.keys() and not hasattr(model, "peft_config")
