"""Calls that cannot work are refused with a sentence that says what to do, and leave the model as it was."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize, prune

from hf_erasure.adapters import (
    GradiendConfig,
    gradiend_layers,
    set_features,
    stated_bytes,
    steer,
    targeted_parameters,
)
from tests.adapters.gradiend.lifecycle import (
    CLASSES,
    NAME,
    PAIR,
    Gradiends,
    State,
    batch_of,
    config_of,
    feature_of,
    fit,
    lora,
    state_of,
)
from tests.small_models import outputs_of, roughen, same, small_model

STARTS = ("bare", "gradiend", "lora")
every_start = pytest.mark.parametrize("start", STARTS)


def starting(start: str, gradiends: Gradiends) -> nn.Module:
    """A BERT in training mode with some trainable weights, so that a change to eval mode or frozen weights shows."""
    model = gradiends.base("bert")
    if start == "gradiend":
        model.load_adapter(gradiends.folder("bert", seed=1), adapter_name="present")
    elif start == "lora":
        model.add_adapter(lora(target_modules=["query"]), adapter_name="present")
    model.encoder.layer[1].train()
    model.pooler.requires_grad_(True)
    return model


def loads(model: nn.Module, gradiends: Gradiends) -> None:
    """Check that a good adapter loads and acts after the failure."""
    model.load_adapter(gradiends.folder("bert"), adapter_name=NAME)
    model.set_adapter(NAME)
    model.eval()
    assert same(outputs_of(model, batch_of("bert")), outputs_of(gradiends.fitted("bert"), batch_of("bert")))


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "density of zero": ({"density": 0.0}, r"density=0.0.*\(0, 1\]"),
    "density above one": ({"density": 1.5}, "density=1.5"),
    "one class": ({"classes": ["female"]}, "at least two"),
    "a class twice": ({"classes": ["a", "a"]}, "two different classes"),
    "a name for classes": ({"classes": "female"}, "classes='female'"),
    "unknown source": ({"source": "both"}, "source='both' is not known"),
    "unknown pair": ({"pair": ["female", "nobody"]}, "'nobody', which is not among"),
    "pair of three": ({"pair": ["female", "male", "female"]}, "not a pair of classes"),
    "infinite rate": ({"learning_rate": float("inf")}, "learning_rate=inf"),
    "layers of an expression": ({"target_modules": ".*query", "layers_to_transform": [0]}, "write the layers into"),
    "fitted without values": ({"fitted": True}, "file is damaged"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_configuration_that_means_nothing(case: str):
    fields, message = BAD_FIELDS[case]
    with pytest.raises(ValueError, match=message):
        GradiendConfig(**{"classes": CLASSES, **fields})


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "wrong target": ({"target_modules": ["no_such_module"]}, NAME, "not found|No modules were targeted"),
    "container": ({"target_modules": ["attention"]}, NAME, "matches no module that owns parameters itself"),
    "container beside a layer": ({"target_modules": ["attention", "intermediate.dense"]}, NAME, "no module in it"),
    "name with a dot": ({}, "a.b", "adapter_name='a.b'.*dot"),
    "name of the prefix": ({}, "gradiend_1", "adapter_name='gradiend_1'"),
    "name of the child": ({}, "gradiend", "adapter_name='gradiend'"),
    "name of the other child": ({}, "concept_erasure", "adapter_name='concept_erasure'"),
    "name of a module": ({}, "query", "adapter_name='query'.*modules of that name"),
}


# PEFT wraps a model only once, so `get_peft_model` starts from a bare model only.
WAYS_TO_ADD = [("add_adapter", start) for start in STARTS] + [("get_peft_model", "bare")]


@pytest.mark.parametrize(("verb", "start"), WAYS_TO_ADD)
@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_adding(case: str, start: str, verb: str, gradiends: Gradiends):
    fields, name, message = BAD_CONFIGS[case]
    model = starting(start, gradiends)
    before = state_of(model, "bert")
    with pytest.raises(ValueError, match=message):
        if verb == "add_adapter":
            model.add_adapter(config_of(**fields), adapter_name=name)
        else:
            peft.get_peft_model(model, config_of(**fields), adapter_name=name)
    before.assert_same(state_of(model, "bert"))
    loads(model, gradiends)


def test_a_name_that_is_taken_keeps_its_adapter(gradiends: Gradiends):
    model = gradiends.fitted("bert")
    before = state_of(model, "bert")
    calls: list[Callable[[], Any]] = [
        lambda: model.add_adapter(config_of(), adapter_name=NAME),
        lambda: model.load_adapter(gradiends.folder("bert", seed=1), adapter_name=NAME),
        lambda: peft.inject_adapter_in_model(config_of(), model, NAME),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"{NAME}.*(already|there)"):
            call()
        before.assert_same(state_of(model, "bert"))


def damaged(folder: Path, damage: str, target: Path) -> str:
    """Copy an adapter folder to `target`, damage the copy, and return its path."""
    shutil.copytree(folder, target)
    weights, config = target / "adapter_model.safetensors", target / "adapter_config.json"
    tensors = load_file(weights)
    features = sorted(key for key in tensors if "gradiend_feature" in key)
    key = features[len(features) // 2]
    index = key.replace("gradiend_feature", "gradiend_index")
    if damage == "missing tensor":
        del tensors[key]
    elif damage == "missing positions":
        del tensors[index]
    elif damage == "NaN":
        tensors[key].view(-1)[0] = torch.nan
    elif damage == "position outside":
        tensors[index][-1] = 2**30
    elif damage == "position twice":
        tensors[index][1] = tensors[index][0]
    elif damage == "wrong shape":
        tensors[key] = torch.zeros(3, 3)
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        save_file(tensors, weights, metadata={"format": "pt"})
    if damage == "no parameters":
        written = json.loads(config.read_text())
        written["fitted_parameters"] = None
        config.write_text(json.dumps(written))
    return str(target)


DAMAGES = {
    "missing tensor": (ValueError, "other tensors of the GRADIEND of .* are missing in.*Load the complete folder"),
    "missing positions": (ValueError, "gradiend_index_.* are missing in"),
    "NaN": (ValueError, "missing or not finite"),
    "position outside": (ValueError, "missing or not finite"),
    "position twice": (ValueError, "missing or not finite"),
    "wrong shape": (ValueError, r"has shape .*not of the same adapter"),
    "truncated": (ValueError, "is damaged.*copy or download it again"),
    "no parameters": (ValueError, "fitted_parameters.*damaged"),
}
every_damage = pytest.mark.parametrize("damage", DAMAGES)


# A load stops while the configuration, the file or the tensors are checked: one damage of each of the three is enough
# to show whether other adapters on the model are left alone.
STAGES = ("no parameters", "truncated", "missing tensor")
DAMAGED_STARTS = [(d, "bare") for d in DAMAGES] + [(d, start) for d in STAGES for start in STARTS[1:]]


@pytest.mark.parametrize(("damage", "start"), DAMAGED_STARTS)
def test_load_adapter_from_a_damaged_folder(damage: str, start: str, gradiends: Gradiends, tmp_path: Path):
    model, folder = starting(start, gradiends), damaged(gradiends.folder("bert"), damage, tmp_path / "bad")
    before = state_of(model, "bert")
    error, message = DAMAGES[damage]
    with pytest.raises(error, match=message):
        model.load_adapter(folder, adapter_name=NAME)
    before.assert_same(state_of(model, "bert"))
    loads(model, gradiends)


@every_damage
def test_peft_model_from_a_damaged_folder(damage: str, gradiends: Gradiends, tmp_path: Path):
    model, folder = starting("bare", gradiends), damaged(gradiends.folder("bert"), damage, tmp_path / "bad")
    before = state_of(model, "bert")
    error, message = DAMAGES[damage]
    with pytest.raises(error, match=message):
        peft.PeftModel.from_pretrained(model, folder)
    before.assert_same(state_of(model, "bert"))
    loads(model, gradiends)


# PEFT does not read the configuration again for the name of an adapter that is loaded.
LOADED_OVER = [(d, n) for d in DAMAGES for n in ("default", "newcomer") if (d, n) != ("no parameters", "default")]


@pytest.mark.parametrize(("damage", "name"), LOADED_OVER)
def test_load_adapter_of_a_peft_model(damage: str, name: str, gradiends: Gradiends, tmp_path: Path):
    folder = damaged(gradiends.folder("bert"), damage, tmp_path / "bad")
    model = peft.PeftModel.from_pretrained(gradiends.base("bert"), gradiends.folder("bert"))
    before = state_of(model, "bert")
    error, message = DAMAGES[damage]
    with pytest.raises(error, match=message):
        model.load_adapter(folder, name)
    before.assert_same(state_of(model, "bert"))


def _wider() -> nn.Module:
    config = copy.deepcopy(small_model("bert").config)
    config.vocab_size = 80
    return transformers.BertModel(config)


def _other_weights() -> nn.Module:
    return roughen(transformers.BertModel(small_model("bert").config), torch.Generator().manual_seed(99))


def _masked_lm() -> nn.Module:
    return transformers.BertForMaskedLM(small_model("bert").config)


WRONG_BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other vocabulary": (_wider, r"the vocabulary has 64 tokens; here it has 80 tokens.*resize_token_embeddings\(64\)"),
    "other weights": (
        _other_weights,
        "this is another model \\(sampled weights.*Load the adapter into its own base, or fit it",
    ),
    "other weights, with a head": (
        _masked_lm,
        r"GRADIEND of 'gender' was fitted on .*BertModel.*this is another model",
    ),
}


@pytest.mark.parametrize("base", WRONG_BASES)
def test_a_wrong_base(base: str, gradiends: Gradiends):
    build, message = WRONG_BASES[base]
    model = build()
    before = State(model, batch_of("bert"))
    for load in (model.load_adapter, lambda folder: peft.PeftModel.from_pretrained(model, folder)):
        with pytest.raises(ValueError, match=message):
            load(gradiends.folder("bert"))
        before.assert_same(State(model, batch_of("bert")))


def test_weights_that_were_two_where_the_feature_was_fitted(gradiends: Gradiends):
    """An embedding and a head whose changes differ cannot become one tensor."""
    untied = gradiends.base("llama")
    untied.add_adapter(config_of(1.0, target_modules=["embed_tokens", "lm_head"]), adapter_name=NAME)
    fit(untied)
    config = copy.deepcopy(untied.peft_config[NAME])
    config.provenance = {}
    model = gradiends.base("tied_llama")
    before = state_of(model, "tied_llama")
    with pytest.raises(ValueError, match=r"'lm_head.weight' shares its tensor with another.*tie_word_embeddings=False"):
        model.add_adapter(config, adapter_name=NAME)
    before.assert_same(state_of(model, "tied_llama"))


def test_quantised_weights_are_refused(gradiends: Gradiends):
    model = gradiends.base("bert")
    dense = model.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.data.to(torch.int8), requires_grad=False)
    for fields in ({}, {"target_modules": ["output.dense"]}):
        with pytest.raises(ValueError, match=r"'encoder.layer.0.output.dense.weight' is quantised.*exclude_modules"):
            model.add_adapter(config_of(**fields), adapter_name=NAME)
        assert not gradiend_layers(model)
    model.add_adapter(config_of(exclude_modules=["layer.0.output.dense"]), adapter_name=NAME)
    assert "encoder.layer.0.output.dense" not in gradiend_layers(model)
    assert "encoder.layer.1.output.dense" in gradiend_layers(model)


def _shrunk(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", nn.Softshrink())


def _pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", amount=0.3)


@pytest.mark.parametrize(
    ("replaced", "kept"),
    [(_shrunk, parametrize.remove_parametrizations), (_pruned, prune.remove)],
    ids=["parametrized", "pruned"],
)
def test_a_weight_that_is_no_parameter_any_more_is_not_passed_over(replaced, kept, gradiends: Gradiends):
    """Without an error the model would run with the changes of all other weights."""
    model = gradiends.base("bert")
    model.load_adapter(gradiends.folder("bert"), adapter_name=NAME)
    query = model.encoder.layer[0].attention.self.query
    replaced(query)
    for used in (lambda: outputs_of(model, batch_of("bert")), lambda: targeted_parameters(model, NAME)):
        with pytest.raises(ValueError, match=r"query\.weight is not a parameter .* any more.*remove_parametrizations"):
            used()
    model.disable_adapters()
    off = outputs_of(model, batch_of("bert"))
    model.enable_adapters()
    kept(query, "weight")
    assert not same(outputs_of(model, batch_of("bert")), off)


def test_merging_into_weights_that_were_offloaded_changes_nothing(gradiends: Gradiends):
    model = peft.PeftModel.from_pretrained(gradiends.base("bert"), gradiends.folder("bert"))
    last = model.get_base_model().encoder.layer[1].output.dense
    kept = last.weight
    before = state_of(model, "bert")
    last.weight = nn.Parameter(kept.data.to("meta"))
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"layer.1.output.dense.weight is offloaded. Load the model on one device"):
            verb()
    last.weight = kept.requires_grad_(False)
    before.assert_same(state_of(model, "bert"))


def test_a_merge_that_breaks_off_takes_back_what_it_has_done(gradiends: Gradiends, monkeypatch: pytest.MonkeyPatch):
    model = peft.PeftModel.from_pretrained(gradiends.base("bert"), gradiends.folder("bert"))
    before = state_of(model, "bert")
    layers = list(gradiend_layers(model).values())
    monkeypatch.setattr(layers[len(layers) // 2], "check_values", lambda name: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        model.merge_adapter()
    before.assert_same(state_of(model, "bert"))


def test_saving_what_was_never_fitted_warns(gradiends: Gradiends, tmp_path: Path):
    model = gradiends.base("bert")
    model.add_adapter(config_of(), adapter_name=NAME)
    with pytest.warns(UserWarning, match=r"never fitted: loaded again it changes nothing. Call GradiendTrainer"):
        model.save_pretrained(tmp_path)
    loaded = gradiends.base("bert")
    loaded.load_adapter(tmp_path, adapter_name=NAME)
    assert same(outputs_of(loaded, batch_of("bert")), outputs_of(gradiends.base("bert"), batch_of("bert")))
    fit(loaded)
    assert same(outputs_of(loaded, batch_of("bert")), outputs_of(gradiends.fitted("bert"), batch_of("bert")))


def test_merging_what_does_not_act_changes_nothing(gradiends: Gradiends):
    model = peft.get_peft_model(gradiends.base("bert"), config_of(), adapter_name=NAME)
    model.merge_adapter()
    assert same(outputs_of(model, batch_of("bert")), outputs_of(gradiends.base("bert"), batch_of("bert")))


def test_a_fitted_config_without_its_tensors_raises_at_the_first_forward(gradiends: Gradiends):
    config = copy.deepcopy(gradiends.fitted("bert").peft_config[NAME])
    model = peft.inject_adapter_in_model(config, gradiends.base("bert"), NAME)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"missing or not finite.*Load the complete folder"):
            outputs_of(model, batch_of("bert"))
    state = peft.get_peft_model_state_dict(gradiends.fitted("bert"), adapter_name=NAME)
    peft.set_peft_model_state_dict(model, state, NAME)
    assert same(outputs_of(model, batch_of("bert")), outputs_of(gradiends.fitted("bert"), batch_of("bert")))


def test_a_base_that_was_trained_further_warns(gradiends: Gradiends):
    model = gradiends.base("bert")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    with pytest.warns(UserWarning, match=r"trained further since the GRADIEND of 'gender'.*fit the adapter again"):
        model.load_adapter(gradiends.folder("bert"))


def test_saving_over_the_folder_that_was_loaded(gradiends: Gradiends, tmp_path: Path):
    """Loaded tensors are not views into the file that the save replaces."""
    folder = tmp_path / "adapter"
    shutil.copytree(gradiends.folder("bert"), folder)
    model = gradiends.base("bert")
    model.load_adapter(folder, adapter_name=NAME)
    model.save_pretrained(folder)
    again = gradiends.base("bert")
    again.load_adapter(folder, adapter_name=NAME)
    assert same(outputs_of(again, batch_of("bert")), outputs_of(model, batch_of("bert")))


@pytest.mark.parametrize("way", ["load_adapter", "PeftModel"])
def test_low_memory_loading(way: str, gradiends: Gradiends):
    base, folder = gradiends.base("bert"), gradiends.folder("bert")
    if way == "load_adapter":
        model = base
        model.load_adapter(folder, low_cpu_mem_usage=True)
    else:
        model = peft.PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)
    assert same(outputs_of(model, batch_of("bert")), outputs_of(gradiends.fitted("bert"), batch_of("bert")))


# ---- where it goes --------------------------------------------------------------------------------------


def test_targets_are_read_as_peft_reads_them(gradiends: Gradiends):
    def owners(**fields: Any) -> list[str]:
        model = gradiends.base("bert")
        model.add_adapter(config_of(**fields), adapter_name=NAME)
        return list(gradiend_layers(model))

    assert owners(target_modules=["query"]) == [f"encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert owners(target_modules=r"encoder\.layer\.1\..*LayerNorm") == [
        "encoder.layer.1.attention.output.LayerNorm",
        "encoder.layer.1.output.LayerNorm",
    ]
    everything = owners()
    assert "embeddings.word_embeddings" in everything and "pooler.dense" not in everything
    assert owners(layers_to_transform=[1]) == [name for name in everything if name.startswith("encoder.layer.1.")]
    assert owners(exclude_modules=["query", "key"]) == [n for n in everything if not n.endswith(("query", "key"))]
    linear = owners(target_modules="all-linear")
    assert "pooler.dense" in linear and len(linear) == 13


def test_heads_are_left_out_of_classes_that_have_one(gradiends: Gradiends):
    config = small_model("bert").config
    for build in (transformers.BertForMaskedLM, transformers.BertForSequenceClassification):
        model = build(config)
        model.add_adapter(config_of(), adapter_name=NAME)
        names = set(targeted_parameters(model, NAME))
        assert names == {f"bert.{n}" for n, _ in model.bert.named_parameters() if not n.startswith("pooler")}
        assert stated_bytes(model, NAME) > 0
    # The decoder of the masked language model is tied to the embedding, and is edited with it.
    masked = transformers.BertForMaskedLM(config).eval()
    masked.add_adapter(config_of(1.0, target_modules=["word_embeddings"]), adapter_name=NAME)
    assert masked.cls.predictions.decoder.weight is masked.bert.embeddings.word_embeddings.weight
    set_features(masked, NAME, [feature_of(targeted_parameters(masked, NAME))], [PAIR])
    steer(masked, NAME, learning_rate=0.05)
    (layer,) = gradiend_layers(masked).values()
    assert {id(module) for module, _ in layer.owners["weight"]} == {
        id(masked.bert.embeddings.word_embeddings),
        id(masked.cls.predictions.decoder),
    }
