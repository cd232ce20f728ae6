"""Both kinds of adapter, and a LoRA beside them, in compiled and exported models and with a static cache."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

from hf_erasure import ConceptErasureConfig, GradiendAdapter, GradiendConfig, fit_concept_erasure
from tests.adapters.gradiend import lifecycle as gradiends
from tests.small_models import LABELS, distance, inputs_of, outputs_of, roughen, same, small_batch, small_batches

TABLE = "Compiled"
FIRST, SECOND = "first", "second"
# Fused kernels sum in another order than eager ones: a rounding of 2^-24 relative for each of some 64 terms, which
# norms and softmax pass on. Gradients go through twice as many sums.
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4

Enter = Callable[[str, str, str, str], None]


@dataclass(frozen=True)
class Adapter:
    """A kind of adapter in one place, on one small model.

    Attributes:
        name: Its name in ids and tables.
        config: Makes its configuration.
        architecture: The model's architecture.
        mergeable: Makes a configuration that can be merged; llama's head has no bias for an affine erasure.
    """

    name: str
    config: Callable[[], peft.PeftConfig]
    architecture: str
    mergeable: Callable[[], peft.PeftConfig]

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def column(self) -> str:
        """Its column in the table."""
        return self.name.split(" ")[0]


def _erasure(**fields: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: ConceptErasureConfig(concept="gender", labels=LABELS, **fields)


def _gradiend(density: float) -> Callable[[], peft.PeftConfig]:
    return lambda: gradiends.config_of(density)


_INPUT = {"target_modules": "all-linear", "site": "input"}
NORMS = Adapter("erasure at norms", _erasure(), "llama", _erasure(affine=False))
LINEAR = Adapter("erasure at inputs of linear layers", _erasure(**_INPUT), "bert", _erasure(**_INPUT))
DENSE = Adapter("GRADIEND dense", _gradiend(1.0), "bert", _gradiend(1.0))
SPARSE = Adapter("GRADIEND sparse", _gradiend(1e-2), "llama", _gradiend(1e-2))
LORA = Adapter("LoRA", gradiends.lora, "llama", gradiends.lora)
ADAPTERS = [NORMS, LINEAR, DENSE, SPARSE, LORA]
STEERED = [DENSE, SPARSE]


def adapters(*usual: Adapter) -> pytest.MarkDecorator:
    """Parametrise over all adapters; those that are not in `usual` run only in the slow tests and `make matrix`."""
    cells = [pytest.param(a, marks=() if a in usual else pytest.mark.slow) for a in ADAPTERS]
    return pytest.mark.parametrize("adapter", cells, ids=str)


# LoRA is only for the table, and slow: with it no code of this package runs.
every_adapter = adapters(NORMS, LINEAR, DENSE, SPARSE)
# For tests that take several seconds: only one place of each kind.
one_of_each = adapters(NORMS, SPARSE)

_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
_TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 48}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def base(architecture: str) -> PreTrainedModel:
    """A model of one layer, so that compiling takes only seconds."""
    if architecture == "bert":
        model: PreTrainedModel = hf.BertModel(hf.BertConfig(**_SIZES, **_TOKENS, **_NO_DROPOUT))
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, **_TOKENS, num_key_value_heads=2, head_dim=8))
    return roughen(model, torch.Generator().manual_seed(1)).eval()


def attach(model: PreTrainedModel, adapter: Adapter, name: str, config: peft.PeftConfig | None = None) -> None:
    """Add an adapter and fit it, with a seed that is the length of its name."""
    config, seed = config or adapter.config(), len(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(config, adapter_name=name)
    if isinstance(config, ConceptErasureConfig):
        fit_concept_erasure(model, small_batches(adapter.architecture, seed=seed), name, progress=False)
    elif isinstance(config, GradiendConfig):
        gradiends.fit(model, name, seed)


def with_two(adapter: Adapter) -> PreTrainedModel:
    """A model with two adapters, each fitted while the other was off; the first is active."""
    model = base(adapter.architecture)
    attach(model, adapter, FIRST)
    model.disable_adapters()
    attach(model, adapter, SECOND)
    model.enable_adapters()
    model.set_adapter(FIRST)
    return model


def merged(adapter: Adapter, folder: Path) -> PreTrainedModel:
    """A plain model into which the first adapter is merged."""
    model = base(adapter.architecture)
    attach(model, adapter, FIRST, adapter.mergeable())
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(base(adapter.architecture), folder).merge_and_unload()


def no_cache(adapter: Adapter) -> dict[str, Any]:
    return {} if adapter.architecture == "bert" else {"use_cache": False}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compilations() -> int:
    """How many graphs were compiled since the test began; with `fullgraph` each compilation makes one graph."""
    return counters["stats"]["unique_graphs"]


def need_inductor() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler, and there is none")


# ---- torch.compile ---------------------------------------------------------------------------------------------------


class Watch:
    """A compiled model and its eager original: counts the compilations after a change, and compares the outputs.

    Args:
        model: The model, which is compiled into one graph.
        batch: Its inputs.
        backend: The backend of `torch.compile`.
        tolerance: The largest difference to the eager output, 0 for equality to the bit.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], backend: str, tolerance: float) -> None:
        self.model, self.batch, self.tolerance = model, batch, tolerance
        self.compiled = torch.compile(model, backend=backend, fullgraph=True)
        self.seen: list[dict[str, Tensor]] = []

    def cost(self) -> int:
        """Run both, and count the compilations."""
        before = compilations()
        found = outputs_of(self.compiled, self.batch)
        spent = compilations() - before
        expected = outputs_of(self.model, self.batch)
        assert distance(found, expected) <= self.tolerance
        self.seen.append(expected)
        return spent


def switch(watch: Watch) -> tuple[int, int, int]:
    """The compilations of the first run, the most after a change of adapters, and those when changes are repeated."""
    model = watch.model
    changes: list[Callable[[], Any]] = [
        lambda: model.set_adapter(SECOND),
        model.disable_adapters,
        lambda: (model.enable_adapters(), model.set_adapter(FIRST)),
    ]
    first = watch.cost()
    costs = []
    for change in changes:
        change()
        costs.append(watch.cost())
    again = 0
    for change in changes:
        change()
        again += watch.cost()
    outputs = watch.seen[:3]
    assert not any(same(outputs[i], outputs[i - 1]) for i in range(3))
    assert all(same(watch.seen[i], watch.seen[i + 3]) for i in range(1, 4)) and same(watch.seen[0], watch.seen[3])
    return first, max(costs), again


# The code that a switch recompiles is the same in both places of an erasure, and for dense and sparse features.
@adapters(LINEAR, SPARSE)
def test_switching_compiles_once_more_at_most(adapter: Adapter, matrix: Enter):
    # Graphs are counted before the backend; "eager" runs them unchanged.
    watch = Watch(with_two(adapter), small_batch(adapter.architecture, seed=5), "eager", 0.0)
    first, most, again = switch(watch)
    assert (first, most, again) == (1, 1, 0)
    matrix(TABLE, "`torch.compile(fullgraph=True)`", adapter.column, "same")
    row = "`set_adapter`, `disable_adapters`, `enable_adapters` after compiling"
    matrix(TABLE, row, adapter.column, "same, one recompilation for each new state")


# Dense and sparse features differ before a graph is made: the factor that steering changes is read in one place.
@pytest.mark.parametrize("adapter", [pytest.param(DENSE, marks=pytest.mark.slow), SPARSE], ids=str)
def test_steering_compiles_nothing_more(adapter: Adapter, matrix: Enter):
    watch = Watch(with_two(adapter), small_batch(adapter.architecture, seed=5), "eager", 0.0)
    assert watch.cost() == 1
    handle = GradiendAdapter.of(watch.model, FIRST)
    for factor, rate in ((-1.0, 0.02), (0.5, 0.03), (2.0, 0.01)):
        handle.steer(feature_factor=factor, learning_rate=rate)
        assert watch.cost() == 0
        assert not same(watch.seen[-1], watch.seen[-2])
    # At 0 the adapter is left out of a new graph; afterwards the old graph is used again.
    handle.steer(learning_rate=0.0)
    assert watch.cost() == 1
    handle.steer(learning_rate=0.02)
    assert watch.cost() == 0
    matrix(TABLE, "`steer` after compiling", adapter.column, "same, no recompilation")


# The slow `test_switching_with_inductor` checks this and more for all adapters.
@pytest.mark.parametrize("adapter", [pytest.param(NORMS, marks=pytest.mark.slow), SPARSE], ids=str)
def test_inductor_computes_what_eager_does(adapter: Adapter):
    need_inductor()
    watch = Watch(with_two(adapter), small_batch(adapter.architecture, seed=5), "inductor", TOLERANCE)
    assert watch.cost() == 1
    if adapter in STEERED:
        GradiendAdapter.of(watch.model, FIRST).steer(feature_factor=-1.0, learning_rate=0.02)
        assert watch.cost() == 0
        assert not same(watch.seen[0], watch.seen[1])


@pytest.mark.slow
@every_adapter
def test_switching_with_inductor(adapter: Adapter):
    need_inductor()
    watch = Watch(with_two(adapter), small_batch(adapter.architecture, seed=5), "inductor", TOLERANCE)
    assert switch(watch) == (1, 1, 0)
    watch.model.set_adapter([FIRST, SECOND])
    assert watch.cost() <= 1


@one_of_each
def test_a_wrapped_model_compiles(adapter: Adapter, tmp_path: Path, matrix: Enter):
    model = base(adapter.architecture)
    attach(model, adapter, FIRST)
    model.save_pretrained(tmp_path)
    wrapped = peft.PeftModel.from_pretrained(base(adapter.architecture), tmp_path).eval()
    watch = Watch(wrapped, small_batch(adapter.architecture, seed=5), "eager", 0.0)
    assert watch.cost() == 1
    with wrapped.disable_adapter():
        assert watch.cost() == 1
    # PEFT makes the LoRA's weights require gradients when it enables the LoRA again.
    again = int(adapter is LORA)
    assert watch.cost() == again
    assert same(watch.seen[0], watch.seen[2]) and not same(watch.seen[0], watch.seen[1])
    outcome = "same, one recompilation" + (", another on the way back" if again else "")
    matrix(TABLE, "`with PeftModel.disable_adapter()` after compiling", adapter.column, outcome)


@pytest.mark.slow
@every_adapter
def test_another_batch_size_compiles_once_more(adapter: Adapter):
    watch = Watch(with_two(adapter), small_batch(adapter.architecture, seed=5, rows=4, length=8), "eager", TOLERANCE)
    assert watch.cost() == 1
    costs = []
    for rows, length in ((6, 8), (7, 8), (9, 8)):
        watch.batch = small_batch(adapter.architecture, seed=5, rows=rows, length=length)
        costs.append(watch.cost())
    assert costs == [1, 0, 0]


# ---- training --------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, run: Callable[..., Any], adapter: Adapter) -> dict[str, Tensor]:
    """The gradients of all the base model's weights."""
    model.zero_grad()
    batch = inputs_of(small_batch(adapter.architecture, seed=5))
    run(**batch, **no_cache(adapter))[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare_gradients(adapter: Adapter, backend: str) -> None:
    model = base(adapter.architecture)
    attach(model, adapter, FIRST)
    model.train().requires_grad_(True)
    expected = gradients(model, model, adapter)
    found = gradients(model, torch.compile(model, backend=backend, fullgraph=True), adapter)
    assert compilations() == 1
    plain = base(adapter.architecture).train()
    without = gradients(plain, plain, adapter)
    names = {name: name.replace(".base_layer", "") for name in expected}
    assert set(names.values()) >= without.keys() and found.keys() >= expected.keys()
    # A pooler, which the loss does not depend on, has no gradient, or a zero gradient if it is compiled.
    assert not any(found[name].any() for name in found.keys() - expected.keys())
    # Softmax does not depend on the bias of keys, whose gradient is only float32 rounding of the other gradients.
    rounding = 1e-6 * max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        scale = GRADIENT_TOLERANCE * float(gradient.norm())
        assert float((found[name] - gradient).norm()) <= max(scale, rounding), name
    moved = [n for n, own in names.items() if own in without and not torch.allclose(expected[n], without[own])]
    assert moved


@one_of_each
def test_training_through_a_compiled_model(adapter: Adapter, matrix: Enter):
    compare_gradients(adapter, "aot_eager")
    matrix(TABLE, "backward through a compiled model", adapter.column, "same")


@pytest.mark.slow
@every_adapter
def test_training_through_inductor(adapter: Adapter):
    need_inductor()
    compare_gradients(adapter, "inductor")


# ---- torch.export ----------------------------------------------------------------------------------------------------


def export(model: PreTrainedModel, adapter: Adapter, file: Path) -> Callable[..., Any]:
    """The model as a program for any number of rows, saved and loaded again."""
    batch = inputs_of(small_batch(adapter.architecture, seed=5))
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes: dict[str, Any] = {name: {0: rows} for name in batch} | dict.fromkeys(no_cache(adapter))
    with torch.no_grad():
        program = torch.export.export(model, (), {**batch, **no_cache(adapter)}, dynamic_shapes=shapes)
    torch.export.save(program, file)
    return torch.export.load(file).module()


def check_export(model: PreTrainedModel, adapter: Adapter, file: Path) -> None:
    run = export(model, adapter, file)
    plain = base(adapter.architecture)
    for rows in (16, 5):
        batch = inputs_of(small_batch(adapter.architecture, seed=6, rows=rows))
        with torch.no_grad():
            found, expected, without = (m(**batch, **no_cache(adapter))[0] for m in (run, model, plain))
        # A program for any number of rows may split a matrix product in another way.
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert not torch.allclose(found, without, rtol=1e-2, atol=1e-2)


# A merged model has no adapter and exports like any model, whichever adapter it had.
@adapters(NORMS, SPARSE)
def test_a_merged_model_is_exported(adapter: Adapter, tmp_path: Path, matrix: Enter):
    check_export(merged(adapter, tmp_path / "adapter"), adapter, tmp_path / "model.pt2")
    matrix(TABLE, "`torch.export` of the merged model", adapter.column, "same")


@one_of_each
def test_a_model_with_an_adapter_is_exported(adapter: Adapter, tmp_path: Path, matrix: Enter):
    """The exported program contains the active adapter."""
    model = base(adapter.architecture)
    attach(model, adapter, FIRST)
    check_export(model, adapter, tmp_path / "model.pt2")
    matrix(TABLE, "`torch.export` with the adapter unmerged", adapter.column, "same")


# ---- static cache ----------------------------------------------------------------------------------------------------


def generate(model: PreTrainedModel, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The tokens that follow prompts of three lengths, and their logits."""
    batch = small_batch("llama", seed=5, rows=3)
    prompt = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    fixed = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    output = model.generate(**prompt, **fixed, return_dict_in_generate=True, **kwargs)
    if "cache_implementation" in kwargs:
        assert isinstance(output.past_key_values, hf.StaticCache)
    return output.sequences, torch.stack(output.logits)


def assert_same_text(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=TOLERANCE, atol=TOLERANCE)


@every_adapter
def test_generating_with_a_static_cache(adapter: Adapter, tmp_path: Path, matrix: Enter):
    adapter = dataclasses.replace(adapter, architecture="llama")
    model = with_two(adapter)
    plain = generate(base("llama"))
    for name in (FIRST, SECOND):
        model.set_adapter(name)
        dynamic = generate(model)
        assert_same_text(generate(model, cache_implementation="static"), dynamic)
        assert not torch.allclose(dynamic[1], plain[1], rtol=1e-2, atol=1e-2)
    matrix(TABLE, "`generate` with a static cache", adapter.column, "same")


@pytest.mark.parametrize("adapter", [NORMS, SPARSE, LORA], ids=str)
def test_a_merged_model_generates_with_a_static_cache(adapter: Adapter, tmp_path: Path):
    model = base("llama")
    attach(model, adapter, FIRST, adapter.mergeable())
    unmerged = generate(model, cache_implementation="static")
    assert_same_text(generate(merged(adapter, tmp_path), cache_implementation="static"), unmerged)


def check_compiled_generation(adapter: Adapter, backend: str) -> None:
    """With a static cache transformers compiles the forward pass itself: only on GPUs, unless it is forced to."""
    model = with_two(dataclasses.replace(adapter, architecture="llama"))
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static"}
    costs = []
    for name in (FIRST, SECOND, FIRST, SECOND):
        model.set_adapter(name)
        expected = generate(model, **static, disable_compile=True)
        before = compilations()
        assert_same_text(generate(model, **static, compile_config=config), expected)
        costs.append(compilations() - before)
    assert costs[0] >= 1 and costs[1] <= costs[0] and costs[2:] == [0, 0]


@one_of_each
def test_generating_with_a_static_cache_compiled(adapter: Adapter, matrix: Enter):
    check_compiled_generation(adapter, "eager")
    row = "`generate` with a static cache and `CompileConfig(fullgraph=True)`"
    matrix(TABLE, row, adapter.column, "same")


@pytest.mark.slow
@every_adapter
def test_generating_with_a_static_cache_and_inductor(adapter: Adapter):
    need_inductor()
    check_compiled_generation(adapter, "inductor")
