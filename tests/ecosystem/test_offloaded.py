"""Adapters on models whose weights accelerate keeps in main memory or on disk: every verb, at every placement.

Offloading moves weights and does not change any operation, so outputs are compared to the bit.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor

from hf_erasure import (
    ConceptErasureConfig,
    GradiendConfig,
    GradiendTrainer,
    GradiendTrainingArguments,
    fit_concept_erasure,
    verify_adapter,
)
from hf_erasure.adapters.common.layer import adapter_children
from tests.adapters.lifecycle import MERGE_TOLERANCE, config_of
from tests.ecosystem.placements import (
    CPU,
    DISK,
    DISPATCHED,
    LOADED,
    MODELS,
    NAME,
    ORDERS,
    PLACEMENTS,
    Case,
    Erasure,
    Gradiend,
    Kind,
    Lora,
    Placement,
    device_map,
    has_placeholders,
    outputs,
)
from tests.fitting.gradiend.language_models import CLASSES, model_of, pairs, tokenizer_of
from tests.small_models import distance, roughen, same, small_batches

TOLERANCE = MERGE_TOLERANCE[torch.float32]
OURS = ("erasure", "gradiend")


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kind]:
    """A kind of adapter by its name, with models and adapters that all tests share."""
    root = tmp_path_factory.mktemp("placements")
    makers: dict[str, Callable[[Path], Kind]] = {
        "erasure": Erasure,
        "erasure at linear layers": functools.partial(Erasure, target="all-linear"),
        "erasure at embeddings": functools.partial(Erasure, target="embeddings"),
        "gradiend": Gradiend,
        "lora": Lora,
    }
    return functools.cache(lambda kind: makers[kind](root / kind))


# ---- verbs: each takes a case and fails where outputs are not those on one device ------------------------------------


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert same(found, wanted)


def forward(case: Case) -> None:
    model = case.model()
    assert has_placeholders(model)
    for _ in range(2):
        check(outputs(model, case.name), case.wanted)
    assert has_placeholders(model)


def save_and_load(case: Case) -> None:
    folder = case.folder / "saved"
    case.model().save_pretrained(folder)
    loaded = case.kind.base(case.name)
    loaded.load_adapter(folder, adapter_name=NAME)
    check(outputs(loaded, case.name), case.wanted)


def disable_and_enable(case: Case) -> None:
    model = case.model()
    model.disable_adapters()
    check(outputs(model, case.name), case.plain)
    model.enable_adapters()
    check(outputs(model, case.name), case.wanted)


def delete(case: Case) -> None:
    model = case.model()
    check(outputs(model, case.name), case.wanted)
    model.delete_adapter(case.adapter)
    check(outputs(model, case.name), case.plain)


def place_anew(case: Case) -> None:
    model = case.model()
    check(outputs(model, case.name), case.wanted)
    if case.placement is LOADED:
        # Weights that came from the checkpoint are read from it again.
        offloaded = [m for m in model.modules() if getattr(getattr(m, "_hf_hook", None), "offload", False)]
        index, spread = offloaded[0]._hf_hook.weights_map.dataset.index, dict(model.hf_device_map)
        remove_hook_from_submodules(model)
        accelerate.dispatch_model(model, spread, main_device="cpu", offload_index=index, force_hooks=True)
        check(outputs(model, case.name), case.wanted)
    else:
        remove_hook_from_submodules(model)
        check(outputs(model, case.name), case.wanted)
        for number, placement in enumerate((DISPATCHED, CPU, DISK)):
            assert placement.place is not None
            placement.place(model, case.name, case.new_folder(f"anew-{number}"))
            assert has_placeholders(model)
            check(outputs(model, case.name), case.wanted)
            remove_hook_from_submodules(model)
    model.delete_adapter(case.adapter)
    check(outputs(model, case.name), case.plain)


def merge_and_unmerge(case: Case) -> None:
    model = case.peft_model()
    before = outputs(model, case.name)
    check(before, case.wanted)
    assert has_placeholders(model)
    _merge(model)
    assert has_placeholders(model)
    assert distance(outputs(model, case.name), before) < TOLERANCE
    model.unmerge_adapter()
    check(outputs(model, case.name), before)


def merge_and_unload(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*merged without the usual comparison")
        model = case.peft_model().merge_and_unload()
    assert has_placeholders(model) and not adapter_children(model)
    merged = outputs(model, case.name)
    assert distance(merged, case.wanted) < TOLERANCE
    # The outputs stay when the weights are moved back.
    remove_hook_from_submodules(model)
    if case.placement is not LOADED:
        check(outputs(model, case.name), merged)


def _merge(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*merged without the usual comparison")
        model.merge_adapter()


VERBS = {
    "forward": forward,
    "save, and load elsewhere": save_and_load,
    "disable, enable": disable_and_enable,
    "delete": delete,
    "place anew, delete": place_anew,
}
MERGES = {"merge, unmerge": merge_and_unmerge, "merge and unload": merge_and_unload}

every_placement = pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
every_order = pytest.mark.parametrize("order", ORDERS)


def rotating(**parameters: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise over every combination of the values, each with one model, so that each value meets each model.

    accelerate treats a module in the same way in every architecture, and adapters are tested on all of them without
    offloading: a fault that only one model shows at one placement shows at other values too.
    """
    values = [list(value) for value in parameters.values()]
    rows = [
        (MODELS[sum(place) % len(MODELS)], *(value[i] for value, i in zip(values, place, strict=True)))
        for place in itertools.product(*(range(len(value)) for value in values))
    ]
    return pytest.mark.parametrize(("name", *parameters), rows, ids=lambda value: str(value))


def row(verb: str, order: str) -> str:
    return f"{verb}; attached {order}"


# ---- our two kinds ---------------------------------------------------------------------------------------------------


@rotating(kind=OURS, placement=PLACEMENTS, order=ORDERS, verb=VERBS)
def test_same_as_on_one_device(kind, name, placement, order, verb, kinds, matrix, tmp_path):
    case = Case(kinds(kind), name, placement, order, tmp_path)
    VERBS[verb](case)
    matrix(case.kind.table, row(verb, order), placement.title, "same")


@rotating(placement=PLACEMENTS, order=ORDERS, verb=MERGES)
def test_an_erasure_at_linear_layers_merges(name, placement, order, verb, kinds, matrix, tmp_path):
    case = Case(kinds("erasure at linear layers"), name, placement, order, tmp_path)
    MERGES[verb](case)
    matrix(case.kind.table, row(f"{verb}, at linear layers", order), placement.title, "same")


REFUSED = {
    "erasure": r"cannot be merged: .* weights of this model are offloaded. Load the model on one device to merge",
    "gradiend": r"cannot be merged: .*weight is offloaded. Load the model on one device to merge",
}


@rotating(kind=OURS, placement=PLACEMENTS, order=ORDERS)
def test_other_merges_are_refused(kind, name, placement, order, kinds, matrix, tmp_path):
    case = Case(kinds(kind), name, placement, order, tmp_path)
    model, message = case.peft_model(), REFUSED[kind]
    for _ in range(2):
        # It is refused before and after a forward pass, and below after one that failed, which leaves weights in place.
        with pytest.raises(ValueError, match=message):
            model.merge_adapter()
        check(outputs(model, case.name), case.wanted)
    with pytest.raises(Exception, match=r"\w"):
        model(**dict.fromkeys(["input_ids", "decoder_input_ids"][: 1 + (name == "t5")], torch.full((1, 3), 10**6)))
    with pytest.raises(ValueError, match=message):
        model.merge_adapter()
    where = ", at norms" if kind == "erasure" else ""
    matrix(case.kind.table, row(f"merge{where}", order), placement.title, "refused")


@rotating(kind=["erasure at linear layers", "gradiend"], placement=PLACEMENTS[1:])
def test_merged_first_placed_then(kind, name, placement, kinds, matrix, tmp_path):
    case = Case(kinds(kind), name, placement, "before", tmp_path)
    model = peft.PeftModel.from_pretrained(case.kind.base(name), case.kind.folder(name), adapter_name=NAME)
    model.merge_adapter()
    merged = outputs(model, name)
    case.placed_base(model.get_base_model())
    check(outputs(model, name), merged)
    model.unmerge_adapter()
    check(outputs(model, name), case.wanted)
    check(outputs(model.unload(), name), case.plain)
    matrix(case.kind.table, "merge, place, unmerge, unload", placement.title, "same")


@rotating(placement=PLACEMENTS, order=ORDERS, sequential=[True, False])
def test_fitting_an_erasure(name, placement, order, sequential, kinds, matrix, tmp_path):
    case = Case(kinds("erasure"), name, placement, order, tmp_path)

    def fitted(model: Any, adapter: str) -> dict[str, Tensor]:
        fit_concept_erasure(model, small_batches(name, seed=7), adapter, sequential=sequential, progress=False)
        return outputs(model, name)

    plain = case.kind.base(name)
    plain.add_adapter(config_of(case.kind.cell(name)), adapter_name=NAME)
    wanted = fitted(plain, NAME)
    model = case.model()
    assert has_placeholders(model)
    check(fitted(model, case.adapter), wanted)
    assert not same(wanted, case.wanted)
    known = [found.peft_config[n].provenance["fingerprint"] for found, n in ((model, case.adapter), (plain, NAME))]
    assert known[0] == known[1] and known[0]
    # The fitted adapter is saved, and stays when the weights are moved back.
    model.save_pretrained(tmp_path / "saved")
    loaded = case.kind.base(name)
    loaded.load_adapter(tmp_path / "saved", adapter_name=NAME)
    check(outputs(loaded, name), wanted)
    if placement is not LOADED:
        remove_hook_from_submodules(model)
        check(outputs(model, name), wanted)
    how = "sequential=True" if sequential else "sequential=False"
    matrix(case.kind.table, row(f"fit, {how}", order), placement.title, "same")


@every_order
@every_placement
def test_fitting_a_gradiend_is_refused(placement, order, matrix, tmp_path):
    model = model_of("llama").eval()
    model.save_pretrained(tmp_path / "base")

    def attach(model: Any) -> Any:
        model.add_adapter(GradiendConfig(feature="gender", classes=CLASSES), adapter_name=NAME)
        return model

    spread = tmp_path / "spread"
    spread.mkdir()
    if placement is LOADED:
        model = attach(
            type(model).from_pretrained(tmp_path / "base", device_map=device_map("llama"), offload_folder=spread)
        )
    elif order == "before":
        model = placement.place(attach(model), "llama", spread)
    else:
        model = attach(placement.place(model, "llama", spread))
    trainer = GradiendTrainer(
        model,
        args=GradiendTrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, save_strategy="no"),
        train_dataset=pairs("llama"),
        tokenizer=tokenizer_of("llama"),
    )
    with pytest.raises(ValueError, match=r"is offloaded .*; load the model onto one device to fit it"):
        trainer.train()
    matrix(Gradiend.table, row("fit", order), placement.title, "refused")


# ---- what a stock LoRA does in the same cells ------------------------------------------------------------------------


def saw(verb: Callable[[Case], None], case: Case) -> str:
    """The outcome of a verb, in words; a failure of LoRA is an entry in the table and not a failed test."""
    try:
        verb(case)
    except AssertionError:
        return "another output"
    except Exception as error:
        return f"`{type(error).__name__}`"
    return "same"


# Only for the table that `make matrix` writes: no code of this package runs here.
@pytest.mark.slow
@pytest.mark.parametrize("verb", [*VERBS, *MERGES])
@every_order
@every_placement
def test_lora_for_comparison(placement, order, verb, kinds, matrix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes copies of offloaded weights below the current folder
    case = Case(kinds("lora"), "llama", placement, order, tmp_path)
    matrix(case.kind.table, row(verb, order), placement.title, saw({**VERBS, **MERGES}[verb], case))


# ---- special cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [CPU, DISK], ids=str)
@pytest.mark.parametrize("kind", OURS)
def test_state_is_not_offloaded_with_buffers(kind, placement: Placement, kinds, tmp_path):
    """`offload_buffers=True` moves the buffers of every module that has a hook to the meta device."""
    case = Case(kinds(kind), "bert", placement, "before", tmp_path)
    model = case.kind.fitted("bert")
    if placement is CPU:
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=True)
    assert not any(part.is_meta for child in adapter_children(model) for part in child.state_of(NAME))
    check(outputs(model, "bert"), case.wanted)
    save = case.folder / "saved"
    model.save_pretrained(save)
    loaded = case.kind.base("bert")
    loaded.load_adapter(save, adapter_name=NAME)
    check(outputs(loaded, "bert"), case.wanted)


@pytest.mark.parametrize("placement", [DISPATCHED, CPU, DISK], ids=str)
@pytest.mark.parametrize("kind", OURS)
def test_verifying_finds_its_own_input(kind, placement: Placement, kinds, tmp_path):
    case = Case(kinds(kind), "bert", placement, "attached after", tmp_path)
    model = case.model()
    assert verify_adapter(model, case.adapter), str(verify_adapter(model, case.adapter))
    model.disable_adapters()
    assert not verify_adapter(model, case.adapter)


@pytest.mark.parametrize("kind", OURS)
def test_one_of_two_adapters_comes_and_goes(kind, kinds, tmp_path):
    case = Case(kinds(kind), "llama", CPU, "before", tmp_path)
    model = case.model()
    model.load_adapter(case.kind.folder("llama"), adapter_name="another")
    model.delete_adapter(NAME)
    check(outputs(model, "llama"), case.wanted)
    remove_hook_from_submodules(model)
    check(outputs(model, "llama"), case.wanted)


@pytest.mark.parametrize("placement", [CPU, DISK], ids=str)
def test_merging_after_a_forward_pass_that_failed(placement, kinds, tmp_path):
    """Such a pass leaves weights in their modules; the next pass replaces them by accelerate's copies."""
    case = Case(kinds("erasure at embeddings"), "llama", placement, "after", tmp_path)
    model = case.peft_model()
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 10**6))
    assert not model.get_input_embeddings().weight.is_meta
    _merge(model)
    assert distance(outputs(model, "llama"), case.wanted) < TOLERANCE
    model.unmerge_adapter()
    check(outputs(model, "llama"), case.wanted)


@pytest.mark.parametrize("placement", [DISPATCHED, CPU, DISK], ids=str)
@pytest.mark.parametrize("kind", OURS)
def test_another_base_is_known_by_its_offloaded_weights(kind, placement, kinds, tmp_path):
    case = Case(kinds(kind), "bert", placement, "after", tmp_path)
    other = case.placed_base(roughen(case.kind.base("bert"), torch.Generator().manual_seed(1)))
    before = outputs(other, "bert")
    with pytest.raises(ValueError, match="this is another model"):
        other.load_adapter(case.kind.folder("bert"), adapter_name=NAME)
    check(outputs(other, "bert"), before)


def test_a_tied_weight_is_refused_though_its_placeholders_differ(kinds, tmp_path):
    name, kind = "t5", kinds("erasure")
    model = kind.base(name)
    model.add_adapter(
        ConceptErasureConfig(labels=["female", "male"], target_modules=["embed_tokens"]), adapter_name=NAME
    )
    fit_concept_erasure(model, small_batches(name), NAME, sequential=False, progress=False)
    model.save_pretrained(tmp_path / "adapter")
    for placement in (CPU, DISK):
        base = placement.place(kind.base(name), name, tmp_path)
        wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", adapter_name=NAME)
        before = outputs(wrapped, name)
        with pytest.raises(ValueError, match=r"cannot be merged: the weight of '\w*\.?embed_tokens' is shared by"):
            wrapped.merge_adapter()
        check(outputs(wrapped, name), before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_order
@pytest.mark.parametrize("kind", OURS)
def test_dispatched_over_two_cuda_devices(kind, order, kinds, tmp_path):
    case = Case(kinds(kind), "llama", CPU, order, tmp_path)
    blocks = {"model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    spread = {"model.embed_tokens": 0, "model.rotary_emb": 0, **blocks}
    model = case.kind.fitted("llama") if order == "before" else case.kind.base("llama")
    model = accelerate.dispatch_model(model, spread)
    if order == "after":
        model.load_adapter(case.kind.folder("llama"), adapter_name=NAME)
    found = {key: value.cpu() for key, value in outputs(model, "llama").items()}
    # Another device adds in another order.
    assert distance(found, case.wanted) < 1e-4
    assert distance(found, case.plain) > 1e-2
    assert {child.state_of(NAME)[0].device.index for child in adapter_children(model)} == {0, 1}
