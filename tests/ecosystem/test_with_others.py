"""Erasures and GRADIEND adapters together with other adapters: in any order, merged and unmerged, active or not."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_erasure import ConceptErasureConfig, verify_adapter
from hf_erasure.adapters import erasure_layers, gradiend_layers, targeted_parameters
from hf_erasure.adapters.common.layer import adapter_children
from tests.adapters.gradiend.lifecycle import RATE, Gradiends, config_of, edit_by_hand, feature_of, lora
from tests.adapters.gradiend.lifecycle import fit as give_feature
from tests.adapters.lifecycle import MERGE_TOLERANCE, Lifecycle, fit
from tests.small_models import LABELS, distance, inputs_of, outputs_of, same, small_batch

TABLE = "With other adapters"
MERGED = "Merged beside other adapters"
COLUMNS = {"erasure": "concept erasure", "steering": "GRADIEND"}
KINDS = tuple(COLUMNS)
LINEAR = {"llama": "self_attn.q_proj", "gpt2": "attn.c_attn", "bert": "attention.self.query"}
BLOCK = {"llama": "model.layers.0", "gpt2": "transformer.h.0", "bert": "encoder.layer.0"}
ARCHITECTURES = tuple(LINEAR)
# The same float32 operations in another order, as in `ORACLE_TOLERANCE` of GRADIEND.
TOLERANCE = 2e-5

both_kinds = pytest.mark.parametrize("kind", KINDS)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* switched the .* off:UserWarning"),
]


class Others:
    """Base models, and saved adapters of three kinds that act on the same linear layers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.erasures, self.gradiends = Lifecycle(root / "erasures"), Gradiends(root / "gradiends")
        self._folders: dict[tuple, Path] = {}

    def base(self, architecture: str) -> PreTrainedModel:
        return self.erasures.base(architecture)

    def folder(self, architecture: str, kind: str, **fields: object) -> Path:
        """A saved adapter with these `fields` in its configuration; by default on one linear layer of every block."""
        key = (architecture, kind, *sorted((name, str(value)) for name, value in fields.items()))
        if key not in self._folders:
            model = self.base(architecture)
            fields = {"target_modules": rf".*\.{LINEAR[architecture]}", **fields}
            make(model, architecture, kind, **fields)
            self._folders[key] = self.root / f"adapter-{len(self._folders)}"
            model.save_pretrained(self._folders[key])
        return self._folders[key]

    def with_adapters(self, architecture: str, order: tuple[str, ...], **fields: object) -> PreTrainedModel:
        """The base with adapters loaded in this order, each named by its kind, and all active."""
        model = self.base(architecture)
        for kind in order:
            model.load_adapter(self.folder(architecture, kind, **fields), adapter_name=kind)
        if order:
            model.set_adapter(sorted(order))
        return model


def make(model: PreTrainedModel, architecture: str, kind: str, name: str | None = None, **fields: object) -> None:
    """Add an adapter and give it values: an erasure is fitted; a GRADIEND feature and a LoRA are random."""
    name = name or kind
    if kind == "lora":
        torch.manual_seed(0)
        model.add_adapter(lora(**fields), adapter_name=name)
    elif kind == "steering":
        model.add_adapter(config_of(**fields), adapter_name=name)
        give_feature(model, name)
    else:
        config = ConceptErasureConfig(**{"concept": "gender", "labels": LABELS, "affine": False, **fields})
        model.add_adapter(config, adapter_name=name)
        fit(model, architecture, name)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Others:
    return Others(tmp_path_factory.mktemp("others"))


def by_hand(others: Others, architecture: str, kinds: tuple[str, ...]) -> nn.Module:
    """The oracle: weights are edited by hand, a LoRA is loaded, and erasers are applied to the layers' outputs."""
    model = others.base(architecture)
    if "steering" in kinds:
        steered = others.with_adapters(architecture, ("steering",))
        model = edit_by_hand(model, feature_of(targeted_parameters(steered, "steering")), 1e-2, 1.0, RATE)
    if "lora" in kinds:
        model.load_adapter(others.folder(architecture, "lora"), adapter_name="lora")
    if "erasure" in kinds:
        alone = others.with_adapters(architecture, ("erasure",))
        for path, layer in erasure_layers(alone).items():
            left, right, _ = layer.eraser_state("erasure")
            model.get_submodule(path).register_forward_hook(
                lambda m, args, out, left=left, right=right: out - out @ right.T @ left.T
            )
    return model


# ---- loaded and saved in either order --------------------------------------------------------------------------------


@every_architecture
@both_kinds
def test_a_lora_on_the_same_linear_in_either_order(
    kind: str, architecture: str, others: Others, tmp_path: Path, matrix: Callable
):
    batch = small_batch(architecture, seed=5)
    expected = outputs_of(by_hand(others, architecture, (kind, "lora")), batch)
    alone = {name: outputs_of(others.with_adapters(architecture, (name,)), batch) for name in (kind, "lora")}
    outputs = {}
    for order in ((kind, "lora"), ("lora", kind)):
        model = others.with_adapters(architecture, order)
        outputs[order] = outputs_of(model, batch)
        assert distance(outputs[order], expected) < TOLERANCE
        assert verify_adapter(model, kind, batch)
        # Each alone acts and is saved as it is without the other.
        for name in (kind, "lora"):
            model.set_adapter(name)
            assert same(outputs_of(model, batch), alone[name])
            model.save_pretrained(tmp_path / order[0] / name)
    assert same(*outputs.values())
    for saved, order in itertools.product(outputs, outputs):
        again = others.base(architecture)
        for name in order:
            again.load_adapter(tmp_path / saved[0] / name, adapter_name=name)
        again.set_adapter([kind, "lora"])
        assert same(outputs_of(again, batch), outputs[order])
    for row in ("LoRA on the same Linear, loaded before", "LoRA on the same Linear, loaded after"):
        matrix(TABLE, row, COLUMNS[kind], "same")
    matrix(TABLE, "saved beside a LoRA, loaded in either order", COLUMNS[kind], "same")


@every_architecture
@both_kinds
def test_a_lora_inside_a_block(kind: str, architecture: str, others: Others, matrix: Callable):
    """An erasure of the block's output erases the LoRA's effect inside too; a feature on all weights of the block
    changes the weights that the LoRA has wrapped too."""
    batch = small_batch(architecture, seed=5)
    inside = BLOCK[architecture].replace(".", r"\.")
    target = inside if kind == "erasure" else rf"{inside}\..*"
    folder = others.folder(architecture, kind, target_modules=target)
    lora_folder = others.folder(architecture, "lora")
    found = []
    for order in (("lora", kind), (kind, "lora")):
        model = others.base(architecture)
        for name in order:
            model.load_adapter(lora_folder if name == "lora" else folder, adapter_name=name)
        model.set_adapter([kind, "lora"])
        wrapped = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert len(wrapped) == 2
        found.append(outputs_of(model, batch))
        model.set_adapter(kind)
        alone = others.base(architecture)
        alone.load_adapter(folder, adapter_name=kind)
        assert same(outputs_of(model, batch), outputs_of(alone, batch))
        if kind == "erasure":
            model.set_adapter([kind, "lora"])
            (layer,) = erasure_layers(model).values()
            assert type(layer.host).__name__ in ("LlamaDecoderLayer", "GPT2Block", "BertLayer")
            _, right, _ = layer.eraser_state(kind)
            states = hidden_states(model, batch)
            assert float((states[1] @ right.T).abs().max() / (states[1].norm(dim=-1).max() * right.norm())) < 1e-5
        model.set_adapter("lora")
        assert not same(outputs_of(model, batch), found[-1])
    assert same(*found)
    row = "LoRA inside a block that is targeted"
    matrix(TABLE, row, COLUMNS[kind], "same")


def hidden_states(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(**inputs_of(batch), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_all_three_on_one_linear_in_any_order(architecture: str, others: Others, tmp_path: Path, matrix: Callable):
    batch, kinds = small_batch(architecture, seed=5), ("erasure", "steering", "lora")
    expected = outputs_of(by_hand(others, architecture, kinds), batch)
    first = None
    for order in itertools.permutations(kinds):
        model = others.with_adapters(architecture, order)
        found = outputs_of(model, batch)
        first = found if first is None else first
        assert same(found, first)
        assert distance(found, expected) < TOLERANCE
        for name in kinds:
            others_of = [kind for kind in kinds if kind != name]
            model.set_adapter(others_of)
            assert same(
                outputs_of(model, batch), outputs_of(others.with_adapters(architecture, tuple(others_of)), batch)
            )
        # They are deleted in the order in which they were added.
        for number, name in enumerate(order, 1):
            model.delete_adapter(name)
            left = order[number:]
            if left:
                model.set_adapter(sorted(left))
                assert same(outputs_of(model, batch), outputs_of(others.with_adapters(architecture, left), batch))
        assert same(outputs_of(model, batch), outputs_of(others.base(architecture), batch))
        assert not erasure_layers(model) and not gradiend_layers(model)
    row = "a LoRA, and both an erasure and a GRADIEND adapter on one Linear, in any order"
    for kind in KINDS:
        matrix(TABLE, row, COLUMNS[kind], "same")


METHODS = {
    "DoRA": lambda target: lora(target_modules=target, use_dora=True),
    "LoRA with a bias": lambda target: lora(target_modules=target, lora_bias=True),
    "LoHa": lambda target: peft.LoHaConfig(r=2, target_modules=target, init_weights=False),
    "IA³": lambda target: peft.IA3Config(target_modules=target, feedforward_modules=[], init_ia3_weights=False),
}


@pytest.mark.parametrize("method", METHODS)
@both_kinds
def test_other_methods_on_the_same_linear(kind: str, method: str, others: Others, matrix: Callable):
    batch = small_batch("bert", seed=5)
    tuned = others.base("bert")
    torch.manual_seed(0)
    tuned.add_adapter(METHODS[method](["query"]), adapter_name="tuned")
    values = {name: p for name, p in tuned.named_parameters() if ".tuned" in name and p.requires_grad}
    with torch.no_grad():
        for parameter in values.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert not same(outputs_of(tuned, batch), outputs_of(others.base("bert"), batch))
    found = []
    for order in ((kind, "tuned"), ("tuned", kind)):
        model = others.base("bert")
        for name in order:
            if name == kind:
                model.load_adapter(others.folder("bert", kind), adapter_name=kind)
            else:  # not loaded from a folder: transformers itself does not load the magnitudes of a DoRA
                model.add_adapter(METHODS[method](["query"]), adapter_name=name)
                for own, value in values.items():
                    model.get_parameter(own).data = value.detach().clone()
        model.set_adapter([kind, "tuned"])
        found.append(outputs_of(model, batch))
        verdict = verify_adapter(model, kind, batch)
        model.set_adapter("tuned")
        assert same(outputs_of(model, batch), outputs_of(tuned, batch))
        model.delete_adapter("tuned")
        model.set_adapter(kind)
        assert same(outputs_of(model, batch), outputs_of(others.with_adapters("bert", (kind,)), batch))
    assert same(*found)
    assert verdict
    matrix(TABLE, f"{method} on the same Linear, either order", COLUMNS[kind], "same")


@pytest.mark.parametrize("gone", ["disabled", "deleted", "off"])
@both_kinds
def test_a_norm_that_ln_tuning_copies_in_either_order(kind: str, gone: str, others: Others):
    """LN tuning trains a copy of the norm, which has a copy of the child on it."""
    batch, config = small_batch("bert", seed=5), peft.LNTuningConfig(target_modules=["LayerNorm"])
    expected = {"disabled": others.base("bert"), "deleted": others.base("bert")}
    expected["deleted"].add_adapter(config, "tuned")
    folder, found = others.folder("bert", kind, target_modules=["LayerNorm"]), []
    for order in ((kind, "tuned"), ("tuned", kind)):
        model = others.base("bert")
        for name in order:
            if name == kind:
                model.load_adapter(folder, adapter_name=kind)
            else:
                peft.inject_adapter_in_model(config, model, "tuned")
        for parameter in (p for m in (model, expected["deleted"]) for n, p in m.named_parameters() if "tuned" in n):
            parameter.data.fill_(0.75)
        found.append(outputs_of(model, batch))
        if gone == "disabled":
            model.disable_adapters()
        elif gone == "deleted":
            model.delete_adapter(kind)
        else:
            model.set_adapter("tuned")
        assert same(outputs_of(model, batch), outputs_of(expected.get(gone, expected["deleted"]), batch))
    assert same(*found)


@pytest.mark.parametrize("verb", ["merge_and_unload", "unload"])
@both_kinds
def test_an_adapter_goes_to_the_norm_that_takes_the_place_of_ln_tuning(kind: str, verb: str, others: Others):
    """Merging puts LN tuning's copy in the place of the norm that had the child."""
    batch, folder = small_batch("bert", seed=5), others.folder("bert", kind, target_modules=["LayerNorm"])
    expected, model = others.base("bert"), others.base("bert")
    model.load_adapter(folder, adapter_name=kind)
    tuned = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["LayerNorm"]), "tuned").eval()
    for number, parameter in enumerate(p for n, p in tuned.named_parameters() if "tuned" in n):
        parameter.data.fill_(0.75 + 0.1 * number)
    if verb == "merge_and_unload":
        for name, copied in model.named_modules():
            if name.endswith(".tuned"):
                norm = expected.get_submodule(name.removesuffix(".ln_tuning_layers.tuned"))
                norm.load_state_dict(copied.state_dict(), strict=False)
    model = getattr(tuned, verb)()
    for other in (expected, model):
        if other is expected:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HF_ERASURE_ANY_BASE", "1")
                other.load_adapter(folder, adapter_name=kind)
        assert verify_adapter(other, kind, batch)
    assert same(outputs_of(model, batch), outputs_of(expected, batch))
    assert [*model.get_adapter_state_dict(kind)] == [*expected.get_adapter_state_dict(kind)]


@both_kinds
def test_layers_are_not_replicated_under_adapters(kind: str, others: Others):
    model = others.with_adapters("llama", (kind,))
    batch = small_batch("llama", seed=5)
    before, modules = outputs_of(model, batch), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="'default' cannot be added: its layer_replication gives layers other numbers"):
        peft.get_peft_model(model, lora(layer_replication=[[0, 1], [0, 2]]))
    assert [name for name, _ in model.named_modules()] == modules and list(model.peft_config) == [kind]
    assert same(outputs_of(model, batch), before)


# ---- beside a LoRA ---------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("order", ["before", "after"])
def test_training_a_lora_beside_it(kind: str, order: str, others: Others, matrix: Callable):
    model = others.with_adapters("llama", (kind,) if order == "before" else ())
    make(model, "llama", "lora", target_modules=["q_proj", "down_proj"])
    if order == "after":
        model.load_adapter(others.folder("llama", kind), adapter_name=kind)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    model.set_adapter([kind, "lora"])
    batch = small_batch("llama", seed=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = outputs_of(model, batch)
    trained = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(**inputs_of(batch)).logits.square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert not same(outputs_of(model, batch), start)
    model.set_adapter(kind)
    assert same(outputs_of(model, batch), outputs_of(others.with_adapters("llama", (kind,)), batch))
    matrix(TABLE, "a LoRA trained beside it", COLUMNS[kind], "its state stays as it is")


@both_kinds
def test_who_is_active(kind: str, others: Others, matrix: Callable):
    batch = small_batch("bert", seed=5)
    model = others.with_adapters("bert", (kind,))
    alone = outputs_of(model, batch)
    message = rf"Adding 'lora' switched the .* '{kind}' off.*set_adapter\(\['{kind}', 'lora'"
    with pytest.warns(UserWarning, match=message):
        make(model, "bert", "lora", target_modules=["query"])
    assert model.active_adapters() == ["lora"]
    assert same(outputs_of(model, batch), outputs_of(others.with_adapters("bert", ("lora",)), batch))
    model.set_adapter([kind, "lora"])
    together = outputs_of(model, batch)
    model.set_adapter(["lora", kind])
    assert same(outputs_of(model, batch), together)
    model.disable_adapters()
    assert same(outputs_of(model, batch), outputs_of(others.base("bert"), batch))
    model.enable_adapters()
    assert same(outputs_of(model, batch), together)
    model.delete_adapter("lora")
    model.set_adapter(kind)
    assert same(outputs_of(model, batch), alone)
    matrix(TABLE, "`add_adapter` of a LoRA", COLUMNS[kind], "off, with a warning that says how to use both")

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* switched the .* off")
        model.load_adapter(others.folder("bert", "lora"), adapter_name="loaded")
    assert same(outputs_of(model, batch), together)
    matrix(TABLE, "`load_adapter` of a LoRA", COLUMNS[kind], "stays on, as transformers has it")

    sticky = others.base("bert")
    sticky.load_adapter(others.folder("bert", kind, sticky=True), adapter_name=kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* switched the .* off")
        make(sticky, "bert", "lora", target_modules=["query"])
    assert sticky.active_adapters() == ["lora"]
    assert same(outputs_of(sticky, batch), together)
    sticky.disable_adapters()
    assert same(outputs_of(sticky, batch), outputs_of(others.base("bert"), batch))
    sticky.enable_adapters()
    sticky.delete_adapter("lora")
    assert same(outputs_of(sticky, batch), alone)
    matrix(TABLE, "`add_adapter` of a LoRA beside `sticky=True`", COLUMNS[kind], "stays on")


@both_kinds
def test_two_sticky_ones_and_a_lora(kind: str, others: Others, matrix: Callable):
    """Sticky adapters that are not in the active list act before the adapters in it."""
    batch = small_batch("bert", seed=5)
    model = others.base("bert")
    for name in ("one", "two"):
        model.load_adapter(others.folder("bert", kind, sticky=name == "two"), adapter_name=name)
    for child in (*erasure_layers(model).values(), *gradiend_layers(model).values()):
        child.set_adapter(["one"])
        assert child.switched_on() == ["two", "one"]
        child.set_adapter(["one", "two"])
        assert child.switched_on() == ["one", "two"]
    model.set_adapter("one")
    with_sticky = outputs_of(model, batch)
    model.set_adapter(["two", "one"])
    assert same(outputs_of(model, batch), with_sticky)
    outcome = "in the order of the active list, sticky ones before it"
    if kind == "steering":
        model.set_adapter(["one", "two"])
        assert same(outputs_of(model, batch), with_sticky)
        outcome = "they add up in any order"
    matrix(TABLE, "two of a kind at once", COLUMNS[kind], outcome)


# ---- inside the PeftModel of a LoRA ----------------------------------------------------------------------------------


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The base model's weights under the names that they have without adapters."""
    return {
        name.replace(".base_layer.", "."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


def worst(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def with_lora_around(model: PreTrainedModel, architecture: str) -> PeftModel:
    """`get_peft_model` with a LoRA; PEFT activates the new adapter in its own layers only."""
    torch.manual_seed(0)
    config = lora(target_modules=[LINEAR[architecture].rpartition(".")[2]])
    return peft.get_peft_model(model, config, adapter_name="lora")


def beside_a_peft_model(others: Others, architecture: str, kind: str, order: str) -> tuple[PreTrainedModel, PeftModel]:
    """A base model with an adapter of ours, attached before or after the PeftModel of a LoRA is put around it."""
    model = others.with_adapters(architecture, (kind,) if order == "before" else ())
    wrapped = with_lora_around(model, architecture)
    if order == "after":
        model.load_adapter(others.folder(architecture, kind), adapter_name=kind)
    return model, wrapped


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
@both_kinds
def test_verbs_of_the_peft_model_of_a_lora(
    kind: str, architecture: str, order: str, others: Others, matrix: Callable, tmp_path: Path
):
    batch = small_batch(architecture, seed=5)
    alone = {name: outputs_of(others.with_adapters(architecture, (name,)), batch) for name in (kind, "lora")}
    model, wrapped = beside_a_peft_model(others, architecture, kind, order)
    together, before = outputs_of(wrapped, batch), weights_of(model)
    assert same(together, outputs_of(others.with_adapters(architecture, (kind, "lora")), batch))
    assert verify_adapter(model, kind, batch)
    keys = list(model.state_dict())
    for names in (None, ["lora"]):
        wrapped.merge_adapter(names)
        loras = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert loras and all(layer.merged_adapters == ["lora"] for layer in loras)
        assert not any(c.merged for c in (*erasure_layers(model).values(), *gradiend_layers(model).values()))
        assert distance(outputs_of(wrapped, batch), together) < MERGE_TOLERANCE[torch.float32]
        wrapped.unmerge_adapter()
        assert distance(outputs_of(wrapped, batch), together) < MERGE_TOLERANCE[torch.float32]
    # The LoRA itself leaves a rounding when it subtracts what it added.
    assert worst(weights_of(model), before) < 1e-6
    assert list(model.state_dict()) == keys
    with wrapped.disable_adapter():
        assert distance(outputs_of(wrapped, batch), outputs_of(others.base(architecture), batch)) < TOLERANCE
    matrix(TABLE, "`merge_adapter` and `unmerge_adapter` of a LoRA's PeftModel", COLUMNS[kind], "stays unmerged and on")
    wrapped.save_pretrained(tmp_path)
    for name, expected in alone.items():
        again = PeftModel.from_pretrained(others.base(architecture), tmp_path / name)
        assert same(outputs_of(again, batch), expected)
    matrix(TABLE, "`save_pretrained` of a LoRA's PeftModel", COLUMNS[kind], "a folder for each")
    for verb in ("unload", "merge_and_unload"):
        plain = getattr(beside_a_peft_model(others, architecture, kind, order)[1], verb)()
        assert list(plain.peft_config) == [kind]
        assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in plain.modules())
        if verb == "unload":
            assert same(outputs_of(plain, batch), alone[kind])
        else:
            assert distance(outputs_of(plain, batch), together) < MERGE_TOLERANCE[torch.float32]
        assert verify_adapter(plain, kind, batch)
    matrix(TABLE, "`unload` and `merge_and_unload` of a LoRA's PeftModel", COLUMNS[kind], "stays on")


@pytest.mark.parametrize("gone", ["lora", "ours"])
@both_kinds
def test_a_peft_model_deletes_an_adapter_of_another_method(kind: str, gone: str, others: Others):
    """PEFT forgets its configuration and leaves it on, where no save finds it any more."""
    batch, names = small_batch("llama", seed=5), {"lora": "lora", "ours": kind}
    name = names.pop(gone)
    (left,) = names.values()
    model, wrapped = beside_a_peft_model(others, "llama", kind, "before")
    if gone == "lora":
        model = others.with_adapters("llama", ("lora",))
        wrapped = PeftModel.from_pretrained(model, others.folder("llama", kind), adapter_name=kind)
    else:
        wrapped.set_adapter(name)  # its layers switch the LoRA on again
    wrapped.delete_adapter(name)
    assert list(wrapped.peft_config) == wrapped.active_adapters == [left]
    assert same(outputs_of(wrapped, batch), outputs_of(others.with_adapters("llama", (left,)), batch))
    assert bool(adapter_children(model)) == (left == kind)


@both_kinds
def test_a_peft_model_runs_after_its_own_last_adapter_was_deleted(kind: str, others: Others):
    """PEFT fails at the next forward pass: it looks for the configuration of the deleted adapter."""
    batch = small_batch("llama", seed=5)
    model = PeftModel.from_pretrained(
        others.with_adapters("llama", (kind,)), others.folder("llama", "lora"), adapter_name="lora"
    )
    model.delete_adapter("lora")
    assert same(outputs_of(model, batch), outputs_of(others.with_adapters("llama", (kind,)), batch))
    assert verify_adapter(model.get_base_model(), kind, batch)


# ---- merged beside others, and unmerged in any order -----------------------------------------------------------------


class Owner:
    """One base model with a PeftModel for each adapter, since PEFT allows only one kind of adapter in a PeftModel."""

    def __init__(self, others: Others, dtype: torch.dtype) -> None:
        self.others, self.model = others, others.base("bert").to(dtype)
        self.wrappers: dict[str, PeftModel] = {}

    def add(self, name: str) -> None:
        kind = name.rstrip("12")
        if kind == "lora":
            torch.manual_seed(0)
            config = lora(target_modules=["query"])
            self.wrappers[name] = peft.get_peft_model(self.model, config, adapter_name=name)
        else:
            # `erasure2` acts at the input of the same linear layers.
            fields = {"site": "input"} if name == "erasure2" else {}
            folder = self.others.folder("bert", kind, **fields)
            self.wrappers[name] = PeftModel.from_pretrained(self.model, folder, adapter_name=name)

    def merge(self, name: str) -> None:
        self.wrappers[name].merge_adapter([name])

    def unmerge(self, name: str) -> None:
        self.wrappers[name].unmerge_adapter()


def rounding(*weights: dict[str, Tensor]) -> float:
    """One rounding of the largest weight that the LoRA is merged into."""
    largest = max(float(w.abs().max()) for values in weights for n, w in values.items() if "query.weight" in n)
    dtype = next(iter(weights[0].values())).dtype
    return torch.finfo(dtype).eps / 2 * largest


def stock(others: Others, dtype: torch.dtype) -> tuple[float, float]:
    """The change that a LoRA alone leaves after merge and unmerge, and one rounding of the weights on the way."""
    owner = Owner(others, dtype)
    owner.add("lora")
    before = weights_of(owner.model)
    owner.merge("lora")
    between = weights_of(owner.model)
    owner.unmerge("lora")
    return worst(weights_of(owner.model), before), rounding(before, between)


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
IN_ORDER, REVERSED = "unmerged in the order of merging", "unmerged in reverse"
ROWS = {
    ("erasure", "lora"): "erasure, then a LoRA",
    ("steering", "lora"): "GRADIEND, then a LoRA",
    ("lora", "steering"): "LoRA, then GRADIEND",
}


@both_dtypes
@pytest.mark.parametrize("backwards", [False, True], ids=[IN_ORDER, REVERSED])
@pytest.mark.parametrize("pair", ROWS, ids=lambda pair: "-".join(pair))
def test_merged_beside_a_lora_and_taken_back(
    pair: tuple[str, str], backwards: bool, dtype: torch.dtype, others: Others, matrix: Callable
):
    """PEFT's LoRA subtracts what it added, which leaves a rounding or two; other weights are equal to the bit."""
    batch, owner = small_batch("bert", seed=5), Owner(others, dtype)
    states = [weights_of(owner.model)]
    if pair != ("erasure", "lora"):  # an erasure cannot be merged where a LoRA is on the layer already
        for name in pair:
            owner.add(name)
        together = outputs_of(owner.model, batch)
    for name in pair:
        if name not in owner.wrappers:
            owner.add(name)
        owner.merge(name)
        states.append(weights_of(owner.model))
    if pair != ("erasure", "lora") and dtype == torch.float32:
        assert distance(outputs_of(owner.model, batch), together) < TOLERANCE
    left, bound = stock(others, dtype)
    allowed = 4 * rounding(*states)
    assert 0 < left <= 2 * bound
    for name in reversed(pair) if backwards else pair:
        before = weights_of(owner.model)
        owner.unmerge(name)
        assert worst(weights_of(owner.model), before) > allowed  # the unmerge changed weights
    assert worst(weights_of(owner.model), states[0]) <= allowed
    assert not any(m.merged for m in owner.model.modules() if isinstance(m, BaseTunerLayer))
    # Weights that no LoRA was merged into are equal to the bit.
    for name, value in weights_of(owner.model).items():
        if "query.weight" not in name:
            assert torch.equal(value, states[0][name]), name
    matrix(MERGED, ROWS[pair], REVERSED if backwards else IN_ORDER, "roundings, as LoRA alone leaves them")


@both_dtypes
def test_a_lora_that_was_unloaded_into_a_merged_erasure_stays(dtype: torch.dtype, others: Others, matrix: Callable):
    owner = Owner(others, dtype)
    plain = weights_of(owner.model)
    owner.add("erasure")
    owner.wrappers["erasure"].load_adapter(others.folder("bert", "erasure", site="input"), "erasure2")
    owner.merge("erasure")
    erased = weights_of(owner.model)
    owner.add("lora")
    owner.wrappers["lora"].merge_and_unload()
    both = weights_of(owner.model)
    change = {name: both[name].double() - erased[name].double() for name in both}
    with pytest.raises(ValueError, match=r"something else, such as a LoRA, was merged after it. Call unmerge_adapter"):
        owner.wrappers["erasure"].merge_adapter(["erasure2"])
    assert worst(weights_of(owner.model), both) == 0
    owner.unmerge("erasure")
    expected = {name: (plain[name].double() + change[name]).to(dtype) for name in plain}
    assert worst(weights_of(owner.model), expected) == 0
    assert max(float(value.abs().max()) for value in change.values()) > 0.1
    owner.merge("erasure")
    owner.unmerge("erasure")
    assert worst(weights_of(owner.model), expected) == 0
    for column in (IN_ORDER, REVERSED):
        matrix(MERGED, "erasure, then `merge_and_unload` of a LoRA", column, "the LoRA stays, the rest to the bit")


def test_loading_over_a_merged_adapter_says_what_to_do(others: Others):
    """After a merge the weights differ from those of the fit, and may look like another model's."""
    owner = Owner(others, torch.float32)
    owner.add("lora")
    owner.merge("lora")
    before = weights_of(owner.model)
    with pytest.raises(ValueError, match=r"another model.*If others are merged here, call unmerge_adapter\(\) first"):
        owner.add("erasure")
    assert worst(weights_of(owner.model), before) == 0
    assert not erasure_layers(owner.model) and "erasure" not in owner.model.peft_config
    owner.unmerge("lora")
    owner.add("erasure")
    assert verify_adapter(owner.model, "erasure", small_batch("bert"))


@both_dtypes
def test_an_erasure_is_not_merged_under_a_lora(dtype: torch.dtype, others: Others, matrix: Callable):
    owner = Owner(others, dtype)
    for name in ("erasure", "lora"):
        owner.add(name)
    for merged in (False, True):
        if merged:
            owner.merge("lora")
        before = weights_of(owner.model)
        with pytest.raises(
            ValueError, match=r"another adapter wraps its module.*Call merge_and_unload\(\) of that adapter"
        ):
            owner.merge("erasure")
        assert worst(weights_of(owner.model), before) == 0
    batch = small_batch("bert", seed=5)
    together = outputs_of(owner.model, batch)
    owner.wrappers["lora"].merge_and_unload()
    before = weights_of(owner.model)
    owner.merge("erasure")
    if dtype == torch.float32:
        assert distance(outputs_of(owner.model, batch), together) < MERGE_TOLERANCE[dtype]
    owner.unmerge("erasure")
    assert worst(weights_of(owner.model), before) == 0
    for column in (IN_ORDER, REVERSED):
        matrix(MERGED, "LoRA, then erasure", column, "refused")
        matrix(MERGED, "`merge_and_unload` of a LoRA, then erasure", column, "to the bit")


@both_dtypes
def test_an_erasure_and_a_gradiend_are_not_both_merged(dtype: torch.dtype, others: Others, matrix: Callable):
    for pair in (("erasure", "steering"), ("steering", "erasure")):
        owner = Owner(others, dtype)
        plain = weights_of(owner.model)
        for name in pair:
            owner.add(name)
        if pair[0] == "erasure":  # an erasure is not merged beside an active GRADIEND
            with pytest.raises(ValueError, match=r"beside the GRADIEND adapter 'steering'.*Merge the GRADIEND first"):
                owner.merge("erasure")
            assert worst(weights_of(owner.model), plain) == 0
            for layer in gradiend_layers(owner.model).values():
                layer.set_adapter([])
        owner.merge(pair[0])
        before = weights_of(owner.model)
        message = "an erasure is merged into .* merge it last" if pair[0] == "erasure" else "Merge the GRADIEND first"
        with pytest.raises(ValueError, match=message):
            owner.merge(pair[1])
        assert worst(weights_of(owner.model), before) == 0
        # The other one was not merged, so its unmerge changes nothing.
        owner.unmerge(pair[1])
        assert worst(weights_of(owner.model), before) == 0
        owner.unmerge(pair[0])
        assert worst(weights_of(owner.model), plain) == 0
        names = {"erasure": "erasure", "steering": "GRADIEND"}
        for column in (IN_ORDER, REVERSED):
            matrix(MERGED, f"{names[pair[0]]}, then {names[pair[1]]}", column, "refused")
    owner = Owner(others, dtype)
    for name in ("steering", "erasure"):
        owner.add(name)
    owner.wrappers["steering"].merge_and_unload()
    before = weights_of(owner.model)
    owner.merge("erasure")
    owner.unmerge("erasure")
    assert worst(weights_of(owner.model), before) == 0
    for column in (IN_ORDER, REVERSED):
        matrix(MERGED, "`merge_and_unload` of GRADIEND, then erasure", column, "to the bit")


def merge_orders(names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    yield from itertools.product(itertools.permutations(names), repeat=2)


@both_dtypes
def test_two_erasures_are_merged_and_taken_back_in_any_order(dtype: torch.dtype, others: Others, matrix: Callable):
    """They are at the outputs and the inputs of linear layers, and are merged into the weights of the same block."""
    batch = small_batch("bert", seed=5)
    for merging, unmerging in merge_orders(("erasure1", "erasure2")):
        model = others.base("bert").to(dtype)
        owner = Owner(others, dtype)
        for name in ("erasure1", "erasure2"):
            owner.add(name)
        model = owner.model
        for layer in erasure_layers(model).values():
            layer.set_adapter(["erasure1", "erasure2"])
        plain, together = weights_of(model), outputs_of(model, batch)
        for name in merging:
            owner.merge(name)
        if dtype == torch.float32:
            assert distance(outputs_of(model, batch), together) < MERGE_TOLERANCE[dtype]
        merged = weights_of(model)
        owner.unmerge(unmerging[0])
        assert worst(weights_of(model), merged) > 0
        owner.unmerge(unmerging[1])
        assert worst(weights_of(model), plain) == 0
        assert same(outputs_of(model, batch), together)
        column = IN_ORDER if unmerging == merging else REVERSED
        matrix(MERGED, "erasure, then another erasure", column, "to the bit")


def test_an_erasure_of_a_norm_and_one_of_the_linear_behind_it_in_any_order(others: Others):
    """Both are merged into the same weight from two modules, and each is unmerged on its own."""
    sites = {"norm": r"transformer\.h\.\d+\.ln_1", "linear": r"transformer\.h\.\d+\.attn\.c_attn"}
    batch = small_batch("gpt2", seed=5)
    for merging, unmerging in merge_orders(tuple(sites)):
        model = others.base("gpt2")
        wrappers = {
            name: PeftModel.from_pretrained(
                model, others.folder("gpt2", "erasure", target_modules=target), adapter_name=name
            )
            for name, target in sites.items()
        }
        plain, together = weights_of(model), outputs_of(model, batch)
        for name in merging:
            wrappers[name].merge_adapter([name])
        assert distance(outputs_of(model, batch), together) < MERGE_TOLERANCE[torch.float32]
        layers = {name: list(erasure_layers(model, name).values()) for name in unmerging}
        for number, name in enumerate(unmerging):
            for layer in layers[name]:
                layer.unmerge_weights()
            assert distance(outputs_of(model, batch), together) < MERGE_TOLERANCE[torch.float32]
            assert (worst(weights_of(model), plain) == 0) == (number == 1)
        assert same(outputs_of(model, batch), together)


@both_dtypes
def test_a_lora_is_merged_between_two_features(dtype: torch.dtype, others: Others, matrix: Callable):
    owner = Owner(others, dtype)
    states = [weights_of(owner.model)]
    for name in ("steering1", "steering2", "lora"):
        owner.add(name)
    for name in ("steering1", "lora", "steering2"):
        owner.merge(name)
        states.append(weights_of(owner.model))
    for first, second in (("steering1", "lora"), ("lora", "steering1")):
        for name in (first, second):
            owner.unmerge(name)
        assert worst(weights_of(owner.model), states[0]) <= 6 * rounding(*states)
        column = IN_ORDER if first == "steering1" else REVERSED
        matrix(MERGED, "GRADIEND, a LoRA, another GRADIEND", column, "roundings, as LoRA alone leaves them")
        for name in ("steering1", "lora", "steering2"):
            owner.merge(name)


@both_dtypes
def test_two_features_are_taken_back_together(dtype: torch.dtype, others: Others, matrix: Callable):
    owner = Owner(others, dtype)
    plain = weights_of(owner.model)
    for name in ("steering1", "steering2"):
        owner.add(name)
        owner.merge(name)
    owner.unmerge("steering1")
    assert worst(weights_of(owner.model), plain) == 0
    assert not any(layer.merged for layer in gradiend_layers(owner.model).values())
    for column in (IN_ORDER, REVERSED):
        matrix(MERGED, "GRADIEND, then another GRADIEND", column, "to the bit, both at once")
