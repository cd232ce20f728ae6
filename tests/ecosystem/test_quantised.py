"""Both kinds of adapter, and a LoRA to compare with, on bases that a quantiser has packed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_erasure import (
    ConceptErasureConfig,
    GradiendConfig,
    GradiendTrainer,
    GradiendTrainingArguments,
    export_to_lora,
    fit_concept_erasure,
    verify_adapter,
)
from hf_erasure.adapters import erasure_layers, gradiend_layers, targeted_parameters
from hf_erasure.adapters.common import placement
from hf_erasure.adapters.common.placement import dequantised, has_quantised, quantised_modules
from tests.adapters.gradiend import lifecycle as gradiends
from tests.ecosystem.quantised_bases import ARCHITECTURES, KINDS, Bases, load
from tests.fitting.gradiend.language_models import CLASSES, neutral, pairs, tokenizer_of
from tests.small_models import LABELS, distance, outputs_of, same, small_batch, small_batches

TABLE = "Quantised bases"
NAME = "no_gender"
# BERT's erasers are at norms, which stay float; Llama's are at the quantised layers.
TARGETS = {"bert": None, "llama": "all-linear"}

# quanto compiles an extension when int4 is first used, which takes minutes.
_MARKS = {"quanto int4": pytest.mark.slow}
every_kind = pytest.mark.parametrize("kind", [pytest.param(kind, marks=_MARKS.get(kind, ())) for kind in KINDS])
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
# For tests that do not depend on the architecture: each kind with one of them, and each of them with several kinds.
one_architecture = pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        pytest.param(kind, ARCHITECTURES[number % len(ARCHITECTURES)], marks=_MARKS.get(kind, ()))
        for number, kind in enumerate(KINDS)
    ],
)
# Warnings of bitsandbytes and torchao about their own kernels do not matter here.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*deprecated")

Enter = Callable[[str, str, str, str], None]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def erased(
    model: PreTrainedModel, architecture: str, resident_batches: int | None = None, **fields: Any
) -> PreTrainedModel:
    """The model with an erasure that was fitted on it."""
    where = {"target_modules": TARGETS[architecture], **fields}
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=LABELS, **where), adapter_name=NAME)
    fit_concept_erasure(model, small_batches(architecture), NAME, progress=False, resident_batches=resident_batches)
    return model


def about_the_base(records: list[warnings.WarningMessage]) -> list[str]:
    """The warnings about whether the base is the right one."""
    return [str(record.message) for record in records if "fitted" in str(record.message)]


# ---- concept erasure -------------------------------------------------------------------------------------------------


def explained(hidden: Tensor, labels: Tensor) -> float:
    """The share of the labels' variance that least squares finds in activations, in float64.

    Directions below 1e-6 of the largest are left out: they are the rounding of float32.
    """
    x, z = hidden.double().numpy(), labels.double().numpy()[:, None]
    x, z = x - x.mean(0), z - z.mean(0)
    coefficients = np.linalg.lstsq(x, z, rcond=1e-6)[0]
    return float(1 - ((z - x @ coefficients) ** 2).sum() / (z**2).sum())


def readable(model: nn.Module, sites: list[str], architecture: str) -> dict[str, float]:
    """How much of the concept is in the outputs of modules (`explained`), over the rows that erasers are fitted on."""
    seen: dict[str, list[Tensor]] = {site: [] for site in sites}
    labels = []
    handles = [
        model.get_submodule(site).register_forward_hook(lambda m, a, out, s=site: seen[s].append(out[mask]))
        for site in sites
    ]
    for batch in small_batches(architecture):
        mask = batch["attention_mask"].bool()
        labels.append(batch["concept_labels"][:, None].expand_as(mask)[mask])
        outputs_of(model, batch)
    for handle in handles:
        handle.remove()
    return {site: explained(torch.cat(parts), torch.cat(labels)) for site, parts in seen.items()}


@every_architecture
@every_kind
def test_an_erasure_fitted_on_a_quantised_base_erases(kind: str, architecture: str, bases: Bases, matrix: Enter):
    base, batch = bases.load(architecture, kind), small_batch(architecture, seed=5)
    assert quantised_modules(base)
    plain = outputs_of(base, batch)
    model = erased(bases.load(architecture, kind), architecture)
    sites = list(erasure_layers(model))
    assert any(has_quantised(model.get_submodule(site)) for site in sites) == (architecture == "llama")
    assert min(readable(base, sites, architecture).values()) > 0.3
    # An activation is rounded to float32 when it is erased, 2^-24 of its size; R² sums squares over 64 columns.
    assert max(readable(model, sites, architecture).values()) < 1e-6
    assert distance(outputs_of(model, batch), plain) > 0.01
    assert verify_adapter(model, NAME, batch)
    matrix(TABLE, "erasure: attach, fit; the concept is gone at the sites", kind, "same")


@every_kind
def test_batches_that_are_not_resident_give_the_same_on_a_quantised_base(
    kind: str, bases: Bases, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hf_erasure.fitting.forward_passes._SMALLEST", 1)
    fitted = [erasure_layers(erased(bases.load("llama", kind), "llama", resident_batches=bound)) for bound in (None, 1)]
    for site, layer in fitted[0].items():
        found = fitted[1][site].eraser_state(NAME)
        assert all(map(torch.equal, layer.eraser_state(NAME)[:2], found[:2])), site


@every_architecture
@every_kind
def test_an_erasure_is_saved_and_loaded(kind: str, architecture: str, bases: Bases, tmp_path: Path, matrix: Enter):
    model, batch = erased(bases.load(architecture, kind), architecture), small_batch(architecture, seed=5)
    expected = outputs_of(model, batch)
    model.save_pretrained(tmp_path)
    for target, row in ((kind, "erasure: reload onto the same base"), (None, "erasure: reload onto the float32 base")):
        loaded = bases.load(architecture, target)
        plain = outputs_of(bases.load(architecture, target), batch)
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            loaded.load_adapter(tmp_path, NAME)
        assert not about_the_base(records)
        for path, layer in erasure_layers(model).items():
            for ours, theirs in zip(layer.state_of(NAME), erasure_layers(loaded)[path].state_of(NAME), strict=True):
                assert torch.equal(ours, theirs)
        if target == kind:
            assert same(outputs_of(loaded, batch), expected)
        else:  # the same erasers, on activations that differ by the rounding of the weights
            assert distance(outputs_of(loaded, batch), plain) > 0.01
        matrix(TABLE, row, kind, "same")


@one_architecture
def test_an_erasure_is_disabled_and_deleted(kind: str, architecture: str, bases: Bases, matrix: Enter):
    batch = small_batch(architecture, seed=5)
    plain = outputs_of(bases.load(architecture, kind), batch)
    model = erased(bases.load(architecture, kind), architecture)
    with_adapter = outputs_of(model, batch)
    model.disable_adapters()
    assert same(outputs_of(model, batch), plain)
    model.enable_adapters()
    assert same(outputs_of(model, batch), with_adapter)
    model.delete_adapter(NAME)
    assert same(outputs_of(model, batch), plain) and not erasure_layers(model)
    matrix(TABLE, "erasure: disable, enable, delete", kind, "same")


REFUSALS = {
    ("llama", "all-linear", "output"): r"output of 'model.layers.0.self_attn.q_proj' cannot be merged: its weight is",
    ("llama", "all-linear", "input"): r"input of 'model.layers.0.self_attn.q_proj' cannot be merged: its weight is",
    ("llama", None, "output"): r"at 'model.layers.0.input_layernorm' .* goes into 'model.layers.0.self_attn.q_proj', w",
}


@every_kind
def test_merging_an_erasure_is_refused(kind: str, bases: Bases, tmp_path: Path, matrix: Enter):
    batch = small_batch("llama", seed=5)
    for number, ((architecture, target, site), words) in enumerate(REFUSALS.items()):
        folder = tmp_path / str(number)
        erased(bases.load(architecture, kind), architecture, target_modules=target, site=site).save_pretrained(folder)
        model = peft.PeftModel.from_pretrained(bases.load(architecture, kind), folder)
        before = outputs_of(model, batch)
        remedy = r".* quantised.* Use the adapter unmerged, or load the float weights, merge .* and quantise the merged"
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=words + remedy):
                merge()
        assert same(outputs_of(model, batch), before)
        if target is not None:
            with pytest.raises(ValueError, match=words + remedy):
                export_to_lora(model, "default", tmp_path / "lora")
    matrix(TABLE, "erasure: merge", kind, "refused")


def test_what_stands_in_the_way_of_merging_beside_quantised_layers_is_said(bases: Bases, tmp_path: Path):
    """BERT's residual connections prevent the merge with float weights too, so the message does not advise them."""
    erased(bases.load("bert", "quanto int8"), "bert").save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(bases.load("bert", "quanto int8"), tmp_path)
    with pytest.raises(ValueError, match=r"goes into `add`.* Use the adapter unmerged\.$"):
        model.merge_adapter()


# ---- is it the same base? --------------------------------------------------------------------------------------------


@every_architecture
@every_kind
def test_copies_of_one_base_are_recognised(kind: str, architecture: str, bases: Bases, tmp_path: Path, matrix: Enter):
    erased(bases.load(architecture), architecture).save_pretrained(tmp_path)
    copies = [bases.load(architecture, kind), bases.load(architecture, dtype=torch.bfloat16), bases.load(architecture)]
    for model in copies:
        with warnings.catch_warnings(record=True) as records:
            warnings.simplefilter("always")
            model.load_adapter(tmp_path, NAME)
        assert not about_the_base(records)
    other = bases.load(architecture, kind, seed=1)
    if architecture == "llama":  # only the quantised weights differ between the two
        source = bases.load("llama", kind)
        other.model.embed_tokens, other.lm_head = source.model.embed_tokens, source.lm_head
    with pytest.raises(ValueError, match="this is another model"):
        other.load_adapter(tmp_path, NAME)
    assert not erasure_layers(other)
    matrix(TABLE, "erasure of the float32 base: load; another base is refused", kind, "same")


@every_kind
def test_quantised_weights_are_read_as_the_numbers_they_stand_for(kind: str, bases: Bases):
    model, plain = bases.load("llama", kind), bases.load("llama")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        found, expected = dequantised(model.get_submodule(name), "weight"), plain.get_submodule(name).weight
        assert found is not None and found.shape == expected.shape
        # Normal weights in blocks of 32 to 64 with 4 bits each correlate by 0.99 with the originals.
        assert torch.corrcoef(torch.stack([found.float().flatten(), expected.detach().flatten()]))[0, 1] > 0.98


def test_weights_that_cannot_be_read_are_said_to_be(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    erased(bases.load("llama"), "llama").save_pretrained(tmp_path)
    model = bases.load("llama", "quanto int8")
    monkeypatch.setattr(placement, "dequantised", lambda module, name: None)
    with pytest.warns(UserWarning, match=r"could not be checked: none of the 14 weights .*proj.weight'.* quantiser"):
        model.load_adapter(tmp_path, NAME)
    assert verify_adapter(model, NAME, small_batch("llama"))


def test_a_base_that_was_trained_further_is_still_told_from_its_float_copy(bases: Bases, tmp_path: Path):
    """Quantised weights cannot show it; plain weights must, also in a model that has quantised ones."""
    erased(bases.load("bert"), "bert", target_modules=["word_embeddings"]).save_pretrained(tmp_path)
    model = bases.load("bert", "quanto int8")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.add_(0.02 * torch.randn(64, 64))
    with pytest.warns(UserWarning, match="trained further"):
        model.load_adapter(tmp_path, NAME)


# ---- GRADIEND --------------------------------------------------------------------------------------------------------


@every_kind
def test_gradiend_is_refused_at_quantised_weights(kind: str, bases: Bases, matrix: Enter):
    model, batch = bases.load("llama", kind), small_batch("llama", seed=5)
    before = outputs_of(model, batch)
    words = (
        r"'model.layers.0.self_attn.q_proj.weight' is quantised, .* load the float weights, merge the adapter there, "
        r"and quantise the merged model; .* exclude_modules=\['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj'"
    )
    for targets in (None, "all-linear"):
        with pytest.raises(ValueError, match=words):
            model.add_adapter(gradiends.config_of(target_modules=targets), adapter_name=NAME)
    assert not gradiend_layers(model) and same(outputs_of(model, batch), before)
    matrix(TABLE, "GRADIEND: attach to quantised weights", kind, "refused")


def neuron_of(model: PreTrainedModel, folder: Path) -> tuple[GradiendTrainer, float]:
    """Fit the adapter to gradients of the model; return the trainer, and the correlation with the classes of texts."""
    settings = {"disable_tqdm": True, "per_device_train_batch_size": 1, "save_strategy": "no"}
    trainer = GradiendTrainer(
        model,
        args=GradiendTrainingArguments(output_dir=str(folder), **settings),
        train_dataset=pairs("llama"),
        eval_dataset=pairs("llama"),
        neutral_dataset=neutral(),
        tokenizer=tokenizer_of("llama"),
    )
    trainer.train()
    return trainer, trainer.evaluate()["cor"]


@every_kind
def test_gradiend_lives_on_the_float_weights_when_asked(kind: str, bases: Bases, tmp_path: Path, matrix: Enter):
    model, batch = bases.load("llama", kind), small_batch("llama", seed=5)
    plain = outputs_of(bases.load("llama", kind), batch)
    excluded = quantised_modules(model)
    config = GradiendConfig(feature="gender", classes=CLASSES, density=1.0, exclude_modules=excluded)
    model.add_adapter(config, adapter_name=NAME)
    names = set(targeted_parameters(model, NAME))
    assert names == {n for n, p in model.named_parameters() if "norm" in n or "embed_tokens" in n}
    _, correlation = neuron_of(model, tmp_path / "run")
    assert correlation > 0.9  # the bound of the tests on float weights
    model.eval()
    gradiends.steer(model, NAME, learning_rate=gradiends.RATE)
    steered = outputs_of(model, batch)
    assert distance(steered, plain) > 0.01
    model.disable_adapters()
    assert same(outputs_of(model, batch), plain)
    model.enable_adapters()

    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    loaded = bases.load("llama", kind)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        loaded.load_adapter(folder, NAME)
    assert not about_the_base(records)
    assert not [r for r in records if "exclude_modules" in str(r.message)]
    assert same(outputs_of(loaded, batch), steered)
    wrapped = peft.PeftModel.from_pretrained(bases.load("llama", kind), folder)
    assert same(outputs_of(wrapped.merge_and_unload(), batch), steered)
    loaded.delete_adapter(NAME)
    assert same(outputs_of(loaded, batch), plain) and not gradiend_layers(loaded)
    matrix(TABLE, "GRADIEND on the float weights alone: fit, reload, disable, merge, delete", kind, "same")


@one_architecture
def test_gradiend_merges_into_float_weights_which_are_quantised_then(
    kind: str, architecture: str, bases: Bases, tmp_path: Path, matrix: Enter
):
    model, batch = bases.load(architecture), small_batch(architecture, seed=5)
    model.add_adapter(gradiends.config_of(density=1.0), adapter_name=NAME)
    feature = gradiends.fit(model, NAME)
    model.save_pretrained(tmp_path / "adapter")

    quantised = bases.load(architecture, kind)
    before = outputs_of(quantised, batch)
    with pytest.raises(ValueError, match=r"is quantised, and .* load the float weights, merge .* and quantise"):
        quantised.load_adapter(tmp_path / "adapter", NAME)
    assert not gradiend_layers(quantised) and same(outputs_of(quantised, batch), before)
    matrix(TABLE, "GRADIEND: load an adapter of quantised weights", kind, "refused")

    merged = peft.PeftModel.from_pretrained(bases.load(architecture), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    by_hand = gradiends.edit_by_hand(bases.load(architecture), feature, 1.0, 1.0, gradiends.RATE)
    by_hand.save_pretrained(tmp_path / "by_hand")
    found, expected = (load(tmp_path / folder, architecture, kind) for folder in ("merged", "by_hand"))
    for name, module in found.named_modules():
        if has_quantised(module):
            weights = [dequantised(model.get_submodule(name), "weight") for model in (found, expected)]
            # Another order of operations rounds differently: the largest weight of a block of 32 may cross a border.
            assert torch.isclose(*weights, rtol=1e-3, atol=1e-6).float().mean() > 1 - 1 / 32
    edited = outputs_of(found, batch)
    assert distance(edited, outputs_of(expected, batch)) < 0.25 * distance(edited, before)
    matrix(TABLE, "GRADIEND: merge into float32, then quantise", kind, "same")


def test_eight_bit_floats_are_no_plain_weights(bases: Bases):
    """Their scales are in another parameter, without which an edit cannot be written."""
    model = bases.load("llama")
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    assert quantised_modules(model) == ["model.layers.0.self_attn.q_proj"]
    assert dequantised(projection, "weight") is None
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight' is quantised"):
        model.add_adapter(gradiends.config_of(), adapter_name=NAME)


# ---- what a quantiser does to a model that has adapters --------------------------------------------------------------


def test_quantising_in_place_under_adapters(bases: Bases):
    quantization = pytest.importorskip("torchao.quantization", reason="the quantiser of these bases is not installed")
    model, batch = erased(bases.load("llama"), "llama"), small_batch("llama", seed=5)
    expected = outputs_of(model, batch)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert verify_adapter(model, NAME, batch)
    moved = distance(outputs_of(model, batch), expected)
    model.disable_adapters()
    # Outputs move by about as much as those of the plain model do.
    assert moved < 2 * distance(outputs_of(model, batch), outputs_of(bases.load("llama"), batch))

    model = bases.load("llama")
    model.add_adapter(gradiends.config_of(), adapter_name=NAME)
    gradiends.fit(model, NAME)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"q_proj.weight was quantised after .* load the float weights, merge"):
        outputs_of(model, batch)


def test_a_quantiser_that_replaces_modules_takes_their_adapters_away(bases: Bases):
    quanto = pytest.importorskip("optimum.quanto", reason="the quantiser of these bases is not installed")
    for attach in (erased, _steered):
        model = attach(bases.load("llama"), "llama")
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
        found = verify_adapter(model, NAME, small_batch("llama"))
        assert not found and "does not act" in str(found)


def _steered(model: PreTrainedModel, architecture: str) -> PreTrainedModel:
    model.add_adapter(gradiends.config_of(), adapter_name=NAME)
    gradiends.fit(model, NAME)
    return model


# ---- a LoRA on the same bases ----------------------------------------------------------------------------------------


# Only for the table that `make matrix` writes: no code of this package runs here.
@pytest.mark.slow
@every_architecture
@every_kind
def test_a_lora_in_the_same_cells(kind: str, architecture: str, bases: Bases, tmp_path: Path, matrix: Enter):
    batch = small_batch(architecture, seed=5)
    plain = outputs_of(bases.load(architecture, kind), batch)
    torch.manual_seed(0)
    model = bases.load(architecture, kind)
    model.add_adapter(gradiends.lora(), adapter_name="lora")
    with_adapter = outputs_of(model, batch)
    assert distance(with_adapter, plain) > 0.01
    model.disable_adapters()
    assert same(outputs_of(model, batch), plain)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    loaded = bases.load(architecture, kind)
    loaded.load_adapter(tmp_path, "lora")
    assert same(outputs_of(loaded, batch), with_adapter)
    matrix(TABLE, "LoRA: attach, reload, disable", kind, "same")

    wrapped = peft.PeftModel.from_pretrained(bases.load(architecture, kind), tmp_path)
    merged = outputs_of(wrapped.merge_and_unload(), batch)
    if kind.startswith("quanto"):
        assert same(merged, plain)
        outcome = "LoRA is gone after a merge, without a word"
    else:  # a merge into float weights moves outputs by 1e-5
        assert distance(merged, with_adapter) > 0.05
        outcome = "LoRA merges, and the output moves by more than 5 %"
    matrix(TABLE, "LoRA: merge", kind, outcome)
