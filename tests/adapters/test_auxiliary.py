"""A head trained with one adapter stays on when another method's adapter is added, deleted, or fails to load."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hf_erasure.adapters.common.layer import adapter_children
from tests.lifecycle.verbs import OF, OURS
from tests.small_models import inputs_of, roughen, small_batch, small_model

pytestmark = pytest.mark.filterwarnings("ignore:(Already found a `peft_config`|Adding .* switched|.*was deleted)")
LORA = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
TOKENS = {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [5, 6, 30]}}
BATCH = small_batch("bert", seed=7)


@functools.cache
def _classifier() -> nn.Module:
    config = hf.BertConfig(**{**small_model("bert").config.to_dict(), "num_labels": 3})
    return roughen(hf.BertForSequenceClassification(config), torch.Generator().manual_seed(0)).eval()


def classifier() -> Any:
    return copy.deepcopy(_classifier())


def tuned(**fields: Any) -> Any:
    """The classifier with a LoRA whose copies of modules or of token rows were trained."""
    model = classifier()
    OF["LoRA"].add(model, "bert", "lora", **{**LORA, **fields})
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name or "trainable_tokens_delta" in name:
            with torch.no_grad():
                parameter.add_(0.5)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("folders"), {}
    for kind in OURS:
        for sticky in (False, True):
            model = classifier()
            OF[kind].add(model, "bert", "ours", target_modules=["key"], sticky=sticky)
            found[f"{kind} {sticky}"] = root / f"{kind} {sticky}"
            model.save_pretrained(found[f"{kind} {sticky}"])
    found["lora"] = root / "lora"
    tuned().save_pretrained(found["lora"])
    return found


def load_lora(model: Any, folder: Path) -> None:
    model.load_adapter(folder, adapter_name="lora")
    trained = dict(tuned().named_parameters())
    with torch.no_grad():  # older releases of transformers do not load the head
        for name, parameter in model.named_parameters():
            if ".modules_to_save.lora." in name:
                parameter.copy_(trained[name])


def head_that_acts(model: Any) -> str:
    """The name of the adapter whose head computes the logits, or "base"."""
    inputs = inputs_of(BATCH)
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        logits, pooled = base(**inputs).logits, base.bert(**inputs).pooler_output
        heads = {**base.classifier.modules_to_save, "base": base.classifier.original_module}
        (name,) = [name for name, head in heads.items() if torch.allclose(head(pooled), logits, atol=1e-5)]
    return name


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(BATCH)).logits


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("road", ["load", "add", "PeftModel of ours", "PeftModel of the LoRA", "get_peft_model"])
def test_the_trained_head_stays_on(road: str, kind: str, sticky: bool, folders: dict[str, Path]):
    ours = folders[f"{kind} {sticky}"]
    if road == "PeftModel of the LoRA":
        model = peft.PeftModel.from_pretrained(classifier(), folders["lora"], adapter_name="lora")
        model.get_base_model().load_adapter(ours, adapter_name="ours")
    else:
        model = classifier()
        load_lora(model, folders["lora"])
    if road == "load":
        model.load_adapter(ours, adapter_name="ours")
    elif road == "add":
        model.add_adapter(OF[kind].config(target_modules=["key"], sticky=sticky), "ours")
    elif road == "PeftModel of ours":
        model = peft.PeftModel.from_pretrained(model, ours, adapter_name="ours")
    elif road == "get_peft_model":
        model = peft.get_peft_model(model, OF[kind].config(target_modules=["key"]), "ours")
    assert head_that_acts(model.eval()) == "lora"
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if road in ("load", "add"):
        model.set_adapter(["lora", "ours"])
        assert head_that_acts(model) == "lora"
        model.disable_adapters()
        assert head_that_acts(model) == "base"
        model.enable_adapters()
        assert head_that_acts(model) == "lora"
        model.delete_adapter("ours")
        assert torch.equal(logits_of(model), logits_of(tuned()))


HEADS = {
    "TOKEN_CLS": (hf.BertForTokenClassification, "classifier"),
    "QUESTION_ANS": (hf.BertForQuestionAnswering, "qa_outputs"),
}


@pytest.mark.parametrize("copied", ["", "copied", "pickled"])
@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("kind", OURS)
def test_a_head_that_a_class_of_peft_adds_is_enabled_too(kind: str, task: str, copied: str):
    """PEFT adds that head after the LoRA, and `enable_adapters` of transformers does not enable trained modules."""
    cls, head = HEADS[task]
    base: Any = roughen(cls(small_model("bert").config), torch.Generator().manual_seed(0)).eval()
    OF[kind].add(base, "bert", "ours", target_modules=["key"])
    peft.get_peft_model(base, peft.LoraConfig(task_type=task, target_modules=["query"]), "lora")
    copies = {"": base, "copied": copy.deepcopy(base), "pickled": pickle.loads(pickle.dumps(base))}
    base = copies[copied]
    with torch.no_grad():
        base.get_submodule(head).modules_to_save["lora"].weight.add_(0.5)
    before = base(**BATCH)[0]
    base.disable_adapters()
    assert not torch.equal(base(**BATCH)[0], before)
    base.enable_adapters()
    assert torch.equal(base(**BATCH)[0], before)


@pytest.mark.parametrize("kind", OURS)
def test_it_does_whichever_came_last(kind: str, folders: dict[str, Path]):
    model = classifier()
    model.load_adapter(folders[f"{kind} False"], adapter_name="ours")
    load_lora(model, folders["lora"])
    assert head_that_acts(model) == "lora"
    # The reverse: our adapter has a head, and the LoRA does not.
    model = classifier()
    OF[kind].add(model, "bert", "ours", target_modules=["key"], modules_to_save=["classifier"])
    with torch.no_grad():
        model.classifier.modules_to_save["ours"].weight.add_(0.5)
    model.add_adapter(peft.LoraConfig(target_modules=["query"]), "lora")
    assert head_that_acts(model.eval()) == "ours"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["value"]), "more")
    assert head_that_acts(wrapped) == "ours"
    trained = [name for name, parameter in model.classifier.named_parameters() if parameter.requires_grad]
    wrapped.set_adapter("more")
    assert head_that_acts(wrapped) == "ours"
    assert trained == [name for name, parameter in model.classifier.named_parameters() if parameter.requires_grad]
    model.set_adapter(["lora", "more"])
    assert head_that_acts(wrapped) == "base"


@pytest.mark.parametrize("kind", OURS)
def test_a_class_of_peft_that_wants_a_head_starts_from_the_one_that_acts(kind: str, tmp_path: Path):
    model = classifier()
    OF[kind].add(model, "bert", "ours", target_modules=["key"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    for road in ("from_pretrained", "get_peft_model"):
        model = tuned()
        trained = copy.deepcopy(model.classifier.modules_to_save["lora"])
        if road == "from_pretrained":
            model = peft.PeftModel.from_pretrained(model, tmp_path, adapter_name="ours")
        else:
            model = peft.get_peft_model(model, OF[kind].config(target_modules=["key"], task_type="SEQ_CLS"), "ours")
        with torch.no_grad():
            pooled = model.get_base_model().bert(**inputs_of(BATCH)).pooler_output
        assert torch.allclose(trained(pooled), logits_of(model.eval()), atol=1e-5)


@pytest.mark.parametrize("kind", OURS)
def test_a_failed_call_leaves_it_on(kind: str, folders: dict[str, Path], tmp_path: Path):
    model = tuned()
    expected, heads = logits_of(model), model.classifier.active_adapters
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    wrong = OF[kind].config(target_modules=["nowhere"])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folders[f"{kind} False"].iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: 200 if file.suffix == ".safetensors" else None])
    for call in (
        lambda: model.add_adapter(wrong, "ours"),
        lambda: model.add_adapter(OF[kind].config(target_modules=["classifier"]), "ours"),
        lambda: model.load_adapter(damaged, adapter_name="ours"),
        lambda: peft.PeftModel.from_pretrained(model, damaged, adapter_name="ours"),
        lambda: peft.get_peft_model(model, wrong, "ours"),
        lambda: peft.inject_adapter_in_model(wrong, model, "ours"),
    ):
        with pytest.raises(ValueError):
            call()
        assert list(model.peft_config) == ["lora"] and model.active_adapters() == ["lora"]
        assert not adapter_children(model) and model.classifier.active_adapters == heads
        assert torch.equal(logits_of(model), expected)
        assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", OURS)
def test_two_heads_of_one_module_are_refused_before_anything_changes(kind: str):
    model = tuned()
    OF[kind].add(model, "bert", "ours", target_modules=["key"])
    OF[kind].add(model, "bert", "rival", target_modules=["value"], modules_to_save=["classifier"])
    with torch.no_grad():
        model.classifier.modules_to_save["rival"].weight.add_(0.25)
    model.set_adapter(["lora", "ours"])
    expected = logits_of(model)
    with pytest.raises(
        ValueError, match=r"\['lora', 'rival'\] cannot all be active.*set_adapter\(\['lora', 'ours'\]\)"
    ):
        model.set_adapter(["lora", "ours", "rival"])
    assert torch.equal(logits_of(model), expected)
    # With our adapter alone, the head of the base model acts, and a warning says so.
    with pytest.warns(
        UserWarning, match=r"'classifier' that was trained with the adapter 'lora' does not act any more"
    ):
        model.set_adapter("ours")
    assert head_that_acts(model) == "base"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_adapter(["ours", "lora"])
        model.set_adapter("rival")
    assert head_that_acts(model) == "rival"


@pytest.mark.parametrize("tokens", [[1, 2], {"word_embeddings": [1, 2]}], ids=["list", "dict"])
@pytest.mark.parametrize("kind", OURS)
def test_trainable_tokens_of_an_embedding_with_children_are_refused_before_anything_changes(kind: str, tokens: Any):
    model = classifier()
    OF[kind].add(model, "bert", "ours", target_modules=["key", "word_embeddings"])
    expected, modules = logits_of(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"'lora' cannot be added: .*word_embeddings' is one of .*trainable_token_ind"):
        model.add_adapter(peft.LoraConfig(target_modules=["query"], trainable_token_indices=tokens), "lora")
    assert [name for name, _ in model.named_modules()] == modules and list(model.peft_config) == ["ours"]
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("kind", OURS)
def test_a_copy_of_a_module_with_children_is_refused_before_anything_changes(kind: str):
    model = classifier()
    OF[kind].add(model, "bert", "ours", target_modules=["key", "classifier"])
    expected, modules = logits_of(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="'classifier' is one of modules_to_save"):
        model.add_adapter(OF[kind].config(target_modules=["value"], modules_to_save=["classifier"]), "rival")
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("kind", ["LoRA", "GRADIEND"])
def test_a_gradiend_of_a_tied_embedding_does_not_change_a_trained_head(kind: str):
    """The head that is copied runs with the embedding's changed weight; its copy has a weight of its own."""
    fields: dict[str, Any] = {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}
    batch, found = inputs_of(small_batch("gpt2", seed=7)), []
    for order in (("ours", "headed"), ("headed", "ours")):
        model: Any = copy.deepcopy(small_model("gpt2"))
        for name in order:
            if name == "ours":
                OF["GRADIEND"].add(model, "gpt2", name, target_modules=["wte"], sticky=True)
            else:
                OF[kind].add(model, "gpt2", name, **fields)
        model.set_adapter("headed")
        found.append(model(**batch).logits)
        model.delete_adapter("ours")
        found.append(model(**batch).logits)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


@pytest.mark.parametrize("kind", ["LoRA", "erasure"])
def test_a_gradiend_of_a_module_that_is_trained_is_refused(kind: str):
    model = classifier()
    OF[kind].add(model, "bert", "headed", target_modules=["key"], modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"'classifier' is trained with another adapter, by its modules_to_save or"):
        OF["GRADIEND"].add(model, "bert", "ours", target_modules=["key", "classifier"])
    assert [*model.peft_config] == ["headed"] and not adapter_children(model, "ours")


@pytest.mark.parametrize("kind", OURS)
def test_a_trained_head_that_comes_and_does_not_act_is_named(kind: str, tmp_path: Path):
    model = classifier()
    OF[kind].add(model, "bert", "ours", target_modules=["key"], modules_to_save=["classifier"])
    with torch.no_grad():
        model.classifier.modules_to_save["ours"].weight.add_(0.25)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"with the adapter 'ours' does not act: that of 'lora' does"):
        model = peft.PeftModel.from_pretrained(tuned(), tmp_path, adapter_name="ours").eval()
    assert head_that_acts(model) == "lora"


@pytest.mark.parametrize("kind", OURS)
def test_the_head_of_the_second_of_two_that_are_loaded_acts(kind: str, tmp_path: Path):
    """PEFT switches the first one's head off before the second one's is there; the untrained head would answer."""
    for shift, name in enumerate(("first", "second"), 1):
        model = classifier()
        OF[kind].add(model, "bert", name, shift, target_modules=["key"], modules_to_save=["classifier"])
        with torch.no_grad():
            model.classifier.modules_to_save[name].bias.add_(float(shift))
        model.save_pretrained(tmp_path / name)
    expected = logits_of(model)
    model = classifier()
    for name in ("first", "second"):
        model.load_adapter(tmp_path / name, adapter_name=name)
    assert head_that_acts(model) == "second"
    assert torch.equal(logits_of(model), expected)
    model.delete_adapter("first")
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("kind", OURS)
def test_the_head_of_the_adapter_that_a_deletion_switches_on_acts(kind: str):
    """PEFT fails where no head acts, or leaves the untrained head on."""
    model = peft.get_peft_model(classifier(), OF[kind].config(target_modules=["key"]), "alone")
    OF[kind].add(model, "bert", "headed", target_modules=["key"], modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["headed"].bias.add_(1.0)
    assert head_that_acts(model.eval()) == "base"
    model.delete_adapter("alone")
    assert model.active_adapters == ["headed"] and head_that_acts(model) == "headed"
    model.add_adapter("other", OF[kind].config(target_modules=["key"], modules_to_save=["classifier"]))
    model.base_model.model.classifier.set_adapter([])
    model.delete_adapter("other")
    assert head_that_acts(model) == "headed"


@pytest.mark.parametrize("kind", OURS)
def test_trained_tokens_stay_on_too(kind: str, folders: dict[str, Path]):
    alone = tuned(**TOKENS, modules_to_save=None)
    plain = tuned(modules_to_save=None)
    assert not torch.equal(logits_of(alone), logits_of(plain))
    model = copy.deepcopy(alone)
    with pytest.raises(ValueError):
        model.add_adapter(OF[kind].config(target_modules=["nowhere"]), "ours")
    assert torch.equal(logits_of(model), logits_of(alone))
    model.add_adapter(OF[kind].config(target_modules=["key"]), "ours")
    by_hand = copy.deepcopy(plain)
    with torch.no_grad():
        rows = torch.tensor(TOKENS["trainable_token_indices"]["word_embeddings"])
        deltas = alone.bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta["lora"]
        by_hand.bert.embeddings.word_embeddings.weight[rows] = deltas
    assert torch.equal(logits_of(by_hand), logits_of(alone))
    for loading in (model, by_hand):
        loading.load_adapter(folders[f"{kind} False"], adapter_name="fitted")
    model.set_adapter(["lora", "fitted"])
    assert torch.allclose(logits_of(model), logits_of(by_hand), atol=1e-6)
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(alone), folders[f"{kind} False"], adapter_name="fitted")
    wrapped.load_adapter(folders[f"{kind} False"], adapter_name="more")
    assert torch.allclose(logits_of(wrapped.eval()), logits_of(by_hand), atol=1e-6)
    for name in ("fitted", "ours"):
        model.delete_adapter(name)
    assert torch.equal(logits_of(model), logits_of(alone))


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("kind", OURS)
def test_taking_ours_away_leaves_the_other_adapter_whole(kind: str, how: str, folders: dict[str, Path], tmp_path: Path):
    model = peft.PeftModel.from_pretrained(tuned(), folders[f"{kind} False"], adapter_name="ours").eval()
    together = logits_of(model)
    plain = getattr(model, how)()
    assert not adapter_children(plain) and list(plain.peft_config) == ["lora"]
    expected = together if how == "merge_and_unload" else logits_of(tuned())
    assert torch.allclose(logits_of(plain), expected, atol=1e-5)
    plain.save_pretrained(tmp_path)
    again = classifier()
    load_lora(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(tuned()))


@pytest.mark.parametrize("kind", OURS)
def test_deleting_ours_leaves_no_trace_on_what_others_have(kind: str):
    """Hosts keep no entry of ours, and PEFT's classes are back: such a model can be saved and read without us."""
    model = tuned(**TOKENS)
    before = {name: type(module) for name, module in model.named_modules()}
    expected, entries = logits_of(model), {name: [*module._modules] for name, module in model.named_modules()}
    model.add_adapter(OF[kind].config(target_modules=["key", "dense"], modules_to_save=["pooler"]), "ours")
    model.add_adapter(OF[kind].config(target_modules=["key"]), "more")
    model.set_adapter("lora")
    for name in ("ours", "more"):
        model.delete_adapter(name)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {name: [*module._modules] for name, module in model.named_modules()} == entries
    assert torch.equal(logits_of(model), expected)
