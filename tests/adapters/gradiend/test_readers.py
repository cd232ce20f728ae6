"""Weights that a forward pass uses although the module that owns them is not called."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from hf_erasure import GradiendConfig, verify_adapter
from hf_erasure.adapters import edited, gradiend_layers, steer, targeted_parameters
from hf_erasure.adapters.gradiend.forward import Readers
from tests.adapters.gradiend.lifecycle import NAME, fit
from tests.small_models import roughen, small_model

_SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
_SMALL |= {"eos_token_id": 2}
_ATTENTION = {**_SMALL, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
_IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


def _deberta() -> nn.Module:
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    return hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**_ATTENTION, **relative))


def _mamba() -> nn.Module:
    return hf.MambaForCausalLM(hf.MambaConfig(**_SMALL, state_size=4, time_step_rank=4))


def _dbrx() -> nn.Module:
    config = hf.DbrxConfig(
        **{"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32, "pad_token_id": 0},
        attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
    )
    return hf.DbrxForCausalLM(config)


def _mobilebert() -> nn.Module:
    sizes = {"embedding_size": 8, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}
    return hf.MobileBertForMaskedLM(hf.MobileBertConfig(**_ATTENTION, **sizes))


def _wavlm() -> nn.Module:
    sizes = {"conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    small = {key: value for key, value in _ATTENTION.items() if key != "max_position_embeddings"}
    return hf.WavLMModel(hf.WavLMConfig(**small, **sizes, apply_spec_augment=False))


# Way in which a weight is read → a model, and a weight of it that is read in this way.
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a method of the reader": (_deberta, "deberta.encoder.rel_embeddings.weight"),
    "the reader's forward": (_mamba, "backbone.layers.0.mixer.dt_proj.weight"),
    "a parameter of its own name": (_dbrx, "transformer.blocks.0.ffn.experts.mlp.w1"),
    "tied to one that is called": (_mobilebert, "mobilebert.embeddings.word_embeddings.weight"),
    "a function of PyTorch": (_wavlm, "encoder.layers.0.attention.q_proj.weight"),
}
every_way = pytest.mark.parametrize("way", MODELS)


def _inputs(model: Any) -> dict[str, Tensor]:
    if model.main_input_name == "input_ids":
        return {"input_ids": _IDS}
    return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(1))}


def _outputs(model: nn.Module) -> Tensor:
    return next(iter(model(**_inputs(model), return_dict=True).values()))


def _base(way: str) -> nn.Module:
    """A frozen model, as an adapter freezes it: torch uses another kernel for a weight that requires gradients."""
    return roughen(MODELS[way][0](), torch.Generator().manual_seed(0)).eval().requires_grad_(False)


def _attach(model: nn.Module, targets: Any = r".*") -> nn.Module:
    """The model with an adapter that changes every weight of its targets."""
    peft.inject_adapter_in_model(GradiendConfig(target_modules=targets, density=1.0), model, NAME)
    fit(model)
    return model


def _hidden(model: nn.Module) -> list[str]:
    """The parameters that are hidden by an instance attribute of the same name."""
    return [f"{n}.{p}" for n, m in model.named_modules() for p in m._parameters if p in m.__dict__]


@every_way
def test_a_weight_that_is_read_past_its_module_is_changed_for_its_reader(way: str):
    base, name = _base(way), MODELS[way][1]
    # The change must not depend on the module's own forward: it does not run, or does not reach the other reader.
    model = _attach(copy.deepcopy(base), [name.rpartition(".")[0]])
    by_hand = copy.deepcopy(base)
    with edited(model, NAME):
        weights = {n: p.detach().clone() for n, p in targeted_parameters(model, NAME).items()}
    with torch.no_grad():
        for full, value in weights.items():
            by_hand.get_parameter(full).copy_(value)
        assert not torch.equal(_outputs(model), _outputs(base))
        assert torch.equal(_outputs(model), _outputs(by_hand))
    assert not _hidden(model)
    assert verify_adapter(model, NAME, _inputs(model))


@every_way
def test_unmerged_equals_merged_where_all_weights_are_changed(way: str):
    model = _attach(_base(way))
    with torch.no_grad():
        unmerged = _outputs(model)
        for layer in gradiend_layers(model).values():
            layer.merge_weights()
        assert torch.equal(_outputs(model), unmerged)


@every_way
def test_gradients_are_those_at_the_weights_as_they_are_used(way: str):
    model = _attach(_base(way)).requires_grad_(True)
    gradients = []
    for context in (edited(model, NAME), None):
        model.zero_grad()
        if context is None:
            _outputs(model).float().square().mean().backward()
        else:
            with context:
                _outputs(model).float().square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and MODELS[way][1] in gradients[0]
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_recomputing_a_reader_in_the_backward_pass_sees_the_change(reentrant: bool):
    model = _attach(_base("the reader's forward")).requires_grad_(True).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        _outputs(model).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], value) for name, value in gradients[0].items())


def test_a_weight_that_is_read_only_while_tokens_are_generated():
    model = _attach(roughen(hf.Mamba2ForCausalLM(_mamba2()), torch.Generator().manual_seed(0)).eval())

    def scores() -> Tensor:
        out = model.generate(_IDS, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True)
        return torch.stack(out.logits)

    unmerged = scores()
    with edited(model, NAME):
        assert torch.equal(scores(), unmerged)
    steer(model, NAME, learning_rate=0)
    assert not torch.equal(scores(), unmerged)


def _mamba2() -> hf.Mamba2Config:
    return hf.Mamba2Config(**_SMALL, num_heads=4, head_dim=8, state_size=4, n_groups=1, expand=2, chunk_size=8)


def test_an_offloaded_weight_that_its_reader_fetches():
    model = _attach(_base("the reader's forward"))
    with torch.no_grad():
        expected = _outputs(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(_outputs(model), expected)
    assert not _hidden(model)
    assert all(p.device.type == "meta" for p in targeted_parameters(model, NAME).values())


def test_deleting_the_adapter_leaves_no_trace_in_the_readers():
    model = _base("the reader's forward")
    model.add_adapter(GradiendConfig(target_modules=["dt_proj"], density=1.0), adapter_name=NAME)
    fit(model)
    assert any("forward" in module.__dict__ for module in model.modules())
    model.delete_adapter(NAME)
    assert not any("forward" in module.__dict__ for module in model.modules())


# ---- custom modules ----------------------------------------------------------------------------------------------


class _Reader(nn.Module):
    """Reads the weight of `inner` in the way that a subclass defines."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (F.linear(self.other(x), self.weight_of_inner()),)

    def weight_of_inner(self) -> Tensor:
        raise NotImplementedError


class _ByName(_Reader):
    def weight_of_inner(self) -> Tensor:
        return self.inner.weight


class _ByVariable(_Reader):
    def weight_of_inner(self) -> Tensor:
        return next(module for name, module in self.named_children() if name == "inner").weight


class _ByString(_Reader):
    def weight_of_inner(self) -> Tensor:
        return getattr(self.inner, "weight")  # noqa: B009


def _weight_of(module: nn.Module) -> Tensor:
    return module.weight


class _ByFunction(_Reader):
    def weight_of_inner(self) -> Tensor:
        return _weight_of(self.inner)


class _ByProperty(_Reader):
    @property
    def shown(self) -> Tensor:
        return self.inner.weight

    def weight_of_inner(self) -> Tensor:
        return self.shown


class _Projection(nn.Linear):
    def project(self) -> Tensor:
        return self.weight


class _ByMethod(_Reader):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Projection(8, 8)

    def weight_of_inner(self) -> Tensor:
        return self.inner.project()


class _Layer(nn.Linear):
    def apply_to(self, x: Tensor) -> Tensor:
        return super().forward(x)


class _BySuper(_Reader):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Layer(8, 8, bias=False)

    def weight_of_inner(self) -> Tensor:
        return self.inner.apply_to(torch.eye(8)).T


class _ByPosition(_Reader):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ParameterList([nn.Parameter(torch.randn(8, 8))])

    def weight_of_inner(self) -> Tensor:
        return self.inner[0]


def _passed_on(function: Callable) -> Callable:
    def call(self: Any) -> Tensor:
        return function(self)

    return call


class _ByDecorated(_Reader):
    @_passed_on
    def weight_of_inner(self) -> Tensor:
        return self.inner.weight


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def _torch_layer() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))


@pytest.mark.parametrize("with_gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    "build",
    [
        *(_ByName, _ByVariable, _ByString, _ByFunction, _ByProperty, _ByMethod, _BySuper, _ByPosition, _ByDecorated),
        *(_Attention, _Recurrent, _torch_layer),
    ],
)
def test_every_way_of_reading_a_weight(build: Callable[[], nn.Module], with_gradients: bool):
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, 3, 8)
    plain = copy.deepcopy(model).requires_grad_(False)
    _attach(model)
    with torch.set_grad_enabled(with_gradients):
        unmerged = model(x)[0]
        with edited(model, NAME):
            assert torch.equal(model(x)[0], unmerged)
        assert not torch.equal(plain(x)[0], unmerged)
        steer(model, NAME, learning_rate=0)
        assert torch.equal(model(x)[0], plain(x)[0])
    assert not _hidden(model)


def test_a_compiled_reader_sees_the_change_and_steers_without_another_graph():
    model, x = _attach(_ByName()), torch.randn(2, 8)
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for factor in (1.0, -1.0):
            steer(model, NAME, feature_factor=factor)
            with edited(model, NAME):
                expected = model(x)[0]
            assert torch.allclose(compiled(x)[0], expected, atol=1e-6)
    assert graphs.frame_count == 1


def test_what_is_in_place_is_taken_out_when_the_reader_fails():
    class Failing(_ByName):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            assert "weight" in self.inner.__dict__
            raise RuntimeError("no")

    model = _attach(Failing())
    with pytest.raises(RuntimeError, match="no"):
        model(torch.randn(2, 8))
    assert not _hidden(model)


def test_a_reader_and_its_owner_in_two_threads():
    model, x = _attach(_ByName()), torch.randn(2, 8)
    expected = [model(x)[0], model.inner(x)]
    inside, leave = threading.Event(), threading.Event()
    model.other.register_forward_hook(lambda *_: (inside.set(), leave.wait(10))[0])
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(model(x)[0]))
    thread.start()
    assert inside.wait(10)
    assert torch.equal(model.inner(x), expected[1])
    leave.set()
    thread.join()
    assert torch.equal(found[0], expected[0]) and not _hidden(model)


def test_a_weight_that_its_reader_changes_in_place_is_left_to_it():
    class Rescaling(_ByName):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            with torch.no_grad():
                self.inner.weight.div_(2)
            return (self.inner(x),)

    model = _attach(Rescaling())
    before = model.inner.weight.detach().clone()
    model(torch.randn(2, 8))
    assert torch.equal(model.inner.weight, before / 2)


def test_a_weight_that_is_no_attribute_when_it_is_read_is_named():
    class Listing(_Reader):
        def weight_of_inner(self) -> Tensor:
            return dict(self.inner.named_parameters())["weight"]

    class Alone(Listing):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x @ self.weight_of_inner(),)

    for reader in (Listing(), Alone()):  # the second has no other reader, so the whole change is lost
        verified = verify_adapter(_attach(reader), NAME, {"x": torch.randn(2, 8)})
        assert not verified
        assert "acts in part only" in str(verified) and "['inner.weight']" in str(verified)


def test_a_tied_weight_outside_of_the_adapters_model_is_named():
    model = copy.deepcopy(small_model("bert"))
    whole = hf.BertForMaskedLM(model.config)
    _attach(whole.bert, ["word_embeddings"])
    verified = verify_adapter(whole, NAME)
    assert not verified and "['embeddings.word_embeddings.weight'] are read" in str(verified)


def test_a_reader_at_the_root_from_which_accelerate_takes_its_autocast():
    model, x = _attach(_ByName()), torch.randn(2, 8)
    expected, own = model(x)[0], model.forward
    # The state in which `Accelerator.prepare` with mixed precision leaves a model.
    model._original_forward, model.forward = own, accelerate.utils.convert_outputs_to_fp32(own)
    model = accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert torch.equal(model(x)[0], expected)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit"])
def test_no_reader_is_seen_where_every_module_is_called(name: str):
    model = small_model(name)
    readers = Readers(model)
    assert not any(readers.find(module, parameter) for module in model.modules() for parameter in module._parameters)
