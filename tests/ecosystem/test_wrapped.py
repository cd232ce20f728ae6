"""Adapters on models that several processes wrap or shard: DDP and FSDP2, directly and through accelerate.

Two processes run on the CPU (`wrapped_processes.py`) and write their results to files, which the tests check.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from hf_erasure import ConceptErasureConfig
from hf_erasure.adapters.common.layer import adapter_children
from tests.adapters.gradiend.lifecycle import lora
from tests.adapters.lifecycle import MERGE_TOLERANCE
from tests.ecosystem.placements import NAME, Erasure, Gradiend, Kind, outputs
from tests.ecosystem.wrapped_processes import KINDS, WAYS, main
from tests.prepared import together
from tests.small_models import LABELS, same

TABLE = "Several processes"
TITLES = {
    "ddp": "DDP",
    "ddp of a PeftModel": "DDP of a `PeftModel`",
    "accelerate ddp": "`Accelerator`, DDP",
    "fsdp2": "FSDP2",
    "accelerate fsdp2": "`Accelerator`, FSDP2",
}
NOUNS = {"erasure": "erasure", "gradiend": "GRADIEND"}
PROCESSES = 2
# For weights after one step with float32 gradients summed in another order; a step moves weights by 2 per cent.
STEP_TOLERANCE = 1e-5
Seen = Callable[[str, str, str], list[dict[str, Any]]]
IGNORED = "_ddp_params_and_buffers_to_ignore"


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "erasure": Erasure(root / "erasure"),
        "erasure at linear layers": Erasure(root / "linear", "all-linear"),
        "gradiend": Gradiend(root / "gradiend"),
    }


@pytest.fixture(scope="session")
def folder(adapters: dict[str, Kind], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the processes load from and write to."""
    folder = tmp_path_factory.mktemp("wrapped")
    for name, kind in adapters.items():
        kind.fitted("llama").save_pretrained(folder / name)
    adapters["erasure"].base("llama").save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="session")
def seen(folder: Path) -> Seen:
    """A function: (way of wrapping, kind of adapter, name of a check) → the result in each process."""
    status, printed = together(PROCESSES, main, folder, folder=folder, ACCELERATE_USE_CPU="true")
    assert status == 0, printed[-4000:]
    found = {way: [json.loads((folder / f"{way}-{n}.json").read_text()) for n in range(PROCESSES)] for way in WAYS}
    for processes in found.values():
        assert [process["world"] for process in processes] == [PROCESSES] * PROCESSES
    return lambda way, kind, what: [process[kind][what] for process in found[way]]


every_way = pytest.mark.parametrize("way", WAYS)
every_kind = pytest.mark.parametrize("kind", KINDS)
bare = pytest.mark.parametrize("way", [way for way in WAYS if "PeftModel" not in way])
sharded = pytest.mark.parametrize("way", [way for way in WAYS if "fsdp2" in way])
broadcasting = pytest.mark.parametrize("way", [way for way in WAYS if "fsdp2" not in way])


@every_way
@every_kind
def test_forward_and_switch(kind, way, seen: Seen, matrix):
    for process in seen(way, kind, "forward and switch"):
        # Gathering and broadcasting do not change any operation.
        assert process["on"] == process["off"] == process["on again"] == 0
        assert process["apart"] > 1e-2
        assert process["state is whole"]
        assert process["sharded"] == ("fsdp2" in way)
    matrix(TABLE, f"{NOUNS[kind]}: forward", TITLES[way], "same")
    matrix(TABLE, f"{NOUNS[kind]}: disable, enable", TITLES[way], "same")


def _check_step(found: list[dict[str, float]]) -> None:
    for process in found:
        assert process["moved"] > 100 * STEP_TOLERANCE
        assert process["distance"] < STEP_TOLERANCE
        assert process["output"] < STEP_TOLERANCE
        assert process["state is whole"]


@every_way
@every_kind
def test_training_all_weights_beside_it(kind, way, seen: Seen, matrix):
    _check_step(seen(way, kind, "train all weights"))
    matrix(TABLE, f"{NOUNS[kind]}: a step of all weights beside it", TITLES[way], "same")


@bare
@every_kind
def test_training_a_lora_beside_it(kind, way, seen: Seen, matrix):
    _check_step(seen(way, kind, "train a LoRA"))
    matrix(TABLE, f"{NOUNS[kind]}: a step of a LoRA beside it", TITLES[way], "same")


@every_way
@every_kind
def test_saving_in_the_main_process(kind, way, seen: Seen, adapters, folder, matrix):
    main, other = seen(way, kind, "save")
    # The full state dict, which the main process gathers, includes the adapter's state.
    assert main["keys of the state"] > 0 and other["keys of the state"] == -1
    wanted = outputs(adapters[kind].fitted("llama"), "llama")
    for saved in (f"saved from {way}, {kind}", f"saved state from {way}, {kind}"):
        if way == "ddp of a PeftModel":
            model = peft.PeftModel.from_pretrained(adapters[kind].base("llama"), folder / saved / NAME)
        else:
            model = adapters[kind].base("llama")
            model.load_adapter(folder / saved)
        assert same(outputs(model, "llama"), wanted)
    matrix(TABLE, f"{NOUNS[kind]}: save, load elsewhere", TITLES[way], "same")


@broadcasting
@every_kind
def test_merging_into_wrapped_weights(kind, way, seen: Seen, matrix):
    for process in seen(way, kind, "merge"):
        assert not process["message"]
        assert process["distance"] < MERGE_TOLERANCE[torch.float32]
        assert process["unmerged"] == 0
    matrix(TABLE, f"{NOUNS[kind]}: merge, unmerge", TITLES[way], "same")


@sharded
@every_kind
def test_merging_into_sharded_weights_is_refused(kind, way, seen: Seen, matrix):
    for process in seen(way, kind, "merge"):
        assert "cannot be merged: " in process["message"]
        assert process["message"].endswith("sharded. Load the model whole to merge.") or (
            "of the model are sharded, and each process has a part of them" in process["message"]
        )
        assert process["distance"] == 0
    matrix(TABLE, f"{NOUNS[kind]}: merge, unmerge", TITLES[way], "refused")


@bare
@every_kind
def test_attaching_to_a_wrapped_model(kind, way, seen: Seen, matrix):
    for process in seen(way, kind, "attach afterwards"):
        assert process["on"] == process["deleted"] == 0
        assert process["state is whole"]
    matrix(TABLE, f"{NOUNS[kind]}: attach to the wrapped model, delete", TITLES[way], "same")


@every_kind
def test_sharding_by_way_of_the_meta_device(kind, seen: Seen, matrix):
    way = "accelerate fsdp2"
    for process in seen(way, kind, "load efficiently"):
        assert "would be lost: with cpu_ram_efficient_loading" in process["message"]
        assert "or attach the adapter after accelerator.prepare(…)" in process["message"]
        assert process["on"] == 0
    given = f"{NOUNS[kind]}: `cpu_ram_efficient_loading=True`"
    matrix(TABLE, f"{given}, attached before", TITLES[way], "refused")
    matrix(TABLE, f"{given}, attached after", TITLES[way], "same")


# ---- what DDP broadcasts ---------------------------------------------------------------------------------------------


@broadcasting
@every_kind
def test_ddp_leaves_the_state_alone(kind, way, seen: Seen, matrix):
    main, other = seen(way, kind, "broadcast")
    for process in (main, other):
        assert process["sent of ours"] == []
        assert any(name.endswith("own") for name in process["sent of others"])
        # DDP sent the main process's value of another buffer,
        assert process["own"] == 1
    # and each process has kept the value that it wrote into its adapter.
    assert (main["ours"], other["ours"]) == (1, 2)
    matrix(TABLE, f"{NOUNS[kind]}: kept out of DDP's broadcast", TITLES[way], "yes")


def ours(model: torch.nn.Module) -> set[str]:
    paths = {f"{path}." for path, module in model.named_modules() if module in adapter_children(model)}
    return {name for name, _ in model.named_buffers() if name.startswith(tuple(paths))}


@every_kind
def test_names_follow_the_adapters(kind, adapters):
    model = adapters[kind].base("llama")
    assert not hasattr(model, IGNORED)
    model.load_adapter(adapters[kind].folder("llama"), adapter_name="first")
    assert ours(model) and ours(model) <= set(getattr(model, IGNORED))
    model.load_adapter(adapters[kind].folder("llama"), adapter_name="second")
    # A LoRA that is added later wraps modules, which renames the children.
    model.add_adapter(lora(task_type="CAUSAL_LM"), adapter_name="lora")
    both = ours(model)
    assert any("second" in name for name in both) and both <= set(getattr(model, IGNORED))
    model.delete_adapter("first")
    left = ours(model)
    assert left < both and left <= set(getattr(model, IGNORED))
    model.delete_adapter("second")
    assert not hasattr(model, IGNORED)


def test_names_of_an_adapter_that_a_part_of_the_model_has(adapters):
    model = adapters["erasure"].base("llama")
    model.model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=["k_proj"]), "part")
    with pytest.warns(UserWarning, match="are of different models"):
        model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=["q_proj"]), "whole")
    both = ours(model)
    assert {name.rpartition(".")[2] for name in both} == {"part", "whole"} and both <= set(getattr(model, IGNORED))


def test_names_of_an_adapter_that_a_part_gets_later(adapters):
    model = adapters["erasure"].base("llama")
    model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=["q_proj"]), "whole")
    with pytest.warns(UserWarning, match="are of different models"):
        model.model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=["k_proj"]), "part")
    both = ours(model)
    assert {name.rpartition(".")[2] for name in both} == {"part", "whole"} and both <= set(getattr(model, IGNORED))


@every_kind
def test_names_inside_a_peft_model(kind, adapters):
    kind = adapters[kind]
    model = peft.PeftModel.from_pretrained(kind.base("llama"), kind.folder("llama"), adapter_name=NAME)
    assert ours(model) and ours(model) <= set(getattr(model, IGNORED))
    base = model.unload()
    assert not hasattr(base, IGNORED)


@every_kind
def test_what_a_user_has_ignored_stays_ignored(kind, adapters):
    model = adapters[kind].base("llama")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["model.norm.weight"])
    model.load_adapter(adapters[kind].folder("llama"), adapter_name=NAME)
    assert ours(model) | {"model.norm.weight"} <= set(getattr(model, IGNORED))
    model.delete_adapter(NAME)
    assert getattr(model, IGNORED) == ["model.norm.weight"]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@every_kind
def test_copies_name_their_own(kind, way, adapters, tmp_path):
    model = adapters[kind].fitted("llama")
    copied = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert same(outputs(copied, "llama"), outputs(model, "llama"))
    assert ours(copied) and ours(copied) <= set(getattr(copied, IGNORED))
    copied.delete_adapter(NAME)
    assert not hasattr(copied, IGNORED) and ours(model) <= set(getattr(model, IGNORED))

    model.save_pretrained(tmp_path)
    loaded = adapters[kind].base("llama")
    loaded.load_adapter(tmp_path)
    assert same(outputs(loaded, "llama"), outputs(model, "llama"))
