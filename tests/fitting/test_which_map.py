"""The map of a site if the user names none: affine where a merge can put the mean into a bias, else linear."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

from hf_erasure import ConceptErasureConfig, combine_adapters, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from tests.adapters.lifecycle import MERGE_TOLERANCE
from tests.small_models import (
    _GROUPED,
    ARCHITECTURES,
    LABELS,
    distance,
    outputs_of,
    roughen,
    small_batch,
    small_batches,
    small_model,
)


@functools.cache
def _base(name: str) -> PreTrainedModel:
    if name in ARCHITECTURES:
        return small_model(name)
    made = {
        "bare llama": lambda: hf.LlamaModel(hf.LlamaConfig(**_GROUPED)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
        "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    }
    return roughen(made[name](), torch.Generator().manual_seed(7)).eval()


def fit(name: str, *, sequential: bool = False, **fields: object) -> PreTrainedModel:
    model = copy.deepcopy(_base(name))
    fields = {"task_type": "FEATURE_EXTRACTION" if name == "bare llama" else "CAUSAL_LM"} | fields
    model.add_adapter(ConceptErasureConfig(labels=LABELS, **fields), adapter_name="gender")
    like = name if name in ARCHITECTURES else "llama"
    batches = [small_batch(like, seed=100, rows=48)]
    fit_concept_erasure(model, batches, "gender", sequential=sequential, progress=False)
    return model


def linear_sites(model: nn.Module, name: str = "gender") -> set[str]:
    """The sites whose stored bias is zero."""
    layers = erasure_layers(model, name)
    return {path for path, layer in layers.items() if not bool(layer.eraser_state(name)[2].any())}


EVERY = object()
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@pytest.mark.parametrize(
    ("name", "fields", "linear"),
    [
        ("llama", {}, EVERY),
        ("tied", {}, EVERY),  # a merge may untie the table
        ("bare llama", {}, ()),  # its last norm is returned, so it cannot be merged
        ("bare llama", {"exclude_modules": ["norm"]}, EVERY),
        ("bert", {}, ()),  # post-LN: the norms' outputs are added to the residual
        ("gpt_neox", {}, {"gpt_neox.final_layer_norm"}),  # only the head has no bias
        ("qwen2", {}, {"model.norm", *(f"model.layers.{i}.post_attention_layernorm" for i in range(2))}),
        ("qwen2", {"target_modules": ["q_proj", "o_proj"]}, {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}),
        ("llama", {"target_modules": ["embed_tokens"]}, ()),  # the table is erased row by row
        ("llama", {"target_modules": ["embed_tokens", "self_attn"]}, ()),  # a block's output is added to the residual
        ("llama", {"target_modules": "readers"}, EVERY),
        ("llama", {"target_modules": "writers"}, {f"model.layers.{i}.{name}" for i in range(2) for name in _WRITERS}),
        ("gpt_neox", {"target_modules": "readers", "exclude_modules": ["embed_out", "lm_head"]}, ()),
        ("gpt_neox", {"target_modules": "writers"}, ()),
        ("llama", {"affine": True}, ()),
        ("bert", {"affine": False}, EVERY),
    ],
)
def test_a_site_without_a_place_for_the_mean_gets_a_linear_map(name: str, fields: dict, linear: object) -> None:
    model = fit(name, **fields)
    assert linear_sites(model) == (set(erasure_layers(model)) if linear is EVERY else set(linear))
    assert model.peft_config["gender"].affine is fields.get("affine")  # The configuration keeps the user's value.


@pytest.mark.parametrize(
    ("name", "targets"),
    [("bare llama", None), ("qwen2", None), ("gpt_neox", None), ("qwen2", "readers"), ("gpt_neox", "writers")],
)
def test_what_fitting_chose_merges_without_another_bias(name: str, targets: str | None, tmp_path: Path) -> None:
    excluded = ["norm"] if name == "bare llama" else None
    fit(name, sequential=True, target_modules=targets, exclude_modules=excluded).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(_base(name)), tmp_path)
    batch = small_batch(name if name in ARCHITECTURES else "llama", seed=5)
    shapes = {key: value.shape for key, value in _base(name).state_dict().items()}
    erased = outputs_of(model, batch)
    plain = model.merge_and_unload()
    assert distance(outputs_of(plain, batch), erased) < MERGE_TOLERANCE[torch.float32]
    assert {key: value.shape for key, value in plain.state_dict().items()} == shapes


def test_the_mean_stays_at_every_site() -> None:
    """A linear map moves the mean of the rows that it was fitted on by no more than float32 rounding."""
    model = fit("bare llama", exclude_modules=["norm"])
    seen: dict[str, torch.Tensor] = {}
    for path, layer in erasure_layers(model).items():
        layer.observers["gender"] = lambda hidden, path=path: seen.setdefault(path, hidden)
    batch = small_batch("llama", seed=100, rows=48)
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for path, layer in erasure_layers(model).items():
        layer.observers.clear()
        rows = seen[path][batch["attention_mask"].bool()].double()
        moved = layer.apply_eraser("gender", rows).mean(0) - rows.mean(0)
        assert float((moved.abs() / rows.std(0)).max()) < 1e-5


def test_it_is_found_by_one_pass_and_by_none_where_it_is_said() -> None:
    model, passes, counted = copy.deepcopy(_base("llama")), [], {}
    model.register_forward_hook(lambda *_: passes.append(1))
    batches = small_batches("llama")
    for name, affine in (("said", True), ("open", None)):
        model.add_adapter(ConceptErasureConfig(labels=LABELS, affine=affine), adapter_name=name)
        passes.clear()
        fit_concept_erasure(model, batches, name, sequential=False, progress=False)
        counted[name] = len(passes)
    assert counted["open"] - counted["said"] == 1


def test_a_model_that_no_dummy_input_suits_gets_the_affine_map() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2, bias=False)

        def forward(self, *, vectors: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(vectors))

    model = Own()
    config = ConceptErasureConfig(labels=LABELS, target_modules=["norm"])
    peft.inject_adapter_in_model(config, model, "gender")
    rows = torch.randn(64, 3, 8, generator=torch.Generator().manual_seed(0))
    batch = {"vectors": rows, "concept_labels": torch.arange(64) % 2}
    fit_concept_erasure(model, [batch], "gender", pool="tokens", sequential=False, progress=False)
    assert linear_sites(model) == set()


def test_where_the_mean_lies_in_what_is_erased_the_affine_map_is_taken_unless_linear_was_asked_for() -> None:
    """A concept with one class more than the space has directions."""
    fields = {"labels": [str(i) for i in range(9)], "target_modules": ["down"]}

    def fitted(**more: object) -> nn.Module:
        model = nn.ModuleDict({"down": nn.Linear(4, 8, bias=False)})
        model.forward = lambda *, vectors: model["down"](vectors)  # type: ignore[method-assign]
        peft.inject_adapter_in_model(ConceptErasureConfig(**fields, **more), model, "gender")
        with torch.no_grad():
            model["down"].weight.copy_(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
        vectors = torch.randn(90, 1, 4, generator=torch.Generator().manual_seed(0)) + 3
        batch = {"vectors": vectors, "concept_labels": torch.arange(90) % 9}
        fit_concept_erasure(model, [batch], "gender", pool="tokens", sequential=False, progress=False)
        return model

    with pytest.raises(
        ValueError, match=r"At 'down': affine is False, but the mean of x lies in the span .*affine=True"
    ):
        fitted(affine=False)
    assert linear_sites(fitted()) == set()


def test_combined_ones_have_the_map_of_their_parts() -> None:
    model = fit("llama")
    model.add_adapter(ConceptErasureConfig(concept="other", labels=LABELS), adapter_name="other")
    model.set_adapter(["gender", "other"])
    fit_concept_erasure(model, [small_batch("llama", seed=7, rows=48)], "other", sequential=False, progress=False)
    with pytest.warns(UserWarning, match="combined from erasers"):
        config = combine_adapters(model, ["gender", "other"], "both")
    assert config.affine is None
    assert linear_sites(model, "both") == set(erasure_layers(model))
    model.add_adapter(ConceptErasureConfig(labels=LABELS, affine=True), adapter_name="affine")
    fit_concept_erasure(model, [small_batch("llama", seed=7, rows=48)], "affine", sequential=False, progress=False)
    # Combined with an affine map, the result keeps the bias of the affine one.
    with pytest.warns(UserWarning, match="combined from erasers"):
        combine_adapters(model, ["gender", "affine"], "mixed")
    for layer in erasure_layers(model).values():
        assert torch.equal(layer.eraser_state("mixed")[2], layer.eraser_state("affine")[2])
