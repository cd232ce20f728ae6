"""Adapters whose values come after their modules: from a state dict, onto the meta device, in little memory."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import peft as integration

from hf_erasure.adapters import steer
from tests.lifecycle.verbs import KINDS, MODELS, OF, OURS, TABLE, as_base, base, children, outputs
from tests.small_models import ARCHITECTURES, outputs_of, roughen, same, small_batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", MODELS)
def test_injected_from_a_state_dict(architecture: str, kind: str, matrix):
    """The keys decide where the adapter goes, whatever targets the configuration has."""
    model = OF[kind].added(architecture, "a")
    config, state = model.peft_config["a"], peft.get_peft_model_state_dict(model, adapter_name="a")
    again = base(architecture)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # PEFT's warning that configuration and keys disagree
        peft.inject_adapter_in_model(config, again, "b", state_dict=state)
    peft.set_peft_model_state_dict(again, state, "b")
    assert children(again) == children(model)
    assert same(outputs(again, architecture), outputs(model, architecture))
    matrix(TABLE, "`inject_adapter_in_model(state_dict=…)`", kind, "same")


@pytest.mark.parametrize("kind", OURS)
def test_a_state_dict_of_some_modules_goes_to_these(kind: str):
    """The adapter goes where the keys say, with PEFT's warning; a state dict with missing values is refused."""
    model = OF[kind].added("bert", "a")
    state = peft.get_peft_model_state_dict(model, adapter_name="a")
    half = {key: value for key, value in state.items() if "layer.0." in key}
    again = base("bert")
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        peft.inject_adapter_in_model(model.peft_config["a"], again, "a", state_dict=half)
    assert children(again) == [path for path in children(model) if "layer.0." in path]
    peft.set_peft_model_state_dict(again, half, "a")
    assert not as_base(again, "bert") and not same(outputs(again, "bert"), outputs(model, "bert"))
    missing = dict(list(half.items())[:-1])
    incomplete = base("bert")
    with pytest.warns(RuntimeWarning):
        peft.inject_adapter_in_model(model.peft_config["a"], incomplete, "a", state_dict=half)
    peft.set_peft_model_state_dict(incomplete, missing, "a")
    with pytest.raises(ValueError, match="missing or not finite"):
        outputs(incomplete, "bert")


@pytest.mark.parametrize("kind", OURS)
def test_a_state_dict_of_another_model_is_refused(kind: str):
    model = OF[kind].added("bert", "a")
    state = {f"elsewhere.{key}": v for key, v in peft.get_peft_model_state_dict(model, adapter_name="a").items()}
    again = base("bert")
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="not found in the base model"):
        peft.inject_adapter_in_model(model.peft_config["a"], again, "a", state_dict=state)
    assert as_base(again, "bert") and not children(again)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
@pytest.mark.parametrize("way", ["from_pretrained", "PeftModel.load_adapter", "load_adapter", "inject"])
def test_low_cpu_mem_usage(way: str, architecture: str, kind: str, tmp_path, matrix):
    """Afterwards nothing is on the meta device, and the output is that of ordinary loading."""
    task_type = ARCHITECTURES[architecture].task_type
    model = OF[kind].added(architecture, "default", task_type=task_type)
    model.save_pretrained(tmp_path)
    low, expected = {"low_cpu_mem_usage": True}, outputs(model, architecture)
    again = base(architecture)
    if way == "from_pretrained":
        again = peft.PeftModel.from_pretrained(again, str(tmp_path), "new", **low)
    elif way == "PeftModel.load_adapter":
        again = peft.get_peft_model(again, OF[kind].config(task_type=task_type), "first")
        again.load_adapter(str(tmp_path), "new", **low)
        again.set_adapter("new")
        again.eval()
    elif way == "load_adapter":
        again.load_adapter(str(tmp_path), "new", **low)
    else:
        peft.inject_adapter_in_model(model.peft_config["default"], again, "new", **low)
        state = peft.get_peft_model_state_dict(model, adapter_name="default")
        peft.set_peft_model_state_dict(again, state, "new", **low)
    assert not [name for name, tensor in again.state_dict().items() if tensor.device.type == "meta"]
    assert same(outputs(again, architecture), expected)
    matrix(TABLE, "`low_cpu_mem_usage=True`", kind, "same")


@pytest.mark.parametrize("kind", OURS)
def test_loaded_in_little_memory_the_tensors_are_the_adapters_own(kind: str, tmp_path):
    """They are not views into the file, or into the tensors that the caller passed."""
    model = OF[kind].added("llama", "a")
    state = {key: value.clone() for key, value in peft.get_peft_model_state_dict(model, adapter_name="a").items()}
    again = base("llama")
    peft.inject_adapter_in_model(model.peft_config["a"], again, "a", low_cpu_mem_usage=True)
    peft.set_peft_model_state_dict(again, state, "a", low_cpu_mem_usage=True)
    expected = outputs(again, "llama")
    assert same(expected, outputs(model, "llama"))
    copied = again.state_dict()
    assert all(value.isfinite().all() for key, value in copied.items() if value.is_floating_point())
    assert torch.equal(next(iter(copied.values())), next(iter(model.state_dict().values())))


@pytest.mark.parametrize("road", ["PeftModel.from_pretrained", "load_adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_that_is_given_replaces_the_saved_one(kind: str, road: str, tmp_path):
    """It may be the unfitted configuration that the adapter was made with; ours stays as it was."""
    config = OF[kind].config(task_type="CAUSAL_LM")
    made = peft.get_peft_model(base("llama"), config).eval()
    OF[kind].fit(made, "llama", "default", 0)
    made.save_pretrained(tmp_path)
    if road == "load_adapter":
        model = base("llama")
        model.load_adapter(str(tmp_path), peft_config=config)
    else:
        model = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path), config=config)
    assert model.peft_config["default"].inference_mode
    assert kind == "LoRA" or not config.fitted
    assert same(outputs(model, "llama"), outputs(made, "llama"))


@pytest.mark.parametrize("kind", OURS)
def test_what_a_given_configuration_says_counts(kind: str, tmp_path):
    made = OF[kind].wrapped("llama", "default")
    made.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    config.sticky = True
    if kind == "GRADIEND":
        config.feature_factor = -1.0
        steer(made, "default", feature_factor=-1.0)
    model = peft.PeftModel.from_pretrained(base("llama"), str(tmp_path), config=config)
    assert same(outputs(model, "llama"), outputs(made, "llama"))
    model.add_adapter("other", OF[kind].config())
    model.set_adapter("other")
    assert same(outputs(model, "llama"), outputs(made, "llama"))
    wrong = peft.LoraConfig() if kind == "GRADIEND" else OF[kind].config(site="input")
    with pytest.raises(ValueError, match=r"holds the GRADIEND of .* LoraConfig|fitted with site='output'"):
        peft.PeftModel.from_pretrained(base("llama"), str(tmp_path), config=wrong)
    assert not getattr(wrong, "fitted", False)


@pytest.mark.parametrize("kind", OURS)
def test_what_is_renamed_in_old_checkpoints_is_not_renamed_in_an_adapter(
    kind: str, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    """transformers has renaming patterns for many model types, and applies them to adapters' files too."""
    made = OF[kind].added("bert", "a", modules_to_save=["pooler.dense"], exclude_modules=["pooler.dense"])
    made.save_pretrained(tmp_path)
    renamings = [("encoder.layer", "encoder.block"), ("weight", "gamma"), ("concept_erasure", "x"), ("gradiend", "x")]
    mapping = [WeightRenaming(source, target) for source, target in renamings]
    monkeypatch.setattr(integration, "get_model_conversion_mapping", lambda *_, **__: mapping)
    model = base("bert")
    model.load_adapter(str(tmp_path), "b")
    assert same(outputs(model, "bert"), outputs(made, "bert"))


@pytest.mark.parametrize("kind", OURS)
def test_a_model_type_whose_keys_are_renamed_takes_its_adapters(kind: str, tmp_path):
    """DINOv3's patterns match the name of the parameter in its layer scale, and the names of its blocks."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    plain = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**sizes, image_size=16, patch_size=4))
    plain = roughen(plain, torch.Generator().manual_seed(0)).eval()
    model, batch = copy.deepcopy(plain), small_batch("vit", seed=7)
    targets = r".*layer_scale\d|.*layer\.\d+\.mlp\..*" if kind == "GRADIEND" else ["up_proj", "down_proj"]
    OF[kind].add(model, "vit", "a", target_modules=targets)
    model.save_pretrained(tmp_path)
    again = copy.deepcopy(plain)
    again.load_adapter(str(tmp_path), "b")
    assert same(outputs_of(again, batch), outputs_of(model, batch))
    assert not same(outputs_of(plain, batch), outputs_of(model, batch))


@pytest.mark.parametrize("kind", OURS)
def test_a_model_is_saved_under_its_own_names_after_an_adapter_came_and_went(kind: str, tmp_path):
    """transformers records how the adapter's keys were renamed, and would rename the saved model's keys back."""
    OF[kind].added("llama", "a").save_pretrained(tmp_path / "adapter")
    base("llama").save_pretrained(tmp_path / "base")
    for model in (base("llama"), type(base("llama")).from_pretrained(tmp_path / "base")):
        model.load_adapter(str(tmp_path / "adapter"), "a")
        model.delete_adapter("a")
        model.save_pretrained(tmp_path / "saved")
        assert (
            load_file(tmp_path / "saved/model.safetensors").keys()
            == load_file(tmp_path / "base/model.safetensors").keys()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_model_that_is_left_without_an_adapter_takes_another(kind: str, tmp_path):
    model = OF[kind].wrapped("bert", "a")
    expected = outputs(model, "bert")
    model.save_pretrained(tmp_path)
    model.delete_adapter("a")
    model.load_adapter(str(tmp_path / "a"), "a")
    model.set_adapter("a")
    assert same(outputs(model, "bert"), expected)


OTHERWISE = {
    "a strength": ("erasure", {"strength": 0.5}),
    "a side": ("erasure", {"site": "input"}),
    "a direction": ("GRADIEND", {"feature_factor": -1.0}),
    "never fitted": ("GRADIEND", None),
}


@pytest.mark.parametrize("otherwise", OTHERWISE)
def test_values_are_not_loaded_over_an_adapter_that_reads_them_otherwise(otherwise: str, tmp_path):
    """PEFT keeps the configuration of the adapter on the model, so that of the folder would be lost."""
    kind, fields = OTHERWISE[otherwise]
    where = {"target_modules": ["encoder.layer.0.attention.self.query"], "task_type": "FEATURE_EXTRACTION"}
    OF[kind].wrapped("bert", "a", **where).save_pretrained(tmp_path)
    if fields is None:
        model = peft.get_peft_model(base("bert"), OF[kind].config(**where), "a").eval()
    else:
        model = OF[kind].wrapped("bert", "a", **where, **fields)
    before = outputs(model, "bert")
    with pytest.raises(ValueError, match=r"whose configuration stays, has .*call delete_adapter with this one first"):
        model.load_adapter(str(tmp_path / "a"), "a")
    assert same(outputs(model, "bert"), before)
    model.delete_adapter("a")
    model.load_adapter(str(tmp_path / "a"), "a")


@pytest.mark.parametrize("kind", OURS)
def test_values_of_another_base_are_not_loaded_over_an_adapter(kind: str, tmp_path):
    other = roughen(base("bert"), torch.Generator().manual_seed(99))
    OF[kind].add(other, "bert", "a")
    other.save_pretrained(tmp_path)
    model = OF[kind].wrapped("bert", "a")
    with pytest.raises(ValueError, match="this is another model"):
        model.load_adapter(str(tmp_path), "a")
