"""Copies, precisions, compilation, checkpointing, threads and offloading under a GRADIEND adapter."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import accelerate
import peft
import pytest
import torch
from torch import nn

from hf_erasure import verify_adapter
from hf_erasure.adapters import (
    GradiendConfig,
    edited,
    gradiend_layers,
    kept_share,
    set_features,
    stated_bytes,
    steer,
    targeted_parameters,
)
from tests.adapters.gradiend.lifecycle import (
    CLASSES,
    MODELS,
    NAME,
    PAIR,
    RATE,
    Gradiends,
    batch_of,
    config_of,
    feature_of,
    fit,
    state_of,
)
from tests.gradiend.data import decode
from tests.in_turn import in_turn
from tests.small_models import distance, inputs_of, outputs_of, same

every_model = pytest.mark.parametrize("name", MODELS)


# ---- steering -------------------------------------------------------------------------------------------


def test_steering_is_in_place_and_goes_into_the_configuration(gradiends: Gradiends, tmp_path):
    model, batch = gradiends.fitted("bert"), batch_of("bert")
    steer(model, NAME, feature_factor=-1.0, learning_rate=0.01)
    config = model.peft_config[NAME]
    assert (config.feature_factor, config.learning_rate) == (-1.0, 0.01)
    model.save_pretrained(tmp_path)
    loaded = gradiends.base("bert")
    loaded.load_adapter(tmp_path)
    assert same(outputs_of(loaded, batch), outputs_of(model, batch))
    assert not same(outputs_of(loaded, batch), outputs_of(gradiends.fitted("bert"), batch))
    steer(model, NAME, learning_rate=0)
    assert same(outputs_of(model, batch), outputs_of(gradiends.base("bert"), batch))


def test_values_that_cannot_be_used_are_refused(gradiends: Gradiends):
    model = gradiends.fitted("bert")
    before = state_of(model, "bert")
    for bad in ({"learning_rate": float("nan")}, {"feature_factor": float("inf")}, {"pair": ["male", "female"]}):
        with pytest.raises(ValueError, match=r"finite|was not fitted"):
            steer(model, NAME, **{"feature_factor": 0.3, **bad})
        with pytest.raises(ValueError, match=r"finite|was not fitted"), edited(model, NAME, **bad):
            pass
    before.assert_same(state_of(model, "bert"))
    with pytest.raises(ValueError, match=r"not a GRADIEND adapter of this model .*; those here are \['gender'\]"):
        steer(model, "nobody")
    fresh = gradiends.base("bert")
    fresh.add_adapter(config_of(), adapter_name=NAME)
    with pytest.raises(ValueError, match=r"never fitted. Call GradiendTrainer"):
        steer(fresh, NAME, learning_rate=0.1)


@pytest.mark.parametrize("density", [1.0, 0.02])
def test_three_classes_have_three_pairs_of_which_one_acts(density: float, gradiends: Gradiends, tmp_path):
    classes, batch = ["a", "b", "c"], batch_of("bert")
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    model = gradiends.base("bert")
    model.add_adapter(GradiendConfig(classes=classes, density=density), adapter_name=NAME)
    stated = stated_bytes(model, NAME)
    parameters = targeted_parameters(model, NAME)
    features = [feature_of(parameters, seed) for seed in range(3)]
    set_features(model, NAME, features, pairs)
    state = [part for layer in gradiend_layers(model).values() for part in layer.state_of(NAME)]
    assert sum(part.numel() * part.element_size() for part in state) == stated
    steer(model, NAME, learning_rate=RATE)
    seen = []
    for pair in pairs:
        with edited(model, NAME, pair=pair):
            tried = outputs_of(model, batch)
        steer(model, NAME, pair=pair)
        seen.append(outputs_of(model, batch))
        assert same(seen[-1], tried)
    assert not same(seen[0], seen[1]) and not same(seen[1], seen[2])
    model.save_pretrained(tmp_path)
    loaded = gradiends.base("bert")
    loaded.load_adapter(tmp_path, adapter_name=NAME)
    assert loaded.peft_config[NAME].pair == ["b", "c"] and same(outputs_of(loaded, batch), seen[2])


def test_features_pruned_apart_share_one_list_of_positions(gradiends: Gradiends):
    model, batch = gradiends.base("bert"), batch_of("bert")
    model.add_adapter(GradiendConfig(classes=["a", "b", "c"]), adapter_name=NAME)
    parameters = targeted_parameters(model, NAME)
    features = [feature_of(parameters, seed, density=1e-2) for seed in range(2)]
    set_features(model, NAME, features, [("a", "b"), ("a", "c")])
    for feature, pair in zip(features, [("a", "b"), ("a", "c")], strict=True):
        alone = gradiends.base("bert")
        alone.add_adapter(config_of(classes=list(pair)), adapter_name=NAME)
        set_features(alone, NAME, [feature], [pair])
        steer(alone, NAME, learning_rate=RATE)
        steer(model, NAME, learning_rate=RATE, pair=pair)
        assert same(outputs_of(alone, batch), outputs_of(model, batch))


def test_an_edit_is_undone_after_an_exception_too(gradiends: Gradiends):
    model = gradiends.fitted("gpt2")
    before = state_of(model, "gpt2")
    with pytest.raises(KeyboardInterrupt), edited(model, NAME, learning_rate=1.0):
        raise KeyboardInterrupt
    before.assert_same(state_of(model, "gpt2"))


@pytest.mark.parametrize("density", [1.0, 1e-2])
def test_an_edit_of_half_precision_weights_is_undone_to_the_bit(density: float, gradiends: Gradiends):
    model = gradiends.fitted("bert", density).to(torch.bfloat16)
    before = state_of(model, "bert")
    with edited(model, NAME, feature_factor=-3.0, learning_rate=0.3):
        assert not same(outputs_of(model, batch_of("bert")), before.outputs)
    before.assert_same(state_of(model, "bert"))


# ---- precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5"])  # the layer keeps its state in the same way in every architecture
def test_the_state_stays_in_float32(name: str, dtype: torch.dtype, gradiends: Gradiends):
    model, reference = gradiends.fitted(name).to(dtype), gradiends.fitted(name)
    for path, layer in gradiend_layers(model, NAME).items():
        for part, kept in zip(layer.state_of(NAME), gradiend_layers(reference)[path].state_of(NAME), strict=True):
            assert part.dtype == kept.dtype and torch.equal(part, kept)
    outputs = outputs_of(model, batch_of(name))
    loaded = gradiends.base(name).to(dtype)
    loaded.load_adapter(gradiends.folder(name))
    assert same(outputs, outputs_of(loaded, batch_of(name)))


def test_a_small_edit_vanishes_in_bfloat16_and_merging_warns(gradiends: Gradiends):
    """Weights of size 0.2 are 2^-10 apart in bfloat16: changes of 1e-4 are lost, those of 0.05 are not."""
    model = peft.PeftModel.from_pretrained(gradiends.base("bert").to(torch.bfloat16), gradiends.folder("bert", 1.0))
    assert kept_share(model, "default") > 0.99
    assert kept_share(model, "default", learning_rate=1e-4) < 0.75
    # The share by its definition, from the weights.
    wanted = product = 0.0
    before = {n: p.clone().double() for n, p in targeted_parameters(model, "default").items()}
    feature = feature_of(targeted_parameters(model, "default"))
    with edited(model, "default", learning_rate=1e-4):
        for name, parameter in targeted_parameters(model, "default").items():
            delta = 1e-4 * decode(feature.decoder, 1.0)[name].double()
            wanted += float(delta.square().sum())
            product += float((delta * (parameter.double() - before[name])).sum())
    assert kept_share(model, "default", learning_rate=1e-4) == pytest.approx(product / wanted, rel=1e-4)
    steer(model, "default", learning_rate=1e-4)
    assert "of the edit" in str(verify_adapter(model, "default", batch_of("bert")))
    with pytest.warns(UserWarning, match=r"'default' keeps \d\d% of its edit.*float32 copy"):
        model.merge_adapter()


# ---- copies ---------------------------------------------------------------------------------------------


# `torch.save` pickles too, and differs only in how it writes storages: each model has one of the two.
@pytest.mark.parametrize(
    ("name", "way"),
    [(n, "deepcopy") for n in MODELS] + [(n, ("pickle", "torch.save")[i % 2]) for i, n in enumerate(MODELS)],
)
def test_a_copy_is_equal_and_independent(name: str, way: str, gradiends: Gradiends):
    model, batch = gradiends.fitted(name), batch_of(name)
    expected = outputs_of(model, batch)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert same(outputs_of(twin, batch), expected)
    steer(twin, NAME, learning_rate=1.0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert same(outputs_of(model, batch), expected)
    twin.delete_adapter(NAME)
    assert same(outputs_of(model, batch), expected)


# ---- compilation ----------------------------------------------------------------------------------------


# GPT-2 has Conv1D; tests/ecosystem/test_compiled.py has other models and inductor's kernels.
@pytest.mark.parametrize("density", [1.0, 1e-2])
def test_compiles_into_one_graph_and_steers_without_another(density: float, gradiends: Gradiends):
    model, batch = gradiends.fitted("gpt2", density), inputs_of(batch_of("gpt2"))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        expected = model(**batch, use_cache=False)[0]
        assert torch.equal(compiled(**batch, use_cache=False)[0], expected)
        steer(model, NAME, feature_factor=-2.0, learning_rate=0.1)
        steered = model(**batch, use_cache=False)[0]
        assert torch.equal(compiled(**batch, use_cache=False)[0], steered)
    assert len(graphs) == 1 and not torch.equal(steered, expected)
    torch._dynamo.reset()


# ---- gradients ------------------------------------------------------------------------------------------


def _gradients(model: nn.Module, batch, names) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # T5 has dropout in attention, as a function and not a module
    output = model(**inputs_of(batch))
    (output.logits if "logits" in output else output.last_hidden_state).square().mean().backward()
    found = {n.replace(".base_layer", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: found[n].clone() for n in names if n in found}


# An edit is written into a weight (all of it, or at positions) in the same way for every kind of backward pass.
@in_turn("name, checkpointing, density", MODELS, ["none", "reentrant", "not reentrant"], [1.0, 1e-2])
def test_gradients_of_the_base_are_those_at_the_edited_weights(name: str, density, checkpointing, gradiends: Gradiends):
    model, batch = gradiends.fitted(name, density), batch_of(name)
    names = list(targeted_parameters(model, NAME))
    model.requires_grad_(True)
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        if checkpointing == "reentrant" and name != "vit":
            model.enable_input_require_grads()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    with edited(model, NAME):
        expected = _gradients(model, batch, names)
    found = _gradients(model, batch, names)
    assert found.keys() == expected.keys() and len(found) > 10
    for key in expected:
        assert torch.equal(found[key], expected[key]), key
    assert not any(part.requires_grad for layer in gradiend_layers(model).values() for part in layer.state_of(NAME))


# ---- threads --------------------------------------------------------------------------------------------


class _Gate(nn.Module):
    """A module with a weight that waits inside its forward pass, so that a test can suspend one batch there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.inside = threading.Semaphore(0)
        self.doors: dict[int, threading.Event] = {}

    def forward(self, x: torch.Tensor, door: threading.Event | None = None) -> torch.Tensor:
        first = x * self.weight
        self.inside.release()
        if door is not None:
            door.wait(10)
        return first + x * self.weight


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]], ids=str)
def test_threads_that_wait_inside_one_module_see_the_edit_whoever_leaves_first(order: list[int]):
    model = nn.Module()
    model.add_module("gate", _Gate())
    peft.inject_adapter_in_model(GradiendConfig(target_modules=["gate"], density=1.0), model, NAME)
    feature = feature_of(targeted_parameters(model, NAME))
    set_features(model, NAME, [feature], [PAIR])
    steer(model, NAME, learning_rate=RATE)
    value = 1 + RATE * decode(feature.decoder, 1.0)["gate.weight"]
    doors, results = [threading.Event() for _ in range(3)], {}
    original = model.gate.weight
    original.requires_grad_(True)

    def run(number: int) -> None:
        # Runs 0 and 2 record gradients, run 1 does not.
        with torch.set_grad_enabled(number != 1):
            results[number] = model.gate(torch.full((4,), float(number + 1)), doors[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
        assert model.gate.inside.acquire(timeout=10)
    assert model.gate._parameters["weight"] is original
    for number in order:
        doors[number].set()
        threads[number].join(10)
    assert model.gate.weight is original and "weight" not in model.gate.__dict__
    for number in range(3):
        expected = 2 * (number + 1) * value
        assert torch.allclose(results[number], expected, rtol=1e-6)
        assert results[number].requires_grad == (number != 1)
        if number != 1:
            (gradient,) = torch.autograd.grad(results[number].sum(), original)
            assert torch.equal(gradient, torch.full((4,), 2.0 * (number + 1)))


def test_a_module_that_calls_itself_is_edited_once(gradiends: Gradiends):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
            return self(x * self.weight, depth - 1) * self.weight if depth else x

    model = nn.Module()
    model.add_module("nested", Nested())
    peft.inject_adapter_in_model(GradiendConfig(target_modules=["nested"], density=1.0), model, NAME)
    feature = fit(model)
    value = 1 + RATE * decode(feature.decoder, 1.0)["nested.weight"]
    with torch.no_grad():
        assert torch.allclose(model.nested(torch.ones(4)), value**4, rtol=1e-6)
    assert not model.nested.__dict__.keys() & {"weight"}


# ---- offloading -----------------------------------------------------------------------------------------


# A fault in the order of the adapter and accelerate's hooks shows with either kind of hook.
@in_turn("name, where, when", ["llama", "tied_llama", "gpt2", "t5"], ["cpu", "disk"], ["before", "after"])
def test_offloaded_models(name: str, where: str, when: str, gradiends: Gradiends, tmp_path):
    batch = batch_of(name)
    expected = outputs_of(gradiends.fitted(name), batch)
    model = gradiends.base(name)
    if when == "after":
        model.load_adapter(gradiends.folder(name), adapter_name=NAME)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
        model.hf_device_map = {"": "disk"}
    assert any(parameter.is_meta for parameter in model.parameters())
    if when == "before":
        model.load_adapter(gradiends.folder(name), adapter_name=NAME)
    assert not any(part.is_meta for layer in gradiend_layers(model).values() for part in layer.state_of(NAME))
    with torch.no_grad():
        found = model(**inputs_of(batch))
    assert torch.equal(found[0], next(iter(expected.values())))
    with pytest.raises(ValueError, match=r"is offloaded. Load the model on one device"), edited(model, NAME):
        pass
    steer(model, NAME, learning_rate=0)
    with torch.no_grad():
        assert not torch.equal(model(**inputs_of(batch))[0], found[0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dispatched_over_cpu_and_disk(name: str, gradiends: Gradiends, tmp_path):
    batch = batch_of(name)
    expected = outputs_of(gradiends.fitted(name), batch)
    model = gradiends.base(name)
    parts = {"llama": ("model.layers.0", "model.layers.1"), "gpt2": ("transformer.h.0", "transformer.h.1")}[name]
    device_map = {n: "cpu" for n, m in model.named_modules() if n and not any(True for _ in m.children())}
    device_map = {n: d for n, d in device_map.items() if not n.startswith(parts)} | {parts[0]: "cpu", parts[1]: "disk"}
    model = accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    model.load_adapter(gradiends.folder(name), adapter_name=NAME)
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(batch))[0], next(iter(expected.values())))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_peft_model_of_an_offloaded_base(name: str, gradiends: Gradiends):
    batch, base = batch_of(name), gradiends.base(name)
    accelerate.cpu_offload(base, execution_device="cpu")
    model = peft.PeftModel.from_pretrained(base, gradiends.folder(name))
    with torch.no_grad():
        found = model(**inputs_of(batch))[0]
    assert torch.equal(found, next(iter(outputs_of(gradiends.fitted(name), batch).values())))


def test_hooks_of_accelerate_that_come_and_go(gradiends: Gradiends):
    batch = batch_of("bert")
    model = gradiends.fitted("bert")
    expected = outputs_of(model, batch)
    accelerate.cpu_offload(model, execution_device="cpu")
    accelerate.hooks.remove_hook_from_submodules(model)
    assert same(outputs_of(model, batch), expected)
    plain = gradiends.base("bert")
    accelerate.cpu_offload(plain, execution_device="cpu")
    plain.load_adapter(gradiends.folder("bert"), adapter_name=NAME)
    accelerate.hooks.remove_hook_from_submodules(plain)
    assert same(outputs_of(plain, batch), expected)
    plain.delete_adapter(NAME)
    assert same(outputs_of(plain, batch), outputs_of(gradiends.base("bert"), batch))


# ---- generating -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "tied_llama", "gpt2", "t5"])
def test_generating_with_a_cache_equals_generating_without(name: str, gradiends: Gradiends):
    model = gradiends.fitted(name)
    inputs = {k: v for k, v in inputs_of(batch_of(name)).items() if not k.startswith("decoder")}
    ways = [
        model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*ways)
    with edited(model, NAME):
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False), ways[0])


# ---- refusals ---------------------------------------------------------------------------------------------


def test_classes_and_names_of_a_fitted_adapter_are_checked(gradiends: Gradiends):
    model = gradiends.base("bert")
    model.add_adapter(config_of(), adapter_name=NAME)
    before = state_of(model, "bert")
    feature = feature_of(targeted_parameters(model, NAME))
    bad = feature_of({"nothing.weight": nn.Parameter(torch.zeros(2, 2))})
    other_shape = feature_of({"embeddings.LayerNorm.weight": nn.Parameter(torch.zeros(2, 2))})
    infinite = feature_of(targeted_parameters(model, NAME))
    infinite.decoder.weight["embeddings.LayerNorm.weight"][0] = torch.inf
    short = feature_of(targeted_parameters(model, NAME))
    short.decoder.bias["embeddings.LayerNorm.weight"] = torch.ones(1)  # it would be spread over all entries
    cases = [
        ([bad], [PAIR], "block 'nothing.weight'"),
        ([short], [PAIR], r"1 values at 'embeddings\.LayerNorm\.weight', where it keeps"),
        ([other_shape], [PAIR], "has shape"),
        ([infinite], [PAIR], "not finite"),
        ([feature], [("female", "nobody")], "'nobody', which is not among classes"),
        ([feature, feature], [PAIR], "2 features for 1 pairs"),
        ([feature, feature], [PAIR, PAIR], "twice"),
    ]
    for features, pairs, message in cases:
        with pytest.raises(ValueError, match=message):
            set_features(model, NAME, features, pairs)
        before.assert_same(state_of(model, "bert"))
    assert model.peft_config[NAME].classes == CLASSES
    assert distance(before.outputs, outputs_of(model, batch_of("bert", seed=7))) == 0


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_tied_weight_that_is_offloaded_after_a_merge_is_unmerged_for_all_its_owners(
    where: str, gradiends: Gradiends, tmp_path
):
    batch, base = batch_of("tied_llama"), gradiends.base("tied_llama")
    model = peft.PeftModel.from_pretrained(base, gradiends.folder("tied_llama"))
    expected = outputs_of(gradiends.base("tied_llama"), batch)
    model.merge_adapter()
    if where == "cpu":
        accelerate.cpu_offload(base, execution_device="cpu")
    else:
        accelerate.disk_offload(base, tmp_path, execution_device="cpu")
    with torch.no_grad():
        merged = model(**inputs_of(batch))[0]
        model.unmerge_adapter()
        model.base_model.disable_adapter_layers()
        assert torch.equal(model(**inputs_of(batch))[0], next(iter(expected.values())))
    assert not torch.equal(merged, next(iter(expected.values())))
