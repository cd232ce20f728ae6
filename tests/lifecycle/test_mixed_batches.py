"""Rows of one batch with different adapters: `adapter_names=[…]`."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor

from hf_erasure import ConceptErasureConfig
from tests.lifecycle.verbs import KINDS, OF, OURS, TABLE, as_base, base, outputs
from tests.small_models import ARCHITECTURES, LABELS, distance, inputs_of, outputs_of, same, small_batch, small_model

MODELS = ("bert", "gpt2", "t5", "vit")
ROWS = 6
NAMES = ["a", "__base__", "ab", "a", "ab", "a"]
# A row alone and a row among others have the same float32 sums in another order, through two blocks.
TOLERANCE = 1e-5


def batch_of(architecture: str) -> dict[str, Tensor]:
    return inputs_of(small_batch(architecture, seed=7, rows=ROWS))


def mixed(model: peft.PeftModel, architecture: str, names: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        output = model(**batch_of(architecture), adapter_names=names)
    return {key: value for key, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()}


def one_by_one(model: peft.PeftModel, architecture: str) -> dict[str, Tensor]:
    """The output of each row when the whole batch runs with that row's adapter."""
    parts = {"__base__": outputs_of(small_model(architecture), batch_of(architecture))}
    for name in ("a", "ab"):
        model.set_adapter(name)
        parts[name] = outputs_of(model, batch_of(architecture))
    return {key: torch.stack([parts[n][key][row] for row, n in enumerate(NAMES)]) for key in parts["a"]}


@pytest.mark.parametrize("kind", ["erasure", "LoRA"])
@pytest.mark.parametrize("architecture", MODELS)
def test_each_row_has_its_own_adapter(architecture: str, kind: str, matrix):
    model = OF[kind].wrapped(architecture, "a", "ab")
    expected = one_by_one(model, architecture)
    active = outputs(model, architecture)
    found = mixed(model, architecture, NAMES)
    assert distance({key: found[key] for key in expected}, expected) < TOLERANCE
    assert same(outputs(model, architecture), active)
    matrix(TABLE, "`adapter_names=[…]`, rows with adapters of their own", kind, "same")


def test_norms_and_inputs_of_modules_too():
    for fields in ({"target_modules": None}, {"site": "input", "target_modules": ["c_fc"]}):
        model = OF["erasure"].wrapped("gpt2", "a", "ab", **fields)
        expected = one_by_one(model, "gpt2")
        found = mixed(model, "gpt2", NAMES)
        assert distance({key: found[key] for key in expected}, expected) < TOLERANCE


def test_a_sticky_erasure_acts_on_every_row():
    model = OF["erasure"].wrapped("bert", "a", "ab")
    model.add_adapter("stuck", ConceptErasureConfig(labels=LABELS, target_modules=["query"], sticky=True))
    model.set_adapter("stuck")
    OF["erasure"].fit(model, "bert", "stuck", 4)
    expected = outputs_of(model, batch_of("bert"))
    assert not same(expected, outputs_of(small_model("bert"), batch_of("bert")))
    model.set_adapter("a")
    found = mixed(model, "bert", ["__base__"] * ROWS)
    assert same(found, expected)


@pytest.mark.parametrize("kind", ["erasure", "LoRA"])
@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_beams(beams: int, architecture: str, kind: str):
    """A row's beams have the row's adapter; T5's encoder runs each row only once."""
    model = OF[kind].wrapped(architecture, "a", "ab")
    batch = {k: v for k, v in batch_of(architecture).items() if not k.startswith("decoder")}
    batch = {k: v[:1].repeat(3, 1) for k, v in batch.items()}  # one text, and a row for each adapter; no padding
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    found = model.generate(**batch, **options, adapter_names=["a", "__base__", "ab"])
    expected = [small_model(architecture).generate(**batch, **options)]
    for name in ("a", "ab"):
        model.set_adapter(name)
        expected.insert(len(expected) if name == "ab" else 0, model.generate(**batch, **options))
    assert found.tolist() == [rows[0].tolist() for rows in expected]


@pytest.mark.parametrize("kind", OURS)
def test_names_that_mean_nothing(kind: str):
    """Each is refused; after the exception all rows have the active adapter again."""
    model = OF[kind].wrapped("bert", "a", "ab")
    active = outputs(model, "bert")
    with pytest.raises(ValueError, match="abc"):
        mixed(model, "bert", ["abc"] * ROWS)
    with pytest.raises(ValueError, match="not a list of names"):
        mixed(model, "bert", "a")
    if kind == "erasure":
        with pytest.raises(ValueError, match="adapter_names"):
            mixed(model, "bert", ["a"] * (ROWS + 1))
        with pytest.raises(ValueError, match="training mode"):
            mixed(model.train(), "bert", NAMES)
        model.eval().merge_adapter(["a"])
        with pytest.raises(ValueError, match="unmerge_adapter"):
            mixed(model, "bert", NAMES)
        model.unmerge_adapter()
    assert distance(outputs(model, "bert"), active) < TOLERANCE


def test_gradiend_refuses_and_names_the_adapters(matrix):
    model = OF["GRADIEND"].wrapped("bert", "a", "ab")
    with pytest.raises(ValueError, match=r"\['a', '__base__', 'ab'.*changes weights.*set_adapter"):
        mixed(model, "bert", NAMES)
    matrix(TABLE, "`adapter_names=[…]`, rows with adapters of their own", "GRADIEND", "refused")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_a_model_of_transformers_does_not_read_them(architecture: str, kind: str, matrix):
    """It passes any keyword on; a LoRA then acts on all rows without a warning."""
    model = OF[kind].added(architecture, "a", "ab")
    batch, row = batch_of(architecture), "`adapter_names=[…]` without a `PeftModel`"
    if kind == "LoRA":
        with torch.no_grad():
            assert torch.equal(model(**batch, adapter_names=["__base__"] * ROWS)[0], model(**batch)[0])
        matrix(TABLE, row, kind, "ignored: all rows have the active adapter")
        return
    with pytest.raises(ValueError, match=r"\['a', '__base__', 'ab'.*would ignore it.*PeftModel"):
        model(**batch, adapter_names=NAMES)
    for name in ("a", "ab"):
        model.delete_adapter(name)
    assert not model._forward_pre_hooks and as_base(model, architecture)
    matrix(TABLE, row, kind, "refused")


@pytest.mark.parametrize("kind", OURS)
def test_the_models_hook_goes_with_the_last_adapter(kind: str, tmp_path):
    task_type = ARCHITECTURES["bert"].task_type
    model = OF[kind].wrapped("bert", "a", task_type=task_type)
    assert len(model.base_model.model._forward_pre_hooks) == 1
    assert not model.unload()._forward_pre_hooks
    failing = base("bert")
    with pytest.raises(ValueError, match="not found"):
        failing.add_adapter(OF[kind].config(target_modules=["nowhere"]), "a")
    assert not failing._forward_pre_hooks
