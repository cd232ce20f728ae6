"""Strength and target: their effect on activations, in the model, in merged weights, in files and beside adapters.

Outputs are compared up to `MERGE_TOLERANCE`, the float32 rounding of the small models. Readings are compared up to
1e-4 of the distance between the classes.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_erasure import (
    ConceptErasureConfig,
    combine_adapters,
    export_to_lora,
    fit_concept_erasure,
    set_strength,
    set_target,
    verify_adapter,
)
from hf_erasure.adapters import erasure_layers, site_layers
from tests.adapters.lifecycle import MERGE_TOLERANCE
from tests.small_models import LABELS, distance, outputs_of, same, small_batch, small_batches, small_model

NAME = "gender"
TOLERANCE = MERGE_TOLERANCE[torch.float32]


def base(architecture: str) -> PreTrainedModel:
    return copy.deepcopy(small_model(architecture))


@functools.cache
def _fitted(architecture: str, **fields: Any) -> PreTrainedModel:
    model = base(architecture)
    task = "FEATURE_EXTRACTION" if architecture == "bert" else "CAUSAL_LM"
    model.add_adapter(ConceptErasureConfig(**{"labels": LABELS, "task_type": task} | fields), adapter_name=NAME)
    batch = small_batch(architecture, seed=100, rows=48)
    fit_concept_erasure(model, [batch], NAME, sequential=False, progress=False)
    return model


def fitted(architecture: str = "gpt_neox", **fields: Any) -> PreTrainedModel:
    """A model with a fitted erasure; its linear layers have biases, which can hold what strength and target add."""
    return copy.deepcopy(_fitted(architecture, **{"target_modules": "all-linear"} | fields))


def saved(model: PreTrainedModel, folder: Path, **changed: Any) -> Path:
    """Save the adapter to a folder, and change some fields of the saved configuration."""
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return folder


def loaded(architecture: str, folder: Path, **options: Any) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(base(architecture), folder, adapter_name=NAME, **options)


def activations(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The activation at each site while no eraser acts."""
    seen: dict[str, Tensor] = {}
    layers = erasure_layers(model, NAME)
    for path, layer in layers.items():
        layer.observers[NAME] = lambda hidden, path=path: seen.setdefault(path, hidden)
    outputs_of(model, batch)
    for layer in layers.values():
        layer.observers.clear()
    return seen


def state(model: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    return {path: layer.eraser_state(NAME) for path, layer in site_layers(model, NAME).items()}


# ---- definitions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_strength_scales_what_is_subtracted(strength: float) -> None:
    model, batch = fitted(), small_batch("gpt_neox", seed=5)
    plain = activations(model, batch)
    full = {path: layer.apply_eraser(NAME, plain[path]) for path, layer in erasure_layers(model).items()}
    set_strength(model, NAME, strength)
    assert model.peft_config[NAME].strength == strength
    for path, layer in erasure_layers(model).items():
        expected = plain[path] + strength * (full[path] - plain[path])
        torch.testing.assert_close(layer.apply_eraser(NAME, plain[path]), expected, rtol=1e-4, atol=1e-5)
    if strength == 0:
        assert same(outputs_of(model, batch), outputs_of(base("gpt_neox"), batch))


def test_at_strength_one_the_stored_tensors_themselves_act() -> None:
    model, batch = fitted(), small_batch("gpt_neox", seed=5)
    before, stored = outputs_of(model, batch), state(model)
    set_strength(model, NAME, 0.5)
    assert not same(outputs_of(model, batch), before)
    set_strength(model, NAME, 1)
    assert same(outputs_of(model, batch), before)
    for path, layer in site_layers(model, NAME).items():
        assert all(a is b for a, b in zip(layer.eraser_state(NAME), stored[path], strict=True))
        assert layer.concept_erasure_left[NAME] is stored[path][0]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "bert"])
def test_a_target_gives_every_state_the_reading_of_its_class(architecture: str, affine: bool, tmp_path: Path) -> None:
    model = fitted(architecture, target_modules=None, affine=affine)
    batch = small_batch(architecture, seed=100, rows=48)
    plain = activations(model, batch)
    real, labels = batch["attention_mask"].bool(), batch["concept_labels"]
    for target, weights in (("male", [0.0, 1.0]), ("female", [1.0, 0.0]), ([0.25, 0.75], [0.25, 0.75])):
        moved = loaded(architecture, saved(model, tmp_path / str(target), target=target))
        assert moved.peft_config[NAME].target == target
        for path, layer in erasure_layers(moved).items():
            left, right, _ = layer.eraser_state(NAME)
            if not right.shape[0]:
                continue
            rows, ids = plain[path][real].double(), labels[:, None].expand_as(real)[real]
            reads = rows @ right.double().T
            means = torch.stack([reads[ids == label].mean(0) for label in (0, 1)])
            goal = (torch.tensor(weights, dtype=torch.float64)[:, None] * means).sum(0)
            apart = float((means[1] - means[0]).abs().max())
            found = layer.apply_eraser(NAME, rows.float()).double() @ right.double().T
            assert float((found - goal).abs().max()) < 1e-4 * max(apart, float(reads.abs().max()))
            # The parts that are not read stay: rows move only along the columns of `left`.
            rest = rows - layer.apply_eraser(NAME, rows.float()).double()
            along = torch.linalg.lstsq(left.double(), rest.T).solution
            assert float((rest.T - left.double() @ along).abs().max()) < 1e-4 * float(rows.abs().max())


def test_a_target_of_values_is_where_regression_says(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Linear(6, 6)

        def forward(self, *, vectors: Tensor) -> Tensor:
            return self.norm(vectors)

    model = Own()
    peft.inject_adapter_in_model(ConceptErasureConfig(concept_dim=2, target_modules=["norm"]), model, NAME)
    config = model.peft_config[NAME]
    vectors, values = (torch.randn(200, 1, size, generator=generator) for size in (6, 2))
    vectors = vectors + values @ torch.randn(2, 6, generator=generator) + 1
    batch = {"vectors": vectors, "concept_labels": values}
    fit_concept_erasure(model, [batch], NAME, sequential=False, progress=False)
    assert config.readings == ["0", "1", "2"]
    (layer,) = erasure_layers(model).values()
    rows = activations_of(layer, model, vectors)[:, 0].double()
    config.target = [0.5, -2.0]
    layer.erasures[NAME].dial = config.dial
    right = layer.eraser_state(NAME)[1].double()
    design = torch.cat([values[:, 0].double(), torch.ones(200, 1, dtype=torch.float64)], dim=1)
    regression = torch.linalg.lstsq(design, rows @ right.T).solution
    goal = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64) @ regression
    torch.testing.assert_close(
        (layer.apply_eraser(NAME, rows.float()).double() @ right.T), goal.expand(200, -1), atol=1e-4, rtol=1e-4
    )


def activations_of(layer: Any, model: nn.Module, vectors: Tensor) -> Tensor:
    seen: list[Tensor] = []
    layer.observers[NAME] = lambda hidden: seen.append(hidden) or hidden
    with torch.no_grad():
        model(vectors=vectors)
    layer.observers.clear()
    return seen[0]


# ---- in weights and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [{"strength": 0.5}, {"strength": 2.0}, {"target": "male"}, {"strength": 0.5, "target": "female"}]
)
@pytest.mark.parametrize("site", ["output", "input"])
def test_a_merge_and_an_export_are_of_what_acts(site: str, changed: dict, tmp_path: Path) -> None:
    model, batch = fitted(site=site), small_batch("gpt_neox", seed=5)
    dialled = loaded("gpt_neox", saved(model, tmp_path / "adapter", **changed))
    acting = outputs_of(dialled, batch)
    assert distance(acting, outputs_of(model, batch)) > 100 * TOLERANCE
    export_to_lora(dialled, NAME, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(base("gpt_neox"), tmp_path / "lora")
    assert distance(outputs_of(lora, batch), acting) < TOLERANCE
    dialled.merge_adapter()
    assert distance(outputs_of(dialled, batch), acting) < TOLERANCE
    with pytest.raises(ValueError, match="is merged into the weights: call unmerge_adapter"):
        set_strength(dialled, NAME, 1)
    dialled.unmerge_adapter()
    assert same(outputs_of(dialled, batch), acting)
    assert distance(outputs_of(dialled.merge_and_unload(), batch), acting) < TOLERANCE


@pytest.mark.parametrize("targets", [None, "readers"])
def test_a_dial_merges_at_norms_and_a_target_asks_for_a_bias_where_there_is_none(
    targets: str | None, tmp_path: Path
) -> None:
    model, batch = fitted("llama", target_modules=targets), small_batch("llama", seed=5)
    half = loaded("llama", saved(model, tmp_path / "half", strength=0.5))
    acting = outputs_of(half, batch)
    assert distance(outputs_of(half.merge_and_unload(), batch), acting) < TOLERANCE
    moved = loaded("llama", saved(model, tmp_path / "moved", target="male"))
    with pytest.raises(
        ValueError,
        match=r"moves it to a target, for which .* would need a bias, and has none\. If it has a target, remove it",
    ):
        moved.merge_adapter()
    set_target(moved, NAME, None)
    moved.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        set_target(moved, NAME, "male")


def test_what_is_saved_is_the_eraser_and_the_dial_beside_it(tmp_path: Path) -> None:
    model, batch = fitted(), small_batch("gpt_neox", seed=5)
    first = load_file(saved(model, tmp_path / "full") / "adapter_model.safetensors")
    assert {"strength", "target"}.isdisjoint(json.loads((tmp_path / "full/adapter_config.json").read_text()))
    set_strength(model, NAME, 0.5)
    second = load_file(saved(model, tmp_path / "half") / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    readings = [key for key in first if key.endswith("concept_erasure_readings")]
    assert len(readings) == len(site_layers(model, NAME))
    assert all(first[key].shape == (2, 1) for key in readings)
    again = loaded("gpt_neox", tmp_path / "half")
    assert again.peft_config[NAME].strength == 0.5
    assert distance(outputs_of(again, batch), outputs_of(model, batch)) == 0
    # A configuration that is passed has priority; fields that it does not set come from the file.
    config = ConceptErasureConfig(labels=LABELS, target_modules="all-linear", target="male", task_type="CAUSAL_LM")
    given = loaded("gpt_neox", tmp_path / "half", config=config)
    assert (given.peft_config[NAME].strength, given.peft_config[NAME].target) == (0.5, "male")
    assert "moves 'concept' to target='male' with strength=0.5 at" in verify_adapter(given, NAME, batch).text
    config = ConceptErasureConfig(labels=LABELS, target_modules="all-linear", strength=1, task_type="CAUSAL_LM")
    assert loaded("gpt_neox", tmp_path / "half", config=config).peft_config[NAME].strength == 1


@pytest.mark.parametrize("target", ["male", [0.25, 0.75]])
def test_a_target_that_is_set_is_one_that_is_loaded(target: str | list[float], tmp_path: Path) -> None:
    model, batch = fitted(), small_batch("gpt_neox", seed=5)
    plain = outputs_of(model, batch)
    expected = outputs_of(loaded("gpt_neox", saved(model, tmp_path / "given", target=target)), batch)
    set_target(model, NAME, target)
    assert same(outputs_of(model, batch), expected)
    for wrong in ("neither", [1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="target="):
            set_target(model, NAME, wrong)
    assert same(outputs_of(model, batch), expected)
    set_target(model, NAME, None)
    assert same(outputs_of(model, batch), plain)


def test_an_adapter_of_before_has_a_strength_and_no_target(tmp_path: Path) -> None:
    model, batch = fitted(), small_batch("gpt_neox", seed=5)
    folder = saved(model, tmp_path / "old")
    path, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "readings"}))
    save_file({k: v for k, v in load_file(file).items() if not k.endswith("readings")}, file, {"format": "pt"})
    old = loaded("gpt_neox", folder)
    assert same(outputs_of(old, batch), outputs_of(model, batch))
    set_strength(old, NAME, 0.5)
    set_strength(model, NAME, 0.5)
    assert same(outputs_of(old, batch), outputs_of(model, batch))
    old.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / NAME / "adapter_model.safetensors").keys() == load_file(file).keys()
    with pytest.raises(ValueError, match=r"what the classes read is not known of this erasure .* Fit it again"):
        loaded("gpt_neox", saved(model, tmp_path / "bad", readings=None, target="male"))


# ---- beside others ---------------------------------------------------------------------------------------------------


def test_several_adapters_each_with_its_own(tmp_path: Path) -> None:
    model, batch = fitted(), small_batch("gpt_neox", seed=5)
    folder = saved(model, tmp_path / "one")
    both = loaded("gpt_neox", folder)
    both.load_adapter(folder, "second")
    alone = outputs_of(both, batch)
    set_strength(both, "second", 0.0)
    both.base_model.set_adapter([NAME, "second"])
    assert same(outputs_of(both, batch), alone)
    set_strength(both, NAME, 0.0)
    set_strength(both, "second", 1.0)
    assert same(outputs_of(both, batch), alone)
    both.delete_adapter(NAME)
    both.set_adapter("second")
    assert same(outputs_of(both, batch), alone)


def test_readers_that_share_an_eraser_share_its_strength() -> None:
    model, batch = fitted("llama", target_modules="readers"), small_batch("llama", seed=5)
    set_strength(model, NAME, 0.0)
    assert same(outputs_of(model, batch), outputs_of(base("llama"), batch))
    set_strength(model, NAME, 0.5)
    halved = outputs_of(model, batch)
    assert not same(halved, outputs_of(base("llama"), batch))
    assert same(outputs_of(copy.deepcopy(model), batch), halved)


def test_compiled_code_follows_the_strength() -> None:
    """It stays one graph. The backend `eager` runs the graph unchanged, so outputs equal the model's to the bit."""
    model, batch = fitted(target_modules=None), small_batch("gpt_neox", seed=5)
    with torch.compiler.set_stance("default"):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for strength in (0.5, 1.0, 2.0):
            set_strength(model, NAME, strength)
            assert same(outputs_of(compiled, batch), outputs_of(model, batch))
        model.peft_config[NAME].target = "male"
        for layer in site_layers(model, NAME).values():
            layer.erasures[NAME].dial = model.peft_config[NAME].dial
        assert same(outputs_of(compiled, batch), outputs_of(model, batch))


def test_values_that_are_loaded_or_moved_later_are_those_that_act() -> None:
    model, batch = fitted(), small_batch("gpt_neox", seed=5)
    set_strength(model, NAME, 0.5)
    before, kept = outputs_of(model, batch), copy.deepcopy(model.state_dict())
    model.load_state_dict({k: v * 2 if "concept_erasure_left" in k else v for k, v in kept.items()})
    assert not same(outputs_of(model, batch), before)
    model.load_state_dict(kept)
    assert same(outputs_of(model, batch), before)
    assert same(outputs_of(model.double().float(), batch), before)


def test_combined_ones_are_full_and_know_no_target() -> None:
    model = fitted()
    model.add_adapter(ConceptErasureConfig(concept="other", labels=LABELS, target_modules="all-linear"), "other")
    fit_concept_erasure(model, small_batches("gpt_neox"), "other", sequential=False, progress=False)
    set_strength(model, NAME, 0.5)
    with pytest.raises(
        ValueError, match=r"'gender' has strength=0\.5 and target=None: what is combined has strength=1"
    ):
        combine_adapters(model, [NAME, "other"], "both")
    set_strength(model, NAME, 1)
    with pytest.warns(UserWarning, match="combined from erasers"):
        config = combine_adapters(model, [NAME, "other"], "both")
    assert config.readings is None
    set_strength(model, "both", 0.5)


def test_fitting_is_at_full_strength_whatever_the_strength_is() -> None:
    """Then the strength can be changed afterwards: each later site is fitted behind full erasures."""
    full, half = (base("llama") for _ in range(2))
    for model, strength in ((full, 1.0), (half, 0.5)):
        config = ConceptErasureConfig(labels=LABELS, strength=strength)
        model.add_adapter(config, adapter_name=NAME)
        fit_concept_erasure(model, small_batches("llama"), NAME, progress=False)
    set_strength(half, NAME, 1)
    batch = small_batch("llama", seed=5)
    assert same(outputs_of(full, batch), outputs_of(half, batch))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 2.5}, "must lie between 0"),
        ({"strength": -0.1}, "must lie between 0"),
        ({"strength": float("nan")}, "must lie between 0"),
        ({"target": "other"}, "target='other' is not one of labels="),
        ({"target": [1.0]}, "must have 2 numbers"),
        ({"target": [0.5, 0.6]}, "whose sum is 1"),
        ({"target": [float("inf"), 0.0]}, "must have 2 numbers"),
        ({"readings": ["male", "female"]}, "Fitting writes that"),
        ({"readings": ["other"]}, "Fitting writes that"),
    ],
)
def test_what_is_not_a_dial_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConceptErasureConfig(labels=LABELS, **fields)


def test_a_class_that_no_row_has_is_not_a_target(tmp_path: Path) -> None:
    model = base("gpt_neox")
    labels = [*LABELS, "absent"]
    config = ConceptErasureConfig(labels=labels, target_modules="all-linear", target="absent")
    model.add_adapter(config, adapter_name=NAME)
    batches, config = small_batches("gpt_neox"), model.peft_config[NAME]
    with pytest.raises(ValueError, match=r"target='absent': no row was labelled \['absent'\] when it was fitted"):
        fit_concept_erasure(model, batches, NAME, sequential=False, progress=False)
    assert not config.fitted
    config.target = "male"
    with pytest.warns(UserWarning, match="No row was labelled"):
        fit_concept_erasure(model, batches, NAME, sequential=False, progress=False)
    assert config.readings == LABELS


def test_set_strength_refuses_and_changes_nothing() -> None:
    model = fitted()
    for strength, message in ((3, "must lie between 0"), (float("nan"), "must lie between 0")):
        with pytest.raises(ValueError, match=message):
            set_strength(model, NAME, strength)
    with pytest.raises(TypeError, match="strength='much'"):
        set_strength(model, NAME, "much")  # type: ignore[arg-type]
    assert model.peft_config[NAME].strength == 1.0
    model.add_adapter(ConceptErasureConfig(labels=LABELS), adapter_name="empty")
    with pytest.raises(ValueError, match="'empty' was never fitted"):
        set_strength(model, "empty", 0.5)
    with pytest.raises(ValueError, match="'none' is not a concept erasure"):
        set_strength(model, "none", 0.5)
