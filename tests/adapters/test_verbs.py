"""The other verbs of an adapter's life, on cells in which every pair of architecture, target and site occurs."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import Tensor, nn

from hf_erasure.adapters import ErasureLayer, erasure_layers
from tests.adapters.lifecycle import CELLS, EVERY_PLACE, MERGE_TOLERANCE, NAME, PAIRWISE, Cell, Lifecycle, fit, state_of
from tests.in_turn import in_turn
from tests.small_models import (
    ARCHITECTURES,
    LABELS,
    distance,
    inputs_of,
    outputs_of,
    same,
    small_batch,
)

pytestmark = pytest.mark.lifecycle
pairwise = pytest.mark.parametrize("cell", PAIRWISE, ids=str)
every_place = pytest.mark.parametrize("cell", EVERY_PLACE, ids=str)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
generating = [cell for cell in PAIRWISE if cell.parts.generates]
SECOND = "second"


def eraser_values(model: nn.Module, name: str = NAME) -> dict[str, tuple[Tensor, ...]]:
    return {path: layer.eraser_state(name) for path, layer in erasure_layers(model, name).items()}


def erased(hidden: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    """The erased activation by the paper's formula."""
    left, right, mean = (part.to(hidden.dtype) for part in state)
    if hidden.shape[-1] != len(mean):  # an image's features are its channels, in axis 1
        return erased(hidden.movedim(1, -1), state).movedim(-1, 1)
    return hidden - (hidden - mean) @ right.T @ left.T


def left_over(hidden: Tensor, state: tuple[Tensor, ...]) -> float:
    """The part of the activation that the eraser still reads, relative to the activation."""
    _, right, mean = (part.to(hidden.dtype) for part in state)
    centred = (hidden if hidden.shape[-1] == len(mean) else hidden.movedim(1, -1)) - mean
    return float((centred @ right.T).abs().max() / (centred.norm(dim=-1).max() * right.norm()))


def with_second(model: nn.Module, cell: Cell) -> nn.Module:
    """Add a second adapter at the same place, fitted on other data while the first is not active."""
    model.disable_adapters()
    config = model.peft_config[NAME]
    fields = {"task_type": config.task_type, "target_modules": cell.parts.target(cell.target), "site": cell.site}
    model.add_adapter(type(config)(concept="other", labels=LABELS, **fields), adapter_name=SECOND)
    fit(model, cell.architecture, SECOND, seed=200)
    model.enable_adapters()
    return model


@every_place
def test_disable_and_enable(cell: Cell, lifecycle: Lifecycle):
    model, batch = lifecycle.fitted(cell), small_batch(cell.architecture, seed=5)
    plain, with_adapter = outputs_of(lifecycle.base(cell.architecture), batch), outputs_of(model, batch)
    model.disable_adapters()
    assert same(outputs_of(model, batch), plain)
    model.enable_adapters()
    assert same(outputs_of(model, batch), with_adapter)

    wrapped = peft.PeftModel.from_pretrained(lifecycle.base(cell.architecture), lifecycle.folder(cell))
    with wrapped.disable_adapter():
        assert same(outputs_of(wrapped, batch), plain)
    assert same(outputs_of(wrapped, batch), with_adapter)


@every_place
def test_delete_leaves_the_base_model(cell: Cell, lifecycle: Lifecycle):
    base = lifecycle.base(cell.architecture).requires_grad_(False)
    model = lifecycle.fitted(cell)
    model.delete_adapter(NAME)
    state_of(base, cell.architecture).assert_same(state_of(model, cell.architecture))


@every_place
def test_unload_leaves_the_base_model(cell: Cell, lifecycle: Lifecycle):
    base = lifecycle.base(cell.architecture).requires_grad_(False)
    model = peft.PeftModel.from_pretrained(lifecycle.base(cell.architecture), lifecycle.folder(cell))
    state_of(base, cell.architecture).assert_same(state_of(model.unload(), cell.architecture))


@every_place
def test_two_adapters_act_in_the_order_of_the_active_list(cell: Cell, lifecycle: Lifecycle):
    model, batch = with_second(lifecycle.fitted(cell), cell), small_batch(cell.architecture, seed=5)
    base = lifecycle.base(cell.architecture)
    first, second = eraser_values(model, NAME), eraser_values(model, SECOND)

    model.set_adapter(NAME)
    assert same(outputs_of(model, batch), outputs_of(lifecycle.fitted(cell), batch))
    seen = {}
    for order, expected in (
        ([NAME, SECOND], lambda path, x: erased(erased(x, first[path]), second[path])),
        ([SECOND, NAME], lambda path, x: erased(erased(x, second[path]), first[path])),
    ):
        model.set_adapter(order)
        assert model.active_adapters() == order
        seen[tuple(order)] = activations(model, cell.site, batch)
        # The site that is reached first gets the activation of the plain model.
        path = next(iter(activations(base, cell.site, batch, list(first))))
        plain = activations(base, cell.site, batch, list(first))[path]
        torch.testing.assert_close(seen[tuple(order)][path], expected(path, plain), rtol=1e-5, atol=1e-5)
        last = first if order[-1] == NAME else second
        assert max(left_over(hidden, last[path]) for path, hidden in seen[tuple(order)].items()) < 1e-5
    forward, backward = seen.values()
    assert any(not torch.equal(forward[path], backward[path]) for path in forward)

    model.delete_adapter(SECOND)
    model.set_adapter(NAME)
    assert same(outputs_of(model, batch), outputs_of(lifecycle.fitted(cell), batch))


def activations(model: nn.Module, site: str, batch: dict[str, Tensor], paths: list[str] | None = None):
    """The outputs (or inputs) of modules, in the order in which the modules are first called."""
    found: dict[str, Tensor] = {}
    hosts = {p: m for p, m in model.named_modules() if p in paths} if paths else None
    hosts = hosts or {path: layer.host for path, layer in erasure_layers(model).items()}

    def note(path: str, hidden: Tensor) -> None:
        found.setdefault(path, hidden.clone())

    def watch(path: str, host: nn.Module):
        if site == "output":
            return host.register_forward_hook(lambda m, a, out: note(path, out if isinstance(out, Tensor) else out[0]))
        return host.register_forward_pre_hook(
            lambda m, args, kwargs: note(path, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )

    handles = [watch(path, host) for path, host in hosts.items()]
    outputs_of(model, batch)
    for handle in handles:
        handle.remove()
    return found


# Both orders run the same code with two names exchanged, so each cell has one order, in turn.
@in_turn("cell, order", [c for c in CELLS if c.merge_refusal is None], [["default", SECOND], [SECOND, "default"]])
def test_two_adapters_merge_as_they_act(cell: Cell, order: list[str], lifecycle: Lifecycle):
    model = peft.PeftModel.from_pretrained(lifecycle.base(cell.architecture), lifecycle.folder(cell))
    model.load_adapter(lifecycle.folder(cell, seed=200), SECOND)
    model.base_model.set_adapter(order)
    batch = small_batch(cell.architecture, seed=5)
    unmerged, before = outputs_of(model, batch), state_of(model, cell.architecture)
    first, second = order if cell.next_to_weight == "first" else order[::-1]
    with pytest.raises(ValueError, match=f"'{second}'.* cannot be merged .* before '{first}'"):
        model.merge_adapter([second])
    before.assert_same(state_of(model, cell.architecture))
    model.merge_adapter([first])
    model.merge_adapter([second])
    assert distance(outputs_of(model, batch), unmerged) < MERGE_TOLERANCE[torch.float32]
    model.unmerge_adapter()
    before.assert_same(state_of(model, cell.architecture))
    model.merge_adapter()
    assert distance(outputs_of(model, batch), unmerged) < MERGE_TOLERANCE[torch.float32]


@pytest.mark.parametrize("cell", generating, ids=str)
def test_generating_with_a_cache_equals_generating_without(cell: Cell, lifecycle: Lifecycle):
    model = lifecycle.fitted(cell)
    batch = small_batch(cell.architecture, seed=5, rows=4)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if cell.architecture != "t5":
        # Decoders continue at the right end, so the padding goes to the left.
        prompt = {name: value.flip(1) for name, value in prompt.items()}
    fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    fixed["return_dict_in_generate"] = True
    cached, plain = (model.generate(**prompt, **fixed, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    assert cached.past_key_values is not None and plain.past_key_values is None
    base = lifecycle.base(cell.architecture).generate(**prompt, **fixed)
    assert not torch.allclose(torch.stack(base.logits), torch.stack(cached.logits), rtol=1e-2, atol=1e-2)


@pairwise
def test_gradient_checkpointing_changes_no_gradient(cell: Cell, lifecycle: Lifecycle):
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        # Erasers are buffers, so unfreezing the base does not train them.
        model.train().requires_grad_(True)
        torch.manual_seed(0)
        output = model(**inputs_of(small_batch(cell.architecture, seed=5)))
        output[0].square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = lifecycle.fitted(cell)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    expected, found = gradients(lifecycle.fitted(cell)), gradients(model)
    assert expected and expected.keys() == found.keys()
    # Checkpointing changes the order in which a tied weight sums the gradients of its two uses.
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if cell.parts.tied else {"rtol": 0, "atol": 0}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **tolerance, msg=name)
    assert not any("concept_erasure" in name for name, _ in model.named_parameters())


# Pickling depends on the class of a model, not on where its layers are: one cell for each architecture.
@pytest.mark.parametrize(
    ("cell", "way"),
    [(cell, "deepcopy") for cell in EVERY_PLACE] + [(cell, "pickle") for cell in EVERY_PLACE[::2]],
    ids=str,
)
def test_a_copy_is_equal_and_independent(cell: Cell, way: str, lifecycle: Lifecycle):
    model = lifecycle.fitted(cell)
    before = state_of(model, cell.architecture)
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    before.assert_same(state_of(copied, cell.architecture))
    copied.disable_adapters()
    copied.delete_adapter(NAME)
    assert not any(isinstance(module, ErasureLayer) for module in copied.modules())
    assert same(
        outputs_of(copied, small_batch(cell.architecture)),
        outputs_of(lifecycle.base(cell.architecture), small_batch(cell.architecture)),
    )
    before.assert_same(state_of(model, cell.architecture))


@every_place
def test_half_precision_leaves_the_erasers_alone(cell: Cell, lifecycle: Lifecycle):
    model, batch = lifecycle.fitted(cell), small_batch(cell.architecture, seed=5)
    before = eraser_values(model)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        for path, state in eraser_values(model).items():
            assert {part.dtype for part in state} == {torch.float32}
            assert all(torch.equal(old, new) for old, new in zip(before[path], state, strict=True))
    model = lifecycle.fitted(cell).to(torch.bfloat16)
    loaded = lifecycle.base(cell.architecture).to(torch.bfloat16)
    loaded.load_adapter(lifecycle.folder(cell))
    assert {tensor.dtype for tensor in outputs_of(model, batch).values()} == {torch.bfloat16}
    assert same(outputs_of(loaded, batch), outputs_of(model, batch))
    assert not same(outputs_of(lifecycle.base(cell.architecture).to(torch.bfloat16), batch), outputs_of(model, batch))


@every_place
def test_double_precision_carries_the_erasers_along(cell: Cell, lifecycle: Lifecycle):
    model, batch = lifecycle.fitted(cell).double(), small_batch(cell.architecture, seed=5)
    assert all(part.dtype == torch.float64 for state in eraser_values(model).values() for part in state)
    reached = activations(model, cell.site, batch)
    # The erasers were rounded to float32, so R L = 1 holds only to 1e-7.
    assert max(left_over(hidden, eraser_values(model)[path]) for path, hidden in reached.items()) < 1e-6
    loaded = lifecycle.base(cell.architecture).double()
    loaded.load_adapter(lifecycle.folder(cell))
    assert same(outputs_of(loaded, batch), outputs_of(model, batch))
    model.to(torch.bfloat16)
    assert all(part.dtype == torch.float32 for state in eraser_values(model).values() for part in state)


# Host modules can break a graph: they return a tensor or a tuple, and take their input by position or by name. These
# two have all of that. tests/ecosystem/test_compiled.py has both sites of linear layers, norms and inductor.
@pytest.mark.parametrize("cell", [Cell("gpt2", "attention", "output"), Cell("llama", "attention", "input")], ids=str)
def test_compiles_into_one_graph(cell: Cell, lifecycle: Lifecycle):
    torch.compiler.reset()
    model, batch = lifecycle.fitted(cell), small_batch(cell.architecture, seed=5)
    expected = outputs_of(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert same(outputs_of(compiled, batch), expected)
    model.disable_adapters()
    assert same(outputs_of(compiled, batch), outputs_of(lifecycle.base(cell.architecture), batch))
    torch.compiler.reset()


@every_architecture
def test_hidden_states_are_erased_at_block_targets(architecture: str, lifecycle: Lifecycle):
    model = lifecycle.fitted(Cell(architecture, "blocks", "output"))
    values = eraser_values(model)
    inputs = inputs_of(small_batch(architecture, seed=5))
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    if architecture == "t5":
        sides = {"encoder.": output.encoder_hidden_states, "decoder.": output.decoder_hidden_states}
    else:
        sides = {"": output.hidden_states}
    for side, states in sides.items():
        first, second = (state for path, state in values.items() if path.startswith(side))
        assert len(states) == 3
        # The first state is the embedding. Where a final norm follows the blocks, the last state is what it returns.
        assert left_over(states[0], first) > 1e-2
        assert left_over(states[1], first) < 1e-5
        if architecture in ("bert", "distilbert", "roberta"):
            assert left_over(states[2], second) < 1e-5


@every_architecture
def test_auto_peft_model(architecture: str, lifecycle: Lifecycle, tmp_path):
    cell = Cell(architecture, "norms", "output")
    base = lifecycle.base(architecture)
    config = copy.deepcopy(lifecycle.fitted(cell).peft_config[NAME])
    config.task_type = None
    config.fitted, config.fitted_sites, config.target_modules = False, None, None
    wrapped = peft.get_peft_model(base, config)
    fit(wrapped, architecture, "default")
    wrapped.save_pretrained(tmp_path)
    # The adapter's configuration names the class of its base.
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path)
    assert type(loaded.get_base_model()) is type(base)
    batch = small_batch(architecture, seed=5)
    assert same(outputs_of(loaded, batch), outputs_of(wrapped, batch))
    assert same(outputs_of(loaded, batch), outputs_of(lifecycle.fitted(cell), batch))
