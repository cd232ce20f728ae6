"""A GRADIEND adapter together with another GRADIEND adapter, a LoRA or an erasure."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hf_erasure import ConceptErasureConfig, fit_concept_erasure, verify_adapter
from hf_erasure.adapters import (
    ConceptErasureModel,
    GradiendModel,
    edited,
    erasure_layers,
    gradiend_layers,
    steer,
    targeted_parameters,
)
from tests.adapters.gradiend.lifecycle import (
    MODELS,
    NAME,
    RATE,
    Gradiends,
    batch_of,
    config_of,
    edit_by_hand,
    feature_of,
    fit,
    lora,
    state_of,
)
from tests.in_turn import in_turn
from tests.small_models import LABELS, distance, outputs_of, same, small_batches

every_model = pytest.mark.parametrize("name", MODELS)
WRAPPING_MODELS = ("llama", "tied_llama", "gpt2", "bert", "t5")
wrapping_models = pytest.mark.parametrize("name", WRAPPING_MODELS)
# A weight that is edited twice is rounded once more: 2^-24 relative, as in `ORACLE_TOLERANCE`.
TOLERANCE = 2e-5


# ---- two GRADIEND adapters ------------------------------------------------------------------------------


# Adding two edits to a weight does not depend on the model: each model has one pair of densities, in turn.
@in_turn("name, densities", MODELS, [(1e-2, 2e-2), (1.0, 1e-2), (1.0, 1.0)])
def test_two_adapters_add_up(name: str, densities: tuple[float, float], gradiends: Gradiends):
    batch = batch_of(name)
    model = gradiends.base(name)
    features = {}
    for seed, (adapter, density) in enumerate(zip(("one", "two"), densities, strict=True)):
        model.add_adapter(config_of(density), adapter_name=adapter)
        features[adapter] = fit(model, adapter, seed)
    model.set_adapter(["two", "one"])
    together = outputs_of(model, batch)
    model.set_adapter(["one", "two"])
    assert same(outputs_of(model, batch), together)
    by_hand = gradiends.base(name)
    for adapter, density in zip(("one", "two"), densities, strict=True):
        by_hand = edit_by_hand(by_hand, features[adapter], density, 1.0, RATE)
    assert distance(together, outputs_of(by_hand, batch)) < TOLERANCE
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        assert not same(outputs_of(model, batch), together)


@in_turn("name, dtype", MODELS, [torch.float32, torch.bfloat16])  # as with one adapter, in test_lifecycle
def test_two_adapters_merge_as_they_act(name: str, dtype: torch.dtype, gradiends: Gradiends):
    batch = batch_of(name)
    model = PeftModel.from_pretrained(gradiends.base(name).to(dtype), gradiends.folder(name), "one")
    model.load_adapter(gradiends.folder(name, 0.02, seed=1), "two")
    model.base_model.set_adapter(["one", "two"])
    together, before = outputs_of(model, batch), state_of(model, name)
    model.merge_adapter()
    assert same(outputs_of(model, batch), together)
    changes = [change for layer in gradiend_layers(model).values() for _, own in layer._merges for _, change in own]
    kept, whole = sum(change.before.numel() for change in changes), sum(c.parameter.numel() for c in changes)
    assert kept < 0.05 * whole, "of both densities together, 3 % of the entries change"
    model.unmerge_adapter()
    before.assert_same(state_of(model, name))
    model.merge_adapter(["two"])
    with pytest.raises(ValueError, match="'two' is merged into the weights: call unmerge_adapter"):
        steer(model, "two", learning_rate=1.0)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("two")
    model.merge_adapter(["one"])
    if dtype == torch.float32:
        assert distance(outputs_of(model, batch), together) < TOLERANCE
    model.unmerge_adapter()
    before.assert_same(state_of(model, name))


def test_owners_of_one_weight_may_be_targeted_by_different_adapters(gradiends: Gradiends):
    """GPT-2's head is tied to its embedding, so an adapter on either changes both."""
    model, batch = gradiends.base("gpt2"), batch_of("gpt2")
    for seed, (adapter, target) in enumerate((("one", "wte"), ("two", "lm_head"))):
        model.add_adapter(config_of(1.0, target_modules=[target]), adapter_name=adapter)
        fit(model, adapter, seed)
    assert list(targeted_parameters(model, "one")) == ["transformer.wte.weight"]
    assert list(targeted_parameters(model, "two")) == ["lm_head.weight"]
    model.set_adapter(["one", "two"])
    found = outputs_of(model, batch)
    with edited(model, "one"), edited(model, "two"):
        assert distance(outputs_of(model, batch), found) < TOLERANCE
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        alone = outputs_of(model, batch)
        with edited(model, adapter):
            assert same(outputs_of(model, batch), alone)
        model.set_adapter(["one", "two"])


def test_a_weight_with_four_owners_is_stored_once(gradiends: Gradiends):
    model = gradiends.fitted("t5", 1.0, target_modules=("shared", "embed_tokens", "lm_head"))
    assert list(targeted_parameters(model, NAME)) == ["shared.weight"]
    (layer,) = gradiend_layers(model).values()
    assert len(layer.owners["weight"]) == 4
    tensors = load_file(gradiends.folder("t5", 1.0, target_modules=("lm_head", "shared")) / "adapter_model.safetensors")
    assert sorted(tensors) == [f"base_model.model.shared.gradiend.gradiend_{k}_weight" for k in ("feature", "offset")]


# ---- with a LoRA ----------------------------------------------------------------------------------------


def _lora_folder(gradiends: Gradiends, name: str, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = gradiends.base(name)
    model.add_adapter(lora(), adapter_name="tuned")
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@wrapping_models
def test_both_orders_of_a_gradiend_and_a_lora_give_the_same(name: str, gradiends: Gradiends, tmp_path: Path):
    folder, batch = _lora_folder(gradiends, name, tmp_path), batch_of(name)
    tuned = gradiends.base(name)
    tuned.load_adapter(folder)
    only_lora, only_gradiend = outputs_of(tuned, batch), outputs_of(gradiends.fitted(name), batch)
    feature = feature_of(targeted_parameters(gradiends.fitted(name), NAME))
    by_hand = edit_by_hand(gradiends.base(name), feature, 1e-2, 1.0, RATE)
    by_hand.load_adapter(folder)
    models = []
    for order in (("gradiend", "lora"), ("lora", "gradiend")):
        model = gradiends.base(name)
        for which in order:
            if which == "lora":
                model.load_adapter(folder, adapter_name="tuned")
            else:
                model.load_adapter(gradiends.folder(name), adapter_name=NAME)
        model.set_adapter([NAME, "tuned"])
        models.append(model)
    first, second = models
    together = outputs_of(first, batch)
    assert same(together, outputs_of(second, batch))
    assert distance(together, outputs_of(by_hand, batch)) < TOLERANCE
    assert set(first.state_dict()) == set(second.state_dict())
    assert list(targeted_parameters(first, NAME)) == list(targeted_parameters(second, NAME))
    for number, model in enumerate(models):
        model.set_adapter("tuned")
        assert same(outputs_of(model, batch), only_lora)
        model.set_adapter(NAME)
        assert same(outputs_of(model, batch), only_gradiend)
        model.save_pretrained(tmp_path / str(number))
        saved = load_file(tmp_path / str(number) / "adapter_model.safetensors")
        assert set(saved) == set(load_file(gradiends.folder(name) / "adapter_model.safetensors"))
        model.delete_adapter("tuned")
        model.delete_adapter(NAME)
        assert same(outputs_of(model, batch), outputs_of(gradiends.base(name), batch))


@wrapping_models
def test_a_feature_fitted_beside_a_lora_has_the_plain_names(name: str, gradiends: Gradiends, tmp_path: Path):
    model = gradiends.base(name)
    model.load_adapter(_lora_folder(gradiends, name, tmp_path), adapter_name="tuned")
    model.add_adapter(config_of(), adapter_name=NAME)
    plain = gradiends.base(name)
    plain.add_adapter(config_of(), adapter_name=NAME)
    assert list(targeted_parameters(model, NAME)) == list(targeted_parameters(plain, NAME))
    fit(model)
    model.set_adapter(NAME)
    assert same(outputs_of(model, batch_of(name)), outputs_of(gradiends.fitted(name), batch_of(name)))


@in_turn("name, verb", WRAPPING_MODELS, ["unload", "merge_and_unload"])
def test_a_gradiend_outlives_a_lora_that_is_merged(name: str, verb: str, gradiends: Gradiends):
    model, batch = gradiends.fitted(name), batch_of(name)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        wrapped = peft.get_peft_model(model, lora(), adapter_name="tuned")
    # PEFT has made only the new adapter active.
    for module in wrapped.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.set_adapter([NAME, "tuned"])
    together = outputs_of(wrapped, batch)
    wrapped.base_model.set_adapter("tuned")
    plain = getattr(wrapped, verb)()
    for layer in gradiend_layers(plain).values():
        layer.set_adapter(NAME)
    assert verify_adapter(plain, NAME, batch)
    assert list(gradiend_layers(plain)) == list(gradiend_layers(gradiends.fitted(name)))
    if verb == "unload":
        assert same(outputs_of(plain, batch), outputs_of(gradiends.fitted(name), batch))
    else:
        assert distance(outputs_of(plain, batch), together) < TOLERANCE


def test_a_lora_merged_over_a_merged_gradiend_stays_when_that_is_unmerged(gradiends: Gradiends):
    model, batch = gradiends.fitted("bert"), batch_of("bert")
    torch.manual_seed(0)
    model.add_adapter(lora(target_modules=["query"]), adapter_name="tuned")
    model.set_adapter("tuned")
    expected = outputs_of(model, batch)
    for layer in gradiend_layers(model).values():
        layer.merge_weights(adapter_names=[NAME])
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    for layer in gradiend_layers(model).values():
        layer.unmerge_weights()
    assert distance(outputs_of(model, batch), expected) < TOLERANCE
    assert not same(outputs_of(model, batch), outputs_of(gradiends.base("bert"), batch))


def test_training_a_lora_over_an_active_gradiend(gradiends: Gradiends):
    model, batch = gradiends.fitted("llama"), batch_of("llama")
    model.add_adapter(lora(), adapter_name="tuned")
    model.set_adapter([NAME, "tuned"])
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n for n in trainable)
    inputs = {k: v for k, v in batch.items() if k != "concept_labels"}
    model(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in trainable.values())


def test_adding_a_lora_warns_that_the_gradiend_went_dark(gradiends: Gradiends):
    model = gradiends.fitted("bert")
    with pytest.warns(
        UserWarning, match=rf"switched the GRADIEND adapter '{NAME}' off.*set_adapter\(\['{NAME}', 'x'\]\)"
    ):
        model.add_adapter(lora(), adapter_name="x")
    assert "is not active" in str(verify_adapter(model, NAME, batch_of("bert")))


def test_a_sticky_gradiend_stays_on(gradiends: Gradiends):
    model, batch = gradiends.fitted("bert", sticky=True), batch_of("bert")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*switched the")
        model.add_adapter(lora(init_lora_weights=True), adapter_name="tuned")
    assert model.active_adapters() == ["tuned"]
    assert distance(outputs_of(model, batch), outputs_of(gradiends.fitted("bert"), batch)) == 0
    assert verify_adapter(model, NAME, batch)
    model.disable_adapters()
    assert same(outputs_of(model, batch), outputs_of(gradiends.base("bert"), batch))


# ---- with an erasure ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def erasure_folder(gradiends: Gradiends, tmp_path_factory: pytest.TempPathFactory):
    def make(name: str, target) -> Path:
        folder = tmp_path_factory.mktemp("erasure")
        model = gradiends.base(name)
        model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=target, affine=False), adapter_name="none")
        fit_concept_erasure(model, small_batches(name), "none", sequential=False, progress=False)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(("name", "target"), [("llama", "all-linear"), ("gpt2", None), ("bert", "all-linear")])
def test_both_orders_of_a_gradiend_and_an_erasure_give_the_same(name: str, target, gradiends, erasure_folder):
    folder, batch = erasure_folder(name, target), batch_of(name)
    feature = feature_of(targeted_parameters(gradiends.fitted(name), NAME))
    by_hand = edit_by_hand(gradiends.base(name), feature, 1e-2, 1.0, RATE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The base model has been trained further")
        by_hand.load_adapter(folder)
    models = []
    for order in (("steering", "erasure"), ("erasure", "steering")):
        model = gradiends.base(name)
        for which in order:
            source = folder if which == "erasure" else gradiends.folder(name)
            model.load_adapter(source, adapter_name=which)
        model.set_adapter(["steering", "erasure"])
        models.append(model)
    first, second = models
    together = outputs_of(first, batch)
    assert same(together, outputs_of(second, batch))
    assert distance(together, outputs_of(by_hand, batch)) < TOLERANCE
    for model in models:
        assert verify_adapter(model, "steering", batch) and verify_adapter(model, "erasure", batch)
        model.delete_adapter("erasure")
        model.set_adapter("steering")
        assert not erasure_layers(model)
        assert same(outputs_of(model, batch), outputs_of(gradiends.fitted(name), batch))


@pytest.mark.parametrize("first", ["erasure", "steering"])
def test_one_kind_is_merged_and_the_other_stays(first: str, gradiends: Gradiends, erasure_folder):
    batch = batch_of("bert")
    model = gradiends.base("bert")
    model.load_adapter(erasure_folder("bert", "all-linear"), adapter_name="erasure")
    model.load_adapter(gradiends.folder("bert"), adapter_name="steering")
    model.set_adapter(["steering", "erasure"])
    together = outputs_of(model, batch)
    tuners = {}
    for name, kind in (("steering", GradiendModel), ("erasure", ConceptErasureModel)):
        tuners[name] = kind.__new__(kind)
        torch.nn.Module.__init__(tuners[name])
        tuners[name].model, tuners[name].peft_config, tuners[name].active_adapter = model, model.peft_config, [name]
        tuners[name].targeted_module_names = []
    if first == "erasure":
        with pytest.raises(ValueError, match=r"beside the GRADIEND adapter 'steering'.*Merge the GRADIEND first"):
            tuners["erasure"].merge_adapter()
        assert same(outputs_of(model, batch), together)
        model.set_adapter("erasure")
        tuners["erasure"].merge_adapter()
        with pytest.raises(ValueError, match=r"an erasure is merged into .*merge it last"):
            tuners["steering"].merge_adapter(adapter_names=["steering"])
        return
    plain = tuners["steering"].merge_and_unload()
    assert list(plain.peft_config) == ["erasure"] and not gradiend_layers(plain)
    assert same(outputs_of(plain, batch), together)
    tuners["erasure"].peft_config = plain.peft_config
    merged = tuners["erasure"].merge_and_unload()
    assert not hasattr(merged, "peft_config")
    assert distance(outputs_of(merged, batch), together) < TOLERANCE
