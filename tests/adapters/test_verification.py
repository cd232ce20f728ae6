"""`verify_adapter` says whether an adapter acts, and why if it does not; erasures beside other adapters."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers

from hf_erasure import ConceptErasureConfig, fit_concept_erasure, verify_adapter
from hf_erasure.adapters import erasure_layers, set_strength, set_target
from tests.adapters.lifecycle import NAME, Cell, Lifecycle, config_of, fit, state_of
from tests.small_models import (
    ARCHITECTURES,
    LABELS,
    distance,
    outputs_of,
    same,
    small_batch,
    small_batches,
    small_model,
)

CELL = Cell("bert", "norms", "output")
LINEAR = Cell("bert", "all-linear", "output")


def lora(**fields) -> peft.LoraConfig:
    # With its initial B of zeros a LoRA would do nothing.
    return peft.LoraConfig(r=2, init_lora_weights=False, **{"target_modules": "all-linear", **fields})


# ---- the states of an adapter ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_unfitted_adapter_is_the_identity_and_not_verified(architecture: str, lifecycle: Lifecycle):
    cell = Cell(architecture, "norms", "output")
    model, batch = lifecycle.base(architecture), small_batch(architecture)
    plain = outputs_of(model, batch)
    model.add_adapter(config_of(cell), adapter_name=NAME)
    assert same(outputs_of(model, batch), plain)
    verified = verify_adapter(model, NAME)
    assert not verified and "never fitted. Call fit_concept_erasure" in str(verified)


def test_saving_an_unfitted_adapter_warns_and_loads_as_unfitted(lifecycle: Lifecycle, tmp_path: Path):
    model = lifecycle.base("bert")
    model.add_adapter(config_of(CELL), adapter_name=NAME)
    with pytest.warns(UserWarning, match="'gender'.*was never fitted.*Call fit_concept_erasure"):
        model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert "never fitted" in str(verify_adapter(loaded))
    fit(loaded, "bert", "default")
    assert same(outputs_of(loaded, small_batch("bert")), outputs_of(lifecycle.fitted(CELL), small_batch("bert")))


def test_a_fitted_adapter_is_saved_without_a_warning(lifecycle: Lifecycle, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was never fitted")
        lifecycle.fitted(CELL).save_pretrained(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fitted_adapter_is_verified_with_a_dummy_input(architecture: str, lifecycle: Lifecycle):
    model = lifecycle.fitted(Cell(architecture, "norms", "output"))
    before = state_of(model, architecture)
    verified = verify_adapter(model, NAME)
    assert verified and "erases 'gender'" in str(verified) and "changes the output by" in str(verified)
    assert "No leakage was measured" in str(verified)
    before.assert_same(state_of(model, architecture))


def test_the_text_states_the_leakage_that_was_measured(lifecycle: Lifecycle):
    model = lifecycle.base("llama")
    model.add_adapter(config_of(Cell("llama", "norms", "output")), adapter_name=NAME)
    held_out = small_batches("llama", seed=300)
    fit_concept_erasure(model, small_batches("llama"), NAME, sequential=False, eval_batches=held_out, progress=False)
    text = str(verify_adapter(model, NAME))
    before, after = model.peft_config[NAME].provenance["leakage"]["last_hidden_state"]
    assert f"last_hidden_state {before:.3f} → {after:.3f}" in text and "pre-LN" in text
    model.peft_config[NAME].provenance["leakage"]["last_hidden_state"] = [0.8, -0.06]  # as older versions kept it
    assert "last_hidden_state 0.800 → 0.000" in str(verify_adapter(model, NAME))


def test_a_model_without_a_dummy_input_asks_for_a_batch(lifecycle: Lifecycle):
    model, batch = lifecycle.fitted(CELL), small_batch("bert")

    def only_its_own(_, args: tuple, kwargs: dict) -> None:
        if kwargs["input_ids"].shape != batch["input_ids"].shape:
            raise IndexError("other texts are not taken")

    model.register_forward_pre_hook(only_its_own, with_kwargs=True)
    with pytest.raises(ValueError, match=r"BertModel has no dummy input.*pass batch="):
        verify_adapter(model, NAME)
    assert verify_adapter(model, NAME, batch)


@pytest.mark.parametrize("not_a_model", ["bert-base-uncased", [1], None])
def test_what_is_not_a_model_is_named(not_a_model):
    with pytest.raises(TypeError, match=f"model must be .* got {type(not_a_model).__name__}"):
        verify_adapter(not_a_model, NAME)


def test_every_reason_why_an_adapter_does_not_act(lifecycle: Lifecycle):
    def reason(model, name=NAME) -> str:
        verified = verify_adapter(model, name)
        assert not verified
        return str(verified)

    assert "is not an hf_erasure adapter of this model (BertModel); those here are none" in reason(
        lifecycle.base("bert")
    )
    model = lifecycle.fitted(CELL)
    assert f"is not an hf_erasure adapter of this model (BertModel); those here are ['{NAME}']" in reason(
        model, "nobody"
    )
    model.disable_adapters()
    assert "disabled. Call model.enable_adapters()" in reason(model)
    model.enable_adapters()
    model.load_adapter(lifecycle.folder(LINEAR), adapter_name="other")
    assert f"not active; active is ['other']. Call model.set_adapter('{NAME}')" in reason(model)
    model.set_adapter(NAME)
    layer = next(iter(erasure_layers(model, NAME).values()))
    kept = layer.state_of(NAME)
    layer.restore_state(NAME, tuple(torch.full_like(part, torch.nan) for part in kept))
    assert "missing or not finite" in reason(model)
    layer.restore_state(NAME, tuple(torch.zeros_like(part) for part in kept))
    assert verify_adapter(model, NAME)
    for other in erasure_layers(model, NAME).values():
        other.restore_state(NAME, tuple(torch.zeros_like(part) for part in other.state_of(NAME)))
    assert "the output is the same without it" in reason(model)
    layer.detach()
    assert "1 of its sites are gone" in reason(model)


def test_a_merged_adapter_is_verified(lifecycle: Lifecycle):
    model = peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(LINEAR))
    model.merge_adapter()
    assert "merged into the weights" in str(verify_adapter(model))
    with model.disable_adapter():
        assert same(outputs_of(model, small_batch("bert")), outputs_of(lifecycle.base("bert"), small_batch("bert")))
    assert "changes the output by" in str(verify_adapter(model))


# ---- an erasure among other adapters --------------------------------------------------------------------


def test_adding_a_lora_warns_that_the_erasure_went_dark(lifecycle: Lifecycle):
    model = lifecycle.fitted(CELL)
    with pytest.warns(UserWarning, match=rf"switched the erasure '{NAME}' off.*set_adapter\(\['{NAME}', 'tuned'\]\)"):
        model.add_adapter(lora(), adapter_name="tuned")
    assert "not active" in str(verify_adapter(model, NAME))
    model.set_adapter([NAME, "tuned"])
    assert verify_adapter(model, NAME)


def test_adding_a_second_erasure_warns_too(lifecycle: Lifecycle):
    model = lifecycle.fitted(CELL)
    with pytest.warns(UserWarning, match=rf"set_adapter\(\['{NAME}', 'other'\]\)"):
        model.load_adapter(lifecycle.folder(LINEAR), adapter_name="other")


def test_a_sticky_erasure_stays_on(lifecycle: Lifecycle):
    model = lifecycle.base("bert")
    model.add_adapter(config_of(CELL, sticky=True), adapter_name=NAME)
    fit(model, "bert")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*switched the erasure")
        model.add_adapter(lora(), adapter_name="tuned")
    assert model.active_adapters() == ["tuned"]
    assert verify_adapter(model, NAME)
    batch, plain = small_batch("bert"), outputs_of(lifecycle.base("bert"), small_batch("bert"))
    model.disable_adapters()
    assert same(outputs_of(model, batch), plain)
    model.enable_adapters()
    model.delete_adapter("tuned")
    assert same(outputs_of(model, batch), outputs_of(lifecycle.fitted(CELL), batch))
    model.delete_adapter(NAME)
    assert same(outputs_of(model, batch), plain)


def test_a_sticky_erasure_is_merged_with_the_active_adapter(lifecycle: Lifecycle):
    """It is at other modules than the active adapter, so only the merged outputs would show that it is missing."""
    model = peft.get_peft_model(lifecycle.base("bert"), config_of(CELL, target_modules=["query"], sticky=True), NAME)
    fit(model, "bert")
    model.load_adapter(lifecycle.folder(Cell("bert", "embeddings", "output")), "other")
    model.set_adapter("other")
    batch = small_batch("bert")
    unmerged = outputs_of(model, batch)
    assert distance(outputs_of(model.merge_and_unload(), batch), unmerged) < 1e-5


@pytest.mark.parametrize("site", ["output", "input"])
def test_both_orders_of_an_erasure_and_a_lora_give_the_same(site: str, lifecycle: Lifecycle, tmp_path: Path):
    """A LoRA wraps the Linear that both are on: the erasure acts on their sum, whichever of them came first."""
    cell, batch = Cell("bert", "all-linear", site), small_batch("bert")
    tuned = lifecycle.base("bert")
    tuned.add_adapter(lora(), adapter_name="tuned")
    tuned.save_pretrained(tmp_path / "lora")
    only_lora = outputs_of(tuned, batch)
    models = []
    for order in (("erasure", "lora"), ("lora", "erasure")):
        model = lifecycle.base("bert")
        for which in order:
            if which == "lora":
                model.load_adapter(tmp_path / "lora", adapter_name="tuned")
            else:
                model.load_adapter(lifecycle.folder(cell), adapter_name=NAME)
        model.set_adapter([NAME, "tuned"])
        models.append(model)
    first, second = models
    assert same(outputs_of(first, batch), outputs_of(second, batch))
    assert set(first.state_dict()) == set(second.state_dict())
    for model in models:
        assert not same(outputs_of(model, batch), only_lora)
        model.set_adapter("tuned")
        assert same(outputs_of(model, batch), only_lora)
        model.set_adapter(NAME)
        assert same(outputs_of(model, batch), outputs_of(lifecycle.fitted(cell), batch))
        folder = tmp_path / f"saved-{id(model)}"
        model.save_pretrained(folder)
        plain = lifecycle.base("bert")
        plain.load_adapter(folder)
        assert same(outputs_of(plain, batch), outputs_of(lifecycle.fitted(cell), batch))
        model.delete_adapter("tuned")
        model.delete_adapter(NAME)
        assert same(outputs_of(model, batch), outputs_of(lifecycle.base("bert"), batch))


@pytest.mark.parametrize("order", [("erasure", "lora"), ("lora", "erasure")], ids="-".join)
def test_both_orders_with_add_adapter(order: tuple[str, str], lifecycle: Lifecycle):
    model, batch = lifecycle.base("bert"), small_batch("bert")
    for which in order:
        torch.manual_seed(0)
        model.add_adapter(lora() if which == "lora" else config_of(LINEAR), adapter_name=which)
    model.set_adapter(["lora"])
    fit(model, "bert", "erasure")
    model.set_adapter(["erasure", "lora"])
    assert verify_adapter(model, "erasure")
    # The erasure is fitted beside an active LoRA, and erases the LoRA's output too.
    layers = erasure_layers(model, "erasure")
    assert all(isinstance(layer.host, peft.tuners.lora.LoraLayer) for layer in layers.values())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    path, layer = next(iter(layers.items()))
    seen = []
    layer.host.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs_of(model, batch)
    right, mean = layer.concept_erasure_right["erasure"], layer.concept_erasure_bias["erasure"]
    assert float(((seen[0] - mean) @ right.T).abs().max()) < 1e-4, path


@pytest.mark.parametrize("verb", ["unload", "merge_and_unload"])
def test_an_erasure_outlives_a_lora_that_is_merged(verb: str, lifecycle: Lifecycle):
    model, batch = lifecycle.fitted(LINEAR), small_batch("bert")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        wrapped = peft.get_peft_model(model, lora(), adapter_name="tuned")
    wrapped.base_model.set_adapter("tuned")
    together = outputs_of(wrapped, batch)
    plain = getattr(wrapped, verb)()
    assert verify_adapter(plain, NAME)
    assert list(erasure_layers(plain)) == list(erasure_layers(lifecycle.fitted(LINEAR)))
    if verb == "unload":
        assert same(outputs_of(plain, batch), outputs_of(lifecycle.fitted(LINEAR), batch))
    else:
        assert distance(outputs_of(plain, batch), together) < 1e-5


# ---- concepts of more than two classes ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_eraser_of_rank_two_reloads_to_the_bit(dtype: torch.dtype, lifecycle: Lifecycle, tmp_path: Path):
    model = lifecycle.base("bert").to(dtype)
    model.add_adapter(ConceptErasureConfig(concept="place", labels=["a", "b", "c"], target_modules="all-linear"))
    batches = small_batches("bert")
    for batch in batches:
        batch["concept_labels"] = batch["input_ids"].sum(1) % 3
    fit_concept_erasure(model, batches, sequential=False, progress=False)
    assert {site["rank"] for site in model.peft_config["default"].fitted_sites.values()} == {2}
    model.save_pretrained(tmp_path)
    loaded = lifecycle.base("bert").to(dtype)
    loaded.load_adapter(tmp_path)
    assert same(outputs_of(loaded, small_batch("bert")), outputs_of(model, small_batch("bert")))


@pytest.mark.parametrize("change", [lambda m: set_strength(m, NAME, 0.5), lambda m: set_target(m, NAME, "male")])
def test_figures_of_fitting_are_said_to_be_those_of_the_whole_erasure(change):
    model, batches = copy.deepcopy(small_model("bert")), small_batches("bert")
    model.add_adapter(ConceptErasureConfig(labels=LABELS), adapter_name=NAME)
    fit_concept_erasure(model, batches, NAME, eval_batches=small_batches("bert", seed=200), progress=False)
    assert "when fitted: worst" in verify_adapter(model, NAME).text
    change(model)
    assert "when fitted, with strength 1 and without a target: worst" in verify_adapter(model, NAME).text
