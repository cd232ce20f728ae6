"""Models that are not from transformers and return plain tensors, as in PEFT's own tests. LoRA is the oracle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_erasure import fit_concept_erasure, verify_adapter
from hf_erasure.adapters import erasure_layers
from hf_erasure.adapters.common.layer import adapter_children
from tests.adapters.gradiend import lifecycle as gradiends
from tests.lifecycle.verbs import KINDS, OF, OURS, children
from tests.small_models import roughen

ROWS = 64
TOLERANCE = 1e-5


class MLP(nn.Module):
    """Returns `(rows, classes)`; some of its layers are in a list or a dictionary of modules."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.sequence = nn.Sequential(nn.ReLU(), nn.Linear(20, 20))
        self.more = nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20)])
        self.named = nn.ModuleDict({"one": nn.Linear(20, 20)})
        self.lin1 = nn.Linear(20, classes)

    def forward(self, X: Tensor) -> Tensor:
        x = self.sequence(self.lin0(X))
        for layer in [*self.more, *self.named.values()]:
            x = layer(x).relu()
        return self.lin1(x)


class Tokens(nn.Module):
    """Returns `(rows, tokens, width)`; an embedding, a `Conv1D` and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(40, 10)
        self.conv1d = Conv1D(12, 10)
        self.norm = nn.LayerNorm(12)

    def forward(self, X: Tensor) -> Tensor:
        return self.norm(self.conv1d(self.emb(X)))


LABELS = torch.arange(ROWS) % 2
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "MLP": (MLP, ["lin0", "lin1"]),
    "wide MLP": (lambda: MLP(classes=20), ["lin0", "sequence.1"]),
    "tokens": (Tokens, ["emb", "conv1d"]),
}


def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return roughen(MODELS[name][0](), torch.Generator().manual_seed(3)).eval()


def batch(name: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name == "tokens":
        return {"X": torch.randint(0, 20, (ROWS, 6), generator=generator) + 20 * LABELS[:, None]}
    return {"X": torch.randn(ROWS, 10, generator=generator) + LABELS[:, None]}


def fit(kind: str, model: Any, name: str, adapter: str, seed: int = 0) -> None:
    if kind == "erasure":
        batches = [{**batch(name, seed), "concept_labels": LABELS}]
        fit_concept_erasure(model, batches, adapter, sequential=False, progress=False)
    elif kind == "GRADIEND":
        gradiends.fit(model, adapter, seed)
    else:
        OF[kind].fit(model, "bert", adapter, seed)


def config(kind: str, name: str, **fields: Any) -> peft.PeftConfig:
    return OF[kind].config(**{"target_modules": MODELS[name][1], "task_type": None, **fields})


def wrapped(kind: str, name: str, *adapters: str, **fields: Any) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        model = peft.get_peft_model(built(name), config(kind, name, **fields), adapters[0])
        for adapter in adapters[1:]:
            model.add_adapter(adapter, config(kind, name, **fields))
    for seed, adapter in enumerate(adapters):
        model.set_adapter(adapter)
        fit(kind, model, name, adapter, seed)
    model.set_adapter(adapters[0])
    return model.eval()


def output(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return model(**batch(name, seed=7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_verbs_of_peft(name: str, kind: str, tmp_path):
    plain = output(built(name), name)
    model = wrapped(kind, name, "a", "ab")
    first = output(model, name)
    model.set_adapter("ab")
    second = output(model, name)
    assert not torch.allclose(first, plain) and not torch.allclose(second, first)
    with model.disable_adapter():
        assert torch.equal(output(model, name), plain)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(built(name), str(tmp_path / "a"), "other")
    again.load_adapter(str(tmp_path / "ab"), "third")
    assert torch.equal(output(again, name), first)
    again.set_adapter("third")
    assert torch.equal(output(again, name), second)
    again.delete_adapter("third")
    assert again.active_adapters == ["other"] and torch.equal(output(again, name), first)
    again.merge_adapter(safe_merge=True)
    torch.testing.assert_close(output(again, name), first, rtol=TOLERANCE, atol=TOLERANCE)
    again.unmerge_adapter()
    assert torch.equal(output(again, name), first) or kind == "LoRA"
    merged = copy.deepcopy(again).merge_and_unload()
    torch.testing.assert_close(output(merged, name), first, rtol=TOLERANCE, atol=TOLERANCE)
    assert [type(m) for m in merged.modules()] == [type(m) for m in built(name).modules()]
    assert torch.equal(output(again.unload(), name), plain) or kind == "LoRA"  # a LoRA's unmerging rounds


@pytest.mark.parametrize("name", MODELS)
def test_an_erasure_is_measured_where_a_model_returns_a_tensor(name: str):
    model = peft.get_peft_model(built(name), config("erasure", name)).eval()
    held_out = [{**batch(name, seed), "concept_labels": LABELS} for seed in (4, 5, 6, 8)]
    report = fit_concept_erasure(model, held_out[:2], sequential=True, eval_batches=held_out, progress=False)
    assert str(report).count("last_hidden_state") == 1
    assert verify_adapter(model, batch=batch(name))
    layer = next(iter(erasure_layers(model).values()))
    one = {"X": batch(name)["X"][:1]}
    # The share is over all rows, since the first row alone may not have changed.
    share = torch.linalg.vector_norm(output(model, name) - output(built(name), name))
    assert layer.concept_erasure_left["default"].shape[1] == 1 and share > 0 and verify_adapter(model, batch=one)


def test_a_change_that_the_first_row_does_not_show_is_a_change():
    """One token of the vocabulary is changed, and it is not in the first row."""
    model = wrapped("GRADIEND", "tokens", "a", target_modules=["emb"])
    layer = model.base_model.model.emb.gradiend
    for key, store in layer.named_children():
        if key.startswith(("gradiend_feature", "gradiend_offset")):
            store["a"][:, : -layer.host.embedding_dim] = 0
    ids = torch.tensor([[1, 2, 3], [1, 2, 39]])
    assert verify_adapter(model, "a", {"X": ids}) and not verify_adapter(model, "a", {"X": ids[:1]})


@pytest.mark.parametrize("target", ["more", "named", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_modules_is_no_target(kind: str, target: str):
    model = built("MLP")
    with pytest.raises(ValueError, match=r"no adapter can be put on it: name the modules in it|is not supported"):
        peft.get_peft_model(model, config(kind, "MLP", target_modules=[target, "lin0"]))
    if kind in OURS:
        assert not children(model) and torch.equal(output(model, "MLP"), output(built("MLP"), "MLP"))
        with pytest.raises(ValueError, match="no adapter can be put on it"):
            peft.get_peft_model(model, config(kind, "MLP", target_modules=f"lin0|{target}"))
        assert not children(model) and not hasattr(model, "peft_config")
        model = peft.get_peft_model(model, config(kind, "MLP", target_modules=["sequence.1", "more.0", "named.one"]))
        assert len(children(model)) == 3


@pytest.mark.parametrize("kind", OURS)
def test_what_fails_half_way_leaves_what_was_on(kind: str):
    model = built("MLP")
    for seed, name in enumerate(("a", "ab")):
        peft.inject_adapter_in_model(config(kind, "MLP"), model, name)
        fit(kind, model, "MLP", name, seed)
    for child in adapter_children(model):
        child.set_adapter(["ab", "a"])
    expected = output(model, "MLP")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Adapter .* was active")
        with pytest.raises(ValueError, match="no adapter can be put on it"):
            peft.inject_adapter_in_model(config(kind, "MLP", target_modules=["lin0", "more"]), model, "third")
    assert torch.equal(output(model, "MLP"), expected) and not adapter_children(model, "third")


@dataclass
class Returned:
    """The output of a custom model."""

    kept: None
    states: list[Tensor]


@pytest.mark.parametrize("kind", OURS)
def test_a_model_that_returns_a_dataclass_is_verified(kind: str):
    class Model(MLP):
        def forward(self, X: Tensor) -> Any:
            return Returned(None, [super().forward(X)])

    model = wrapped(kind, "MLP", "a")
    model.base_model.model.__class__ = Model
    assert verify_adapter(model, "a", batch=batch("MLP"))
    with model.disable_adapter():
        assert not verify_adapter(model, "a", batch=batch("MLP"))
    if kind == "erasure":
        batches = [{**batch("MLP"), "concept_labels": LABELS}]
        with pytest.raises(ValueError, match="returns a Returned without a last_hidden_state"):
            fit_concept_erasure(model, batches, "a", eval_batches=batches, progress=False)


@pytest.mark.parametrize("kind", OURS)
def test_a_layer_has_no_weight_or_features_of_its_own(kind: str):
    """PEFT looks for them in the module that a layer wraps, and our layers do not wrap a module."""
    layer = next(m for m in wrapped(kind, "MLP", "a").modules() if is_layer(m))
    assert not any(hasattr(layer, name) for name in ("weight", "bias", "in_features", "out_features"))


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer)
