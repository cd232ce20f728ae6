"""Architectures x targets x sites through add, fit, forward, save, load and merge: the full cross product.

Which reader opens a folder, and in which dtype a merge is computed, do not depend on where the erasure sits. So each
cell is loaded by one reader and merged in one dtype, in turn: every pair with an architecture, target or site occurs.
"""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_erasure import verify_adapter
from hf_erasure.adapters import erasure_layers
from tests.adapters.lifecycle import (
    CELLS,
    LINEAR_CELLS,
    MERGE_TOLERANCE,
    NAME,
    REFUSED,
    Cell,
    Lifecycle,
    config_of,
    state_of,
)
from tests.small_models import ARCHITECTURES, SITES, TARGETS, distance, outputs_of, same, small_batch

pytestmark = pytest.mark.lifecycle
every_cell = pytest.mark.parametrize("cell", CELLS, ids=str)


@every_cell
def test_add_finds_the_modules_that_peft_finds_and_changes_no_output(cell: Cell, lifecycle: Lifecycle):
    model = lifecycle.base(cell.architecture)
    batch = small_batch(cell.architecture)
    before = outputs_of(model, batch)
    model.add_adapter(config_of(cell), adapter_name=NAME)

    if cell.target == "norms":
        expected = cell.parts.norms
    else:
        lora = lifecycle.base(cell.architecture)
        tuner = peft.tuners.tuners_utils.BaseTuner
        config = peft.LoraConfig(target_modules=cell.parts.target(cell.target))
        config = peft.tuners.tuners_utils._maybe_include_all_linear_layers(config, lora)
        expected = [n for n, _ in lora.named_modules() if n and tuner._check_target_module_exists(config, n)]
    assert list(erasure_layers(model, NAME)) == expected
    assert same(outputs_of(model, batch), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@every_cell
def test_fitted_adapter_erases_at_every_site_and_says_so(cell: Cell, lifecycle: Lifecycle):
    model = lifecycle.fitted(cell)
    verified = verify_adapter(model, NAME, small_batch(cell.architecture))
    assert verified, str(verified)
    layers = erasure_layers(model, NAME)
    seen = dict.fromkeys(layers, 0)

    def check(path: str, hidden: Tensor) -> None:
        # An erased activation has nothing left in the directions that the eraser reads: R (x - mean) = 0.
        layer = layers[path]
        right, mean = layer.concept_erasure_right[NAME], layer.concept_erasure_bias[NAME]
        if hidden.shape[-1] != len(mean):  # an image's features are its channels, in axis 1
            hidden = hidden.movedim(1, -1)
        left_over = (hidden - mean) @ right.T
        scale = (hidden - mean).norm(dim=-1, keepdim=True) * right.norm()
        assert right.shape[0] == 1
        assert float((left_over / scale).abs().max()) < 1e-5, path
        seen[path] += 1

    for path, layer in layers.items():
        _watch(layer.host, cell.site, path, check)
    outputs = outputs_of(model, small_batch(cell.architecture, seed=5))
    assert min(seen.values()) >= 1
    assert not same(outputs, outputs_of(lifecycle.base(cell.architecture), small_batch(cell.architecture, seed=5)))


def _watch(host: nn.Module, site: str, path: str, check) -> None:
    if site == "output":
        host.register_forward_hook(lambda m, args, out: check(path, out if isinstance(out, Tensor) else out[0]))
    else:
        host.register_forward_pre_hook(
            lambda m, args, kwargs: check(path, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )


@every_cell
def test_saved_folder_has_one_tensor_a_part_and_no_pickle(cell: Cell, lifecycle: Lifecycle):
    folder = lifecycle.folder(cell)
    extra = {"README.md"} | ({"generation_config.json"} if cell.parts.generates else set())
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", *extra}
    tensors = load_file(folder / "adapter_model.safetensors")
    layers = erasure_layers(lifecycle.fitted(cell), NAME)
    parts = ("left", "right", "bias", "readings")
    assert set(tensors) == {f"base_model.model.{p}.concept_erasure.concept_erasure_{x}" for p in layers for x in parts}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


WAYS = ("from_pretrained", "load_adapter", "PeftModel", "AutoPeftModel")
AUTO = {
    "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": peft.AutoPeftModelForFeatureExtraction,
}


def turn(cell: Cell) -> int:
    """A number to alternate by: it differs by 1 between neighbouring architectures or targets, by 2 between sites."""
    return [*ARCHITECTURES].index(cell.architecture) + TARGETS.index(cell.target) + 2 * SITES.index(cell.site)


def way_of(cell: Cell) -> str:
    """How a cell is loaded. PEFT has no Auto class for image encoders; see `test_auto_peft_model` for those."""
    ways = WAYS if cell.parts.task_type else WAYS[:-1]
    return ways[turn(cell) % len(ways)]


@every_cell
def test_reloaded_output_is_equal_to_the_bit(cell: Cell, lifecycle: Lifecycle):
    folder, batch, way = lifecycle.folder(cell), small_batch(cell.architecture, seed=5), way_of(cell)
    if way == "from_pretrained":
        model = cell.parts.auto.from_pretrained(folder)
    elif way == "load_adapter":
        model = lifecycle.base(cell.architecture)
        model.load_adapter(folder, adapter_name="another_name")
    elif way == "PeftModel":
        model = peft.PeftModel.from_pretrained(lifecycle.base(cell.architecture), folder)
    else:
        model = AUTO[cell.parts.task_type].from_pretrained(folder)
    assert not model.training
    assert same(outputs_of(model, batch), outputs_of(lifecycle.fitted(cell), batch))


def dtype_of(cell: Cell) -> torch.dtype:
    """The dtype of a merge, which alternates between cells; a refusal does not depend on the dtype."""
    both = [*MERGE_TOLERANCE]
    return both[(turn(cell) + SITES.index(cell.site)) % 2] if cell.merge_refusal is None else torch.float32


@pytest.mark.parametrize("cell", [*CELLS, *LINEAR_CELLS], ids=str)
def test_merging_is_exact_or_refused(cell: Cell, lifecycle: Lifecycle):
    dtype = dtype_of(cell)
    base = lifecycle.base(cell.architecture).to(dtype)
    batch = small_batch(cell.architecture, seed=5)
    model = peft.PeftModel.from_pretrained(base, lifecycle.folder(cell))
    unmerged, before = outputs_of(model, batch), state_of(model, cell.architecture)

    if cell.merge_refusal is not None:
        # Both verbs use the same plan, so each cell tries one of them, in turn.
        verb = (model.merge_adapter, model.merge_and_unload)[(turn(cell) + SITES.index(cell.site)) % 2]
        with pytest.raises(ValueError, match=cell.merge_refusal):
            verb()
        before.assert_same(state_of(model, cell.architecture))
        return

    model.merge_adapter()
    merged = outputs_of(model, batch)
    assert not same(merged, outputs_of(lifecycle.base(cell.architecture).to(dtype), batch))
    assert distance(merged, unmerged) < MERGE_TOLERANCE[dtype]
    assert verify_adapter(model, "default")
    model.unmerge_adapter()
    before.assert_same(state_of(model, cell.architecture))

    plain = model.merge_and_unload()
    assert type(plain) is type(base)
    assert same(outputs_of(plain, batch), merged)
    assert not erasure_layers(plain) and not hasattr(plain, "peft_config")
    # The tensors are those that the configuration describes, also where the merge needed a bias.
    assert list(plain.state_dict()) == list(type(plain)(plain.config).state_dict())


@pytest.mark.parametrize("cell", REFUSED, ids=str)
def test_input_of_an_embedding_is_refused(cell: Cell, lifecycle: Lifecycle):
    model = lifecycle.base(cell.architecture)
    before = state_of(model, cell.architecture)
    with pytest.raises(ValueError, match=r"takes token ids.*use site='output'"):
        model.add_adapter(config_of(cell), adapter_name=NAME)
    before.assert_same(state_of(model, cell.architecture))
    with pytest.raises(ValueError, match=r"takes token ids.*use site='output'"):
        peft.get_peft_model(model, config_of(cell))
    before.assert_same(state_of(model, cell.architecture))
