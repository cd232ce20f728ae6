"""Adapters move between an encoder and the same encoder with a head; saves of a model with an adapter on a part."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from hf_erasure import ConceptErasureConfig, fit_concept_erasure, verify_adapter
from hf_erasure.adapters import targeted_parameters
from hf_erasure.adapters.merging.export import load_with_erasure
from tests.adapters.gradiend import lifecycle as gradiends
from tests.lifecycle.verbs import OF, OURS
from tests.small_models import (
    LABELS,
    WIDTH,
    inputs_of,
    outputs_of,
    roughen,
    same,
    small_batch,
    small_batches,
    small_model,
)

NAME = "tried"
ROADS = ("load_adapter", "PeftModel")
_BART = hf.BartConfig(
    vocab_size=64, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=48, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
)  # fmt: skip
# Name → the architecture, the class of the bare model, and the class of the model with a head.
PAIRS: dict[str, tuple[str, type[PreTrainedModel], type[PreTrainedModel]]] = {
    "bert": ("bert", hf.BertModel, hf.BertForSequenceClassification),
    "gpt2": ("gpt2", hf.GPT2Model, hf.GPT2LMHeadModel),
    "llama": ("llama", hf.LlamaModel, hf.LlamaForCausalLM),
    "t5": ("t5", hf.T5Model, hf.T5ForSequenceClassification),
    "t5 without a prefix": ("t5", hf.T5Model, hf.T5ForConditionalGeneration),
    "bart": ("t5", hf.BartModel, hf.BartForConditionalGeneration),
    "vit": ("vit", hf.ViTModel, hf.ViTForImageClassification),
}


def both(pair: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A bare model, and one with a head around the same weights."""
    architecture, bare_class, head_class = PAIRS[pair]
    config = _BART if pair == "bart" else small_model(architecture).config
    with_head = roughen(head_class(copy.deepcopy(config)), torch.Generator().manual_seed(3)).eval()
    bare = bare_class(copy.deepcopy(config)).eval()
    inside = getattr(with_head, with_head.base_model_prefix, with_head)
    found = bare.load_state_dict(inside.state_dict(), strict=False)
    assert all("pooler" in name for name in found.missing_keys)
    return bare, with_head


def hidden_states(pair: str, model: Any) -> dict[str, torch.Tensor]:
    """The last hidden states of a bare model, or of the bare model inside a model with a head."""
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    body = getattr(model, model.base_model_prefix, model)
    inputs = inputs_of(small_batch(PAIRS[pair][0]))
    with torch.no_grad():
        output = body(**inputs, **({"output_hidden_states": True} if body is model else {}))
    last = output.get("last_hidden_state", (output.get("decoder_hidden_states") or [None])[-1])
    return {"decoder": last} | {k: v for k, v in output.items() if k == "encoder_last_hidden_state"}


def ended(architecture: str) -> dict[str, torch.Tensor]:
    """A batch whose rows have an end token for T5, which T5 classifies by."""
    batch = small_batch(architecture)
    if architecture == "t5":
        batch["input_ids"][:, -1] = 2
    return batch


def fit(model: PreTrainedModel, pair: str, kind: str) -> None:
    if kind == "gradiend":
        model.add_adapter(gradiends.config_of(0.1, exclude_modules=["pooler"]), adapter_name=NAME)
        gradiends.fit(model, NAME)
    else:
        model.add_adapter(ConceptErasureConfig(labels=LABELS), adapter_name=NAME)
        batches = [small_batch(PAIRS[pair][0], seed=100, rows=48)]
        fit_concept_erasure(model, batches, NAME, sequential=False, pool="tokens", progress=False)


def loaded(model: PreTrainedModel, folder: Path, road: str) -> Any:
    model = copy.deepcopy(model)
    if road == "PeftModel":
        return peft.PeftModel.from_pretrained(model, folder)
    model.load_adapter(folder)
    return model


@pytest.mark.filterwarnings("ignore:pool='tokens' guards")
@pytest.mark.parametrize("kind", ["erasure", "gradiend"])
@pytest.mark.parametrize("pair", PAIRS)
def test_an_adapter_goes_from_the_encoder_to_the_model_with_a_head_and_back(pair: str, kind: str, tmp_path: Path):
    """An adapter of either model loads into both by both roads. Its save there loads again, into one, by one road."""
    models = dict(zip(("bare", "head"), both(pair), strict=True))
    back = itertools.cycle(itertools.product(models.values(), ROADS))
    # Each pair and kind starts at another way back.
    back = itertools.islice(back, [*PAIRS].index(pair) + 2 * (kind == "gradiend"), None)
    for origin, other in (("bare", "head"), ("head", "bare")):
        fitted = copy.deepcopy(models[origin])
        fit(fitted, pair, kind)
        fitted.save_pretrained(tmp_path / origin)
        expected = hidden_states(pair, fitted)
        assert not same(expected, hidden_states(pair, models[origin]))
        for road in ROADS:
            moved = loaded(models[other], tmp_path / origin, road)
            assert same(hidden_states(pair, moved), expected)
            assert verify_adapter(moved, batch=ended(PAIRS[pair][0]))
            moved.save_pretrained(tmp_path / f"{origin} {road}")
            model, road_back = next(back)
            assert same(hidden_states(pair, loaded(model, tmp_path / f"{origin} {road}", road_back)), expected)


def test_what_the_configuration_says_goes_along(tmp_path: Path):
    bare, with_head = both("bert")
    config = ConceptErasureConfig(
        labels=LABELS, target_modules=r"encoder\.layer\.\d", exclude_modules=r"encoder\.layer\.0"
    )
    bare.add_adapter(config, adapter_name=NAME)
    fit_concept_erasure(bare, small_batches("bert"), NAME, eval_batches=small_batches("bert", seed=7), progress=False)
    bare.save_pretrained(tmp_path / "bare")
    with_head.load_adapter(tmp_path / "bare", adapter_name=NAME)
    config = with_head.peft_config[NAME]
    assert list(config.fitted_sites) == ["bert.encoder.layer.1"] == list(config.target_modules)
    assert config.exclude_modules is None and config.provenance["base_class"] == "BertModel"
    assert set(config.provenance["leakage"]) == {"bert.encoder.layer.1", "last_hidden_state"}
    assert all(name.startswith("bert.encoder.layer.1.") for name in config.provenance["fingerprint"])
    assert "bert.encoder.layer.1" not in bare.peft_config[NAME].provenance["leakage"]
    with pytest.raises(ValueError, match="another model"):
        hf.BertForMaskedLM(with_head.config).load_adapter(tmp_path / "bare")


def test_modules_that_are_in_the_head_alone_are_named(tmp_path: Path):
    bare, with_head = both("bert")
    with_head.add_adapter(
        ConceptErasureConfig(labels=LABELS, target_modules=["classifier"], site="input"), adapter_name=NAME
    )
    fit_concept_erasure(with_head, small_batches("bert"), NAME, pool="cls", progress=False)
    with_head.save_pretrained(tmp_path / "classifier")
    parameters = {n: p.clone() for n, p in bare.named_parameters()}
    for road in ROADS:
        with pytest.raises(ValueError, match="acts at 'classifier', which this BertModel does not have"):
            loaded(bare, tmp_path / "classifier", road)
    assert not hasattr(bare, "peft_config") and all(torch.equal(p, parameters[n]) for n, p in bare.named_parameters())
    bare.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules="all-linear"), adapter_name=NAME)
    fit_concept_erasure(bare, small_batches("bert"), NAME, progress=False)
    bare.save_pretrained(tmp_path / "linear")
    with pytest.raises(
        ValueError,
        match=r"BertModel and acts at 'pooler.dense', which this BertForMaskedLM .* targets that both models have",
    ):
        hf.BertForMaskedLM(bare.config).load_adapter(tmp_path / "linear")


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(("origin", "trained"), [("head", "score"), ("bare", "ln_f")])
def test_trained_modules_that_have_another_name_are_named(origin: str, trained: str, kind: str, tmp_path: Path):
    config = small_model("gpt2").config
    models = {"bare": hf.GPT2Model(config).eval(), "head": hf.GPT2ForSequenceClassification(config).eval()}
    models["bare"].load_state_dict(models["head"].transformer.state_dict())
    fitted = copy.deepcopy(models[origin])
    OF[kind].add(fitted, "gpt2", NAME, target_modules=["c_attn"], modules_to_save=[trained])
    fitted.save_pretrained(tmp_path)
    other = models["head" if origin == "bare" else "bare"]
    for road in ROADS:
        with pytest.raises(ValueError, match=rf"'{trained}\.\w+' .* nor to .*modules_to_save=\['{trained}'\]"):
            loaded(other, tmp_path, road)
        loaded(models[origin], tmp_path, road)


def test_the_command_that_merges_takes_the_model_with_its_head(tmp_path: Path):
    bare, with_head = both("bert")
    with_head.save_pretrained(tmp_path / "model")
    bare.add_adapter(gradiends.config_of(0.1, exclude_modules=["pooler"]), adapter_name=NAME)
    gradiends.fit(bare, NAME)
    bare.save_pretrained(tmp_path / "adapter")
    merged = load_with_erasure(str(tmp_path / "model"), tmp_path / "adapter").merge_and_unload()
    assert type(merged) is hf.BertForSequenceClassification
    expected = {name: p for name, p in bare.named_parameters() if "gradiend" not in name}
    changed = [name for name, p in merged.bert.named_parameters() if not torch.equal(p, expected[name])]
    assert changed and set(changed) <= set(targeted_parameters(bare, NAME))


@pytest.mark.parametrize("kind", OURS)
def test_the_commands_load_a_trained_head_into_the_class_that_has_it(kind: str, tmp_path: Path):
    bare, with_head = both("bert")
    bare.save_pretrained(tmp_path / "model")
    OF[kind].add(with_head, "bert", NAME, modules_to_save=["classifier"])
    with_head.save_pretrained(tmp_path / "adapter")
    warnings.filterwarnings("error", category=FutureWarning)  # users cannot change what PEFT and transformers call
    loaded_model: Any = load_with_erasure(str(tmp_path / "model"), tmp_path / "adapter").get_base_model()
    assert type(loaded_model) is hf.BertForSequenceClassification
    assert same(outputs_of(loaded_model, small_batch("bert")), outputs_of(with_head, small_batch("bert")))


def test_the_commands_name_what_neither_the_checkpoint_nor_the_adapter_has(tmp_path: Path):
    """The head that was trained with the adapter reads a pooler, which a masked language model does not have."""
    _, with_head = both("bert")
    masked = hf.BertForMaskedLM(with_head.config)
    masked.bert.load_state_dict(with_head.bert.state_dict(), strict=False)
    masked.save_pretrained(tmp_path / "model")
    OF["erasure"].add(with_head, "bert", NAME, target_modules=["query"], modules_to_save=["classifier"])
    with_head.save_pretrained(tmp_path / "adapter")
    named = r"2 parameters of BertForSeq.*: \['bert.pooler.dense.bias', 'bert.pooler.dense.weight'\] are new"
    with pytest.warns(UserWarning, match=named):
        load_with_erasure(str(tmp_path / "model"), tmp_path / "adapter")


@pytest.mark.parametrize("kind", OURS)
def test_the_commands_refuse_a_model_of_another_type_in_words(kind: str, tmp_path: Path):
    """The class that an adapter was fitted on cannot be built from the other model's configuration."""
    OF[kind].added("bert", NAME).save_pretrained(tmp_path / "adapter")
    small_model("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"fitted on .*BertModel.*which this \w+ does not have"):
        load_with_erasure(str(tmp_path / "model"), tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:.*was never fitted")
@pytest.mark.parametrize("word", ["readers", "writers"])
@pytest.mark.parametrize("road", ROADS)
def test_an_adapter_of_a_word_that_was_never_fitted_goes_along(word: str, road: str, tmp_path: Path):
    bare, with_head = both("llama")
    expected = copy.deepcopy(bare)
    expected.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=word), adapter_name="default")
    expected.save_pretrained(tmp_path / "unfitted")
    moved = loaded(with_head, tmp_path / "unfitted", road)
    for model in (expected, moved):
        fit_concept_erasure(model, small_batches("llama"), "default", progress=False)
    assert same(hidden_states("llama", moved), hidden_states("llama", expected))


@pytest.mark.parametrize("kind", [hf.LlamaModel, hf.LlamaForCausalLM])
def test_the_part_of_a_larger_model_that_has_the_modules_is_named(kind: type[PreTrainedModel], tmp_path: Path):
    tower = hf.CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = hf.LlavaConfig(text_config=small_model("llama").config, vision_config=tower)
    larger = roughen(hf.LlavaForConditionalGeneration(config), torch.Generator().manual_seed(3)).eval()
    text, part = kind(config.text_config).eval(), larger.model.language_model
    text.base_model.load_state_dict(part.state_dict())
    fit(text, "llama", "erasure")
    text.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"or into the part that has them, model\.model\.language_model\.load_adapter"):
        larger.load_adapter(tmp_path)
    part.load_adapter(tmp_path)
    assert verify_adapter(larger)


@pytest.mark.filterwarnings("ignore:.*was never fitted")
def test_readers_that_the_bare_model_lacks_are_named_before_a_fit_too(tmp_path: Path):
    bare, with_head = both("llama")
    with_head.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules="readers"), adapter_name=NAME)
    with_head.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was added to .* acts at 'lm_head', which this LlamaModel does not have"):
        bare.load_adapter(tmp_path)
    assert not hasattr(bare, "peft_config")


# ---- saves of a model that has an adapter on a part of it ------------------------------------------------------------


def on_a_part() -> PreTrainedModel:
    _, model = both("bert")
    fit(model.bert, "bert", "erasure")
    return model


def test_a_save_that_would_lose_the_adapter_of_a_part_says_how_to_keep_it(tmp_path: Path):
    model = on_a_part()
    expected = outputs_of(model, small_batch("bert"))
    with pytest.raises(
        ValueError, match=rf"lose the erasure .* '{NAME}', on model\.bert: model\.bert\.save_pretrained\("
    ):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    # The steps that the message advises.
    model.bert.save_pretrained(tmp_path / "adapter")
    model.bert.delete_adapter(NAME)
    model.save_pretrained(tmp_path / "model")
    assert not any("erasure" in key for key in load_file(tmp_path / "model" / "model.safetensors"))
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    again.load_adapter(tmp_path / "adapter", adapter_name=NAME)
    assert same(outputs_of(again, small_batch("bert")), expected)
    again.save_pretrained(tmp_path / "whole")


def test_a_trainer_says_at_the_start_that_its_saves_would_lose_the_adapter(tmp_path: Path):
    model = on_a_part().requires_grad_(True)
    steps: list[Any] = []
    model.register_forward_pre_hook(lambda *inputs: steps.append(inputs))
    rows = [{"input_ids": torch.tensor([4, 5]), "labels": 0}] * 2
    arguments = {"output_dir": tmp_path, "max_steps": 1, "report_to": [], "use_cpu": True}
    with pytest.raises(ValueError, match=r"would lose the erasure .*model\.bert\.save_pretrained"):
        hf.Trainer(model, hf.TrainingArguments(**arguments), train_dataset=rows).train()
    assert not steps
    hf.Trainer(model, hf.TrainingArguments(**arguments, save_strategy="no"), train_dataset=rows).train()
    assert steps


def test_a_save_of_another_adapter_says_what_it_leaves_out(tmp_path: Path):
    model = on_a_part()
    lora = peft.LoraConfig(target_modules=["query"])
    wrapped = peft.get_peft_model(copy.deepcopy(model), lora)
    model.add_adapter(lora, adapter_name="tuned")
    for saved in (model, wrapped):
        with pytest.warns(
            UserWarning, match=rf"leaves out the erasure .* '{NAME}', on model\..*bert: .*save_pretrained"
        ):
            saved.save_pretrained(tmp_path)


def test_an_adapter_that_peft_added_is_not_written_into_the_weights(tmp_path: Path):
    bare, _ = both("bert")
    fit(bare, "bert", "erasure")
    bare.save_pretrained(tmp_path / "adapter")
    inner = both("bert")[0]
    wrapped = peft.PeftModel.from_pretrained(inner, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"which PEFT added to it\. Save the PeftModel"):
        inner.save_pretrained(tmp_path / "model")
    wrapped.save_pretrained(tmp_path / "again")
    plain = wrapped.unload()
    plain.save_pretrained(tmp_path / "model")


def test_a_module_around_keeps_its_own_way_of_saving(tmp_path: Path):
    outer = nn.ModuleDict({"encoder": on_a_part()})
    assert verify_adapter(outer, NAME)
    with pytest.raises(ValueError, match="would lose"):
        outer.encoder.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", OURS)
def test_a_model_where_the_adapter_of_a_part_is_on_says_what_is_to_be_switched(kind: str, tmp_path: Path):
    _, model = both("bert")
    OF[kind].add(model, "bert", "whole", target_modules=["query"])
    with pytest.warns(UserWarning, match=r"\['whole'\] and 'part' are of different models.*load both into one"):
        OF[kind].add(model.bert, "bert", "part", target_modules=["key"])
    advice = r"'part', on model\.bert: model\.bert\.save_pretrained.* Call model\.set_adapter\(\['whole'\]\) before"
    with pytest.raises(ValueError, match=advice):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    # The steps that the message advises.
    model.bert.save_pretrained(tmp_path / "part")
    model.set_adapter(["whole"])
    with pytest.warns(UserWarning, match="leaves out the .* 'part', on model.bert"):
        model.save_pretrained(tmp_path / "whole")
    again = both("bert")[1]
    again.load_adapter(tmp_path / "whole", adapter_name="whole")
    again.load_adapter(tmp_path / "part", adapter_name="part")


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("is_part_first", [True, False])
def test_a_module_has_adapters_of_one_model_alone(is_part_first: bool, kind: str, tmp_path: Path):
    _, model = both("bert")
    first, second = (model.bert, model) if is_part_first else (model, model.bert)
    OF[kind].add(first, "bert", "a", target_modules=["query"])
    expected = outputs_of(model, small_batch("bert"))
    with pytest.raises(ValueError, match=r"has an adapter already, \['a'\], of a model in which it is called"):
        OF[kind].add(second, "bert", "b", target_modules=["query"])
    assert same(outputs_of(model, small_batch("bert")), expected)
    first.save_pretrained(tmp_path)
    first.delete_adapter("a")
    second.load_adapter(tmp_path, adapter_name="a")
    assert same(outputs_of(model, small_batch("bert")), expected)
    OF[kind].add(second, "bert", "b", target_modules=["query"])
