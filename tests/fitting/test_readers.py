"""After fitting, no module that reads the hidden state receives the concept, as the tests' own hooks see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from hf_erasure import ConceptErasureConfig, combine_adapters, fit_concept_erasure
from hf_erasure.adapters import site_layers
from tests.breadth.examples import Batch, batch_of, call
from tests.breadth.zoo import build

# As a share of |x| |z|. Activations are float32, and each operation in a sum over rows rounds them by about 1e-7.
NOTHING = 1e-5
# The least that the concept shows where it is not erased.
THERE = 0.01


def model_of(kind: str, auto: Any, target: str | None, **fields: Any) -> Any:
    model = build(kind, auto)
    model.add_adapter(ConceptErasureConfig(labels=["a", "b"], target_modules=target, **fields))
    return model


def batches_of(model: Any) -> list[Batch]:
    return [batch_of(model, seed) for seed in range(3)]


def taken_by(model: Any, names: Iterable[str], batches: list[Batch], *, output: bool = False) -> dict[str, float]:
    """Module → the covariance of its input (or output) with the concept, as a share of `|x| |z|`."""
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    now: dict[str, Tensor] = {}

    def keep(name: str, hidden: Tensor) -> None:
        count = len(now["concept_labels"])
        hidden = hidden.movedim(1, -1) if hidden.dim() == 4 else hidden
        hidden = hidden.detach().double().reshape(count, -1, hidden.shape[-1])
        masks = [m for key, m in now.items() if key.endswith("mask") and m.shape == hidden.shape[:2]]
        counts = masks[0].bool() if masks else torch.ones(hidden.shape[:2], dtype=torch.bool)
        z = now["concept_labels"].double()[:, None].expand(hidden.shape[:2])
        rows.setdefault(name, []).append((hidden[counts], z[counts]))

    handles = []
    for name in names:
        module: nn.Module = model.get_submodule(name)
        if output:
            handles.append(
                module.register_forward_hook(lambda m, a, o, n=name: keep(n, o[0] if isinstance(o, tuple) else o))
            )
        else:
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, a, k, n=name: keep(n, a[0] if a else k["hidden_states"]), with_kwargs=True
                )
            )
    for batch in batches:
        now = batch
        call(model, batch)
    for handle in handles:
        handle.remove()
    found = {}
    for name, parts in rows.items():
        x, z = torch.cat([x for x, _ in parts]), torch.cat([z for _, z in parts])
        x, z = x - x.mean(0), z - z.mean()
        found[name] = float((x.T @ z).norm() / (x.norm() * z.norm() + 1e-300))
    return found


READERS = [
    ("bert", AutoModelForSequenceClassification),
    ("gpt2", AutoModelForCausalLM),
    ("llama", AutoModelForCausalLM),
    ("t5", AutoModelForSeq2SeqLM),
    ("bart", AutoModelForSeq2SeqLM),
    ("qwen3_moe", AutoModelForCausalLM),
    ("mixtral", AutoModelForCausalLM),
    ("gpt_neox", AutoModelForCausalLM),
    ("mamba", AutoModelForCausalLM),
    ("vit", AutoModel),
]


@pytest.mark.parametrize(("kind", "auto"), READERS, ids=[kind for kind, _ in READERS])
def test_no_reader_is_given_the_concept(kind: str, auto: Any) -> None:
    model = model_of(kind, auto, "readers")
    batches, groups = batches_of(model), model.peft_config["default"].fitted_modules
    before = taken_by(model, groups, batches)
    assert before.keys() == set(groups) and max(before.values()) > THERE
    report = fit_concept_erasure(model, batches, pool="tokens", progress=False)
    after = taken_by(model, groups, batches)
    assert {name: value for name, value in after.items() if value > NOTHING} == {}
    config = model.peft_config["default"]
    assert [line.site for line in report.sites if "last_hidden" not in line.site] == list(site_layers(model, "default"))
    assert config.weights.keys() == config.fitted_sites.keys()


def test_a_head_that_changes_what_the_backbone_is_given_is_fitted_with_it() -> None:
    """The classifier of Longformer lets the first token attend to all others, which its backbone alone does not."""
    model = model_of("longformer", AutoModelForSequenceClassification, None)
    batches = batches_of(model)
    assert taken_by(model, ["classifier.dense"], batches)["classifier.dense"] > THERE
    report = fit_concept_erasure(model, batches, progress=False)
    assert report.pool == "cls"
    assert taken_by(model, ["classifier.dense"], batches)["classifier.dense"] < NOTHING


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "qwen3_moe", "opt", "mamba"])
def test_writers_guard_the_residual_stream_at_every_depth(kind: str) -> None:
    model = model_of(kind, AutoModelForCausalLM, "writers")
    batches = batches_of(model)
    fit_concept_erasure(model, batches, pool="tokens", progress=False)
    blocks = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and "expert" not in name]
    names = [f"{blocks[0]}.{index}" for index in range(len(model.get_submodule(blocks[0])))]
    found = taken_by(model, names, batches) | {"last": taken_by(model, names[-1:], batches, output=True)[names[-1]]}
    model.disable_adapters()
    assert max(taken_by(model, names, batches).values()) > THERE
    assert {name: value for name, value in found.items() if value > NOTHING} == {}


@pytest.mark.parametrize(("kind", "auto"), [("bert", AutoModel), ("vit", AutoModel)])
def test_writers_are_refused_where_they_do_not_guard(kind: str, auto: Any) -> None:
    with pytest.raises(ValueError, match="target_modules='readers'"):
        model_of(kind, auto, "writers")


@pytest.mark.parametrize(("kind", "auto"), [("llama", AutoModelForCausalLM), ("bart", AutoModelForSeq2SeqLM)])
def test_ways_of_fitting_readers_agree(kind: str, auto: Any, tmp_path: Any) -> None:
    """The erasers are the same to the bit for any number of resident batches, and when a checkpoint is continued."""
    states = []
    for options in ({}, {"resident_batches": 1}, {"checkpoint_dir": tmp_path}, {"checkpoint_dir": tmp_path}):
        model = model_of(kind, auto, "readers")
        fit_concept_erasure(model, batches_of(model), pool="tokens", progress=False, **options)
        states.append({key: value for key, value in model.state_dict().items() if "concept_erasure" in key})
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(other[key], value) for key, value in states[0].items())


@pytest.mark.parametrize(("kind", "auto"), [("llama", AutoModelForCausalLM), ("bart", AutoModelForSeq2SeqLM)])
def test_a_site_is_looked_at_once_a_pass(kind: str, auto: Any) -> None:
    """The modules that share an eraser count as one visit, also for batches whose tensors are inference tensors."""
    for mode in (torch.no_grad, torch.inference_mode):
        for sequential in (True, False):
            model = model_of(kind, auto, "readers")
            with mode():
                report = fit_concept_erasure(
                    model, batches_of(model), sequential=sequential, pool="tokens", progress=False
                )
            assert {line.visits for line in report.sites if "last_hidden" not in line.site} == {1}, (mode, sequential)


def test_background_and_labels_of_tokens() -> None:
    model = model_of("llama", AutoModelForCausalLM, "readers")
    batches = batches_of(model)
    labelled = [
        {**b, "concept_labels": (b["input_ids"] % 2).masked_fill(b["attention_mask"] == 0, -100)} for b in batches
    ]
    fit_concept_erasure(model, labelled, background=batches, progress=False)
    x = {}
    for name in model.peft_config["default"].fitted_modules:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, a, n=name: x.setdefault(n, []).append(a[0].double()))
    for batch in batches:
        call(model, batch)
    z = torch.cat([b["concept_labels"].flatten() for b in labelled])
    for name, parts in x.items():
        rows = torch.cat([part.flatten(0, -2) for part in parts])[z >= 0]
        value, of = rows - rows.mean(0), z[z >= 0].double() - z[z >= 0].double().mean()
        assert float((value.T @ of).norm() / value.norm() / of.norm()) < NOTHING, name


def test_sites_that_the_labels_do_not_speak_of_go_with_all_their_modules() -> None:
    """Labels of tokens do not apply to pooled activations; as the user did not name the sites, they are left out."""
    model = model_of("bert", AutoModelForSequenceClassification, "readers")
    batches = [
        {**b, "concept_labels": (b["input_ids"] % 2).masked_fill(b["attention_mask"] == 0, -100)}
        for b in batches_of(model)
    ]
    with pytest.warns(UserWarning, match="leaves out"):
        fit_concept_erasure(model, batches, progress=False)
    config = model.peft_config["default"]
    assert "classifier" not in config.fitted_modules and config.weights.keys() == config.fitted_sites.keys()
    assert {name for name, m in model.named_modules() if hasattr(m, "concept_erasure")} == set(config.fitted_modules)
    type(config)(
        **{k: v for k, v in config.to_dict().items() if k not in ("peft_type", "auto_mapping", "peft_version")}
    )


def test_combined_readers_share_erasers_and_erase_both() -> None:
    model = model_of("llama", AutoModelForCausalLM, "readers", sticky=True)
    batches = batches_of(model)
    fit_concept_erasure(model, batches, pool="tokens", progress=False)
    other = [{**b, "concept_labels": (b["input_ids"].sum(1) // 2) % 2} for b in batches]
    model.add_adapter(ConceptErasureConfig(labels=["c", "d"], target_modules="readers"), adapter_name="other")
    fit_concept_erasure(model, other, "other", pool="tokens", progress=False)
    weights = model.peft_config["default"].weights
    given = {"default": batches, "other": other}
    config = combine_adapters(model, ["default", "other"], "both", batches=given, pool="tokens", progress=False)
    assert config.weights == weights and list(site_layers(model, "both")) == list(weights)
    model.delete_adapter("default")
    model.set_adapter("both")
    for labelled in given.values():
        found = taken_by(model, config.fitted_modules, labelled)
        assert {name: value for name, value in found.items() if value > NOTHING} == {}
    model.add_adapter(
        ConceptErasureConfig(labels=["c", "d"], target_modules=r"lm_head", site="input"), adapter_name="named"
    )
    fit_concept_erasure(model, other, "named", pool="tokens", progress=False)
    with pytest.raises(ValueError, match=r"among different modules: .*, or names"):
        combine_adapters(model, ["both", "named"], "all")
