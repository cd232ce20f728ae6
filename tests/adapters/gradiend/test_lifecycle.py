"""Models x densities through add, fit, forward, save, load, merge and unload.

The way of loading, the dtype of a merge and the strength do not depend on the model and the density: each cell has one
value of each, in turn, so that every pair with a model or a density occurs.
"""

from __future__ import annotations

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from hf_erasure import verify_adapter
from hf_erasure.adapters import (
    edited,
    features_of,
    gradiend_layers,
    kept_share,
    set_features,
    stated_bytes,
    steer,
    targeted_parameters,
)
from hf_erasure.adapters.gradiend.forward import ForwardWithEdits
from tests.adapters.gradiend.lifecycle import (
    DENSITIES,
    LEFT_OUT,
    MODELS,
    NAME,
    ORACLE_TOLERANCE,
    PAIR,
    RATE,
    Gradiends,
    auto_class,
    batch_of,
    config_of,
    edit_by_hand,
    feature_of,
    fit,
    state_of,
)
from tests.gradiend.data import decode
from tests.in_turn import in_turn
from tests.small_models import distance, outputs_of, same

pytestmark = pytest.mark.lifecycle
every_model = pytest.mark.parametrize("name", MODELS)
every_density = pytest.mark.parametrize("density", DENSITIES)


@every_model
def test_an_adapter_that_was_not_fitted_targets_all_but_heads_and_changes_nothing(name: str, gradiends: Gradiends):
    model, batch = gradiends.base(name), batch_of(name)
    before, all_parameters = outputs_of(model, batch), dict(model.named_parameters())
    model.add_adapter(config_of(), adapter_name=NAME)
    targeted = targeted_parameters(model, NAME)
    assert set(all_parameters) - set(targeted) == LEFT_OUT.get(name, set())
    assert all(targeted[n] is all_parameters[n] for n in targeted)
    assert same(outputs_of(model, batch), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    verified = verify_adapter(model, NAME, batch)
    assert not verified and "never fitted. Call GradiendTrainer(model" in str(verified)


@every_model
def test_a_learning_rate_of_zero_changes_nothing_and_says_so(name: str, gradiends: Gradiends):
    model, batch = gradiends.base(name), batch_of(name)
    before = outputs_of(model, batch)
    model.add_adapter(config_of(), adapter_name=NAME)
    set_features(model, NAME, [feature_of(targeted_parameters(model, NAME))], [PAIR])
    assert same(outputs_of(model, batch), before)
    verified = verify_adapter(model, NAME, batch)
    assert not verified and "learning_rate is 0" in str(verified) and "steer(" in str(verified)


@in_turn("name, density, factor", MODELS, DENSITIES, [1.0, -0.5])
def test_outputs_are_those_of_weights_edited_by_hand(name: str, density: float, factor: float, gradiends: Gradiends):
    model, batch = gradiends.fitted(name, density), batch_of(name)
    feature = feature_of(targeted_parameters(model, NAME))
    steer(model, NAME, feature_factor=factor)
    before = {n: p.clone() for n, p in model.named_parameters()}
    unmerged = outputs_of(model, batch)
    by_hand = edit_by_hand(gradiends.base(name), feature, density, factor, RATE)
    assert distance(unmerged, outputs_of(by_hand, batch)) < ORACLE_TOLERANCE
    assert not same(unmerged, outputs_of(gradiends.base(name), batch))
    with edited(model, NAME):
        assert same(outputs_of(model, batch), unmerged)
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    verified = verify_adapter(model, NAME, batch)
    assert verified and f"feature_factor={factor:g} and learning_rate=0.05" in str(verified)


@every_density
@every_model
def test_the_state_takes_what_was_stated_and_is_saved_once(name: str, density: float, gradiends: Gradiends):
    model = gradiends.base(name)
    model.add_adapter(config_of(density), adapter_name=NAME)
    stated = stated_bytes(model, NAME)
    fit(model)
    state = [part for layer in gradiend_layers(model).values() for part in layer.state_of(NAME)]
    assert sum(part.numel() * part.element_size() for part in state) == stated
    tensors = load_file(gradiends.folder(name, density) / "adapter_model.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == stated
    assert all(".gradiend.gradiend_" in key and "base_layer" not in key for key in tensors)
    assert {t.dtype for t in tensors.values()} == ({torch.float32} if density == 1 else {torch.float32, torch.int32})
    n = sum(parameter.numel() for parameter in targeted_parameters(model, NAME).values())
    changed = sum(edit.values.numel() for layer in gradiend_layers(model).values() for _, edit in layer.edits_of(NAME))
    assert changed == -int(-density * n // 1)


@in_turn("name, density, way", MODELS, DENSITIES, ["from_pretrained", "load_adapter", "PeftModel"])
def test_reloaded_output_is_equal_to_the_bit(name: str, density: float, way: str, gradiends: Gradiends):
    folder, batch = gradiends.folder(name, density), batch_of(name, seed=5)
    if way == "from_pretrained":
        model = auto_class(name).from_pretrained(folder)
    elif way == "load_adapter":
        model = gradiends.base(name)
        model.load_adapter(folder, adapter_name="another_name")
    else:
        model = PeftModel.from_pretrained(gradiends.base(name), folder)
    assert not model.training
    assert same(outputs_of(model, batch), outputs_of(gradiends.fitted(name, density), batch))


@every_model
def test_get_peft_model_goes_the_same_way(name: str, gradiends: Gradiends, tmp_path):
    batch = batch_of(name)
    model = peft.get_peft_model(gradiends.base(name), config_of(), adapter_name=NAME)
    fit(model)
    expected = outputs_of(gradiends.fitted(name), batch)
    assert same(outputs_of(model, batch), expected)
    with model.disable_adapter():
        assert same(outputs_of(model, batch), outputs_of(gradiends.base(name), batch))
    assert same(outputs_of(model, batch), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gradiends.base(name), tmp_path / NAME)
    assert same(outputs_of(loaded, batch), expected)
    assert same(outputs_of(model.unload(), batch), outputs_of(gradiends.base(name), batch))


@in_turn("name, density, dtype", MODELS, DENSITIES, [torch.float32, torch.float64, torch.bfloat16])
def test_merging_equals_the_forward_pass_and_is_undone_to_the_bit(
    name: str, density: float, dtype: torch.dtype, gradiends: Gradiends
):
    base, batch = gradiends.base(name).to(dtype), batch_of(name)
    model = PeftModel.from_pretrained(base, gradiends.folder(name, density))
    unmerged, before = outputs_of(model, batch), state_of(model, name)
    parts = [part for layer in gradiend_layers(model).values() for part in layer.state_of("default")]
    assert {part.dtype for part in parts} <= {torch.float32, torch.int32}
    # One entry of size 0.2 changed by 0.05 and rounded once to 8 bits: 2^-9 * 0.2 / 0.05 = 0.8 %.
    assert kept_share(model, "default") == pytest.approx(1, abs=1e-2 if dtype == torch.bfloat16 else 1e-6)

    model.merge_adapter()
    assert same(outputs_of(model, batch), unmerged)
    assert "merged into the weights" in str(verify_adapter(model, "default", batch))
    model.unmerge_adapter()
    before.assert_same(state_of(model, name))

    plain = model.merge_and_unload()
    assert type(plain) is type(base) and not hasattr(plain, "peft_config")
    assert same(outputs_of(plain, batch), unmerged)
    assert list(plain.state_dict()) == list(type(plain)(plain.config).state_dict())
    assert not any("forward" in module.__dict__ for module in plain.modules())
    assert not any(
        isinstance(value, ForwardWithEdits) for module in plain.modules() for value in module.__dict__.values()
    )


@every_model
def test_a_merged_model_saved_plainly_needs_no_adapter(name: str, gradiends: Gradiends, tmp_path):
    batch = batch_of(name)
    model = PeftModel.from_pretrained(gradiends.base(name), gradiends.folder(name))
    expected = outputs_of(model, batch)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert same(outputs_of(auto_class(name).from_pretrained(tmp_path), batch), expected)


@every_model
def test_set_disable_enable_and_delete(name: str, gradiends: Gradiends):
    # The base is frozen, since PEFT leaves a model frozen when its last adapter is deleted.
    model, batch = gradiends.base(name).requires_grad_(False), batch_of(name)
    plain, untouched = outputs_of(model, batch), state_of(model, name)
    model.load_adapter(gradiends.folder(name), adapter_name="one")
    one = outputs_of(model, batch)
    model.load_adapter(gradiends.folder(name, seed=1), adapter_name="two")
    two = outputs_of(gradiends.fitted(name, seed=1), batch)
    # `load_adapter` of a bare model leaves only the new adapter active.
    assert same(outputs_of(model, batch), two) and not same(one, two)
    model.set_adapter("one")
    assert same(outputs_of(model, batch), one)
    model.disable_adapters()
    assert same(outputs_of(model, batch), plain)
    model.enable_adapters()
    assert same(outputs_of(model, batch), one)
    model.delete_adapter("one")
    model.set_adapter("two")
    assert same(outputs_of(model, batch), two)
    model.delete_adapter("two")
    untouched.assert_same(state_of(model, name))


@pytest.mark.parametrize("keep", [True, False])
@every_density
def test_features_come_back_as_they_were_given(density: float, keep: bool, gradiends: Gradiends):
    model = gradiends.base("bert")
    model.load_adapter(gradiends.folder("bert", density, keep_encoder=keep), adapter_name=NAME)
    parameters = targeted_parameters(model, NAME)
    given = feature_of(parameters, density=density)
    (stored,) = features_of(model, NAME)
    assert stored.pair == PAIR
    for h in (1.0, -0.3):
        expected, found = decode(given.decoder, h), decode(stored.decoder, h)
        assert all(torch.equal(expected[name], found[name]) for name in parameters)
    assert (stored.encoder is not None) == keep
    if stored.encoder is not None:
        generator = torch.Generator().manual_seed(3)
        gradient = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
        assert stored.encoder.encode(gradient) == pytest.approx(given.encoder.encode(gradient), abs=1e-6)
